"""The compiled loops behind counting.py and sorted_index.py, and the instructions for them that numba lacks.

Compiled code is cached on disk by numba, beside its source or, where that cannot be written, in the user's cache
folder; its index is keyed by processor, so a copied cache is never stale. It is made anew when this file changes, and
only then: so all of it is here. It is compiled whatever NUMBA_DISABLE_JIT says: these loops cannot run as Python.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config as untyped_config
from numba import types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher
from numba.extending import intrinsic as untyped_intrinsic

_intrinsic: Any = untyped_intrinsic
_config: Any = untyped_config
_tuple_of: Any = types.UniTuple
CACHE_LINE = 16  # float32 values in a cache line, compared at once
STRETCH = 32  # entries that are written at once
GROUP = 4  # ranks that are read at once


class _Loop(CPUDispatcher):
    """A compiled function, under NUMBA_DISABLE_JIT too: the loops call LLVM's instructions, which Python cannot.

    `numba.njit` returns the Python function then, and so do numba's own functions that a loop is compiled with.
    """

    def compile(self, sig: Any) -> Any:
        """Compile for these types of arguments."""
        with global_compiler_lock:
            disabled, _config.DISABLE_JIT = _config.DISABLE_JIT, 0
            try:
                return super().compile(sig)
            finally:
                _config.DISABLE_JIT = disabled


def _compiled(**options: Any) -> Callable[[Any], Any]:
    """Compile, and keep the result on disk where any folder can be written to."""

    def decorate(function: Any) -> Any:
        loop = _Loop(py_func=function, targetoptions={"nopython": True, "boundscheck": None, **options})
        with contextlib.suppress(RuntimeError):  # numba found no folder: a read-only install and no home
            loop.enable_caching()
        return loop

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
        borders = _repeat(builder, border, CACHE_LINE)
        values = builder.load(_address(context, builder, signature.args[0], row, start, borders.type), align=4)
        bits = builder.bitcast(builder.fcmp_ordered("<", values, borders), ir.IntType(CACHE_LINE))
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


@_intrinsic
def _count_bits(_typing, word):  # type: ignore[no-untyped-def]
    """How many bits of a word are set."""

    def generate(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ctpop(arguments[0])

    return types.int64(types.int64), generate


@_intrinsic
def _load_four(_typing, row, start):  # type: ignore[no-untyped-def]
    """row[start : start + FOUR] as so many integers, from one load where numba makes four."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        row, start = arguments
        width = signature.args[0].dtype.bitwidth
        one, four, wide = ir.IntType(width), ir.IntType(GROUP * width), ir.IntType(64)
        word = builder.load(_address(context, builder, signature.args[0], row, start, four), align=width // 8)
        parts = [builder.trunc(builder.lshr(word, ir.Constant(four, width * j)), one) for j in range(GROUP)]
        return context.make_tuple(builder, signature.return_type, [builder.zext(part, wide) for part in parts])

    return _tuple_of(types.int64, GROUP)(row, types.int64), generate


@_intrinsic
def _prefetch(_typing, row, start):  # type: ignore[no-untyped-def]
    """Have memory send the cache line of row[start], and do not wait for it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        row, start = arguments
        address = _address(context, builder, signature.args[0], row, start, ir.IntType(8))
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        instruction = builder.module.declare_intrinsic("llvm.prefetch", (address.type,), kind)
        builder.call(instruction, [address, number(0), number(3), number(1)])  # to read, to keep, data
        return context.get_dummy_value()

    return types.void(row, types.int64), generate


@_compiled(inline="always")
def _find_place(row, starts, border):  # type: ignore[no-untyped-def]
    """How many of a neuron's values are below a border: down the tree, one line per level."""
    place = 0
    for start in starts:  # a tuple: compiled for so many levels, with no loop left
        place = place * CACHE_LINE + _count_below(row, start + place * CACHE_LINE, border)
    return place


@_compiled(nogil=True)
def find_places(tree, starts, borders):  # type: ignore[no-untyped-def]
    """How many of each neuron's values are below each border, (neurons, bins)."""
    places = np.empty((tree.shape[0], borders.size), np.int32)
    for neuron in range(tree.shape[0]):
        for k in range(borders.size):
            places[neuron, k] = _find_place(tree[neuron], starts, borders[k])
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


@_compiled(inline="always")
def _find_lines(tree, upper, values, first, borders, lines):  # type: ignore[no-untyped-def]
    """Which line of its values each border is in, for four neurons; and have memory send these lines."""
    for j in range(min(GROUP, tree.shape[0] - first)):
        row = tree[first + j]
        for k in range(borders.size):
            line = _find_place(row, upper, borders[k])
            lines[j, k] = line
            _prefetch(row, values + line * CACHE_LINE)


@_compiled(nogil=True)
def add_entries(tree, upper, values, train_bits, ranks, borders, saturation, entries, total):  # type: ignore[no-untyped-def]
    """total[s] += each neuron's min(count, saturation) at query s's bin."""
    p, q = np.empty(borders.size, np.int64), np.empty(borders.size, np.int64)
    lines = np.empty((GROUP, borders.size), np.int64)
    a, b, c, d = entries[0], entries[1], entries[2], entries[3]
    _find_lines(tree, upper, values, 0, borders, lines)
    for four in range(ranks.shape[0]):
        for j in range(GROUP):
            neuron = GROUP * four + j
            if neuron < tree.shape[0]:
                row = tree[neuron]
                for k in range(borders.size):
                    line = lines[j, k]
                    below = _count_below(row, values + line * CACHE_LINE, borders[k])
                    mark = np.int64(train_bits[neuron, line])
                    p[k] = (mark >> CACHE_LINE) + _count_bits(mark & ((1 << below) - 1))
                    q[k] = line * CACHE_LINE + below - p[k]
                _fill_entries(entries[j], p, q, saturation)
            else:
                entries[j] = 0
        _find_lines(tree, upper, values, GROUP * (four + 1), borders, lines)  # they come while entries are added up
        row_of_ranks = ranks[four].ravel()
        for s in range(total.size):
            in_a, in_b, in_c, in_d = _load_four(row_of_ranks, GROUP * s)
            total[s] += np.int64(a[in_a]) + np.int64(b[in_b]) + np.int64(c[in_c]) + np.int64(d[in_d])


@_compiled(inline="always")
def _find_bin(borders, x):  # type: ignore[no-untyped-def]
    """The bin of a value by halving: borders[k] ≤ x < borders[k + 1], borders[0] = −∞."""
    low = 0
    size = borders.size - 1
    while size > 1:
        half = size >> 1
        low += half * (borders[low + half] <= x)  # no branch: which way it goes cannot be foreseen
        size -= half
    return low


@_compiled(nogil=True)
def walk_rows(products, borders, counts, saturation, entry_sum):  # type: ignore[no-untyped-def]
    """entry_sum[s] = the same for samples as they come: each product's bin by halving."""
    rows, neurons = products.shape
    for s in range(rows):
        total = np.int64(0)
        for neuron in range(neurons):
            total += min(counts[neuron, _find_bin(borders, products[s, neuron])], saturation)
        entry_sum[s] = total


@_compiled(nogil=True)
def walk_grouped_rows(products, borders, starts, bins, counts, groups, saturation, entry_sum):  # type: ignore[no-untyped-def]
    """The same from each sample's group's counts, of which only those above 0 are stored (SparseCounts)."""
    rows, neurons = products.shape
    for s in range(rows):
        total = np.int64(0)
        first = groups[s] * neurons
        for neuron in range(neurons):
            k = _find_bin(borders, products[s, neuron])
            low, end = starts[first + neuron], starts[first + neuron + 1]
            size = end - low
            while size > 0:  # the first stored bin that is at least k
                half = size >> 1
                if bins[low + half] < k:
                    low += half + 1
                    size -= half + 1
                else:
                    size = half
            if low < end and bins[low] == k:
                total += min(counts[low], saturation)
        entry_sum[s] = total


@_compiled(nogil=True)
def count_runs(ascending, borders, starts, bins, counts):  # type: ignore[no-untyped-def]
    """Each neuron's counts above 0, one behind the other; starts[i + 1] = where neuron i's end."""
    stored = 0
    for neuron in range(ascending.shape[0]):
        last = -1
        for x in ascending[neuron]:
            k = _find_bin(borders, x)
            if k != last:
                bins[stored], counts[stored] = k, 0
                stored, last = stored + 1, k
            counts[stored - 1] += 1
        starts[neuron + 1] = stored


@_compiled(nogil=True)
def merge(train, queries, ascending, train_bits):  # type: ignore[no-untyped-def]
    """Two ascending rows per neuron become one, and the marks say which came from where."""
    for neuron in range(train.shape[0]):
        counted = scored = 0
        for place in range(ascending.shape[1]):
            line, bit = place // CACHE_LINE, place % CACHE_LINE
            if bit == 0:
                train_bits[neuron, line] = counted << CACHE_LINE
            more = counted < train.shape[1]
            if more and (scored == queries.shape[1] or train[neuron, counted] <= queries[neuron, scored]):
                ascending[neuron, place] = train[neuron, counted]
                train_bits[neuron, line] |= 1 << bit
                counted += 1
            else:
                ascending[neuron, place] = queries[neuron, scored]
                scored += 1
        if ascending.shape[1] % CACHE_LINE == 0:  # the last line holds nothing, and all are before it
            train_bits[neuron, ascending.shape[1] // CACHE_LINE] = counted << CACHE_LINE
