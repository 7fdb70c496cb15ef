"""One term's coverage: where its bins are and how full they got. Made by `fit_term` and by nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nacpipe.errors import NoValuesError
from nacpipe.method.class_groups import ClassGroups
from nacpipe.method.components import Components, fit_components
from nacpipe.method.counting import SparseCounts, count_groups, count_sorted, fill_grouped_rows, fill_rows
from nacpipe.method.coverage import bin_edges, coverage_table, layer_score, product_borders
from nacpipe.method.params import LayerParams, term_of
from nacpipe.method.sorted_index import sort_columns
from nacpipe.method.term import Term


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedTerm:
    """All that turns a sample's values of a layer into the term's score."""

    name: str
    """As the parameters call it."""
    params: LayerParams
    borders: NDArray[np.float32]
    """(bins,): bin k is borders[k] ≤ x < borders[k + 1]."""
    table: NDArray[np.int32] | SparseCounts
    """Training samples per bin, (neurons, bins − 1); of `by_class` the same of every group."""
    groups: ClassGroups | None = None
    """Of `by_class` alone."""
    components: Components | None = None
    """Of `components` alone."""

    @property
    def term(self) -> Term:
        """Layer, source and view."""
        return term_of(self.name, self.params)

    @property
    def counts(self) -> NDArray[np.int32]:
        """Training samples per bin, (neurons, bins − 1); of all groups together."""
        return self.table.sum_groups(self.params.bins) if isinstance(self.table, SparseCounts) else self.table

    @property
    def coverage(self) -> NDArray[np.float64]:
        """The coverage table, (neurons, bins − 1); of `by_class` the mean of all groups' tables."""
        if not isinstance(self.table, SparseCounts):
            return coverage_table(self.table, self.params.saturation)
        entry_sum = self.table.sum_groups(self.params.bins, self.params.saturation)
        return entry_sum / float(self.table.groups * self.params.saturation)

    @property
    def counted(self) -> int:
        """Neurons, or components in their place, whose bins are counted."""
        return self.table.neurons if isinstance(self.table, SparseCounts) else len(self.table)

    @property
    def neurons(self) -> int:
        """Neurons of the layer: width of what `score` takes."""
        return self.counted if self.components is None else self.components.mean.size

    def sum_entries(
        self,
        values: NDArray[np.float32],  # (samples, neurons): the source, as the layer gives it
        logits: NDArray[np.floating] | None = None,  # (samples, classes), for `by_class`
    ) -> NDArray[np.int64]:
        """Return Σ over neurons of min(count, saturation) at each sample's bins, (samples,)."""
        if isinstance(self.table, SparseCounts):
            assert self.groups is not None and logits is not None
            groups = self.groups.assign(logits)
            return fill_grouped_rows(values, groups, self.borders, self.table, self.params.saturation)
        if self.components is not None:
            values = self.components.project(values)
        return fill_rows(values, self.borders, self.table, self.params.saturation)

    def score(
        self, values: NDArray[np.float32], logits: NDArray[np.floating] | None = None
    ) -> NDArray[np.float64]:  # as `sum_entries` → (samples,)
        """Return the mean over neurons of the table at each sample's bins."""
        return layer_score(self.sum_entries(values, logits), self.counted, self.params.saturation)

    def entries(
        self, values: NDArray[np.float32], logits: NDArray[np.floating] | None = None
    ) -> NDArray[np.float64]:  # as `sum_entries` → (samples, counted)
        """Return the coverage of every neuron's bin, or component's, in 0 … 1: its mean is the score."""
        if self.components is not None:
            values = self.components.project(values)
        bins = np.clip(np.searchsorted(self.borders, values, side="right") - 1, 0, self.params.bins - 2)
        if isinstance(self.table, SparseCounts):
            assert self.groups is not None and logits is not None
            rows = [self.table.group(int(group), self.params.bins) for group in self.groups.assign(logits)]
            counts = np.stack([table[np.arange(len(table)), b] for table, b in zip(rows, bins, strict=True)])
        else:
            counts = self.table[np.arange(self.counted), bins]
        covered: NDArray[np.float64] = np.minimum(counts, self.params.saturation) / float(self.params.saturation)
        return covered

    def add(self, other: FittedTerm) -> FittedTerm:
        """Return a plain term with the counts of both, of the same parameters: images may be counted in batches."""
        assert self.term.view == "plain" and (self.name, self.params) == (other.name, other.params)
        return replace(self, table=self.counts + other.counts)


def fit_term(
    name: str,
    params: LayerParams,
    train: NDArray[np.float32],  # (samples, neurons): the source
    *,
    groups: ClassGroups | None = None,
    train_groups: NDArray[np.int32] | None = None,  # (samples,)
) -> FittedTerm:
    """Count the training samples' values.

    Args:
        name: the term, as the parameters call it.
        params: its parameters.
        train: finite values.
        groups: of classes, for `by_class`.
        train_groups: the training samples' groups, for `by_class`.

    Raises:
        ValuesError: the term needs components, and the values are all the same.
    """
    borders, view = product_borders(bin_edges(params.bins, params.edges), params.alpha), term_of(name, params).view
    if view == "by_class":
        assert groups is not None and train_groups is not None
        table = count_groups(train, train_groups, groups.count, borders)
        return FittedTerm(name=name, params=params, borders=borders, table=table, groups=groups)
    components = find_components(name, train) if view == "components" else None
    values = train if components is None else components.project(train)
    counts = count_sorted(sort_columns(values), borders)
    return FittedTerm(name=name, params=params, borders=borders, table=counts, components=components)


def find_components(name: str, train: NDArray[np.float32]) -> Components:  # (samples, neurons)
    """Return the components of a term's training values.

    Raises:
        ValuesError: the values are all the same, naming the term.
    """
    if (components := fit_components(train)) is None:
        raise NoValuesError(
            f"term {name!r} has no components: all images of id/train have the same values; leave it out"
        )
    return components
