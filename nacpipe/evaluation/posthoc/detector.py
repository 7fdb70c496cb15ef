"""What post-hoc detectors of other papers learn from and what they score.

    fit_NAME(training) ──▶ score(samples) ──▶ (samples,) float64, larger = more like the training data

A fit raises InputError where these images cannot give a detector; scores that cannot be computed are NaN or infinite.
Those that read logits alone are in logits.py, those on features in distances.py, neighbourhoods.py and shaping.py;
GradNorm, OpenMax and WeiPer have files of their own. A new one is a `fit_NAME` there, a row of `BASELINES`
(baselines.py) and of docs/evaluate.md, and a restatement in tests/evaluation/test_baselines_openood.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nacpipe.method.plain_scores import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A network's last linear layer."""

    weight: NDArray[np.float32]  # (classes, features)
    bias: NDArray[np.float32]  # (classes,)

    def __call__(self, features: NDArray[np.floating]) -> NDArray[np.floating]:  # (samples, features)
        """Return the logits of these features, (samples, classes)."""
        return np.asarray(features @ self.weight.T + self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What a cache holds of some images; a detector is given what it reads, the other arrays may be empty."""

    logits: NDArray[np.float32]  # (samples, classes)
    """The network's outputs."""
    features: NDArray[np.float32]  # (samples, features)
    """The inputs of the last linear layer."""
    linear_logits: NDArray[np.float32]  # (samples, classes)
    """The last linear layer's outputs for these features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The images that a detector learns from; none where it learns from nothing."""

    samples: Samples
    label: NDArray[np.int64]  # (samples,)
    linear: Linear


Score = Callable[[Samples], Floats]
Fit = Callable[[Training], Score]


def class_means(
    values: NDArray[np.floating],  # (samples, width)
    label: NDArray[np.int64],  # (samples,)
    classes: int,
) -> Floats:
    """Return the mean of each class's rows, (classes, width); NaN where a class has none."""
    means = np.full((classes, values.shape[1]), np.nan)
    order = np.argsort(label, kind="stable")
    held, starts, counts = np.unique(label[order], return_index=True, return_counts=True)
    means[held] = np.add.reduceat(values[order], starts, axis=0, dtype=np.float64) / counts[:, None]
    return means


def softmax(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the probabilities, (samples, classes), in the precision of the logits."""
    masses = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(masses / masses.sum(axis=1, keepdims=True))
