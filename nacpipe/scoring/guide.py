"""The best plain score of a cache: the yardstick beside a search's result, and the guide of the guided objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nacpipe.cache import Cache
from nacpipe.method.metrics import auroc
from nacpipe.method.plain_scores import energy, entropy, gen, max_logit, msp
from nacpipe.scoring.states import has_logits

PLAIN: Mapping[str, Callable[[NDArray[np.floating]], NDArray[np.float64]]] = {
    "MSP": msp,
    "MaxLogit": max_logit,
    "Energy": energy,
    "Entropy": entropy,
    "GEN": gen,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """A plain score and its values."""

    name: str
    scores: Mapping[str, NDArray[np.float64]]
    """Split → (samples,)."""


def choose_guide(cache: Cache, splits: tuple[str, ...], val: str) -> Guide | None:
    """Return the plain score with the highest AUROC of id/val against a split; None where outputs are not logits.

    Args:
        cache: holds id/val and the splits.
        splits: whose scores are returned; id/val and `val` among them.
        val: the split that plays OOD.
    """
    if not has_logits(cache):
        return None
    logits = {name: cache[name].read("logits") for name in splits}
    values = {name: (score(logits["id/val"]), score(logits[val])) for name, score in PLAIN.items()}
    name = max(values, key=lambda key: auroc(*values[key]))  # of equals the first
    return Guide(name=name, scores={split: PLAIN[name](array) for split, array in logits.items()})
