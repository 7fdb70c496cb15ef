"""Weights of terms in closed form: the ridge regression of a target on the terms' scores, with no weight below 0.

    minimise over w ≥ 0     ½ wᵀ (C + 0.1 · diag C) w − gᵀ w          C = covariance of the scores, g = with the target

The ridge is of each term's own variance, so that a term's scale does not matter. Solved exactly by the active set
method of Lawson and Hanson (Solving Least Squares Problems, 1974, chapter 23), on C and g.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RIDGE = 0.1  # of a term's variance

Floats = NDArray[np.float64]


def ridge_weights(
    scores: NDArray[np.floating],  # (images, terms)
    target: Floats,  # (images,)
    ridge: float = RIDGE,
) -> Floats:
    """Return the terms' weights, ≥ 0 and of sum 1, (terms,).

    Where no term goes with the target, the one that is against it the least has all the weight.
    """
    centred = scores - scores.mean(axis=0, dtype=np.float64)
    covariance, gain = centred.T @ centred / len(target), centred.T @ (target - target.mean()) / len(target)
    varies = np.ptp(scores, axis=0) > 1e-12 * np.abs(scores).max(axis=0)  # of a constant term only rounding is left
    weights = np.zeros(gain.size)
    own = covariance[np.ix_(varies, varies)]
    weights[varies] = solve_nonnegative(own + ridge * np.diag(np.diag(own)), gain[varies])
    if weights.sum() <= 0:
        spread = np.sqrt(np.where(varies, np.diag(covariance), 1.0))
        weights[int(np.where(varies, gain / spread, -np.inf).argmax())] = 1.0
    return np.asarray(weights / weights.sum())


def solve_nonnegative(
    matrix: Floats,  # (n, n), symmetric and positive definite
    vector: Floats,  # (n,)
) -> Floats:
    """Return the w ≥ 0 that minimises ½ wᵀ matrix w − vectorᵀ w, (n,)."""
    scale = 1 / np.sqrt(np.diag(matrix))
    matrix, vector = matrix * scale[:, None] * scale, vector * scale  # unit diagonal: one tolerance for all
    weights, active = np.zeros(vector.size), np.zeros(vector.size, bool)
    tolerance = 1e-12 * max(float(np.abs(vector).max(initial=0.0)), 1e-300)
    for _ in range(10 * vector.size):  # each set is visited once; rounding alone could repeat one
        gradient = np.where(active, -np.inf, vector - matrix @ weights)
        if gradient.max(initial=-np.inf) <= tolerance:
            break
        active[gradient.argmax()] = True
        while True:
            solved = np.zeros(vector.size)
            solved[active] = np.linalg.solve(matrix[np.ix_(active, active)], vector[active])
            below = active & (solved <= 0)
            if not below.any():
                break
            steps = weights[below] / (weights[below] - solved[below])
            weights = weights + steps.min() * (solved - weights)
            active &= ~(below & (weights <= tolerance))
            weights[~active] = 0.0
        weights = solved
    return weights * scale
