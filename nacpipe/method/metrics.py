"""Detection metrics from two vectors of scores, by OpenOOD v1.5's conventions; fractions, never percent.

A score is larger for samples that look like the training data, so a detector *flags* a sample whose score is at or
below its threshold. Every distinct score is a threshold and ties count as ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nacpipe.errors import ValuesError

Scores = NDArray[np.float64]  # (samples,)
KEEP = 0.95  # of id/val: what a detector does not flag unless it is asked to


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """How well scores tell ID from OOD."""

    auroc: float
    """Probability that an ID sample scores above an OOD sample, ties counted half."""
    fpr95: float
    """Share of ID samples flagged at the first threshold that flags at least 95 % of the OOD samples."""
    aupr_in: float
    """Area under precision and recall with ID as the positive class."""
    aupr_out: float
    """The same with OOD as the positive class.

    OpenOOD had these two under each other's name until 2023-12 (its issue 211, mended in 4a72488); the authors' code of
    NAC-UE still has.
    """


def detect(id_scores: Scores, ood_scores: Scores) -> Detection:
    """Return all four metrics.

    Raises:
        ValuesError: one side is empty or holds NaN.
    """
    id_scores, ood_scores = _checked(id_scores, "ID"), _checked(ood_scores, "OOD")
    return Detection(
        auroc=auroc(id_scores, ood_scores),
        fpr95=fpr95(id_scores, ood_scores),
        aupr_in=_aupr(id_scores, ood_scores),
        aupr_out=_aupr(-ood_scores, -id_scores),
    )


def auroc(id_scores: Scores, ood_scores: Scores) -> float:
    """P(id > ood) + ½ P(id = ood), counted exactly: Mann-Whitney's U over the number of pairs."""
    inside, ood = np.sort(id_scores), np.sort(ood_scores)  # sorted needles are found three times as fast
    below = int(np.searchsorted(ood, inside, side="left").sum())
    below_or_equal = int(np.searchsorted(ood, inside, side="right").sum())
    return (below + below_or_equal) / (2 * id_scores.size * ood.size)


def auroc_error(
    auroc: float,
    n_id: int,
    n_ood: int,
) -> float:
    """Return the standard error of an AUROC over other samples of the same kind (Hanley and McNeil 1982)."""
    # Both sides exponential: P(one ID sample above two OOD ones), P(two ID samples above one OOD).
    above_two, two_above = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = auroc * (1 - auroc) + (n_id - 1) * (above_two - auroc**2) + (n_ood - 1) * (two_above - auroc**2)
    return float(np.sqrt(max(variance, 0.0) / (n_id * n_ood)))


def fpr95(id_scores: Scores, ood_scores: Scores) -> float:
    """The share of ID samples at or below the lowest threshold with at least 95 % of the OOD samples at or below it."""
    needed = -(-19 * ood_scores.size // 20)  # the smallest k with k / n ≥ 0.95, in whole numbers
    threshold = np.partition(ood_scores, needed - 1)[needed - 1]
    return int((id_scores <= threshold).sum()) / id_scores.size


def roc_curve(id_scores: Scores, ood_scores: Scores) -> NDArray[np.float64]:
    """Return (points, 2): shares of the ID and of the OOD samples that each distinct score as threshold flags.

    From (0, 0) to (1, 1), ascending; the area under it is the AUROC.
    """
    thresholds = np.unique(np.concatenate([id_scores, ood_scores]))
    sides = [np.searchsorted(np.sort(side), thresholds, side="right") / side.size for side in (id_scores, ood_scores)]
    return np.concatenate([np.zeros((1, 2)), np.stack(sides, axis=1)])


def choose_threshold(scores: Scores, keep: float) -> float:
    """Return the highest score t such that at least this share of the scores (samples,) is ≥ t: a detector's threshold.

    Unlike the thresholds of the metrics above, it is not flagged itself: a detector flags what scores below it.

    Raises:
        ValuesError: there are no scores.
    """
    if scores.size == 0:
        raise ValuesError("there are no id/val scores to choose a threshold from")
    kept = int(np.ceil(round(keep * scores.size, 6)))  # 0.07 · 100 is a little more than 7
    return float(np.sort(scores)[scores.size - max(kept, 1)])


def share_flagged(scores: Scores, threshold: float) -> float:
    """Return the share of scores (samples,) that a detector with this threshold flags: those below it.

    Raises:
        ValuesError: there are no scores, or some are NaN.
    """
    return float((_checked(scores, "scored") < threshold).mean())


def _aupr(positive: Scores, negative: Scores) -> float:
    """The trapezoid under precision over recall, every distinct score a threshold, from (recall 0, precision 1)."""
    scores = np.concatenate([positive, negative])
    order = np.argsort(-scores, kind="stable")
    is_positive = order < positive.size
    descending = scores[order]
    last_of_ties = np.append(np.flatnonzero(descending[1:] != descending[:-1]), scores.size - 1)
    true = np.cumsum(is_positive)[last_of_ties]
    precision = np.concatenate([[1.0], true / (last_of_ties + 1)])
    recall = np.concatenate([[0.0], true / positive.size])
    return float(np.trapezoid(precision, recall))


def accuracy(
    logits: NDArray[np.float32],  # (samples, classes)
    label: NDArray[np.int64],  # (samples,)
) -> float:
    """Return the share of samples whose largest logit is their label's."""
    return float((logits.argmax(axis=1) == label).mean())


def find_wrong_labels(label: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Return the rows, ascending, whose label (samples,) is none of the classes 0 … classes − 1."""
    return np.flatnonzero((label < 0) | (label >= classes))


def spearman(a: Scores, b: Scores) -> float:
    """Return Spearman's rank correlation, ties having the mean of their ranks; NaN where one side is all ties."""
    ranks = [_ranks(a), _ranks(b)]
    centred = [r - r.mean() for r in ranks]
    scale = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / scale if scale > 0 else float("nan")


def _ranks(values: Scores) -> Scores:
    """1 … n in ascending order, (n,); equal values share the mean of theirs."""
    ordered = np.sort(values)
    low, high = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return np.asarray((low + high + 1) / 2)


def _checked(scores: Scores, side: str) -> Scores:
    if scores.size == 0:
        raise ValuesError(f"there are no {side} samples to compare")
    if bool(np.isnan(scores).any()):
        raise ValuesError(f"{int(np.isnan(scores).sum())} of {scores.size} {side} scores are NaN")
    return scores
