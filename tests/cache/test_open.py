"""Opening a cache: other versions, other identities and what is no cache at all are refused, in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.errors import CacheError, FormatError, IdentityError

NO_SPLITS = dict.fromkeys(
    ["id/train", "id/subtrain", "id/val", "id/test", "ood/val", "ood/near/letters", "ood/far/textures"], 0
)


@pytest.fixture
def cache(tmp_path: Path, make_cache: Callable[..., Cache]) -> Cache:
    """A cache without a split."""
    return make_cache(tmp_path / "c.zarr", rows=NO_SPLITS)


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_another_format_version_is_refused(cache: Cache) -> None:
    file = Path(cache.path, "zarr.json")
    content = json.loads(file.read_text())
    assert content["attributes"]["nacpipe_format"] == 2
    content["attributes"]["nacpipe_format"] = 3
    file.write_text(json.dumps(content))
    message = (
        r"c\.zarr: this cache has format version 3, this nacpipe reads versions 1, 2; use the nacpipe that wrote it,"
        r" or extract again into another --cache$"
    )
    with pytest.raises(FormatError, match=message):
        open_cache(cache.path)
    with pytest.raises(FormatError, match=message):
        CacheWriter(cache.path, cache.header)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"c\.zarr cannot be read as a Zarr group \(JSONDecodeError"),
        ('{"zarr_format": 3, "node_type": "group"}', r"c\.zarr: this Zarr group is not a nacpipe cache"),
        (
            '{"zarr_format": 3, "node_type": "group", "attributes": {"nacpipe_format": 1, "identity": {}}}',
            r"c\.zarr: the cache's attributes are damaged \(KeyError: 'information'\)$",
        ),
    ],
)
def test_what_is_not_a_cache_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c.zarr").mkdir()
    (tmp_path / "c.zarr/zarr.json").write_text(content)
    with pytest.raises(FormatError, match=message):
        open_cache(tmp_path / "c.zarr")


def test_what_is_in_the_way_is_refused_and_kept(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "folder/id/val").mkdir(parents=True)
    for name in ("file", "folder/film.partial", "folder/id/val/mine.txt"):
        (tmp_path / name).write_text("something else")
    before = files_of(tmp_path)
    for name in ("file", "folder"):
        with pytest.raises(CacheError, match=rf"/{name} is there already and is not a cache; give another --cache$"):
            CacheWriter(tmp_path / name, cache.header)
    assert files_of(tmp_path) == before


def test_an_empty_folder_becomes_a_cache(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/zarr.0123.partial").write_text("of a writer that was killed before its first file")
    CacheWriter(tmp_path / "new", cache.header)
    assert sorted(files_of(tmp_path / "new")) == ["zarr.json"]
    assert open_cache(tmp_path / "new").header == cache.header


def test_another_identity_is_refused_naming_what_differs(cache: Cache) -> None:
    before = files_of(Path(cache.path))
    header = cache.header
    other = replace(
        header,
        identity={**header.identity, "weights": "c" * 64, "dtype": "float16"},
        layers=(header.layers[0], replace(header.layers[1], pooling="none")),
    )
    message = (
        r"c\.zarr was made from something else: dtype: stored float32, now float16; layers\.layer1\.pooling: stored"
        r" sum-nchw, now none; weights: stored \w{8}…, now cccccccc…\. Give another --cache, or --precision"
        r" fp32, the same options$"
    )
    with pytest.raises(IdentityError, match=message):
        CacheWriter(cache.path, other)
    assert files_of(Path(cache.path)) == before


def test_other_information_is_no_other_identity(cache: Cache) -> None:
    writer = CacheWriter(cache.path, replace(cache.header, information={"batch_size": 3}, block_rows=99))
    assert writer.header == cache.header  # what is there counts


def test_a_search_is_bound_to_its_splits_and_layers_alone(tmp_path: Path, make_cache: Callable[..., Cache]) -> None:
    searched = ("id/train", "id/val")
    small = make_cache(tmp_path / "small.zarr", rows={**NO_SPLITS, "id/val": 5})
    large = make_cache(tmp_path / "large.zarr", rows={**NO_SPLITS, "id/val": 5, "ood/far/textures": 5})
    identity = large.search_identity(searched, ("layer1",))
    assert identity == small.search_identity(searched, ("layer1",))
    assert identity == {
        **small.header.identity,
        "layers": {"layer1": {"path": "layer1", "pooling": "sum-nchw"}},
        "splits": {"id/val": small["id/val"].images},
        "keep_bits": 23,
    }
