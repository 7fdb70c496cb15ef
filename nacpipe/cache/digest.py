"""The seal of a split: one digest over its metadata and its chunks' checksums.

Every chunk ends in the CRC32C of its bytes, so the digest reads four bytes a chunk (all of a shard, which ends in the
checksum of its index alone), and all of every zarr.json but the split's own, which holds the digest; of that, the
attributes without it. A chunk that was deleted, added or exchanged changes the digest; one whose bytes changed is
refused by its own checksum when it is read. What does not belong to a split (keys.py) plays no part.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import zarr
from zarr.abc.store import RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from nacpipe.cache.keys import list_split
from nacpipe.cache.layout import Header
from nacpipe.cache.store import AT_ONCE

PIECE = 2 << 20  # bytes of a shard that are read at once
PIECES = 4  # in flight, of shards at a server


def split_digest(root: zarr.Group, split: str, attributes: Mapping[str, Any], header: Header) -> str:
    """Return the sha256 (hex) of a split's metadata and chunk checksums, given the attributes to seal."""
    own, _ = list_split(root.store, header, split)
    return digest_lines(attributes, hash_keys(root, split, own, sharded=header.shard_blocks > 1))


def digest_lines(attributes: Mapping[str, Any], hashes: Mapping[str, str]) -> str:
    """Return the digest of attributes and of what `hash_keys` found."""
    sealed = {key: value for key, value in attributes.items() if key not in ("sealed", "digest")}
    head = json.dumps(sealed, sort_keys=True, separators=(",", ":"))
    lines = "".join(f"{key} {hashes[key]}\n" for key in sorted(hashes))
    return hashlib.sha256(f"{head}\n{lines}".encode()).hexdigest()


def hash_keys(root: zarr.Group, split: str, keys: Sequence[str], *, sharded: bool = False) -> dict[str, str]:
    """Return keys below a split → the sha256 (hex) that the seal takes of the object."""
    return sync(_hash_keys(root.store, split, keys, sharded))


def is_as_sealed(
    root: zarr.Group,
    split: str,
    attributes: Mapping[str, Any],
    keys: tuple[Sequence[str], Sequence[str]],
    *,
    sharded: bool = False,
) -> bool:
    """Return whether a split's digest is that of its attributes and objects, given `keys.list_split`.

    An earlier nacpipe sealed foreign files with a split where it found some: such a digest fits while they are there.
    """
    own, foreign = keys
    hashes = hash_keys(root, split, own, sharded=sharded)
    if digest_lines(attributes, hashes) == attributes["digest"]:
        return True
    hashes |= hash_keys(root, split, sealed_before(foreign), sharded=sharded)
    return bool(foreign) and digest_lines(attributes, hashes) == attributes["digest"]


def sealed_before(foreign: Sequence[str]) -> list[str]:
    """Return the foreign files that an earlier nacpipe sealed with a split: all but hidden ones and `*.partial`."""
    hidden = (any(part.startswith(".") for part in key.split("/")) for key in foreign)
    return [key for key, hides in zip(foreign, hidden, strict=True) if not (hides or key.endswith(".partial"))]


def hash_content(content: bytes, key: str, *, sharded: bool = False) -> str:
    """Return the sha256 (hex) that the seal takes of an object: all of it, or of a chunk the last four bytes."""
    return hashlib.sha256(content if sharded or key.endswith("zarr.json") else content[-4:]).hexdigest()


async def _hash_keys(store: Store, split: str, keys: Sequence[str], sharded: bool) -> dict[str, str]:
    """Only hashes are kept, and of a shard a few MiB are in memory at a time."""
    gate, pieces = asyncio.Semaphore(AT_ONCE), asyncio.Semaphore(PIECES)

    async def hash_object(key: str) -> str:
        path, metadata = f"{split}/{key}", key.endswith("zarr.json")
        if isinstance(store, LocalStore):  # a fifth of the time that the store takes for four bytes
            return _hash_file(f"{store.root}/{path}", whole=sharded or metadata)
        if sharded and not metadata:
            async with pieces:
                return await _hash_pieces(store, path)
        async with gate:
            wanted = None if metadata else SuffixByteRequest(4)
            buffer = await store.get(path, default_buffer_prototype(), wanted)
        return hash_content(b"" if buffer is None else buffer.to_bytes(), key)

    return dict(zip(keys, await asyncio.gather(*(hash_object(key) for key in keys)), strict=True))


async def _hash_pieces(store: Store, path: str) -> str:
    found = hashlib.sha256()
    try:
        size = await store.getsize(path)
    except FileNotFoundError:
        return found.hexdigest()
    for start in range(0, size, PIECE):
        if not getattr(store, "ranges", True):  # a web server that sends whole objects alone
            found, wanted = hashlib.sha256(), None
        else:
            wanted = RangeByteRequest(start, min(start + PIECE, size))
        buffer = await store.get(path, default_buffer_prototype(), wanted)
        found.update(b"" if buffer is None else buffer.to_bytes())
        if wanted is None:
            break
    return found.hexdigest()


def _hash_file(path: str, *, whole: bool) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        if not whole:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4))
        while piece := file.read(PIECE):
            found.update(piece)
    return found.hexdigest()
