"""The compiled loops behind coverage.py. Everything here works on float32 products and integer counts.

A layer is indexed once (`sort_columns`, `rank_columns`), neuron by neuron:

    train    each neuron's training products, ascending
    queries  each neuron's evaluated products, ascending
    ranks    (neurons, n_query): where sample s stands in its neuron's ascending order

A trial (`fill_ranked`) finds its borders in both ascending orders, p training and q evaluated products below border k:

    train    ··· ·│·· ·········│·· ·│···        counts per bin:    p[k+1] − p[k]
    queries    · ·│· ·· ·· ····│·   │· ·        entry per place:   min(count, saturation) over q[k] … q[k+1]
                  └ border k               then   filled[s] += entry[ranks[s]]

Compiled code is cached on disk by numba, beside this file or, where that cannot be written, in the user's cache folder;
its index is keyed by processor, so a copied cache is never stale.

A trial's neurons are shared out over plain threads. `fill_rows` uses numba's own work queue: OpenMP's threads spin
while they wait, and where two searches share a machine's cores each takes five times as long. The work queue must not
be entered twice at once, hence the lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic as untyped_intrinsic
from numpy.typing import NDArray

if "NUMBA_THREADING_LAYER" not in os.environ:
    numba.config.THREADING_LAYER = "workqueue"  # type: ignore[attr-defined]
_ENTERED = threading.Lock()
_intrinsic: Any = untyped_intrinsic
LINE = 16  # float32 values in a cache line, compared at once
STRETCH = 32  # entries that are written at once
TOGETHER = 4  # neurons whose entries are added up in one pass over the samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Each neuron's values in ascending order, in lines, as a tree: an upper level holds the last of every line below.

        tree      │ 7 +∞ +∞ +∞ │ 2 3 5 7 │ 9 +∞ +∞ +∞ │ 0 0 1 2 │ 2 2 3 3 │ … │ 8 9 9 +∞ │     (with lines of four)
                  └ starts[0]  └ starts[1]            └ starts[2]: the values

    How many values are below a border: the count of those below it in the top line says which line to look at one level
    down, and so on. A last line always ends in +∞, which is below no border, so there is always a line to go to.
    """

    tree: NDArray[np.float32]
    """(neurons, width): the levels, one behind the other, each of whole lines."""
    starts: tuple[int, ...]
    """Where each level begins, the top one first."""
    samples: int

    @property
    def ascending(self) -> NDArray[np.float32]:
        """(neurons, samples)."""
        return self.tree[:, self.starts[-1] : self.starts[-1] + self.samples]


def _compiled(**options: Any) -> Callable[[Any], Any]:
    """Compile, and keep the result on disk where any folder can be written to."""

    def decorate(function: Any) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # numba found no folder: a read-only install and no home
            return njit(**options)(function)

    return decorate


def _repeat(builder: Any, value: Any, times: int) -> Any:
    """`times` copies of a value as one LLVM vector."""
    nothing = ir.Constant(ir.VectorType(value.type, times), ir.Undefined)
    one = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(ir.IntType(32), times), [0] * times))


def _address(context: Any, builder: Any, array_type: Any, array: Any, start: Any, line: Any) -> Any:
    """array[start:] as the address of a vector of type `line`."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [start]), line.as_pointer())


@_intrinsic
def _count_below(_typing, row, start, border):  # type: ignore[no-untyped-def]
    """How many of row[start : start + LINE] are below `border`: one comparison of all, and a count of its bits.

    A loop says the same, but numba makes sixteen comparisons of it and is ten times as slow.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        row, start, border = arguments
        borders = _repeat(builder, border, LINE)
        values = builder.load(_address(context, builder, signature.args[0], row, start, borders.type), align=4)
        bits = builder.bitcast(builder.fcmp_ordered("<", values, borders), ir.IntType(LINE))
        return builder.zext(builder.ctpop(bits), ir.IntType(64))

    return types.int64(row, types.int64, types.float32), generate


