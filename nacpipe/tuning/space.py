"""Where the search looks: per layer the values of bins, saturation, alpha, state source, bin edges and weight.

Alpha's useful range follows the data. A sigmoid tells states apart where |alpha · product| lies between about 0.1 (all
states near ½) and 30 (all states 0 or 1), so a layer whose products are a thousand times larger wants an alpha a
thousand times smaller; published parameters do not transfer between networks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nacpipe.method.feature_scores import FusedScore
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.term import Source, source_of
from nacpipe.scoring.alpha_range import measure_alpha
from nacpipe.scoring.trial_scorer import IndexOf

BINS = (4, 2000)
EDGE = 0.02  # of a range: a best value this near its end asks for a wider range
FIELDS = ("bins", "alpha", "saturation", "source", "edges")  # the order of a unit vector


@dataclass(frozen=True, slots=True)
class Interval:
    """All values from low to high, ends included; on a logarithmic scale unless told otherwise."""

    low: float
    high: float
    whole: bool = False
    log: bool = True

    @property
    def free(self) -> bool:
        """True where there is more than one value."""
        return self.high > self.low

    def at(self, unit: float) -> Any:
        """Return the value at a place in 0 … 1."""
        place = min(max(unit, 0.0), 1.0)
        if self.log:
            value = float(self.low) * (float(self.high) / float(self.low)) ** place
        else:
            value = self.low + (self.high - self.low) * place
        return round(value) if self.whole else min(max(value, self.low), self.high)

    def unit(self, value: Any) -> float:
        """Return the place of a value in 0 … 1: what `at` undoes but for rounding."""
        if not self.free:
            return 0.0
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return float((value - self.low) / (self.high - self.low))

    def ends_at(self, value: Any) -> bool:
        """Return whether a value stands at one of the ends of a range of several."""
        return self.free and not EDGE < self.unit(value) < 1 - EDGE

    def including(self, value: Any) -> Interval:
        """Return the interval, widened where the value lies outside."""
        return replace(self, low=min(self.low, value), high=max(self.high, value))


@dataclass(frozen=True, slots=True)
class Choice:
    """These values and no others; a fixed value is a choice of one."""

    values: tuple[Any, ...]

    @property
    def free(self) -> bool:
        """True where there is more than one value."""
        return len(self.values) > 1

    def at(self, unit: float) -> Any:
        """Return the value at a place in 0 … 1, all of which have an equal share."""
        return self.values[min(int(min(max(unit, 0.0), 1.0) * len(self.values)), len(self.values) - 1)]

    def unit(self, value: Any) -> float:
        """Return the middle of a value's share."""
        return (self.values.index(value) + 0.5) / len(self.values)

    def including(self, value: Any) -> Choice:
        """Return the choice, with the value added where it is not among them."""
        return self if value in self.values else Choice((*self.values, value))


