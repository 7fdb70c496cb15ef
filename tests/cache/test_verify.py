"""verify names what is damaged, repair takes exactly those rows' marks, and the finished cache is what it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from zarr.storage import LocalStore

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.cache.durability import replace_file
from nacpipe.cache.identity import fingerprint
from nacpipe.cache.layout import FORMAT_VERSION
from nacpipe.cache.repair import repair_cache
from nacpipe.cache.verify import Damage, check_metadata, verify_cache
from nacpipe.cli import main
from nacpipe.errors import CacheError, FormatError
from tests.alike import key_in, prepare_split

SPLITS = {
    "id/subtrain": 0,
    "id/test": 0,
    "ood/near/letters": 0,
    "ood/far/textures": 0,
}  # leaves id/train, id/val, ood/val


@pytest.fixture(scope="module")
def whole(
    request: pytest.FixtureRequest, make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory
) -> Cache:
    """Of the version that a test names, else of the newest."""
    version = getattr(request, "param", FORMAT_VERSION)
    return make_cache(tmp_path_factory.mktemp("whole") / "c.zarr", rows=SPLITS, version=version)


def at(path: Path, key: str) -> Path:
    """Return the file of a key of version 2, in a cache of either version."""
    return path / key_in(open_cache(path).header.version, key)


@pytest.fixture
def path(whole: Cache, tmp_path: Path) -> Path:
    shutil.copytree(whole.path, tmp_path / "c.zarr")
    return tmp_path / "c.zarr"


def flip(file: Path, position: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(bytes(content))


def edit(file: Path, **attributes: Any) -> None:
    content = json.loads(file.read_text())
    content["attributes"].update(attributes)
    file.write_text(json.dumps(content))


def unseal(path: Path) -> None:
    """As a writer that was killed before the seal leaves id/val."""
    edit(path / "id/val/zarr.json", sealed=False, digest=None)
    CacheWriter(path, open_cache(path).header)  # renews the consolidated metadata


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def damage_of(path: Path) -> list[Damage]:
    return verify_cache(open_cache(path))


def extract_again(path: Path, whole: Cache) -> list[tuple[str, int]]:
    """Do as extraction does with the values of the whole cache; return the blocks that it wrote."""
    writer, written = CacheWriter(path, whole.header), []
    writer.write_classifier(*(whole.classifier() or ()))
    for name, split in whole.items():
        so_far = open_cache(path)
        if name in so_far and so_far.peek(name).sealed:
            continue
        for block in np.flatnonzero(~prepare_split(writer, split)):
            rows = slice(16 * block, 16 * block + 16)
            writer.write_block(name, int(block), {key: split.read(key)[rows] for key in whole.header.arrays()})
            written.append((name, int(block)))
        writer.seal(name)
    return written


def test_a_whole_cache_has_no_damage(path: Path) -> None:
    assert damage_of(path) == []
    assert repair_cache(path) == []


@pytest.mark.repeats(1)
@pytest.mark.parametrize(("whole", "position"), [(1, -1), (2, 0), (2, 30), (2, -1)], indirect=["whole"])
def test_a_damaged_chunk_is_named_and_its_block_alone_is_computed_again(
    path: Path, whole: Cache, position: int
) -> None:
    flip(at(path, "id/val/layers/layer1/gradient/c.1.0"), position)
    flip(at(path, "ood/val/logits/c.2.0"), position)
    found = damage_of(path)
    assert [(d.split, d.array, d.block, d.rows) for d in found] == [
        ("id/val", whole.header.layer_array("layer1", "gradient"), 1, range(16, 32)),
        ("ood/val", "logits", 2, range(32, 37)),
    ]
    assert all("checksum" in d.what for d in found)
    assert repair_cache(path) == [
        "id/val: block 1, rows 16 to 31, is to be computed again",
        "ood/val: block 2, rows 32 to 36, is to be computed again",
    ]
    with pytest.raises(CacheError, match=r"id/val is not finished \(2 of 3 blocks\)"):
        open_cache(path)["id/val"]
    assert damage_of(path) == []
    assert extract_again(path, whole) == [("id/val", 1), ("ood/val", 2)]
    assert_whole(path, whole)


def assert_whole(path: Path, whole: Cache) -> None:
    """Every value, every digest, every chunk."""
    assert damage_of(path) == []
    found, expected = files_of(path), files_of(Path(whole.path))
    assert set(found) == set(expected)
    for name, content in expected.items():
        if name.endswith("zarr.json"):
            assert json.loads(found[name]) == json.loads(content), name
        else:
            assert found[name] == content, name


# --- labels and places, which are written before the blocks -----------------------------------------------------------


@pytest.mark.repeats(1)
@pytest.mark.parametrize("array", ["label", "index"])
@pytest.mark.parametrize("how", ["changed", "lost"])
def test_damaged_labels_are_written_again_and_no_block_is_computed(
    path: Path, whole: Cache, array: str, how: str
) -> None:
    file = path / "id/val" / array / "c.0"
    if how == "lost":
        file.unlink()
    else:
        flip(file, 20)
    (damage,) = damage_of(path)
    assert (damage.split, damage.array, damage.block, damage.rows) == ("id/val", array, None, range(40))
    assert damage.what == "is not there" if how == "lost" else "checksum" in damage.what
    assert repair_cache(path) == [f"id/val: {array} is to be written again"]
    assert damage_of(path) == []
    with pytest.raises(CacheError, match=r"id/val is not finished \(3 of 3 blocks\)"):
        open_cache(path)["id/val"]
    with pytest.raises(CacheError, match=f"id/val/{array} lacks 1 of its chunks"):
        CacheWriter(path, whole.header).seal("id/val")
    assert extract_again(path, whole) == []
    assert_whole(path, whole)


@pytest.mark.repeats(2)
@pytest.mark.parametrize("lose", ["metadata", "all"])
@pytest.mark.parametrize("shard_blocks", [1, 2, 4])
def test_labels_without_metadata_cost_no_row(tmp_path: Path, whole: Cache, shard_blocks: int, lose: str) -> None:
    """Of four blocks in a shard, the labels' one chunk has the key that a shard of labels would have."""
    writer = CacheWriter(tmp_path / "x.zarr", replace(whole.header, shard_blocks=shard_blocks))
    split = whole["id/val"]
    prepare_split(writer, split)
    for first in range(0, 3, shard_blocks):
        rows = slice(16 * first, 16 * (first + shard_blocks))
        writer.write_block("id/val", first, {key: split.read(key)[rows] for key in whole.header.arrays()})
    writer.seal("id/val")
    before = files_of(path := tmp_path / "x.zarr")
    for array in ("label", "index"):
        (path / "id/val" / array / "zarr.json").unlink()
        if lose == "all":
            (path / "id/val" / array / "c.0").unlink()
    done = [f"id/val/{array}: metadata rewritten" for array in ("label", "index")]
    again = [f"id/val: {array} is to be written again" for array in ("label", "index")] if lose == "all" else []
    assert repair_cache(path) == done + again
    if lose == "all":
        assert prepare_split(writer, split).all()
        CacheWriter(path, writer.header).seal("id/val")
    assert damage_of(path) == []
    found = files_of(path)
    assert found.keys() == before.keys()
    assert all(found[key] == content for key, content in before.items() if not key.endswith("zarr.json"))
    assert open_cache(path)["id/val"].attributes == split.attributes or shard_blocks > 1


