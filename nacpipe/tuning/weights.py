"""Layer weights in closed form: the direction that best separates two sets of layer scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TEACHER = 0.5  # of the guide in the guided target, beside 1 of the labels
RIDGE = 0.1  # of a layer score's variance


def fisher_weights(
    id_scores: NDArray[np.float64],  # (layers, n)
    ood_scores: NDArray[np.float64],  # (layers, m)
) -> NDArray[np.float64]:
    """Return Fisher's discriminant (Σ_id + Σ_ood)⁻¹ (μ_id − μ_ood) with no weight below 0, summing to 1, (layers,).

    Layers whose weight would be negative are left out and the rest solved again. On cached layer scores this reaches
    the AUROC of a long climb over the weights to about 0.0005, in a fraction of a millisecond.
    """
    gap = id_scores.mean(axis=1) - ood_scores.mean(axis=1)
    spread = np.atleast_2d(np.cov(id_scores)) + np.atleast_2d(np.cov(ood_scores))
    spread = np.nan_to_num(spread) + (1e-6 * np.trace(np.nan_to_num(spread)) / gap.size + 1e-300) * np.eye(gap.size)
    return _solve(spread, gap)


def guided_target(
    id_rows: int,
    ood_rows: int,
    guide: NDArray[np.float64] | None = None,  # (id_rows + ood_rows,): a plain score
) -> NDArray[np.float64]:
    """Return ID or OOD, plus half of the guide, both of spread 1, (id_rows + ood_rows,).

    Two thousand labels of a few OOD classes are little to choose dozens of numbers by; how sure the network was says
    more per sample, and holds for other classes too (bench/README.md, "Detection"). Without a guide: ID or OOD alone.
    """
    target = _standardise(np.repeat([1.0, -1.0], [id_rows, ood_rows]))
    return target if guide is None else target + TEACHER * _standardise(guide)


def _standardise(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((values - values.mean()) / (values.std() + 1e-300))


def target_weights(
    scores: NDArray[np.float64],  # (layers, samples)
    target: NDArray[np.float64],  # (samples,)
) -> NDArray[np.float64]:
    """Return the ridge regression of the target on the scores with no weight below 0, summing to 1, (layers,)."""
    centred = scores - scores.mean(axis=1, keepdims=True)
    spread, gap = centred @ centred.T / target.size, centred @ (target - target.mean()) / target.size
    floor = 1e-9 * np.trace(spread) / len(spread) + 1e-300  # what rounding leaves of a constant layer is no signal
    return _solve(spread + np.diag(RIDGE * np.diag(spread) + floor), gap)


def _solve(spread: NDArray[np.float64], gap: NDArray[np.float64]) -> NDArray[np.float64]:
    active = np.flatnonzero(gap > 0)
    weights = np.zeros(gap.size)
    while active.size:
        solved = np.linalg.solve(spread[np.ix_(active, active)], gap[active])
        if (solved > 0).all():
            weights[active] = solved
            return np.asarray(weights / weights.sum())
        active = active[solved > 0]
    weights[int(np.argmax(gap))] = 1.0  # no layer helps: take the least bad
    return weights
