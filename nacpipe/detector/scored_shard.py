"""What a shard's part holds, counted from its rows, and which images of a folder or list it lacks; no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nacpipe.detector.parts import Parts, read_part
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
        note: called with what to say aloud: images of a folder or list that its part lacks.
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
        if shard.kind in GROWING and (new := find_new(shard, set(rows["image"].dropna().astype(str)))):
            what = "1 image is" if len(new) == 1 else f"{len(new)} images are"
            first = new[0] if len(new) == 1 else f"the first: {new[0]}"
            again = spell_option("redo", [shard.stem] if python else shard.stem, python=python)
            note(f"{shard.address}: {what} not in its part {address} ({first}); score it again with {again}")
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


def find_new(shard: Shard, scored: Set[str]) -> list[str]:
    """Return the images of a folder or list that are not among those scored, by name, below the folder or list's.

    Args:
        shard: a folder or a list, here.
        scored: images of its part.
    """
    base = Path(shard.address) if shard.kind == "folder" else Path(shard.address).parent
    paths: list[Path] = []
    with suppress(ImageError):  # emptied since
        paths = shard.paths()
    names = {escape_bytes(str(path)): path for path in paths}
    below = {
        name: escape_bytes(str(path.relative_to(base))) for name, path in names.items() if path.is_relative_to(base)
    }
    new = [name for name in names if name not in scored]
    if not any(name in scored for name in below):
        known = _named_from_elsewhere(scored, [*below.values()])
        new = [name for name in new if below.get(name) not in known]
    return [below.get(name, name) for name in new]


def _named_from_elsewhere(scored: Set[str], below: Sequence[str]) -> Set[str]:
    """Return which images were scored where the folder had another name: `photos`, `/data/photos`.

    The folder is above every scored image, and so above any one; it is the one with most of these images below it.
    """
    found = [
        frozenset(name for name in below if str(start / name) in scored)
        for start in (Path(min(scored)).parents if scored else ())
    ]
    return max(found, key=len, default=frozenset())
