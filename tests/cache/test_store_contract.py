"""What a cache promises wherever its objects are: in a folder, and at an S3 endpoint."""

from __future__ import annotations

import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from nacpipe.cache import Cache, CacheWriter, address, open_cache
from nacpipe.cache.keys import list_keys
from nacpipe.cache.repair import repair_cache
from nacpipe.cache.verify import foreign_files, verify_cache
from nacpipe.errors import CacheError, FormatError
from nacpipe.files import is_url
from tests.alike import assert_alike, copy_splits, prepare_split, write_rows
from tests.prefork import python_words
from tests.s3 import BUCKET, variables

pytestmark = pytest.mark.usefixtures("zarr_threads")


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.server)])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a cache of this test's own; nothing is there yet."""
    if request.param == "folder":
        return str(tmp_path / "x.zarr")
    for name, value in variables(request.getfixturevalue("s3_endpoint")).items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/contract/{request.node.originalname}.zarr"


@pytest.fixture(scope="module")
def here(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A finished cache, whose splits are copied to the place."""
    return make_cache(tmp_path_factory.mktemp("here") / "x.zarr")


def test_what_is_written_is_read(place: str, here: Cache) -> None:
    there = copy_splits(here, place, "id/val", "ood/near/letters")
    assert there.path == place
    assert list(there) == ["id/val", "ood/near/letters"]
    assert_alike(here, there)
    assert [(d.array, d.what) for d in verify_cache(there)] == [(d.array, d.what) for d in verify_cache(here)]
    assert there["id/val"].stored_bytes() == here["id/val"].stored_bytes()


def test_a_writer_that_was_killed_goes_on(place: str, here: Cache) -> None:
    """The process dies at once, in the midst of a block's objects; another writes what is not marked."""
    split = here["id/val"]
    script = f"""
        import os
        from nacpipe.cache import CacheWriter, open_cache
        from nacpipe.cache.store import RemoteStore
        from zarr.storage import LocalStore

        Store = RemoteStore if {is_url(place)} else LocalStore
        here = open_cache({here.path!r})
        writer, split = CacheWriter({place!r}, here.header), here["id/val"]
        writer.prepare("id/val", split.rows, split.images, label=split.label, index=split.index)
        arrays = {{path: split.read(path) for path in here.header.arrays()}}
        writer.write_block("id/val", 0, {{path: array[:16] for path, array in arrays.items()}})
        put, puts = Store.set, []

        async def dying(self, key, value):
            puts.append(key)
            if len(puts) == 4:
                os._exit(9)
            await put(self, key, value)

        Store.set = dying
        writer.write_block("id/val", 1, {{path: array[16:32] for path, array in arrays.items()}})
    """
    assert subprocess.run([*python_words(), "-c", textwrap.dedent(script)], timeout=120).returncode == 9
    with pytest.raises(CacheError, match=r"id/val is not finished \(1 of 3 blocks\)"):
        open_cache(place)["id/val"]
    marks = prepare_split(CacheWriter(place, here.header), split)
    assert marks.tolist() == [True, False, False]
    assert_alike(here, copy_splits(here, place, "id/val"))


def test_a_split_is_dropped(place: str, here: Cache) -> None:
    copy_splits(here, place, "id/val", "ood/far/textures")
    CacheWriter(place, here.header).drop("id/val")
    assert list(open_cache(place)) == ["ood/far/textures"]
    assert_alike(here, copy_splits(here, place, "id/val"))


def test_a_changed_object_is_found(place: str, here: Cache) -> None:
    there = copy_splits(here, place, "id/val")
    objects = address.Objects(place)
    for path, what in (("id/val/logits/c.0.0", b"1234"), ("id/val/label/c.0", b"5678")):
        objects.replace(path, what)
    with pytest.raises(CacheError, match="id/val is not what was sealed"):
        open_cache(place)["id/val"]
    assert [(d.array, d.block) for d in verify_cache(there) if d.split == "id/val"] == [("logits", 0), ("label", None)]
    objects.remove("id/val/label/c.0")
    with pytest.raises(CacheError, match=r"id/val/label is damaged \(1 of its chunks are not there\)"):
        open_cache(place)["id/val"]


def test_a_damaged_cache_is_repaired_and_its_rows_alone_written_again(place: str, here: Cache) -> None:
    """A chunk, metadata, a mark, a chunk beyond the rows; a split's attributes, the root's."""
    copy_splits(here, place, "id/val", "ood/near/letters")
    objects = address.Objects(place)

    def flip(key: str, offset: int) -> None:
        content = bytearray(objects.read(key) or b"")
        content[offset] ^= 1
        objects.replace(key, bytes(content))

    assert repair_cache(place) == []
    flip("id/val/layers/layer1/gradient/c.1.0", 20)
    flip("id/val/label/zarr.json", 40)
    flip("ood/near/letters/blocks/c.0", 0)
    objects.replace("ood/near/letters/label/c.9", b"12345")
    found = verify_cache(open_cache(place))
    assert [(d.split, d.array, d.block) for d in found] == [
        ("id/val", "label", None),
        ("id/val", "layers/layer1/gradient", 1),
        ("ood/near/letters", "blocks", 0),
    ]
    flip("zarr.json", 150)
    with pytest.raises(
        FormatError, match=f"^{place}.*; repair does not change a root: put back a copy of its zarr.json"
    ):
        repair_cache(place)
    flip("zarr.json", 150)
    assert sorted(repair_cache(place)) == [
        "id/val/label: metadata rewritten",
        "id/val: block 1, rows 16 to 31, is to be computed again",
        "ood/near/letters/label/c.9 is a chunk beyond the last row: it is removed",
        "ood/near/letters: the mark of block 0 rewritten",
    ]
    split = here["id/val"]
    assert open_cache(place).peek("id/val").marks().tolist() == [True, False, True]
    writer = CacheWriter(place, here.header)
    assert prepare_split(writer, split).tolist() == [True, False, True]
    write_rows(writer, split, 1, "id/val")
    writer.seal("id/val")
    assert verify_cache(open_cache(place)) == []
    assert_alike(here, open_cache(place))
    flip("ood/near/letters/zarr.json", 3)
    (done,) = repair_cache(place)
    assert done.startswith("ood/near/letters: zarr.json is damaged (JSONDecodeError: ")
    assert done.endswith("); the split is dropped and is to be extracted again")
    assert [key for key in list_keys(objects.store) if key.startswith("ood/near/letters")] == []
    assert_alike(here, copy_splits(here, place, "ood/near/letters"))


def test_foreign_objects_stay_and_are_named(place: str, here: Cache) -> None:
    """The split's own objects alone are removed, one by one."""
    copy_splits(here, place, "id/val")
    objects = address.Objects(place)
    foreign = ["id/val/logits/c.notes.txt", "id/val/notes.txt", "notes.txt"]
    for key in foreign:
        objects.replace(key, b"somebody's")
    assert open_cache(place)["id/val"].attributes == here["id/val"].attributes
    assert (verify_cache(open_cache(place)), foreign_files(open_cache(place))) == ([], foreign)
    assert repair_cache(place) == []
    CacheWriter(place, here.header).drop("id/val")
    assert sorted(key for key in list_keys(objects.store) if key.startswith("id/val")) == foreign[:2]
    copy_splits(here, place, "id/val")
    assert open_cache(place)["id/val"].attributes == here["id/val"].attributes
    assert foreign_files(open_cache(place)) == foreign
