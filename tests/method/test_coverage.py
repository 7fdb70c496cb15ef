"""States, edges, tables and scores against the paper in plain lines (`oracle`), and the laws that hold between them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacpipe.errors import ParamsError
from nacpipe.method.coverage import (
    bin_edges,
    combine_layers,
    coverage_table,
    layer_score,
    product_borders,
    select_source,
)
from nacpipe.method.term import layer_of, source_of
from tests import oracle

BINS = (4, 5, 6, 7, 10, 49, 50, 500, 1001)
ALPHAS = st.floats(1e-30, 1e30)


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("kind", ["log", "linear"])
def test_edges_are_the_oracles(bins: int, kind: str) -> None:
    edges = bin_edges(bins, kind)  # type: ignore[arg-type]
    assert edges.dtype == np.float64
    assert edges.size == bins
    np.testing.assert_allclose(edges, oracle.bin_edges(bins, kind), rtol=1e-15, atol=1e-15)
    assert (np.diff(edges) > 0).all()


def test_ten_log_edges_by_hand() -> None:
    """u = 1, 8.65569, 16.31139, 23.96708, √1000; l = log10(u) / 3, which a pocket calculator gives."""
    by_hand = [0, 0.312434, 0.404164, 0.459872, 0.5, 0.540128, 0.595836, 0.687566, 1.01, 1.2]
    np.testing.assert_allclose(bin_edges(10), by_hand, atol=1e-6)


def test_smallest_edges_by_hand() -> None:
    assert bin_edges(4).tolist() == [0, 0.5, 1.01, 1.2]
    # Odd: u = 1, (1 + √1000) / 2, √1000 below ½, and nothing but ½ above.
    np.testing.assert_allclose(bin_edges(5), [0, math.log(16.311388) / math.log(1000), 0.5, 1.01, 1.2], rtol=1e-7)
    np.testing.assert_allclose(bin_edges(4, "linear"), [0, 1 / 3, 2 / 3, 1], rtol=1e-15)


@pytest.mark.parametrize("bins", range(4, 120))
def test_one_half_is_a_log_edge_so_that_zero_products_have_one_bin(bins: int) -> None:
    assert 0.5 in bin_edges(bins)
    assert (product_borders(bin_edges(bins), 3.0) == 0).sum() == 1


@pytest.mark.parametrize("bins", [4, 6, 50, 1000])
def test_even_log_edges_are_symmetric_about_one_half(bins: int) -> None:
    inner = bin_edges(bins)[1:-2]
    np.testing.assert_allclose(inner + inner[::-1], 1.0, rtol=1e-15)


@pytest.mark.parametrize("kind", ["log", "linear"])
def test_the_states_0_and_1_have_bins(kind: str) -> None:
    edges = bin_edges(50, kind)  # type: ignore[arg-type]
    assert oracle.bins_of(np.array([0.0, 1.0]), edges).tolist() == [0, 47 if kind == "log" else 48]


def test_fewer_than_four_bins_are_refused() -> None:
    with pytest.raises(ParamsError, match=r"^bins is 3; at least 4 edges are needed$"):
        bin_edges(3)


def test_unknown_edges_are_refused() -> None:
    with pytest.raises(ParamsError, match=r"^edges is 'round'; known: log, linear$"):
        bin_edges(10, "round")  # type: ignore[arg-type]


@given(st.sampled_from(BINS), st.sampled_from(["log", "linear"]), ALPHAS)
def test_borders_are_the_smallest_float32_at_or_above_logit_over_alpha(bins: int, kind: str, alpha: float) -> None:
    edges = bin_edges(bins, kind)  # type: ignore[arg-type]
    borders = product_borders(edges, alpha)
    assert borders.dtype == np.float32
    assert (borders[edges <= 0] == -np.inf).all()
    assert (borders[edges >= 1] == np.inf).all()
    for edge, border in zip(edges, borders, strict=True):
        if 0 < edge < 1:
            exact = 0.0 if edge == 0.5 else (math.log(edge) - math.log1p(-edge)) / alpha
            slack = 1e-14 * abs(exact)  # of two implementations of the logarithm
            assert float(border) >= exact - slack
            assert float(np.nextafter(border, np.float32(-np.inf))) < exact + slack


@given(st.sampled_from(BINS), st.floats(1e-6, 1e6))
def test_twice_alpha_halves_every_border(bins: int, alpha: float) -> None:
    """(alpha, x) and (2 · alpha, x / 2) have the same states, so the same bins; a factor of 2 rounds nothing."""
    edges = bin_edges(bins)
    assert (product_borders(edges, 2 * alpha) * 2 == product_borders(edges, alpha)).all()


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_bad_alpha_is_refused(alpha: float) -> None:
    with pytest.raises(ParamsError, match=rf"^alpha is {alpha}; it must be a positive finite number$"):
        product_borders(bin_edges(10), alpha)


def test_select_source_multiplies_in_float32_or_takes_one() -> None:
    activation = np.array([[1 / 3, 0.0], [3.0, -2.0]], np.float32)
    gradient = np.array([[0.1, -5.0], [-0.5, 4.0]], np.float32)
    product = select_source(activation, gradient)
    assert product.dtype == np.float32
    assert product.tolist() == [[float(np.float32(1 / 3) * np.float32(0.1)), 0.0], [-1.5, -8.0]]
    assert math.copysign(1.0, product[0, 1]) == -1.0  # 0 · −5 = −0, which falls where 0 does
    assert select_source(activation, gradient, "activation").tolist() == activation.tolist()
    assert select_source(activation, gradient, "gradient").tolist() == gradient.tolist()


def test_unknown_source_is_refused() -> None:
    one = np.ones((1, 1), np.float32)
    with pytest.raises(ParamsError, match=r"^source is 'state'; known: product, activation, gradient$"):
        select_source(one, one, "state")  # type: ignore[arg-type]


def test_table_by_hand_and_by_the_oracle() -> None:
    counts = np.array([[0, 1, 4, 10], [7, 5, 2, 1]], np.int32)
    assert coverage_table(counts, 5).tolist() == [[0.0, 0.2, 0.8, 1.0], [1.0, 1.0, 0.4, 0.2]]
    for saturation in (1, 3, 7, 5000):
        np.testing.assert_array_equal(coverage_table(counts, saturation), oracle.table(counts, saturation))
    assert coverage_table(counts, 5000).max() == 10 / 5000  # the paper's 5000 over 1,000 images: never full


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=20), st.integers(1, 10_000), st.integers(1, 10_000))
def test_coverage_falls_as_saturation_rises(counts: list[int], one: int, other: int) -> None:
    low, high = sorted([one, other])
    table = np.array([counts], np.int32)
    assert (coverage_table(table, high) <= coverage_table(table, low)).all()


def test_layer_score_is_the_mean_of_the_table() -> None:
    assert layer_score(np.array([0, 3, 20]), neurons=4, saturation=5).tolist() == [0.0, 0.15, 1.0]


def test_layers_are_averaged_by_normalised_weights() -> None:
    scores = np.array([[0.0, 1.0, 0.5], [1.0, 1.0, 0.25]])
    assert combine_layers(scores, np.array([1.0, 3.0])).tolist() == [0.75, 1.0, 0.3125]
    assert combine_layers(scores, np.array([0.0, 0.2])).tolist() == [1.0, 1.0, 0.25]


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=5).filter(lambda w: sum(w) > 1e-3), st.integers(0, 2**32 - 1))
def test_weighted_score_is_the_oracles(weights: list[float], seed: int) -> None:
    scores = np.random.RandomState(seed).rand(len(weights), 7)
    expected = oracle.weighted_score(list(scores), weights)
    np.testing.assert_allclose(combine_layers(scores, np.array(weights)), expected, rtol=1e-13)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -0.5], [math.inf, 1.0], [math.nan, 1.0]])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ParamsError, match=r"^weights are \[.*\]; they must be ≥ 0, finite and not all 0$"):
        combine_layers(np.zeros((2, 3)), np.array(weights))


@pytest.mark.parametrize(
    ("term", "layer", "source"),
    [
        ("layer3", "layer3", "product"),
        ("layer3:product", "layer3", "product"),
        ("layer3.0:gradient", "layer3.0", "gradient"),
        ("logits:activation", "logits", "activation"),
        ("a:b", "a:b", "product"),  # a layer's own name
        ("a:b:gradient", "a:b", "gradient"),
    ],
)
def test_terms(term: str, layer: str, source: str) -> None:
    assert (layer_of(term), source_of(term)) == (layer, source)
