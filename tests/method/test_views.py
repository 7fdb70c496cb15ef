"""Views against the oracle: by class, of components; and how classes are grouped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from nacpipe.errors import ValuesError
from nacpipe.method.class_groups import ClassGroups, choose_groups, cluster, count_groups_for
from nacpipe.method.components import fit_components, has_enough_images
from nacpipe.method.counting import SparseCounts, count_groups, fill_grouped_rows, fill_ranked
from nacpipe.method.coverage import bin_edges, layer_score, product_borders
from nacpipe.method.fitted_term import fit_term
from nacpipe.method.params import LayerParams
from nacpipe.method.sorted_index import index_groups
from tests import oracle

PLACES = [0.0, -0.0, 0.25, -0.25, 1.0, -1.0, 3.5, 20.0]  # ties, and no value near a border of these alphas
VALUES = st.sampled_from(PLACES)
ROWS = st.integers(1, 12)


@st.composite
def grouped(draw: st.DrawFn) -> tuple[Any, ...]:
    """Training samples and queries, each in one of a few groups; groups may be empty on either side."""
    neurons, groups = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    sides = []
    for _ in range(2):
        rows = draw(ROWS)
        values = draw(hnp.arrays(np.float32, (rows, neurons), elements=VALUES))
        sides += [values, draw(hnp.arrays(np.int32, rows, elements=st.integers(0, groups - 1)))]
    return *sides, groups


@settings(max_examples=150)
@given(grouped(), st.sampled_from([4, 7, 20]), st.integers(1, 4), st.sampled_from([0.7, 3.1]))
def test_by_class_is_the_oracles(case: Any, bins: int, saturation: int, alpha: float) -> None:
    train, train_groups, queries, query_groups, groups = case
    edges = bin_edges(bins)
    assert not oracle.in_doubt(np.array(PLACES, np.float32), alpha, oracle.bin_edges(bins)).any()
    expected = oracle.score_by_class(
        train, train_groups, queries, query_groups, bins=bins, saturation=saturation, alpha=alpha
    )
    borders = product_borders(edges, alpha)
    (indexed,) = fill_ranked([(index_groups(train, train_groups, queries, query_groups), borders, saturation)])
    counts = count_groups(train, train_groups, groups, borders)
    np.testing.assert_array_equal(fill_grouped_rows(queries, query_groups, borders, counts, saturation), indexed)
    np.testing.assert_allclose(layer_score(indexed, train.shape[1], saturation), expected, rtol=1e-12)
    logits = np.eye(groups, dtype=np.float32)[query_groups]
    fitted = fit_term(
        "a:by_class",
        LayerParams(bins=bins, saturation=saturation, alpha=alpha),
        train,
        groups=ClassGroups(group_of=np.arange(groups, dtype=np.int32), count=groups),
        train_groups=train_groups,
    )
    np.testing.assert_allclose(fitted.score(queries, logits), expected, rtol=1e-12)


@given(grouped(), st.sampled_from([4, 20]))
def test_sparse_counts_hold_every_count(case: Any, bins: int) -> None:
    train, train_groups, _, _, groups = case
    found = count_groups(train, train_groups, groups, product_borders(bin_edges(bins), 0.7))
    edges = oracle.bin_edges(bins)
    dense = np.concatenate(
        [
            oracle.count(oracle.bins_of(oracle.states(train[train_groups == g], 0.7), edges), bins - 1)
            for g in range(groups)
        ]
    )
    np.testing.assert_array_equal(found.dense(bins), dense)
    np.testing.assert_array_equal(found.row_sums(), dense.sum(axis=1))
    np.testing.assert_array_equal(found.sum_groups(bins), dense.reshape(groups, -1, bins - 1).sum(axis=0))
    again = SparseCounts.of(dense.astype(np.int32))
    for what in ("starts", "bins", "counts"):
        np.testing.assert_array_equal(getattr(again, what), getattr(found, what))
    assert (found.counts > 0).all()


def test_groups_of_one_image_and_of_none() -> None:
    """Two images in groups 0 and 2; a query of group 1 has seen nothing."""
    train = np.array([[1.0, 1.0], [-1.0, 1.0]], np.float32)
    queries = np.array([[1.0, 1.0]] * 3, np.float32)
    index = index_groups(train, np.array([0, 2], np.int32), queries, np.array([0, 1, 2], np.int32))
    (sums,) = fill_ranked([(index, product_borders(bin_edges(4), 1.0), 1)])
    assert sums.tolist() == [2, 0, 1]
    assert (index.train_samples, index.queries, index.neurons, len(index.parts)) == (2, 3, 2, 2)


def test_one_group_is_the_plain_view() -> None:
    random = np.random.default_rng(0)
    train, queries = (random.normal(size=(rows, 6)).astype(np.float32) for rows in (90, 40))
    params = LayerParams(bins=31, saturation=7, alpha=2.0)
    one = ClassGroups(group_of=np.zeros(3, np.int32), count=1)
    by_class = fit_term("a:by_class", params, train, groups=one, train_groups=np.zeros(90, np.int32))
    plain = fit_term("a", params, train)
    np.testing.assert_array_equal(by_class.score(queries, np.zeros((40, 3), np.float32)), plain.score(queries))
    np.testing.assert_array_equal(by_class.counts, plain.counts)
    np.testing.assert_array_equal(by_class.coverage, plain.coverage)


def test_coverage_by_class_is_the_mean_of_the_groups() -> None:
    """Three values in one bin of group 0, one of them in group 1; saturation 2: full, half, and nothing elsewhere."""
    train = np.array([[5.0]] * 4, np.float32)
    two = ClassGroups(group_of=np.arange(2, dtype=np.int32), count=2)
    params = LayerParams(bins=4, saturation=2, alpha=1.0)
    fitted = fit_term("a:by_class", params, train, groups=two, train_groups=np.array([0, 0, 0, 1], np.int32))
    assert fitted.counts.tolist() == [[0, 4, 0]]
    assert fitted.coverage.tolist() == [[0.0, 0.75, 0.0]]


def test_counts_of_batches_add_up() -> None:
    train = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)
    params = LayerParams(bins=12, saturation=3, alpha=2.0)
    added = fit_term("a", params, train[:17]).add(fit_term("a", params, train[17:]))
    np.testing.assert_array_equal(added.counts, fit_term("a", params, train).counts)


# --- groups of classes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "classes", "groups"),
    [(1000, 10, 10), (999, 10, 9), (994, 1000, 9), (50_000, 100, 64), (50_000, 10, 10), (199, 10, 1), (5, 3, 1)],
)
def test_how_many_groups(rows: int, classes: int, groups: int) -> None:
    assert count_groups_for(rows, classes) == groups


def blocks(classes: int, kinds: int) -> NDArray[np.float32]:
    """Rows that point in `kinds` directions, a little apart, (classes, kinds + 1)."""
    weight = 5 * np.eye(kinds, kinds + 1)[np.arange(classes) % kinds]
    return (weight + np.random.default_rng(0).normal(0, 0.1, weight.shape)).astype(np.float32)


def one_hot(predicted: NDArray[np.intp], classes: int) -> NDArray[np.float32]:
    return np.eye(classes, dtype=np.float32)[predicted]


def test_many_images_keep_the_classes() -> None:
    logits = one_hot(np.arange(300) % 3, 3)
    found = choose_groups([logits[:100], logits[100:]], None)
    assert (found.group_of.tolist(), found.count) == ([0, 1, 2], 3)
    assert found.assign(np.array([[0, 2, 1], [5, 2, 5]], np.float32)).tolist() == [1, 0]  # a tie: the first class


def test_classes_with_similar_rows_share_a_group() -> None:
    found = choose_groups([one_hot(np.arange(400) % 12, 12)], blocks(12, 4))
    assert found.count == 4
    assert found.group_of.tolist() == [0, 1, 2, 3] * 3


def test_without_a_classifier_mean_logits_are_compared() -> None:
    """12 classes of 4 kinds; images of a class have large logits of its kind. Class 8 was never predicted."""
    random = np.random.default_rng(3)
    predicted = np.array([c for c in np.arange(440) % 12 if c != 8][:400])
    alike = (np.arange(12)[:, None] % 4 == np.arange(12) % 4).astype(np.float32)
    logits = (3 * alike[predicted] + 2 * one_hot(predicted, 12) + random.normal(0, 0.1, (400, 12))).astype(np.float32)
    logits[:, 8] = np.minimum(logits[:, 8], logits.max(axis=1) - 1)
    for parts in ([logits], [logits[:1], logits[1:150], logits[150:]]):
        found = choose_groups(parts, None)
        assert found.count == 4
        assert found.group_of.tolist() == [0, 1, 2, 3] * 3
    other = choose_groups([logits], np.ones((7, 3), np.float32))  # a classifier of other classes is none
    assert other.group_of.tolist() == found.group_of.tolist()


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 8))
def test_clusters_are_the_same_every_time_and_none_is_empty(seed: int, points: int, count: int) -> None:
    values = np.random.default_rng(seed).normal(size=(points, 3))
    labels = cluster(values, count)
    np.testing.assert_array_equal(labels, cluster(values.copy(), count))
    assert sorted(set(labels.tolist())) == list(range(min(count, points)))
    first = [labels.tolist().index(label) for label in range(labels.max() + 1)]
    assert first == sorted(first)  # numbered by their first points
    centres = np.stack([values[labels == g].mean(axis=0) for g in range(labels.max() + 1)])
    distances = ((values[:, None] - centres) ** 2).sum(axis=2)
    own = distances[np.arange(points), labels]
    assert (own <= distances.min(axis=1) + 1e-9).all()  # each point is nearest to its own cluster's centre


def test_equal_points_fill_at_most_as_many_clusters() -> None:
    labels = cluster(np.ones((5, 2)), 3)
    assert len(labels) == 5
    assert set(labels.tolist()) <= {0, 1, 2}


# --- components -------------------------------------------------------------------------------------------------------


def correlated(rows: int, neurons: int, seed: int) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    scales = 2.0 ** -np.arange(neurons)  # spreads apart, so that directions are well defined
    mixing = np.linalg.qr(random.normal(size=(neurons, neurons)))[0]
    return (random.normal(size=(rows, neurons)) * scales @ mixing + random.normal(size=neurons)).astype(np.float32)


@pytest.mark.parametrize("neurons", [1, 3, 8])
def test_components_are_the_oracles(neurons: int) -> None:
    train, values = correlated(200, neurons, 1), correlated(50, neurons, 2)
    components = fit_components(train)
    assert components is not None
    found = components.project(values)
    assert (found.dtype, found.shape) == (np.float32, (50, neurons))
    np.testing.assert_allclose(found, oracle.components(train, values), rtol=2e-4, atol=2e-4)
    own = components.project(train).astype(np.float64)
    np.testing.assert_allclose(own.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(own.T).reshape(neurons, neurons), np.eye(neurons), atol=1e-3)


@pytest.mark.parametrize("saturation", [1, 6])
def test_scores_of_components_are_the_oracles_of_the_projected_values(saturation: int) -> None:
    train, values = correlated(200, 4, 3), correlated(60, 4, 4)
    params = LayerParams(bins=20, saturation=saturation, alpha=1.5)
    fitted = fit_term("a:components", params, train)
    assert fitted.components is not None
    projected = [fitted.components.project(side) for side in (train, values)]
    edges = oracle.bin_edges(20)
    assert not any(oracle.in_doubt(side, 1.5, edges).any() for side in projected)
    expected = oracle.score_layer(*projected, bins=20, saturation=saturation, alpha=1.5)
    np.testing.assert_allclose(fitted.score(values), expected, rtol=1e-12)
    assert (fitted.neurons, fitted.counted, fitted.counts.shape) == (4, 4, (4, 19))


def test_directions_without_spread_are_left_out() -> None:
    train = correlated(100, 3, 5)
    wide = np.concatenate([train, np.full((100, 2), 7.0, np.float32), train[:, :1]], axis=1)  # constant, and a copy
    components = fit_components(wide)
    assert components is not None
    assert components.matrix.shape == (6, 3)
    fitted = fit_term("a:components", LayerParams(bins=9, saturation=2, alpha=1.0), wide)
    assert (fitted.neurons, fitted.counted) == (6, 3)


@pytest.mark.parametrize("train", [np.full((9, 3), 2.5, np.float32), np.array([[1.0, 2.0]], np.float32)])
def test_equal_images_have_no_components(train: NDArray[np.float32]) -> None:
    assert fit_components(train) is None
    with pytest.raises(
        ValuesError,
        match=r"^term 'a:components' has no components: all images of id/train have the same values; leave it out$",
    ):
        fit_term("a:components", LayerParams(bins=9, saturation=2, alpha=1.0), train)


def test_signs_and_batches_do_not_change_components() -> None:
    train = correlated(100, 5, 6)
    components, flipped = fit_components(train), fit_components(-train)
    assert components is not None and flipped is not None
    largest = np.abs(components.matrix).argmax(axis=0)
    assert (components.matrix[largest, np.arange(5)] > 0).all()
    np.testing.assert_allclose(components.matrix, flipped.matrix, rtol=1e-3, atol=1e-5)
    alone = np.concatenate([components.project(row[None]) for row in train])
    np.testing.assert_allclose(alone, components.project(train), rtol=2e-7, atol=2e-7)


def test_components_need_ten_images_per_neuron() -> None:
    assert has_enough_images(640, 64)
    assert not has_enough_images(639, 64)
