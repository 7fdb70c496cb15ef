"""`nacpipe evaluate`: how well NAC and the baselines tell ID from OOD."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nacpipe.cli.show import note, output_options, print_frame, print_table

if TYPE_CHECKING:
    import pandas as pd

_TITLES = {"ood": "OOD: ID is id/test", "fsood": "FS-OOD: ID is id/test and csid together"}


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.option(
    "--params", "choice", metavar="FILE", help="A file, or published; default: what search left beside X.zarr."
)
@output_options
def evaluate(cache: Path, choice: str | None, output: str | None) -> None:
    """Print FPR@95, AUROC, AUPR-IN and AUPR-OUT for every OOD set in CACHE, NAC beside MSP, MaxLogit and Energy.

    On a terminal in percent; as JSON, CSV and Markdown in fractions.

    \b
    nacpipe evaluate cache/digits-digits_cnn.zarr
    nacpipe evaluate cache/cifar10-resnet20.zarr --params published --json
    """
    from nacpipe.cache import open_cache
    from nacpipe.search.evaluate import evaluate as evaluate_cache
    from nacpipe.search.evaluate import find_params

    opened = open_cache(cache)
    frame = evaluate_cache(opened, find_params(opened, choice, note))
    if "note" in frame.attrs:
        note(frame.attrs["note"])
    if output:
        print_frame(frame, output)
    else:
        print_evaluation(frame)


def print_evaluation(frame: pd.DataFrame) -> None:
    """Print one table per task, in percent, and how NAC compares with the best baseline."""
    for number, (task, rows) in enumerate(frame.groupby("task", sort=False)):
        first = rows.iloc[0]
        click.echo(
            ("\n" if number else "")
            + f"{_TITLES[str(task)]} ({first['n_id']} images, accuracy {_percent(first['accuracy'])} %); all in percent"
        )
        lines: list[tuple[str, ...]] = []
        for (group, dataset), block in rows.groupby(["group", "dataset"], sort=False):
            lines.append(())
            for place, row in enumerate(block.itertuples()):
                lines.append(
                    (
                        f"{group} {dataset}" if place == 0 else "",
                        str(row.method),
                        *(_percent(value) for value in (row.fpr95, row.auroc, row.aupr_in, row.aupr_out)),
                        str(row.n_ood),
                    )
                )
        print_table(("set", "method", "FPR@95", "AUROC", "AUPR-IN", "AUPR-OUT", "images"), lines, left=2)


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.2f}"
