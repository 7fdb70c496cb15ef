"""Scores that need only logits; larger = more like the training data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.floating]  # (samples, classes)


def msp(logits: Logits) -> NDArray[np.float64]:
    """Maximum softmax probability (Hendrycks & Gimpel, 2017), (samples,)."""
    return np.exp(max_logit(logits) - energy(logits))


def max_logit(logits: Logits) -> NDArray[np.float64]:
    """The largest logit (Hendrycks et al., 2022), (samples,)."""
    return np.asarray(logits.max(axis=1), dtype=np.float64)


def energy(logits: Logits) -> NDArray[np.float64]:
    """log Σ exp(logits), the negative free energy at temperature 1 (Liu et al., 2020), (samples,)."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    return np.asarray(top + np.log(np.exp(wide - top[:, None]).sum(axis=1)))


LOGIT_BASELINES: Mapping[str, Callable[[Logits], NDArray[np.float64]]] = {
    "MSP": msp,
    "MaxLogit": max_logit,
    "Energy": energy,
}
