"""The one path from cached states to scores.

Two ways to walk it, which give the same integers and so the same scores:

    fit_coverage(cache, params).score(split)      any split, block by block, in bounded memory
    Scorer(…).layer_scores(layer, params)         the search's splits, indexed once, a few milliseconds per trial

The network's output is a layer too, `logits`: every sample's logits are in the cache, and their gradient is known.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nacpipe.cache import Cache, SplitView
from nacpipe.core.coverage import (
    LOGITS,
    Source,
    bin_edges,
    combine_layers,
    layer_of,
    layer_score,
    logits_gradient,
    product_borders,
    select_source,
)
from nacpipe.core.kernels import Columns, count_sorted, fill_ranked, fill_rows, rank_columns, sort_columns
from nacpipe.core.params import LayerParams, NacParams
from nacpipe.errors import ParamsError, ValuesError

REMEMBER_BYTES = 256 * 2**20  # of layer scores that a Scorer keeps


def read_source(
    split: SplitView, layer: str, source: Source = "product", rows: slice = slice(None)
) -> NDArray[np.float32]:
    """Return what goes under the sigmoid for these rows of a layer, (rows, neurons).

    Raises:
        ValuesError: NaN or infinity, naming layer, split and row.
    """
    activation = gradient = None
    layer = layer_of(layer)
    if layer == LOGITS:
        activation = split.read("logits", rows)
        gradient = logits_gradient(activation)
    else:
        split[layer]  # refuses a layer that is not there
        activation = split.read(f"{layer}/activation", rows) if source != "gradient" else None
        gradient = split.read(f"{layer}/gradient", rows) if source != "activation" else None
    with np.errstate(over="ignore", invalid="ignore"):
        values = select_source(activation, gradient, source)  # type: ignore[arg-type]
    if not np.isfinite(values).all():
        row, neuron = np.argwhere(~np.isfinite(values))[0]
        raise ValuesError(
            f"layer {layer!r}, split {split.name}, row {int(row) + (rows.start or 0)}, neuron {int(neuron)}:"
            f" the {source} is {values[row, neuron]}; extract the split again with --force {split.name}"
        )
    return np.ascontiguousarray(values)


def has_logits(cache: Cache) -> bool:
    """Return whether the network's outputs are logits; features are stored under the same name otherwise."""
    return bool(cache.header.identity.get("outputs", "logits") == "logits")


def held_layers(cache: Cache) -> list[str]:
    """Return the names of the layers that can be scored, in the cache's order; the network's output last."""
    return [spec.name for spec in cache.header.layers] + [LOGITS] * has_logits(cache)


def check_layers(cache: Cache, layers: Sequence[str]) -> None:
    """Refuse parameters for layers that the cache does not hold.

    Raises:
        ParamsError: naming the layer, the cache and what it holds.
    """
    held = held_layers(cache)
    for layer in map(layer_of, layers):
        if layer not in held:
            raise ParamsError(
                f"layer {layer!r} is not in {cache.path}; it holds {', '.join(held)};"
                f" extract it into another cache with --layers {layer}"
            )


@dataclass(frozen=True, slots=True)
class FittedLayer:
    """A layer's coverage: where its bins are and how full they got."""

    params: LayerParams
    borders: NDArray[np.float32]  # (bins,)
    counts: NDArray[np.int32]  # (neurons, bins - 1)

    def score(self, products: NDArray[np.float32]) -> NDArray[np.float64]:  # (samples, neurons) → (samples,)
        """Return the mean over neurons of the table at each sample's bins."""
        filled = fill_rows(products, self.borders, self.counts, self.params.saturation)
        return layer_score(filled, self.counts.shape[0], self.params.saturation)


@dataclass(frozen=True, slots=True)
class Coverage:
    """Everything that turns a sample's states into its score."""

    layers: Mapping[str, FittedLayer]

    def score(self, split: SplitView, block: int = 4096) -> NDArray[np.float64]:
        """Return the score of every sample of a split, (rows,), reading `block` rows at a time."""
        scores = np.empty(split.rows)
        for start in range(0, split.rows, block):
            rows = slice(start, min(start + block, split.rows))
            layer_scores = [
                fitted.score(read_source(split, name, fitted.params.source, rows))
                for name, fitted in self.layers.items()
            ]
            scores[rows] = combine_layers(np.stack(layer_scores), self.weights)
        return scores

    @property
    def weights(self) -> NDArray[np.float64]:
        """(layers,), as given."""
        return np.array([fitted.params.weight for fitted in self.layers.values()])


