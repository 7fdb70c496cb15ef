"""`nacpipe report`: results, figures and provenance on one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from nacpipe.cli.evaluate import match_choices
from nacpipe.cli.output import Address, note, params_option, split_names


@click.command()
@click.argument("caches", metavar="CACHE…", nargs=-1, required=True, type=Address())
@click.option(
    "--output", required=True, metavar="FILE", type=click.Path(path_type=Path), help="The page: one HTML file."
)
@click.option(
    "--figures", metavar="DIR", type=click.Path(path_type=Path), help="Write every figure as SVG and PNG too."
)
@params_option
@click.option("--baselines", metavar="NAMES", callback=split_names, help="all, or some by name, as of evaluate.")
@click.pass_context
def report(
    ctx: click.Context,
    caches: tuple[str | Path, ...],
    output: Path,
    figures: Path | None,
    choices: tuple[str, ...],
    baselines: tuple[str, ...],
) -> None:
    """Write one page about CACHE: tables, scores, ROC curves, coverage, the search, and what made it.

    Several caches are training runs of one network: mean ± standard deviation, and a section for each. The page is one
    file that needs no network and no scripts; it can be printed.

    \b
    nacpipe report cache/digits-digits_cnn.zarr --output report.html
    nacpipe report cache/digits-digits_cnn.zarr --output report.html --figures figures
    nacpipe report cache/s0.zarr cache/s1.zarr cache/s2.zarr --output report.html
    """
    from nacpipe.cache import open_cache
    from nacpipe.files import check_writable
    from nacpipe.reporting.library import build_report

    check_writable(output)
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
    opened = [open_cache(path) for path in caches]
    made = build_report(opened, match_choices(choices, len(opened)), baselines, ctx.obj, note)
    made.save(output, figures)
    for path in (output, figures):
        if path is not None:
            note(f"wrote {path}")
