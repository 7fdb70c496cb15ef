"""Reading a whole cache to find damage, by split, array and rows.

form ──▶ every chunk's checksum ──▶ the seal
(metadata)                          (where it does not fit: metadata, marks and chunks that the header rules out;
                                     else chunks were exchanged, or attributes changed)
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from nacpipe.cache.consolidated import copy_is_stale
from nacpipe.cache.digest import hash_content, hash_keys, matches_seal
from nacpipe.cache.keys import find_foreign, list_split, parse_chunk_key
from nacpipe.cache.layout import (
    MISSING_INT,
    WHOLE,
    Header,
    chunk_key,
    count_blocks,
    create_array,
    create_marks,
    is_there,
    is_whole,
    list_split_paths,
    mark_key,
)
from nacpipe.cache.reader import Cache
from nacpipe.cache.store import WebStore
from nacpipe.cache.validation import (
    Arrays,
    classifier_problems,
    count_objects,
    has_no_marks,
    image_problems,
    open_member,
    root_problems,
    split_problems,
)
from nacpipe.errors import CacheError, FormatError, NacError

STALE_COPY = "the consolidated metadata are not what the groups and arrays are"
NO_METADATA = "has no zarr.json"
UNLIKE_HEADER = "its zarr.json is not what follows from the header"
BEYOND_ROWS = "is a chunk beyond the last row"
NO_MARK = "the mark is not there or cannot be read"
UNLIKE_SEAL = "is not what was sealed, though every chunk is whole: files or attributes were changed or exchanged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One damaged array, block or group."""

    split: str
    """The split; `classifier`, or empty for the root and the parents of splits."""
    array: str
    """The array, such as layer3/gradient, or a group; empty for the split's attributes and seal."""
    what: str
    block: int | None = None
    """The block of rows (of a chunk beyond the last row, the number in its key); None where metadata or the seal are
    meant."""
    rows: range | None = None
    """The block's rows; None of a chunk beyond the last row."""


def check_metadata(cache: Cache) -> list[Damage]:
    """Return where metadata differ from cache/README.md; no chunk is read."""
    with _without_copy(cache):
        return _metadata_damages(cache) or list(_copy_damage(cache))


def _without_copy(cache: Cache) -> contextlib.AbstractContextManager[None]:
    """Read the metadata of the groups and arrays themselves: at a web server, a reader uses the root's copy of them."""
    store = cache.root.store
    return store.without_copy() if isinstance(store, WebStore) else contextlib.nullcontext()


def _copy_damage(cache: Cache) -> Iterator[Damage]:
    """Yield a stale copy. Looked for where nothing else is damaged, since it would show everything a second time."""
    if copy_is_stale(cache.root, cache.header):
        yield Damage(split="", array="zarr.json", what=STALE_COPY)


def _metadata_damages(cache: Cache) -> list[Damage]:
    damages = [Damage(split="", array="", what=what) for what in root_problems(cache.header)]
    parents = {name[:i] for name in cache for i, letter in enumerate(name) if letter == "/"}
    damages += [
        Damage(split="", array=path, what=what) for path in sorted(parents) if (what := _group_problem(cache, path))
    ]
    damages += [Damage(split="classifier", array=array, what=what) for array, what in _classifier_problems(cache)]
    for name in list_split_paths(cache.root):
        if name in cache:
            damages += _check_split_metadata(cache, name)
        elif any(is_there(cache.root, f"{name}/{path}/zarr.json") for path in cache.header.arrays()):
            damages.append(
                Damage(split=name, array="", what="has no zarr.json: it was lost, or a removal was interrupted")
            )
    return damages


def verify_cache(cache: Cache, progress: Callable[[str, int], None] = lambda split, rows: None) -> list[Damage]:
    """Read a whole cache and return its damage; empty if there is none.

    Of a split that is not sealed, the marked blocks are read, because they will not be written again.

    Args:
        cache: the cache.
        progress: called with a split's name and the rows just read.
    """
    with _without_copy(cache):
        return _verify_all(cache, progress)


