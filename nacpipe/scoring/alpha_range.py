"""The range of alpha in which a term's states tell images apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nacpipe.errors import NoValuesError
from nacpipe.method.sorted_index import GroupedIndex, LayerIndex
from nacpipe.method.term import Source

FLAT, STEEP = 0.1, 30.0  # |alpha · product| at the 99th and 50th percentile of |product|


def measure_alpha(layer: str, source: Source, index: LayerIndex | GroupedIndex) -> tuple[float, float]:
    """Return the least and the greatest alpha at which the training states of a term differ from each other.

    Of `components` it comes from the components' sizes.

    At the least, |alpha · product| is FLAT at the 99th percentile of |product|; at the greatest, STEEP at the median.

    Raises:
        ValuesError: the source is 0 everywhere.
    """
    sizes = _sizes(index)
    if sizes.size == 0:
        raise NoValuesError(f"layer {layer!r}: every {source} of id/train is 0; leave it out with --layers")
    median, large = (_quantile(sizes, level) for level in (0.5, 0.99))
    return FLAT / large, STEEP / median


def _sizes(index: LayerIndex | GroupedIndex) -> NDArray[np.float32]:
    """|product| of all training samples and neurons where it is not 0, in no order, (values,)."""
    sizes = np.empty(index.neurons * index.train_samples, np.float32)
    filled = 0
    for part in index.train_parts():
        nonzero = part[part != 0]
        np.abs(nonzero, out=sizes[filled : filled + nonzero.size])
        filled += nonzero.size
    return sizes[:filled]


def _quantile(values: NDArray[np.float32], level: float) -> float:  # (values,), which are reordered
    """To the bit what `np.quantile` gives of the values in float64, of which it would make two copies."""
    place = (values.size - 1) * level
    low = int(place)
    pair = [low, min(low + 1, values.size - 1)]
    values.partition(pair)
    return float(np.quantile(values[pair].astype(np.float64), place - low))
