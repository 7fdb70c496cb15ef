"""A cache's states as arrays: what goes under the sigmoid, layer by layer, and which layers there are."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nacpipe.cache import Cache, SplitView
from nacpipe.errors import ParamsError, ValuesError
from nacpipe.method.coverage import logits_gradient, select_source
from nacpipe.method.term import LOGITS, SOURCES, VIEWS, Source, layer_of

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
    activation = split.read_layer(layer, "activation", rows) if source != "gradient" else None
    gradient = split.read_layer(layer, "gradient", rows) if source != "activation" else None
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
            f" the {source} is {values[row, neuron]}; extract the split again with {split.redo_option}"
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
        for rows in split.row_slices(piece_rows(width)):
            piece = read_source(split, layer, source, rows)
            values[filled : filled + len(piece)] = piece
            filled += len(piece)
    return values


def piece_rows(width: int) -> int:
    """Return how many rows of so many float32 to read at once: `PIECE`, fewer where they are more than 16 MiB."""
    return max(PIECE // 8, min(PIECE, (1 << 22) // max(width, 1) // 512 * 512))


def outputs_of(cache: Cache) -> str:
    """Return what the network gives, which is stored as `logits`: one of `nacpipe.method.outputs.OUTPUTS`."""
    return str(cache.header.identity.get("outputs", "logits"))


def has_logits(cache: Cache) -> bool:
    """Return whether the network's outputs are logits; others are stored under the same name."""
    return outputs_of(cache) == "logits"


def has_classes(cache: Cache) -> bool:
    """Return whether the largest output is the predicted class: of logits and probabilities, not of features."""
    return outputs_of(cache) != "features"


def held_sources(cache: Cache, layer: str) -> tuple[Source, ...]:
    """Return the sources that a cache has of a layer; without gradients, all of the logits' and activations alone."""
    return SOURCES if cache.header.gradients or layer == LOGITS else ("activation",)


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
            what = f"layer {layer!r} is not in {cache.path}; it holds {', '.join(held)};"
            if layer.partition(":")[0] in held:
                known = f"sources are {', '.join(SOURCES)}, views {', '.join(VIEWS)}"
                raise ParamsError(f"{what} after a layer's name stand its source and its view: {known}")
            raise ParamsError(f"{what} extract it into another cache with --layers {shlex.quote(layer)}")