def fit_coverage(cache: Cache, params: NacParams) -> Coverage:
    """Count the training states of every layer.

    Raises:
        ParamsError: a layer is not in the cache.
    """
    check_layers(cache, list(params.layers))
    fitted = {}
    for name, layer in params.layers.items():
        borders = product_borders(bin_edges(layer.bins, layer.edges), layer.alpha)
        train = sort_columns(read_source(cache["id/train"], name, layer.source))
        fitted[name] = FittedLayer(layer, borders, count_sorted(train, borders))
    return Coverage(fitted)


def score_splits(cache: Cache, params: NacParams, splits: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Return split → scores (rows,); larger = more like the training data."""
    coverage = fit_coverage(cache, params)
    return {name: coverage.score(cache[name]) for name in splits}


@dataclass(frozen=True, slots=True)
class Index:
    """One layer's columns, sorted once."""

    train: Columns  # of n_train samples
    queries: Columns  # of n_query samples
    ranks: NDArray[np.uint16] | NDArray[np.uint32]  # (neurons, n_query)


IndexOf = Callable[[str, Source], Index]
"""Layer and source → their index."""


def index_from(cache: Cache, splits: Sequence[str]) -> IndexOf:
    """Return what reads and sorts a layer's columns: id/train is counted, `splits` are scored."""

    def make(layer: str, source: Source) -> Index:
        train = sort_columns(read_source(cache["id/train"], layer, source))
        evaluated = np.concatenate([read_source(cache[name], layer, source) for name in splits])
        return Index(train, sort_columns(evaluated), rank_columns(evaluated))

    return make


def split_rows(cache: Cache, splits: Sequence[str]) -> dict[str, slice]:
    """Return split → its samples' places, one split behind the other."""
    rows: dict[str, slice] = {}
    for name in splits:
        start = max((taken.stop for taken in rows.values()), default=0)
        rows[name] = slice(start, start + cache[name].rows)
    return rows


class Scorer:
    """Scores of the search's splits under ever new parameters.

    A layer's scores are remembered per (layer, bins, alpha, saturation, edges, source): a trial that repeats them costs
    a weighted sum.
    """

    def __init__(self, index: IndexOf, rows: Mapping[str, slice], remember: int = REMEMBER_BYTES) -> None:
        """Score from these indexes.

        Args:
            index: layer and source → sorted columns.
            rows: split → its samples' places in the index.
            remember: bytes of layer scores that are kept.
        """
        self.index = index
        self.rows = dict(rows)
        self._remembered: OrderedDict[tuple[str, LayerParams], NDArray[np.float64]] = OrderedDict()
        self._room = remember

    def layer_scores(self, layer: str, params: LayerParams) -> NDArray[np.float64]:
        """Return one layer's scores of all splits, (samples,); weight plays no part."""
        key = (layer, replace(params, weight=1.0))
        found = self._remembered.get(key)
        if found is not None:
            self._remembered.move_to_end(key)
            return found
        index = self.index(layer, params.source)
        borders = product_borders(bin_edges(params.bins, params.edges), params.alpha)
        filled = fill_ranked(index.train, index.queries, index.ranks, borders, params.saturation)
        scores = layer_score(filled, index.ranks.shape[0], params.saturation)
        self._remember(key, scores)
        return scores

    def scores(self, params: NacParams) -> NDArray[np.float64]:
        """Return the scores of all splits, (samples,); `rows` says which are whose."""
        layer_scores = np.stack([self.layer_scores(name, layer) for name, layer in params.layers.items()])
        return combine_layers(layer_scores, np.array([layer.weight for layer in params.layers.values()]))

    def _remember(self, key: tuple[str, LayerParams], scores: NDArray[np.float64]) -> None:
        self._remembered[key] = scores
        self._room -= scores.nbytes
        while self._room < 0:
            _, oldest = self._remembered.popitem(last=False)
            self._room += oldest.nbytes
