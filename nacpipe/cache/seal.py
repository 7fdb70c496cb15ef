"""The seal of a split: one digest over its metadata and its chunks' checksums.

Every chunk ends in the CRC32C of its bytes, so the digest reads four bytes a chunk (all of a shard, which ends in the
checksum of its index alone), and all of every zarr.json but the split's own, which holds the digest; of that, the
attributes without it. A chunk that was deleted, added or exchanged changes the digest; one whose bytes changed is
refused by its own checksum when it is read.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import zarr
from zarr.abc.store import SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

_AT_ONCE = 64  # reads in flight


def split_digest(group: zarr.Group, attributes: Mapping[str, Any], *, sharded: bool = False) -> str:
    """Return the sha256 (hex) of a split's metadata and chunk checksums, given the attributes to seal."""
    return sync(_digest(group, attributes, sharded))


async def _digest(group: zarr.Group, attributes: Mapping[str, Any], sharded: bool) -> str:
    store, prefix = group.store, f"{group.path}/"
    own = f"{prefix}zarr.json"
    keys = sorted([k async for k in store.list_prefix(prefix) if k != own and not k.endswith(".partial")])
    gate = asyncio.Semaphore(_AT_ONCE)

    async def line(key: str) -> str:
        wanted = None if sharded or key.endswith("zarr.json") else SuffixByteRequest(4)
        async with gate:
            buffer = await store.get(key, default_buffer_prototype(), wanted)
        content = b"" if buffer is None else buffer.to_bytes()
        return f"{key.removeprefix(prefix)} {hashlib.sha256(content).hexdigest()}\n"

    lines = await asyncio.gather(*(line(key) for key in keys))
    sealed = {key: value for key, value in attributes.items() if key not in ("sealed", "digest")}
    head = json.dumps(sealed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256((head + "\n" + "".join(lines)).encode()).hexdigest()
