"""What a search learns from: ID or OOD, plus half of the guide, the best plain score of the same images.

Two thousand labels of a few OOD classes are little to choose dozens of numbers by; how sure the network was says more
per image, and holds for other classes too. Which plain score says it best depends on the network, so it is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nacpipe.method.metrics import auroc
from nacpipe.method.plain_scores import PLAIN_SCORES, Logits, score_in_parts

STRENGTH = 0.5  # of the guide in the target, beside 1 of the labels

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """The plain score that the target learns from."""

    name: str
    """MSP, MaxLogit, Energy, Entropy or GEN."""
    auroc: float
    """Of the images it was chosen on, a fraction."""
    scores: Floats
    """(images,), larger = more like the training data."""


def score_plainly(logits: Logits) -> dict[str, Floats]:  # (images, classes)
    """Return plain score → (images,), in the order in which equals are preferred."""
    return {name: score_in_parts(name, logits) for name in PLAIN_SCORES}


def choose_guide(
    plain: Mapping[str, Floats],  # score → (images,)
    is_id: NDArray[np.bool_],  # (images,)
) -> Guide | None:
    """Return the plain score with the highest AUROC of ID against OOD, the first of equals; None where there is none.

    There is none where the network's outputs are no logits.
    """
    best: Guide | None = None
    for name, scores in plain.items():
        reached = auroc(scores[is_id], scores[~is_id])
        if best is None or reached > best.auroc:
            best = Guide(name=name, auroc=reached, scores=scores)
    return best


def guided_target(
    is_id: NDArray[np.bool_],  # (images,)
    guide: Floats | None,  # (images,)
) -> Floats:
    """Return z(ID or OOD) + ½ z(guide), (images,); without a guide the first alone.

    z is standardised: mean 0, standard deviation 1.
    """
    target = _standardise(np.where(is_id, 1.0, -1.0))
    return target if guide is None else target + STRENGTH * _standardise(guide)


def _standardise(values: Floats) -> Floats:
    return np.asarray((values - values.mean()) / (values.std() + 1e-300))
