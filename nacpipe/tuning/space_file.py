"""What is searched, as someone writes it: `auto`, `paper`, `wide`, `terms`, `published`, or a TOML file.

[default]                                   # for every layer below; what is not named is as in auto
bins = [50, 500]                            # a list: these values
[layers.avgpool]                            # the layers that are used; none named: those of --layers, or all
alpha = { low = 0.1, high = 100.0 }         # a range; bins, saturation and alpha on a logarithmic scale
saturation = 100                            # one value: fixed
source = ["product", "activation"]          # product (default), activation or gradient
edges = "linear"                            # log (default) or linear bins
weight = 1.0                                # "fit" (default): in closed form; a value, a list or a range
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from nacpipe.cache import Cache
from nacpipe.errors import InputError, ParamsError
from nacpipe.method.coverage import Edges
from nacpipe.method.params import LayerParams
from nacpipe.method.published import published_grid
from nacpipe.method.term import Source, layer_of, parse_term, source_of
from nacpipe.scoring.states import held_layers, held_sources
from nacpipe.scoring.views import available_terms, list_terms
from nacpipe.tuning.space import FIELDS, Choice, Dimension, Given, Interval

NAMED = ("auto", "paper", "wide", "terms")  # these take any layers
KNOWN = (*FIELDS, "weight")
WORDS = {"source": get_args(Source), "edges": get_args(Edges)}
MAX_BYTES = 2**20


def read_spec(space: str, cache: Cache, layers: Sequence[str]) -> dict[str, Given]:
    """Return layer → what is asked of it, in the cache's order.

    Args:
        space: `auto`, `paper`, `wide`, `terms`, `published` or a file.
        cache: the layers that there are.
        layers: the layers to use; none means the space's, or all of the cache.

    Raises:
        InputError: the file is not there or not of this form, naming the place.
        ParamsError: the paper has no grid for this network, or a layer is not in the cache.
    """
    if space == "auto":
        asked: Mapping[str, Given] = _available(cache, layers)
    elif space == "paper":
        asked = {name: {} for name in layers or _default_layers(cache)}
    elif space == "wide":
        asked = {name: {"source": Choice(_sources(cache, name))} for name in layers or held_layers(cache)}
    elif space == "terms":
        asked = _terms(cache, layers)
    elif space == "published":
        asked = _published(cache)
    else:
        asked = _read_file(Path(space), layers or _default_layers(cache))
    if layers and space not in NAMED:
        for name in layers:
            if name not in asked:
                raise InputError(f"layer {name!r} is not in the space {space}; it has {', '.join(asked)}")
        asked = {name: asked[name] for name in layers}
    held = held_layers(cache)
    _check_sources(cache, space, asked)
    return {
        name: asked[name]
        for name in sorted(asked, key=lambda n: held.index(layer_of(n)) if layer_of(n) in held else len(held))
    }


def _sources(cache: Cache, name: str) -> tuple[Source, ...]:
    """Every source that the cache has, or the one that a name says."""
    return held_sources(cache, name) if layer_of(name) == name else (source_of(name),)


def _check_sources(cache: Cache, space: str, asked: Mapping[str, Given]) -> None:
    for name, given in asked.items():
        source = given.get("source", Choice((source_of(name),)))
        assert isinstance(source, Choice)
        if lacking := [str(value) for value in source.values if value not in held_sources(cache, layer_of(name))]:
            raise ParamsError(
                f"{cache.path} was written without gradients (extract --no-gradient), and the space {space} counts the"
                f" {lacking[0]} of {layer_of(name)!r}; use --space auto or terms, or a term such as"
                f" {layer_of(name)}:activation"
            )


def _default_layers(cache: Cache) -> list[str]:
    return [spec.name for spec in cache.header.layers]


def _available(cache: Cache, layers: Sequence[str]) -> dict[str, Given]:
    """Every term that the data allow; a name with a source or a view stands for that term alone."""
    names, held = layers or held_layers(cache), held_layers(cache)
    terms = {
        term: term for term in (parse_term(name) for name in names if name not in held)
    }  # refused later if unknown
    terms |= {term: term for term in available_terms(cache) if term.layer in names}
    order = {term: place for place, term in enumerate(list_terms(cache))}
    listed = sorted(terms, key=lambda term: order.get(term, len(order)))
    return {term.name: {"source": Choice((term.source,))} for term in listed}


def _terms(cache: Cache, layers: Sequence[str]) -> dict[str, Given]:
    """Every layer once per source."""
    return {
        f"{layer_of(name)}:{source}": {"source": Choice((source,))}
        for name in layers or held_layers(cache)
        for source in _sources(cache, name)
    }


def _published(cache: Cache) -> dict[str, Given]:
    identity = cache.header.identity
    grid = published_grid(str(identity.get("benchmark")), str(identity.get("family")), held_layers(cache))
    return {
        layer: {
            "bins": Choice(bins),
            "saturation": Choice(saturation),
            "alpha": Choice(tuple(map(float, alpha))),
            "weight": Choice((1.0,)),
        }
        for layer, (bins, saturation, alpha) in grid.items()
    }


def _read_file(path: Path, layers: Sequence[str]) -> dict[str, Given]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        data = tomllib.loads(text.decode("utf-8-sig"))
    except FileNotFoundError:
        raise InputError(
            f"there is no space file {path}; name a file, or --space auto, paper, wide, terms or published"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the space file {path} cannot be read: {error}") from None
    unknown = [key for key in data if key not in ("default", "layers")]
    if unknown:
        raise InputError(f"{path}: {unknown[0]!r} is not known; it has [default] and [layers.NAME]")
    tables = data.get("layers", {})
    default = data.get("default", {})
    for where, table in (("default", default), ("layers", tables), *((f"layers.{n}", t) for n, t in _items(tables))):
        if not isinstance(table, dict):
            raise InputError(f"{path}: {where} is {table!r}; it must be a table of {', '.join(KNOWN)}")
    spec: dict[str, Given] = {}
    for name in tables or layers:
        fields = {**default, **tables.get(name, {})}
        spec[name] = {field: d for field, value in fields.items() if (d := _dimension(path, name, field, value))}
        source = spec[name].get("source")
        if layer_of(name) != name and isinstance(source, Choice) and set(source.values) != {source_of(name)}:
            told = ", ".join(source.values)
            raise InputError(
                f"{path}: layers.{name}.source is {told}; the layer is named after another, so leave it out"
            )
    fitted = [name for name, given in spec.items() if "weight" not in given]
    if fitted and len(fitted) < len(spec):
        given = next(name for name in spec if name not in fitted)
        raise InputError(f'{path}: {given} has a weight and {fitted[0]} has "fit"; give all layers a weight, or none')
    return spec


def _items(tables: Any) -> Sequence[tuple[str, Any]]:
    return list(tables.items()) if isinstance(tables, dict) else []


def _dimension(path: Path, layer: str, field: str, value: Any) -> Dimension | None:
    """One field's values; None where they are left to be measured or fitted."""
    where = f"{path}: layers.{layer}.{field}"
    if field not in KNOWN:
        raise InputError(f"{where} is not known; fields: {', '.join(KNOWN)}")
    if (field, value) == ("weight", "fit"):
        return None
    if isinstance(value, dict):
        if set(value) != {"low", "high"} or field in WORDS:
            raise InputError(
                f"{where} is {value}; give one value, a list" + (", or { low = …, high = … }" * (field not in WORDS))
            )
        low, high = (_checked(where, field, value[end]) for end in ("low", "high"))
        if not low <= high:
            raise InputError(f"{where} goes from {low} to {high}; low must not be above high")
        return Interval(low, high, whole=field in ("bins", "saturation"), log=field != "weight")
    values = value if isinstance(value, list) else [value]
    if not values:
        raise InputError(f"{where} is empty; give at least one value")
    return Choice(tuple(dict.fromkeys(_checked(where, field, v) for v in values)))


def _checked(where: str, field: str, value: Any) -> Any:
    """A value as the record of parameters takes it."""
    try:
        whole: dict[str, Any] = {"bins": 4, "saturation": 1, "alpha": 1.0, field: value}
        return getattr(LayerParams(**whole), field)
    except (ParamsError, TypeError) as error:
        raise InputError(f"{where}: {error}") from None
