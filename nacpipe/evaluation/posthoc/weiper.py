"""WeiPer+KLD (Granz, Heurich & Landgraf, NeurIPS 2024): is the histogram of an image's features like the training one?

With z an image's features and W̃ a stack of r randomly turned copies of the last linear layer,

    w̃ = w + 1.8 ‖w‖ · (a random direction)      for every row w, r times, the bias as it is

an image has a histogram of the values in z and one of the perturbed logits W̃ z + b, 100 bins each over the range of all
training images. q is such a histogram smoothed along the bins, p the mean of the training images' histograms:

    score = −D(p, q of z) − 2.5 · D(p, q of W̃ z + b) + 0.1 · mean over the r copies of the largest probability
    D(p, q) = KL(p ‖ q) + KL(q ‖ p)

Settings are those of the authors' configuration. Three things differ from their code: the copies are drawn once (there
anew at every call), every training image counts the same (there those of a smaller last batch more), and r is smaller
where 100 copies would have more than 10,000 rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nacpipe.evaluation.posthoc.detector import Linear, Samples, Score, Training
from nacpipe.method.plain_scores import Floats

COPIES, MOST_ROWS = 100, 10_000
SEED = 1  # of np.random.RandomState
DISTANCE = 1.8
BINS = 100
WIDTHS = (4, 15)  # bins that are averaged: of the features' histogram, of the perturbed logits'
FLOORS = (0.01, 0.025)  # added to every bin, so that none is 0
LAMBDA_PERTURBED, LAMBDA_MSP = 2.5, 0.1
PIECE = 2**21  # float64 numbers of perturbed logits that are held at a time


def fit_weiper(training: Training) -> Score:
    """Draw the perturbed layer, find the ranges of values, then the mean histograms of the training images."""
    weight, bias = perturb(training.linear)
    classes, rows = len(training.linear.bias), len(bias)

    def pieces(features: NDArray[np.float32]) -> Iterator[tuple[Floats, Floats]]:
        """Features and perturbed logits in float64, a few images at a time."""
        step = max(1, PIECE // rows)
        for start in range(0, len(features), step):
            wide = features[start : start + step].astype(np.float64)
            yield wide, wide @ weight.T + bias

    low, high = np.full(2, np.inf), np.full(2, -np.inf)
    for values in pieces(training.samples.features):
        low = np.minimum(low, [value.min() for value in values])
        high = np.maximum(high, [value.max() for value in values])

    def histograms(values: tuple[Floats, Floats]) -> list[Floats]:
        return [count_values(value, low[i], high[i]) for i, value in enumerate(values)]

    totals = [np.zeros(BINS), np.zeros(BINS)]
    for values in pieces(training.samples.features):
        totals = [total + found.sum(axis=0) for total, found in zip(totals, histograms(values), strict=True)]
    means = [total / len(training.samples.features) for total in totals]

    def score(samples: Samples) -> Floats:
        scores = []
        for values in pieces(samples.features):
            plain, turned = (
                divergence(mean, smooth(found, width), floor)
                for mean, found, width, floor in zip(means, histograms(values), WIDTHS, FLOORS, strict=True)
            )
            logits = values[1].reshape(len(plain), rows // classes, classes)
            largest = 1 / np.exp(logits - logits.max(axis=2, keepdims=True)).sum(axis=2)
            scores.append(-plain - LAMBDA_PERTURBED * turned + LAMBDA_MSP * largest.mean(axis=1))
        return np.concatenate(scores)

    return score


def perturb(linear: Linear) -> tuple[Floats, Floats]:
    """Return the perturbed weights, (copies · classes, features), copy below copy, and their biases."""
    weight = linear.weight.astype(np.float64)
    copies = min(COPIES, max(1, MOST_ROWS // len(weight)))
    noise = np.random.RandomState(SEED).standard_normal((copies, *weight.shape))
    noise *= DISTANCE * np.linalg.norm(weight, axis=1)[:, None] / np.linalg.norm(noise, axis=2, keepdims=True)
    noise += weight
    return noise.reshape(-1, weight.shape[1]), np.tile(linear.bias.astype(np.float64), copies)


def count_values(values: Floats, low: float, high: float) -> Floats:
    """Return the share of each row's values in every bin, (samples, BINS); what lies outside is in none."""
    samples, width = values.shape
    bins = np.floor((values - low) * (BINS / (high + 1e-8 - low)))
    np.clip(bins, -1, BINS, out=bins)
    places = bins.astype(np.int64) + np.arange(1, samples * (BINS + 2), BINS + 2)[:, None]
    counts = np.bincount(places.ravel(), minlength=samples * (BINS + 2))
    return np.asarray(counts.reshape(samples, BINS + 2)[:, 1:-1] / width)


def smooth(histograms: Floats, width: int) -> Floats:  # (samples, bins)
    """Average `width` neighbouring bins; the first and the last bin are repeated beyond the ends."""
    before = (width - 1) // 2
    padded = np.pad(histograms, ((0, 0), (before + 1, width - 1 - before)), mode="edge")
    sums = padded.cumsum(axis=1)
    return np.asarray((sums[:, width:] - sums[:, :-width]) / width)


def divergence(
    mean: Floats,  # (bins,)
    histograms: Floats,  # (samples, bins)
    floor: float,
) -> Floats:
    """KL(p ‖ q) + KL(q ‖ p) = Σ (p − q) (log p − log q), (samples,), after `floor` is added to both."""
    p = (mean + floor) / (mean + floor).sum()
    q = (histograms + floor) / (histograms + floor).sum(axis=1, keepdims=True)
    return np.asarray(((p - q) * (np.log(p) - np.log(q))).sum(axis=1))
