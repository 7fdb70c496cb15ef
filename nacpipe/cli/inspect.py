"""`nacpipe inspect`: what made a cache and what it holds."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nacpipe.cli.output import Address, format_bytes, note, percent, print_json, print_line, print_table, printable
from nacpipe.cli.text_plot import print_bars

if TYPE_CHECKING:
    import pandas as pd

    from nacpipe.cache import Cache
    from nacpipe.method.params import LayerParams, NacParams


@click.command()
@click.argument("cache", type=Address())
@click.argument("split", required=False)
@click.argument("layer", required=False)
@click.option("--params", "choice", metavar="FILE", help="Show states and coverage per bin too: a file, or published.")
@click.option("--alpha", type=float, help="Show the states sigmoid(alpha · product) too.")
@click.option("--compare", metavar="CACHE", type=Address(), help="Same images, other weights: compare.")
@click.option("--rows", type=click.IntRange(1), metavar="N", help="The N most and N least typical images, by score.")
@click.option(
    "--mosaic", metavar="FILE", type=click.Path(path_type=Path), help="A picture of the 25 highest and lowest scored."
)
@click.option("--benchmark", metavar="NAME", help="Of the images, a name or FILE.toml; default: as extracted.")
@click.option("--data-root", metavar="DIR", type=click.Path(path_type=Path), help="Of images; default: as extracted.")
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path), help="Draw the histograms: .svg or .png.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(
    cache: str | Path,
    split: str | None,
    layer: str | None,
    choice: str | None,
    alpha: float | None,
    compare: str | Path | None,
    rows: int | None,
    mosaic: Path | None,
    benchmark: str | None,
    data_root: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Print what made CACHE and what it holds; with SPLIT a row per layer, with LAYER the distribution of its values.

    \b
    nacpipe inspect cache/digits-digits_cnn.zarr
    nacpipe inspect cache/digits-digits_cnn.zarr id/val
    nacpipe inspect cache/digits-digits_cnn.zarr id/val avgpool --alpha 10 --plot avgpool.svg
    nacpipe inspect cache/digits-digits_cnn.zarr ood/near/letters --rows 5 --mosaic letters.png
    nacpipe inspect cache/s0.zarr id/val --compare cache/s1.zarr
    """
    from nacpipe.cache import open_cache
    from nacpipe.errors import InputError
    from nacpipe.files import check_writable

    if choice is not None and alpha is not None:
        raise click.UsageError("Give --params or --alpha, not both.")
    scores_images = rows is not None or mosaic is not None
    if compare is not None and (scores_images or choice is not None or alpha is not None):
        raise click.UsageError("--compare is for states; leave out --rows, --mosaic, --params and --alpha.")
    if scores_images and alpha is not None:
        raise click.UsageError("Scores need all parameters: --params, not --alpha.")
    if split is None and (scores_images or compare is not None):
        raise click.UsageError("Name a SPLIT for --rows, --mosaic and --compare.")
    if plot is not None and (split is None or layer is None or scores_images):
        raise click.UsageError("--plot draws a layer: name SPLIT and LAYER, and leave out --rows and --mosaic.")
    for path in (mosaic, plot):
        if path is not None and path.suffix not in (".png", *([".svg"] if path == plot else [])):
            raise InputError(f"{path}: a mosaic is written as .png, a plot as .png or .svg")
        if path is not None:
            check_writable(path)
    opened = open_cache(cache)
    if split is None:
        _inspect_cache(opened, as_json)
    elif scores_images:
        _inspect_rows(opened, split, layer, choice, rows, mosaic, (benchmark, data_root), as_json)
    elif compare is not None:
        _compare(opened, open_cache(compare), split, layer, plot, as_json)
    elif layer is None:
        _inspect_split(opened, split, choice, as_json)
    else:
        _inspect_layer(opened, split, layer, choice, alpha, plot, as_json)


def _inspect_cache(cache: Cache, as_json: bool) -> None:
    from nacpipe.evaluation.inspection import summarise_cache, summarise_splits

    frame, summary = summarise_splits(cache), summarise_cache(cache)
    if as_json:
        print_json({**summary, "splits": frame.to_dict("records")})
        return
    recorded = {**summary["identity"], **summary["information"]}
    recorded.pop("options", None)  # the command has them
    for key, value in {**recorded, "command": cache.command()}.items():
        print_line(f"{key:<13} {value if isinstance(value, str | int) else json.dumps(value)}")
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


