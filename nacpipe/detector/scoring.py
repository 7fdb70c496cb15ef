"""Scoring shards: which have no part yet, and which of these are this process's.

shards    000 001 002 003 004 005      each of W processes takes every W-th shard
rank 0     ●       ●       ●           a shard whose part exists is done, whoever wrote it
rank 1         ●       ●       ●       a process that dies loses the shard that it is at, and no other
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nacpipe.detector.file import Exported
from nacpipe.detector.parts import Parts, ScoredImage, read_part
from nacpipe.detector.predict import Ready, ScoreOptions, ShardError, score_shards
from nacpipe.detector.shards import Shard, check_stems, find_shards
from nacpipe.errors import InputError
from nacpipe.extraction.distributed import Ranks
from nacpipe.text import escape_bytes

if TYPE_CHECKING:
    import pandas as pd

    from nacpipe.detector.module import Detector


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorePlan:
    """What is to be scored."""

    shards: tuple[Shard, ...]
    """All, in order."""
    done: frozenset[str]
    """Stems of those that have a part."""
    todo: tuple[Shard, ...]
    """This process's shards without a part, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredShard:
    """What became of one shard."""

    shard: str
    """Its address."""
    part: str | None
    """The part's address; None where the shard could not be read, and no part was written."""
    images: int
    """Rows of the part, those with an error too."""
    flagged: int
    errors: int
    """Images that could not be scored."""
    first_error: str | None
    """The first of their messages, or the shard's own."""


def plan_scoring(sources: Sequence[str | Path], parts: Parts, ranks: Ranks = Ranks()) -> ScorePlan:  # noqa: B008
    """Return what to do; reads names, and the part of single image files, and changes nothing.

    Raises:
        InputError: two shards would have one part, or the part of single image files is of other files.
        ImageError: a file, list or shard on this machine is not there.
        CacheError: a server does not answer.
    """
    shards = find_shards(sources)
    for shard in shards:
        shard.check()
    check_stems(shards)
    done = frozenset(parts.written())
    for shard in shards:
        if shard.kind == "files" and shard.stem in done:
            _check_same_files(shard, parts.address(shard.stem))
    own = shards[ranks.rank :: ranks.world]
    return ScorePlan(
        shards=tuple(shards),
        done=frozenset(shard.stem for shard in shards if shard.stem in done),
        todo=tuple(shard for shard in own if shard.stem not in done),
    )


def _check_same_files(shard: Shard, part: str) -> None:
    """Refuse single files where a part of others has the name; of shards the name says which they are."""
    scored = set(read_part(part)["image"])
    if new := [path for path in shard.files if escape_bytes(str(path)) not in scored]:
        raise InputError(
            f"{part} is of other files, without {new[0]}; name another folder with --output, or name the files in a"
            " list (.txt), whose part has its name"
        )


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


def describe(exported: Exported) -> dict[str, Any]:
    """Return what says that two folders of parts are of one detector, and what `watch` compares them with."""
    arrays = exported.to_arrays()
    digest = hashlib.sha256(json.dumps(exported.to_json(), sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    validation = exported.validation
    return {
        "sha256": digest.hexdigest(),
        "threshold": exported.threshold,
        "keep": exported.keep,
        "validation_scores": None if validation is None else validation.tolist(),
    }


def score(
    detector: Detector,
    images: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    format: str = "csv",  # noqa: A002 (the command's word)
    batch_size: int = 128,
    workers: int | None = 0,
    column: str | None = None,
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
        note: called with what to say aloud.

    Returns:
        Without `output` a row per image; with it a row per shard of this run: shard, part, images, flagged, errors,
        first_error. Images that could not be scored have an error there, and raise none.

    Raises:
        DetectorError: the detector takes no images.
        ImageError: without `output`, a shard cannot be read.
        InputError: two shards would have one part, or the parts in `output` are of another detector, of another format
            or of other single files.
    """
    import pandas as pd

    ready, options = Ready.of(detector), ScoreOptions(batch_size=batch_size, workers=workers, column=column)
    sources = [images] if isinstance(images, str | Path) else list(images)
    if output is None:
        scored = score_shards(ready, find_shards(sources), options, note)
        return pd.DataFrame([row for _, rows in scored for row in rows])
    parts = Parts(output, format)
    plan = plan_scoring(sources, parts)
    parts.claim(describe(ready.exported))
    done = score_parts(ready, plan.todo, parts, options, note)
    return pd.DataFrame(done, columns=list(ScoredShard.__dataclass_fields__))
