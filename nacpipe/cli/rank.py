"""`nacpipe rank`: the checkpoints of a training run by covered area (NAC-ME)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nacpipe.cli.output import Address, note, percent, print_frame, print_json, print_table

if TYPE_CHECKING:
    from nacpipe.evaluation.model_selection import Ranking


@click.command()
@click.argument("caches", metavar="CACHE...", nargs=-1, required=True, type=Address())
@click.option("--layer", help="Whose area decides; default: avgpool, layer_11 or the caches' first.")
@click.option("--bins", type=int, default=50, show_default=True, help="Edges of linear bins.")
@click.option("--saturation", type=int, default=500, show_default=True, help="Images that fill a bin.")
@click.option("--alpha", type=float, default=0.1, show_default=True, help="Steepness of the sigmoid.")
@click.option("--split", default="id/train", show_default=True, help="Images of the training domains.")
@click.option(
    "--accuracies",
    type=click.Path(path_type=Path),
    help="CSV of fractions: checkpoint, test_in; also test_out, train_out. Default: the caches' csid sets and id/val.",
)
@click.option("--csv", "output", flag_value="csv", help="Print the checkpoints as CSV.")
@click.option("--json", "output", flag_value="json", help="Print JSON.")
def rank(
    caches: tuple[str | Path, ...],
    layer: str | None,
    bins: int,
    saturation: int,
    alpha: float,
    split: str,
    accuracies: Path | None,
    output: str | None,
) -> None:
    """Rank the checkpoints of a training run, a CACHE each in the order of training, by their covered area (NAC-ME).

    No OOD data are needed. A checkpoint that classifies no image correctly is never chosen; where all are such, the
    exit code is 1. Where accuracies on held-out domains are known, a second table compares the choice with the
    oracle's, the last checkpoint and that of the best validation accuracy; the accuracies play no part in the choice.

    \b
    nacpipe rank run/step-*.zarr
    nacpipe rank run/step-*.zarr --layer layer4 --accuracies domains.csv
    """
    from nacpipe.cache import open_cache
    from nacpipe.errors import InputError
    from nacpipe.evaluation.model_selection import rank_checkpoints, read_accuracies
    from nacpipe.method.params import LayerParams

    params = LayerParams(bins=bins, saturation=saturation, alpha=alpha, edges="linear")
    held_out = None if accuracies is None else read_accuracies(accuracies)
    opened = [open_cache(cache) for cache in caches]
    ranking = rank_checkpoints(opened, layer=layer, params=params, split=split, accuracies=held_out)
    if output == "csv":
        print_frame(ranking.checkpoints, "csv")
    elif output == "json":
        selections = None if ranking.selections is None else ranking.selections.to_dict("records")
        checkpoints = ranking.checkpoints.to_dict("records")
        choice = {"layer": ranking.layer, "chosen": ranking.chosen, "reason": ranking.reason}
        print_json({**choice, "checkpoints": checkpoints, "selections": selections})
    else:
        _print(ranking)
    if ranking.chosen is None:
        raise InputError(f"no checkpoint is chosen: {ranking.reason}")


def _print(ranking: Ranking) -> None:
    """Print the areas, the chosen checkpoint, and how the choice compares with other ways to select."""
    rows = [
        [
            str(name),
            *(_cell(column, value) for column, value in zip(ranking.checkpoints.columns[1:], values, strict=True)),
        ]
        for name, *values in ranking.checkpoints.itertuples(index=False)
    ]
    print_table([column.replace("_", " ") for column in ranking.checkpoints.columns], rows)
    click.echo(f"\nlargest covered area of {ranking.layer}: {ranking.chosen or 'none'}")
    if ranking.selections is None:
        note("no accuracies on held-out domains are known; give them with --accuracies FILE to judge the choice")
        return
    click.echo("")
    print_table(
        ("selection", "checkpoint", "accuracy %", "rank correlation %"),
        [
            (
                r.selection,
                r.checkpoint if isinstance(r.checkpoint, str) else "none",
                percent(float(r.test_in)),
                percent(float(r.correlation)),
            )
            for r in ranking.selections.itertuples()
        ],
        left=2,
    )


def _cell(column: str, value: float) -> str:
    if column == "images":
        return str(value)
    return f"{value:.4f}" if column.startswith("area_") else percent(value)
