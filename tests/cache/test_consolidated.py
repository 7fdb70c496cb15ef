"""The root's copy of all metadata: what is in it, when it is renewed, and that any Zarr reads a cache by it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.cache import repair as repairing
from nacpipe.cache import writer as writing
from nacpipe.cache.consolidated import copy_is_stale
from nacpipe.cache.repair import repair_cache
from nacpipe.cache.store import read_consolidated
from nacpipe.cache.verify import STALE_COPY, verify_cache
from tests.alike import prepare_split, write_rows

SPLITS = {"id/subtrain": 0, "id/test": 0, "ood/far/textures": 0}  # leaves id/train, id/val, ood/val, ood/near/letters


@pytest.fixture(scope="module")
def whole(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("whole") / "c.zarr", rows=SPLITS)


@pytest.fixture
def path(whole: Cache, tmp_path: Path) -> Path:
    shutil.copytree(whole.path, tmp_path / "c.zarr")
    return tmp_path / "c.zarr"


def copy_of(path: Path | str) -> dict[str, Any]:
    return dict(read_consolidated(Path(path, "zarr.json").read_bytes()))


def stored(path: Path | str) -> dict[str, Any]:
    """The metadata of all groups and arrays, by their paths."""
    files = [file for file in Path(path).rglob("zarr.json") if file.parent != Path(path)]
    return {str(file.parent.relative_to(path)): json.loads(file.read_text()) for file in files}


def below(metadata: dict[str, Any], *names: str) -> dict[str, Any]:
    """What does not belong to these splits."""
    return {key: value for key, value in metadata.items() if not any(f"{key}/".startswith(f"{n}/") for n in names)}


def write(writer: CacheWriter, whole: Cache, name: str) -> None:
    """Write a split of the whole cache again, and seal it."""
    for block in np.flatnonzero(~prepare_split(writer, whole[name])):
        write_rows(writer, whole[name], int(block), name)
    writer.seal(name)


class Killed(BaseException):
    """No code catches it."""


def kill(*_: object) -> None:
    raise Killed


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_it_is_the_metadata_of_every_group_and_array(whole: Cache) -> None:
    assert copy_of(whole.path) == stored(whole.path)
    assert {"id", "id/val", "id/val/layers/layer1/gradient", "ood/near", "classifier/bias"} <= copy_of(
        whole.path
    ).keys()
    content = json.loads(Path(whole.path, "zarr.json").read_text())["consolidated_metadata"]
    assert (content["kind"], content["must_understand"]) == ("inline", False)
    assert verify_cache(whole) == []


@pytest.mark.parametrize("open_it", [lambda path: zarr.open_group(path, mode="r", use_consolidated=True),
                                     lambda path: zarr.open_consolidated(path, mode="r")])  # fmt: skip
def test_any_zarr_reads_the_same_values_by_it(whole: Cache, open_it: Callable[[str], Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata is currently not part")  # of Zarr's specification
        root = open_it(whole.path)
    assert root.metadata.consolidated_metadata is not None
    for name, split in whole.items():
        assert dict(root[name].attrs) == split.attributes
        for array in whole.header.arrays():
            np.testing.assert_array_equal(root[f"{name}/{array}"][:], split.read(array))
    for found, expected in zip(("weight", "bias"), whole.classifier() or (), strict=True):
        np.testing.assert_array_equal(root[f"classifier/{found}"][:], expected)


def test_a_split_that_is_not_sealed_is_not_in_it(path: Path, whole: Cache) -> None:
    writer = CacheWriter(path, whole.header)
    writer.drop("id/val")
    assert copy_of(path) == stored(path) == below(stored(whole.path), "id/val")
    prepare_split(writer, whole["id/val"])
    write_rows(writer, whole["id/val"], 0, "id/val")
    assert copy_of(path) == below(stored(whole.path), "id/val")
    CacheWriter(path, whole.header)
    assert copy_of(path) == below(stored(whole.path), "id/val")
    write(writer, whole, "id/val")
    assert copy_of(path) == stored(path) == stored(whole.path)
    assert Path(path, "zarr.json").read_bytes() == Path(whole.path, "zarr.json").read_bytes()


def test_foreign_groups_and_arrays_are_not_in_it(path: Path, whole: Cache) -> None:
    root = zarr.open_group(path, mode="r+", use_consolidated=False)
    root["id/val"].create_array("mine", shape=(3,), dtype="int8")  # type: ignore[union-attr]
    root.create_group("other")
    CacheWriter(path, whole.header)
    assert copy_of(path) == stored(whole.path)
    assert verify_cache(open_cache(path)) == []


def test_a_new_cache_has_none_and_version_1_never_has(
    make_cache: Callable[..., Cache], tmp_path: Path, whole: Cache
) -> None:
    CacheWriter(tmp_path / "new.zarr", whole.header)
    assert copy_of(tmp_path / "new.zarr") == {}
    old = make_cache(tmp_path / "old.zarr", rows=SPLITS, version=1)
    repair_cache(old.path)
    CacheWriter(old.path, old.header).drop("id/val")
    assert "consolidated_metadata" not in json.loads(Path(old.path, "zarr.json").read_text())
    assert verify_cache(open_cache(old.path)) == []


# --- when it is renewed -----------------------------------------------------------------------------------------------


def test_a_writer_killed_between_the_seal_and_the_copy_is_made_good_by_the_next(
    path: Path, whole: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CacheWriter(path, whole.header)
    writer.drop("id/val")
    with monkeypatch.context() as patch:
        patch.setattr(writing, "consolidate", kill)
        with pytest.raises(Killed):
            write(writer, whole, "id/val")
    cache = open_cache(path)
    assert cache["id/val"].sealed  # and read in a folder
    assert copy_of(path) == below(stored(path), "id/val")
    assert [(d.split, d.array, d.what) for d in verify_cache(cache)] == [("", "zarr.json", STALE_COPY)]
    CacheWriter(path, whole.header, first=False)  # another process of the same extract: it changes nothing
    assert copy_is_stale(cache.root, cache.header)
    CacheWriter(path, whole.header)
    assert copy_of(path) == stored(path)
    assert verify_cache(open_cache(path)) == []


def test_a_drop_killed_before_the_copy_is_made_good_by_the_next_writer(
    path: Path, whole: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writing, "consolidate", kill)
        with pytest.raises(Killed):
            CacheWriter(path, whole.header, first=False).drop("ood/near/letters")
    assert "ood/near/letters" in copy_of(path)
    assert not open_cache(path).peek("ood/near/letters").sealed
    CacheWriter(path, whole.header)
    expected = below(stored(whole.path), "ood/near/letters")
    del expected["ood/near"]  # above no sealed split
    assert copy_of(path) == expected
    CacheWriter(path, whole.header).drop("ood/near/letters")
    assert copy_of(path) == expected


def test_the_classifier_is_in_it_once_it_is_written(tmp_path: Path, whole: Cache) -> None:
    writer = CacheWriter(tmp_path / "c.zarr", whole.header)
    writer.write_classifier(*(whole.classifier() or ()))
    assert copy_of(tmp_path / "c.zarr").keys() == {"classifier", "classifier/weight", "classifier/bias"}
    assert copy_of(tmp_path / "c.zarr") == stored(tmp_path / "c.zarr")


def damage_a_chunk(path: Path) -> None:
    (path / "id/val/logits/c.1.0").write_bytes(b"123")


def damage_labels(path: Path) -> None:
    (path / "id/val/label/c.0").write_bytes(b"123")


def lose_attributes(path: Path) -> None:
    (path / "id/val/zarr.json").write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_a_chunk, damage_labels, lose_attributes])
@pytest.mark.repeats(1)
def test_repair_takes_the_split_out_of_it(
    path: Path, whole: Cache, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(path)
    with monkeypatch.context() as patch:
        patch.setattr(repairing, "consolidate", kill)
        with pytest.raises(Killed):
            repair_cache(path)
    repair_cache(path)
    assert copy_of(path) == below(stored(whole.path), "id/val")
    assert verify_cache(open_cache(path)) == []
    write(CacheWriter(path, whole.header), whole, "id/val")
    assert copy_of(path) == stored(path) == stored(whole.path)


def test_repair_takes_a_damaged_classifier_out_of_it(path: Path, whole: Cache) -> None:
    (path / "classifier/bias/c.0").write_bytes(b"123")
    assert repair_cache(path) == ["classifier: is to be written again"]
    assert copy_of(path) == below(stored(whole.path), "classifier")


@pytest.mark.parametrize("stale", [{}, {"id/val": {}}, None])
@pytest.mark.repeats(1)
def test_repair_renews_one_that_somebody_changed(path: Path, whole: Cache, stale: object) -> None:
    content = json.loads((path / "zarr.json").read_text())
    content["consolidated_metadata"]["metadata"] = stale
    (path / "zarr.json").write_text(json.dumps(content))
    assert [d.what for d in verify_cache(open_cache(path))] == [STALE_COPY]
    assert repair_cache(path) == ["consolidated metadata renewed"]
    assert (path / "zarr.json").read_bytes() == Path(whole.path, "zarr.json").read_bytes()
    assert repair_cache(path) == []


def test_nothing_is_written_where_it_is_up_to_date(path: Path, whole: Cache) -> None:
    before = (path / "zarr.json").stat()
    CacheWriter(path, whole.header).write_classifier(*(whole.classifier() or ()))
    repair_cache(path)
    after = (path / "zarr.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
