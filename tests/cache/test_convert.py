"""`nacpipe convert`: a copy of a cache in the newest format, value for value; stopped, it goes on."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from nacpipe.cache import Cache, CacheWriter, Header, LayerSpec, open_cache
from nacpipe.cache.convert import convert_cache
from nacpipe.cache.verify import verify_cache
from nacpipe.cli import main
from nacpipe.errors import CacheError, FormatError, IdentityError, InputError

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "caches" / "v1"


@pytest.fixture(params=["plain", "sharded", "keep_bits", "first-plain"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Cache:
    known: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    shutil.unpack_archive(GOLDEN / f"{request.param}.tar.xz", tmp_path, **known)
    return open_cache(tmp_path / f"{str(request.param).removeprefix('first-')}.zarr")


def assert_copied(old: Cache, new: Cache) -> None:
    assert (old.header.version, new.header.version) == (1, 2)
    assert new.header.whole_identity() == old.header.whole_identity()
    assert new.header.information == old.header.information
    assert {name: split.rows for name, split in new.items()} == {name: split.rows for name, split in old.items()}
    for name, split in new.items():
        assert split.images == old[name].images
        for there, here in zip(old.header.arrays(), new.header.arrays(), strict=True):
            np.testing.assert_array_equal(split.read(here), old[name].read(there), err_msg=f"{name}/{here}")
    for ours, theirs in zip(new.classifier() or (), old.classifier() or (), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert verify_cache(new) == []


def bytes_of(folder: str | Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


@pytest.mark.repeats(1)
def test_every_value_is_copied_and_the_old_cache_is_as_it_was(old: Cache, tmp_path: Path) -> None:
    before = bytes_of(old.path)
    assert_copied(old, convert_cache(old.path, tmp_path / "new.zarr"))
    assert bytes_of(old.path) == before
    first = bytes_of(tmp_path / "new.zarr")
    convert_cache(old.path, tmp_path / "new.zarr")  # again
    assert bytes_of(tmp_path / "new.zarr") == first


@pytest.mark.repeats(1)
def test_a_conversion_that_was_stopped_goes_on(old: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, left = CacheWriter.write_block, 4

    def stops(self: CacheWriter, name: str, block: int, arrays: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        write(self, name, block, arrays)

    monkeypatch.setattr(CacheWriter, "write_block", stops)
    with pytest.raises(KeyboardInterrupt):
        convert_cache(old.path, tmp_path / "new.zarr")
    monkeypatch.setattr(CacheWriter, "write_block", write)
    assert_copied(old, convert_cache(old.path, tmp_path / "new.zarr"))


def test_what_is_not_finished_is_gone_on_with_in_the_copy(tmp_path: Path, small_cache: Cache) -> None:
    """The written blocks are there, the others are to be written."""
    header = replace(small_cache.header, version=1)
    writer, split = CacheWriter(tmp_path / "old.zarr", header), small_cache["id/val"]
    paths = dict(zip(header.arrays(), small_cache.header.arrays(), strict=True))

    def block(number: int, names: dict[str, str]) -> dict[str, Any]:
        return {name: split.read(path, slice(16 * number, 16 * number + 16)) for name, path in names.items()}

    writer.prepare("id/val", split.rows, split.images)
    for number in (0, 2):
        writer.write_block("id/val", number, block(number, paths))
    new = convert_cache(tmp_path / "old.zarr", tmp_path / "new.zarr")
    assert new.peek("id/val").marks().tolist() == [True, False, True]
    assert not new.peek("id/val").sealed
    going_on = CacheWriter(tmp_path / "new.zarr", new.header)
    assert going_on.prepare("id/val", split.rows, split.images).tolist() == [True, False, True]
    going_on.write_block(
        "id/val", 1, block(1, dict.fromkeys(new.header.arrays()) | {p: p for p in new.header.arrays()})
    )
    going_on.seal("id/val")
    for path in new.header.arrays():
        np.testing.assert_array_equal(open_cache(new.path)["id/val"].read(path), split.read(path))


@pytest.mark.slow
def test_logits_that_are_no_numbers_are_copied(write_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "x.zarr", rows={"id/val": 16})
    values = cache["id/val"].read("logits")
    values[3, 1] = np.inf
    writer = CacheWriter(cache.path, cache.header)
    writer.drop("id/val")
    arrays = {path: cache["id/test"].read(path)[:16] for path in cache.header.arrays()} | {"logits": values}
    writer.prepare("id/val", 16, {"list": "val.txt", "sha256": "0" * 64})
    writer.write_block("id/val", 0, arrays)
    writer.seal("id/val")
    copy = convert_cache(cache.path, tmp_path / "y.zarr")
    np.testing.assert_array_equal(copy["id/val"].read("logits", any_number=True), values)


def test_what_cannot_be_a_copy_is_refused(old: Cache, tmp_path: Path, small_cache: Cache) -> None:
    with pytest.raises(InputError, match="the copy needs another place than the cache"):
        convert_cache(old.path, old.path)
    with pytest.raises(IdentityError, match="was made from something else"):
        shutil.copytree(small_cache.path, tmp_path / "other.zarr")
        convert_cache(old.path, tmp_path / "other.zarr")
    shutil.copytree(old.path, tmp_path / "older.zarr")
    with pytest.raises(FormatError, match=r"older\.zarr has format version 1; give the copy another place"):
        convert_cache(old.path, tmp_path / "older.zarr")


@pytest.mark.repeats(1)
def test_the_command(old: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = Path(old.path).name

    def nacpipe(*args: str) -> str:
        done = CliRunner().invoke(main, list(args), prog_name="nacpipe")
        assert done.exit_code == 0, done.output
        return done.stdout

    said = f"{name}, format 1, would be copied to new.zarr, format 2: 6 splits, 55 rows\n"
    assert nacpipe("convert", name, "new.zarr", "--dry-run") == said
    assert not Path("new.zarr").exists()
    assert nacpipe("convert", name, "new.zarr") == said.replace("would be copied", "copied")
    assert json.loads(nacpipe("convert", name, "new.zarr", "--json"))["format"] == {"from": 1, "to": 2}
    assert_copied(old, open_cache("new.zarr"))


def two_layers(path: Path, names: tuple[str, str]) -> CacheWriter:
    """A cache of two layers of one width, whose states are their names' lengths."""
    layers = tuple(LayerSpec(name=name, path=name, pooling="none", neurons=2) for name in names)
    header = Header(
        identity={"benchmark": "made up"}, information={}, block_rows=4, layers=layers, classes=2, features=0
    )
    return CacheWriter(path, header)


