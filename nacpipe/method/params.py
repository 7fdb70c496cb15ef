"""The parameters of NAC as frozen records, their bounds, and their JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

import numpy as np

from nacpipe.errors import ParamsError
from nacpipe.method.coverage import Edges
from nacpipe.method.feature_scores import FusedScore
from nacpipe.method.term import SOURCES, Source, Term, parse_term

MIN_BINS, MAX_BINS = 4, 100_000
MAX_SATURATION = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParams:
    """What one term needs to turn values into a score."""

    bins: int
    """Number of bin edges M, at least 4; there are M − 1 bins."""
    saturation: int
    """Training samples r that fill a bin; may exceed the training set (the table then never reaches 1)."""
    alpha: float
    """Steepness of the sigmoid, > 0."""
    weight: float = 1.0
    """The term's share of the score before normalisation, ≥ 0."""
    edges: Edges = "log"
    """`log` (NAC-UE) or `linear` (NAC-ME)."""
    source: Source = "product"
    """What goes under the sigmoid: product, activation or gradient."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "bins", _whole("bins", self.bins, MIN_BINS, MAX_BINS))
        object.__setattr__(self, "saturation", _whole("saturation", self.saturation, 1, MAX_SATURATION))
        object.__setattr__(self, "alpha", _real("alpha", self.alpha))
        object.__setattr__(self, "weight", _real("weight", self.weight))
        if not self.alpha > 0:
            raise ParamsError(f"alpha is {self.alpha}; it must be above 0")
        if self.weight < 0:
            raise ParamsError(f"weight is {self.weight}; it must be at least 0")
        for name, known in (("edges", get_args(Edges)), ("source", SOURCES)):
            if getattr(self, name) not in known:
                raise ParamsError(f"{name} is {getattr(self, name)!r}; known: {', '.join(known)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NacParams:
    """The parameters of a whole detector: one record per term, in the order of the score's sum."""

    layers: Mapping[str, LayerParams]
    """By the terms' names, `layer3` or `layer3:activation:by_class`. Where a name has a source, it is the record's."""
    fused: FusedScore | None = None
    """A feature score that is one more member of the sum; None where coverage alone is."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise ParamsError("there are no layers in these parameters")
        if not any(layer.weight > 0 for layer in self.layers.values()):
            raise ParamsError("every layer's weight is 0; at least one must be above 0")
        for name, layer in self.layers.items():
            term = parse_term(name)  # refuses an unknown view
            if name.startswith(f"{term.layer}:{term.source}") and layer.source != term.source:
                raise ParamsError(f"layer {name!r} is named after its source, which is {layer.source!r}")

    def used(self) -> NacParams:
        """Return the same without members of weight 0, which add nothing to the score."""
        layers = {name: layer for name, layer in self.layers.items() if layer.weight > 0}
        return NacParams(layers=layers, fused=self.fused if self.fused is not None and self.fused.weight > 0 else None)

    def to_json(self) -> dict[str, Any]:
        """Return `{"layers": {name: {field: value}}}`, ready for json.dumps; with `fused` where there is one."""
        layers = {name: {f.name: getattr(layer, f.name) for f in fields(layer)} for name, layer in self.layers.items()}
        return {"layers": layers, **({} if self.fused is None else {"fused": asdict(self.fused)})}

    @classmethod
    def from_json(cls, data: Any) -> NacParams:
        """Read what `to_json` returns; keys beside `layers` and `fused` are ignored.

        Raises:
            ParamsError: the data is not of that form, naming the layer and field.
        """
        layers = data.get("layers") if isinstance(data, dict) else None
        if not isinstance(layers, dict):
            raise ParamsError('parameters need an object {"layers": {NAME: {"bins": …, "saturation": …, "alpha": …}}}')
        return cls(
            layers={str(name): layer_from_json(str(name), entry) for name, entry in layers.items()},
            fused=fused_from_json(data.get("fused")),
        )


def layer_from_json(name: str, entry: Any) -> LayerParams:
    """Read one term's entry; the source is its name's where the entry has none.

    Raises:
        ParamsError: it is not of that form, naming the layer and field.
    """
    known = [f.name for f in fields(LayerParams)]
    if not isinstance(entry, dict):
        raise ParamsError(f"layer {name!r} must be an object with {', '.join(known)}")
    unknown = [str(key) for key in entry if key not in known]
    missing = [key for key in ("bins", "saturation", "alpha") if key not in entry]
    if unknown or missing:
        what = f"does not know {unknown[0]!r}" if unknown else f"lacks {missing[0]!r}"
        raise ParamsError(f"layer {name!r} {what}; fields: {', '.join(known)}")
    named = parse_term(name).source
    try:
        return LayerParams(**{"source": named, **entry})
    except ParamsError as error:
        raise ParamsError(f"layer {name!r}: {error}") from None


def fused_from_json(entry: Any) -> FusedScore | None:
    """Read the entry of a fused score; None stands for none.

    Raises:
        ParamsError: it is not of that form.
    """
    if entry is None:
        return None
    known = [f.name for f in fields(FusedScore)]
    if not isinstance(entry, dict) or sorted(map(str, entry)) != sorted(known):
        raise ParamsError(f"fused must be an object with {', '.join(known)}")
    return FusedScore(**entry)


def term_of(name: str, params: LayerParams) -> Term:
    """Return the term that an entry of the parameters is; its source is the record's."""
    return replace(parse_term(name), source=params.source)


def _whole(name: str, value: Any, low: int, high: int) -> int:
    fraction = isinstance(value, float | np.floating) and not float(value).is_integer()  # so are infinity and NaN
    if not _is_number(value) or fraction:
        raise ParamsError(f"{name} is {_shown(value)}; it must be a whole number")
    if not low <= value <= high:
        raise ParamsError(f"{name} is {_shown(value)}; it must lie between {low} and {high}")
    return int(value)


def _real(name: str, value: Any) -> float:
    if not _is_number(value) or abs(value) > 1e300 or not math.isfinite(value):
        raise ParamsError(f"{name} is {_shown(value)}; it must be a finite number")
    return float(value)


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python prints no whole number of more than 4,300 digits
        return "a number of thousands of digits"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
