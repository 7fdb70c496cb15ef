"""Repairing a cache: what follows from the header is written again, the rest is left to the next extract.

rows          their blocks lose their marks, the split its seal: extract computes exactly these again
metadata      of arrays, groups and marks of a sealed split: rewritten, since the header and the rows determine them
attributes    of a split, or a seal that does not fit: the split is dropped; nothing says what was there
classifier    removed: extract writes it again
root          refused: everything else is determined by it
foreign files left alone

Every step leaves a cache that another repair can finish. Nothing is guessed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nacpipe.cache.address import Objects
from nacpipe.cache.consolidated import consolidate
from nacpipe.cache.durability import sync_files, writing
from nacpipe.cache.keys import list_own, list_split, parse_chunk_key, remove_own
from nacpipe.cache.layout import WHOLE, chunk_key, is_whole, mark_key, object_key, whole_chunk_rows
from nacpipe.cache.lock import CacheLock
from nacpipe.cache.reader import Cache, open_cache
from nacpipe.cache.validation import root_problems
from nacpipe.cache.verify import BEYOND_ROWS, STALE_COPY, Damage, expected_objects, verify_cache
from nacpipe.cache.writer import remove_drafts
from nacpipe.errors import CacheError, FormatError
from nacpipe.files import is_url

ROUNDS = 8  # at most: what a round repairs may show more, such as chunks once their array's metadata are readable


def repair_cache(path: str | Path) -> list[str]:
    """Repair what follows from the header and take the marks of damaged rows; return what was done, a phrase each.

    A phrase ends in "again" where `extract` has to compute something.

    Raises:
        InputError: the cache is at a URL that can only be read.
        CacheError: another process writes the cache, it cannot be written, or it is damaged still.
        FormatError: the root is damaged, or of another version; nothing is changed.
    """
    disk, done = None if is_url(path) else Path(path), list[str]()
    with CacheLock(path) as lock, writing(str(path)):
        if disk and disk.is_dir():
            lock.take()
        objects = Objects(path)
        cache = _open_whole_root(path)
        if disk:
            remove_drafts(disk, cache.header)
        for _ in range(ROUNDS):
            if not (damage := verify_cache(cache)):
                break
            done += _repair(cache, objects, damage)
            cache = open_cache(path)
        else:
            what = f"{damage[0].split}/{damage[0].array} {damage[0].what}"
            raise CacheError(f"{path}: after {ROUNDS} rounds of repair, {what}; extract into another --cache")
        if disk and done:
            sync_files([disk / key for key in list_own(cache.root.store, cache.header, "")], disk)
    return done


def _open_whole_root(path: str | Path) -> Cache:
    advice = "repair does not change a root: put back a copy of its zarr.json, or extract into another --cache"
    try:
        cache = open_cache(path)
    except FormatError as error:
        if "another --cache" in str(error):  # of another version, which says so
            raise
        raise FormatError(f"{error}; {advice}") from error
    for what in root_problems(cache.header):
        raise FormatError(f"{path}: {what}; {advice}")
    return cache


def _repair(cache: Cache, objects: Objects, damage: Sequence[Damage]) -> Iterator[str]:
    """One round: of every split the first kind of damage that it has."""
    for split in dict.fromkeys(d.split for d in damage):
        found = [d for d in damage if d.split == split]
        if split == "":
            for d in found:
                if d.what == STALE_COPY:
                    consolidate(cache.root, cache.header, cache.path)
                    yield "consolidated metadata renewed"
                else:
                    objects.replace(f"{d.array}/zarr.json", expected_objects(cache.header, 1, ())["zarr.json"])
                    yield f"{d.array}: metadata rewritten"
        elif split == "classifier":
            remove_own(objects.store, cache.header, "classifier")
            consolidate(cache.root, cache.header, cache.path)
            yield "classifier: is to be written again"
        elif lost := [d for d in found if d.array == ""]:
            _drop(cache, objects, split)
            yield f"{split}: {lost[0].what}; the split is dropped and is to be extracted again"
        else:
            yield from _repair_split(cache, objects, split, found)


def _repair_split(cache: Cache, objects: Objects, name: str, found: Sequence[Damage]) -> Iterator[str]:
    """Chunks beyond the rows; without them metadata; without these marks and rows."""
    header, split = cache.header, cache.peek(name)
    whole = _whole_arrays(cache, name)
    expected = expected_objects(header, split.rows, whole)
    damaged = [d for d in found if d.block is not None and d.array != "blocks"]
    blocks = {d.block: d.rows for d in damaged if d.rows is not None}
    if beyond := [d for d in found if d.what == BEYOND_ROWS]:
        for d in beyond:
            assert d.block is not None
            key = object_key(split.array(d.array), d.block)
            objects.remove(key)
            yield f"{key} {d.what}: it is removed"
    elif arrays := [d.array for d in found if d.block is None and d.rows is None]:
        for array in dict.fromkeys(arrays):
            objects.replace(f"{name}/{array}/zarr.json", expected[f"{array}/zarr.json"])
            yield f"{name}/{array}: metadata rewritten"
    else:
        for d in found:
            if d.array == "blocks" and d.block is not None and d.block not in blocks:
                objects.replace(f"{name}/{mark_key(header, d.block)}", expected[mark_key(header, 0)])
                yield f"{name}: the mark of block {d.block} rewritten"
        lost = [(d.array, d.rows) for d in found if d.block is None and d.rows is not None]
        for array, rows in lost:  # before the seal is taken: an extract after a kill would seal them
            objects.remove(chunk_key(split.array(array), rows.start // header.block_rows, header))
        if damaged:
            _take_marks(cache, objects, name, damaged)
        elif lost:
            _unseal(cache, objects, name)
        for block, rows in blocks.items():
            yield f"{name}: block {block}, rows {rows.start} to {rows.stop - 1}, is to be computed again"
        for array in dict.fromkeys(array for array, _ in lost):
            yield f"{name}: {array} is to be written again"


def _whole_arrays(cache: Cache, name: str) -> list[str]:
    """Return which arrays have chunks of many blocks; by the number of their chunks where their metadata are damaged.

    A number that fits both forms is taken for this one, which extract writes. If it is the other, the values are only
    written again.
    """
    header, split = cache.header, cache.peek(name)
    chunks = Counter(
        found[0] for key in list_split(cache.root.store, header, name)[0] if (found := parse_chunk_key(key))
    )
    most = -(-split.rows // whole_chunk_rows(split.rows, header))
    whole = []
    for path in WHOLE:
        try:
            holds_many = is_whole(split.array(path), header)
        except CacheError:
            holds_many = header.version > 1 and split.rows > header.block_rows and chunks[path] <= most
        whole += [path] * holds_many
    return whole


def _unseal(cache: Cache, objects: Objects, name: str) -> None:
    content = json.loads(objects.read(f"{name}/zarr.json") or b"")
    content["attributes"].update(sealed=False, digest=None)
    objects.replace(f"{name}/zarr.json", json.dumps(content, indent=2).encode())
    consolidate(cache.root, cache.header, cache.path)


def _drop(cache: Cache, objects: Objects, name: str) -> None:
    """Remove a split: its attributes first, without which no rest of it is ever read or sealed."""
    objects.remove(f"{name}/zarr.json")
    _sync_folder(cache, name)
    consolidate(cache.root, cache.header, cache.path)
    remove_own(objects.store, cache.header, name)


def _take_marks(cache: Cache, objects: Objects, name: str, found: Sequence[Damage]) -> None:
    """Take the marks of damaged blocks, then the seal, then remove the damaged chunks.

    In this order, since an extract after a kill would seal marked blocks, and leaves a sealed split as it is.
    """
    marks = [
        f"{name}/{mark_key(cache.header, block)}" for block in sorted({d.block for d in found if d.block is not None})
    ]
    for mark in marks:
        objects.remove(mark)
    _sync_folder(cache, marks[0].rpartition("/")[0])
    _unseal(cache, objects, name)
    for d in found:
        if d.block is not None:  # a writer of a shard would read it
            objects.remove(chunk_key(cache.peek(name).array(d.array), d.block, cache.header))


def _sync_folder(cache: Cache, path: str) -> None:
    """Wait until what was removed from a folder is gone from the disk."""
    if not is_url(cache.path) and Path(cache.path, path).is_dir():
        sync_files([Path(cache.path, path)], Path(cache.path))
