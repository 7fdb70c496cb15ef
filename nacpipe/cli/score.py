"""`nacpipe score`: the score of images under an exported detector."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nacpipe.cli.extract import workers_option
from nacpipe.cli.output import Address, Progress, note, print_csv, print_json, print_table
from nacpipe.text import spell_option

if TYPE_CHECKING:
    from nacpipe.detector.file import Exported
    from nacpipe.detector.parts import Parts, ScoredImage
    from nacpipe.detector.predict import Ready, ScoreOptions
    from nacpipe.detector.score_plan import ScorePlan
    from nacpipe.detector.scored_shard import ScoredShard
    from nacpipe.detector.shards import Shard
    from nacpipe.extraction.place import Place

_COLUMNS = ("image", "score", "percentile", "is_ood", "predicted", "error")
_FORMATS = ("csv", "json", "parquet")
_NAMED_AGAIN = 5  # parts, at most, that a message names to be redone


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
@click.option("--redo", multiple=True, metavar="A,B", help="Replace these parts: score their shards again.")
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
    redo: tuple[str, ...],
    dry_run: bool,
    output_as: str | None,
) -> None:
    """Print the score of IMAGES and whether DETECTOR flags them as OOD, or write them to a part per shard.

    IMAGES are files, folders, lists (.txt, a path a line), Parquet files of encoded images and WebDataset's shards
    (.tar, also shards/{000..099}.tar, s3://bucket/shards/ and https://…). The larger a score, the more an image is like
    the training data. Images that cannot be read are named and the others are scored; the exit code is then 1.

    With --output each folder, list or shard becomes a part of its name, written whole or not at all. The same command
    goes on with what has no part, and under torchrun each process takes its share. Parts of earlier runs are counted
    too: while one holds an image that could not be scored, the exit code is 1; --redo NAME scores that part again.

    \b
    nacpipe score digits.safetensors scans/ one.png
    nacpipe score resnet20.safetensors photos/ --model resnet20 --checkpoint resnet20.th --csv
    nacpipe score digits.safetensors 'shards/{000..099}.tar' --output scores --format parquet
    torchrun --nproc-per-node 8 -m nacpipe score digits.safetensors s3://in/shards/ --output s3://out/scores
    """
    from nacpipe.detector.file import read_detector
    from nacpipe.detector.network_options import check_network_is_named
    from nacpipe.detector.shards import find_shards
    from nacpipe.extraction.place import read_place

    if output is None:
        if kind is not None or dry_run or redo:
            given = "--format" if kind else "--dry-run" if dry_run else "--redo"
            raise click.UsageError(f"{given} belongs to --output FOLDER.")
        if not read_place().alone:
            raise click.UsageError("several processes write parts; name their folder with --output.")
    elif output_as == "csv":
        raise click.UsageError("--csv prints rows; with --output it is --format csv.")
    shards = find_shards(images) if output is None else []
    exported = read_detector(detector)
    if not dry_run:
        check_network_is_named(exported, str(detector), model, checkpoint)

    def load(place: Place) -> tuple[Ready, ScoreOptions]:
        from nacpipe.detector.predict import ScoreOptions, prepare

        ready = prepare(exported, str(detector), model, checkpoint, device, place)
        for text in ready.notes if place.first else ():
            note(text)
        local_world = place.local_world
        return ready, ScoreOptions(batch_size=batch_size, workers=workers, column=column, local_world=local_world)

    if output is None:
        streams = [shard for shard in shards if shard.kind in ("tar", "parquet")]
        _print_rows(load, images, shards if streams else (), output_as)
        return
    _score_into_parts(exported, load, images, output, kind or "csv", redo, output_as, dry_run=dry_run)


_Load = Callable[["Place"], tuple["Ready", "ScoreOptions"]]


def _score_into_parts(
    exported: Exported,
    load: _Load,
    images: Sequence[str | Path],
    output: str | Path,
    kind: str,
    redo: Sequence[str],
    output_as: str | None,
    *,
    dry_run: bool,
) -> None:
    """Score what has no part. torch is imported, and the network built, where there is something to score."""
    from nacpipe.detector.parts import Parts
    from nacpipe.detector.score_plan import describe, plan_scoring
    from nacpipe.detector.scored_shard import GROWING
    from nacpipe.extraction.place import read_place

    parts, description = Parts(output, kind), describe(exported)
    place, launched = read_place(), "TORCHELASTIC_RUN_ID" in os.environ and not dry_run
    if launched:  # a process that ends with an error makes torchrun end the others: they wait for each other first
        from nacpipe.extraction.distributed import join_ranks, leave_ranks

        place = ranks = join_ranks()
    try:
        plan = plan_scoring(images, parts, place, redo=redo)
        parts.check(description)
        if dry_run:
            _read_parts([shard for shard in plan.finished if shard.kind in GROWING], parts, place)
            _print_plan(plan, parts, as_json=output_as == "json")
            return
        rows = {one.shard: one for one in _read_parts(plan.finished, parts, place)}
        if plan.todo:
            ready, options = load(place)
            parts.claim(description)
            rows |= {one.shard: one for one in _write_parts(ready, plan, parts, place, options)}
        if launched:
            ranks.wait()
    finally:
        if launched:
            leave_ranks()
    scored = [(shard, rows[shard.address]) for shard in plan.own]
    _print_scored(scored, plan, parts, as_json=output_as == "json")


def _print_rows(load: _Load, images: Sequence[str | Path], shards: Sequence[Shard], output_as: str | None) -> None:
    """Print a row per image; of shards as they come, since nobody knows how many they hold."""
    from nacpipe.detector.shards import find_paths
    from nacpipe.errors import ImageError
    from nacpipe.extraction.place import Place

    paths = [] if shards else find_paths(images)
    ready, options = load(Place())
    from nacpipe.detector.predict import score_images, score_shards

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


def _read_parts(shards: Sequence[Shard], parts: Parts, place: Place) -> list[ScoredShard]:
    """Count what the parts of earlier runs hold, one after another."""
    from nacpipe.detector.scored_shard import read_scored

    found = []
    with Progress("read parts", {"": len(shards)} if place.first else {}, unit="part") as progress:
        for one in read_scored(shards, parts, progress.note):
            found.append(one)
            progress.step(1)
    return found


def _write_parts(ready: Ready, plan: ScorePlan, parts: Parts, place: Place, options: ScoreOptions) -> list[ScoredShard]:
    """Score this process's shards, one after another."""
    from nacpipe.detector.scoring import score_parts

    scored, images = [], 0
    with Progress("score", {"": len(plan.todo)} if place.first else {}, unit="shard") as progress:

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
    states = [
        "done" if shard.stem in plan.done else "to score again" if shard.stem in plan.redone else "to score"
        for shard in plan.shards
    ]
    print_table(
        ("shard", "kind", "part", "state"),
        [(row["shard"], row["kind"], row["part"], state) for row, state in zip(rows, states, strict=True)],
        left=4,
    )
    note(f"{len(plan.done)} of {len(rows)} shards are done, {len(plan.todo)} are to be scored by this process")


def _print_scored(scored: Sequence[tuple[Shard, ScoredShard]], plan: ScorePlan, parts: Parts, *, as_json: bool) -> None:
    """Print a row per shard of this process, those of earlier runs too.

    Raises:
        ImageError: images or shards could not be scored, now or then.
    """
    if as_json:
        print_json([asdict(one) for _, one in scored])
    else:
        print_table(
            ("shard", "images", "flagged", "errors", "part", "scored"),
            [
                (
                    one.shard,
                    *([str(one.images), str(one.flagged), str(one.errors), one.part] if one.part else ["–"] * 4),
                    "before" if one.done_before else "now" if one.part else "–",
                )
                for _, one in scored
            ],
        )
    note(f"{len(plan.done)} of {len(plan.shards)} shards were done before; parts are in {parts.folder}")
    _raise_unscored(scored)


def _raise_unscored(scored: Sequence[tuple[Shard, ScoredShard]]) -> None:
    """Say how many images and shards have no score, and how to try again.

    Raises:
        ImageError: there are some.
    """
    from nacpipe.errors import ImageError

    if not (unscored := [(shard, one) for shard, one in scored if one.first_error is not None]):
        return
    errors, images = sum(one.errors for _, one in scored), sum(one.images for _, one in scored)
    unread = [shard for shard, one in unscored if one.part is None and not one.done_before]
    damaged = [shard for shard, one in unscored if one.part is None and one.done_before]
    counts = [f"{errors} of {images} images"] * bool(errors) + [f"{len(unread)} of {len(scored)} shards"] * bool(unread)
    said = [f"{' and '.join(counts)} could not be scored"] * bool(counts)
    said += [f"{len(damaged)} of {len(scored)} parts cannot be read"] * bool(damaged)
    said += ["the same command tries these shards again"] * bool(unread)
    if again := [shard.stem for shard, one in unscored if one.errors or shard in damaged]:
        said.append(f"score {'the shard' if len(again) == 1 else 'the shards'} again with {_redo_options(again)}")
    raise ImageError(f"{'; '.join(said)}; the first: {unscored[0][1].first_error}")


def _redo_options(stems: Sequence[str]) -> str:
    """Return the options that score shards again; of very many, those of the first."""
    named = stems[:_NAMED_AGAIN]
    joined = [",".join(named)] if not any("," in stem for stem in named) else named
    more = f", and so on for {len(stems)} parts" if len(stems) > len(named) else ""
    return " ".join(spell_option("redo", words, python=False) for words in joined) + more


def _cells(row: dict[str, Any]) -> list[str]:
    score, percentile = row["score"], row["percentile"]
    values: list[Any] = [row["image"], None if score is None else f"{score:.6g}"]
    values += [None if percentile is None else f"{percentile:.1f}", row["is_ood"], row["predicted"]]
    return ["–" if value is None else str(value) for value in values]
