"""A threshold from one's own data, and how well their number determines it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nacpipe.method.metrics import choose_threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A threshold and what is known of the share of in-distribution data that it keeps."""

    threshold: float
    """The lowest score that counts as ID."""
    keep: float
    """The share that was asked for."""
    samples: int
    """How many were scored."""
    interval: tuple[float, float]
    """Between which the share of such data lies that is not flagged."""
    confidence: float
    """Of the interval."""


def calibrate_scores(scores: NDArray[np.float64], keep: float, confidence: float) -> Calibration:
    """Choose the threshold that keeps a share of scores (samples,), with its interval.

    The threshold is one of the scores: the share of the distribution at or above the k-th largest of n is distributed
    as Beta(k, n − k + 1).

    Raises:
        ValuesError: there are no scores.
    """
    threshold = choose_threshold(scores, keep)
    kept = max(math.ceil(round(keep * scores.size, 6)), 1)
    tail = (1 - confidence) / 2
    interval = (beta_quantile(tail, kept, scores.size), beta_quantile(1 - tail, kept, scores.size))
    return Calibration(threshold=threshold, keep=keep, samples=scores.size, interval=interval, confidence=confidence)


def beta_quantile(probability: float, k: int, n: int) -> float:
    """Return the quantile of Beta(k, n − k + 1): the x with P(Binomial(n, x) ≥ k) = probability."""
    if probability <= 0 or probability >= 1:
        return float(probability >= 1)
    successes = np.arange(k, n + 1)
    ways = np.array([math.lgamma(n + 1) - math.lgamma(j + 1) - math.lgamma(n - j + 1) for j in successes.tolist()])
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        logs = ways + successes * math.log(middle) + (n - successes) * math.log1p(-middle)
        low, high = (middle, high) if float(np.exp(logs).sum()) < probability else (low, middle)
    return (low + high) / 2
