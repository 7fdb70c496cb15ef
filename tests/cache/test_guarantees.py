"""Cases that a review of the format found: of writers that fail, of foreign files, of crafted metadata."""

from __future__ import annotations

import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from nacpipe.cache import Cache, CacheWriter, Header, LayerSpec, open_cache
from nacpipe.cache.store import _chunk_keys
from nacpipe.cache.verify import verify_cache
from nacpipe.errors import FormatError, NacError

IMAGES = {"list": "val.txt", "sha256": "0" * 64}


@pytest.fixture
def path(small_cache: Cache, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_cache.path, tmp_path / "c.zarr"))


def block_of(cache: Cache, number: int = 0) -> dict[str, Any]:
    split = cache["id/val"]
    return {name: split.read(name, slice(16 * number, 16 * number + 16)) for name in cache.header.arrays()}


def test_a_block_that_fails_writes_nothing_more(
    small_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its other arrays would appear in a split that was removed meanwhile."""
    writer = CacheWriter(tmp_path / "c.zarr", small_cache.header)
    writer.prepare("id/val", 16, IMAGES)
    write, failed = CacheWriter._write_rows, threading.Event()

    def fails(self: CacheWriter, array: Any, name: str, block: int, data: Any) -> None:
        if name == "logits":
            failed.set()
            raise OSError(28, "No space left on device")
        failed.wait(10)
        time.sleep(0.2)
        write(self, array, name, block, data)

    monkeypatch.setattr(CacheWriter, "_write_rows", fails)
    with pytest.raises(NacError, match="no space left"):
        writer.write_block("id/val", 0, block_of(small_cache))
    written = set(Path(writer.path).rglob("*"))
    writer.drop("id/val")
    time.sleep(0.5)
    assert len(written) > 10
    assert not list(Path(writer.path).rglob("c.*"))


def test_what_a_killed_run_created_is_synced_by_the_next(
    small_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CacheWriter(tmp_path / "c.zarr", small_cache.header)
    writer.prepare("id/val", 16, IMAGES)
    synced: set[str] = set()
    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.readlink(f"/proc/self/fd/{handle}")))
    CacheWriter(writer.path, small_cache.header).prepare("id/val", 16, IMAGES)
    metadata = {str(file) for file in Path(writer.path, "id/val").rglob("zarr.json")}
    assert metadata <= synced
    assert {str(Path(file).parent) for file in metadata} <= synced


def test_a_lost_group_of_an_unsealed_split_is_made_again(small_cache: Cache, tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "c.zarr", small_cache.header)
    writer.prepare("id/val", 16, IMAGES)
    writer.write_block("id/val", 0, block_of(small_cache))
    for group in ("layers", "layers/layer1"):
        Path(writer.path, "id/val", group, "zarr.json").unlink()
    again = CacheWriter(writer.path, small_cache.header)
    assert again.prepare("id/val", 16, IMAGES).tolist() == [True]
    again.seal("id/val")
    assert verify_cache(open_cache(writer.path)) == []


def test_foreign_files_that_look_like_the_caches_stay(path: Path) -> None:
    foreign = ["id/val/backup/blocks/zarr.json", "id/val/backup/blocks/c.0", "notes/7.partial", "notes/c.partial"]
    for name in foreign:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("{}")
    own = path / "id/test/logits" / "c.1.0123456789abcdef.partial"
    own.write_text("a killed writer's")
    CacheWriter(path, open_cache(path).header).drop("id/val")
    assert all((path / name).exists() for name in foreign)
    assert not own.exists()


def test_layer_names_that_version_1_had_are_read(small_cache: Cache, tmp_path: Path) -> None:
    layers = (LayerSpec(name="block:3", path="block", pooling="none", neurons=2),)
    header = replace(small_cache.header, layers=layers, version=1)
    zarr.create_group(tmp_path / "c.zarr", attributes=header.to_attributes())
    assert [spec.name for spec in open_cache(tmp_path / "c.zarr").header.layers] == ["block:3"]
    with pytest.raises(FormatError, match="other characters"):
        Header.from_attributes(replace(header, version=2).to_attributes())


@pytest.mark.parametrize(
    "change",
    [
        {"shape": []},
        {"shape": [float("inf")]},
        {"shape": "text"},
        {"chunk_key_encoding": "default"},
        {"chunk_grid": {"configuration": {"chunk_shape": [0]}}},
        {"chunk_grid": None},
    ],
)
def test_crafted_entries_of_the_copy_have_no_chunks(change: dict[str, Any]) -> None:
    entry = {
        "node_type": "array",
        "shape": [40, 4],
        "chunk_grid": {"configuration": {"chunk_shape": [16, 4]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
    }
    assert list(_chunk_keys("a", entry)) == ["a/c.0.0", "a/c.1.0", "a/c.2.0"]
    assert list(_chunk_keys("a", {**entry, **change})) == []
    assert np.all([list(_chunk_keys("a", other)) == [] for other in (None, "text", 3, [], {})])
