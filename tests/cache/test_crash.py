"""What readers and writers trust of a split whose removal, or whose writer, was killed on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from zarr.storage import LocalStore

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.cache.durability import replace_file
from nacpipe.cache.layout import FORMAT_VERSION
from nacpipe.errors import CacheError
from tests.alike import prepare_split

IMAGES = {"list": "val.txt", "sha256": "b" * 64}
OTHERS = ("id/train", "id/subtrain", "id/test", "ood/val", "ood/near/letters", "ood/far/textures")

Build = Callable[..., Cache]
Arrays = dict[str, NDArray[Any]]


@pytest.fixture
def build(make_cache: Callable[..., Cache]) -> Build:
    """Build a cache with id/val alone."""

    def build_one(path: Path, rows: int = 40, seed: int = 0, version: int = FORMAT_VERSION) -> Cache:
        return make_cache(path, rows={**dict.fromkeys(OTHERS, 0), "id/val": rows}, seed=seed, version=version)

    return build_one


def read(cache: Cache, name: str = "id/val") -> Arrays:
    split = cache[name]
    return {key: np.asarray(split.array(key)[:]) for key in cache.header.arrays()}


def write(writer: CacheWriter, name: str, arrays: Arrays, images: Mapping[str, str] = IMAGES) -> None:
    known = {key: arrays[key] for key in ("label", "index")}
    assert not writer.prepare(name, len(arrays["label"]), images, **known).any()
    for block, start in enumerate(range(0, len(arrays["label"]), writer.header.block_rows)):
        rows = slice(start, start + writer.header.block_rows)
        writer.write_block(name, block, {key: array[rows] for key, array in arrays.items()})
    writer.seal(name)


def assert_holds(path: Path, arrays: Arrays, name: str = "id/val") -> None:
    for key, array in read(open_cache(path), name).items():
        np.testing.assert_array_equal(array, arrays[key])


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_drop_removes_one_split_and_leaves_the_others(tmp_path: Path, build: Build) -> None:
    path = tmp_path / "c.zarr"
    header = build(path).header
    write(CacheWriter(path, header), "ood/val", read(build(tmp_path / "more.zarr", 33, seed=1)))
    before = files_of(path / "ood/val")
    writer = CacheWriter(path, header)
    writer.drop("id/val")
    writer.drop("id/test")  # not there: nothing to do
    assert list(open_cache(path)) == ["ood/val"]
    assert files_of(path / "ood/val") == before
    assert not (path / "id/val").exists()
    # The same writer can write it anew, with another number of rows.
    arrays = read(build(tmp_path / "again.zarr", 20, seed=2))
    write(writer, "id/val", arrays)
    assert_holds(path, arrays)


class Crash(BaseException):
    """Nothing on the way may catch it."""


@pytest.mark.parametrize(("stop", "state"), [(1, "whole"), (2, "3 of 3"), (3, "0 of 3")])
def test_drop_takes_the_seal_first_and_the_marks_next(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch, stop: int, state: str
) -> None:
    """Stop before the first, second and third thing that it does to the store."""
    cache = build(tmp_path / "c.zarr")
    arrays, left = read(cache), stop

    def stopping(method: str) -> Callable[..., Any]:
        whole = getattr(LocalStore, method)

        async def count_down(store: LocalStore, *args: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Crash
            await whole(store, *args)

        return count_down

    with monkeypatch.context() as patch:
        for method in ("set", "delete", "delete_dir"):
            patch.setattr(LocalStore, method, stopping(method))
        with pytest.raises(Crash):
            CacheWriter(cache.path, cache.header).drop("id/val")
    if state == "whole":
        assert_holds(tmp_path / "c.zarr", arrays)
    else:
        with pytest.raises(CacheError, match=rf"id/val is not finished \({state} blocks\)"):
            open_cache(cache.path)["id/val"]


def cut_after_the_seal(split: Path) -> None:
    content = json.loads((split / "zarr.json").read_text())
    content["attributes"].update(sealed=False, digest=None)
    (split / "zarr.json").write_text(json.dumps(content))


def cut_after_the_marks(split: Path) -> None:
    cut_after_the_seal(split)
    shutil.rmtree(split / "blocks")


def cut_among_the_arrays(split: Path) -> None:
    cut_after_the_marks(split)
    shutil.rmtree(split / "layers/avgpool")
    (split / "layers/layer1/gradient/zarr.json").unlink()


def cut_after_the_groups_own_file(split: Path) -> None:
    cut_after_the_marks(split)
    (split / "zarr.json").unlink()


CUTS = [cut_after_the_seal, cut_after_the_marks, cut_among_the_arrays, cut_after_the_groups_own_file]


@pytest.mark.parametrize("cut", CUTS)
def test_what_is_left_of_a_drop_is_not_handed_out(tmp_path: Path, build: Build, cut: Callable[[Path], None]) -> None:
    build(tmp_path / "c.zarr")
    cut(tmp_path / "c.zarr/id/val")
    cache = open_cache(tmp_path / "c.zarr")
    if cut is cut_after_the_groups_own_file:
        assert "id/val" not in cache
    else:
        done = 3 if cut is cut_after_the_seal else 0
        with pytest.raises(CacheError, match=rf"id/val is not finished \({done} of 3 blocks\)"):
            cache["id/val"]


@pytest.mark.repeats(4)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("rows", [40, 50, 10])
def test_a_drop_that_was_cut_short_can_be_repeated(
    tmp_path: Path, build: Build, cut: Callable[[Path], None], rows: int
) -> None:
    """The same command again drops what it finds and writes, here another number of rows as well."""
    path = tmp_path / "c.zarr"
    header = build(path).header
    cut(path / "id/val")
    arrays = read(build(tmp_path / "again.zarr", rows, seed=3))
    writer = CacheWriter(path, header)
    writer.drop("id/val")
    write(writer, "id/val", arrays)
    assert_holds(path, arrays)


@pytest.mark.parametrize("cut", CUTS[1:])
def test_without_marks_every_block_is_written_again(tmp_path: Path, build: Build, cut: Callable[[Path], None]) -> None:
    path = tmp_path / "c.zarr"
    cache = build(path)
    images = cache["id/val"].images
    cut(path / "id/val")
    arrays = read(build(tmp_path / "again.zarr", seed=4))
    write(CacheWriter(path, cache.header), "id/val", arrays, images)  # no drop: write() asserts that no block is marked
    assert_holds(path, arrays)


def test_a_split_that_was_begun_with_other_images_is_not_gone_on_with(tmp_path: Path, build: Build) -> None:
    path = tmp_path / "c.zarr"
    header = build(path).header
    cut_after_the_seal(path / "id/val")
    with pytest.raises(CacheError, match=r"id/val has \{.*\} images, not \{.*\}; drop it first with --redo id/val"):
        CacheWriter(path, header).prepare("id/val", 40, IMAGES)


def test_marks_do_not_outlive_an_array(tmp_path: Path, build: Build) -> None:
    """The power went before an array's metadata was on the disk: its rows are lost, whatever the marks say."""
    path = tmp_path / "c.zarr"
    cache = build(path)
    images = cache["id/val"].images
    cut_after_the_seal(path / "id/val")
    (path / "id/val/layers/layer1/gradient/zarr.json").unlink()
    assert not CacheWriter(path, cache.header).prepare("id/val", 40, images).any()


