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
    return cross_validate_each(scores, is_id, plain, folds, [None])[0]


def cross_validate_each(
    scores: Sequence[NDArray[np.floating]],  # per term: (trials, images)
    is_id: NDArray[np.bool_],  # (images,)
    plain: Mapping[str, Floats],
    folds: Sequence[Rows],
    extras: Sequence[Floats | None],  # each (images,)
) -> list[float]:
    """Return what `cross_validate` does, for each of `extras` as one more term of one trial; None stands for none."""
    splits = [(held, np.setdiff1d(np.arange(is_id.size), held)) for held in folds]
    splits = [pair for pair in splits if all(is_id[rows].any() and not is_id[rows].all() for rows in pair)]
    if not splits:
        return [float("nan")] * len(extras)
    targets = [_target(is_id, plain, kept) for _, kept in splits]
    trials = _best_trials(scores, is_id.size, [kept for _, kept in splits], targets)  # (terms, folds)
    reached = np.empty((len(splits), len(extras)))
    for fold, ((held, kept), target, best) in enumerate(zip(splits, targets, trials.T, strict=True)):
        terms = [term[trial] for term, trial in zip(scores, best, strict=True)]
        for place, extra in enumerate(extras):
            chosen = np.stack(terms if extra is None else [*terms, extra], axis=1)
            combined = chosen[held] @ ridge_weights(chosen[kept], target)
            reached[fold, place] = auroc(combined[is_id[held]], combined[~is_id[held]])
    return [float(value) for value in reached.mean(axis=0)]


def _target(is_id: NDArray[np.bool_], plain: Mapping[str, Floats], kept: Rows) -> Floats:
    """The guided target of some images, with the guide chosen on them, (kept,)."""
    guide = choose_guide({name: values[kept] for name, values in plain.items()}, is_id[kept])
    return guided_target(is_id[kept], None if guide is None else guide.scores)


def _best_trials(
    scores: Sequence[NDArray[np.floating]], images: int, kept: Sequence[Rows], targets: Sequence[Floats]
) -> NDArray[np.intp]:
    """Each term's trial with the highest correlation with each fold's target, (terms, folds)."""
    inside, wanted = np.zeros((images, len(kept))), np.zeros((images, len(kept)))
    for fold, (rows, target) in enumerate(zip(kept, targets, strict=True)):
        inside[rows, fold] = 1.0
        wanted[rows, fold] = target
    return np.stack([correlate(term, wanted, inside).argmax(axis=0) for term in scores])


def correlate(
    scores: NDArray[np.floating],  # (trials, images)
    targets: Floats,  # (images, folds), of mean 0 among the fold's images and 0 for the others
    inside: Floats,  # (images, folds): 1 for the fold's images, 0 for the others
) -> Floats:
    """Return each trial's correlation with each target, (trials, folds); 0 where all its scores are the same.

    All folds at once, as products of matrices.
    """
    centred = scores - scores.mean(axis=1, dtype=np.float64, keepdims=True)
    squares = centred**2 @ inside
    spread = squares - (centred @ inside) ** 2 / inside.sum(axis=0)
    flat = spread <= 1e-12 * squares + 1e-300  # rounding alone
    size = np.sqrt(np.where(flat, 1.0, spread) * (targets**2).sum(axis=0))
    return np.where(flat, 0.0, centred @ targets / size)
