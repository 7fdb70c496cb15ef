"""How a search's result does on validation samples that it was not chosen by.

Everything that is chosen by the validation pair (each term's trial, the weights) is chosen anew without one fold of it,
and that fold is scored. Folds are made twice:

    images      five random fifths of id/val and of the OOD validation split
    clusters    the OOD split by the network's predictions: what is classified alike is left out together, so that the
                fold holds OOD data of a kind that nothing was chosen by; id/val by random fifths
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nacpipe.method.metrics import auroc
from nacpipe.tuning.weights import guided_target, target_weights

FOLDS = 5
GAP = 0.015  # fitted minus cross-validated AUROC from which a result is warned of


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossValidation:
    """Means over the folds, fractions."""

    images: float
    """NAC's AUROC over folds of images."""
    clusters: float
    """NAC's AUROC over folds of classes that the OOD split is predicted as."""
    guide: float | None
    """The best plain score's AUROC over the folds of images; None where there is none."""

    def to_json(self) -> dict[str, Any]:
        """Return the record as params.json holds it."""
        return {"images": self.images, "clusters": self.clusters, "guide": self.guide}


def cross_validate(
    terms: Sequence[NDArray[np.float32]],
    id_rows: int,
    predicted: NDArray[np.intp],
    guide: NDArray[np.float64] | None,
    seed: int = 0,
) -> CrossValidation:
    """Return the cross-validated AUROC of choosing one trial per term and weights in closed form.

    Args:
        terms: per term the scores of all its trials, (trials, samples): id/val first, then the OOD split.
        id_rows: samples of id/val.
        predicted: the class of each sample of the OOD split, (samples − id_rows,).
        guide: the plain score of every sample, (samples,).
        seed: of the folds.
    """
    samples = terms[0].shape[1]
    found: dict[str, list[float]] = {"images": [], "clusters": [], "guide": []}
    for kind in ("images", "clusters"):
        for fold in _folds(id_rows, samples - id_rows, predicted if kind == "clusters" else None, seed):
            scores = _score_fold(terms, id_rows, guide, fold)
            is_id = np.flatnonzero(fold) < id_rows
            found[kind].append(auroc(scores[is_id], scores[~is_id]))
            if guide is not None and kind == "images":
                found["guide"].append(auroc(guide[fold][is_id], guide[fold][~is_id]))
    images = float(np.mean(found["images"]))
    return CrossValidation(
        images=images,
        clusters=float(np.mean(found["clusters"])) if found["clusters"] else images,  # all are taken for one class
        guide=float(np.mean(found["guide"])) if found["guide"] else None,
    )


def _folds(id_rows: int, ood_rows: int, predicted: NDArray[np.intp] | None, seed: int) -> Iterator[NDArray[np.bool_]]:
    """Masks of samples, (id_rows + ood_rows,), each with samples of both kinds inside and outside."""
    random = np.random.default_rng(seed)
    id_fold = random.permutation(np.arange(id_rows) % FOLDS)
    if predicted is None:
        ood_fold = random.permutation(np.arange(ood_rows) % FOLDS)
    else:  # the most frequent class first, each to the smallest fold so far
        classes, counts = np.unique(predicted, return_counts=True)
        sizes, fold_of = np.zeros(FOLDS, int), {}
        for place in np.argsort(-counts, kind="stable"):
            fold_of[classes[place]] = int(np.argmin(sizes))
            sizes[fold_of[classes[place]]] += counts[place]
        ood_fold = np.array([fold_of[label] for label in predicted], dtype=int)
    folds = np.concatenate([id_fold, ood_fold])
    for number in range(FOLDS):
        fold = folds == number
        inside, outside = fold[:id_rows], fold[id_rows:]
        if inside.any() and not inside.all() and outside.any() and not outside.all():
            yield fold


def _score_fold(
    terms: Sequence[NDArray[np.float32]], id_rows: int, guide: NDArray[np.float64] | None, fold: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Scores of a fold's samples under what is chosen by the others."""
    rest = ~fold
    is_id = np.flatnonzero(rest) < id_rows
    target = guided_target(int(is_id.sum()), int((~is_id).sum()), None if guide is None else guide[rest])
    chosen = []
    for scores in terms:
        trial = int(np.argmax(correlations(scores[:, rest], target)))
        chosen.append(scores[trial].astype(np.float64))
    stacked = np.stack(chosen)
    return np.asarray(target_weights(stacked[:, rest], target) @ stacked[:, fold])


def correlations(
    scores: NDArray[np.float32],  # (trials, samples)
    target: NDArray[np.float64],  # (samples,)
) -> NDArray[np.float64]:
    """Return each trial's correlation with the target, (trials,); −1 where all its scores are equal."""
    wide = scores.astype(np.float64)
    wide -= wide.mean(axis=1, keepdims=True)
    spread = np.sqrt(np.square(wide).sum(axis=1)) * np.linalg.norm(target - target.mean())
    flat = np.ptp(scores, axis=1) == 0
    return np.where(flat, -1.0, wide @ (target - target.mean()) / np.where(flat, 1.0, spread))
