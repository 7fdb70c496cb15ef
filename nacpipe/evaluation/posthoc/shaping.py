"""Post-hoc detectors that change features, or the last linear layer, and take Energy of the logits that follow.

They see pooled features, one number per channel, as OpenOOD's do. A share such as 0.65 says how many of an image's
features count as small.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nacpipe.evaluation.posthoc.detector import Linear, Samples, Score, Training
from nacpipe.method.plain_scores import Floats, energy

REACT_QUANTILE = 0.9
ASH_SHARE, SCALE_SHARE = 0.65, 0.65  # pytorch-ood's; OpenOOD's ASH-B at 0.9 and SCALE at 0.85 are other variants
DICE_QUANTILE = 0.9


def fit_react(training: Training) -> Score:
    """ReAct (Sun et al., NeurIPS 2021): features are clipped at the 0.9 quantile of all training features."""
    linear = training.linear
    threshold = np.float32(np.percentile(training.samples.features, 100 * REACT_QUANTILE))
    return lambda samples: energy(linear(np.minimum(samples.features, threshold)))


def fit_ash(training: Training) -> Score:
    """ASH-S (Djurisic et al., ICLR 2023): the smallest 65 % become 0, the others grow by exp(sum before / after)."""
    linear = training.linear

    def score(samples: Samples) -> Floats:
        features, kept = samples.features, _largest(samples.features, ASH_SHARE)
        pruned = np.zeros_like(features)
        np.put_along_axis(pruned, kept, np.take_along_axis(features, kept, axis=1), axis=1)
        return energy(_scaled(linear, pruned, _growth(features, kept)))

    return score


def fit_scale(training: Training) -> Score:
    """SCALE (Xu et al., ICLR 2024): all features grow by exp(sum of all / sum of the largest 35 %)."""
    linear = training.linear

    def score(samples: Samples) -> Floats:
        features = samples.features
        return energy(_scaled(linear, features, _growth(features, _largest(features, SCALE_SHARE))))

    return score


def fit_dice(training: Training) -> Score:
    """DICE (Sun & Li, ECCV 2022): weights stay whose mean contribution W · mean features is among the largest 10 %."""
    linear = training.linear
    contribution = training.samples.features.mean(axis=0) * linear.weight
    kept = contribution > np.quantile(contribution, DICE_QUANTILE)
    sparse = Linear(weight=np.where(kept, linear.weight, np.float32(0)), bias=linear.bias)
    return lambda samples: energy(sparse(samples.features))


def _largest(features: NDArray[np.float32], small: float) -> NDArray[np.int64]:
    """The places of each image's features that are not among its smallest share, in no order."""
    width = features.shape[1]
    kept = max(1, width - round(width * small))
    return np.argpartition(features, width - kept, axis=1)[:, width - kept :]


def _growth(features: NDArray[np.float32], kept: NDArray[np.int64]) -> Floats:
    """exp(sum of all features / sum of those that are kept), (samples, 1)."""
    before = features.sum(axis=1, dtype=np.float64)
    after = np.take_along_axis(features, kept, axis=1).sum(axis=1, dtype=np.float64)
    return np.asarray(np.exp(before / after)[:, None])


def _scaled(linear: Linear, features: NDArray[np.float32], growth: Floats) -> Floats:
    """The logits of growth · features; the layer is linear, so they grow after it, in float64."""
    return np.asarray(growth * (features @ linear.weight.T) + linear.bias)
