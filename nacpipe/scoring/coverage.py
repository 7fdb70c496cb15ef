"""The one path from cached states to scores.

Two ways to walk it, which give the same integers and so the same scores:

    fit_coverage(cache, params).score(split)      any split, block by block, in bounded memory
    Scorer(…).layer_scores(params.layers)          the search's splits, indexed once, a few milliseconds per trial

The network's output is a layer too, `logits`: every sample's logits are in the cache, and their gradient is known.
"""

from __future__ import annotations

import shlex
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nacpipe.cache import Cache, SplitView
from nacpipe.errors import ParamsError, ValuesError
from nacpipe.method.coverage import (
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
from nacpipe.method.kernels import Asked, count_sorted, fill_ranked, fill_rows
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.sorted_index import Index, index_columns, sort_columns

REMEMBER_BYTES = 256 * 2**20  # of layer scores that a Scorer keeps
PIECE = 8192  # rows that are read at once, whole blocks of whole objects as extraction writes them


def read_states(
    split: SplitView, layer: str, source: Source = "product", rows: slice = slice(None)
) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """Return a layer's activation and gradient, (rows, neurons) each; None for the one that a source does not need."""
    layer = layer_of(layer)
    if layer == LOGITS:
        logits = split.read("logits", rows)
        return logits, logits_gradient(logits)
    split[layer]  # refuses a layer that is not there
    activation = split.read(f"{layer}/activation", rows) if source != "gradient" else None
    gradient = split.read(f"{layer}/gradient", rows) if source != "activation" else None
    return activation, gradient


def read_source(
    split: SplitView, layer: str, source: Source = "product", rows: slice = slice(None)
) -> NDArray[np.float32]:
    """Return what goes under the sigmoid for these rows of a layer, (rows, neurons).

    Raises:
        ValuesError: NaN or infinity, naming layer, split and row.
    """
    activation, gradient = read_states(split, layer, source, rows)
    with np.errstate(over="ignore", invalid="ignore"):
        values = select_source(activation, gradient, source)  # type: ignore[arg-type]
    if not np.isfinite(values).all():
        row, neuron = np.argwhere(~np.isfinite(values))[0]
        raise ValuesError(
            f"layer {layer_of(layer)!r}, split {split.name}, row {int(row) + (rows.start or 0)}, neuron {int(neuron)}:"
            f" the {source} is {values[row, neuron]}; extract the split again with --force {shlex.quote(split.name)}"
        )
    return np.ascontiguousarray(values)


def read_layer(splits: Sequence[SplitView], layer: str, source: Source = "product") -> NDArray[np.float32]:
    """Return the same of all rows of these splits, one split behind the other, (rows, neurons).

    In pieces: a product is made of two arrays as large as itself, and three of an ImageNet training set are too many.
    """
    name = layer_of(layer)
    width = splits[0].logits.shape[1] if name == LOGITS else splits[0][name].spec.neurons
    values = np.empty((sum(split.rows for split in splits), width), np.float32)
    filled = 0
    for split in splits:
        for start in range(0, split.rows, PIECE):
            piece = read_source(split, layer, source, slice(start, min(start + PIECE, split.rows)))
            values[filled : filled + len(piece)] = piece
            filled += len(piece)
    return values


def outputs_of(cache: Cache) -> str:
    """Return what the network gives, which is stored as `logits`: one of `nacpipe.evaluation.methods.OUTPUTS`."""
    return str(cache.header.identity.get("outputs", "logits"))


def has_logits(cache: Cache) -> bool:
    """Return whether the network's outputs are logits; others are stored under the same name."""
    return outputs_of(cache) == "logits"


def has_classes(cache: Cache) -> bool:
    """Return whether the largest output is the predicted class: of logits and probabilities, not of features."""
    return outputs_of(cache) != "features"


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
                f" extract it into another cache with --layers {shlex.quote(layer)}"
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
        train = sort_columns(read_layer([cache["id/train"]], name, layer.source))
        fitted[name] = FittedLayer(layer, borders, count_sorted(train, borders))
    return Coverage(fitted)


def score_splits(cache: Cache, params: NacParams, splits: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Return split → scores (rows,); larger = more like the training data."""
    coverage = fit_coverage(cache, params)
    return {name: coverage.score(cache[name]) for name in splits}


IndexOf = Callable[[str, Source], Index]
"""Layer and source → their index."""


def index_from(cache: Cache, splits: Sequence[str]) -> IndexOf:
    """Return what reads and sorts a layer's columns: id/train is counted, `splits` are scored."""

    def make(layer: str, source: Source) -> Index:
        evaluated = read_layer([cache[name] for name in splits], layer, source)
        return index_columns(read_layer([cache["id/train"]], layer, source), evaluated)

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

    def layer_scores(self, layers: Mapping[str, LayerParams]) -> list[NDArray[np.float64]]:
        """Return each layer's scores of all splits, (samples,); weights play no part."""
        keys = [(layer, replace(params, weight=1.0)) for layer, params in layers.items()]
        found = {key: self._remembered[key] for key in keys if key in self._remembered}
        new = [key for key in keys if key not in found]
        if new:
            asked = [self._ask(layer, params) for layer, params in new]
            for key, (index, _, saturation), filled in zip(new, asked, fill_ranked(asked), strict=True):
                found[key] = layer_score(filled, index.neurons, saturation)
        for key in keys:
            self._remembered[key] = found[key]
            self._remembered.move_to_end(key)
        self._room -= sum(found[key].nbytes for key in new)
        while self._room < 0:
            _, oldest = self._remembered.popitem(last=False)
            self._room += oldest.nbytes
        return [found[key] for key in keys]

    def scores(self, params: NacParams) -> NDArray[np.float64]:
        """Return the scores of all splits, (samples,); `rows` says which are whose."""
        layer_scores = np.stack(self.layer_scores(params.layers))
        return combine_layers(layer_scores, np.array([layer.weight for layer in params.layers.values()]))

    def _ask(self, layer: str, params: LayerParams) -> Asked:
        borders = product_borders(bin_edges(params.bins, params.edges), params.alpha)
        return self.index(layer, params.source), borders, params.saturation
