"""Guide, target, weights and cross-validation: by hand, against scipy, and as laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nacpipe.method.cross_validation import (
    _best_trials,
    _target,
    cluster_folds,
    correlate,
    cross_validate,
    cross_validate_each,
    image_folds,
)
from nacpipe.method.guide import choose_guide, guided_target, score_plainly
from nacpipe.method.weights import ridge_weights, solve_nonnegative
from tests import oracle

Floats = NDArray[np.float64]
IS_ID = np.array([True, True, False, False])


# --- the guide --------------------------------------------------------------------------------------------------------


def test_the_guide_is_the_plain_score_with_the_highest_auroc() -> None:
    plain = {
        "MSP": np.array([0.9, 0.4, 0.5, 0.3]),  # three of four pairs
        "Energy": np.array([3.0, 2.0, 1.0, 0.0]),  # all
        "GEN": np.array([3.0, 2.0, 1.0, 0.0]),  # all too, but later
    }
    guide = choose_guide(plain, IS_ID)
    assert guide is not None
    assert (guide.name, guide.auroc, guide.scores.tolist()) == ("Energy", 1.0, [3.0, 2.0, 1.0, 0.0])
    assert choose_guide({"MSP": plain["MSP"]}, IS_ID).auroc == 0.75  # type: ignore[union-attr]
    assert choose_guide({}, IS_ID) is None


def test_plain_scores_are_exact() -> None:
    logits = np.random.default_rng(0).normal(0, 5, (8, 6)).astype(np.float32)
    found = score_plainly(logits)
    assert list(found) == ["MSP", "MaxLogit", "Energy", "Entropy", "GEN"]
    for row, values in enumerate(logits.tolist()):
        for name, expected in oracle.plain_scores(values).items():
            assert found[name][row] == pytest.approx(expected, rel=1e-12)


def test_the_target_by_hand() -> None:
    assert guided_target(IS_ID, None).tolist() == [1.0, 1.0, -1.0, -1.0]
    guide = np.array([4.0, 2.0, 2.0, 0.0])  # mean 2, standard deviation √2
    np.testing.assert_allclose(guided_target(IS_ID, guide), [1 + math.sqrt(0.5), 1.0, -1.0, -1 - math.sqrt(0.5)])
    uneven = guided_target(np.array([True, False, False, False]), None)  # mean −½, standard deviation √¾
    np.testing.assert_allclose(uneven, [1.5 / math.sqrt(0.75)] + [-0.5 / math.sqrt(0.75)] * 3)
    assert guided_target(IS_ID, np.full(4, 7.0)).tolist() == [1.0, 1.0, -1.0, -1.0]  # a constant guide says nothing


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    """Uncorrelated scores of variance 1 and 4: gain / (1.1 · variance) is 1 / 1.1 and 2 / 4.4."""
    scores = np.array([[1.0, 2.0], [-1.0, 2.0], [1.0, -2.0], [-1.0, -2.0]])
    target = scores @ np.array([1.0, 0.5])
    np.testing.assert_allclose(ridge_weights(scores, target), [2 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(ridge_weights(scores, scores @ np.array([1.0, -0.5])), [1.0, 0.0])
    np.testing.assert_allclose(ridge_weights(scores, scores @ np.array([-1.0, -0.1])), [0.0, 1.0])  # the least bad


def test_a_constant_term_gets_nothing() -> None:
    scores = np.array([[1.0, 5.0], [-1.0, 5.0], [1.0, 5.0], [-1.0, 5.0]])
    assert ridge_weights(scores, scores[:, 0]).tolist() == [1.0, 0.0]
    assert ridge_weights(np.full((4, 2), 5.0), scores[:, 0]).tolist() == [1.0, 0.0]


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_scale_of_a_term_does_not_matter(seed: int, terms: int) -> None:
    random = np.random.default_rng(seed)
    scores, target = random.normal(size=(60, terms)), random.normal(size=60)
    scale = np.exp(random.normal(0, 2, terms))
    first, second = ridge_weights(scores, target), ridge_weights(scores * scale, target) * scale
    np.testing.assert_allclose(second / second.sum(), first, atol=1e-6)
    assert (first >= 0).all()
    assert first.sum() == pytest.approx(1.0)


@given(st.integers(0, 2**32 - 1), st.integers(1, 15))
def test_no_weight_can_be_changed_for_the_better(seed: int, terms: int) -> None:
    """The conditions of the minimum: no gain where the weight is 0, none to have where it is above."""
    random = np.random.default_rng(seed)
    scores = random.normal(size=(40, terms)) @ random.normal(size=(terms, terms))
    matrix, vector = scores.T @ scores / 40 + 0.05 * np.eye(terms), random.normal(size=terms)
    weights = solve_nonnegative(matrix, vector)
    gradient = vector - matrix @ weights
    assert (weights >= 0).all()
    assert (gradient <= 1e-8 * np.sqrt(np.diag(matrix)) * 10).all()
    np.testing.assert_allclose(gradient[weights > 0], 0, atol=1e-8 * np.abs(matrix).max())


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_weights_are_scipys(seed: int, terms: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    random = np.random.default_rng(seed)
    latent = random.normal(size=(80, 2))
    scores = latent @ random.normal(size=(2, terms)) + 0.3 * random.normal(size=(80, terms))
    target = latent[:, 0] + random.normal(size=80)
    centred, away = scores - scores.mean(axis=0), target - target.mean()
    ridge = np.diag(np.sqrt(0.1 * (centred**2).sum(axis=0)))
    expected, _ = optimize.nnls(np.concatenate([centred, ridge]), np.concatenate([away, np.zeros(terms)]))
    if expected.sum() > 0:
        np.testing.assert_allclose(ridge_weights(scores, target), expected / expected.sum(), atol=1e-6)


# --- cross-validation -------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=10, max_size=60), st.integers(2, 5))
def test_every_image_is_held_out_once(sides: list[bool], folds: int) -> None:
    is_id = np.array(sides)
    held = image_folds(is_id, folds)
    assert sorted(np.concatenate(held).tolist()) == list(range(is_id.size))
    for side in (is_id, ~is_id):
        sizes = [int(side[rows].sum()) for rows in held]
        assert max(sizes) - min(sizes) <= 1
    assert [rows.tolist() for rows in image_folds(is_id, folds)] == [rows.tolist() for rows in held]


def test_clusters_are_held_out_whole() -> None:
    is_id = np.repeat([True, False], [10, 12])
    predicted = np.array([0] * 10 + [1] * 5 + [2] * 4 + [3] * 2 + [4])
    held = cluster_folds(is_id, predicted, 3)
    assert sorted(np.concatenate(held).tolist()) == list(range(22))
    assert [sorted(set(predicted[rows[~is_id[rows]]].tolist())) for rows in held] == [[1], [2], [3, 4]]
    assert sorted(int(is_id[rows].sum()) for rows in held) == [3, 3, 4]
    assert len(cluster_folds(is_id, np.zeros(22, int), 3)) == 1  # one cluster: nothing to learn from is left


def test_correlations_by_hand() -> None:
    target = np.array([1.0, 1.0, -1.0, -1.0])
    trials = np.array([[2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0], [1.0, 0.0, 0.0, 0.0]])
    everything, expected = np.ones((4, 1)), [1.0, -1.0, 0.0, 1 / math.sqrt(3)]
    np.testing.assert_allclose(correlate(trials, target[:, None], everything)[:, 0], expected, atol=1e-12)


@given(st.integers(0, 2**32 - 1))
def test_correlations_of_folds_are_numpys(seed: int) -> None:
    random = np.random.default_rng(seed)
    trials, target = 0.9 + 0.01 * random.normal(size=(6, 30)), random.normal(size=30)
    trials[5] = 0.3
    inside = np.zeros((30, 3))
    targets = np.zeros((30, 3))
    for fold in range(3):
        rows = random.permutation(30)[:20]
        inside[rows, fold] = 1.0
        targets[rows, fold] = target[rows] - target[rows].mean()
    found = correlate(trials, targets, inside)
    for fold in range(3):
        rows = inside[:, fold] == 1
        expected = [np.corrcoef(trial[rows], target[rows])[0, 1] for trial in trials[:5]]
        np.testing.assert_allclose(found[:5, fold], expected, atol=1e-9)
    assert found[5].tolist() == [0.0] * 3


def choose_terms(scores: list[Floats], is_id: NDArray[np.bool_], plain: dict[str, Floats]) -> tuple[list[int], Floats]:
    """Each term's best trial and the terms' weights, as in a fold that holds nothing out."""
    everything = np.arange(is_id.size)
    target = _target(is_id, plain, everything)
    trials = _best_trials(scores, is_id.size, [everything], [target])[:, 0].tolist()
    chosen = np.stack([term[trial] for term, trial in zip(scores, trials, strict=True)], axis=1)
    return trials, ridge_weights(chosen, target)


def test_each_terms_best_trial_and_weights() -> None:
    is_id = np.array([True, True, True, False, False, False])
    good, bad = np.array([3.0, 2.0, 2.5, 1.0, 0.0, 0.5]), np.array([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    trials, weights = choose_terms([np.stack([bad, good]), np.stack([bad, -good])], is_id, {})
    assert trials == [1, 0]
    assert weights.tolist() == [1.0, 0.0]


def slow_cross_validation(
    scores: list[Floats], is_id: NDArray[np.bool_], plain: dict[str, Floats], folds: list[NDArray[np.intp]]
) -> float:
    """The same in plain lines, with scipy's weights."""
    optimize = pytest.importorskip("scipy.optimize")
    reached = []
    for held in folds:
        kept = np.array([i for i in range(is_id.size) if i not in set(held.tolist())])
        own = is_id[kept]
        best = max(plain, key=lambda name: oracle.auroc(plain[name][kept][own], plain[name][kept][~own]))
        hard = np.where(own, 1.0, -1.0)
        guide = plain[best][kept]
        target = (hard - hard.mean()) / hard.std() + 0.5 * (guide - guide.mean()) / guide.std()
        chosen = [max(term, key=lambda trial: np.corrcoef(trial[kept], target)[0, 1]) for term in scores]
        columns = np.stack([trial[kept] - trial[kept].mean() for trial in chosen], axis=1)
        ridge = np.diag(np.sqrt(0.1 * (columns**2).sum(axis=0)))
        padded = np.concatenate([target - target.mean(), np.zeros(len(chosen))])
        weights, _ = optimize.nnls(np.concatenate([columns, ridge]), padded)
        combined = np.stack([trial[held] for trial in chosen], axis=1) @ weights
        reached.append(oracle.auroc(combined[is_id[held]], combined[~is_id[held]]))
    return float(np.mean(reached))