def _inspect_split(cache: Cache, split: str, choice: str | None, as_json: bool) -> None:
    from nacpipe.evaluation.inspection import describe_layers, summarise_cache, summarise_splits
    from nacpipe.scoring.params_file import find_params

    frame = summarise_splits(cache, split)
    layers = None
    if frame["sealed"].all():
        layers = describe_layers(cache, split, None if choice is None else find_params(cache, choice, note))
    if as_json:
        states = None if layers is None else layers.to_dict("records")
        print_json({**summarise_cache(cache), "splits": frame.to_dict("records"), "states": states})
        return
    print_splits(frame)
    if layers is None:
        note(f"{split} is not finished; finish it with: {cache.command()}")
        return
    click.echo("")
    _print_layers(layers, states=choice is not None)


def _print_layers(layers: pd.DataFrame, states: bool) -> None:
    columns = ["layer", "neurons", "dead", "zeros %", "|product|", "alpha to try"]
    rows = [
        [
            row.layer, str(row.neurons), str(row.dead), f"{100 * row.zeros:.1f}", _number(row.size),
            f"{_number(row.alpha_low)} … {_number(row.alpha_high)}",
            *([_number(row.alpha), percent(row.flat, 1), percent(row.saturated, 1)] if states else []),
        ]
        for row in layers.itertuples()
    ]  # fmt: skip
    print_table(columns + ["alpha", "flat %", "saturated %"] * states, rows)
    click.echo(
        "\ndead: activation 0 in every row; |product|: the median where it is not 0"
        + "; flat, saturated: states near ½, near 0 or 1" * states
    )


def _inspect_layer(
    cache: Cache, split: str, layer: str, choice: str | None, alpha: float | None, plot: Path | None, as_json: bool
) -> None:
    from nacpipe.evaluation.inspection import inspect_layer
    from nacpipe.method.params import LayerParams
    from nacpipe.method.term import source_of
    from nacpipe.scoring.params_file import find_params
    from nacpipe.scoring.states import check_layers

    params = None
    check_layers(cache, [layer])  # both names are checked before anything is read
    cache[split]
    if choice is not None:
        params = _params_of(find_params(cache, choice), layer, choice)
    elif alpha is not None:
        params = LayerParams(bins=50, saturation=50, alpha=alpha, source=source_of(layer))
        note(f"coverage with {params.bins} bins and saturation {params.saturation}; others with --params FILE")
    tables = inspect_layer(cache, split, layer, params)
    if plot is not None:
        _plot(plot, {split: tables.histograms}, layer)
    if as_json:
        print_json(
            {
                "layer": tables.summary.to_dict("records")[0],
                "values": tables.values.to_dict("records"),
                "histograms": tables.histograms.to_dict("records"),
                "bins": None if tables.bins is None else tables.bins.to_dict("records"),
            }
        )
        return
    _print_layers(tables.summary, states=params is not None)
    click.echo("")
    _print_numbers(tables.values)
    for name, bars in tables.histograms.groupby("value", sort=False):
        click.echo(
            f"\n{name}"
            + ("" if name == "state" else ", 1st to 99th percentile; the first and last bar hold the others")
        )
        print_bars(bars["count"].tolist(), float(bars["from"].iloc[0]), float(bars["to"].iloc[-1]))
    if (bins := tables.bins) is not None:
        click.echo(
            f"\ncoverage from id/train, mean over neurons, of the {len(bins)} bins that are not empty (--json has all)"
        )
        print_bars(bins["coverage"].tolist(), float(bins["from"].iloc[0]), float(bins["to"].iloc[-1]), top=1.0)


def _params_of(params: NacParams, layer: str, choice: str | None) -> LayerParams:
    """Return a layer's parameters with weight 1, so that a layer of weight 0 can be scored alone."""
    from nacpipe.errors import ParamsError
    from nacpipe.method.term import layer_of

    if layer not in params.layers:
        file = "the parameter file" if choice is None else choice
        held = [name for name in params.layers if layer_of(name) == layer] or list(params.layers)
        raise ParamsError(f"{file} has no parameters for layer {layer!r}; it has {', '.join(held)}")
    return replace(params.layers[layer], weight=1.0)


