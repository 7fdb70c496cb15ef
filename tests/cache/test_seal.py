"""The seal: what changes a split's digest, and what a damaged chunk does when it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from nacpipe.cache import Cache, open_cache
from nacpipe.cache.digest import split_digest
from nacpipe.errors import CacheError

# One split of three blocks is enough here.
ROWS = dict.fromkeys(["id/train", "id/subtrain", "id/test", "ood/val", "ood/near/letters", "ood/far/textures"], 0)


@pytest.fixture
def path(tmp_path: Path, make_cache: Callable[..., Cache]) -> Path:
    make_cache(tmp_path / "c.zarr", rows=ROWS)
    return tmp_path / "c.zarr"


def digest(path: Path) -> str:
    root = zarr.open_group(path, mode="r", use_consolidated=False)
    return split_digest(root, "id/val", dict(root["id/val"].attrs), open_cache(path).header)


def sealed_digest(path: Path) -> Any:
    return open_cache(path).peek("id/val").attributes["digest"]


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x01
    file.write_bytes(bytes(content))


def edit(file: Path, key: str, value: Any) -> None:
    content = json.loads(file.read_text())
    content[key] = value
    file.write_text(json.dumps(content))


def exchange(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def test_the_seal_holds_the_digest_of_an_untouched_split(path: Path) -> None:
    assert digest(path) == sealed_digest(path)
    assert len(sealed_digest(path)) == 64
    _ = open_cache(path)["id/val"].logits[:]
    assert digest(path) == sealed_digest(path)  # reading leaves no trace


def test_the_same_values_have_the_same_digest_anywhere(
    path: Path, tmp_path: Path, make_cache: Callable[..., Cache]
) -> None:
    make_cache(tmp_path / "other.zarr", rows=ROWS)
    make_cache(tmp_path / "others.zarr", rows=ROWS, seed=1)
    assert digest(tmp_path / "other.zarr") == digest(path)
    assert digest(tmp_path / "others.zarr") != digest(path)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda split: (split / "logits/c.1.0").unlink(), id="a chunk is deleted"),
        pytest.param(
            lambda split: (split / "layers/avgpool/gradient/zarr.json").unlink(), id="an array's metadata is deleted"
        ),
        pytest.param(lambda split: (split / "blocks/c.2").unlink(), id="a mark is deleted"),
        pytest.param(lambda split: (split / "label/c.3").write_bytes(b"12345"), id="a chunk is added"),
        *(
            pytest.param(lambda split, at=at: flip(split / "layers/layer1/activation/c.2.0", at), id=f"byte {at} flips")
            for at in (-4, -3, -2, -1)
        ),
        pytest.param(lambda split: flip(split / "label/c.0", -1), id="a label's checksum flips"),
        pytest.param(lambda split: flip(split / "blocks/c.0", -1), id="a mark's checksum flips"),
        pytest.param(
            lambda split: exchange(split / "logits/c.0.0", split / "logits/c.1.0"), id="two chunks change places"
        ),
        pytest.param(lambda split: edit(split / "label/zarr.json", "attributes", {"a": 1}), id="an array's zarr.json"),
        pytest.param(lambda split: edit(split / "index/zarr.json", "fill_value", 0), id="an array's fill value"),
        pytest.param(
            lambda split: edit(split / "layers/layer1/zarr.json", "attributes", {"a": 1}), id="a layer's zarr.json"
        ),
    ],
)
def test_damage_changes_the_digest(path: Path, damage: Callable[[Path], None]) -> None:
    damage(path / "id/val")
    assert digest(path) != sealed_digest(path)
    with pytest.raises(CacheError, match=r"id/val.* is (damaged|not what was sealed)"):
        open_cache(path)["id/val"]


@pytest.mark.parametrize("change", [{"rows": 39}, {"images": {"list": "other.txt"}}, {"note": "new"}])
def test_other_attributes_change_the_digest(path: Path, change: dict[str, Any]) -> None:
    file = path / "id/val/zarr.json"
    edit(file, "attributes", {**json.loads(file.read_text())["attributes"], **change})
    assert digest(path) != sealed_digest(path)
    with pytest.raises(CacheError, match=r"id/val.* is (damaged|not what was sealed)"):
        open_cache(path)["id/val"]


def test_leftovers_of_a_killed_writer_do_not_change_the_digest(path: Path) -> None:
    (path / "id/val/logits/c.1.0.abc.partial").write_bytes(b"half")
    (path / "id/val/.DS_Store").write_bytes(b"of the system")
    assert digest(path) == sealed_digest(path) == open_cache(path)["id/val"].attributes["digest"]


@pytest.mark.parametrize("array", ["layers/layer1/activation", "features", "label", "blocks"])
def test_a_flipped_byte_anywhere_in_a_chunk_raises_when_it_is_read(path: Path, array: str) -> None:
    files = sorted((path / "id/val" / array).glob("c.*"))
    file, last = files[len(files) > 1], files[-1]
    whole = file.read_bytes()
    stored = open_cache(path).peek("id/val").array(array)
    expected = np.asarray(stored[:])
    for position in range(len(whole)):
        flip(file, position)
        with pytest.raises((ValueError, CacheError), match="checksum"):
            stored[:]
        file.write_bytes(whole)
    np.testing.assert_array_equal(np.asarray(stored[:]), expected)
    if len(files) == 1:  # labels: a chunk of many blocks
        return
    # The other chunks can still be read around a damaged one.
    flip(last, 0)
    rows = open_cache(path).header.block_rows if array != "blocks" else 1
    np.testing.assert_array_equal(np.asarray(stored[:rows]), expected[:rows])
