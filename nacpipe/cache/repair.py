"""Repairing a cache: metadata at once; rows by removing their marks, so that the next extract computes them again.

damaged chunk               its block loses its mark, its split the seal
metadata, marks             rewritten: they follow from the header and the number of rows
attributes                  every single bit is flipped until the digest fits
valid chunks, other digest  (exchanged or old chunks): the rows are not known, so every block loses its mark
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from nacpipe.cache.address import Objects
from nacpipe.cache.digest import digest_lines, foreign_in_old_seals, hash_content, hash_keys
from nacpipe.cache.durability import sync_files, writing
from nacpipe.cache.identity import fingerprint
from nacpipe.cache.keys import list_own, list_split, remove_own
from nacpipe.cache.layout import Header, chunk_key, count_blocks, create_array, create_marks
from nacpipe.cache.lock import CacheLock
from nacpipe.cache.reader import Cache, open_cache
from nacpipe.cache.validation import attribute_problems
from nacpipe.cache.verify import Damage, verify_cache
from nacpipe.cache.writer import remove_drafts
from nacpipe.errors import FormatError
from nacpipe.files import is_url

_ROUNDS = 5  # each repairs one kind of damage of every split: attributes, metadata, rows, the seal


def repair_cache(path: str | Path) -> list[str]:
    """Repair a cache and remove the marks of damaged blocks; return one phrase per action.

    Raises:
        InputError: the cache is at a URL that can only be read.
        CacheError: another process writes the cache, or it cannot be written.
        FormatError: the root's attributes have more than one wrong bit, or another version.
    """
    disk, actions = None if is_url(path) else Path(path), list[str]()
    with CacheLock(path) as lock, writing(str(path)):
        if disk and disk.is_dir():
            lock.take()
        objects = Objects(path)
        actions += _repair_root(path, objects)
        if disk:
            remove_drafts(disk)
        for _ in range(_ROUNDS):
            cache = open_cache(path)
            damage = verify_cache(cache)
            repaired = list(_repair_round(cache, objects, damage))
            if not repaired:
                break
            actions += repaired
        if disk:
            sync_files([disk / key for key in list_own(cache.root.store, cache.header, "")], disk)
    return actions


def _repair_root(path: str | Path, objects: Objects) -> list[str]:
    try:
        open_cache(path)
        return []
    except FormatError as error:

        def whole(attributes: Mapping[str, Any]) -> bool:
            signed = {key: value for key, value in attributes.items() if key != "digest"}
            return attributes.get("digest") == fingerprint(signed)

        content = objects.read("zarr.json")
        if content is None or whole(_read_attributes(content)):  # of another version: not damaged
            raise
        if not _repair_bit(objects, "zarr.json", whole):
            raise FormatError(f"{error}; no single bit corrects it") from error
        open_cache(path)  # raises if the repaired version is another
        return ["the root's attributes: one bit repaired"]


def _repair_round(cache: Cache, objects: Objects, damage: Sequence[Damage]) -> Iterator[str]:
    """Repair the first kind of damage of every split."""
    for split in dict.fromkeys(d.split for d in damage):
        split_damages = [d for d in damage if d.split == split]
        if split == "":
            for path in (d.array for d in split_damages if d.array):
                objects.replace(f"{path}/zarr.json", _metadata(cache.header, 1)["zarr.json"])
                yield f"{path}: metadata rewritten"
        elif split == "classifier":
            remove_own(objects.store, cache.header, "classifier")
            yield "classifier: is to be written again"
        elif any(d.array == "" for d in split_damages):
            yield from _repair_attributes(cache, objects, split)
        elif _repair_rows(cache, objects, split, split_damages):
            yield f"{split}: one bit of its attributes repaired"
        elif arrays := [d.array for d in split_damages if d.block is None]:
            metadata = _metadata(cache.header, cache.peek(split).rows)
            for array in dict.fromkeys(arrays):
                objects.replace(f"{split}/{array}/zarr.json", metadata[f"{array}/zarr.json"])
                yield f"{split}/{array}: metadata rewritten"
        else:
            yield from _repair_blocks(cache, objects, split, split_damages)


def _repair_blocks(cache: Cache, objects: Objects, name: str, split_damages: Sequence[Damage]) -> Iterator[str]:
    """Repair damaged chunks, and marks of a sealed split, in which all blocks were marked."""
    split = cache.peek(name)
    spans = {d.block: d.rows for d in split_damages if d.array != "blocks"}
    for d in split_damages:
        if d.array == "blocks" and d.block not in spans:
            objects.replace(f"{name}/blocks/c/{d.block}", _metadata(cache.header, 1)["blocks/c/0"])
            yield f"{name}: the mark of block {d.block} rewritten"
    if spans:
        _remove_marks(objects, name, [block for block in spans if block is not None])
    for d in split_damages:
        if d.array != "blocks" and d.block is not None:  # writing part of a damaged chunk would read it first
            objects.remove(chunk_key(split.array(d.array), d.block, cache.header))
    for block, rows in spans.items():
        if rows is not None:
            yield f"{name}: block {block}, rows {rows.start} to {rows.stop - 1}, is to be computed again"


def _repair_rows(cache: Cache, objects: Objects, name: str, split_damages: Sequence[Damage]) -> bool:
    """Repair the split's number of rows if every array has another shape; return whether it was wrong."""
    if not {d.array for d in split_damages if d.block is None} >= set(cache.header.arrays()):
        return False
    return _repair_bit(objects, f"{name}/zarr.json", partial(_fits, hash_sets=_hash_split(cache, name)))


