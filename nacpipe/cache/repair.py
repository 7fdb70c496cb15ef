"""Mending a cache: metadata at once, rows by taking their marks, so that the next extract computes exactly those again.

a chunk          its block loses its mark, its split the seal
metadata, marks  written anew: they follow from the header and the number of rows
attributes       the one bit that flipped is searched for: the digest says when it is found
whole, unsealed  (exchanged, or of another time): no telling which rows, so every block loses its mark
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
from nacpipe.cache.digest import digest_lines, hash_content, hash_keys, sealed_before
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

_ROUNDS = 5  # each mends one kind of damage of every split: attributes, metadata, rows, the seal


def repair_cache(path: str | Path) -> list[str]:
    """Mend what can be mended and take the marks of the rest; return what was done, a phrase each.

    Raises:
        InputError: the cache is at a URL that can only be read.
        CacheError: another process writes the cache, or it cannot be written.
        FormatError: the root's attributes are damaged beyond one bit, or of another version.
    """
    disk, done = None if is_url(path) else Path(path), list[str]()
    with CacheLock(path) as lock, writing(str(path)):
        if disk and disk.is_dir():
            lock.take()
        objects = Objects(path)
        done += _mend_root(path, objects)
        if disk:
            remove_drafts(disk)
        for _ in range(_ROUNDS):
            cache = open_cache(path)
            damage = verify_cache(cache)
            mended = list(_mend(cache, objects, damage))
            if not mended:
                break
            done += mended
        if disk:
            sync_files([disk / key for key in list_own(cache.root.store, cache.header, "")], disk)
    return done


def _mend_root(path: str | Path, objects: Objects) -> list[str]:
    try:
        open_cache(path)
        return []
    except FormatError as error:

        def whole(attributes: Mapping[str, Any]) -> bool:
            rest = {key: value for key, value in attributes.items() if key != "digest"}
            return attributes.get("digest") == fingerprint(rest)

        content = objects.read("zarr.json")
        if content is None or whole(_read_attributes(content)):  # of another version: nothing to mend
            raise
        if not _mend_bit(objects, "zarr.json", whole):
            raise FormatError(f"{error}; no single bit would mend it") from error
        open_cache(path)  # of another version after all?
        return ["the root's attributes: one bit mended"]


def _mend(cache: Cache, objects: Objects, damage: Sequence[Damage]) -> Iterator[str]:
    """One round: of every split the first kind of damage that it has."""
    for split in dict.fromkeys(d.split for d in damage):
        found = [d for d in damage if d.split == split]
        if split == "":
            for path in (d.array for d in found if d.array):
                objects.replace(f"{path}/zarr.json", _metadata(cache.header, 1)["zarr.json"])
                yield f"{path}: metadata written anew"
        elif split == "classifier":
            remove_own(objects.store, cache.header, "classifier")
            yield "classifier: is to be written again"
        elif any(d.array == "" for d in found):
            yield from _mend_attributes(cache, objects, split)
        elif _mend_rows(cache, objects, split, found):
            yield f"{split}: one bit of its attributes mended"
        elif arrays := [d.array for d in found if d.block is None]:
            metadata = _metadata(cache.header, cache.peek(split).rows)
            for array in dict.fromkeys(arrays):
                objects.replace(f"{split}/{array}/zarr.json", metadata[f"{array}/zarr.json"])
                yield f"{split}/{array}: metadata written anew"
        else:
            yield from _mend_blocks(cache, objects, split, found)


def _mend_blocks(cache: Cache, objects: Objects, name: str, found: Sequence[Damage]) -> Iterator[str]:
    """Chunks are damaged, or marks of a sealed split, which had them all."""
    split = cache.peek(name)
    spans = {d.block: d.rows for d in found if d.array != "blocks"}
    for d in found:
        if d.array == "blocks" and d.block not in spans:
            objects.replace(f"{name}/blocks/c/{d.block}", _metadata(cache.header, 1)["blocks/c/0"])
            yield f"{name}: the mark of block {d.block} written anew"
    if spans:
        _take_marks(objects, name, [block for block in spans if block is not None])
    for d in found:
        if d.array != "blocks" and d.block is not None:  # a damaged chunk would be read before its last rows are set
            objects.remove(chunk_key(split.array(d.array), d.block, cache.header))
    for block, rows in spans.items():
        if rows is not None:
            yield f"{name}: block {block}, rows {rows.start} to {rows.stop - 1}, is to be computed again"


def _mend_rows(cache: Cache, objects: Objects, name: str, found: Sequence[Damage]) -> bool:
    """Where every array is said to be misshapen, the split's number of rows is rather wrong than all of them."""
    if not {d.array for d in found if d.block is None} >= set(cache.header.arrays()):
        return False
    return _mend_bit(objects, f"{name}/zarr.json", partial(_fits, sets=_hash_split(cache, name)))


