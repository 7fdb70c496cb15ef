"""Tables about a cache: what made it, what it holds, how its states are distributed, which images are typical."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nacpipe.cache import Cache
from nacpipe.errors import IdentityError, ValuesError
from nacpipe.method.coverage import bin_edges, select_source
from nacpipe.method.fitted_term import FittedTerm, find_components, fit_term
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.sorted_index import index_columns
from nacpipe.method.term import Source, layer_of, source_of, view_of
from nacpipe.scoring.alpha_range import measure_alpha
from nacpipe.scoring.coverage import Coverage, fit_coverage
from nacpipe.scoring.states import PIECE, check_layers, has_classes, held_sources, read_states

QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
HISTOGRAM_BINS = 64
Values = NDArray[np.floating]  # (rows, neurons)


def summarise_cache(cache: Cache) -> dict[str, Any]:
    """Return provenance and layers as JSON values; `summarise_splits` has the splits."""
    header = cache.header
    return {
        "path": cache.path,
        "identity": dict(header.identity),
        "information": dict(header.information),
        "block_rows": header.block_rows,
        "classes": header.classes,
        "features": header.features,
        "layers": [{"name": s.name, "path": s.path, "pooling": s.pooling, "neurons": s.neurons} for s in header.layers],
    }


def summarise_splits(cache: Cache, only: str | None = None) -> pd.DataFrame:
    """Return one row per split: split, rows, done (rows in marked blocks), sealed, raw_bytes, stored_bytes, list."""
    rows = []
    for name in [only] if only else list(cache):
        split = cache.peek(name)
        marks = split.marks()
        last = split.rows - (marks.size - 1) * cache.header.block_rows if marks.size else 0
        sizes = np.full(marks.size, cache.header.block_rows)
        sizes[-1:] = last
        rows.append(
            {
                "split": name,
                "rows": split.rows,
                "done": int(sizes[marks].sum()),
                "sealed": split.sealed,
                "raw_bytes": split.rows * cache.header.row_bytes(),
                "stored_bytes": split.stored_bytes(),
                "list": split.images.get("list", ""),
            }
        )
    return pd.DataFrame(rows, columns=["split", "rows", "done", "sealed", "raw_bytes", "stored_bytes", "list"])


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInspection:
    """Everything that `nacpipe inspect CACHE SPLIT LAYER` shows of a layer, from one read of each array."""

    summary: pd.DataFrame
    """`describe_layers`' row of the layer."""
    values: pd.DataFrame
    """`describe_layer`'s frame."""
    histograms: pd.DataFrame
    """`value_histograms`' frame."""
    bins: pd.DataFrame | None
    """`describe_bins`' frame; None without parameters."""


def inspect_layer(cache: Cache, split: str, layer: str, params: LayerParams | None = None) -> LayerInspection:
    """Return all tables of one layer of a split.

    Args:
        cache: the cache.
        split: the split's name.
        layer: a layer, or a layer's source such as `layer3:gradient`.
        params: of the layer, for its states and coverage.

    Raises:
        ParamsError: the layer is not in the cache.
        InputError: the split is not in the cache.
        CacheError: the split, or with parameters id/train, is not there or not finished.
    """
    check_layers(cache, [layer])
    values = _read_values(cache, split, layer)
    if params is not None:
        cache["id/train"]  # refuses a cache without it: there would be no coverage
    sources = {source_of(layer)} | ({params.source} if params is not None else set())
    training = _read_training(cache, split, layer, sources, values)
    row = _layer_row(layer, values, training, params)
    if params is not None:
        values["state"] = _states(values, params)
    return LayerInspection(
        summary=pd.DataFrame([row]),
        values=_distributions(values),
        histograms=_histograms(values, HISTOGRAM_BINS),
        bins=None if params is None else _layer_bins(cache, layer, params, training),
    )


def describe_layer(cache: Cache, split: str, layer: str, params: LayerParams | None = None) -> pd.DataFrame:
    """Return the distribution of a layer's activation, gradient and product over all samples and neurons of a split.

    Columns: value, zeros (share), nan (count, infinities too), then quantiles q0 … q100. With parameters a row for the
    states themselves, sigmoid(alpha · source), too.
    """
    return _distributions(_values_and_states(cache, split, layer, params))


