"""`nacpipe score`: the score of images under an exported detector."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nacpipe.cli.extract import workers_option
from nacpipe.cli.output import Address, Progress, note, print_csv, print_json, print_table

if TYPE_CHECKING:
    from nacpipe.detector.file import Exported
    from nacpipe.detector.parts import Parts, ScoredImage
    from nacpipe.detector.predict import Ready, ScoreOptions
    from nacpipe.detector.scoring import ScoredShard, ScorePlan
    from nacpipe.detector.shards import Shard
    from nacpipe.extraction.distributed import Ranks

_COLUMNS = ("image", "score", "percentile", "is_ood", "predicted", "error")
_FORMATS = ("csv", "json", "parquet")


@click.command()
@click.argument("detector", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=Address())
@click.option("--model", metavar="NAME", help="The network (nacpipe models), or file.py:function; default: DETECTOR's.")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Its weights: a file, a folder with one, or a name."
)
@click.option("--device", default="auto", show_default=True, help="cuda, mps, cpu, …")
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True, help="Images at once.")
@workers_option
@click.option("--output", metavar="FOLDER", type=Address(), help="Write a part per shard there, or at s3://…")
@click.option("--format", "kind", type=click.Choice(_FORMATS), help="Of the parts; default: csv.")
@click.option("--column", metavar="NAME", help="Of Parquet files; default: the first of encoded images.")
@click.option("--dry-run", is_flag=True, help="Print which shards have no part, and stop.")
@click.option("--csv", "output_as", flag_value="csv", help="Print CSV, row by row.")
@click.option("--json", "output_as", flag_value="json", help="Print JSON.")
def score(
    detector: Path,
    images: tuple[str | Path, ...],
    model: str | None,
    checkpoint: Path | None,
    device: str,
    batch_size: int,
    workers: int | None,
    output: str | Path | None,
    kind: str | None,
    column: str | None,
    dry_run: bool,
    output_as: str | None,
) -> None:
    """Print the score of IMAGES and whether DETECTOR flags them as OOD, or write them to a part per shard.

    IMAGES are files, folders, lists (.txt, a path a line), Parquet files of encoded images and WebDataset's shards
    (.tar, also shards/{000..099}.tar, s3://bucket/shards/ and https://…). The larger a score, the more an image is like
    the training data. Images that cannot be read are named and the others are scored; the exit code is then 1.

    With --output each folder, list or shard becomes a part of its name, written whole or not at all. The same command
    goes on with what has no part, and under torchrun each process takes its share.

    \b
    nacpipe score digits.safetensors scans/ one.png
    nacpipe score resnet20.safetensors photos/ --model resnet20 --checkpoint resnet20.th --csv
    nacpipe score digits.safetensors 'shards/{000..099}.tar' --output scores --format parquet
    torchrun --nproc-per-node 8 -m nacpipe score digits.safetensors s3://in/shards/ --output s3://out/scores
    """
    from nacpipe.detector.predict import ScoreOptions, prepare
    from nacpipe.detector.shards import find_shards
    from nacpipe.extraction.distributed import join_ranks, leave_ranks, read_ranks

    options = ScoreOptions(batch_size=batch_size, workers=workers, column=column, local_world=read_ranks().local_world)
    if output is None:
        if kind is not None or dry_run:
            raise click.UsageError(f"{'--format' if kind else '--dry-run'} belongs to --output FOLDER.")
        if not read_ranks().alone:
            raise click.UsageError("several processes write parts; name their folder with --output.")
        shards = find_shards(images)
        streams = [shard for shard in shards if shard.kind in ("tar", "parquet")]
        _print_rows(detector, images, shards if streams else (), model, checkpoint, device, options, output_as)
        return
    if output_as == "csv":
        raise click.UsageError("--csv prints rows; with --output it is --format csv.")
    from nacpipe.detector.parts import Parts
    from nacpipe.detector.scoring import describe, plan_scoring

    parts = Parts(output, kind or "csv")
    if dry_run:
        _print_plan(plan_scoring(images, parts, read_ranks()), parts, as_json=output_as == "json")
        return
    # A process that ends with an error makes torchrun end the others: they wait for each other first.
    ranks = join_ranks() if "TORCHELASTIC_RUN_ID" in os.environ else read_ranks()
    try:
        plan = plan_scoring(images, parts, ranks)
        ready = prepare(detector, model, checkpoint, device, ranks)
        for text in ready.notes if ranks.first else ():
            note(text)
        parts.claim(describe(ready.exported))
        scored = _write_parts(ready, plan, parts, ranks, options)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            ranks.wait()
    finally:
        leave_ranks()
    _print_scored(scored, plan, parts, as_json=output_as == "json")


def _print_rows(
    detector: Path,
    images: Sequence[str | Path],
    shards: Sequence[Shard],
    model: str | None,
    checkpoint: Path | None,
    device: str,
    options: ScoreOptions,
    output_as: str | None,
) -> None:
    """Print a row per image; of shards as they come, since nobody knows how many they hold."""
    from nacpipe.detector.predict import prepare, score_images, score_shards
    from nacpipe.detector.shards import find_paths
    from nacpipe.errors import ImageError

    paths = [] if shards else find_paths(images)
    ready = prepare(detector, model, checkpoint, device)
    for text in ready.notes:
        note(text)
    broken: list[str] = []
    count = flagged = 0

    with Progress("score", {"": len(shards) or len(paths)}, unit="shard" if shards else "it") as progress:

        def scored() -> Iterator[ScoredImage]:
            if not shards:
                yield from score_images(ready, paths, options, progress.note)
                return
            for shard, rows in score_shards(ready, shards, options, progress.note):
                prefix = f"{shard.address}/" if shard.kind in ("tar", "parquet") else ""
                yield from (replace(row, image=prefix + row.image) for row in rows)
                progress.step(1)

        def rows() -> Iterator[dict[str, Any]]:
            nonlocal count, flagged
            for row in scored():
                count += 1
                flagged += row.is_ood is True
                if not shards:
                    progress.step(1)
                if row.error is not None:
                    broken.append(row.error)
                    progress.note(row.error)
                yield {name: value for name, value in asdict(row).items() if name in _COLUMNS}

        if output_as == "csv":
            from nacpipe.detector.parts import csv_line

            print_csv(csv_line(_COLUMNS))
            for row in rows():
                print_csv(csv_line([*row.values()]))
        elif output_as == "json":
            print_json([*rows()])
        else:
            print_table(_COLUMNS[:-1], [_cells(row) for row in rows()])
    if count > len(broken):
        note(_describe_flagged(flagged, count - len(broken), ready.exported))
    if broken:
        raise ImageError(f"{len(broken)} of {count} images could not be scored; the first: {broken[0]}")


def _describe_flagged(flagged: int, scored: int, exported: Exported) -> str:
    """Return how many images are flagged, and what that means."""
    return (
        f"{flagged} of {scored} images flagged ({100 * flagged / scored:.1f} %): they score below the threshold"
        f" {exported.threshold:.6g}, as at most {100 * (1 - exported.keep):.4g} % do of the in-distribution images that"
        " it was chosen on"
    )


def _write_parts(ready: Ready, plan: ScorePlan, parts: Parts, ranks: Ranks, options: ScoreOptions) -> list[ScoredShard]:
    """Score this process's shards, one after another."""
    from nacpipe.detector.scoring import score_parts

    scored, images = [], 0
    with Progress("score", {"": len(plan.todo)} if ranks.first else {}, unit="shard") as progress:

        def step(count: int) -> None:
            nonlocal images
            images += count
            if images % options.batch_size == 0:
                progress.step(0, more=f"{images} images")

        for one in score_parts(ready, plan.todo, parts, options, progress.note, step):
            scored.append(one)
            progress.step(1, more=f"{images} images")
    return scored


def _print_plan(plan: ScorePlan, parts: Parts, *, as_json: bool) -> None:
    rows: list[dict[str, Any]] = [
        {"shard": shard.address, "kind": shard.kind, "part": parts.address(shard.stem), "done": shard.stem in plan.done}
        for shard in plan.shards
    ]
    if as_json:
        print_json(rows)
        return
    print_table(
        ("shard", "kind", "part", "state"),
        [(row["shard"], row["kind"], row["part"], "done" if row["done"] else "to score") for row in rows],
        left=4,
    )
    note(f"{len(plan.done)} of {len(rows)} shards are done, {len(plan.todo)} are to be scored by this process")


def _print_scored(scored: Sequence[ScoredShard], plan: ScorePlan, parts: Parts, *, as_json: bool) -> None:
    """Print a row per shard of this run.

    Raises:
        ImageError: images or shards could not be scored.
    """
    from nacpipe.errors import ImageError

    if as_json:
        print_json([asdict(one) for one in scored])
    else:
        print_table(
            ("shard", "images", "flagged", "errors", "part"),
            [
                (
                    one.shard,
                    str(one.images) if one.part else "–",
                    str(one.flagged) if one.part else "–",
                    str(one.errors) if one.part else "–",
                    one.part or "–",
                )
                for one in scored
            ],
        )
    note(f"{len(plan.done)} of {len(plan.shards)} shards were done before; parts are in {parts.folder}")
    unread = [one for one in scored if one.part is None]
    errors = sum(one.errors for one in scored)
    if not unread and not errors:
        return
    images = sum(one.images for one in scored)
    first = next(one.first_error for one in scored if one.first_error)
    counts = [f"{errors} of {images} images"] * bool(errors) + [f"{len(unread)} of {len(scored)} shards"] * bool(unread)
    again = "; the same command tries these shards again" if unread else ""
    raise ImageError(f"{' and '.join(counts)} could not be scored{again}; the first: {first}")


def _cells(row: dict[str, Any]) -> list[str]:
    score, percentile = row["score"], row["percentile"]
    values: list[Any] = [row["image"], None if score is None else f"{score:.6g}"]
    values += [None if percentile is None else f"{percentile:.1f}", row["is_ood"], row["predicted"]]
    return ["–" if value is None else str(value) for value in values]
