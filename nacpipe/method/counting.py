"""What coverage.py's tables and scores are made of: counts, and sums of table entries, all integers.

A trial (`fill_ranked`) finds its borders in a layer's index (columns.py), p training and q evaluated products below
border k:

    train    ··· ·│·· ·········│·· ·│···        counts per bin:    p[k+1] − p[k]
    queries    · ·│· ·· ·· ····│·   │· ·        entry per place:   min(count, saturation) over q[k] … q[k+1]
                  └ border k               then   entry_sum[s] += entry[ranks[s]]

Work is shared out over plain threads (threads.py): a trial's neurons, and the rows of `fill_rows`. The loops themselves
are in loops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nacpipe.method.loops import GROUP, STRETCH, add_entries, find_places, walk_rows
from nacpipe.method.sorted_index import LayerIndex, SortedColumns
from nacpipe.method.threads import get_threads, run_in_parts

VALUES_PER_THREAD = 1 << 12  # fewer are looked up sooner than another thread wakes

Asked = tuple[LayerIndex, NDArray[np.float32], int]
"""A layer's index, its borders (bins,) and its saturation."""


def fill_ranked(asked: Sequence[Asked]) -> list[NDArray[np.int64]]:
    """Return, layer by layer, Σ over neurons of min(count, saturation) at each query's bins, (n_query,) int64."""
    parts = run_in_parts(lambda part, parts: _fill_part(asked, part, parts), get_threads())
    return [sum(rest, first.astype(np.int64)) for first, *rest in zip(*parts, strict=True)]


def _fill_part(asked: Sequence[Asked], part: int, parts: int) -> list[NDArray[Any]]:
    """The same over one part of every layer's neurons."""
    totals = []
    for index, borders, saturation in asked:
        fours = len(index.ranks)
        first, end = fours * part // parts, fours * (part + 1) // parts
        most = min(index.columns.samples - index.queries, saturation)
        room = index.queries + STRETCH  # entries are written in stretches
        entries = np.empty((GROUP, room), np.min_scalar_type(most))
        total = np.zeros(index.queries, np.int32 if most * index.neurons < 1 << 31 else np.int64)
        some = slice(GROUP * first, GROUP * end)
        tree, (*upper, values) = index.columns.tree[some], index.columns.starts
        train_bits, ranks = index.train_bits[some], index.ranks[first:end]
        add_entries(tree, tuple(upper), values, train_bits, ranks, borders, saturation, entries, total)
        totals.append(total)
    return totals


def count_sorted(
    train: SortedColumns,
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
    entry_sum = np.empty(len(products), np.int64)

    def fill(part: int, parts: int) -> None:
        rows = slice(len(products) * part // parts, len(products) * (part + 1) // parts)
        walk_rows(products[rows], borders, counts, saturation, entry_sum[rows])

    run_in_parts(fill, min(get_threads(), 1 + products.size // VALUES_PER_THREAD))
    return entry_sum