def _distributions(values: Mapping[str, Values]) -> pd.DataFrame:
    rows = []
    for name, array in values.items():
        finite = array[np.isfinite(array)]
        quantiles = np.quantile(finite, QUANTILES) if finite.size else np.full(len(QUANTILES), np.nan)
        rows.append(
            {
                "value": name,
                "zeros": float((array == 0).mean()),
                "nan": int(array.size - finite.size),
                **{f"q{100 * q:g}": float(x) for q, x in zip(QUANTILES, quantiles, strict=True)},
            }
        )
    return pd.DataFrame(rows)


def _values_and_states(cache: Cache, split: str, layer: str, params: LayerParams | None) -> dict[str, Values]:
    """The values of `_read_values`, and with parameters the states; the layer is checked first."""
    check_layers(cache, [layer])
    values = _read_values(cache, split, layer)
    return values if params is None else {**values, "state": _states(values, params)}


def _read_values(cache: Cache, split: str, layer: str) -> dict[str, Values]:
    """Activation, gradient and product of all samples and neurons, (rows, neurons) each; those that the cache has."""
    if held_sources(cache, layer_of(layer)) == ("activation",):
        activation, _ = read_states(cache[split], layer, "activation")
        assert activation is not None
        return {"activation": activation}
    activation, gradient = read_states(cache[split], layer)
    assert activation is not None
    assert gradient is not None
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are shown, not refused
        return {"activation": activation, "gradient": gradient, "product": activation * gradient}


def _states(values: Mapping[str, Values], params: LayerParams) -> Values:
    with np.errstate(over="ignore", invalid="ignore"):
        states: Values = 1.0 / (1.0 + np.exp(-params.alpha * values[params.source].astype(np.float64)))
    return states


def _read_training(
    cache: Cache, split: str, layer: str, sources: Set[Source], values: Mapping[str, Values]
) -> dict[Source, Values]:
    """Source → its values in id/train, (samples, neurons); empty where id/train has none.

    Args:
        cache: the cache.
        split: the split that was read already.
        layer: the layer.
        sources: what to return.
        values: that split's; they are those of id/train where it is that split.
    """
    if "id/train" not in cache or not cache.peek("id/train").sealed:
        return {}
    if not (sources := sources & set(held_sources(cache, layer_of(layer)))):
        return {}
    if split == "id/train":
        return {source: values[source] for source in sources}
    training, needed = cache["id/train"], next(iter(sources)) if len(sources) == 1 else "product"
    parts: dict[Source, list[Values]] = {source: [] for source in sources}
    for rows in training.row_slices(PIECE):  # a product's two arrays are never held whole
        try:
            activation, gradient = read_states(training, layer, needed, rows)
        except ValuesError:  # logits that are no numbers
            return {}
        with np.errstate(over="ignore", invalid="ignore"):
            for source in sources:
                parts[source].append(select_source(activation, gradient, source))  # type: ignore[arg-type]
    return {source: np.concatenate(pieces) for source, pieces in parts.items()}


def _layer_bins(cache: Cache, layer: str, params: LayerParams, training: Mapping[Source, Values]) -> pd.DataFrame:
    """`describe_bins` of one term, counted from the values that were read already; by class they are read again."""
    if view_of(layer) == "by_class":
        return describe_bins(fit_coverage(cache, NacParams(layers={layer: params})), layer)
    values = training.get(params.source)
    if values is None or not np.isfinite(values).all():
        raise ValuesError(
            f"layer {layer_of(layer)!r}, split id/train: NaN or infinity among the values of {params.source}; extract"
            f" the split again with {cache.peek('id/train').redo_option}"
        )
    return _bins(fit_term(layer, params, values.astype(np.float32, copy=False)))


def describe_bins(coverage: Coverage, layer: str) -> pd.DataFrame:
    """Return one row per bin of a layer that any training sample fell in.

    Columns: bin, from and to (states), count (training samples, mean over neurons), coverage (mean over neurons),
    neurons (share whose bin is not empty). Of a term by class, counts are of all groups together and coverage is the
    mean of theirs.
    """
    return _bins(coverage.layers[layer])


def _bins(fitted: FittedTerm) -> pd.DataFrame:
    edges = bin_edges(fitted.params.bins, fitted.params.edges)
    counts, table = fitted.counts, fitted.coverage
    frame = pd.DataFrame(
        {
            "bin": np.arange(counts.shape[1]),
            "from": edges[:-1],
            "to": edges[1:],
            "count": counts.mean(axis=0),
            "coverage": table.mean(axis=0),
            "neurons": (counts > 0).mean(axis=0),
        }
    )
    return frame[frame["count"] > 0].reset_index(drop=True)