def _verify_all(cache: Cache, progress: Callable[[str, int], None]) -> list[Damage]:
    damages = _metadata_damages(cache)
    if not any(damage.split == "classifier" for damage in damages):
        try:
            cache.classifier()
        except CacheError as error:
            damages.append(Damage(split="classifier", array="", what=str(error).removeprefix(f"{cache.path}: ")))
    for name in cache:
        broken = {damage.array for damage in damages if damage.split == name}
        if "" not in broken:  # else the number of rows is not certain
            damages += _verify_split(cache, name, broken, progress)
    return damages or list(_copy_damage(cache))


def foreign_files(cache: Cache) -> list[str]:
    """Return the foreign files in a cache's folder, from the root; for a folder its name with a / at the end.

    Behind a web server they cannot be listed; there are none.
    """
    return find_foreign(cache.root.store, cache.header)


def _verify_split(cache: Cache, name: str, broken: set[str], progress: Callable[[str, int], None]) -> Iterator[Damage]:
    header, split = cache.header, cache.peek(name)
    blocks, whole = count_blocks(split.rows, header.block_rows), not broken

    def damage(array: str, block: int, what: str) -> Damage:
        start = block * header.block_rows
        rows = range(start, min(start + header.block_rows, split.rows))
        return Damage(split=name, array=array, what=what, block=block, rows=rows)

    marks = np.ones(blocks, bool) if "blocks" in broken else split.marks()
    begun = not (split.sealed or marks.any())  # it may lack arrays, and nothing in it vouches for any
    paths = [] if begun else [path for path in header.arrays() if path not in broken]
    at_once = [path for path in paths if is_whole(split.array(path), header)]
    by_block = [path for path in paths if path not in at_once]
    for block in range(blocks):
        if split.sealed and not marks[block]:
            whole = False
            yield damage("blocks", block, NO_MARK)
        elif not marks[block]:
            continue
        for path in by_block:
            if what := _chunk_problem(cache, split.array(path), block):
                whole = False
                yield damage(path, block, what)
        progress(name, min(header.block_rows, split.rows - block * header.block_rows))
    for path in at_once:
        for lost in _verify_whole(cache, name, split.array(path)):
            whole = False
            yield lost
    if split.sealed and whole:
        keys = list_split(cache.root.store, header, name)
        if not matches_seal(cache.root, name, split.attributes, keys, sharded=header.shard_blocks > 1):
            yield from list(_unlike_header(cache, name, keys[0])) or [Damage(split=name, array="", what=UNLIKE_SEAL)]