@_intrinsic
def _fill_stretch(_typing, entries, start, entry):  # type: ignore[no-untyped-def]
    """entries[start : start + STRETCH] = entry, at once."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        entries, start, entry = arguments
        width = ir.IntType(signature.args[0].dtype.bitwidth)
        stretch = _repeat(builder, builder.trunc(entry, width), STRETCH)
        address = _address(context, builder, signature.args[0], entries, start, stretch.type)
        builder.store(stretch, address, align=width.width // 8)
        return context.get_dummy_value()

    return types.void(entries, types.int64, types.int64), generate


@_compiled(nogil=True)
def _find_places(tree, starts, borders):  # type: ignore[no-untyped-def]
    """How many of each neuron's values are below each border, (neurons, bins): down the tree, one line per level."""
    places = np.empty((tree.shape[0], borders.size), np.int32)
    for neuron in range(tree.shape[0]):
        row = tree[neuron]
        for k in range(borders.size):
            place = 0
            for start in starts:  # a tuple: compiled for so many levels, with no loop left
                place = place * LINE + _count_below(row, start + place * LINE, borders[k])
            places[neuron, k] = place
    return places


@_compiled(inline="always")
def _fill_entries(entries, p, q, saturation):  # type: ignore[no-untyped-def]
    """One neuron's entries, min(count, saturation), at every place of its queries' order."""
    for k in range(p.size - 1):
        entry = min(p[k + 1] - p[k], saturation)
        place = q[k]
        _fill_stretch(entries, place, entry)  # in any case: what is too much, the next bins write over
        while place + STRETCH < q[k + 1]:
            place += STRETCH
            _fill_stretch(entries, place, entry)


@_compiled(nogil=True)
def _fill_ranked(p, q, ranks, saturation, entries):  # type: ignore[no-untyped-def]
    neurons, n_query = ranks.shape
    total = np.zeros(n_query, np.int64)
    a, b, c, d = entries[0], entries[1], entries[2], entries[3]
    for first in range(0, neurons, TOGETHER):
        for j in range(TOGETHER):
            if first + j < neurons:
                _fill_entries(entries[j], p[first + j], q[first + j], saturation)
            else:
                entries[j] = 0
        last = neurons - 1
        of_a, of_b = ranks[first], ranks[min(first + 1, last)]
        of_c, of_d = ranks[min(first + 2, last)], ranks[min(first + 3, last)]
        for s in range(n_query):
            total[s] += np.int64(a[of_a[s]]) + np.int64(b[of_b[s]]) + np.int64(c[of_c[s]]) + np.int64(d[of_d[s]])
    return total


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
    train: Columns,
    queries: Columns,
    ranks: NDArray[np.uint16] | NDArray[np.uint32],  # (neurons, n_query)
    borders: NDArray[np.float32],  # (bins,)
    saturation: int,
) -> NDArray[np.int64]:
    """Return Σ over neurons of min(count, saturation) at each indexed sample's bins, (n_query,) int64; finite input."""
    neurons, n_query = ranks.shape
    threads = min(numba.get_num_threads(), neurons)
    cuts = [neurons * part // threads for part in range(threads + 1)]
    narrow = np.uint16 if min(train.samples, saturation) < 1 << 16 else np.uint32

    def fill(part: slice) -> NDArray[np.int64]:
        entries = np.empty((TOGETHER, n_query + STRETCH), narrow)  # written in stretches, hence the room behind
        p = _find_places(train.tree[part], train.starts, borders)
        q = _find_places(queries.tree[part], queries.starts, borders)
        return np.asarray(_fill_ranked(p, q, ranks[part], saturation, entries))

    parts = [slice(low, high) for low, high in pairwise(cuts)]
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


def sort_columns(products: NDArray[np.float32]) -> Columns:  # (samples, neurons)
    """Return each neuron's products in ascending order."""
    samples, neurons = products.shape
    widths = [(samples // LINE + 1) * LINE]
    while widths[0] > LINE:
        widths.insert(0, -(-widths[0] // LINE**2) * LINE)
    starts = tuple(accumulate(widths, initial=0))
    tree = np.full((neurons, starts[-1]), np.inf, np.float32)
    columns = Columns(tree=tree, starts=starts[:-1], samples=samples)
    columns.ascending[:] = products.T
    columns.ascending.sort(axis=1)
    for level in reversed(range(len(widths) - 1)):
        last = tree[:, starts[level + 1] + LINE - 1 : starts[level + 2] : LINE]
        tree[:, starts[level] : starts[level] + last.shape[1]] = last
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