def describe_layers(cache: Cache, split: str, params: NacParams | None = None, only: str | None = None) -> pd.DataFrame:
    """Return one row per layer, or of one layer alone: dead neurons, zeros, a range of alpha, and saturated states.

    A layer that the parameters hold in several terms has a row for each, `layer3:gradient`; alpha, flat and saturated
    of a term of components are of its components.

    Columns: layer, neurons, dead (neurons whose activation is 0 for every sample), zeros (share of products that are
    0), size (median |product| of those that are not), alpha_low and alpha_high (the range that `search` takes, from
    id/train). With parameters, of the layers they name: alpha, flat (share of states of non-zero sources within 0.01
    of ½) and saturated (share within 0.01 of 0 or 1). A value is NaN where the source is 0 everywhere or the cache has
    no id/train.
    """
    opened = cache[split]
    held = params.layers if params is not None else {}
    rows = []
    for layer in [layer_of(only)] if only else list(opened):
        usual = layer if "product" in held_sources(cache, layer) else f"{layer}:activation"
        terms = [only] if only else [term for term in held if layer_of(term) == layer] or [usual]
        values = _read_values(cache, split, layer)
        training = _read_training(cache, split, layer, {source_of(term) for term in terms}, values)
        rows += [_layer_row(term, values, training, held.get(term)) for term in terms]
    return pd.DataFrame(rows)


def _layer_row(
    term: str,
    values: Mapping[str, Values],
    training: Mapping[Source, Values],
    params: LayerParams | None,
) -> dict[str, Any]:
    """One row of `describe_layers`."""
    low, high = _alpha_range(term, training)
    row = {**_sizes(values), "alpha_low": low, "alpha_high": high}
    alpha = flat = saturated = math.nan
    if params is not None:
        alpha, source = params.alpha, values[params.source]
        if view_of(term) == "components" and params.source in training:
            components = find_components(term, training[params.source].astype(np.float32, copy=False))
            source = components.project(source.astype(np.float32, copy=False))
        flat, saturated = state_shares(source, alpha)
    return {"layer": term, **row, "alpha": alpha, "flat": flat, "saturated": saturated}


def _sizes(values: Mapping[str, Values]) -> dict[str, Any]:
    """Neurons, dead neurons, the share of products (without gradients: activations) that are 0, the others' median."""
    product = values.get("product", values["activation"])
    size = np.abs(product[np.isfinite(product) & (product != 0)])
    return {
        "neurons": product.shape[1],
        "dead": dead_neurons(values["activation"]).size,
        "zeros": float((product == 0).mean()),
        "size": float(np.median(size)) if size.size else math.nan,
    }


def dead_neurons(activation: NDArray[np.floating]) -> NDArray[np.int64]:  # (rows, neurons)
    """Return the neurons whose activation is 0 for every sample, ascending."""
    return np.flatnonzero((activation == 0).all(axis=0)).astype(np.int64)


def state_shares(source: NDArray[np.floating], alpha: float) -> tuple[float, float]:
    """Return the shares of states within 0.01 of ½ and within 0.01 of 0 or 1, among finite sources that are not 0."""
    nonzero = source[np.isfinite(source) & (source != 0)].astype(np.float64)
    if nonzero.size == 0:
        return math.nan, math.nan
    away = np.abs(alpha * nonzero)  # sigmoid(away) is as far from ½ as the state
    flat, saturated = (math.log(state / (1 - state)) for state in (0.51, 0.99))
    return float((away < flat).mean()), float((away > saturated).mean())


def suggest_alpha(cache: Cache, layer: str) -> tuple[float, float]:
    """Return the range of alpha that `search` takes for a layer; NaN where id/train is not there or all 0."""
    return _alpha_range(layer, _read_training(cache, "", layer, {source_of(layer)}, {}))


def _alpha_range(term: str, training: Mapping[Source, Values]) -> tuple[float, float]:
    """The range of alpha of a term, given its training values; NaN where there are none, or all are 0."""
    source = source_of(term)
    values = training.get(source)
    if values is None or not np.isfinite(values).all():
        return math.nan, math.nan
    columns = values.astype(np.float32, copy=False)
    try:
        if view_of(term) == "components":
            columns = find_components(term, columns).project(columns)
        return measure_alpha(term, source, index_columns(columns, columns[:0]))  # nothing is scored
    except ValuesError:
        return math.nan, math.nan