def _verify_whole(cache: Cache, name: str, array: zarr.Array[Any]) -> Iterator[Damage]:
    """Yield the damaged chunks of an array that was written before the blocks; `rows` are a chunk's.

    Of a split that is not sealed, a chunk that is not there is no damage: extract writes it.
    """
    size, path = array.chunks[0], array.path.removeprefix(f"{name}/")
    for start in range(0, array.shape[0], size):
        key = chunk_key(array, start // cache.header.block_rows, cache.header)
        if not (cache.peek(name).sealed or is_there(cache.root, key)):
            continue
        if what := _chunk_problem(cache, array, start // cache.header.block_rows, size):
            rows = range(start, min(start + size, array.shape[0]))
            yield Damage(split=name, array=path, what=what, rows=rows)


def _unlike_header(cache: Cache, name: str, keys: Sequence[str]) -> Iterator[Damage]:
    """Yield which of a split's objects are not what the header and the number of rows make them.

    Looked for only where the seal does not fit: another nacpipe or compressor may have written other metadata.
    """
    header, split, sharded = cache.header, cache.peek(name), cache.header.shard_blocks > 1
    rows = split.rows
    blocks = count_blocks(rows, header.block_rows)
    counts = {"blocks": blocks, **{path: count_objects(split.array(path)) for path in header.arrays()}}
    written = expected_objects(header, rows, [path for path in WHOLE if is_whole(split.array(path), header)])
    mark = written.pop(mark_key(header, 0))
    expected = {**written, **{mark_key(header, block): mark for block in range(blocks)}}
    hashes = hash_keys(cache.root, name, [key for key in keys if key in expected], sharded=sharded)
    for key in sorted(keys):
        array, number = parse_chunk_key(key) or ("", 0)
        if key in expected:
            if hashes[key] == hash_content(expected[key], key, sharded=sharded):
                continue
            if not array:
                yield Damage(split=name, array=key.removesuffix("/zarr.json"), what=UNLIKE_HEADER)
            else:
                yield Damage(split=name, array=array, what=NO_MARK, block=number)
        elif array and number >= counts[array]:
            yield Damage(split=name, array=array, what=BEYOND_ROWS, block=number)


def expected_objects(header: Header, rows: int, whole: Sequence[str]) -> dict[str, bytes]:
    """Return what follows from the header and a split's rows: key from the split → content.

    That is the metadata of the arrays and of groups without attributes, and as `mark_key(header, 0)` the content of
    every mark.

    Args:
        header: the cache's.
        rows: the split's.
        whole: the arrays whose chunks hold many blocks.
    """
    store = MemoryStore()
    group = zarr.create_group(store)
    for path in header.groups():
        group.create_group(path)
    for path, (width, dtype) in header.arrays().items():
        create_array(group, path, rows, width, dtype, header, whole=path in whole)
    create_marks(group, count_blocks(rows, header.block_rows), header)[0] = 1
    return sync(_contents(store))


async def _contents(store: MemoryStore) -> dict[str, bytes]:
    keys = [key async for key in store.list()]
    found = {key: await store.get(key, default_buffer_prototype()) for key in keys}
    return {key: buffer.to_bytes() for key, buffer in found.items() if buffer is not None}


def _chunk_problem(cache: Cache, array: zarr.Array[Any], block: int, rows: int = 0) -> str:
    """Return the problem of a block of an array, or of `rows` rows from it; empty if there is none."""
    start = block * cache.header.block_rows
    try:
        values = np.asarray(array[start : start + (rows or cache.header.block_rows)])
    except (NacError, OSError, MemoryError):
        raise
    except Exception as error:  # crc32c raises ValueError, Blosc RuntimeError, a crafted chunk any error
        return f"cannot be read ({type(error).__name__}: {str(error)[:120]})"
    missing = values == MISSING_INT if values.dtype.kind == "i" else np.isnan(values)
    if missing.any() and (values.dtype.kind == "i" or not is_there(cache.root, chunk_key(array, block, cache.header))):
        return "is not there"
    return _value_problem(array.path.rpartition("/")[2], values)


def _value_problem(name: str, values: Any) -> str:
    lowest = {"label": -1, "index": 0}.get(name)
    return "" if lowest is None or (values >= lowest).all() else f"holds {int(values.min())}, below {lowest}"


def _classifier_problems(cache: Cache) -> list[tuple[str, str]]:
    try:
        return list(classifier_problems(cache.root, cache.header))
    except FormatError as error:
        return [("", str(error).removeprefix("classifier/"))]


def _check_split_metadata(cache: Cache, name: str) -> Iterator[Damage]:
    if what := _group_problem(cache, name):
        yield Damage(split=name, array="", what=what)
        return
    group = open_member(cache.root, name)
    assert isinstance(group, zarr.Group)
    opened: Arrays = {}
    if rows_problem := _rows_problem(group, cache.header, opened):
        yield Damage(split=name, array="", what=rows_problem)
    for array, what in split_problems(group, cache.header, opened):
        if not (array and rows_problem):  # it is not the arrays that are damaged
            yield Damage(split=name, array=array, what=what)
    for what in image_problems(group.attrs):
        yield Damage(split=name, array="", what=what)
    for path in cache.header.groups():
        if (what := _group_problem(cache, f"{name}/{path}")) and not (what == NO_METADATA and has_no_marks(group)):
            yield Damage(split=name, array=path, what=what)


def _rows_problem(group: zarr.Group, header: Header, opened: Arrays) -> str:
    """Return what is wrong with the attribute rows where most arrays agree on another number; else nothing."""
    lengths = []
    for path in header.arrays():
        with contextlib.suppress(KeyError, FormatError):
            if isinstance(member := open_member(group, path), zarr.Array) and member.ndim:
                opened[path] = member
                lengths.append(member.shape[0])
    rows, expected = group.attrs.get("rows"), len(header.arrays())
    for held, arrays in Counter(lengths).most_common(1):
        if held != rows and 2 * arrays > expected:
            return f"rows is {str(rows)[:40]}, but {arrays} of {expected} arrays have {held}"
    return ""


def _group_problem(cache: Cache, path: str) -> str:
    try:
        return "" if isinstance(open_member(cache.root, path), zarr.Group) else "is an array, not a group"
    except KeyError:
        return NO_METADATA
    except FormatError as error:
        return str(error).removeprefix(f"{path}/")
