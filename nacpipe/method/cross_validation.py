"""How a choice of terms holds on images that it was not made on: nested cross-validation of a search's scores.

In every fold all is chosen anew without the images held out: the guide, the best trial of each term, the weights. What
is held out is then scored. Two kinds of folds:

    images      every fold holds out a random share of ID and of OOD images: new images of the same kinds
    clusters    every fold holds out the OOD images of some predicted classes, and a random share of ID: new kinds
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nacpipe.method.guide import choose_guide, guided_target
from nacpipe.method.metrics import auroc
from nacpipe.method.weights import ridge_weights

FOLDS = 5

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]


def image_folds(is_id: NDArray[np.bool_], folds: int = FOLDS, seed: int = 0) -> list[Rows]:  # (images,)
    """Return the images that each fold holds out, ascending: every image is held out once."""
    random = np.random.default_rng([seed, 0])
    sides = [random.permutation(np.flatnonzero(side)) for side in (is_id, ~is_id)]
    return [np.sort(np.concatenate([side[fold::folds] for side in sides])) for fold in range(folds)]


def cluster_folds(
    is_id: NDArray[np.bool_],  # (images,)
    predicted: NDArray[np.integer],  # (images,): each image's predicted class
    folds: int = FOLDS,
    seed: int = 0,
) -> list[Rows]:
    """Return the images that each fold holds out, ascending: every image is held out once.

    OOD images of one predicted class are held out together. Classes are dealt out by size, the largest first, to the
    fold with the fewest images. A fold without OOD images is left out, so there are fewer than two where the OOD images
    are predicted as one class.
    """
    random = np.random.default_rng([seed, 1])
    inside = random.permutation(np.flatnonzero(is_id))
    classes, sizes = np.unique(predicted[~is_id], return_counts=True)
    totals, fold_of = np.zeros(folds, np.int64), {}
    for place in np.argsort(-sizes, kind="stable"):
        fold = int(totals.argmin())
        fold_of[int(classes[place])] = fold
        totals[fold] += sizes[place]
    outside = np.flatnonzero(~is_id)
    own = np.array([fold_of[int(name)] for name in predicted[outside]], np.intp)
    held = [fold for fold in range(folds) if totals[fold]]
    return [np.sort(np.concatenate([inside[i :: len(held)], outside[own == fold]])) for i, fold in enumerate(held)]


def cross_validate(
    scores: Sequence[NDArray[np.floating]],  # per term: (trials, images)
    is_id: NDArray[np.bool_],  # (images,)
    plain: Mapping[str, Floats],  # plain score → (images,); empty where outputs are no logits
    folds: Sequence[Rows],
) -> float:
    """Return the mean over folds of the AUROC of held-out images; NaN where no fold holds out both sides.

    A fold that holds out, or leaves, one side alone is left out.
    """
    reached = []
    for held in folds:
        kept = np.setdiff1d(np.arange(is_id.size), held)
        if any(is_id[rows].all() or not is_id[rows].any() for rows in (held, kept)):
            continue
        trials, weights = choose_terms(
            [term[:, kept] for term in scores], is_id[kept], {name: values[kept] for name, values in plain.items()}
        )
        combined = np.stack([term[trial, held] for term, trial in zip(scores, trials, strict=True)], axis=1) @ weights
        reached.append(auroc(combined[is_id[held]], combined[~is_id[held]]))
    return float(np.mean(reached)) if reached else float("nan")


def choose_terms(
    scores: Sequence[NDArray[np.floating]],  # per term: (trials, images)
    is_id: NDArray[np.bool_],  # (images,)
    plain: Mapping[str, Floats],  # plain score → (images,)
) -> tuple[list[int], Floats]:
    """Return each term's best trial, the first of equals, and the terms' weights, (terms,)."""
    guide = choose_guide(plain, is_id)
    target = guided_target(is_id, None if guide is None else guide.scores)
    trials = [int(correlate(term, target).argmax()) for term in scores]
    best = np.stack([term[trial] for term, trial in zip(scores, trials, strict=True)], axis=1)
    return trials, ridge_weights(best, target)


def correlate(
    scores: NDArray[np.floating],  # (trials, images)
    target: Floats,  # (images,)
) -> Floats:
    """Return each trial's correlation with the target, (trials,); 0 where all its scores are the same."""
    centred = scores - scores.mean(axis=1, dtype=np.float64, keepdims=True)
    away = target - target.mean()
    spread = np.sqrt((centred**2).sum(axis=1) * (away**2).sum())
    flat = np.ptp(scores, axis=1) == 0
    return np.where(flat, 0.0, centred @ away / np.where(spread > 0, spread, 1.0))
