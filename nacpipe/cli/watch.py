"""`nacpipe watch`: whether scored images are still like id/val."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nacpipe.cli.output import Address, note, percent, print_json, print_table

if TYPE_CHECKING:
    import pandas as pd

DRIFT = 3  # the exit code
_PERIODS = ("part", "hour", "day", "week", "month")


@click.command()
@click.argument("parts", metavar="PARTS...", nargs=-1, required=True, type=Address())
@click.option("--by", type=click.Choice(_PERIODS), default="part", show_default=True, help="What makes a group.")
@click.option(
    "--false-alarms", type=float, default=0.01, show_default=True,
    help="Chance, at most, of an alarm where all images are like id/val.",
)  # fmt: skip
@click.option("--max-flagged", metavar="SHARE", type=float, help="No alarm where no more of a group is flagged.")
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path), help="Draw the groups: .svg or .png.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def watch(
    parts: tuple[str | Path, ...], by: str, false_alarms: float, max_flagged: float | None, plot: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Compare scored images with id/val: PARTS are files of `nacpipe score --output`, or their folders.

    Of every part, or every hour, day, week or month of the images' own times: the share of flagged images and the
    distance of the scores' distribution from id/val's, each with what chance alone would do. The exit code is 3 where a
    group is past chance. Of very few images nothing can be said. Images are taken for independent of each other, which
    frames of one video are not.

    \b
    nacpipe watch scores
    nacpipe watch s3://out/scores --by day --plot drift.svg
    nacpipe watch scores --false-alarms 0.001 --max-flagged 0.10 --json
    """
    from nacpipe.errors import InputError
    from nacpipe.evaluation.drift import watch as watch_parts
    from nacpipe.files import check_writable

    if plot is not None:
        if plot.suffix not in (".svg", ".png"):
            raise InputError(f"{plot}: a plot is written as .png or .svg")
        check_writable(plot)
    frame = watch_parts(list(parts), by=by, false_alarms=false_alarms, max_flagged=max_flagged)
    drifted = frame[frame["drift"]]
    if as_json:
        print_json({"false_alarms": false_alarms, "drift": len(drifted), "groups": frame.to_dict("records")})
    else:
        print_table(
            ("group", "images", "errors", "flagged %", "by chance", "distance", "bound", "median percentile", "drift"),
            [_cells(row) for row in frame.to_dict("records")],
        )
    if plot is not None:
        _plot(plot, frame)
    if unscored := int((frame["images"] == 0).sum()):
        note(f"{unscored} of {len(frame)} groups have no image with a score, and were not compared")
    few = sum(_too_few(row) for row in frame.to_dict("records")) - unscored
    if few:
        note(
            f"{few} of {len(frame)} groups have too few images to say: fewer than {frame['least_images'].iloc[0]} are"
            " never past chance, whatever they score"
        )
    if errors := int(frame["errors"].sum()):
        first = frame[frame["errors"] > 0].iloc[0]
        has = "1 image has" if errors == 1 else f"{errors} images have"
        note(f"{has} no score; the first, in {first['group']}: {first['first_error']}")
    if len(drifted):
        first = drifted.iloc[0]
        note(
            f"drift in {len(drifted)} of {len(frame)} groups, first in {first['group']}: {percent(first['flagged'])} %"
            f" are flagged (chance: {percent(first['flagged_low'])} to {percent(first['flagged_high'])} %)"
        )
        click.get_current_context().exit(DRIFT)
    judged = len(frame) - few - unscored
    note(f"no drift in {judged} groups; a false alarm has a chance of at most {percent(false_alarms)} %")


def _cells(row: dict[Any, Any]) -> list[str]:
    return [
        str(row["group"]),
        str(row["images"]),
        str(row["errors"] or ""),
        percent(row["flagged"]),
        f"{percent(row['flagged_low'])} … {percent(row['flagged_high'])}",
        _number(row["distance"]),
        _number(row["distance_bound"]),
        "–" if math.isnan(row["percentile_50"]) else f"{row['percentile_50']:.1f}",
        "drift" if row["drift"] else "too few to say" if _too_few(row) else "no",
    ]


def _too_few(row: Mapping[Any, Any]) -> bool:
    """Whether chance's interval and bound exclude nothing, whatever so few images score."""
    return not (row["flagged_high"] < 1 or row["distance_bound"] < 1)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def _plot(path: Path, frame: pd.DataFrame) -> None:
    from nacpipe.errors import MissingExtra
    from nacpipe.files import write_whole

    try:
        from nacpipe.reporting.drift_figure import draw_drift
        from nacpipe.reporting.figures import to_png, to_svg
    except ModuleNotFoundError as error:
        raise MissingExtra(f"--plot needs {error.name}; install it with: pip install 'nacpipe[report]'") from None
    write_whole(path, (to_svg if path.suffix == ".svg" else to_png)(draw_drift(frame)))
    note(f"wrote {path}")
