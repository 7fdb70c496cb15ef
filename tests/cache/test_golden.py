"""Caches that earlier versions wrote (tests/data/caches, a few kB each) are read for ever: values, digests, scores."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.cache.repair import repair_cache
from nacpipe.cache.verify import verify_cache
from nacpipe.errors import CacheError
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.coverage import score_splits
from tests.alike import prepare_split

FOLDER = Path(__file__).resolve().parents[1] / "data" / "caches"
NAMES = {
    1: [f"{age}{form}" for age in ("first-", "") for form in ("plain", "sharded", "keep_bits", "ranks")],
    2: ["plain", "sharded", "mantissa_bits", "ranks", "forward", "labels_by_block"],
}
ALL = [(version, name) for version, names in NAMES.items() for name in names]
SCORES = {1: ["scores.json"], 2: ["scores.json", "forward_scores.json"]}
ROWS = {"id/train": 20, "id/val": 9, "csid/blur": 3, "ood/val": 10, "ood/near/letters": 8, "ood/far/textures": 5}
WIDTHS = {
    "avgpool/activation": 3,
    "avgpool/gradient": 3,
    "layer1/activation": 2,
    "layer1/gradient": 2,
    "features": 3,
    "logits": 3,
}
PARAMS = NacParams(
    layers={
        "avgpool": LayerParams(bins=10, saturation=11, alpha=0.5, weight=0.25),
        "layer1": LayerParams(bins=7, saturation=13, alpha=0.5, weight=0.75, edges="linear", source="activation"),
    }
)
ACTIVATIONS = NacParams(layers={name: replace(layer, source="activation") for name, layer in PARAMS.layers.items()})


def unpack(version: int, name: str, folder: Path) -> Cache:
    known: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on
    shutil.unpack_archive(FOLDER / f"v{version}" / f"{name}.tar.xz", folder, **known)
    return open_cache(folder / f"{name.removeprefix('first-')}.zarr")


@pytest.fixture(params=ALL, ids=[f"v{version}-{name}" for version, name in ALL])
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Cache:
    cache = unpack(*request.param, tmp_path)
    assert cache.header.version == request.param[0]
    return cache


def form_of(cache: Cache) -> str:
    return Path(cache.path).stem


@pytest.mark.parametrize("version", NAMES)
def test_none_is_missing_and_none_is_unread(version: int) -> None:
    assert sorted(file.name for file in (FOLDER / f"v{version}").iterdir()) == sorted(
        [*SCORES[version], *(f"{name}.tar.xz" for name in NAMES[version])]
    )


@pytest.mark.repeats(6)
def test_every_value_is_what_was_written(golden: Cache) -> None:
    form, header = form_of(golden), golden.header
    rounded = form in ("keep_bits", "mantissa_bits")
    assert {name: split.rows for name, split in golden.items()} == ROWS
    assert list(golden) == list(ROWS)
    assert (header.shard_blocks, header.mantissa_bits, header.gradients) == (
        2 if form == "sharded" else 1,
        7 if rounded else 23,
        form != "forward",
    )
    assert header.information["command"] == "nacpipe extract digits --cache golden.zarr"
    assert golden.command() == "nacpipe extract digits --cache golden.zarr"  # as it is recorded
    for name, split in golden.items():
        row = np.arange(split.rows)
        for path, width in WIDTHS.items():
            if path.endswith("gradient") and not header.gradients:
                continue
            spread = ((len(path) * 5 + len(name) * 3 + row[:, None] * 7 + np.arange(width) * 11) % 61 - 30) / 16
            bits = 0.0 if rounded and path != "logits" else 2.0**-12
            layer, _, what = path.partition("/")
            found = split.read(header.layer_array(layer, what) if what else path)
            np.testing.assert_array_equal(found, (spread * (1 + bits)).astype(np.float32))
        assert split.label.tolist() == ([-1] * split.rows if name.startswith("ood/") else (row % 3).tolist())
        assert split.index.tolist() == (2 * row).tolist()
        assert split.marks().tolist() == [True] * -(-split.rows // 4)
        assert split.images == {"list": f"{name.replace('/', '_')}.txt", "sha256": "fedcba9876543210" * 4}
    weight, bias = golden.classifier() or ((), ())
    assert np.asarray(weight).tolist() == np.eye(3).tolist()
    assert np.asarray(bias).tolist() == [0.5, 0.0, -0.5]


def test_its_objects_are_those_of_its_version(golden: Cache) -> None:
    """A chunk of labels that holds all rows; keys with dots, layers below layers/. Version 1: with slashes, without."""
    train = Path(golden.path, "id/train")
    labels = sorted(str(file.relative_to(train)) for file in (train / "label").rglob("c*") if file.is_file())
    chunks = sorted(str(file.relative_to(train)) for file in train.rglob("avgpool/activation/**/*") if file.is_file())
    shards = 3 if form_of(golden) == "sharded" else 5
    if golden.header.version == 1:
        assert sorted(str(f.relative_to(train)) for f in (train / "label/c").iterdir()) == [
            f"label/c/{k}" for k in range(shards)
        ]
        assert chunks == [*(f"avgpool/activation/c/{k}/0" for k in range(shards)), "avgpool/activation/zarr.json"]
    else:
        whole = form_of(golden) != "labels_by_block"
        assert labels == [f"label/c.{k}" for k in range(1 if whole else 5)]
        assert chunks == [
            *(f"layers/avgpool/activation/c.{k}.0" for k in range(shards)),
            "layers/avgpool/activation/zarr.json",
        ]


@pytest.mark.repeats(5)
def test_it_is_whole_by_its_own_seals(golden: Cache) -> None:
    assert verify_cache(golden) == []


@pytest.mark.repeats(6)
def test_its_scores_are_what_they_were(golden: Cache) -> None:
    for params, file in (
        (PARAMS, "v1/scores.json"),
        (PARAMS, "v2/scores.json"),
        (ACTIVATIONS, "v2/forward_scores.json"),
    ):
        if params is PARAMS and not golden.header.gradients:
            with pytest.raises(CacheError, match="was written without gradients"):
                score_splits(golden, params, list(golden))
            continue
        expected = json.loads((FOLDER / file).read_text())
        found = score_splits(golden, params, list(golden))
        assert set(found) == set(ROWS)
        for name, scores in found.items():
            np.testing.assert_allclose(scores, expected[name], rtol=1e-12)


def zarr_metadata(path: Path) -> Mapping[str, Any]:
    return {
        str(file.relative_to(path)): json.loads(file.read_text())
        for file in sorted(path.rglob("zarr.json"))
        if file.parent != path
    }


@pytest.mark.repeats(3)
def test_it_can_be_gone_on_with(golden: Cache) -> None:
    """Another split beside those that are there, in the form of theirs, and the seals of all hold."""
    split, writer = golden["id/val"], CacheWriter(golden.path, replace(golden.header, version=2))
    assert writer.header.version == golden.header.version
    if form_of(golden) == "labels_by_block":
        writer.prepare("id/subtrain", split.rows, split.images)
    else:
        prepare_split(writer, split, "id/subtrain")
    unit = 4 * golden.header.shard_blocks
    for start in range(0, split.rows, unit):
        rows = {path: split.read(path)[start : start + unit] for path in golden.header.arrays()}
        writer.write_block("id/subtrain", start // 4, rows)
    writer.seal("id/subtrain")
    again = open_cache(golden.path)
    assert verify_cache(again) == []
    np.testing.assert_array_equal(again["id/subtrain"].read("logits"), split.read("logits"))
    old, new = (zarr_metadata(Path(golden.path, name)) for name in ("id/val", "id/subtrain"))
    assert old.keys() == new.keys()
    for path, content in old.items():
        for key in ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "dimension_names"):
            assert content.get(key) == new[path].get(key), (path, key)


@pytest.mark.repeats(3)
def test_a_damaged_block_is_repaired_in_its_version(golden: Cache) -> None:
    split, header = golden["id/val"], golden.header
    logits = {path: split.read(path) for path in header.arrays()}
    digest = split.attributes["digest"]
    key = {1: "id/val/logits/c/0/0", 2: "id/val/logits/c.0.0"}[header.version]
    chunk = Path(golden.path, key)
    chunk.write_bytes(chunk.read_bytes()[:-1])
    rows = 4 * header.shard_blocks
    done = [f"id/val: block {k}, rows {4 * k} to {4 * k + 3}, is to be computed again" for k in range(rows // 4)]
    assert repair_cache(golden.path) == done
    writer = CacheWriter(golden.path, header)
    marks = prepare_split(writer, open_cache(golden.path).peek("id/val"))
    assert marks.tolist() == [k >= header.shard_blocks for k in range(3)]
    writer.write_block("id/val", 0, {path: values[:rows] for path, values in logits.items()})
    writer.seal("id/val")
    again = open_cache(golden.path)
    assert verify_cache(again) == []
    assert again["id/val"].attributes["digest"] == digest


@pytest.mark.parametrize("name", NAMES[2])
def test_any_zarr_reads_its_consolidated_metadata(tmp_path: Path, name: str) -> None:
    cache = unpack(2, name, tmp_path)
    root = zarr.open_group(cache.path, mode="r", use_consolidated=True)
    for split in cache:
        for path in cache.header.arrays():
            np.testing.assert_array_equal(np.asarray(root[f"{split}/{path}"]), cache[split].read(path))
    copied, members = root.metadata.consolidated_metadata, zarr_metadata(Path(cache.path))
    assert copied is not None
    assert {f"{path}/zarr.json" for path in copied.flattened_metadata} == members.keys()
