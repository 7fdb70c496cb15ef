"""What is on the disk when a write returns."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nacpipe.cache.durability import replace_file


def test_a_replaced_file_and_then_its_name_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bytes]] = []
    file, sync = tmp_path / "zarr.json", os.fsync
    file.write_bytes(b"before")

    def noting(handle: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"
        synced.append((kind, file.read_bytes()))
        sync(handle)

    monkeypatch.setattr(os, "fsync", noting)
    replace_file(file, b"after")
    assert synced == [("file", b"before"), ("folder", b"after")]
    assert [path.name for path in tmp_path.iterdir()] == ["zarr.json"]
