"""The compiled loops behind coverage.py. Everything here works on float32 products and integer counts.

A layer is indexed once (`sort_columns`), neuron by neuron, so that every loop walks memory forward:

    train    (neurons, n_train)  each neuron's training products, ascending
    queries  (neurons, n_query)  each neuron's evaluated products, ascending
    ranks    (neurons, n_query)  where sample s stands in its neuron's ascending order

A trial (`fill_ranked`) lays its borders over both ascending rows at once:

    train    ··· ·│·· ·········│·· ·│···        counts per bin:    p[k+1] − p[k]
    queries    · ·│· ·· ·· ····│·   │· ·        entry per place:   min(count, saturation) over q[k] … q[k+1]
                  └ border k               then   filled[s] += entry[ranks[s]]

Compiled code is cached on disk by numba, beside this file or, where that cannot be written, in the user's cache folder;
its index is keyed by processor, so a copied cache is never stale.

A trial's neurons are shared out over plain threads. The other loops use numba's own work queue: OpenMP's threads spin
while they wait, and where two searches share a machine's cores each takes five times as long. The work queue must not
be entered twice at once, hence the lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numba
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

if "NUMBA_THREADING_LAYER" not in os.environ:
    numba.config.THREADING_LAYER = "workqueue"  # type: ignore[attr-defined]
_ENTERED = threading.Lock()
LINE = 16  # float32 values in a cache line


def _compiled(**options: Any) -> Callable[[Any], Any]:
    """Compile, and keep the result on disk where any folder can be written to."""

    def decorate(function: Any) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # numba found no folder: a read-only install and no home
            return njit(**options)(function)

    return decorate


@_compiled(inline="always")
def _walk(row, line, border):  # type: ignore[no-untyped-def]
    """The line of the ascending row that `border` falls in, from `line` on, and how many values are below the border.

    Lines that are wholly below are stepped over by their last value; within a line the comparisons are counted, all of
    them, since a branch at an unforeseeable place costs more than sixteen comparisons at once.
    """
    whole = row.size // LINE
    while line < whole and row[line * LINE + LINE - 1] < border:
        line += 1
    below = np.int32(0)
    start = line * LINE
    if line < whole:
        for t in range(LINE):
            below += np.int32(row[start + t] < border)
    else:
        for place in range(start, row.size):
            below += np.int32(row[place] < border)
    return line, start + below


@_compiled(nogil=True)
def _fill_ranked(train, queries, ranks, borders, saturation):  # type: ignore[no-untyped-def]
    neurons, n_query = ranks.shape
    entries = np.empty(n_query + LINE, np.int32)  # written a line at a time, hence the room behind
    filled = np.zeros(n_query, np.int32)
    total = np.zeros(n_query, np.int64)
    for neuron in range(neurons):
        row, query = train[neuron], queries[neuron]
        p, q, train_line, query_line = 0, 0, 0, 0
        for k in range(1, borders.size):
            train_line, p_next = _walk(row, train_line, borders[k])
            query_line, q_next = _walk(query, query_line, borders[k])
            entry = np.int32(min(p_next - p, saturation))
            for t in range(LINE):
                entries[q + t] = entry
            for place in range(q + LINE, q_next):
                entries[place] = entry
            p, q = p_next, q_next
            if q == n_query:
                break
        rank = ranks[neuron]
        for s in range(n_query):
            filled[s] += entries[rank[s]]
        if (neuron + 1) % 1024 == 0:  # int32 holds 1,024 neurons of up to two million counts
            for s in range(n_query):
                total[s] += filled[s]
                filled[s] = 0
    for s in range(n_query):
        total[s] += filled[s]
    return total


@_compiled(parallel=True, nogil=True)
def _count_sorted(train, borders):  # type: ignore[no-untyped-def]
    neurons = train.shape[0]
    counts = np.zeros((neurons, borders.size - 1), np.int32)
    for neuron in prange(neurons):
        row = train[neuron]
        p, line = 0, 0
        for k in range(1, borders.size):
            line, p_next = _walk(row, line, borders[k])
            counts[neuron, k - 1] = p_next - p
            p = p_next
    return counts


@_compiled(parallel=True, nogil=True)
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


def fill_ranked(
    train: NDArray[np.float32],  # (neurons, n_train), ascending
    queries: NDArray[np.float32],  # (neurons, n_query), ascending
    ranks: NDArray[np.uint16] | NDArray[np.uint32],  # (neurons, n_query)
    borders: NDArray[np.float32],  # (bins,)
    saturation: int,
) -> NDArray[np.int64]:
    """Return Σ over neurons of min(count, saturation) at each indexed sample's bins, (n_query,) int64; finite input."""
    threads = min(numba.get_num_threads(), train.shape[0])
    cuts = [train.shape[0] * part // threads for part in range(threads + 1)]
    parts = [slice(low, high) for low, high in pairwise(cuts)]

    def fill(part: slice) -> NDArray[np.int64]:
        return np.asarray(_fill_ranked(train[part], queries[part], ranks[part], borders, saturation))

    others = [_helpers().submit(fill, part) for part in parts[1:]]
    total = fill(parts[0])
    for other in others:
        total += other.result()
    return total


@cache
def _helpers() -> ThreadPoolExecutor:
    """Threads beside the caller's. A trial takes milliseconds, and here numba's own often woke on one core."""
    return ThreadPoolExecutor(max(_most_threads() - 1, 1), thread_name_prefix="nacpipe")


def count_sorted(
    train: NDArray[np.float32],  # (neurons, n_train), ascending
    borders: NDArray[np.float32],  # (bins,)
) -> NDArray[np.int32]:
    """Return how many training samples fall in each bin, (neurons, bins − 1) int32."""
    with _ENTERED:
        return np.asarray(_count_sorted(train, borders))


def fill_rows(
    products: NDArray[np.float32],  # (samples, neurons), as they come
    borders: NDArray[np.float32],  # (bins,)
    counts: NDArray[np.int32],  # (neurons, bins - 1)
    saturation: int,
) -> NDArray[np.int64]:
    """Return what `fill_ranked` returns, for samples that were not indexed, (samples,) int64."""
    with _ENTERED:
        return np.asarray(_fill_rows(products, borders, counts, saturation))


def sort_columns(products: NDArray[np.float32]) -> NDArray[np.float32]:  # (samples, neurons)
    """Return each neuron's products in ascending order, (neurons, samples)."""
    columns = np.ascontiguousarray(products.T)
    columns.sort(axis=1)
    return columns


def rank_columns(products: NDArray[np.float32]) -> NDArray[np.uint16] | NDArray[np.uint32]:  # (samples, neurons)
    """Return each sample's place in its neuron's ascending order, (neurons, samples), as narrow as it can be."""
    neurons, samples = products.shape[1], products.shape[0]
    ranks = np.empty((neurons, samples), np.uint16 if samples <= 1 << 16 else np.uint32)
    places = np.arange(samples, dtype=ranks.dtype)
    for neuron in range(neurons):
        ranks[neuron, np.argsort(products[:, neuron])] = places
    return ranks


def set_threads(threads: int | None) -> None:
    """Let the loops use this many cores (all by default)."""
    numba.set_num_threads(min(threads or _most_threads(), _most_threads()))


def _most_threads() -> int:
    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
