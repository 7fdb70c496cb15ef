"""Sixteen values at once: how loops are compiled, and the instructions that numba lacks.

Compiled code is cached on disk by numba, beside its source or, where that cannot be written, in the user's cache
folder; its index is keyed by processor, so a copied cache is never stale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic as untyped_intrinsic

_intrinsic: Any = untyped_intrinsic
_tuple_of: Any = types.UniTuple
LINE = 16  # float32 values in a cache line, compared at once
STRETCH = 32  # entries that are written at once
FOUR = 4  # ranks that are read at once


def compiled(**options: Any) -> Callable[[Any], Any]:
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
def count_below(_typing, row, start, border):  # type: ignore[no-untyped-def]
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
def fill_stretch(_typing, entries, start, entry):  # type: ignore[no-untyped-def]
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
def count_bits(_typing, word):  # type: ignore[no-untyped-def]
    """How many bits of a word are set."""

    def generate(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ctpop(arguments[0])

    return types.int64(types.int64), generate


@_intrinsic
def load_four(_typing, row, start):  # type: ignore[no-untyped-def]
    """row[start : start + FOUR] as so many integers, from one load where numba makes four."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        row, start = arguments
        width = signature.args[0].dtype.bitwidth
        one, four, wide = ir.IntType(width), ir.IntType(FOUR * width), ir.IntType(64)
        word = builder.load(_address(context, builder, signature.args[0], row, start, four), align=width // 8)
        parts = [builder.trunc(builder.lshr(word, ir.Constant(four, width * j)), one) for j in range(FOUR)]
        return context.make_tuple(builder, signature.return_type, [builder.zext(part, wide) for part in parts])

    return _tuple_of(types.int64, FOUR)(row, types.int64), generate


@_intrinsic
def prefetch(_typing, row, start):  # type: ignore[no-untyped-def]
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
