"""OpenMax (Bendale & Boult, CVPR 2016): how probable is a class of its own for what no class explains?

Each class k has a centre, the mean of its training images' logits, and a Weibull distribution of the largest distances
from it. With the ten largest logits in descending order, ω = 1, 0.9, …, 0.1 and w the distribution's value at the
image's distance from that class:

    logit k → l · (1 − ω w)        an unknown class's logit = Σ l ω w        score = −softmax(…) of the unknown class

Settings are pytorch-ood's. Its distance is 0 for classes that no image of the same call is predicted as; here every
distance is the true one, so that scores do not depend on how images are cut into blocks.
"""

from __future__ import annotations

import numpy as np

from nacpipe.evaluation.posthoc.detector import Samples, Score, Training, class_means, softmax
from nacpipe.method.plain_scores import Floats

TAIL = 25  # the largest distances of a class
RANKED = 10  # the largest logits of an image
SHIFT = 10_000.0  # libMR moves a tail's smallest distance there before it fits


def fit_openmax(training: Training) -> Score:
    """Fit a Weibull distribution to each class's distances; every class needs images."""
    logits, label = training.samples.logits.astype(np.float64), training.label
    classes = logits.shape[1]
    centres = class_means(logits, label, classes)
    distances = np.linalg.norm(logits - centres[label], axis=1)
    tails = np.full((classes, TAIL), np.nan)
    for k in range(classes):
        tail = np.sort(distances[label == k])[-TAIL:]
        tails[k, : len(tail)] = tail
    shifts = SHIFT - np.nanmin(tails, axis=1)
    shapes, scales = fit_weibull(tails + shifts[:, None])
    ranked = min(RANKED, classes)
    omega = np.arange(ranked, 0, -1) / ranked

    def score(samples: Samples) -> Floats:
        values = samples.logits.astype(np.float64)
        largest = np.argpartition(values, -ranked, axis=1)[:, -ranked:]
        order = np.argsort(np.take_along_axis(values, largest, axis=1), axis=1)[:, ::-1]
        largest = np.take_along_axis(largest, order, axis=1)  # (samples, ranked), descending
        top = np.take_along_axis(values, largest, axis=1)
        squared = (values**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1) - 2 * values @ centres.T
        distance = np.sqrt(np.maximum(np.take_along_axis(squared, largest, axis=1), 0))
        position = np.log((distance + shifts[largest]) / scales[largest])
        with np.errstate(over="ignore"):  # far beyond the tail, where w is 1
            w = -np.expm1(-np.exp(shapes[largest] * position))
        moved = top * omega * w
        np.put_along_axis(values, largest, top - moved, axis=1)
        revised = np.concatenate([moved.sum(axis=1, keepdims=True), values], axis=1)
        return np.asarray(-softmax(revised)[:, 0])

    return score


def fit_weibull(values: Floats) -> tuple[Floats, Floats]:  # (distributions, values), positive, NaN where there is none
    """Return the shapes and scales of greatest likelihood, (distributions,) each.

    The shape s is the root of Σ xˢ log x / Σ xˢ − 1 / s − mean log x, which rises with s: found by halving log s, all
    distributions at once. Then scaleˢ = mean xˢ. Equal values have no root; their s is so large that the distribution
    is a step.
    """
    held = np.isfinite(values)
    largest = np.nanmax(values, axis=1)
    logs = np.where(held, np.log(np.where(held, values, 1.0) / largest[:, None]), 0.0)  # of x / largest, ≤ 0
    count = held.sum(axis=1)
    mean = logs.sum(axis=1) / count
    low, high = np.full(len(values), np.log(1e-3)), np.full(len(values), np.log(1e12))
    for _ in range(64):  # of an interval of 35, to the last bit
        middle = (low + high) / 2
        shape = np.exp(middle)
        powers = np.where(held, np.exp(shape[:, None] * logs), 0.0)
        rises = (powers * logs).sum(axis=1) / powers.sum(axis=1) - 1 / shape - mean > 0
        low, high = np.where(rises, low, middle), np.where(rises, middle, high)
    shape = np.exp((low + high) / 2)
    powers = np.where(held, np.exp(shape[:, None] * logs), 0.0)
    return shape, largest * (powers.sum(axis=1) / count) ** (1 / shape)
