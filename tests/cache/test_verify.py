"""verify names what is damaged, repair takes exactly those rows' marks, and the finished cache is what it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.cache.repair import repair_cache
from nacpipe.cache.verify import Damage, check_metadata, verify_cache
from nacpipe.cli import main
from nacpipe.errors import CacheError, FormatError

SPLITS = {
    "id/subtrain": 0,
    "id/test": 0,
    "ood/near/letters": 0,
    "ood/far/textures": 0,
}  # leaves id/train, id/val, ood/val


@pytest.fixture(scope="module")
def whole(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("whole") / "c.zarr", rows=SPLITS)


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
        for block in np.flatnonzero(~writer.prepare(name, split.rows, split.images)):
            rows = slice(16 * block, 16 * block + 16)
            writer.write_block(name, int(block), {key: split.read(key)[rows] for key in whole.header.arrays()})
            written.append((name, int(block)))
        writer.seal(name)
    return written


def test_a_whole_cache_has_no_damage(path: Path) -> None:
    assert damage_of(path) == []
    assert repair_cache(path) == []


@pytest.mark.parametrize("position", [0, 30, -1])
def test_a_damaged_chunk_is_named_and_its_block_alone_is_computed_again(
    path: Path, whole: Cache, position: int
) -> None:
    flip(path / "id/val/layer1/gradient/c/1/0", position)
    flip(path / "ood/val/label/c/2", position)
    found = damage_of(path)
    assert [(d.split, d.array, d.block, d.rows) for d in found] == [
        ("id/val", "layer1/gradient", 1, range(16, 32)),
        ("ood/val", "label", 2, range(32, 37)),
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


def test_a_lost_chunk_is_named(path: Path, whole: Cache) -> None:
    (path / "id/train/avgpool/activation/c/3/0").unlink()
    (damage,) = damage_of(path)
    assert (damage.split, damage.array, damage.rows, damage.what) == (
        "id/train",
        "avgpool/activation",
        range(48, 60),
        "is not there",
    )
    repair_cache(path)
    assert extract_again(path, whole) == [("id/train", 3)]
    assert_whole(path, whole)


def test_damage_in_metadata_costs_no_row(path: Path, whole: Cache) -> None:
    """Of a split's arrays, marks and attributes; of the root; of a group on the way."""
    flip(path / "zarr.json", 150)
    flip(path / "id/zarr.json", 3)
    flip(path / "id/val/logits/zarr.json", 40)
    (path / "id/val/layer1/zarr.json").unlink()
    flip(path / "ood/val/blocks/c/0", 0)
    flip(path / "id/train/zarr.json", 200)
    with pytest.raises(FormatError):
        open_cache(path)
    done = repair_cache(path)
    assert sorted(done) == [
        "id/train: one bit of its attributes repaired",
        "id/val/layer1: metadata rewritten",
        "id/val/logits: metadata rewritten",
        "id: metadata rewritten",
        "ood/val: the mark of block 0 rewritten",
        "the root's attributes: one bit repaired",
    ]
    assert_whole(path, whole)


@pytest.mark.parametrize(("digit", "bit"), [(0, 0), (0, 1), (1, 0), (1, 3)])
def test_a_number_of_rows_that_lost_a_bit_costs_no_row(path: Path, whole: Cache, digit: int, bit: int) -> None:
    """Every array then looks misshapen; it is the attribute that is mended, not they."""
    content = (path / "id/val/zarr.json").read_bytes()
    place = content.index(b'"rows": ') + 8 + digit
    flip(path / "id/val/zarr.json", place, bit)
    assert json.loads((path / "id/val/zarr.json").read_bytes())["attributes"]["rows"] != whole["id/val"].rows
    assert damage_of(path) != []
    assert repair_cache(path) == ["id/val: one bit of its attributes repaired"]
    assert_whole(path, whole)


def test_names_that_say_nothing_about_values_are_sealed_too(path: Path, whole: Cache) -> None:
    """A dimension's name, an object that does not belong there: nothing but the digest knows."""
    file = path / "id/val/logits/zarr.json"
    file.write_text(file.read_text().replace('"neuron"', '"neutron"'))
    (path / "id/val/label/c/9").write_bytes(b"12345")
    (damage,) = damage_of(path)
    assert (damage.split, damage.array, damage.rows) == ("id/val", "", None)
    assert damage.what.startswith("is not what was sealed, though every chunk is valid")
    assert sorted(repair_cache(path)) == [
        "id/val/label/c/9, which does not belong there, is removed",
        "id/val/logits/zarr.json rewritten",
    ]
    assert_whole(path, whole)


def test_exchanged_chunks_are_computed_again_with_the_whole_split(path: Path, whole: Cache) -> None:
    one, other = path / "id/val/logits/c/0/0", path / "id/val/logits/c/1/0"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    with pytest.raises(CacheError, match=r"id/val is not what was sealed: files were changed, exchanged or lost"):
        open_cache(path)["id/val"]
    (damage,) = damage_of(path)
    assert damage.what.startswith("is not what was sealed")
    assert repair_cache(path) == [
        "id/val: no telling which rows are not those that were sealed; all of it is to be computed again"
    ]
    assert extract_again(path, whole) == [("id/val", 0), ("id/val", 1), ("id/val", 2)]
    assert_whole(path, whole)


