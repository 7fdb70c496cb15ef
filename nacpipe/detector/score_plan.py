"""Which shards have no part yet, and which of these are this process's; no torch.

shards    000 001 002 003 004 005      each of W processes takes every W-th shard
rank 0     ●       ●       ●           a shard whose part exists is done, whoever wrote it, unless it is to be redone
rank 1         ●       ●       ●       a process that dies loses the shard that it is at, and no other
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nacpipe.detector.file import Exported
from nacpipe.detector.parts import DESCRIPTION, Parts, read_part
from nacpipe.detector.shards import Shard, check_stems, find_shards
from nacpipe.errors import InputError
from nacpipe.extraction.place import Place
from nacpipe.text import escape_bytes, spell_option

MAX_NAMED = 10  # shards that a message names


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorePlan:
    """What is to be scored."""

    shards: tuple[Shard, ...]
    """All, in order."""
    own: tuple[Shard, ...]
    """This process's, in order."""
    done: frozenset[str]
    """Stems of those that have a part and keep it."""
    redone: frozenset[str]
    """Stems of those that have a part, which is to be replaced."""

    @property
    def todo(self) -> tuple[Shard, ...]:
        """This process's shards that are to be scored."""
        return tuple(shard for shard in self.own if shard.stem not in self.done)

    @property
    def finished(self) -> tuple[Shard, ...]:
        """This process's shards whose part is kept."""
        return tuple(shard for shard in self.own if shard.stem in self.done)


def plan_scoring(
    sources: Sequence[str | Path],
    parts: Parts,
    place: Place = Place(),  # noqa: B008 (a frozen record)
    *,
    redo: Sequence[str] = (),
    python: bool = False,
) -> ScorePlan:
    """Return what to do; reads names, and the part of single image files, and changes nothing.

    Args:
        sources: of images.
        parts: where the result is.
        place: this process among others.
        redo: names of parts to replace, or several as `a,b`.
        python: whether options are spelt as from Python.

    Raises:
        InputError: two shards would have one part, one the name of the parts' description, the part of single image
            files is of other files, or `redo` names what is no shard here.
        ImageError: a file, list or shard on this machine is not there.
        CacheError: a server does not answer.
    """
    shards = find_shards(sources)
    for shard in shards:
        shard.check()
    check_stems(shards)
    _check_description_stays(shards, parts)
    stems = [shard.stem for shard in shards]
    written = parts.written() & set(stems)
    redone = written & _named_again(redo, stems)
    for shard in shards:
        if shard.kind == "files" and shard.stem in written - redone:
            _check_same_files(shard, parts.address(shard.stem), python=python)
    return ScorePlan(
        shards=tuple(shards),
        own=tuple(shards[place.rank :: place.world]),
        done=frozenset(written - redone),
        redone=frozenset(redone),
    )


def _check_description_stays(shards: Sequence[Shard], parts: Parts) -> None:
    """Refuse a part that would be written over what says what all parts were scored with.

    Raises:
        InputError: naming its shard.
    """
    for shard in shards:
        if f"{shard.stem}.{parts.kind}" == DESCRIPTION:
            raise InputError(
                f"{shard.address} would be written as {DESCRIPTION}, which says what the parts were scored with; give"
                " it another name, or the parts another format"
            )


def _named_again(redo: Sequence[str], stems: Sequence[str]) -> set[str]:
    """Return the parts that are to be replaced: names, or several as `a,b`, unless one has that name.

    Raises:
        InputError: one of them is of no shard here.
    """
    known = set(stems)
    names = {name for word in redo for name in ([word] if word in known else map(str.strip, word.split(","))) if name}
    if unknown := sorted(names - known):
        named = ", ".join(stems[:MAX_NAMED]) + (", …" if len(stems) > MAX_NAMED else "")
        raise InputError(f"redo names {unknown[0]!r}; the shards are {named}")
    return names


def _check_same_files(shard: Shard, part: str, *, python: bool) -> None:
    """Refuse single files where a part of others has the name; of shards the name says which they are."""
    try:
        scored = set(read_part(part)["image"])
    except InputError:
        return  # `read_scored` names it
    if new := [path for path in shard.files if escape_bytes(str(path)) not in scored]:
        again = spell_option("redo", [shard.stem] if python else shard.stem, python=python)
        raise InputError(
            f"{part} is of other files, without {new[0]}; name another folder with --output, name the files in a list"
            f" (.txt), whose part has its name, or replace this part with {again}"
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
