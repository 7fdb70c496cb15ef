"""The digest that seals a split, over its metadata and its chunks' checksums.

Every chunk ends in the CRC32C of its bytes, so the digest needs four bytes per chunk. A shard ends in the checksum of
its index alone, so it is read whole. Every zarr.json is read whole; of the split's own, which stores the digest, the
other attributes are used. A deleted, added or exchanged chunk changes the digest. A chunk with changed bytes fails its
own checksum when it is read. Objects that do not belong to the split (keys.py) are not included.
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
from nacpipe.cache.store import MAX_REQUESTS

PIECE = 2 << 20  # bytes of a shard that are read at once
PIECES = 4  # concurrent reads of shards at a server


def split_digest(root: zarr.Group, split: str, attributes: Mapping[str, Any], header: Header) -> str:
    """Return the sha256 (hex) of a split's metadata and chunk checksums, given the attributes to seal."""
    own, _ = list_split(root.store, header, split)
    return digest_lines(attributes, hash_keys(root, split, own, sharded=header.shard_blocks > 1))


def digest_lines(attributes: Mapping[str, Any], hashes: Mapping[str, str]) -> str:
    """Return the digest of attributes and of the hashes from `hash_keys`."""
    sealed = {key: value for key, value in attributes.items() if key not in ("sealed", "digest")}
    head = json.dumps(sealed, sort_keys=True, separators=(",", ":"))
    lines = "".join(f"{key} {hashes[key]}\n" for key in sorted(hashes))
    return hashlib.sha256(f"{head}\n{lines}".encode()).hexdigest()


def hash_keys(root: zarr.Group, split: str, keys: Sequence[str], *, sharded: bool = False) -> dict[str, str]:
    """Return keys below a split → the sha256 (hex) of the object in the seal."""
    return sync(_hash_keys(root.store, split, keys, sharded))


def matches_seal(
    root: zarr.Group,
    split: str,
    attributes: Mapping[str, Any],
    keys: tuple[Sequence[str], Sequence[str]],
    *,
    sharded: bool = False,
) -> bool:
    """Return whether a split's digest matches its attributes and objects, given `keys.list_split`.

    An earlier nacpipe included foreign files in the digest; such a digest matches while these files exist.
    """
    own, foreign = keys
    hashes = hash_keys(root, split, own, sharded=sharded)
    if digest_lines(attributes, hashes) == attributes["digest"]:
        return True
    hashes |= hash_keys(root, split, foreign_in_old_seals(foreign), sharded=sharded)
    return bool(foreign) and digest_lines(attributes, hashes) == attributes["digest"]


def foreign_in_old_seals(foreign: Sequence[str]) -> list[str]:
    """Return the foreign files that an earlier nacpipe included in digests: all but hidden ones and `*.partial`."""
    hidden = (any(part.startswith(".") for part in key.split("/")) for key in foreign)
    return [key for key, hides in zip(foreign, hidden, strict=True) if not (hides or key.endswith(".partial"))]


def hash_content(content: bytes, key: str, *, sharded: bool = False) -> str:
    """Return the sha256 (hex) of an object in the seal: of all bytes, or of a chunk's last four."""
    return hashlib.sha256(content if sharded or key.endswith("zarr.json") else content[-4:]).hexdigest()


async def _hash_keys(store: Store, split: str, keys: Sequence[str], sharded: bool) -> dict[str, str]:
    """Hash objects concurrently; at most a few MiB of a shard are in memory at a time."""
    if isinstance(store, LocalStore):  # takes a fifth of the time of the store's own read
        whole = {key: sharded or key.endswith("zarr.json") for key in keys}
        return {key: _hash_file(f"{store.root}/{split}/{key}", whole=whole[key]) for key in keys}
    requests, pieces = asyncio.Semaphore(MAX_REQUESTS), asyncio.Semaphore(PIECES)

    async def hash_object(key: str) -> str:
        path, metadata = f"{split}/{key}", key.endswith("zarr.json")
        if sharded and not metadata:
            async with pieces:
                return await _hash_pieces(store, path)
        async with requests:
            wanted = None if metadata else SuffixByteRequest(4)
            buffer = await store.get(path, default_buffer_prototype(), wanted)
        return hash_content(b"" if buffer is None else buffer.to_bytes(), key)

    return dict(zip(keys, await asyncio.gather(*(hash_object(key) for key in keys)), strict=True))


async def _hash_pieces(store: Store, path: str) -> str:
    digest = hashlib.sha256()
    try:
        size = await store.getsize(path)
    except FileNotFoundError:
        return digest.hexdigest()
    for start in range(0, size, PIECE):
        if not getattr(store, "ranges", True):  # a web server without byte ranges
            digest, wanted = hashlib.sha256(), None
        else:
            wanted = RangeByteRequest(start, min(start + PIECE, size))
        buffer = await store.get(path, default_buffer_prototype(), wanted)
        digest.update(b"" if buffer is None else buffer.to_bytes())
        if wanted is None:
            break
    return digest.hexdigest()


def _hash_file(path: str, *, whole: bool) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if not whole:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4))
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