def test_each_chunk_of_labels_is_verified(
    write_cache: Callable[..., Cache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks of 32 rows, as a split of millions of rows has chunks of a million."""
    monkeypatch.setattr("nacpipe.cache.layout.WHOLE_ROWS", 32)
    whole = write_cache(tmp_path / "whole.zarr", rows=SPLITS)
    shutil.copytree(whole.path, path := tmp_path / "c.zarr")
    assert sorted(file.name for file in (path / "id/train/label").iterdir()) == ["c.0", "c.1", "zarr.json"]
    flip(path / "id/train/label/c.1", 20)
    (path / "id/train/index/c.0").unlink()
    flip(path / "id/val/label/zarr.json", 40)
    assert [(d.split, d.array, d.block, d.rows) for d in damage_of(path)] == [
        ("id/val", "label", None, None),
        ("id/train", "label", None, range(32, 60)),
        ("id/train", "index", None, range(32)),
    ]
    assert sorted(repair_cache(path)) == [
        "id/train: index is to be written again",
        "id/train: label is to be written again",
        "id/val/label: metadata rewritten",
    ]
    assert extract_again(path, whole) == []
    assert_whole(path, whole)


def test_a_lost_chunk_is_named(path: Path, whole: Cache) -> None:
    (path / "id/train/layers/avgpool/activation/c.3.0").unlink()
    (damage,) = damage_of(path)
    assert (damage.split, damage.array, damage.rows, damage.what) == (
        "id/train",
        "layers/avgpool/activation",
        range(48, 60),
        "is not there",
    )
    repair_cache(path)
    assert extract_again(path, whole) == [("id/train", 3)]
    assert_whole(path, whole)


@pytest.mark.parametrize("whole", [1, 2], indirect=True)
def test_damage_in_metadata_costs_no_row(path: Path, whole: Cache) -> None:
    """Of a split's arrays and marks; of a layer's group and of one on the way."""
    flip(path / "id/zarr.json", 3)
    flip(path / "id/val/logits/zarr.json", 40)
    at(path, "id/val/layers/layer1/zarr.json").unlink()
    flip(at(path, "ood/val/blocks/c.0"), 0)
    (path / "id/train/blocks/zarr.json").write_bytes(b"")
    done = repair_cache(path)
    assert sorted(done) == [
        "id/train/blocks: metadata rewritten",
        f"id/val/{whole.header.layer_path('layer1')}: metadata rewritten",
        "id/val/logits: metadata rewritten",
        "id: metadata rewritten",
        "ood/val: the mark of block 0 rewritten",
    ]
    assert extract_again(path, whole) == []
    assert_whole(path, whole)


ALL_OF_VAL = [("id/val", 0), ("id/val", 1), ("id/val", 2)]


@pytest.mark.parametrize(
    ("digit", "bit", "rows"),
    [(0, 0, 50), pytest.param(0, 1, 60, marks=pytest.mark.slow), (1, 0, 41),
     pytest.param(1, 3, 48, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_split_whose_number_of_rows_changed_is_dropped(
    path: Path, whole: Cache, digit: int, bit: int, rows: int
) -> None:
    """Every array then looks misshapen; it is the attribute that is damaged, not they."""
    content = (path / "id/val/zarr.json").read_bytes()
    place = content.index(b'"rows": ') + 8 + digit
    flip(path / "id/val/zarr.json", place, bit)
    what = f"rows is {rows}, but 8 of 8 arrays have 40"
    assert [(d.split, d.array, d.what) for d in damage_of(path)] == [("id/val", "", what)]
    assert repair_cache(path) == [f"id/val: {what}; the split is dropped and is to be extracted again"]
    assert not (path / "id/val").exists()
    assert extract_again(path, whole) == ALL_OF_VAL
    assert_whole(path, whole)


@pytest.mark.parametrize("whole", [1, 2], indirect=True)
def test_all_arrays_without_metadata_cost_no_row(path: Path, whole: Cache) -> None:
    """Nothing contradicts the number of rows then, and the seal confirms it."""
    for array in whole.header.arrays():
        (path / "id/val" / array / "zarr.json").unlink()
    assert len(repair_cache(path)) == 8
    assert extract_again(path, whole) == []
    assert_whole(path, whole)


def test_names_that_say_nothing_about_values_are_sealed_too(path: Path, whole: Cache) -> None:
    """A dimension's name, an object that does not belong there: the digest does not fit, and the header says why."""
    file = path / "id/val/logits/zarr.json"
    file.write_text(file.read_text().replace('"class"', '"glass"'))
    (path / "id/val/label/c.9").write_bytes(b"12345")
    (path / "id/val/logits/c.3.0").write_bytes(b"12345")
    assert [(d.split, d.array, d.block, d.rows, d.what) for d in damage_of(path)] == [
        ("id/val", "label", 9, None, "is a chunk beyond the last row"),
        ("id/val", "logits", 3, None, "is a chunk beyond the last row"),
        ("id/val", "logits", None, None, "its zarr.json is not what follows from the header"),
    ]
    assert repair_cache(path) == [
        "id/val/label/c.9 is a chunk beyond the last row: it is removed",
        "id/val/logits/c.3.0 is a chunk beyond the last row: it is removed",
        "id/val/logits: metadata rewritten",
    ]
    assert_whole(path, whole)


def test_a_mark_that_says_something_else_is_written_anew(path: Path, whole: Cache) -> None:
    """Its checksum fits, so that it reads as true; the seal alone knows."""
    import zarr

    marks = zarr.open_array(path / "id/val/blocks", mode="r+")
    marks[1] = 3
    assert [(d.array, d.block, d.rows) for d in damage_of(path)] == [("blocks", 1, None)]
    assert repair_cache(path) == ["id/val: the mark of block 1 rewritten"]
    assert_whole(path, whole)


@pytest.mark.parametrize("what", ["digest", "images"])
@pytest.mark.repeats(1)
def test_attributes_that_can_be_read_but_were_not_sealed_cost_the_split(path: Path, whole: Cache, what: str) -> None:
    """Nothing says whether they changed or chunks were exchanged."""
    other = {"digest": "0" * 64, "images": {"list": "other.txt", "sha256": "1" * 64}}[what]
    edit(path / "id/val/zarr.json", **{what: other})
    assert [(d.split, d.array, d.what[:23]) for d in damage_of(path)] == [("id/val", "", "is not what was sealed,")]
    assert repair_cache(path) == [DROPPED_FOR_SEAL]
    assert extract_again(path, whole) == ALL_OF_VAL
    assert_whole(path, whole)


DROPPED_FOR_SEAL = (
    "id/val: is not what was sealed, though every chunk is whole: files or attributes were changed or exchanged;"
    " the split is dropped and is to be extracted again"
)


@pytest.mark.parametrize("whole", [1, 2], indirect=True)
@pytest.mark.repeats(1)
def test_a_split_with_exchanged_chunks_is_dropped(path: Path, whole: Cache) -> None:
    one, other = at(path, "id/val/logits/c.0.0"), at(path, "id/val/logits/c.1.0")
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    with pytest.raises(CacheError, match=r"id/val is not what was sealed: files were changed, exchanged or lost"):
        open_cache(path)["id/val"]
    (damage,) = damage_of(path)
    assert damage.what.startswith("is not what was sealed")
    assert repair_cache(path) == [DROPPED_FOR_SEAL]
    assert extract_again(path, whole) == ALL_OF_VAL
    assert_whole(path, whole)


def test_marked_blocks_of_an_unfinished_split_are_read_too(path: Path, whole: Cache) -> None:
    unseal(path)
    (path / "id/val/blocks/c.2").unlink()
    flip(path / "id/val/features/c.0.0", 8)
    flip(path / "id/val/features/c.2.0", 8)  # not marked: it will be written again
    assert [(d.split, d.array, d.rows) for d in damage_of(path)] == [("id/val", "features", range(16))]
    repair_cache(path)
    assert extract_again(path, whole) == [("id/val", 0), ("id/val", 2)]
    assert_whole(path, whole)


def test_a_split_that_was_only_begun_lacks_nothing(path: Path, whole: Cache) -> None:
    """Stopped among its metadata, of which the marks' come last. What is there must be right all the same."""
    unseal(path)
    for part in ("blocks", "layers/layer1", "logits"):
        shutil.rmtree(path / "id/val" / part)
    assert damage_of(path) == []
    assert repair_cache(path) == []
    flip(path / "id/val/features/zarr.json", 40)
    assert [(d.split, d.array) for d in damage_of(path)] == [("id/val", "features")]
    assert repair_cache(path) == ["id/val/features: metadata rewritten"]
    assert extract_again(path, whole) == [("id/val", 0), ("id/val", 1), ("id/val", 2)]
    assert_whole(path, whole)


def test_a_split_whose_attributes_are_damaged_is_dropped(path: Path, whole: Cache) -> None:
    (path / "id/val/zarr.json").write_bytes(b"\0" * 700)
    with pytest.raises(FormatError, match=r"id/val/zarr\.json is damaged .*; nacpipe repair .*repairs what can be"):
        open_cache(path)["id/val"]
    assert repair_cache(path) == [
        "id/val: zarr.json is damaged (JSONDecodeError: Expecting value: line 1 column 1 (char 0));"
        " the split is dropped and is to be extracted again"
    ]
    assert extract_again(path, whole) == ALL_OF_VAL
    assert_whole(path, whole)
    (path / "ood/val/zarr.json").unlink()
    assert [(d.split, d.what) for d in damage_of(path)] == [
        ("ood/val", "has no zarr.json: it was lost, or a removal was interrupted")
    ]
    assert repair_cache(path) == [
        "ood/val: has no zarr.json: it was lost, or a removal was interrupted; the split is dropped and is to be"
        " extracted again"
    ]
    assert not (path / "ood/val").exists()


def flip_the_root(path: Path) -> None:
    flip(path / "zarr.json", 0)


def edit_the_root(path: Path) -> None:
    edit(path / "zarr.json", block_rows=99)


def empty_the_root(path: Path) -> None:
    (path / "zarr.json").write_bytes(b"")


def fit_the_digest(attributes: dict[str, Any]) -> None:
    """Give a root's attributes the digest that fits them, as a program that computes it does."""
    attributes["digest"] = fingerprint({key: value for key, value in attributes.items() if key != "digest"})


def strip_the_root(path: Path) -> None:
    """As a program of somebody else may write it."""
    content = json.loads((path / "zarr.json").read_text())
    del content["attributes"]["identity"]["benchmark"]
    fit_the_digest(content["attributes"])
    (path / "zarr.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "what"),
    [(flip_the_root, r" cannot be read as a Zarr group \(JSONDecodeError: .*\)"),
     (edit_the_root, r": the cache's attributes are damaged \(they do not match their digest\)"),
     (empty_the_root, r" cannot be read as a Zarr group \(JSONDecodeError: .*\)"),
     (strip_the_root, ": identity lacks benchmark")],
)  # fmt: skip
def test_a_damaged_root_is_refused_and_nothing_is_changed(
    path: Path, damage: Callable[[Path], None], what: str
) -> None:
    damage(path)
    flip(path / "id/val/logits/c.1.0", 9)
    before = files_of(path)
    advice = r"repair does not change a root: put back a copy of its zarr\.json, or extract into another --cache"
    with pytest.raises(FormatError, match=f"^{path}{what}; {advice}$"):
        repair_cache(path)
    assert files_of(path) == before


def test_a_cache_of_another_version_is_refused_in_the_readers_words(path: Path) -> None:
    edit(path / "zarr.json", nacpipe_format=7)
    with pytest.raises(FormatError, match=r"has format version 7, .* extract again into another --cache$"):
        repair_cache(path)


# --- killed while it repairs ------------------------------------------------------------------------------------------


class Killed(BaseException):
    """No code catches it, as none survives SIGKILL."""


@contextmanager
def killed_at(step: int) -> Iterator[list[str]]:
    """From its step-th change of the store on, nothing is changed any more; yields the changes before."""
    done: list[str] = []

    def allow(key: str) -> None:
        if len(done) >= step:
            raise Killed
        done.append(key)

    delete = LocalStore.delete

    def replacing(file: Path, content: bytes) -> None:
        allow(str(file))
        replace_file(file, content)

    async def deleting(store: LocalStore, key: str) -> None:
        allow(key)
        await delete(store, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nacpipe.cache.address.replace_file", replacing)
        patch.setattr(LocalStore, "delete", deleting)
        yield done


def damage_a_chunk(path: Path) -> None:
    flip(at(path, "id/val/layers/layer1/gradient/c.1.0"), 20)


def exchange_chunks(path: Path) -> None:
    first, second = at(path, "id/val/logits/c.0.0"), at(path, "id/val/logits/c.1.0")
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def damage_metadata(path: Path) -> None:
    flip(path / "id/val/logits/zarr.json", 40)
    flip(at(path, "id/val/blocks/c.2"), 0)
    damage_a_chunk(path)


def change_rows(path: Path) -> None:
    edit(path / "id/val/zarr.json", rows=48)


def lose_rows_of_an_unfinished_split(path: Path) -> None:
    unseal(path)
    at(path, "id/val/features/c.0.0").unlink()


def damage_labels(path: Path) -> None:
    flip(at(path, "id/val/label/c.0"), 20)


def damage_labels_and_a_chunk(path: Path) -> None:
    damage_labels(path)
    damage_a_chunk(path)


@pytest.fixture(scope="module")
def little(
    request: pytest.FixtureRequest, make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory
) -> Cache:
    rows = {**SPLITS, "id/train": 0, "ood/val": 9}
    return make_cache(tmp_path_factory.mktemp("little") / "c.zarr", rows=rows, version=request.param)


@pytest.mark.repeats(2)
@pytest.mark.parametrize("repaired_again", [True, False])
@pytest.mark.parametrize(
    ("little", "damage", "changes"),
    [
        (2, damage_a_chunk, [0, 1, 2, 3]),  # the mark, the seal, the consolidated metadata, the chunk
        (2, lose_rows_of_an_unfinished_split, [0, 1, 2]),
        (2, damage_labels, [0, 1, 2]),  # the chunk, the seal, the consolidated metadata
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (1, damage_a_chunk, [0, 1, 2]),  # the mark, the seal, the chunk
                (1, damage_metadata, [1, 4]),
                (1, exchange_chunks, [1, 2, 5, 38]),
                (1, damage_labels, [0, 1, 2]),
                (2, damage_metadata, [0, 1, 2, 3, 4, 5]),
                # attributes, copy, metadata of marks, marks, first rows, the last
                (2, exchange_chunks, [0, 1, 2, 3, 6, 7, 36]),
                (2, change_rows, [1, 2, 4, 20]),
                (2, damage_labels_and_a_chunk, [0, 1, 2, 3, 4]),
            )
        ),
    ],
    indirect=["little"],
)
def test_a_repair_killed_at_any_change_can_be_run_again(
    tmp_path: Path, little: Cache, damage: Callable[[Path], None], changes: list[int], repaired_again: bool
) -> None:
    """Also where extract comes first: it never seals what was damaged, so that a later repair still finds it."""
    whole, path, damaged = little, tmp_path / "c.zarr", tmp_path / "damaged.zarr"
    shutil.copytree(whole.path, damaged)
    damage(damaged)
    others = {name: content for name, content in files_of(damaged).items() if not name.startswith("id/val/")}
    others.pop("zarr.json")  # which holds the consolidated metadata
    for number in changes:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(damaged, path)
        with killed_at(number) as done, pytest.raises(Killed):
            repair_cache(path)
        assert len(done) == number
        if not repaired_again:
            with suppress(CacheError):  # a lost chunk is refused at the seal
                extract_again(path, whole)
        repair_cache(path)
        assert files_of(path).items() >= others.items()
        extract_again(path, whole)
        assert_whole(path, whole)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda folder: flip(folder / "weight/c.0.0", 5), r"classifier is damaged .*checksum"),
        (lambda folder: (folder / "zarr.json").unlink(), r"classifier/ has no zarr\.json: it was lost"),
        (lambda folder: (folder / "bias/zarr.json").unlink(), r"classifier/bias is not in the store"),
    ],
    ids=["changed", "lost", "an array lost"],
)
@pytest.mark.repeats(1)
def test_the_classifier_is_written_again(path: Path, whole: Cache, damage: Callable[[Path], None], what: str) -> None:
    damage(path / "classifier")
    with pytest.raises(CacheError, match=what):
        open_cache(path).classifier()
    assert [d.split for d in damage_of(path)] == ["classifier"]
    assert repair_cache(path) == ["classifier: is to be written again"]
    assert extract_again(path, whole) == []
    assert_whole(path, whole)


