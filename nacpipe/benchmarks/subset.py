"""The class-balanced, seeded choice of the training images that the coverage is built from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nacpipe.errors import InputError


def choose_balanced(
    labels: NDArray[np.int64],  # (rows,)
    classes: int,
    count: int,
    seed: int,
) -> NDArray[np.int64]:
    """Return the chosen row numbers, (chosen,): the same number of every class, classes in order of first appearance.

    Per class a newly seeded RandomState shuffles the row numbers, and the first count // classes are kept (at most the
    size of the smallest class), as in the authors' `TrainSubset`. A count below the number of classes cannot be
    balanced: the whole list is shuffled and its first `count` rows are taken.

    Raises:
        InputError: the count is not positive, there are no labels, or one lies outside 0 … classes − 1.
    """
    if count < 1:
        raise InputError(f"train-images is {count}; it must be at least 1")
    if labels.size == 0:
        raise InputError("there are no training images to choose from")
    if (outside := np.unique(labels[(labels < 0) | (labels >= classes)])).size:
        few = ", ".join(str(label) for label in outside[:5]) + (" …" if outside.size > 5 else "")
        raise InputError(f"training labels must lie in 0 … {classes - 1}; found {few}")
    if count < classes:
        return _shuffled(np.arange(labels.size), seed)[:count]
    class_labels, first = np.unique(labels, return_index=True)
    per_class = [np.flatnonzero(labels == label) for label in class_labels[np.argsort(first)]]
    keep = min(count // classes, min(rows.size for rows in per_class))
    return np.concatenate([_shuffled(rows, seed)[:keep] for rows in per_class])


def _shuffled(rows: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    shuffled = rows.tolist()  # the authors shuffle a list; RandomState shuffles an array in the same way
    np.random.RandomState(seed).shuffle(shuffled)
    return np.asarray(shuffled, dtype=np.int64)
