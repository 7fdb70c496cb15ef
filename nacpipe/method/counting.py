"""What coverage.py's tables and scores are made of: counts, and sums of table entries, all integers.

A trial (`fill_ranked`) finds its borders in a term's index (sorted_index.py), p training and q evaluated values below
border k:

    train    ··· ·│·· ·········│·· ·│···        counts per bin:    p[k+1] − p[k]
    queries    · ·│· ·· ·· ····│·   │· ·        entry per place:   min(count, saturation) over q[k] … q[k+1]
                  └ border k               then   entry_sum[s] += entry[ranks[s]]

Work is shared out over plain threads (threads.py): a trial's neurons, and the rows of `fill_rows`. The loops themselves
are in loops.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nacpipe.method.loops import GROUP, STRETCH, add_entries, count_runs, find_places, walk_grouped_rows, walk_rows
from nacpipe.method.sorted_index import GroupedIndex, LayerIndex, SortedColumns
from nacpipe.method.threads import get_threads, run_in_parts

VALUES_PER_THREAD = 1 << 12  # fewer are looked up sooner than another thread wakes

Asked = tuple[LayerIndex | GroupedIndex, NDArray[np.float32], int]
"""A term's index, its borders (bins,) and its saturation."""
_Ungrouped = tuple[LayerIndex, NDArray[np.float32], int]


def fill_ranked(asked: Sequence[Asked]) -> list[NDArray[np.int64]]:
    """Return, term by term, Σ over neurons of min(count, saturation) at each query's bins, (n_query,) int64."""
    flat: list[_Ungrouped] = []
    for index, borders, saturation in asked:
        parts = index.parts if isinstance(index, GroupedIndex) else (index,)
        flat += [(part, borders, saturation) for part in parts]
    shares = run_in_parts(lambda part, parts: _fill_part(flat, part, parts), get_threads())
    sums = iter([sum(rest, first.astype(np.int64)) for first, *rest in zip(*shares, strict=True)])
    return [_scatter(index, sums) if isinstance(index, GroupedIndex) else next(sums) for index, _, _ in asked]


def _scatter(index: GroupedIndex, sums: Iterator[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The sums of a grouped index's parts in the order of its queries, 0 where a query is in no part."""
    entry_sum = np.zeros(index.queries, np.int64)
    for places in index.places:
        entry_sum[places] = next(sums)
    return entry_sum


def _fill_part(asked: Sequence[_Ungrouped], part: int, parts: int) -> list[NDArray[Any]]:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseCounts:
    """Training samples per bin of grouped samples, group · neurons + neuron by group · neurons + neuron; no zeros.

    A group has few samples and a term may have 2,000 bins, so nearly all counts are 0.

        counts  0 3 0 0 1 0 │ 0 0 0 0 0 0 │ 4 …        starts  0 2 2 …      bins  1 4 0 …      counts  3 1 4 …
    """

    starts: NDArray[np.int64]
    """(groups · neurons + 1,): where each row of counts begins among the stored ones."""
    bins: NDArray[np.int32]
    """(stored,), ascending in each row."""
    counts: NDArray[np.int32]
    """(stored,), above 0."""
    neurons: int

    @property
    def groups(self) -> int:
        """Groups, those without a training sample too."""
        return (self.starts.size - 1) // self.neurons

    @classmethod
    def of(cls, dense: NDArray[np.int32]) -> SparseCounts:  # (rows, bins − 1)
        """Return the same counts as those of one group."""
        row, k = np.nonzero(dense)
        starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(dense)))]).astype(np.int64)
        return cls(starts=starts, bins=k.astype(np.int32), counts=dense[row, k], neurons=len(dense))

    def dense(self, bins: int) -> NDArray[np.int32]:
        """Return all counts, zeros too, (groups · neurons, bins − 1)."""
        rows = self.starts.size - 1
        counts = np.zeros((rows, bins - 1), np.int32)
        counts[np.repeat(np.arange(rows), np.diff(self.starts)), self.bins] = self.counts
        return counts

    def group(self, number: int, bins: int) -> NDArray[np.int32]:
        """Return the counts of one group, (neurons, bins − 1)."""
        starts = self.starts[number * self.neurons : (number + 1) * self.neurons + 1]
        counts = np.zeros((self.neurons, bins - 1), np.int32)
        stored = slice(int(starts[0]), int(starts[-1]))
        counts[np.repeat(np.arange(self.neurons), np.diff(starts)), self.bins[stored]] = self.counts[stored]
        return counts

    def row_sums(self) -> NDArray[np.int64]:
        """Return the samples of each row, (groups · neurons,)."""
        total = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        return np.diff(total[self.starts])

    def sum_groups(self, bins: int, most: int = 2**31 - 1) -> NDArray[np.int32]:
        """Return Σ over groups of min(count, most), (neurons, bins − 1)."""
        neuron = np.repeat(np.arange(self.starts.size - 1) % self.neurons, np.diff(self.starts))
        places = neuron * (bins - 1) + self.bins
        total = np.bincount(
            places, np.minimum(self.counts, most), self.neurons * (bins - 1)
        )  # float64, exact for whole numbers
        return total.astype(np.int32).reshape(self.neurons, bins - 1)


def count_groups(
    train: NDArray[np.float32],  # (samples, neurons)
    train_groups: NDArray[np.int32],  # (samples,)
    groups: int,
    borders: NDArray[np.float32],  # (bins,)
) -> SparseCounts:
    """Return how many training samples of each group fall in each bin."""
    parts = [_count_group(train[train_groups == group], borders) for group in range(groups)]
    offsets = np.cumsum([0, *(part.counts.size for part in parts)])
    return SparseCounts(
        starts=np.concatenate([[0], *(part.starts[1:] + start for part, start in zip(parts, offsets, strict=False))]),
        bins=np.concatenate([part.bins for part in parts]),
        counts=np.concatenate([part.counts for part in parts]),
        neurons=train.shape[1],
    )


def _count_group(train: NDArray[np.float32], borders: NDArray[np.float32]) -> SparseCounts:
    """The same of one group's samples (samples, neurons)."""
    neurons = train.shape[1]
    starts = np.zeros(neurons + 1, np.int64)
    bins, counts = np.empty(train.size, np.int32), np.empty(train.size, np.int32)
    count_runs(np.sort(np.ascontiguousarray(train.T), axis=1), borders, starts, bins, counts)
    stored = slice(starts[-1])
    return SparseCounts(starts=starts, bins=bins[stored].copy(), counts=counts[stored].copy(), neurons=neurons)


def fill_grouped_rows(
    products: NDArray[np.float32],  # (samples, neurons), as they come
    groups: NDArray[np.int32],  # (samples,)
    borders: NDArray[np.float32],  # (bins,)
    counts: SparseCounts,
    saturation: int,
) -> NDArray[np.int64]:
    """Return what `fill_ranked` returns of a grouped index, for samples that were not indexed, (samples,) int64."""
    entry_sum = np.empty(len(products), np.int64)

    def fill(part: int, parts: int) -> None:
        rows = slice(len(products) * part // parts, len(products) * (part + 1) // parts)
        stored = counts.starts, counts.bins, counts.counts
        walk_grouped_rows(products[rows], borders, *stored, groups[rows], saturation, entry_sum[rows])

    run_in_parts(fill, min(get_threads(), 1 + products.size // VALUES_PER_THREAD))
    return entry_sum