def _hash_split(cache: Cache, name: str) -> list[dict[str, str]]:
    """Return the hashes that a digest may include: the split's objects, and these with foreign files (old seals)."""
    sharded = cache.header.shard_blocks > 1
    own, foreign = list_split(cache.root.store, cache.header, name)
    hashes = hash_keys(cache.root, name, own, sharded=sharded)
    more = hash_keys(cache.root, name, foreign_in_old_seals(foreign), sharded=sharded)
    return [hashes, {**hashes, **more}] if more else [hashes]


def _fits(attributes: Mapping[str, Any], hash_sets: Sequence[Mapping[str, str]]) -> bool:
    """Return whether a split's digest matches these attributes and one of these sets of hashes."""
    good = attributes.get("sealed") is True and not any(attribute_problems(attributes))
    return good and any(digest_lines(attributes, hashes) == attributes["digest"] for hashes in hash_sets)


def _repair_attributes(cache: Cache, objects: Objects, name: str) -> Iterator[str]:
    """Repair a split with damaged attributes, or with valid chunks that do not match its digest."""
    content = objects.read(f"{name}/zarr.json")
    if content is None:
        remove_own(objects.store, cache.header, name)
        yield f"{name}: what was left of it is removed; it is to be extracted again"
        return
    sharded = cache.header.shard_blocks > 1
    hash_sets = _hash_split(cache, name)
    hashes, attributes = hash_sets[0], _read_attributes(content)
    if _fits(attributes, hash_sets):
        return  # the attributes are those that were sealed
    usable = not any(attribute_problems(attributes))
    if usable:
        expected = _metadata(cache.header, attributes["rows"])
        del expected["zarr.json"]
        chunks = _chunk_keys(cache.header, attributes["rows"])
        kept = {key: value for key, value in hashes.items() if key in chunks}
        wanted = {key: hash_content(content, key, sharded=sharded) for key, content in expected.items()}
        if _fits(attributes, [{**more, **kept, **wanted} for more in _foreign_hashes(hash_sets)]):
            for key in wanted:
                if hashes.get(key) != wanted[key]:
                    objects.replace(f"{name}/{key}", expected[key])
                    yield f"{name}/{key} rewritten"
            for key in set(hashes) - set(kept) - set(wanted):
                objects.remove(f"{name}/{key}")
                yield f"{name}/{key}, which does not belong there, is removed"
            return
    if _repair_bit(objects, f"{name}/zarr.json", partial(_fits, hash_sets=hash_sets)):
        yield f"{name}: one bit of its attributes repaired"
    elif usable:
        _remove_marks(objects, name, range(count_blocks(attributes["rows"], cache.header.block_rows)))
        yield f"{name}: no telling which rows are not those that were sealed; all of it is to be computed again"
    else:
        remove_own(objects.store, cache.header, name)
        yield f"{name}: its attributes are lost; it is to be extracted again"


def _foreign_hashes(hash_sets: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return each set of hashes without those of the split's own objects."""
    return [{key: value for key, value in hashes.items() if key not in hash_sets[0]} for hashes in hash_sets]


def _remove_marks(objects: Objects, name: str, blocks: Iterable[int]) -> None:
    """Remove the seal first, then these marks."""
    content = json.loads(objects.read(f"{name}/zarr.json") or b"")
    content["attributes"].update(sealed=False, digest=None)
    objects.replace(f"{name}/zarr.json", json.dumps(content, indent=2).encode())
    for block in blocks:
        objects.remove(f"{name}/blocks/c/{block}")


def _repair_bit(objects: Objects, key: str, fits: Callable[[dict[str, Any]], bool]) -> bool:
    """Flip each bit of a zarr.json until its attributes fit; return False if no single flip does."""
    content = bytearray(objects.read(key) or b"")
    for place in range(8 * min(len(content), 2**16)):
        content[place // 8] ^= 1 << place % 8
        if fits(_read_attributes(bytes(content))):
            objects.replace(key, bytes(content))
            return True
        content[place // 8] ^= 1 << place % 8
    return False


def _read_attributes(content: bytes) -> dict[str, Any]:
    """Return a group's attributes; empty if the content is not a group's zarr.json."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    whole = isinstance(data, dict) and data.get("node_type") == "group" and data.get("zarr_format") == 3
    attributes = data.get("attributes") if whole else None
    return attributes if isinstance(attributes, dict) else {}


def _chunk_keys(header: Header, rows: int) -> set[str]:
    """Return the keys of a split's chunks, except marks, as this nacpipe writes them."""
    objects = -(-count_blocks(rows, header.block_rows) // header.shard_blocks)
    return {f"{p}/c/{k}{'/0' * (w > 0)}" for p, (w, _) in header.arrays().items() for k in range(objects)}


def _metadata(header: Header, rows: int) -> dict[str, bytes]:
    """Return key → content of a split's metadata and marks, as this nacpipe writes them, and of an empty group."""
    store = MemoryStore()
    group = zarr.create_group(store)
    for spec in header.layers:
        group.create_group(spec.name)
    for path, (width, dtype) in header.arrays().items():
        create_array(group, path, rows, width, dtype, header)
    create_marks(group, count_blocks(rows, header.block_rows))[:] = 1
    return sync(_contents(store))


async def _contents(store: MemoryStore) -> dict[str, bytes]:
    keys = [key async for key in store.list()]
    buffers = {key: await store.get(key, default_buffer_prototype()) for key in keys}
    return {key: buffer.to_bytes() for key, buffer in buffers.items() if buffer is not None}