def test_a_torn_mark_does_not_count(tmp_path: Path, build: Build) -> None:
    path = tmp_path / "c.zarr"
    cache = build(path)
    images = cache["id/val"].images
    cut_after_the_seal(path / "id/val")
    (path / "id/val/blocks/c.1").write_bytes(b"")
    assert CacheWriter(path, cache.header).prepare("id/val", 40, images).tolist() == [True, False, True]


def test_leftovers_of_a_killed_writer_do_not_matter_and_the_next_one_removes_them(tmp_path: Path, build: Build) -> None:
    path = tmp_path / "c.zarr"
    cache = build(path)
    arrays, before = read(cache), files_of(path)
    for name in ("id/zarr.1f.partial", "id/val/logits/c.1.0.a0.partial", "zarr.json.partial", "zarr.json.0a.partial"):
        (path / name).write_bytes(b"half")
    assert list(open_cache(path)) == ["id/val"]  # and without a warning, which would be an error here
    assert_holds(path, arrays)
    CacheWriter(path, cache.header)
    assert files_of(path) == before


def write_what_is_missing(path: Path, cache: Cache) -> None:
    """Bring a copy of a cache of one split to its end, as extraction does."""
    writer = CacheWriter(path, cache.header)  # renews the consolidated metadata
    so_far = open_cache(path)
    if "id/val" in so_far and so_far.peek("id/val").sealed:
        return
    weight_and_bias = cache.classifier()
    assert weight_and_bias is not None
    writer.write_classifier(*weight_and_bias)
    split, arrays = cache["id/val"], read(cache)
    for block in np.flatnonzero(~prepare_split(writer, split)):
        rows = slice(block * 16, block * 16 + 16)
        writer.write_block("id/val", int(block), {key: array[rows] for key, array in arrays.items()})
    writer.seal("id/val")


@pytest.mark.repeats(1)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("half", "step"),
    [pytest.param(False, 1, marks=pytest.mark.slow), pytest.param(False, 4, marks=pytest.mark.slow), (True, 3)],
    ids=["nothing written", "nothing written, some", "a leftover, some"],
)
def test_a_writer_killed_at_any_of_its_writes_can_go_on(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch, half: bool, step: int, version: int
) -> None:
    """Count every file that is written; stop at one after the other; the same call ends with the same bytes.

    The last write is that of the consolidated metadata: a writer that was killed before it renews them.
    """
    cache = build(tmp_path / "c.zarr", rows=24, version=version)
    whole, replace = LocalStore.set, replace_file
    writes, stop_at = 0, -1

    def replace_and_stop(file: Path, content: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes == stop_at:
            raise Crash
        replace(file, content)

    async def count_and_stop(store: LocalStore, key: str, value: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == stop_at:
            if half:
                file = Path(store.root, key).with_suffix(".0123.partial")  # as zarr names it before it renames it
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(b"half")
            raise Crash
        await whole(store, key, value)

    monkeypatch.setattr(LocalStore, "set", count_and_stop)
    monkeypatch.setattr("nacpipe.cache.address.replace_file", replace_and_stop)
    write_what_is_missing(tmp_path / "whole.zarr", cache)
    expected, total = files_of(tmp_path / "whole.zarr"), writes
    assert total >= len(expected) > 30  # no file was written behind our back
    assert open_cache(tmp_path / "whole.zarr").header.version == version
    for stop in range(1, total + 1, step):
        path = tmp_path / f"{stop}.zarr"
        writes, stop_at = 0, stop
        with pytest.raises(Crash):
            write_what_is_missing(path, cache)
        stop_at = -1
        write_what_is_missing(path, cache)
        assert files_of(path) == expected, f"stopped at write {stop} of {total}"
