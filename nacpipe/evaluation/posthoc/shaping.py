"""Post-hoc detectors that change features, or the last linear layer, and take Energy of the logits that follow.

They see pooled features, one number per channel, as OpenOOD's do. A percentile such as 65 says how many of an image's
features count as small: all but the largest 35 %.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nacpipe.evaluation.posthoc.detector import Linear, Samples, Score, Training
from nacpipe.method.plain_scores import Floats, energy

REACT_QUANTILE = 0.9
DICE_QUANTILE = 0.9
VRA_PERCENTILES = (10, 90)  # OpenOOD's


def fit_react(training: Training) -> Score:
    """ReAct (Sun et al., NeurIPS 2021): features are clipped at the 0.9 quantile of all training features."""
    linear = training.linear
    threshold = np.float32(np.percentile(training.samples.features, 100 * REACT_QUANTILE))
    return lambda samples: energy(linear(np.minimum(samples.features, threshold)))


def fit_vra(training: Training) -> Score:
    """VRA (Xu et al., NeurIPS 2023) as OpenOOD has it: features are clipped at the 10 % and 90 % percentiles of all.

    The paper sets what is below the lower one to 0; where a tenth of all features is 0, as after a ReLU, both agree.
    """
    linear = training.linear
    low, high = np.percentile(training.samples.features, VRA_PERCENTILES).astype(np.float32)
    return lambda samples: energy(linear(np.clip(samples.features, low, high)))


def fit_ash_s(training: Training, *, percentile: int) -> Score:
    """ASH-S (Djurisic et al., ICLR 2023): the smallest features become 0, the others grow by exp(before / after)."""
    linear = training.linear

    def score(samples: Samples) -> Floats:
        features, kept = samples.features, _largest(samples.features, percentile)
        pruned = np.zeros_like(features)
        np.put_along_axis(pruned, kept, np.take_along_axis(features, kept, axis=1), axis=1)
        return energy(_scaled(linear, pruned, _growth(features, kept)))

    return score


def fit_ash_b(training: Training, *, percentile: int) -> Score:
    """ASH-B (Djurisic et al., ICLR 2023): the smallest features become 0, the others their share of the sum of all."""
    linear = training.linear

    def score(samples: Samples) -> Floats:
        features, kept = samples.features, _largest(samples.features, percentile)
        chosen = np.zeros_like(features)
        np.put_along_axis(chosen, kept, np.float32(1), axis=1)
        share = features.sum(axis=1, dtype=np.float64)[:, None] / kept.shape[1]
        return energy(_scaled(linear, chosen, share))

    return score


def fit_scale(training: Training, *, percentile: int) -> Score:
    """SCALE (Xu et al., ICLR 2024): all features grow by exp(sum of all / sum of the largest)."""
    linear = training.linear

    def score(samples: Samples) -> Floats:
        features = samples.features
        return energy(_scaled(linear, features, _growth(features, _largest(features, percentile))))

    return score


def fit_dice(training: Training) -> Score:
    """DICE (Sun & Li, ECCV 2022): weights stay whose mean contribution W · mean features is among the largest 10 %."""
    linear = training.linear
    contribution = training.samples.features.mean(axis=0) * linear.weight
    kept = contribution > np.quantile(contribution, DICE_QUANTILE)
    sparse = Linear(weight=np.where(kept, linear.weight, np.float32(0)), bias=linear.bias)
    return lambda samples: energy(sparse(samples.features))


def _largest(features: NDArray[np.float32], percentile: int) -> NDArray[np.int64]:
    """The places of each image's features that are not among its smallest, (samples, kept), in no order."""
    width = features.shape[1]
    kept = max(1, width - round(width * percentile / 100))
    return np.argpartition(features, width - kept, axis=1)[:, width - kept :]


def _growth(features: NDArray[np.float32], kept: NDArray[np.int64]) -> Floats:
    """exp(sum of all features / sum of those that are kept), (samples, 1)."""
    before = features.sum(axis=1, dtype=np.float64)
    after = np.take_along_axis(features, kept, axis=1).sum(axis=1, dtype=np.float64)
    return np.asarray(np.exp(before / after)[:, None])


def _scaled(linear: Linear, features: NDArray[np.float32], growth: Floats) -> Floats:
    """The logits of growth · features; the layer is linear, so they grow after it, in float64."""
    return np.asarray(growth * (features @ linear.weight.T) + linear.bias)