Dimension = Interval | Choice
Given = Mapping[str, Dimension]
"""What is asked of a layer, by field; what is not named is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpace:
    """The values of one layer's parameters."""

    bins: Dimension
    saturation: Dimension
    alpha: Mapping[Source, Dimension]
    """By state source: a gradient's useful range is not a product's."""
    source: Choice = Choice(("product",))
    edges: Choice = Choice(("log",))
    weight: Dimension | None = None
    """None: in closed form from the layer scores, of every combination (weights.py)."""

    @property
    def free(self) -> tuple[str, ...]:
        """The fields that are searched, in the order of a unit vector."""
        return tuple(name for name in FIELDS if any(d.free for d in self.dimensions(name)))

    def dimensions(self, name: str) -> tuple[Dimension, ...]:
        """Return a field's dimension; of alpha one per state source."""
        if name == "alpha":
            return tuple(self.alpha[source] for source in self.source.values)
        return (getattr(self, name),)

    def dimension(self, name: str, source: Source = "product") -> Dimension | None:
        """Return a field's dimension, of alpha the source's; of a weight in closed form None."""
        if name == "weight":
            return self.weight
        return self.alpha[source] if name == "alpha" else self.dimensions(name)[0]

    def params(self, unit: NDArray[np.float64]) -> LayerParams:  # (free fields,) in 0 … 1
        """Return the parameters at a point of the unit cube; weight 1."""
        place = dict(zip(self.free, unit.tolist(), strict=True))
        source = self.source.at(place.get("source", 0.0))
        return LayerParams(
            bins=self.bins.at(place.get("bins", 0.0)),
            saturation=self.saturation.at(place.get("saturation", 0.0)),
            alpha=self.alpha[source].at(place.get("alpha", 0.0)),
            source=source,
            edges=self.edges.at(place.get("edges", 0.0)),
        )

    def unit(self, params: LayerParams) -> NDArray[np.float64]:
        """Return the point of the unit cube, (free fields,): what `params` undoes but for rounding."""
        found = []
        for name in self.free:
            dimension = self.dimension(name, params.source)
            assert dimension is not None
            found.append(dimension.unit(getattr(params, name)))
        return np.array(found)

    def including(self, params: LayerParams) -> LayerSpace:
        """Return the space, widened where these parameters lie outside."""
        alpha = {**self.alpha, params.source: self.alpha[params.source].including(params.alpha)}
        bins, saturation = self.bins.including(params.bins), self.saturation.including(params.saturation)
        return replace(self, bins=bins, saturation=saturation, alpha=alpha)

    def to_json(self) -> dict[str, Any]:
        """Return the space as a space file has it: a range, a list or one value per field."""
        alphas = {source: _plain(self.alpha[source]) for source in self.source.values}
        alpha = alphas if len({str(a) for a in alphas.values()}) > 1 else next(iter(alphas.values()))
        found = {"bins": _plain(self.bins), "saturation": _plain(self.saturation), "alpha": alpha}
        found |= {"source": _plain(self.source), "edges": _plain(self.edges)}
        return found | {"weight": "fit" if self.weight is None else _plain(self.weight)}

    def weights(self) -> tuple[float, float]:
        """Return the least and the greatest weight; 0 and 1 where it comes in closed form."""
        if self.weight is None:
            return 0.0, 1.0
        values = self.weight.values if isinstance(self.weight, Choice) else (self.weight.low, self.weight.high)
        return min(values), max(values)


Space = Mapping[str, LayerSpace]


def measure_space(
    layer: str,
    index: IndexOf,
    train_rows: int,
    given: Given | None = None,
) -> LayerSpace:
    """Return a layer's space: what is given, and the rest from the data.

    Args:
        layer: its name, for messages.
        index: where the training states are.
        train_rows: samples of id/train.
        given: dimensions by field.

    Raises:
        ValuesError: a source is 0 everywhere; the layer tells nothing.
    """
    asked = dict(given or {})
    source = asked.pop("source", Choice((source_of(layer),)))
    assert isinstance(source, Choice)
    alpha = asked.pop("alpha", None)
    alphas = {name: alpha or Interval(*measure_alpha(layer, name, index(layer, name))) for name in source.values}
    rest: dict[str, Any] = {
        "bins": Interval(*BINS, whole=True),
        "saturation": Interval(1, max(train_rows, 2), whole=True),
        **asked,
    }
    return LayerSpace(source=source, alpha=alphas, **rest)


def widen(space: Space, params: NacParams | None) -> Space:
    """Return the space, widened where these parameters lie outside; without parameters as it is."""
    return space if params is None else {name: s.including(params.layers[name]) for name, s in space.items()}


def fits_weights(space: Space) -> bool:
    """Return True where weights come in closed form rather than from the space."""
    return all(layer.weight is None for layer in space.values())


def to_json(space: Space) -> dict[str, Any]:
    """Return the space as JSON values, for the study's record."""
    return {name: layer.to_json() for name, layer in space.items()}


def with_weights(
    layers: Mapping[str, LayerParams], weights: NDArray[np.float64], fused: FusedScore | None = None
) -> NacParams:
    """Return parameters with these weights, (layers,), the fused score's last if there is one, normalised to sum 1."""
    shares = [float(share) for share in weights / weights.sum()]
    own, last = (shares, 0.0) if fused is None else (shares[:-1], shares[-1])
    return NacParams(
        layers={name: replace(layer, weight=share) for (name, layer), share in zip(layers.items(), own, strict=True)},
        fused=None if fused is None else replace(fused, weight=last),
    )


def _plain(dimension: Dimension) -> Any:
    if isinstance(dimension, Interval):
        return {"low": dimension.low, "high": dimension.high}
    return dimension.values[0] if len(dimension.values) == 1 else list(dimension.values)
