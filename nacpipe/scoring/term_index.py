"""A term's values of a cache, sorted: what a search scores under ever new parameters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nacpipe.cache import Cache
from nacpipe.method.class_groups import ClassGroups
from nacpipe.method.fitted_term import find_components
from nacpipe.method.sorted_index import GroupedIndex, LayerIndex, index_columns, index_groups
from nacpipe.method.term import Source, Term
from nacpipe.scoring.states import read_layer
from nacpipe.scoring.views import assign_groups, read_groups

TermIndex = LayerIndex | GroupedIndex


class IndexBuilder:
    """Reads and sorts terms' values: id/train is counted, other splits are scored."""

    def __init__(self, cache: Cache, splits: Sequence[str]) -> None:
        self.cache, self.splits = cache, tuple(splits)
        self._read: tuple[str, Source] | None = None
        self._values: tuple[NDArray[np.float32], NDArray[np.float32]]

    def index(self, term: Term) -> TermIndex:
        """Return a term's index.

        The source of a layer is kept until another is asked for, so ask for its views one after the other.

        Raises:
            ParamsError: the term needs classes that the network does not give.
            ValuesError: a state is not finite, or the term has no components.
        """
        train, queries = self._read_values(term.layer, term.source)
        if term.view == "by_class":
            return index_groups(train, self._train_groups, queries, self._query_groups)
        if term.view == "components":
            components = find_components(term.name, train)
            train, queries = components.project(train), components.project(queries)
        return index_columns(train, queries)

    def forget(self) -> None:
        """Drop the values that were read last."""
        self._read, self._values = None, (np.empty((0, 0), np.float32),) * 2

    def _read_values(self, layer: str, source: Source) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Those of id/train and of the other splits, (rows, neurons) each."""
        if self._read != (layer, source):
            self.forget()
            train = read_layer([self.cache["id/train"]], layer, source)
            scored = [self.cache[name] for name in self.splits]
            self._values = train, read_layer(scored, layer, source) if scored else train[:0]
            self._read = layer, source
        return self._values

    @cached_property
    def _groups(self) -> ClassGroups:
        return read_groups(self.cache)

    @cached_property
    def _train_groups(self) -> NDArray[np.int32]:
        return assign_groups(self._groups, self.cache["id/train"])

    @cached_property
    def _query_groups(self) -> NDArray[np.int32]:
        groups = [assign_groups(self._groups, self.cache[name]) for name in self.splits]
        return np.concatenate(groups) if groups else np.empty(0, np.int32)