@pytest.mark.parametrize("kind", ["images", "clusters"])
def test_cross_validation_is_the_slow_one(kind: str) -> None:
    random = np.random.default_rng(5)
    is_id = np.repeat([True, False], [60, 50])
    signal = is_id + random.normal(0, 0.8, 110)
    scores = [np.stack([signal + random.normal(0, s, 110) for s in (1.0, 0.5, 2.0)]) for _ in range(3)]
    plain = {"MSP": signal + random.normal(0, 1, 110), "Energy": signal + random.normal(0, 0.5, 110)}
    predicted = random.integers(0, 7, 110)
    folds = image_folds(is_id) if kind == "images" else cluster_folds(is_id, predicted)
    found = cross_validate(scores, is_id, plain, folds)
    assert found == pytest.approx(slow_cross_validation(scores, is_id, plain, folds), abs=1e-9)
    assert 0.7 < found < 0.95
    extra = signal + random.normal(0, 0.7, 110)
    one_more = slow_cross_validation([*scores, extra[None]], is_id, plain, folds)
    assert cross_validate_each(scores, is_id, plain, folds, [extra, None]) == pytest.approx([one_more, found], abs=1e-9)
    narrow = cross_validate([term.astype(np.float32) for term in scores], is_id, plain, folds)
    assert narrow == pytest.approx(found, abs=0.002)


