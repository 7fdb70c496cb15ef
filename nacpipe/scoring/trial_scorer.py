"""Scores of the search's splits under ever new parameters, from an index that is made once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nacpipe.cache import Cache
from nacpipe.method.counting import Asked, fill_ranked
from nacpipe.method.coverage import bin_edges, combine_layers, layer_score, product_borders
from nacpipe.method.feature_scores import FeatureScoreName
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.term import Source, parse_term
from nacpipe.scoring.term_index import IndexBuilder, TermIndex

REMEMBER_BYTES = 256 * 2**20  # of layer scores that a Scorer keeps


IndexOf = Callable[[str, Source], TermIndex]
"""A term's name in the parameters and its source → their index."""


class TermIndexes:
    """Reads and sorts a term's values when they are first asked for."""

    def __init__(self, cache: Cache, splits: Sequence[str], limit: int | None = None) -> None:
        """Index these splits.

        Args:
            cache: id/train is counted.
            splits: what is scored.
            limit: bytes of indexes that are kept, those used last, and at least one; None keeps all. With a limit the
                values of the last layer and source are kept too: ask for the views of a source one after the other.
        """
        self._indexer, self._limit = IndexBuilder(cache, splits), limit
        self._kept: OrderedDict[tuple[str, Source], TermIndex] = OrderedDict()

    def __call__(self, name: str, source: Source) -> TermIndex:
        """Return the index of a term, by its name in the parameters, and source."""
        kept, key = self._kept, (name, source)
        if key not in kept:
            while self._limit is not None and kept and sum(one.nbytes for one in kept.values()) >= self._limit:
                kept.popitem(last=False)
            kept[key] = self._indexer.index(replace(parse_term(name), source=source))
            if self._limit is None:
                self._indexer.forget()
        kept.move_to_end(key)
        return kept[key]

    def forget(self) -> None:
        """Drop what is kept; it is read again when it is asked for."""
        self._kept.clear()
        self._indexer.forget()


def split_rows(cache: Cache, splits: Sequence[str]) -> dict[str, slice]:
    """Return split → its samples' places, one split behind the other."""
    rows: dict[str, slice] = {}
    for name in splits:
        start = max((taken.stop for taken in rows.values()), default=0)
        rows[name] = slice(start, start + cache[name].rows)
    return rows


@dataclass(frozen=True, slots=True)
class _EntrySums:
    """A layer's scores as they are remembered: whole numbers, half as large."""

    sums: NDArray[np.int64] | NDArray[np.uint32]  # (samples,)
    neurons: int
    saturation: int

    @classmethod
    def of(cls, sums: NDArray[np.int64], neurons: int, saturation: int) -> _EntrySums:
        return cls(sums.astype(np.uint32) if neurons * saturation < 1 << 32 else sums, neurons, saturation)

    def score(self) -> NDArray[np.float64]:
        """(samples,)."""
        return layer_score(self.sums, self.neurons, self.saturation)


class Scorer:
    """Scores of the search's splits under ever new parameters.

    A layer's scores are remembered per (layer, bins, alpha, saturation, edges, source): a trial that repeats them costs
    a weighted sum.
    """

    def __init__(
        self,
        index: IndexOf,
        rows: Mapping[str, slice],
        remember: int = REMEMBER_BYTES,
        *,
        one_by_one: bool = False,
        feature_scores: Callable[[FeatureScoreName], NDArray[np.float64]] | None = None,
    ) -> None:
        """Score from these indexes.

        Args:
            index: layer and source → sorted columns.
            rows: split → its samples' places in the index.
            remember: bytes of layer scores that are kept.
            one_by_one: never use two indexes at once, where `index` does not keep all.
            feature_scores: method → its scores of all splits, (samples,); for parameters with a fused score.
        """
        self.index, self.feature_scores = index, feature_scores
        self.rows = dict(rows)
        self._remembered: OrderedDict[tuple[str, LayerParams], _EntrySums] = OrderedDict()
        self._room, self._one_by_one = remember, one_by_one

    def layer_scores(self, layers: Mapping[str, LayerParams]) -> list[NDArray[np.float64]]:
        """Return each layer's scores of all splits, (samples,); weights play no part."""
        keys = [(layer, replace(params, weight=1.0)) for layer, params in layers.items()]
        found = {key: self._remembered[key] for key in keys if key in self._remembered}
        new = [key for key in keys if key not in found]
        if new:
            for keys_at_once in ([key] for key in new) if self._one_by_one else [new]:
                asked = [self._ask(layer, params) for layer, params in keys_at_once]
                for key, (index, _, saturation), sums in zip(keys_at_once, asked, fill_ranked(asked), strict=True):
                    found[key] = _EntrySums.of(sums, index.neurons, saturation)
        for key in keys:
            self._remembered[key] = found[key]
            self._remembered.move_to_end(key)
        self._room -= sum(found[key].sums.nbytes for key in new)
        while self._room < 0:
            _, oldest = self._remembered.popitem(last=False)
            self._room += oldest.sums.nbytes
        return [found[key].score() for key in keys]

    def scores(self, params: NacParams) -> NDArray[np.float64]:
        """Return the scores of all splits, (samples,); `rows` says which are whose."""
        scores, weights = self.layer_scores(params.layers), [layer.weight for layer in params.layers.values()]
        if (fused := params.fused) is not None:
            assert self.feature_scores is not None
            scores.append(fused.standardise(self.feature_scores(fused.method)))
            weights.append(fused.weight)
        return combine_layers(np.stack(scores), np.array(weights))

    def _ask(self, layer: str, params: LayerParams) -> Asked:
        borders = product_borders(bin_edges(params.bins, params.edges), params.alpha)
        return self.index(layer, params.source), borders, params.saturation
