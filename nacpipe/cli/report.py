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
@click.option(
    "--mosaic", metavar="FILE", type=click.Path(path_type=Path), help="A picture of each set's worst mistakes: .png."
)
@params_option
@click.option("--baselines", metavar="NAMES", callback=split_names, help="all, or some by name, as of evaluate.")
@click.option("--benchmark", metavar="NAME", help="Of the images, a name or FILE.toml; default: as extracted.")
@click.option("--data-root", metavar="DIR", type=click.Path(path_type=Path), help="Of images; default: as extracted.")
@click.pass_context
def report(
    ctx: click.Context,
    caches: tuple[str | Path, ...],
    output: Path,
    figures: Path | None,
    mosaic: Path | None,
    choices: tuple[str, ...],
    baselines: tuple[str, ...],
    benchmark: str | None,
    data_root: Path | None,
) -> None:
    """Write one page about CACHE: tables, worst mistakes, scores, ROC curves, coverage, the search, what made it.

    Mistakes are shown as images where these are still where they were extracted from. Several caches are training runs
    of one network: mean ± standard deviation, and a section for each. The page is one file that needs no network and no
    scripts; it can be printed.

    \b
    nacpipe report cache/digits-digits_cnn.zarr --output report.html
    nacpipe report cache/digits-digits_cnn.zarr --output report.html --figures figures
    nacpipe report cache/digits-digits_cnn.zarr --output report.html --mosaic mistakes.png
    nacpipe report cache/s0.zarr cache/s1.zarr cache/s2.zarr --output report.html
    """
    from nacpipe.cache import open_cache
    from nacpipe.errors import ImageError, InputError
    from nacpipe.files import check_writable
    from nacpipe.reporting.library import build_report

    if mosaic is not None and mosaic.suffix != ".png":
        raise InputError(f"{mosaic}: a mosaic is written as .png")
    for path in (output, mosaic):
        if path is not None:
            check_writable(path)
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
    opened = [open_cache(path) for path in caches]
    made = build_report(
        opened,
        match_choices(choices, len(opened)),
        baselines,
        ctx.obj,
        note,
        (benchmark, data_root),
    )
    made.save(output, figures)
    for path in (output, figures):
        if path is not None:
            note(f"wrote {path}")
    if mosaic is not None:
        from nacpipe.reporting.galleries import draw_mistakes

        shown = [gallery for found in made.galleries if not isinstance(found, str) for gallery in found]
        if not shown:
            raise ImageError(f"no mosaic was written: {made.galleries[0]}")
        draw_mistakes(shown).save(mosaic)
        note(f"wrote {mosaic}")
