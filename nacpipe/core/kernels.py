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

Threads are numba's own work queue: OpenMP's threads spin while they wait, and where two searches share a machine's
cores each takes five times as long. The work queue must not be entered twice at once, hence the lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

if "NUMBA_THREADING_LAYER" not in os.environ:
    numba.config.THREADING_LAYER = "workqueue"  # type: ignore[attr-defined]
_ENTERED = threading.Lock()
NEAR = 8  # places walked one by one before leaping: most bins hold fewer


def _compiled(**options: Any) -> Callable[[Any], Any]:
    """Compile, and keep the result on disk where any folder can be written to."""

    def decorate(function: Any) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # numba found no folder: a read-only install and no home
            return njit(**options)(function)

    return decorate


@_compiled(inline="always")
def _first_at_least(row, start, border):  # type: ignore[no-untyped-def]
    """The first place ≥ start in the ascending row whose value is ≥ border: a few steps, then in leaps."""
    n = row.size
    near = min(n, start + NEAR)
    while start < near and row[start] < border:
        start += 1
    if start == n or row[start] >= border:
        return start
    step = 1
    low = start  # row[low] < border
    high = start + 1
    while high < n and row[high] < border:
        low = high
        step *= 2
        high = low + step
    if high > n:
        high = n
    while high - low > 1:
        middle = (low + high) >> 1
        if row[middle] < border:
            low = middle
        else:
            high = middle
    return high


@_compiled(parallel=True, nogil=True)
def _fill_ranked(train, queries, ranks, borders, saturation, chunks):  # type: ignore[no-untyped-def]
    neurons = train.shape[0]
    n_query = queries.shape[1]
    partial = np.zeros((chunks, n_query), np.int64)
    per_chunk = (neurons + chunks - 1) // chunks
    for chunk in prange(chunks):
        entries = np.empty(n_query, np.int32)
        filled = np.zeros(n_query, np.int32)
        for neuron in range(chunk * per_chunk, min(neurons, (chunk + 1) * per_chunk)):
            row, query = train[neuron], queries[neuron]
            p = 0
            q = 0
            for k in range(1, borders.size):
                border = borders[k]
                p_next = _first_at_least(row, p, border)
                q_next = _first_at_least(query, q, border)
                entry = np.int32(min(p_next - p, saturation))
                for place in range(q, q_next):
                    entries[place] = entry
                p = p_next
                q = q_next
                if q == n_query:
                    break
            rank = ranks[neuron]
            for s in range(n_query):
                filled[s] += entries[rank[s]]
            if (neuron + 1) % 1024 == 0:  # int32 holds 1,024 neurons of up to two million counts
                for s in range(n_query):
                    partial[chunk, s] += filled[s]
                    filled[s] = 0
        for s in range(n_query):
            partial[chunk, s] += filled[s]
    return partial


@_compiled(parallel=True, nogil=True)
def _count_sorted(train, borders):  # type: ignore[no-untyped-def]
    neurons = train.shape[0]
    counts = np.zeros((neurons, borders.size - 1), np.int32)
    for neuron in prange(neurons):
        row = train[neuron]
        p = 0
        for k in range(1, borders.size):
            p_next = _first_at_least(row, p, borders[k])
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
    chunks = min(train.shape[0], 4 * numba.get_num_threads())
    with _ENTERED:
        partial = _fill_ranked(train, queries, ranks, borders, saturation, chunks)
    return np.asarray(partial.sum(axis=0))


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
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(threads or most, most))
