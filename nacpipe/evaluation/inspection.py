"""Looking at a cache: what made it, what it holds, how its states are distributed, and which images are typical."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nacpipe.cache import Cache
from nacpipe.errors import IdentityError, ValuesError
from nacpipe.method.coverage import bin_edges, layer_of, source_of
from nacpipe.method.fitted_term import find_components
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.term import view_of
from nacpipe.scoring.alpha_range import measure_alpha
from nacpipe.scoring.coverage import Coverage, fit_coverage
from nacpipe.scoring.states import check_layers, has_classes, read_layer, read_states
from nacpipe.scoring.trial_scorer import index_from

QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
HISTOGRAM_BINS = 64


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


def describe_layer(cache: Cache, split: str, layer: str, params: LayerParams | None = None) -> pd.DataFrame:
    """Return the distribution of a layer's activation, gradient and product over all samples and neurons of a split.

    Columns: value, zeros (share), nan (count, infinities too), then quantiles q0 … q100. With parameters a row for the
    states themselves, sigmoid(alpha · source), too.
    """
    check_layers(cache, [layer])
    cache[split]  # refuses a split that is not there
    values = _read_values(cache, split, layer, params)
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


def _read_values(
    cache: Cache, split: str, layer: str, params: LayerParams | None = None
) -> dict[str, NDArray[np.floating]]:
    """Activation, gradient, product, and with parameters the states of all samples and neurons, (rows, neurons)."""
    activation, gradient = read_states(cache[split], layer)
    assert activation is not None
    assert gradient is not None
    with np.errstate(over="ignore", invalid="ignore"):  # a look at infinities is what this is for
        values: dict[str, NDArray[np.floating]] = {"activation": activation, "gradient": gradient}
        values["product"] = activation * gradient
        if params is not None:
            values["state"] = 1.0 / (1.0 + np.exp(-params.alpha * values[params.source].astype(np.float64)))
    return values


def describe_bins(coverage: Coverage, layer: str) -> pd.DataFrame:
    """Return one row per bin of a layer that any training sample fell in.

    Columns: bin, from and to (states), count (training samples, mean over neurons), coverage (mean over neurons),
    neurons (share whose bin is not empty). Of a term by class, counts are of all groups together and coverage is the
    mean of theirs.
    """
    fitted = coverage.layers[layer]
    edges = bin_edges(fitted.params.bins, fitted.params.edges)
    counts: NDArray[np.int32] = fitted.counts
    table = fitted.coverage
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
    """Return one row per layer, or of one layer alone: what is dead, what is saturated, and which alphas make sense.

    A layer that the parameters hold in several terms has a row for each, `layer3:gradient`; alpha, flat and saturated
    of a term of components are of its components.

    Columns: layer, neurons, dead (neurons whose activation is 0 for every sample), zeros (share of products that are
    0), size (median |product| of those that are not), alpha_low and alpha_high (the range that `search` takes, from
    id/train). With parameters, of the layers they name: alpha, flat (share of states of non-zero sources within 0.01
    of ½: the bins there tell nothing apart) and saturated (share within 0.01 of 0 or 1). Layers that have no value are
    NaN: a source of zeros, or a cache without id/train.
    """
    opened = cache[split]
    rows = []
    terms = list(params.layers) if params is not None else []
    names = [[term for term in terms if layer_of(term) == name] or [name] for name in opened]
    for name in [only] if only else chain.from_iterable(names):
        values = _read_values(cache, split, name)
        product = values["product"]
        size = np.abs(product[np.isfinite(product) & (product != 0)])
        low, high = suggest_alpha(cache, name)
        row = {
            "layer": name,
            "neurons": product.shape[1],
            "dead": dead_neurons(values["activation"]).size,
            "zeros": float((product == 0).mean()),
            "size": float(np.median(size)) if size.size else math.nan,
            "alpha_low": low,
            "alpha_high": high,
            "alpha": math.nan,
            "flat": math.nan,
            "saturated": math.nan,
        }
        if params is not None and name in params.layers:
            layer = params.layers[name]
            source = values[layer.source]
            if view_of(name) == "components":
                train = read_layer([cache["id/train"]], name, layer.source)
                source = find_components(name, train).project(np.asarray(source, np.float32))
            flat, saturated = state_shares(source, layer.alpha)
            row |= {"alpha": layer.alpha, "flat": flat, "saturated": saturated}
        rows.append(row)
    return pd.DataFrame(rows)


def dead_neurons(activation: NDArray[np.float32]) -> NDArray[np.int64]:  # (rows, neurons)
    """Return the neurons whose activation is 0 for every sample, ascending."""
    return np.flatnonzero((activation == 0).all(axis=0)).astype(np.int64)


def state_shares(source: NDArray[np.float32], alpha: float) -> tuple[float, float]:
    """Return the shares of states within 0.01 of ½ and within 0.01 of 0 or 1, among finite sources that are not 0."""
    told = source[np.isfinite(source) & (source != 0)].astype(np.float64)
    if told.size == 0:
        return math.nan, math.nan
    away = np.abs(alpha * told)  # sigmoid(away) is as far from ½ as the state
    flat, saturated = (math.log(state / (1 - state)) for state in (0.51, 0.99))
    return float((away < flat).mean()), float((away > saturated).mean())


def suggest_alpha(cache: Cache, layer: str) -> tuple[float, float]:
    """Return the range of alpha that `search` takes for a layer; NaN where id/train is not there or all 0."""
    if "id/train" not in cache or not cache.peek("id/train").sealed:
        return math.nan, math.nan
    try:
        return measure_alpha(layer, source_of(layer), index_from(cache, ["id/train"])(layer, source_of(layer)))
    except ValuesError:
        return math.nan, math.nan


def value_histograms(
    cache: Cache, split: str, layer: str, params: LayerParams | None = None, bins: int = HISTOGRAM_BINS
) -> pd.DataFrame:
    """Return how a layer's values are spread: value, from, to, count; rows of equal width per value.

    From the 1st to the 99th percentile, so that one outlier does not press all others into one bar; `count` of the
    first and last bar holds what lies beyond. States are over all of 0 … 1.
    """
    check_layers(cache, [layer])
    cache[split]
    rows = []
    for name, array in _read_values(cache, split, layer, params).items():
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
    described = [describe_layers(one, split).set_index("layer") for one in (cache, other)]
    columns = ["neurons", "dead", "zeros", "size"]
    frame = described[0][columns].join(described[1][columns].add_suffix("_other"), how="inner")
    frame["ratio"] = frame["size_other"] / frame["size"]
    frame["alike"] = [
        _correlation(ours.read(f"{layer}/activation"), theirs.read(f"{layer}/activation")) for layer in frame.index
    ]
    frame = frame.reset_index()
    if has_classes(cache) and has_classes(other):
        choices = [view.read("logits").argmax(axis=1) for view in (ours, theirs)]
        frame.attrs["agree"] = float((choices[0] == choices[1]).mean())
    return frame


def _correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """The mean over neurons of the correlation over rows; neurons without any spread on a side are left out."""
    if first.shape != second.shape:
        return math.nan
    a, b = (x.astype(np.float64) - x.mean(axis=0, dtype=np.float64) for x in (first, second))
    spread = np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    told = spread > 0
    return float(((a * b).sum(axis=0)[told] / spread[told]).mean()) if told.any() else math.nan


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
