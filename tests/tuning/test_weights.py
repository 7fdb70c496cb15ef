"""Layer weights in closed form: by hand, at the edges, and better than any other direction."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from nacpipe.tuning.weights import fisher_weights

Scores = NDArray[np.float64]  # (layers, samples)

# Four samples in two layers, ±1 each: layers that have nothing to do with each other, and the same layer twice.
APART = np.array([[-1.0, 1.0, -1.0, 1.0], [-1.0, -1.0, 1.0, 1.0]])
TOGETHER = np.array([[-1.0, 1.0, -1.0, 1.0], [-1.0, 1.0, -1.0, 1.0]])


def shifted(scores: Scores, *gaps: float) -> Scores:
    return scores + np.array(gaps)[:, None]


@pytest.mark.parametrize(
    ("ood", "gaps", "expected"),
    [
        (APART, (2, 1), (2 / 3, 1 / 3)),  # Σ ∝ identity: weights follow the gaps
        (APART, (1, 1), (0.5, 0.5)),
        (TOGETHER, (3, 2), (0.8, 0.2)),  # Σ ∝ [2 1; 1 2], its inverse ∝ [2 −1; −1 2]: (3, 2) → (4, 1)
        (TOGETHER, (3, 1), (1, 0)),  # (3, 1) → (5, −1): the second layer is left out
        (TOGETHER, (1, 3), (0, 1)),
        (APART, (2, 0), (1, 0)),  # a layer without a gap
        (APART, (2, -1), (1, 0)),  # a layer that is the wrong way round
    ],
)
def test_two_layers_by_hand(ood: Scores, gaps: tuple[float, float], expected: tuple[float, float]) -> None:
    weights = fisher_weights(shifted(APART, *gaps), ood)
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    np.testing.assert_allclose(fisher_weights(shifted(APART, *gaps) + 7, ood + 7), expected, atol=1e-5)


def test_an_uneven_layer_weighs_less() -> None:
    """Variances 1 : 4 at the same gap give weights 4 : 1."""
    scale = np.array([[1.0], [2.0]])
    np.testing.assert_allclose(fisher_weights(shifted(scale * APART, 1, 1), scale * APART), [0.8, 0.2], atol=1e-5)


@pytest.mark.parametrize("gap", [0.4, 0.0, -0.4])
def test_a_single_layer_weighs_1(gap: float) -> None:
    assert fisher_weights(np.array([[0.5, 0.7]]) + gap, np.array([[0.5, 0.7, 0.9]])).tolist() == [1.0]
    assert fisher_weights(np.full((1, 5), 0.5 + gap), np.full((1, 4), 0.5)).tolist() == [1.0]


def test_no_layer_helps_the_least_bad_is_taken() -> None:
    assert fisher_weights(shifted(APART, -2, -1), APART).tolist() == [0, 1]
    assert fisher_weights(APART, APART).tolist() == [1, 0]


@pytest.mark.parametrize("gap", [0.0, 0.25, -0.25])
def test_layers_of_one_constant_value(gap: float) -> None:
    constant = np.full((1, 4), 0.5)
    weights = fisher_weights(np.vstack([shifted(APART[:1], 1), constant + gap]), np.vstack([APART[:1], constant]))
    assert weights.sum() == pytest.approx(1)
    if gap <= 0:
        assert weights.tolist() == [1, 0]  # it tells nothing
    else:
        assert weights[1] > 0.99  # it tells everything
    all_constant = fisher_weights(np.full((3, 4), 0.5) + gap, np.full((3, 4), 0.5))
    assert all_constant.sum() == pytest.approx(1)
    assert (all_constant >= 0).all()


def test_the_same_layer_twice_shares_its_weight() -> None:
    np.testing.assert_allclose(fisher_weights(shifted(TOGETHER, 1, 1), TOGETHER), [0.5, 0.5], atol=1e-6)


PAIRS = st.tuples(st.integers(1, 5), st.integers(2, 8), st.integers(2, 8)).flatmap(
    lambda shape: st.tuples(
        arrays(np.float64, (shape[0], shape[1]), elements=st.floats(0, 1)),
        arrays(np.float64, (shape[0], shape[2]), elements=st.floats(0, 1)),
    )
)


@given(PAIRS)
def test_weights_are_never_negative_and_sum_to_1(scores: tuple[Scores, Scores]) -> None:
    weights = fisher_weights(*scores)
    assert weights.shape == (scores[0].shape[0],)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1)
    gap = scores[0].mean(axis=1) - scores[1].mean(axis=1)
    if (gap > 0).any():
        assert (weights[gap <= 0] == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_no_other_direction_separates_better(seed: int) -> None:
    """Fisher's ratio w·gap / √(w·Σw), compared with a thousand other shares of two correlated, useful layers."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(2, 2))
    ood = mix @ rng.normal(size=(2, 200))
    id_scores = mix @ rng.normal(size=(2, 300)) + rng.uniform(0.5, 2, size=(2, 1))
    gap, spread = id_scores.mean(axis=1) - ood.mean(axis=1), np.cov(id_scores) + np.cov(ood)
    assert (gap > 0).all(), "choose another seed"

    def ratio(weights: Scores) -> float:
        return float(weights @ gap / np.sqrt(weights @ spread @ weights))

    best = ratio(fisher_weights(id_scores, ood))
    assert best >= max(ratio(np.array([share, 1 - share])) for share in np.linspace(0, 1, 1001)) * (1 - 1e-5)