def test_leftovers_are_no_damage_and_repair_removes_them(path: Path) -> None:
    before = files_of(path)
    (path / "id/val/logits/c.0.0.abc.partial").write_bytes(b"half")
    assert damage_of(path) == []
    repair_cache(path)
    assert files_of(path) == before


@pytest.mark.parametrize(
    ("where", "change", "array", "what"),
    [
        ("id/val/logits", {"shape": [41, 3]}, "logits", "is float32 of (41, 3), not float32 of (40, 3)"),
        ("id/val/logits", {"data_type": "float64"}, "logits", "is float64 of (40, 3), not float32 of (40, 3)"),
        ("id/val/label", {"fill_value": 0}, "label", "has fill value 0, which could pass for data"),
        ("id/val/logits", {"fill_value": 0.0}, "logits", "has fill value 0.0, which could pass for data"),
        (
            "id/val/index",
            {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [8]}}},
            "index",
            "is chunked (8,), not (16,)",
        ),
        (
            "id/val/index",
            {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [40]}}},
            "index",
            "is chunked (40,), no multiple of 16 rows of at most 2147483647 bytes",
        ),
        (
            "id/val/index",
            {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2**28]}}},
            "index",
            f"is chunked ({2**28},), no multiple of 16 rows of at most 2147483647 bytes",
        ),
        (
            "id/val/logits",
            {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [48, 3]}}},
            "logits",
            "is chunked (48, 3), not (16, 3)",
        ),
        (
            "id/val/logits",
            {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}},
            "logits",
            "has chunk keys of {'name': 'default', 'separator': '/'}, not {'name': 'default', 'separator': '.'}",
        ),
        (
            "id/val/logits",
            {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]},
            "logits",
            "has chunks without a crc32c at their end",
        ),
        (
            "id/val/logits",
            {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]},
            "logits",
            "is not little endian",
        ),
        ("id/val/blocks", {"shape": [4]}, "blocks", "is uint8 of (4,), not uint8 of (3,)"),
        ("id/val/blocks", {"fill_value": 1}, "blocks", "has fill value 1: a missing mark would count"),
        ("id/val", {"attributes": {"rows": 40, "sealed": True}}, "", "is sealed and has no digest"),
        ("id/val", {"attributes": {"rows": 40, "sealed": False}}, "", "images names no list"),
        ("id/val", {"attributes": {"rows": -1}}, "", "rows is -1, not a whole number from 1"),
        ("id/val", {"node_type": "array"}, "", None),
    ],
)
def test_every_field_of_the_format_is_checked(
    path: Path, where: str, change: dict[str, Any], array: str, what: str | None
) -> None:
    file = path / where / "zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    found = [d for d in check_metadata(open_cache(path)) if d.split == "id/val"]
    assert (array, what) in [(d.array, d.what) for d in found] if what else found
    with pytest.raises(CacheError):
        open_cache(path)["id/val"]


