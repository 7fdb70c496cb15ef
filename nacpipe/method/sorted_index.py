"""A layer's products, sorted neuron by neuron: done once, so that a trial only needs where its borders fall.

train and queries, ascending    0 0 1 2 │ 2 2 3 3 │ 5 5 5 8        one order of all (with lines of four)
marks, one per line             0 ●●·●  │ 3 ··●·  │ 4 ●●··         training samples before the line, which of it are
ranks                           where each query stands among the queries
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from nacpipe.method.loops import CACHE_LINE, GROUP, merge

PART = 1 << 18  # values in a part of an index that is looked at
AT_ONCE = 16  # neurons that are sorted in one go: a cache line of each sample's products


@dataclass(frozen=True, slots=True, kw_only=True)
class SortedColumns:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerIndex:
    """Training samples, which are counted, and queries, which are scored, in one order."""

    columns: SortedColumns
    """Of both together: one look at it says how many of either are below a border."""
    train_bits: NDArray[np.uint32] | NDArray[np.uint64]
    """(neurons, lines): the training samples before the line · 2¹⁶ + one bit for each of the line's that is one."""
    ranks: NDArray[np.uint16] | NDArray[np.uint32]
    """(fours, queries, 4): each query's place among its neuron's queries, four neurons side by side."""

    @property
    def neurons(self) -> int:
        """Neurons of the layer."""
        return len(self.columns.tree)

    @property
    def queries(self) -> int:
        """Samples that are scored."""
        return int(self.ranks.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return self.columns.tree.nbytes + self.train_bits.nbytes + self.ranks.nbytes

    @property
    def train_samples(self) -> int:
        """Samples that are counted."""
        last = int(self.train_bits[0, -1])
        return (last >> CACHE_LINE) + (last & (1 << CACHE_LINE) - 1).bit_count()

    @property
    def train(self) -> NDArray[np.float32]:
        """The training samples' products, ascending, (neurons, samples)."""
        return np.concatenate(list(self.train_parts()))

    def train_parts(self) -> Iterator[NDArray[np.float32]]:
        """Yield the same, (some neurons, samples) at a time: a few MiB."""
        ascending = self.columns.ascending
        step = max(PART // max(ascending.shape[1], 1), 1)
        for start in range(0, self.neurons, step):
            train_bits = self.train_bits[start : start + step].astype("<u2").view(np.uint8)
            bits = np.unpackbits(train_bits, axis=1, bitorder="little")[:, : ascending.shape[1]].view(bool)
            yield ascending[start : start + step][bits].reshape(len(bits), self.train_samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedIndex:
    """An index of each group of samples: a query is scored among the training samples of its own group."""

    parts: tuple[LayerIndex, ...]
    """Of the groups that hold a training sample; a query of any other group has seen nothing like it."""
    places: tuple[NDArray[np.intp], ...]
    """For each part, where its queries are among all queries, ascending."""
    queries: int
    """Samples that are scored, those of groups without a training sample too."""
    neurons: int

    @property
    def nbytes(self) -> int:
        """Bytes of its parts' arrays."""
        return sum(part.nbytes for part in self.parts)

    @property
    def train_samples(self) -> int:
        """Samples that are counted."""
        return sum(part.train_samples for part in self.parts)

    def train_parts(self) -> Iterator[NDArray[np.float32]]:
        """Yield the training samples' values, (some neurons, samples of a group) at a time."""
        for part in self.parts:
            yield from part.train_parts()


def index_groups(
    train: NDArray[np.float32],  # (samples, neurons)
    train_groups: NDArray[np.int32],  # (samples,)
    queries: NDArray[np.float32],  # (samples, neurons)
    query_groups: NDArray[np.int32],  # (samples,)
) -> GroupedIndex:
    """Return the index of a layer whose samples are in groups; finite input."""
    held = np.unique(train_groups)
    places = tuple(np.flatnonzero(query_groups == group) for group in held)
    parts = tuple(
        index_columns(train[train_groups == group], queries[rows]) for group, rows in zip(held, places, strict=True)
    )
    return GroupedIndex(parts=parts, places=places, queries=len(queries), neurons=train.shape[1])


def sort_columns(products: NDArray[np.float32]) -> SortedColumns:  # (samples, neurons)
    """Return each neuron's products in ascending order."""
    columns = _allocate(*products.shape)
    columns.ascending[:] = products.T
    columns.ascending.sort(axis=1)
    return _build_levels(columns)


def index_columns(
    train: NDArray[np.float32],  # (samples, neurons)
    queries: NDArray[np.float32],  # (samples, neurons)
) -> LayerIndex:
    """Return the index of a layer; finite input."""
    (n_train, neurons), n_query = train.shape, len(queries)
    columns = _allocate(n_train + n_query, neurons)
    lines = (n_train + n_query) // CACHE_LINE + 1
    train_bits = np.zeros((neurons, lines), np.uint32 if n_train < 1 << 16 else np.uint64)
    ranks = np.zeros((-(-neurons // GROUP), n_query, GROUP), np.uint16 if n_query <= 1 << 16 else np.uint32)
    everyone = np.arange(n_query, dtype=ranks.dtype)
    for start in range(0, neurons, AT_ONCE):
        some = slice(start, start + AT_ONCE)
        counted, scored = np.ascontiguousarray(train[:, some].T), np.ascontiguousarray(queries[:, some].T)
        counted.sort(axis=1)
        order = scored.argsort(axis=1)
        merge(counted, np.take_along_axis(scored, order, axis=1), columns.ascending[some], train_bits[some])
        for neuron, places in enumerate(order, start):
            ranks[neuron // GROUP, places, neuron % GROUP] = everyone
    return LayerIndex(columns=_build_levels(columns), train_bits=train_bits, ranks=ranks)


def _allocate(samples: int, neurons: int) -> SortedColumns:
    """A tree without values yet, +∞ everywhere."""
    widths = [(samples // CACHE_LINE + 1) * CACHE_LINE]
    while widths[0] > CACHE_LINE or len(widths) == 1:  # there is a level above the values
        widths.insert(0, -(-widths[0] // CACHE_LINE**2) * CACHE_LINE)
    starts = tuple(accumulate(widths, initial=0))
    return SortedColumns(tree=np.full((neurons, starts[-1]), np.inf, np.float32), starts=starts[:-1], samples=samples)


def _build_levels(columns: SortedColumns) -> SortedColumns:
    """The same with its upper levels, the last of every line below."""
    tree, ends = columns.tree, (*columns.starts[1:], columns.tree.shape[1])
    for start, below, end in reversed(list(zip(columns.starts, ends, ends[1:], strict=False))):
        last = tree[:, below + CACHE_LINE - 1 : end : CACHE_LINE]
        tree[:, start : start + last.shape[1]] = last
    return columns
