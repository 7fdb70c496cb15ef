"""Which training images the coverage is built from: a class-balanced, seeded choice (design §5)."""

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

    Per class the row numbers are shuffled by a RandomState seeded anew, and the first count // classes kept (at most
    the smallest class), as the authors' `TrainSubset` does. A count below the number of classes cannot be balanced: the
    whole list is shuffled and its first `count` rows are taken.

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
    found, first = np.unique(labels, return_index=True)
    per_class = [np.flatnonzero(labels == label) for label in found[np.argsort(first)]]
    keep = min(count // classes, min(rows.size for rows in per_class))
    return np.concatenate([_shuffled(rows, seed)[:keep] for rows in per_class])


def _shuffled(rows: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    shuffled = rows.tolist()  # RandomState shuffles a list and an array alike; a list is what the authors shuffle
    np.random.RandomState(seed).shuffle(shuffled)
    return np.asarray(shuffled, dtype=np.int64)
