"""Which images of a folder or list its part lacks, by name, however the folder was named when it was scored."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from nacpipe.detector.parts import format_time
from nacpipe.detector.scored_shard import compare_images
from nacpipe.detector.shards import Shard, find_shards


def find_new(shard: Shard, scored: Iterable[str]) -> list[str]:
    """The images that a part of these images lacks."""
    return compare_images(shard, dict.fromkeys(scored))[0]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("photos/a.png", "photos/deep/a.png", "photos/deep/b.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    return tmp_path / "photos"


@pytest.mark.parametrize("named", ["photos", "./photos/", "PLACE/photos"])
@pytest.mark.parametrize("before", ["photos/", "PLACE/photos/", "../elsewhere/photos/", ""])
def test_a_folder_that_was_named_otherwise(photos: Path, named: str, before: str) -> None:
    (shard,) = find_shards([named.replace("PLACE", str(photos.parent))])
    before = before.replace("PLACE", str(photos.parent))
    scored = {f"{before}{name}" for name in ("a.png", "deep/a.png", "deep/b.png")}
    assert find_new(shard, scored) == []
    assert find_new(shard, scored - {f"{before}deep/a.png"}) == ["deep/a.png"]
    assert find_new(shard, scored | {f"{before}gone.png"}) == []
    assert find_new(shard, set()) == ["a.png", "deep/a.png", "deep/b.png"]


def test_an_image_is_new_though_another_folder_has_one_of_its_name(photos: Path) -> None:
    (shard,) = find_shards([photos])
    assert find_new(shard, {f"{photos}/deep/a.png", f"{photos}/deep/b.png"}) == ["a.png"]


def test_a_list_with_paths_of_all_kinds(photos: Path) -> None:
    Path("l.txt").write_text(f"photos/a.png\n{photos}/deep/a.png\n../{photos.parent.name}/photos/deep/b.png\n")
    (shard,) = find_shards(["l.txt"])
    scored = {str(path) for path in shard.paths()}
    assert find_new(shard, scored) == []
    assert find_new(shard, scored - {f"{photos}/deep/a.png"}) == [f"{photos}/deep/a.png"]
    assert find_new(shard, scored - {"photos/a.png"}) == ["photos/a.png"]
    Path("l.txt").write_text("")  # no images: none is new
    assert find_new(shard, scored) == []


@pytest.mark.parametrize("before", ["photos/", "../elsewhere/photos/"])
def test_an_image_of_another_time_is_another(photos: Path, before: str) -> None:
    """It was replaced under its name, or the folder is another one of the same names."""
    (shard,) = find_shards(["photos"])
    names = ("a.png", "deep/a.png", "deep/b.png")
    times = {f"{before}{name}": format_time((photos / name).stat().st_mtime) for name in names}
    assert compare_images(shard, times) == ([], [])
    os.utime(photos / "deep/a.png", (1_700_000_000, 1_700_000_000))
    assert compare_images(shard, times) == ([], ["deep/a.png"])
    for unknown in (None, "27/11/2026 20:15"):
        assert compare_images(shard, {**times, f"{before}deep/a.png": unknown}) == ([], [])
    del times[f"{before}a.png"]
    assert compare_images(shard, times) == (["a.png"], ["deep/a.png"])
