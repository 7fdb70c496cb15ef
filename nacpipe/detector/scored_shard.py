"""What a shard's part holds, counted from its rows, and which images of a folder or list it lacks; no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nacpipe.detector.parts import Parts, format_time, read_part
from nacpipe.detector.shards import Shard
from nacpipe.errors import ImageError, InputError
from nacpipe.text import escape_bytes, spell_option

if TYPE_CHECKING:
    import pandas as pd

GROWING = ("folder", "list")
"""Kinds of shards that can have more images later under the same name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredShard:
    """What became of one shard."""

    shard: str
    """Its address."""
    part: str | None
    """The part's address; None where the shard, or a part of an earlier run, cannot be read."""
    images: int
    """Rows of the part, those with an error too."""
    flagged: int
    errors: int
    """Images that could not be scored."""
    first_error: str | None
    """The first of their messages, or the shard's own."""
    done_before: bool = False
    """Whether an earlier run, or another process, wrote the part."""


def read_scored(
    shards: Iterable[Shard],
    parts: Parts,
    note: Callable[[str], None] = lambda text: None,
    *,
    python: bool = False,
) -> Iterator[ScoredShard]:
    """Yield what the parts of an earlier run hold; memory holds one.

    Args:
        shards: those that have a part.
        parts: where it is.
        note: called with what to say aloud: images of a folder or list that its part lacks, or that are others now.
        python: whether options are spelt as from Python.
    """
    for shard in shards:
        address = parts.address(shard.stem)
        try:
            rows = read_part(address)
        except InputError as error:
            yield ScoredShard(
                shard=shard.address, part=None, images=0, flagged=0, errors=0, first_error=str(error), done_before=True
            )
            continue
        if shard.kind in GROWING:
            for text in _describe_differences(shard, address, rows, python=python):
                note(text)
        yield _count(shard, address, rows)


def _count(shard: Shard, address: str, rows: pd.DataFrame) -> ScoredShard:
    errors = rows["error"].dropna()
    return ScoredShard(
        shard=shard.address,
        part=address,
        images=len(rows),
        flagged=int(rows["is_ood"].eq(True).sum()),  # None where there is an error
        errors=len(errors),
        first_error=str(errors.iloc[0]) if len(errors) else None,
        done_before=True,
    )


def _describe_differences(shard: Shard, address: str, rows: pd.DataFrame, *, python: bool) -> Iterator[str]:
    """Yield what to say aloud of images that a part lacks, and of those that it has no longer as they are."""
    named = rows[rows["image"].notna()]
    times = {
        str(image): time if isinstance(time, str) else None
        for image, time in zip(named["image"], named["time"], strict=True)
    }
    new, changed = compare_images(shard, times)
    again = spell_option("redo", [shard.stem] if python else shard.stem, python=python)
    for images, one, many in (
        (new, "1 image is not in its part", "{} images are not in its part"),
        (changed, "1 image has another time than in its part", "{} images have another time than in its part"),
    ):
        if images:
            what = one if len(images) == 1 else many.format(len(images))
            first = images[0] if len(images) == 1 else f"the first: {images[0]}"
            yield f"{shard.address}: {what} {address} ({first}); score it again with {again}"


def compare_images(shard: Shard, times: Mapping[str, str | None]) -> tuple[list[str], list[str]]:
    """Return the images of a folder or list that are not among those scored, and those of another time than then.

    Both by name, below the folder or the list's.

    Args:
        shard: a folder or a list, here.
        times: image of its part → when the file was written last (`format_time`), None where that is not known.
    """
    base = Path(shard.address) if shard.kind == "folder" else Path(shard.address).parent
    paths: list[Path] = []
    with suppress(ImageError):  # emptied since
        paths = shard.paths()
    names = {escape_bytes(str(path)): path for path in paths}
    below = {
        name: escape_bytes(str(path.relative_to(base))) for name, path in names.items() if path.is_relative_to(base)
    }
    scored = {name: name for name in names if name in times}
    if not any(name in times for name in below):
        elsewhere = _named_from_elsewhere(times, [*below.values()])
        scored |= {name: elsewhere[inside] for name, inside in below.items() if inside in elsewhere}
    new = [name for name in names if name not in scored]
    changed = [name for name, before in scored.items() if _is_changed(names[name], times[before])]
    return [below.get(name, name) for name in new], [below.get(name, name) for name in changed]


def _is_changed(path: Path, time: str | None) -> bool:
    if time is None or not time.endswith("Z"):  # a spreadsheet may have written it otherwise
        return False
    try:
        return format_time(path.stat().st_mtime) != time
    except (OSError, ValueError):
        return False


def _named_from_elsewhere(scored: Iterable[str], below: Sequence[str]) -> Mapping[str, str]:
    """Return which images were scored, and as what, where the folder had another name: `photos`, `/data/photos`.

    The folder is above every scored image, and so above any one; it is the one with most of these images below it.
    """
    scored = set(scored)
    found = [
        {name: str(start / name) for name in below if str(start / name) in scored}
        for start in (Path(min(scored)).parents if scored else ())
    ]
    return max(found, key=len, default={})