def test_marked_blocks_of_an_unfinished_split_are_read_too(path: Path, whole: Cache) -> None:
    edit(path / "id/val/zarr.json", sealed=False, digest=None)
    (path / "id/val/blocks/c/2").unlink()
    flip(path / "id/val/index/c/0", 8)
    flip(path / "id/val/index/c/2", 8)  # not marked: it will be written again
    assert [(d.split, d.array, d.rows) for d in damage_of(path)] == [("id/val", "index", range(16))]
    repair_cache(path)
    assert extract_again(path, whole) == [("id/val", 0), ("id/val", 2)]
    assert_whole(path, whole)


def test_a_split_that_was_only_begun_lacks_nothing(path: Path, whole: Cache) -> None:
    """Stopped among its metadata, of which the marks' come last. What is there must be right all the same."""
    edit(path / "id/val/zarr.json", sealed=False, digest=None)
    for part in ("blocks", "layer1", "logits"):
        shutil.rmtree(path / "id/val" / part)
    assert damage_of(path) == []
    assert repair_cache(path) == []
    flip(path / "id/val/features/zarr.json", 40)
    assert [(d.split, d.array) for d in damage_of(path)] == [("id/val", "features")]
    assert repair_cache(path) == ["id/val/features: metadata rewritten"]
    assert extract_again(path, whole) == [("id/val", 0), ("id/val", 1), ("id/val", 2)]
    assert_whole(path, whole)


def test_attributes_that_more_than_a_bit_was_lost_of_are_extracted_anew(path: Path, whole: Cache) -> None:
    (path / "id/val/zarr.json").write_bytes(b"\0" * 700)
    with pytest.raises(FormatError, match=r"id/val/zarr\.json is damaged .*; nacpipe repair .*repairs what can be"):
        open_cache(path)["id/val"]
    assert repair_cache(path) == ["id/val: its attributes are lost; it is to be extracted again"]
    assert extract_again(path, whole) == [("id/val", 0), ("id/val", 1), ("id/val", 2)]
    assert_whole(path, whole)
    (path / "ood/val/zarr.json").unlink()
    assert [(d.split, d.what) for d in damage_of(path)] == [
        ("ood/val", "has no zarr.json: it was lost, or a removal was interrupted")
    ]
    repair_cache(path)
    assert not (path / "ood/val").exists()


def test_a_root_that_lost_more_than_a_bit_is_left_alone(path: Path) -> None:
    edit(path / "zarr.json", block_rows=99)
    before = files_of(path)
    with pytest.raises(FormatError, match=r"do not match their digest\); no single bit corrects it$"):
        repair_cache(path)
    assert files_of(path) == before


def test_the_classifier_is_written_again(path: Path, whole: Cache) -> None:
    flip(path / "classifier/weight/c/0/0", 5)
    with pytest.raises(CacheError, match=r"classifier is damaged .*checksum"):
        open_cache(path).classifier()
    assert [(d.split, d.array) for d in damage_of(path)] == [("classifier", "")]
    assert repair_cache(path) == ["classifier: is to be written again"]
    assert extract_again(path, whole) == []
    assert_whole(path, whole)


def test_leftovers_are_no_damage_and_repair_removes_them(path: Path) -> None:
    before = files_of(path)
    (path / "id/val/logits/c/0/0.abc.partial").write_bytes(b"half")
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
        ({"keep_bits": 24}, "keep_bits is 24, not a whole number from 1 to 23"),
        ({"shard_blocks": 0}, "shard_blocks is 0, not a whole number"),
        ({"block_rows": 2**20, "classes": 2**20}, "a block of logits has more than 2147483647 bytes"),
        ({"layers": []}, "layers are none, or two have one name"),
        ({"layers": 3}, "TypeError"),
        ({"identity": []}, "TypeError"),
        ({"layers": [{"name": "../x", "path": "x", "pooling": "none", "neurons": 4}]}, "layer name '../x' cannot be"),
        ({"layers": [{"name": "a", "path": "x", "pooling": "max", "neurons": 4}]}, "layer 'a' needs a name, a path"),
        ({"layers": [{"name": "a", "path": "x", "pooling": "none"}]}, "TypeError"),
    ],
)
def test_attributes_of_the_root_that_do_not_fit_are_refused(path: Path, change: dict[str, Any], message: str) -> None:
    file = path / "zarr.json"
    content = json.loads(file.read_text())
    del content["attributes"]["digest"]  # as the first caches, or someone who computes it himself
    content["attributes"].update(change)
    file.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=rf"the cache's attributes are damaged \(.*{message}"):
        open_cache(path)


def test_what_only_a_writer_needs_is_told_by_the_validator(path: Path) -> None:
    file = path / "zarr.json"
    content = json.loads(file.read_text())
    del content["attributes"]["digest"]
    unfit = {"weights": "abc", "source": "net.py", "transform": {"crop": 3}, "outputs": "pixels"}
    content["attributes"]["identity"] = unfit
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
    group = zarr.open_group(path, mode="r+")["id/val"]
    assert isinstance(group, zarr.Group)
    group.create_array(
        "logits",
        data=values,
        chunks=(16, 3),
        compressors=(zarr.codecs.Crc32cCodec(),),
        fill_value=float("nan"),
        overwrite=True,
    )
    CacheWriter(path, cache.header).seal("id/val")
    assert damage_of(path) == []
    np.testing.assert_array_equal(open_cache(path)["id/val"].read("logits"), values)
    flip(path / "id/val/logits/c/0/0", 3)
    assert [d.rows for d in damage_of(path)] == [range(16)]
