"""What coverage.py's tables and scores are made of: counts, and sums of table entries, all integers.

A trial (`fill_ranked`) finds its borders in a layer's index (columns.py), p training and q evaluated products below
border k:

    train    ··· ·│·· ·········│·· ·│···        counts per bin:    p[k+1] − p[k]
    queries    · ·│· ·· ·· ····│·   │· ·        entry per place:   min(count, saturation) over q[k] … q[k+1]
                  └ border k               then   filled[s] += entry[ranks[s]]

A trial's neurons are shared out over plain threads. `fill_rows` uses numba's own work queue: OpenMP's threads spin
while they wait, and where two searches share a machine's cores each takes five times as long. The work queue must not
be entered twice at once, hence the lock. The loops themselves are in loops.py.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from nacpipe.core.columns import Columns, Index
from nacpipe.core.loops import FOUR, STRETCH, add_entries, find_places, walk_rows

if "NUMBA_THREADING_LAYER" not in os.environ:
    numba.config.THREADING_LAYER = "workqueue"  # type: ignore[attr-defined]
_ENTERED = threading.Lock()

Asked = tuple[Index, NDArray[np.float32], int]
"""A layer's index, its borders (bins,) and its saturation."""


def fill_ranked(asked: Sequence[Asked]) -> list[NDArray[np.int64]]:
    """Return, layer by layer, Σ over neurons of min(count, saturation) at each query's bins, (n_query,) int64."""
    threads = numba.get_num_threads()
    others = [_helpers().submit(_fill_part, asked, part, threads) for part in range(1, threads)]
    parts = [_fill_part(asked, 0, threads), *(other.result() for other in others)]
    return [sum(rest, first.astype(np.int64)) for first, *rest in zip(*parts, strict=True)]


def _fill_part(asked: Sequence[Asked], part: int, parts: int) -> list[NDArray[Any]]:
    """The same over one part of every layer's neurons."""
    totals = []
    for index, borders, saturation in asked:
        fours = len(index.ranks)
        first, end = fours * part // parts, fours * (part + 1) // parts
        most = min(index.columns.samples - index.queries, saturation)
        room = index.queries + STRETCH  # entries are written in stretches
        entries = np.empty((FOUR, room), np.min_scalar_type(most))
        total = np.zeros(index.queries, np.int32 if most * index.neurons < 1 << 31 else np.int64)
        some = slice(FOUR * first, FOUR * end)
        tree, (*upper, values) = index.columns.tree[some], index.columns.starts
        marks, ranks = index.marks[some], index.ranks[first:end]
        add_entries(tree, tuple(upper), values, marks, ranks, borders, saturation, entries, total)
        totals.append(total)
    return totals


@cache
def _helpers() -> ThreadPoolExecutor:
    """Threads beside the caller's. A trial takes milliseconds, and here numba's own often woke on one core."""
    return ThreadPoolExecutor(max(_most_threads() - 1, 1), thread_name_prefix="nacpipe")


def count_sorted(
    train: Columns,
    borders: NDArray[np.float32],  # (bins,)
) -> NDArray[np.int32]:
    """Return how many training samples fall in each bin, (neurons, bins − 1) int32."""
    return np.diff(np.asarray(find_places(train.tree, train.starts, borders)))


def fill_rows(
    products: NDArray[np.float32],  # (samples, neurons), as they come
    borders: NDArray[np.float32],  # (bins,)
    counts: NDArray[np.int32],  # (neurons, bins - 1)
    saturation: int,
) -> NDArray[np.int64]:
    """Return what `fill_ranked` returns, for samples that were not indexed, (samples,) int64."""
    with _ENTERED:
        return np.asarray(walk_rows(products, borders, counts, saturation))


def set_threads(threads: int | None) -> None:
    """Let the loops use this many cores (all by default)."""
    numba.set_num_threads(min(threads or _most_threads(), _most_threads()))


def _most_threads() -> int:
    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