def value_histograms(
    cache: Cache, split: str, layer: str, params: LayerParams | None = None, bins: int = HISTOGRAM_BINS
) -> pd.DataFrame:
    """Return a histogram of each of a layer's values: value, from, to, count; rows of equal width per value.

    Rows cover the 1st to the 99th percentile; `count` of the first and of the last row includes the values beyond.
    Rows of states cover 0 … 1.
    """
    return _histograms(_values_and_states(cache, split, layer, params), bins)


def _histograms(values: Mapping[str, Values], bins: int) -> pd.DataFrame:
    rows = []
    for name, array in values.items():
        finite = array[np.isfinite(array)].astype(np.float64)
        if finite.size == 0:
            continue
        low, high = (0.0, 1.0) if name == "state" else np.quantile(finite, [0.01, 0.99]).tolist()
        if high <= low:
            low, high = low - 0.5, high + 0.5
        counts, edges = np.histogram(np.clip(finite, low, high), bins, (low, high))
        rows += [
            {"value": name, "from": a, "to": b, "count": int(n)}
            for a, b, n in zip(edges[:-1].tolist(), edges[1:].tolist(), counts, strict=True)
        ]
    return pd.DataFrame(rows, columns=["value", "from", "to", "count"])


def compare_splits(cache: Cache, other: Cache, split: str) -> pd.DataFrame:
    """Return, per layer that both caches hold, how the same images look to two networks.

    Columns: layer; neurons, dead, zeros, size (median |product| that is not 0) and the same of the other cache with
    `_other`; ratio (size_other / size: an alpha found on one is divided by it for the other); alike (mean over neurons
    of the correlation over images of the two activations: 1 for the same weights, about 0 for networks that were
    trained apart; NaN where the neurons differ in number). `attrs["agree"]` is the share of images for which both have
    the same largest logit.

    Raises:
        IdentityError: the split was made from other images.
    """
    ours, theirs = cache[split], other[split]
    same = ours.rows == theirs.rows and bool((ours.index == theirs.index).all())
    if not same or ours.images.get("sha256") != theirs.images.get("sha256"):
        raise IdentityError(
            f"{split} of {cache.path} and of {other.path} hold other images ({ours.images.get('list')},"
            f" {theirs.images.get('list')}); compare caches of the same benchmark"
        )
    rows = []
    for layer in [name for name in ours if name in theirs]:
        values, other_values = _read_values(cache, split, layer), _read_values(other, split, layer)
        if values.keys() != other_values.keys():  # one has no gradients: activations are beside activations
            values, other_values = ({"activation": both["activation"]} for both in (values, other_values))
        sizes, other_sizes = _sizes(values), _sizes(other_values)
        rows.append(
            {
                "layer": layer,
                **sizes,
                **{f"{name}_other": value for name, value in other_sizes.items()},
                "ratio": other_sizes["size"] / sizes["size"],
                "alike": _correlation(values["activation"], other_values["activation"]),
            }
        )
    columns = ["neurons", "dead", "zeros", "size"]
    columns = ["layer", *columns, *(f"{name}_other" for name in columns), "ratio", "alike"]
    frame = pd.DataFrame(rows, columns=columns)
    if has_classes(cache) and has_classes(other):
        choices = [view.read("logits").argmax(axis=1) for view in (ours, theirs)]
        frame.attrs["agree"] = float((choices[0] == choices[1]).mean())
    return frame


def _correlation(first: Values, second: Values) -> float:
    """The mean over neurons of the correlation over rows; neurons without any spread on a side are left out."""
    if first.shape != second.shape:
        return math.nan
    a, b = (x.astype(np.float64) - x.mean(axis=0, dtype=np.float64) for x in (first, second))
    spread = np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    varies = spread > 0
    return float(((a * b).sum(axis=0)[varies] / spread[varies]).mean()) if varies.any() else math.nan


def rank_rows(cache: Cache, split: str, params: NacParams) -> pd.DataFrame:
    """Return a split's samples, the most typical first: score, row, index (in the image list), label, predicted.

    Equal scores keep the split's order. `predicted` is the largest logit's class, −1 where the network gives none.
    """
    opened = cache[split]
    scores = fit_coverage(cache, params).score(opened)
    order = np.argsort(-scores, kind="stable")
    predicted = opened.read("logits").argmax(axis=1) if has_classes(cache) else np.full(opened.rows, -1)
    columns = {"score": scores, "row": np.arange(opened.rows), "index": opened.index, "label": opened.label}
    return pd.DataFrame({name: values[order] for name, values in {**columns, "predicted": predicted}.items()})
