"""A copy of a cache in the newest format, value for value; the old cache is not changed.

A finished split is copied whole and sealed. Of a split that is not finished, the written blocks are copied, and extract
goes on with the copy. A conversion that was stopped goes on with the blocks that the copy lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nacpipe.cache.address import holds_cache
from nacpipe.cache.layout import FORMAT_VERSION, layer_name_problem
from nacpipe.cache.lock import CacheLock
from nacpipe.cache.reader import Cache, open_cache
from nacpipe.cache.writer import CacheWriter
from nacpipe.errors import CacheError, FormatError, InputError
from nacpipe.files import is_url


def convert_cache(
    source: str | Path, target: str | Path, progress: Callable[[str, int], None] = lambda split, rows: None
) -> Cache:
    """Copy a cache into the newest format and return the copy.

    Args:
        source: the cache's path or URL.
        target: the copy's path or URL; it is created, or gone on with.
        progress: called with a split's name and the number of rows just copied.

    Raises:
        InputError: both are the same, or the target can only be read.
        FormatError: a layer's name is not allowed in the newest format, or the target is of an older one.
        IdentityError: the target is a copy of another cache.
        CacheError: the source is damaged, or the target cannot be written or is being written.
    """
    if _is_same(source, target):
        raise InputError(f"{target}: the copy needs another place than the cache")
    old = open_cache(source)
    for spec in old.header.layers:
        if problem := layer_name_problem(spec.name):
            raise FormatError(f"{old.path}: layer name {spec.name!r} {problem}; extract the network again")
    if holds_cache(target) and (version := open_cache(target).header.version) != FORMAT_VERSION:
        raise FormatError(f"{target} has format version {version}; give the copy another place")
    with CacheLock(target) as lock:
        lock.take()
        writer = CacheWriter(target, replace(old.header, version=FORMAT_VERSION))
        if (classifier := old.classifier()) is not None:
            writer.write_classifier(*classifier)
        if writer.header.block_rows != old.header.block_rows or writer.header.shard_blocks != old.header.shard_blocks:
            raise CacheError(f"{writer.path} has other blocks than {old.path}; give the copy another place")
        copy = open_cache(target)
        for name in old:
            if name in copy and copy.peek(name).sealed:
                _check_copied(old, copy, name)
                progress(name, copy.peek(name).rows)
            else:
                _convert_split(old, writer, name, progress)
    return open_cache(target)


def _is_same(source: str | Path, target: str | Path) -> bool:
    if is_url(source) or is_url(target):
        return str(source).rstrip("/") == str(target).rstrip("/")
    return Path(source).resolve() == Path(target).resolve()


def _check_copied(old: Cache, copy: Cache, name: str) -> None:
    ours, theirs = copy.peek(name), old.peek(name)
    if (ours.rows, ours.images) != (theirs.rows, theirs.images):
        raise CacheError(f"{copy.path}: {name} is of other images than that of {old.path}; give the copy another place")


def _convert_split(old: Cache, writer: CacheWriter, name: str, progress: Callable[[str, int], None]) -> None:
    """Copy the blocks of a split that the copy lacks, and seal it where the old one is sealed."""
    split = old[name] if old.peek(name).sealed else old.peek(name)
    known = {"label": split.label, "index": split.index} if split.sealed else {}
    written = split.marks()
    done = writer.prepare(name, split.rows, split.images, **known)
    paths = {path: path for path in writer.header.arrays()}
    for spec in old.header.layers:  # by name: the copy can have them in another order
        for what in ("activation", "gradient"):
            if (new := writer.header.layer_array(spec.name, what)) in paths:
                paths[new] = old.header.layer_array(spec.name, what)
    for start in range(0, done.size, old.header.shard_blocks):
        unit = slice(start, start + old.header.shard_blocks)
        rows = slice(start * old.header.block_rows, min(unit.stop * old.header.block_rows, split.rows))
        if not written[unit].all():
            continue
        if not done[unit].all():
            arrays = {
                new: known[new][rows] if new in known else split.read(path, rows, any_number=True)
                for new, path in paths.items()
            }
            writer.write_block(name, start, arrays)
        progress(name, rows.stop - rows.start)
    if split.sealed:
        writer.seal(name)
