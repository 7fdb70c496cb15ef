"""Caches that earlier versions wrote (tests/data/caches, a few kB each) are read for ever: values, digests, scores."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.cache.verify import verify_cache
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.coverage import score_splits

FOLDER = Path(__file__).resolve().parents[1] / "data" / "caches"
NAMES = [f"{age}{form}" for age in ("first-", "") for form in ("plain", "sharded", "keep_bits", "ranks")]
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


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Cache:
    name = str(request.param)
    known: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on
    shutil.unpack_archive(FOLDER / "v1" / f"{name}.tar.xz", tmp_path, **known)
    return open_cache(tmp_path / f"{name.removeprefix('first-')}.zarr")


def test_none_is_missing_and_none_is_unread() -> None:
    assert sorted(file.name for file in (FOLDER / "v1").iterdir()) == sorted(
        ["scores.json", *(f"{name}.tar.xz" for name in NAMES)]
    )


def test_every_value_is_what_was_written(golden: Cache) -> None:
    form = Path(golden.path).stem
    assert {name: split.rows for name, split in golden.items()} == ROWS
    assert list(golden) == list(ROWS)
    assert (golden.header.shard_blocks, golden.header.mantissa_bits) == (2 if form == "sharded" else 1,
                                                                     7 if form == "keep_bits" else 23)  # fmt: skip
    assert golden.header.information["command"] == "nacpipe extract digits --cache golden.zarr"
    assert golden.command() == "nacpipe extract digits --cache golden.zarr"  # as it is recorded
    for name, split in golden.items():
        row = np.arange(split.rows)
        for path, width in WIDTHS.items():
            spread = ((len(path) * 5 + len(name) * 3 + row[:, None] * 7 + np.arange(width) * 11) % 61 - 30) / 16
            bits = 0.0 if form == "keep_bits" and path != "logits" else 2.0**-12
            np.testing.assert_array_equal(split.read(path), (spread * (1 + bits)).astype(np.float32))
        assert split.label.tolist() == ([-1] * split.rows if name.startswith("ood/") else (row % 3).tolist())
        assert split.index.tolist() == (2 * row).tolist()
        assert split.marks().tolist() == [True] * -(-split.rows // 4)
        assert split.images == {"list": f"{name.replace('/', '_')}.txt", "sha256": "fedcba9876543210" * 4}
    weight, bias = golden.classifier() or ((), ())
    assert np.asarray(weight).tolist() == np.eye(3).tolist()
    assert np.asarray(bias).tolist() == [0.5, 0.0, -0.5]


def test_it_is_whole_by_its_own_seals(golden: Cache) -> None:
    assert verify_cache(golden) == []


def test_its_scores_are_what_they_were(golden: Cache) -> None:
    expected = json.loads((FOLDER / "v1/scores.json").read_text())
    found = score_splits(golden, PARAMS, list(golden))
    assert set(found) == set(ROWS)
    for name, scores in found.items():
        np.testing.assert_allclose(scores, expected[name], rtol=1e-12)


def test_it_can_be_gone_on_with(golden: Cache) -> None:
    """Another split beside those that are there, and the seals of all hold."""
    split, writer = golden["id/val"], CacheWriter(golden.path, golden.header)
    writer.prepare("id/subtrain", split.rows, split.images)
    unit = 4 * golden.header.shard_blocks
    for start in range(0, split.rows, unit):
        rows = {path: split.read(path)[start : start + unit] for path in golden.header.arrays()}
        writer.write_block("id/subtrain", start // 4, rows)
    writer.seal("id/subtrain")
    again = open_cache(golden.path)
    assert verify_cache(again) == []
    np.testing.assert_array_equal(again["id/subtrain"].read("logits"), split.read("logits"))
