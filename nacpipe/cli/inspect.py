"""`nacpipe inspect`: what a cache holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nacpipe.cli.show import format_bytes, note, print_json, print_table, say

if TYPE_CHECKING:
    import pandas as pd

    from nacpipe.cache import Cache

SHOWN_BINS = 40  # lines a person reads


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("split", required=False)
@click.argument("layer", required=False)
@click.option("--params", "choice", metavar="FILE", help="Show states and coverage per bin too: a file, or published.")
@click.option("--alpha", type=float, help="Show the states sigmoid(alpha · product) too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(
    cache: Path, split: str | None, layer: str | None, choice: str | None, alpha: float | None, as_json: bool
) -> None:
    """Print what made CACHE and what it holds; with SPLIT and LAYER, how the states are distributed.

    \b
    nacpipe inspect cache/digits-digits_cnn.zarr
    nacpipe inspect cache/digits-digits_cnn.zarr id/val
    nacpipe inspect cache/digits-digits_cnn.zarr id/val avgpool --alpha 10
    """
    from nacpipe.cache import open_cache
    from nacpipe.search.inspection import summarise_cache, summarise_splits

    opened = open_cache(cache)
    if choice is not None and alpha is not None:
        raise click.UsageError("Give --params or --alpha, not both.")
    if layer is not None and split is not None:
        _inspect_layer(opened, split, layer, choice, alpha, as_json)
        return
    frame, summary = summarise_splits(opened, split), summarise_cache(opened)
    if as_json:
        print_json({**summary, "splits": frame.to_dict("records")})
        return
    for key, value in (summary["identity"] | summary["information"]).items():
        say(f"{key:<13} {value if isinstance(value, str | int) else json.dumps(value)}")
    click.echo("")
    print_table(
        ("layer", "module", "pooling", "neurons"),
        [(s["name"], s["path"], s["pooling"], str(s["neurons"])) for s in summary["layers"]],
        left=3,
    )
    click.echo("")
    print_splits(frame)


def print_splits(frame: pd.DataFrame) -> None:
    """Print one line per split."""
    rows = [
        (r.split, str(r.rows), str(r.done), "yes" if r.sealed else "no", format_bytes(int(r.raw_bytes)),
         format_bytes(int(r.stored_bytes)))
        for r in frame.itertuples()
    ]  # fmt: skip
    print_table(("split", "rows", "done", "sealed", "raw", "stored"), rows)


def _inspect_layer(
    cache: Cache, split: str, layer: str, choice: str | None, alpha: float | None, as_json: bool
) -> None:
    from nacpipe.core.params import LayerParams, NacParams
    from nacpipe.errors import ParamsError
    from nacpipe.search.evaluate import find_params
    from nacpipe.search.inspection import describe_bins, describe_layer
    from nacpipe.search.scoring import fit_coverage

    params = bins = None
    cache[split][layer]  # both names are checked before anything is read
    if choice is not None:
        given = find_params(cache, choice)
        if layer not in given.layers:
            raise ParamsError(f"{choice} has no parameters for layer {layer!r}; it has {', '.join(given.layers)}")
        params = replace(given.layers[layer], weight=1.0)  # a layer of weight 0 can be looked at too
    elif alpha is not None:
        params = LayerParams(bins=50, saturation=50, alpha=alpha)
        note(f"coverage with {params.bins} bins and saturation {params.saturation}; others with --params FILE")
    if params is not None:
        bins = describe_bins(fit_coverage(cache, NacParams(layers={layer: params})), layer)
    values = describe_layer(cache, split, layer, params)
    if as_json:
        print_json({"values": values.to_dict("records"), "bins": None if bins is None else bins.to_dict("records")})
        return
    _print_numbers(values)
    if bins is not None:
        click.echo("\ncoverage built from id/train: states per bin, means over neurons")
        fullest = bins.nlargest(SHOWN_BINS, "count").sort_values("bin")
        _print_numbers(fullest)
        if len(bins) > SHOWN_BINS:
            note(f"the {SHOWN_BINS} fullest of {len(bins)} bins that hold any; --json has all")


def _print_numbers(frame: pd.DataFrame) -> None:
    rows = [[v if isinstance(v, str) else f"{v:.4g}" for v in row] for row in frame.itertuples(index=False)]
    print_table(list(frame.columns), rows)
