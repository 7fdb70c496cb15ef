"""Where the search looks: per layer a range of bins, saturation and alpha.

Alpha's useful range follows the data. A sigmoid tells states apart where |alpha · product| lies between about 0.1 (all
states near ½) and 30 (all states 0 or 1), so a layer whose products are a thousand times larger wants an alpha a
thousand times smaller; published parameters do not transfer between networks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nacpipe.core.params import LayerParams, NacParams
from nacpipe.core.provenance import Identity
from nacpipe.errors import ValuesError

BINS = (4, 2000)
FLAT, STEEP = 0.1, 30.0  # |alpha · product| at the 99th and 50th percentile of |product|


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpace:
    """Ranges of one layer's parameters, ends included; all are searched on a logarithmic scale."""

    bins: tuple[int, int]
    saturation: tuple[int, int]
    alpha: tuple[float, float]

    def ranges(self) -> tuple[tuple[float, float], ...]:
        """Return (low, high) of bins, alpha and saturation, the order of a unit vector."""
        return (self.bins, self.alpha, self.saturation)

    def params(self, unit: NDArray[np.float64]) -> LayerParams:  # (3,) in 0 … 1
        """Return the parameters at a point of the unit cube; weight 1."""
        bins, alpha, saturation = (
            float(low) * (float(high) / float(low)) ** min(max(float(u), 0.0), 1.0)
            for u, (low, high) in zip(unit, self.ranges(), strict=True)
        )
        low, high = self.alpha
        return LayerParams(bins=round(bins), saturation=round(saturation), alpha=min(max(alpha, low), high))

    def unit(self, params: LayerParams) -> NDArray[np.float64]:
        """Return the point of the unit cube, (3,): what `params` undoes but for rounding."""
        values = (params.bins, params.alpha, params.saturation)
        return np.array(
            [
                math.log(value / low) / math.log(high / low) if high > low else 0.0
                for value, (low, high) in zip(values, self.ranges(), strict=True)
            ]
        )

    def including(self, params: LayerParams) -> LayerSpace:
        """Return the space, widened where these parameters lie outside."""
        return LayerSpace(
            bins=(min(self.bins[0], params.bins), max(self.bins[1], params.bins)),
            saturation=(min(self.saturation[0], params.saturation), max(self.saturation[1], params.saturation)),
            alpha=(min(self.alpha[0], params.alpha), max(self.alpha[1], params.alpha)),
        )


Space = Mapping[str, LayerSpace]


def measure_space(layer: str, products: NDArray[np.float32], train_rows: int) -> LayerSpace:
    """Return a layer's ranges from its training products (any shape).

    Raises:
        ValuesError: every product is 0; the layer tells nothing.
    """
    size = np.abs(products[products != 0].astype(np.float64))
    if size.size == 0:
        raise ValuesError(f"layer {layer!r}: every product of id/train is 0; leave it out with --layers")
    median, large = np.quantile(size, [0.5, 0.99]).tolist()
    return LayerSpace(bins=BINS, saturation=(1, max(train_rows, 2)), alpha=(FLAT / large, STEEP / median))


def to_json(space: Space) -> Identity:
    """Return the space as JSON values, for the study's record."""
    return {
        name: {"bins": list(s.bins), "saturation": list(s.saturation), "alpha": list(s.alpha)}
        for name, s in space.items()
    }


def with_weights(layers: Mapping[str, LayerParams], weights: NDArray[np.float64]) -> NacParams:
    """Return parameters with these weights, (layers,), normalised to sum 1."""
    shares = weights / weights.sum()
    return NacParams(
        layers={
            name: replace(layer, weight=float(share))
            for (name, layer), share in zip(layers.items(), shares, strict=True)
        }
    )