def write_two(writer: CacheWriter, images: str, rows: int = 4) -> None:
    writer.prepare("id/val", rows, {"list": images, "sha256": "0" * 64})
    arrays: dict[str, Any] = {
        writer.header.layer_array(spec.name, what): np.full((rows, 2), len(spec.name), np.float32)
        for spec in writer.header.layers
        for what in ("activation", "gradient")
    }
    rest = {"logits": np.zeros((rows, 2), np.float32), "label": np.zeros(rows, int), "index": np.arange(rows)}
    writer.write_block("id/val", 0, {**arrays, **rest})
    writer.seal("id/val")


def test_layers_are_copied_by_name_whatever_their_order(tmp_path: Path) -> None:
    write_two(two_layers(tmp_path / "old.zarr", ("a", "bcd")), "val.txt")
    two_layers(tmp_path / "new.zarr", ("bcd", "a"))
    new = convert_cache(tmp_path / "old.zarr", tmp_path / "new.zarr")
    for name in ("a", "bcd"):
        assert (new["id/val"].read_layer(name, "activation") == len(name)).all()


def test_a_copy_of_other_images_is_not_taken_for_a_copy(tmp_path: Path) -> None:
    write_two(two_layers(tmp_path / "old.zarr", ("a", "bcd")), "val.txt")
    write_two(two_layers(tmp_path / "new.zarr", ("a", "bcd")), "other.txt")
    with pytest.raises(CacheError, match="id/val is of other images than that of"):
        convert_cache(tmp_path / "old.zarr", tmp_path / "new.zarr")