@pytest.mark.parametrize("images", ["a", 3, ["list"], None])
def test_images_that_are_no_object_are_damage_in_words(path: Path, images: object) -> None:
    edit(path / "id/val/zarr.json", images=images)
    with pytest.raises(
        CacheError, match=r"id/val/zarr\.json is damaged \(images is .*, not an object\); repair it with: nac"
    ):
        open_cache(path).peek("id/val").images  # noqa: B018
    assert ("", "images names no list") in [(d.array, d.what) for d in check_metadata(open_cache(path))]
    done = CliRunner().invoke(main, ["inspect", str(path)])
    assert (done.exit_code, "id/val/zarr.json is damaged" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_rows": 0}, "block_rows is 0, not a whole number from 1 to 1048576"),
        ({"block_rows": 10**12}, "block_rows is 1000000000000, not a whole number"),
        ({"block_rows": 16.0}, r"block_rows is 16\.0, not a whole number"),
        ({"classes": True}, "classes is True, not a whole number"),
        ({"mantissa_bits": 24}, "mantissa_bits is 24, not a whole number from 1 to 23"),
        ({"shard_blocks": 0}, "shard_blocks is 0, not a whole number"),
        ({"block_rows": 2**20, "classes": 2**20}, "a block of logits has more than 2147483647 bytes"),
        ({"layers": []}, "layers are none, or two have one name"),
        ({"layers": 3}, "TypeError"),
        ({"identity": []}, "TypeError"),
        ({"layers": [{"name": "../x", "path": "x", "pooling": "none", "neurons": 4}]}, "layer name '../x' has other"),
        ({"layers": [{"name": "a", "path": "x", "pooling": "max", "neurons": 4}]}, "layer 'a' needs a name, a path"),
        ({"layers": [{"name": "a", "path": "x", "pooling": "none"}]}, "TypeError"),
    ],
)
def test_attributes_of_the_root_that_do_not_fit_are_refused(path: Path, change: dict[str, Any], message: str) -> None:
    file = path / "zarr.json"
    content = json.loads(file.read_text())
    content["attributes"].update(change)
    fit_the_digest(content["attributes"])
    file.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=rf"the cache's attributes are damaged \(.*{message}"):
        open_cache(path)