def _hash_split(cache: Cache, name: str) -> list[dict[str, str]]:
    """What a seal may cover: the split's objects, or, of an earlier nacpipe, the foreign files among them too."""
    sharded = cache.header.shard_blocks > 1
    own, foreign = list_split(cache.root.store, cache.header, name)
    hashes = hash_keys(cache.root, name, own, sharded=sharded)
    more = hash_keys(cache.root, name, sealed_before(foreign), sharded=sharded)
    return [hashes, {**hashes, **more}] if more else [hashes]


def _fits(attributes: Mapping[str, Any], sets: Sequence[Mapping[str, str]]) -> bool:
    """Whether a split was sealed with these attributes and one of these sets of hashes."""
    good = attributes.get("sealed") is True and not any(attribute_problems(attributes))
    return good and any(digest_lines(attributes, hashes) == attributes["digest"] for hashes in sets)


def _mend_attributes(cache: Cache, objects: Objects, name: str) -> Iterator[str]:
    """A split's attributes are damaged, or its seal does not fit what is whole by itself."""
    content = objects.read(f"{name}/zarr.json")
    if content is None:
        remove_own(objects.store, cache.header, name)
        yield f"{name}: what was left of it is removed; it is to be extracted again"
        return
    sharded = cache.header.shard_blocks > 1
    sets = _hash_split(cache, name)
    hashes, attributes = sets[0], _read_attributes(content)
    if _fits(attributes, sets):
        return  # they were sealed so, whatever else is wrong with them
    usable = not any(attribute_problems(attributes))
    if usable:
        ours = _metadata(cache.header, attributes["rows"])
        del ours["zarr.json"]
        chunks = _chunk_keys(cache.header, attributes["rows"])
        kept = {key: value for key, value in hashes.items() if key in chunks}
        wanted = {key: hash_content(content, key, sharded=sharded) for key, content in ours.items()}
        if _fits(attributes, [{**more, **kept, **wanted} for more in _others(sets)]):
            for key in wanted:
                if hashes.get(key) != wanted[key]:
                    objects.replace(f"{name}/{key}", ours[key])
                    yield f"{name}/{key} written anew"
            for key in set(hashes) - set(kept) - set(wanted):
                objects.remove(f"{name}/{key}")
                yield f"{name}/{key}, which does not belong there, is removed"
            return
    if _mend_bit(objects, f"{name}/zarr.json", partial(_fits, sets=sets)):
        yield f"{name}: one bit of its attributes mended"
    elif usable:
        _take_marks(objects, name, range(count_blocks(attributes["rows"], cache.header.block_rows)))
        yield f"{name}: no telling which rows are not those that were sealed; all of it is to be computed again"
    else:
        remove_own(objects.store, cache.header, name)
        yield f"{name}: its attributes are lost; it is to be extracted again"


def _others(sets: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Of each set of hashes what is not the split's own."""
    return [{key: value for key, value in hashes.items() if key not in sets[0]} for hashes in sets]


def _take_marks(objects: Objects, name: str, blocks: Iterable[int]) -> None:
    """Take the seal first, then these marks."""
    content = json.loads(objects.read(f"{name}/zarr.json") or b"")
    content["attributes"].update(sealed=False, digest=None)
    objects.replace(f"{name}/zarr.json", json.dumps(content, indent=2).encode())
    for block in blocks:
        objects.remove(f"{name}/blocks/c/{block}")


def _mend_bit(objects: Objects, key: str, fits: Callable[[dict[str, Any]], bool]) -> bool:
    """Turn each bit of a zarr.json in turn until its attributes fit a digest; False where no single one does it."""
    content = bytearray(objects.read(key) or b"")
    for place in range(8 * min(len(content), 2**16)):
        content[place // 8] ^= 1 << place % 8
        if fits(_read_attributes(bytes(content))):
            objects.replace(key, bytes(content))
            return True
        content[place // 8] ^= 1 << place % 8
    return False


def _read_attributes(content: bytes) -> dict[str, Any]:
    """A group's attributes; none where its zarr.json is not that of a group."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    whole = isinstance(data, dict) and data.get("node_type") == "group" and data.get("zarr_format") == 3
    attributes = data.get("attributes") if whole else None
    return attributes if isinstance(attributes, dict) else {}


def _chunk_keys(header: Header, rows: int) -> set[str]:
    """The keys of a split's chunks, marks excepted, as this nacpipe writes them."""
    objects = -(-count_blocks(rows, header.block_rows) // header.shard_blocks)
    return {f"{p}/c/{k}{'/0' * (w > 0)}" for p, (w, _) in header.arrays().items() for k in range(objects)}


def _metadata(header: Header, rows: int) -> dict[str, bytes]:
    """What this nacpipe writes of a split but its attributes and chunks: key → content, a bare group's among them."""
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
    found = {key: await store.get(key, default_buffer_prototype()) for key in keys}
    return {key: buffer.to_bytes() for key, buffer in found.items() if buffer is not None}