def test_noise_is_seen_through() -> None:
    """Many trials of noise: what was chosen fits, and does not hold."""
    random = np.random.default_rng(6)
    is_id = np.repeat([True, False], 40)
    scores = [random.normal(size=(200, 80)) for _ in range(5)]
    trials, weights = choose_terms(scores, is_id, {})
    combined = np.stack([term[trial] for term, trial in zip(scores, trials, strict=True)], axis=1) @ weights
    assert oracle.auroc(combined[is_id], combined[~is_id]) > 0.8
    assert cross_validate(scores, is_id, {}, image_folds(is_id)) == pytest.approx(0.5, abs=0.12)


def test_folds_of_one_side_are_left_out() -> None:
    is_id = np.array([True] * 4 + [False] * 4)
    scores = [np.array([[4.0, 3.0, 2.0, 3.5, 1.0, 0.0, 0.5, 0.2]])]
    folds = [np.array([0, 1]), np.array([2, 6])]  # ID alone; both
    assert cross_validate(scores, is_id, {}, folds) == 1.0
    assert math.isnan(cross_validate(scores, is_id, {}, [np.array([0, 1])]))
    assert math.isnan(cross_validate(scores, is_id, {}, [np.array([0, 4, 5, 6, 7])]))  # no OOD image is left
