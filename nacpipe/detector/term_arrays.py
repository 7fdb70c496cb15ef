"""A fitted term as arrays of a detector's file, and back; what comes from a file is checked number by number.

Counts are stored row by row, one row per group (where there are groups) and neuron, in the smaller of two forms:

    all       counts (rows, bins − 1)
    sparse    starts (rows + 1,), bins and counts (stored,): the counts above 0 alone
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nacpipe.errors import DetectorError
from nacpipe.method.class_groups import ClassGroups
from nacpipe.method.components import Components
from nacpipe.method.counting import SparseCounts
from nacpipe.method.fitted_term import FittedTerm
from nacpipe.method.params import LayerParams, term_of

ARRAYS = ("borders", "counts", "starts", "bins", "mean", "matrix")
WHOLE = (np.uint8, np.uint16, np.int32)

Arrays = Mapping[str, NDArray[Any]]


def store_term(fitted: FittedTerm) -> dict[str, NDArray[Any]]:
    """Return a term's arrays by name, each as narrow as it can be."""
    arrays: dict[str, NDArray[Any]] = {"borders": fitted.borders}
    if fitted.components is not None:
        arrays |= {"mean": fitted.components.mean, "matrix": fitted.components.matrix}
    table, bins = fitted.table, fitted.params.bins
    sparse = table if isinstance(table, SparseCounts) else SparseCounts.of(table)
    stored = {"counts": _narrow(sparse.counts), "starts": _narrow(sparse.starts), "bins": _narrow(sparse.bins)}
    size = (sparse.starts.size - 1) * (bins - 1) * stored["counts"].itemsize
    if sum(array.nbytes for array in stored.values()) < size:
        return arrays | stored
    return arrays | {"counts": _narrow(sparse.dense(bins))}


def restore_term(
    name: str, params: LayerParams, arrays: Arrays, train_rows: int, groups: ClassGroups | None
) -> FittedTerm:
    """Return the term that `store_term` stored.

    Raises:
        DetectorError: anything is not as it must be, without the term's name.
    """
    view = term_of(name, params).view
    if view == "by_class" and groups is None:
        raise DetectorError("it is counted by class, and there are no class_groups")
    borders, counts = (_array(arrays, what) for what in ("borders", "counts"))
    if borders.dtype != np.float32 or borders.shape != (params.bins,):
        raise DetectorError(f"borders are {borders.dtype} {borders.shape}; wanted: float32 ({params.bins},)")
    if not (borders[0] == -np.inf and borders[-1] == np.inf and bool((borders[:-1] <= borders[1:]).all())):
        raise DetectorError("borders do not ascend from −∞ to +∞")
    table = _sparse(arrays, params.bins) if "starts" in arrays else _dense(counts, params.bins)
    rows = len(table) if isinstance(table, np.ndarray) else table.starts.size - 1
    totals = table.sum(axis=1, dtype=np.int64) if isinstance(table, np.ndarray) else table.row_sums()
    if groups is not None:
        if rows % groups.count:
            raise DetectorError(f"counts have {rows} rows, not as many for each of {groups.count} groups")
        totals = totals.reshape(groups.count, -1)
        if bool((totals != totals[:, :1]).any()):
            raise DetectorError("the counts of a group's neurons add up to different numbers of samples")
        totals = totals.sum(axis=0)
    if bool((totals != train_rows).any()):
        wrong = int(np.argmax(totals != train_rows))
        raise DetectorError(
            f"the counts of neuron {wrong} add up to {totals[wrong]}; {train_rows} samples were counted"
        )
    if groups is not None:
        table = SparseCounts.of(table) if isinstance(table, np.ndarray) else table
        table = SparseCounts(starts=table.starts, bins=table.bins, counts=table.counts, neurons=rows // groups.count)
    elif not isinstance(table, np.ndarray):
        table = table.dense(params.bins)
    components = _components(arrays, rows) if view == "components" else None
    if components is None and ("mean" in arrays or "matrix" in arrays):
        raise DetectorError("it has a mean or a matrix, which only components have")
    return FittedTerm(name=name, params=params, borders=borders, table=table, groups=groups, components=components)


def _dense(counts: NDArray[Any], bins: int) -> NDArray[np.int32]:
    if counts.dtype not in WHOLE or counts.ndim != 2 or counts.shape[0] == 0 or counts.shape[1] != bins - 1:
        raise DetectorError(
            f"counts are {counts.dtype} {counts.shape}; wanted: uint8, uint16 or int32 (neurons, {bins - 1})"
        )
    if int(counts.min()) < 0:
        raise DetectorError(f"a count of neuron {int(np.argmax(counts.min(axis=1) < 0))} is below 0")
    return counts.astype(np.int32)


def _sparse(arrays: Arrays, bins: int) -> SparseCounts:
    starts, places, counts = (_array(arrays, what) for what in ("starts", "bins", "counts"))
    for what, array in (("starts", starts), ("bins", places), ("counts", counts)):
        if array.dtype not in WHOLE or array.ndim != 1:
            raise DetectorError(f"{what} are {array.dtype} {array.shape}; wanted: uint8, uint16 or int32 in one row")
    starts, places, counts = starts.astype(np.int64), places.astype(np.int32), counts.astype(np.int32)
    if starts.size < 2 or starts[0] != 0 or starts[-1] != places.size or bool((np.diff(starts) < 0).any()):
        raise DetectorError(f"starts do not ascend from 0 to the {places.size} counts that are stored")
    if counts.size != places.size or (counts.size and int(counts.min()) < 1):
        raise DetectorError(f"counts are not {places.size} numbers above 0")
    inside = np.ones(places.size, bool)
    inside[starts[:-1][starts[:-1] < places.size]] = False  # the first of a row follows none
    descends = np.flatnonzero(inside[1:] & (np.diff(places) <= 0))
    if (places.size and not 0 <= int(places.min()) <= int(places.max()) < bins - 1) or descends.size:
        raise DetectorError(f"bins do not ascend from 0 to at most {bins - 2} in every row")
    return SparseCounts(starts=starts, bins=places, counts=counts, neurons=starts.size - 1)


def _components(arrays: Arrays, count: int) -> Components:
    mean, matrix = (_array(arrays, what) for what in ("mean", "matrix"))
    for what, array, shape in (("mean", mean, (len(matrix),)), ("matrix", matrix, (len(matrix), count))):
        if array.dtype != np.float32 or array.shape != shape or not len(matrix):
            raise DetectorError(f"{what} is {array.dtype} {array.shape}; wanted: float32 {shape}")
        if not bool(np.isfinite(array).all()):
            raise DetectorError(f"{what} is not finite")
    return Components(mean=mean, matrix=matrix)


def _array(arrays: Arrays, what: str) -> NDArray[Any]:
    if (array := arrays.get(what)) is None:
        raise DetectorError(f"its {what} {'are' if what.endswith('s') else 'is'} not there")
    return array


def _narrow(values: NDArray[Any]) -> NDArray[Any]:
    """Whole numbers from 0 on in the narrowest type that holds them.

    Raises:
        DetectorError: int32 does not.
    """
    largest = int(values.max(initial=0))
    if largest >= 1 << 31:
        raise DetectorError(f"a term has {largest} counts above 0, more than a file can hold; use fewer bins")
    return values.astype(np.uint8 if largest < 1 << 8 else np.uint16 if largest < 1 << 16 else np.int32)
