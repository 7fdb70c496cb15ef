"""The one path from cached states to scores.

Two ways to walk it, which give the same integers and so the same scores:

    fit_coverage(cache, params).score(split)      any split, block by block, in bounded memory
    Scorer(…).layer_scores(params.layers)          the search's splits, indexed once, a few milliseconds per trial

The network's output is a layer too, `logits`: every sample's logits are in the cache, and their gradient is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nacpipe.cache import Cache, SplitView
from nacpipe.method.counting import count_sorted, fill_rows
from nacpipe.method.coverage import (
    bin_edges,
    combine_layers,
    layer_score,
    product_borders,
)
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.sorted_index import sort_columns
from nacpipe.scoring.states import (
    check_layers,
    read_layer,
    read_source,
)


@dataclass(frozen=True, slots=True)
class FittedLayer:
    """A layer's coverage: where its bins are and how full they got."""

    params: LayerParams
    borders: NDArray[np.float32]  # (bins,)
    counts: NDArray[np.int32]  # (neurons, bins - 1)

    def score(self, products: NDArray[np.float32]) -> NDArray[np.float64]:  # (samples, neurons) → (samples,)
        """Return the mean over neurons of the table at each sample's bins."""
        entry_sum = fill_rows(products, self.borders, self.counts, self.params.saturation)
        return layer_score(entry_sum, self.counts.shape[0], self.params.saturation)


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
