"""Detection metrics against the definitions in plain lines (`oracle`) and, where conventions agree, scikit-learn."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_curve

from nacpipe.errors import ValuesError
from nacpipe.method.metrics import (
    Detection,
    Scores,
    accuracy,
    auroc_error,
    choose_threshold,
    detect,
    roc_curve,
    share_flagged,
)
from tests import oracle

# Few distinct values, so that ties are common, mixed with any.
SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(-5, 5), min_size=1, max_size=45).map(np.array)


def by_the_oracle(id_scores: Scores, ood_scores: Scores) -> Detection:
    return Detection(
        auroc=oracle.auroc(id_scores, ood_scores),
        fpr95=oracle.fpr95(id_scores, ood_scores),
        aupr_in=oracle.aupr(id_scores, ood_scores),
        aupr_out=oracle.aupr(-ood_scores, -id_scores),
    )


def by_openood(id_scores: Scores, ood_scores: Scores) -> Detection:
    """OpenOOD's `auc_and_fpr_recall` since 4a72488; before, AUPR-IN and AUPR-OUT stood under each other's name."""
    conf = np.concatenate([id_scores, ood_scores])
    is_ood = np.arange(conf.size) >= id_scores.size
    fpr, tpr, _ = sklearn_curve(is_ood, -conf)
    precision_in, recall_in, _ = precision_recall_curve(~is_ood, conf)
    precision_out, recall_out, _ = precision_recall_curve(is_ood, -conf)
    return Detection(
        auroc=roc_auc_score(~is_ood, conf),
        fpr95=fpr[np.argmax(tpr >= 0.95)],
        aupr_in=auc(recall_in, precision_in),
        aupr_out=auc(recall_out, precision_out),
    )


@given(SCORES, SCORES)
def test_metrics_are_the_oracles(id_scores: Scores, ood_scores: Scores) -> None:
    expected = by_the_oracle(id_scores, ood_scores)
    np.testing.assert_allclose(astuple(detect(id_scores, ood_scores)), astuple(expected), rtol=1e-12, atol=1e-15)


def test_the_standard_error_of_an_auroc() -> None:
    """Hanley and McNeil 1982 print 0.893 and 0.032 for 58 and 51 cases; one sample of each side is a coin."""
    assert auroc_error(0.893, 51, 58) == pytest.approx(0.0325, abs=5e-5)
    assert auroc_error(0.5, 1, 1) == 0.5
    assert auroc_error(1.0, 10, 10) == 0.0


@pytest.mark.parametrize("decimals", [16, 2, 1, 0])  # fewer decimals, more ties
@pytest.mark.parametrize(("n_id", "n_ood"), [(500, 300), (40, 20), (7, 1000), (1, 1)])
def test_metrics_are_openoods(decimals: int, n_id: int, n_ood: int) -> None:
    rng = np.random.RandomState(n_id + decimals)
    id_scores, ood_scores = np.round(rng.rand(n_id) + 0.3, decimals), np.round(rng.rand(n_ood), decimals)
    expected = by_openood(id_scores, ood_scores)
    np.testing.assert_allclose(astuple(detect(id_scores, ood_scores)), astuple(expected), rtol=1e-12)


def test_metrics_by_hand() -> None:
    """ID 3 2 1 against OOD 2 0.

    Pairs: 3 beats 2 and 0, 2 ties 2 and beats 0, 1 loses to 2 and beats 0: (2 + 1½ + 1) / 6. All of OOD is flagged at
    2, and with it ID's 2 and 1. From the top, ID positive: (recall, precision) = (⅓, 1), (⅔, ⅔), (1, ¾), (1, ⅗); from
    the bottom, OOD positive: (½, 1), (½, ½), (1, ½), (1, ⅖).
    """
    found = detect(np.array([3.0, 2.0, 1.0]), np.array([2.0, 0.0]))
    assert found.auroc == 4.5 / 6
    assert found.fpr95 == 2 / 3
    assert found.aupr_in == pytest.approx((1 + (1 + 2 / 3) / 2 + (2 / 3 + 3 / 4) / 2) / 3, rel=1e-15)
    assert found.aupr_out == pytest.approx(0.5 + 0.5 * (0.5 + 0.5) / 2, rel=1e-15)


@given(SCORES, SCORES)
def test_auroc_of_the_sides_exchanged_is_one_minus(a: Scores, b: Scores) -> None:
    assert detect(a, b).auroc == pytest.approx(1 - detect(b, a).auroc, rel=1e-15, abs=1e-15)


@given(SCORES, SCORES, st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(a: Scores, b: Scores, random: object) -> None:
    shuffled = list(a)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert detect(np.array(shuffled), b[::-1]) == detect(a, b)


@given(SCORES, SCORES)
def test_only_the_order_of_scores_matters(a: Scores, b: Scores) -> None:
    """Ranks, as float64, instead of the scores: every metric stays as it was."""
    _, ranks = np.unique(np.concatenate([a, b]), return_inverse=True)
    assert detect(ranks[: a.size].astype(float), ranks[a.size :].astype(float)) == detect(a, b)


def test_perfect_and_reversed() -> None:
    high, low = np.array([2.0, 3.0, 4.0]), np.array([0.0, 1.0])
    assert astuple(detect(high, low)) == (1.0, 0.0, 1.0, 1.0)
    found = detect(low, high)
    assert (found.auroc, found.fpr95) == (0.0, 1.0)


@pytest.mark.parametrize(("n_id", "n_ood"), [(1, 1), (3, 7), (50, 50)])
def test_all_scores_equal(n_id: int, n_ood: int) -> None:
    found = detect(np.full(n_id, 0.5), np.full(n_ood, 0.5))
    assert (found.auroc, found.fpr95) == (0.5, 1.0)
    # One threshold: the trapezoid from (0, 1) to (1, share of positives).
    assert found.aupr_in == pytest.approx((1 + n_id / (n_id + n_ood)) / 2, rel=1e-15)
    assert found.aupr_out == pytest.approx((1 + n_ood / (n_id + n_ood)) / 2, rel=1e-15)


@pytest.mark.parametrize(("n_ood", "needed"), [(1, 1), (19, 19), (20, 19), (21, 20), (40, 38), (100, 95), (101, 96)])
def test_fpr95_needs_at_least_95_percent_of_ood(n_ood: int, needed: int) -> None:
    """OOD scores 0, 1, 2, …; one ID sample beside each, half a step higher: those below the threshold are flagged."""
    ood_scores = np.arange(n_ood, dtype=float)
    assert detect(ood_scores + 0.5, ood_scores).fpr95 == (needed - 1) / n_ood
    assert detect(ood_scores, ood_scores).fpr95 == needed / n_ood


def test_infinite_scores_are_scores() -> None:
    """They tie with each other and with nothing else."""
    inf = math.inf
    infinite = detect(np.array([inf, inf, 1.0, -inf]), np.array([inf, 0.0, -inf, -inf]))
    finite = detect(np.array([9.0, 9.0, 1.0, -9.0]), np.array([9.0, 0.0, -9.0, -9.0]))
    assert infinite == finite


def test_results_are_plain_floats() -> None:
    assert [type(value) for value in astuple(detect(np.array([1.0, 2.0]), np.array([0.5])))] == [float] * 4


@pytest.mark.parametrize(
    ("id_scores", "ood_scores", "message"),
    [
        ([], [1.0], r"^there are no ID samples to compare$"),
        ([1.0], [], r"^there are no OOD samples to compare$"),
        ([1.0, math.nan, math.nan], [1.0], r"^2 of 3 ID scores are NaN$"),
        ([1.0], [math.nan], r"^1 of 1 OOD scores are NaN$"),
    ],
)
def test_what_cannot_be_compared_is_refused(id_scores: list[float], ood_scores: list[float], message: str) -> None:
    with pytest.raises(ValuesError, match=message):
        detect(np.array(id_scores), np.array(ood_scores))


def test_accuracy_by_hand() -> None:
    logits = np.array([[0.1, 0.9], [2.0, -1.0], [0.0, 3.0], [5.0, 4.0]], np.float32)
    assert accuracy(logits, np.array([1, 0, 0, 0])) == 0.75
    assert accuracy(logits, np.array([-1, -1, -1, -1])) == 0.0


def test_a_roc_curve_by_hand() -> None:
    """Thresholds 1, 2, 3: of the ID 2 3 3 none, one, all are flagged; of the OOD 1 2 one, both, both."""
    found = roc_curve(np.array([2.0, 3.0, 3.0]), np.array([1.0, 2.0]))
    np.testing.assert_allclose(found, [[0, 0], [0, 0.5], [1 / 3, 1], [1, 1]])


@given(SCORES, SCORES)
def test_the_area_under_a_roc_curve_is_the_auroc(id_scores: Scores, ood_scores: Scores) -> None:
    found = roc_curve(id_scores, ood_scores)
    assert (np.diff(found, axis=0) >= 0).all()
    area = np.trapezoid(found[:, 1], found[:, 0])
    assert area == pytest.approx(oracle.auroc(id_scores, ood_scores), abs=1e-12)


@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=60),
    st.one_of(st.sampled_from([0.07, 0.29, 0.57, 0.58, 0.9, 0.95, 0.99, 1.0]), st.floats(0.001, 1.0)),
)
def test_the_highest_threshold_that_keeps_enough(values: list[int], keep: float) -> None:
    scores = np.array(values, float)
    found = choose_threshold(scores, keep)
    needed = [t for t in set(values) if sum(v >= t for v in values) >= keep * len(values) - 1e-6]
    assert found == max(needed)


def test_what_a_threshold_flags_is_below_it() -> None:
    assert choose_threshold(np.arange(20.0), 0.95) == 1.0
    assert share_flagged(np.array([0.0, 0.9, 1.0, 2.0, 3.0]), 1.0) == 0.4  # what equals it is kept
    with pytest.raises(ValuesError, match="there are no id/val scores"):
        choose_threshold(np.empty(0), 0.95)
    with pytest.raises(ValuesError, match="1 of 2 scored scores are NaN"):
        share_flagged(np.array([0.0, math.nan]), 1.0)
