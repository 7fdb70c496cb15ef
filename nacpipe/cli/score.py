"""`nacpipe score`: the score of images under an exported detector."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nacpipe.cli.output import Progress, note, print_csv, print_json, print_table

if TYPE_CHECKING:
    from nacpipe.detector.predict import ScoredImage

_COLUMNS = ("image", "score", "percentile", "is_ood", "predicted", "error")


@click.command()
@click.argument("detector", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", metavar="NAME", help="The network (nacpipe models), or file.py:function; default: DETECTOR's.")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Its weights: a file, a folder with one, or a name."
)
@click.option("--device", default="auto", show_default=True, help="cuda, mps, cpu, …")
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True, help="Images at once.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Threads that decode images.")
@click.option("--csv", "output", flag_value="csv", help="Print CSV, row by row.")
@click.option("--json", "output", flag_value="json", help="Print JSON.")
def score(
    detector: Path,
    images: tuple[Path, ...],
    model: str | None,
    checkpoint: Path | None,
    device: str,
    batch_size: int,
    workers: int,
    output: str | None,
) -> None:
    """Print the score of IMAGES, files or folders, and whether DETECTOR flags them as OOD.

    The larger a score, the more an image is like the training data. Images that cannot be read are named and the others
    are scored; the exit code is then 1.

    \b
    nacpipe score digits.safetensors scans/ one.png
    nacpipe score resnet20.safetensors photos/ --model resnet20 --checkpoint resnet20.th --csv
    """
    from nacpipe.detector.predict import find_images, prepare, score_images
    from nacpipe.errors import ImageError

    paths = find_images(images)
    ready = prepare(detector, model, checkpoint, device)
    for text in ready.notes:
        note(text)
    broken: list[str] = []

    with Progress("score", {"": len(paths)}) as progress:

        def rows() -> Iterator[ScoredImage]:
            for row in score_images(ready, paths, batch_size, workers, progress.note):
                progress.step(1)
                if row.error is not None:
                    broken.append(row.error)
                    progress.note(row.error)
                yield row

        if output == "csv":
            print_csv(_csv_line(_COLUMNS))
            for row in rows():
                print_csv(_csv_line(asdict(row).values()))
        elif output == "json":
            print_json([asdict(row) for row in rows()])
        else:
            print_table(_COLUMNS[:-1], [_cells(row) for row in rows()])
    if broken:
        raise ImageError(f"{len(broken)} of {len(paths)} images could not be scored; the first: {broken[0]}")


def _csv_line(values: Iterable[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow("" if value is None else value for value in values)
    return line.getvalue()


def _cells(row: ScoredImage) -> list[str]:
    values: list[Any] = [row.image, None if row.score is None else f"{row.score:.6g}"]
    values += [None if row.percentile is None else f"{row.percentile:.1f}", row.is_ood, row.predicted]
    return ["–" if value is None else str(value) for value in values]