def _inspect_rows(
    cache: Cache,
    split: str,
    layer: str | None,
    choice: str | None,
    rows: int | None,
    mosaic: Path | None,
    images: tuple[str | None, Path | None],  # --benchmark, --data-root
    as_json: bool,
) -> None:
    from nacpipe.cli.image_lookup import image_names, write_mosaic
    from nacpipe.evaluation.inspection import rank_rows
    from nacpipe.method.params import NacParams
    from nacpipe.scoring.params_file import find_params

    cache[split]
    params = find_params(cache, choice, note)
    if layer is not None:
        params = NacParams(layers={layer: _params_of(params, layer, choice)})
    ranked = rank_rows(cache, split, params)
    if rows is not None:
        shown = ranked if 2 * rows >= len(ranked) else ranked.iloc[[*range(rows), *range(-rows, 0)]]
        shown = shown.assign(image=image_names(cache, split, shown["index"].tolist(), *images))
        if as_json:
            print_json(shown.to_dict("records"))
        else:
            lines: list[list[str]] = [
                [row.image, f"{row.score:.6f}", str(row.row), str(row.label), str(row.predicted)]
                for row in shown.itertuples()
            ]
            if len(shown) < len(ranked):
                lines.insert(rows, [])
            print_table(("image", "score", "row", "label", "predicted"), lines)
    if mosaic is not None:
        write_mosaic(mosaic, cache, split, ranked, *images)
        note(f"wrote {mosaic}")


def _compare(cache: Cache, other: Cache, split: str, layer: str | None, plot: Path | None, as_json: bool) -> None:
    from nacpipe.evaluation.inspection import compare_splits, value_histograms
    from nacpipe.method.term import layer_of
    from nacpipe.scoring.states import check_layers

    for opened in (cache, other):
        if layer is not None:
            check_layers(opened, [layer])
    frame = compare_splits(cache, other, split)
    if layer is not None:
        frame = frame[frame["layer"] == layer_of(layer)]
        if frame.empty:
            raise click.UsageError("--compare is for the network's layers; leave out LAYER logits.")
    if plot is not None and layer is not None:
        _plot(plot, {opened.path: value_histograms(opened, split, layer) for opened in (cache, other)}, layer)
    if as_json:
        print_json({"agree": frame.attrs.get("agree"), "layers": frame.to_dict("records")})
        return
    pairs = (("dead", str), ("zeros", lambda share: percent(share, 1)), ("size", _number))
    rows = [
        [str(row["layer"]), *(f"{show(row[name])} / {show(row[f'{name}_other'])}" for name, show in pairs),
         _number(row["ratio"]), _number(row["alike"])]
        for _, row in frame.iterrows()
    ]  # fmt: skip
    print_table(("layer", "dead", "zeros %", "|product|", "ratio", "alike"), rows)
    click.echo(f"\n{printable(cache.path)} / {printable(other.path)}; ratio: the other's |product| over this one's")
    click.echo("alike: correlation of a neuron's activations over the images, mean over neurons")
    if (agree := frame.attrs.get("agree")) is not None:
        click.echo(f"both predict the same class for {percent(agree, 1)} % of the images")


def _plot(path: Path, histograms: dict[str, pd.DataFrame], title: str) -> None:
    from nacpipe.errors import MissingExtra
    from nacpipe.files import write_whole

    try:
        from nacpipe.reporting.figures import draw_values, to_png, to_svg
    except ModuleNotFoundError as error:
        raise MissingExtra(f"--plot needs {error.name}; install it with: pip install 'nacpipe[report]'") from None
    write_whole(path, (to_svg if path.suffix == ".svg" else to_png)(draw_values(histograms, title)))
    note(f"wrote {path}")


def _print_numbers(frame: pd.DataFrame) -> None:
    rows = [[v if isinstance(v, str) else f"{v:.4g}" for v in row] for row in frame.itertuples(index=False)]
    print_table(list(frame.columns), rows)


def _number(value: Any) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"
