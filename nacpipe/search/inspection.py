"""Looking at a cache: what made it, what it holds, and how a layer's states are distributed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nacpipe.cache import Cache
from nacpipe.core.coverage import bin_edges, coverage_table
from nacpipe.core.params import LayerParams
from nacpipe.search.scoring import Coverage

QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


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
    opened = cache[split]
    opened[layer]  # refuses a layer that is not there
    activation, gradient = opened.read(f"{layer}/activation"), opened.read(f"{layer}/gradient")
    with np.errstate(over="ignore", invalid="ignore"):  # a look at infinities is what this is for
        values = {"activation": activation, "gradient": gradient, "product": activation * gradient}
        if params is not None:
            values["state"] = 1.0 / (1.0 + np.exp(-params.alpha * values[params.source].astype(np.float64)))
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


def describe_bins(coverage: Coverage, layer: str) -> pd.DataFrame:
    """Return one row per bin of a layer that any training sample fell in.

    Columns: bin, from and to (states), count (training samples, mean over neurons), coverage (mean over neurons),
    neurons (share whose bin is not empty).
    """
    fitted = coverage.layers[layer]
    edges = bin_edges(fitted.params.bins, fitted.params.edges)
    counts: NDArray[np.int32] = fitted.counts
    table = coverage_table(counts, fitted.params.saturation)
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
