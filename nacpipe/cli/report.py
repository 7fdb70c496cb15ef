"""`nacpipe report`: results, figures and provenance on one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from nacpipe.cli.evaluate import match_choices, score_baselines_named
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
    from nacpipe.errors import MissingExtra
    from nacpipe.evaluation.method_scores import evaluated_splits
    from nacpipe.evaluation.tables import tabulate
    from nacpipe.evaluation.training_runs import check_runs
    from nacpipe.files import check_writable, write_whole
    from nacpipe.scoring.params_file import find_params

    try:
        from nacpipe.reporting.figures import write_figure
        from nacpipe.reporting.report import draw_cache_report, read_cache_report, render_report
    except ModuleNotFoundError as error:
        raise MissingExtra(f"this needs {error.name}; install it with: pip install 'nacpipe[report]'") from None

    check_writable(output)
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
    opened = [open_cache(path) for path in caches]
    check_runs(opened)
    reports = []
    for cache, choice in zip(opened, match_choices(choices, len(opened)), strict=True):
        params = find_params(cache, choice, note)
        more = score_baselines_named(cache, baselines, evaluated_splits(cache))
        reports.append(read_cache_report(cache, params, more=more, choice=choice))
    frame = tabulate([report.run for report in reports])
    drawn = [draw_cache_report(report) for report in reports]
    write_whole(output, render_report(reports, frame, ctx.obj, drawn).encode())
    note(f"wrote {output}")
    if figures is not None:
        for number, groups in enumerate(drawn, 1):
            for group in groups.values():
                for name, figure in group.items():
                    write_figure(figures, name if len(drawn) == 1 else f"run{number}-{name}", figure)
        note(f"wrote {figures}")
