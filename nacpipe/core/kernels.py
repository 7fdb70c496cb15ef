"""The compiled loops behind coverage.py. Everything here works on float32 products and integer counts.

A trial (`fill_ranked`) finds its borders in a layer's index (columns.py), p training and q evaluated products below
border k:

    train    ··· ·│·· ·········│·· ·│···        counts per bin:    p[k+1] − p[k]
    queries    · ·│· ·· ·· ····│·   │· ·        entry per place:   min(count, saturation) over q[k] … q[k+1]
                  └ border k               then   filled[s] += entry[ranks[s]]

A trial's neurons are shared out over plain threads. `fill_rows` uses numba's own work queue: OpenMP's threads spin
while they wait, and where two searches share a machine's cores each takes five times as long. The work queue must not
be entered twice at once, hence the lock.
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
from numba import prange
from numpy.typing import NDArray

from nacpipe.core.columns import Columns, Index
from nacpipe.core.vectors import (
    FOUR,
    LINE,
    STRETCH,
    compiled,
    count_below,
    count_bits,
    fill_stretch,
    load_four,
    prefetch,
)

if "NUMBA_THREADING_LAYER" not in os.environ:
    numba.config.THREADING_LAYER = "workqueue"  # type: ignore[attr-defined]
_ENTERED = threading.Lock()

Asked = tuple[Index, NDArray[np.float32], int]
"""A layer's index, its borders (bins,) and its saturation."""


@compiled(inline="always")
def _find_place(row, starts, border):  # type: ignore[no-untyped-def]
    """How many of a neuron's values are below a border: down the tree, one line per level."""
    place = 0
    for start in starts:  # a tuple: compiled for so many levels, with no loop left
        place = place * LINE + count_below(row, start + place * LINE, border)
    return place


@compiled(nogil=True)
def _find_places(tree, starts, borders):  # type: ignore[no-untyped-def]
    places = np.empty((tree.shape[0], borders.size), np.int32)
    for neuron in range(tree.shape[0]):
        for k in range(borders.size):
            places[neuron, k] = _find_place(tree[neuron], starts, borders[k])
    return places


@compiled(inline="always")
def _fill_entries(entries, p, q, saturation):  # type: ignore[no-untyped-def]
    """One neuron's entries, min(count, saturation), at every place of its queries' order."""
    for k in range(p.size - 1):
        entry = min(p[k + 1] - p[k], saturation)
        place = q[k]
        fill_stretch(entries, place, entry)  # in any case: what is too much, the next bins write over
        while place + STRETCH < q[k + 1]:
            place += STRETCH
            fill_stretch(entries, place, entry)


@compiled(inline="always")
def _find_lines(tree, upper, values, first, borders, lines):  # type: ignore[no-untyped-def]
    """Which line of its values each border is in, for four neurons; and have memory send these lines."""
    for j in range(min(FOUR, tree.shape[0] - first)):
        row = tree[first + j]
        for k in range(borders.size):
            line = _find_place(row, upper, borders[k])
            lines[j, k] = line
            prefetch(row, values + line * LINE)


@compiled(nogil=True)
def _fill_ranked(tree, upper, values, marks, ranks, borders, saturation, entries, total):  # type: ignore[no-untyped-def]
    p, q = np.empty(borders.size, np.int64), np.empty(borders.size, np.int64)
    lines = np.empty((FOUR, borders.size), np.int64)
    a, b, c, d = entries[0], entries[1], entries[2], entries[3]
    _find_lines(tree, upper, values, 0, borders, lines)
    for four in range(ranks.shape[0]):
        for j in range(FOUR):
            neuron = FOUR * four + j
            if neuron < tree.shape[0]:
                row = tree[neuron]
                for k in range(borders.size):
                    line = lines[j, k]
                    below = count_below(row, values + line * LINE, borders[k])
                    mark = np.int64(marks[neuron, line])
                    p[k] = (mark >> LINE) + count_bits(mark & ((1 << below) - 1))
                    q[k] = line * LINE + below - p[k]
                _fill_entries(entries[j], p, q, saturation)
            else:
                entries[j] = 0
        _find_lines(tree, upper, values, FOUR * (four + 1), borders, lines)  # they come while entries are added up
        row_of_ranks = ranks[four].ravel()
        for s in range(total.size):
            in_a, in_b, in_c, in_d = load_four(row_of_ranks, FOUR * s)
            total[s] += np.int64(a[in_a]) + np.int64(b[in_b]) + np.int64(c[in_c]) + np.int64(d[in_d])


@compiled(parallel=True, nogil=True)
def _fill_rows(products, borders, counts, saturation):  # type: ignore[no-untyped-def]
    rows, neurons = products.shape
    filled = np.zeros(rows, np.int64)
    for s in prange(rows):
        total = np.int64(0)
        for neuron in range(neurons):
            x = products[s, neuron]
            low = 0
            size = borders.size - 1  # bin k: borders[k] ≤ x < borders[k + 1], borders[0] = −∞
            while size > 1:
                half = size >> 1
                if borders[low + half] <= x:
                    low += half
                size -= half
            total += min(counts[neuron, low], saturation)
        filled[s] = total
    return filled


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
        _fill_ranked(tree, tuple(upper), values, marks, ranks, borders, saturation, entries, total)
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
    return np.diff(np.asarray(_find_places(train.tree, train.starts, borders)))


def fill_rows(
    products: NDArray[np.float32],  # (samples, neurons), as they come
    borders: NDArray[np.float32],  # (bins,)
    counts: NDArray[np.int32],  # (neurons, bins - 1)
    saturation: int,
) -> NDArray[np.int64]:
    """Return what `fill_ranked` returns, for samples that were not indexed, (samples,) int64."""
    with _ENTERED:
        return np.asarray(_fill_rows(products, borders, counts, saturation))


def set_threads(threads: int | None) -> None:
    """Let the loops use this many cores (all by default)."""
    numba.set_num_threads(min(threads or _most_threads(), _most_threads()))


def _most_threads() -> int:
    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
