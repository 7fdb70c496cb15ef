"""Sealing, verifying and repairing a sharded split hold a few MiB, however large its shards are."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.core.sync import sync
from zarr.storage import MemoryStore, WrapperStore

from nacpipe.cache import CacheWriter, Header, LayerSpec, open_cache
from nacpipe.cache import digest as seal
from nacpipe.cache.digest import hash_keys, matches_seal
from nacpipe.cache.keys import list_split
from nacpipe.cache.repair import repair_cache
from nacpipe.cache.store import WebStore
from nacpipe.cache.verify import verify_cache
from tests.web import Plain, Ranges, serve

NEURONS, BLOCK, BLOCKS = 1024, 128, 32  # a shard of 16 MiB of random numbers, which do not compress
ROWS = 2 * BLOCK * BLOCKS
HEADER = Header(
    identity={
        **dict.fromkeys(("benchmark", "architecture", "family", "dtype"), "made up"),
        "weights": "a" * 64,
        "transform": {"resize": 8, "crop": 8, "mean": [0.5], "std": [0.5]},
    },
    information={},
    block_rows=BLOCK,
    layers=(LayerSpec(name="wide", path="wide", pooling="none", neurons=NEURONS),),
    classes=2,
    features=0,
    shard_blocks=BLOCKS,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of four large shards, not sealed."""
    path = tmp_path_factory.mktemp("sharded") / "c.zarr"
    writer, random = CacheWriter(path, HEADER), np.random.RandomState(0)
    writer.prepare("id/val", ROWS, {"list": "val.txt", "sha256": "b" * 64})
    for shard in range(2):
        floats = random.randint(0, 2**24, (ROWS // 2, NEURONS)).astype(np.float32)
        plain = {"logits": floats[:, :2], "label": np.zeros(ROWS // 2, int), "index": np.arange(ROWS // 2)}
        arrays: dict[str, Any] = {"layers/wide/activation": floats, "layers/wide/gradient": floats[::-1], **plain}
        writer.write_block("id/val", shard * BLOCKS, arrays)
    assert (path / "id/val/layers/wide/gradient/c.1.0").stat().st_size > 10 * 2**20
    return path


def peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_sealing_verifying_and_repairing_read_shards_in_pieces(written: Path) -> None:
    writer = CacheWriter(written, HEADER)
    bound = 8 * 2**20  # half of one of the four shards
    assert peak(lambda: writer.seal("id/val")) < bound
    cache = open_cache(written)
    assert peak(lambda: verify_cache(cache)) < bound
    assert peak(lambda: repair_cache(written)) < bound
    shard = written / "id/val/layers/wide/gradient/c.1.0"
    shard.write_bytes((written / "id/val/layers/wide/gradient/c.0.0").read_bytes())  # whole, and not what was sealed
    done: list[str] = []
    assert peak(lambda: done.extend(repair_cache(written))) < bound
    assert done == [
        "id/val: is not what was sealed, though every chunk is whole: files or attributes were changed or exchanged;"
        " the split is dropped and is to be extracted again"
    ]


class Counting(WrapperStore[MemoryStore]):
    """A store that is no folder; it remembers its largest answer."""

    most = 0

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        whole = await super().get(key, prototype, byte_range)
        size = 0 if whole is None else len(whole)
        Counting.most = max(Counting.most, size)
        return whole

    async def getsize(self, key: str) -> int:
        return await self._store.getsize(key)


def test_at_a_server_shards_come_in_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "PIECE", 1000)
    inner = MemoryStore()
    root = zarr.create_group(inner)
    group = root.create_group("id/val")
    contents = {}
    for place, size in enumerate((0, 1, 999, 1000, 1001, 2000, 12_345)):
        content = np.random.RandomState(size).bytes(size)
        key = f"logits/c.{place}.0"
        contents[key] = hashlib.sha256(content).hexdigest()
        sync(inner.set(f"id/val/{key}", zarr.core.buffer.cpu.Buffer.from_bytes(content)))
    store = Counting(inner)
    own, foreign = list_split(store, HEADER, "id/val")
    assert (sorted(own), foreign) == (sorted(contents), [])
    assert hash_keys(zarr.open_group(store, mode="r"), group.path, own, sharded=True) == contents
    assert Counting.most <= 1000


@pytest.mark.repeats(1)
@pytest.mark.parametrize("kind", [Plain, Ranges])
def test_a_web_server_without_ranges_is_asked_for_whole_shards(
    kind: type[Plain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows that it has none in the middle of the first shard."""
    pytest.importorskip("obstore")
    monkeypatch.setattr(seal, "PIECE", 1000)
    random = np.random.RandomState(0)
    writer = CacheWriter(tmp_path / "c.zarr", HEADER)
    writer.prepare("id/val", 40, {"list": "val.txt", "sha256": "b" * 64})
    floats = random.randn(40, NEURONS).astype(np.float32)
    plain = {"logits": floats[:, :2], "label": np.zeros(40, int), "index": np.arange(40)}
    writer.write_block("id/val", 0, {"layers/wide/activation": floats, "layers/wide/gradient": -floats, **plain})
    writer.seal("id/val")
    with serve(tmp_path, kind) as address:
        there = open_cache(f"{address}/c.zarr")
        assert isinstance(there.root.store, WebStore)
        there.root.store.ranges = True  # reading metadata does not show it
        keys = list_split(there.root.store, HEADER, "id/val")
        with there.root.store.without_copy():
            assert matches_seal(there.root, "id/val", there.peek("id/val").attributes, keys, sharded=True)
        assert there.root.store.ranges == (kind is Ranges)
        assert verify_cache(there) == []