def test_what_only_a_writer_needs_is_told_by_the_validator(path: Path) -> None:
    file = path / "zarr.json"
    content = json.loads(file.read_text())
    unfit = {"weights": "abc", "source": "net.py", "transform": {"crop": 3}, "outputs": "pixels"}
    content["attributes"]["identity"] = unfit
    fit_the_digest(content["attributes"])
    file.write_text(json.dumps(content))
    assert [d.what for d in check_metadata(open_cache(path))] == [
        *(f"identity lacks {key}" for key in ("benchmark", "architecture", "family", "dtype")),
        "identity.weights is not a sha256",
        "identity.source is not a sha256",
        *(f"identity.transform lacks {key}" for key in ("resize", "mean", "std")),
        "identity.outputs is 'pixels', none of logits, features, probabilities, log-probabilities",
    ]


def test_a_cache_of_someone_else_with_another_compressor_is_read(path: Path) -> None:
    """MAY: another compressor; here none. Its zarr.json are not ours, and stay."""
    import zarr

    cache = open_cache(path)
    values = cache["id/val"].read("logits")
    group = zarr.open_group(path, mode="r+", use_consolidated=False)["id/val"]
    assert isinstance(group, zarr.Group)
    group.create_array(
        "logits",
        data=values,
        chunks=(16, 3),
        compressors=(zarr.codecs.Crc32cCodec(),),
        fill_value=float("nan"),
        chunk_key_encoding={"name": "default", "separator": "."},
        overwrite=True,
    )
    CacheWriter(path, cache.header).seal("id/val")
    assert damage_of(path) == []
    np.testing.assert_array_equal(open_cache(path)["id/val"].read("logits"), values)
    flip(path / "id/val/logits/c.0.0", 3)
    assert [d.rows for d in damage_of(path)] == [range(16)]
