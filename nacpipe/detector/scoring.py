"""Scoring shards, each into a part of its own, from the command line and from Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from nacpipe.detector.parts import COLUMNS, Parts, ScoredImage
from nacpipe.detector.predict import Ready, ScoreOptions, ShardError, score_shards
from nacpipe.detector.score_plan import describe, plan_scoring
from nacpipe.detector.scored_shard import ScoredShard, read_scored
from nacpipe.detector.shards import Shard, find_shards

if TYPE_CHECKING:
    import pandas as pd

    from nacpipe.detector.module import Detector


def score_parts(
    ready: Ready,
    shards: Sequence[Shard],
    parts: Parts,
    options: ScoreOptions = ScoreOptions(),  # noqa: B008
    note: Callable[[str], None] = lambda text: None,
    step: Callable[[int], None] = lambda images: None,
) -> Iterator[ScoredShard]:
    """Score shards, one after another, write the part of each, whole or not at all, and yield what became of it.

    Args:
        ready: the detector.
        shards: those without a part.
        parts: where they are written.
        options: how images are read.
        note: called with what to say aloud, every error among it.
        step: called with the number of images, after each.

    Raises:
        InputError: a part cannot be written.
        ImageError: a process that decodes images is gone.
    """
    with closing(score_shards(ready, shards, options, note)) as scored:
        for shard, rows in scored:
            yield _write_part(shard, rows, parts, note, step)


def _write_part(
    shard: Shard,
    rows: Iterator[ScoredImage],
    parts: Parts,
    note: Callable[[str], None],
    step: Callable[[int], None],
) -> ScoredShard:
    images = flagged = errors = 0
    first: str | None = None
    try:
        with parts.writing(shard.stem) as writer:
            for row in rows:
                writer.add(row)
                images, flagged = images + 1, flagged + bool(row.is_ood)
                if row.error is not None:
                    errors, first = errors + 1, first or row.error
                    note(row.error)
                step(1)
    except ShardError as error:  # the others are scored
        note(f"{error}; no part is written")
        return ScoredShard(shard=shard.address, part=None, images=0, flagged=0, errors=0, first_error=str(error))
    return ScoredShard(
        shard=shard.address,
        part=parts.address(shard.stem),
        images=images,
        flagged=flagged,
        errors=errors,
        first_error=first,
    )


def score(
    detector: Detector,
    images: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    format: str = "csv",  # noqa: A002 (the command's word)
    batch_size: int = 128,
    workers: int | None = 0,
    column: str | None = None,
    redo: Sequence[str] = (),
    note: Callable[[str], None] = lambda text: None,
) -> pd.DataFrame:
    """Score folders, lists, Parquet files and tar shards of images, as `nacpipe score` does.

    Args:
        detector: of images that nacpipe prepares: from `nacpipe.load_detector` or `Detector.from_cache`.
        images: paths or URLs; see docs/detector.md.
        output: a folder or URL for the parts; None returns the rows.
        format: of the parts: csv, json or parquet.
        batch_size: images at once.
        workers: processes that decode images; 0: a thread; None: as `nacpipe score` chooses. A script needs
            `if __name__ == "__main__":` for processes.
        column: of Parquet files.
        redo: names of parts to replace: their shards are scored again.
        note: called with what to say aloud.

    Returns:
        Without `output` a row per image; with it a row per shard, those of an earlier run too: shard, part, images,
        flagged, errors, first_error, done_before. Images that could not be scored have an error there, and raise none.

    Raises:
        DetectorError: the detector takes no images.
        ImageError: without `output`, a shard cannot be read.
        InputError: two shards would have one part, or the parts in `output` are of another detector, of another format
            or of other single files, or `redo` names what is no shard here.
    """
    import pandas as pd

    ready, options = Ready.of(detector), ScoreOptions(batch_size=batch_size, workers=workers, column=column)
    sources = [images] if isinstance(images, str | Path) else list(images)
    if output is None:
        scored = score_shards(ready, find_shards(sources), options, note)
        return pd.DataFrame([row for _, rows in scored for row in rows], columns=list(COLUMNS))
    parts = Parts(output, format)
    plan = plan_scoring(sources, parts, redo=[redo] if isinstance(redo, str) else redo, python=True)
    parts.claim(describe(ready.exported))
    rows = {one.shard: one for one in read_scored(plan.finished, parts, note, python=True)}
    rows |= {one.shard: one for one in score_parts(ready, plan.todo, parts, options, note)}
    ordered = [rows[shard.address] for shard in plan.shards]
    return pd.DataFrame(ordered, columns=list(ScoredShard.__dataclass_fields__))
