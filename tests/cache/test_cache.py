"""Writing and reading a cache: round trips, interruptions, and blocks that do not fit."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nacpipe.cache import Cache, CacheWriter, Header, LayerSpec, open_cache
from nacpipe.cache.options import ExtractOptions
from nacpipe.errors import CacheError, InputError

HEADER = Header(
    identity={"architecture": "tiny", "weights": "a" * 64, "transform": {"crop": 28}},
    information={"options": ExtractOptions(benchmark="digits", model="digits_cnn").to_json()},
    block_rows=16,
    layers=(
        LayerSpec(name="avgpool", path="avgpool", pooling="sum-nchw", neurons=6),
        LayerSpec(name="layer1", path="body.layer1", pooling="sum-nchw", neurons=4),
    ),
    classes=3,
    features=6,
)
ROWS = 40  # 16 + 16 + 8
IMAGES = {"list": "val.txt", "sha256": "b" * 64}
WIDTHS = {
    "layers/avgpool/activation": 6,
    "layers/avgpool/gradient": 6,
    "layers/layer1/activation": 4,
    "layers/layer1/gradient": 4,
}

Arrays = dict[str, NDArray[Any]]


def draw(rows: int = ROWS, seed: int = 0) -> Arrays:
    rng = np.random.RandomState(seed)
    floats = {k: rng.randn(rows, n).astype(np.float32) for k, n in {**WIDTHS, "features": 6, "logits": 3}.items()}
    return {**floats, "label": rng.randint(-1, 3, rows), "index": rng.permutation(rows)}


def rows_of(arrays: Arrays, block: int) -> Arrays:
    return {key: array[16 * block : 16 * block + 16] for key, array in arrays.items()}


def write(
    path: Path, arrays: Arrays, name: str = "id/val", blocks: tuple[int, ...] = (0, 1, 2), seal: bool = True
) -> None:
    writer = CacheWriter(path, HEADER)
    writer.prepare(name, len(arrays["label"]), IMAGES)
    for block in blocks:
        writer.write_block(name, block, rows_of(arrays, block))
    if seal:
        writer.seal(name)


def read(cache: Cache, name: str = "id/val") -> Arrays:
    split = cache.peek(name)
    return {key: split.array(key)[:] for key in HEADER.arrays()}  # type: ignore[misc]


def test_round_trip(tmp_path: Path) -> None:
    arrays = draw()
    write(tmp_path / "c.zarr", arrays)
    cache = open_cache(tmp_path / "c.zarr")
    split = cache["id/val"]
    for key, array in read(cache).items():
        assert array.dtype == arrays[key].dtype
        np.testing.assert_array_equal(array, arrays[key])
    np.testing.assert_array_equal(split["layer1"].gradient[5:20], arrays["layers/layer1/gradient"][5:20])
    np.testing.assert_array_equal(split.logits[:], arrays["logits"])
    np.testing.assert_array_equal(split.features[:], arrays["features"])
    assert split.label.tolist() == arrays["label"].tolist()
    assert split.index.tolist() == arrays["index"].tolist()
    assert (split.rows, split.sealed, split.images) == (ROWS, True, IMAGES)
    assert split.marks().tolist() == [True] * 3
    assert list(split) == ["avgpool", "layer1"]
    assert split["layer1"].spec == HEADER.layers[1]
    assert cache.header == HEADER


def test_splits_come_in_the_order_people_read_them(tmp_path: Path) -> None:
    names = ["ood/far/svhn", "id/val", "ood/near/tin", "csid/c10c", "id/test", "ood/val", "id/subtrain", "id/train"]
    for name in names:
        write(tmp_path / "c.zarr", draw(16), name, (0,))
    cache = open_cache(tmp_path / "c.zarr")
    assert list(cache) == [
        *("id/train", "id/subtrain", "id/val", "id/test"),
        *("csid/c10c", "ood/val", "ood/near/tin", "ood/far/svhn"),
    ]
    assert "ood/far/svhn" in cache
    assert "ood/far" not in cache
    assert len(cache) == 8


def test_classifier_is_written_once(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "c.zarr", HEADER)
    assert open_cache(tmp_path / "c.zarr").classifier() is None
    weight, bias = np.arange(18, dtype=np.float32).reshape(3, 6), np.zeros(3, np.float32)
    writer.write_classifier(weight, bias)
    writer.write_classifier(weight + 1, bias + 1)
    stored = open_cache(tmp_path / "c.zarr").classifier() or ()
    assert [array.tolist() for array in stored] == [weight.tolist(), bias.tolist()]


@pytest.mark.parametrize("name", ["ood/near/mean", "ood/far/NaN", "csid/None"])
def test_reserved_names_of_sets_are_refused(tmp_path: Path, name: str) -> None:
    writer = CacheWriter(tmp_path / "c.zarr", HEADER)
    with pytest.raises(
        InputError, match=rf"^split {name}: the name of its set is reserved, .*; give the set another name$"
    ):
        writer.prepare(name, ROWS, IMAGES)
    assert list(open_cache(tmp_path / "c.zarr")) == []


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.slow
@settings(max_examples=8)
@given(order=st.permutations([0, 1, 2, 2, 0]), cuts=st.sets(st.integers(1, 4)))
def test_appending_in_any_order_and_any_number_of_calls_gives_the_same_bytes(order: list[int], cuts: set[int]) -> None:
    arrays = draw()
    with tempfile.TemporaryDirectory() as folder:
        at_once, in_parts = Path(folder, "a.zarr"), Path(folder, "b.zarr")
        write(at_once, arrays)
        ends = [0, *sorted(cuts), len(order)]
        for start, stop in itertools.pairwise(ends):
            write(in_parts, arrays, blocks=tuple(order[start:stop]), seal=False)  # a new writer each time
        write(in_parts, arrays, blocks=())
        assert files_of(in_parts) == files_of(at_once)


def test_prepare_tells_which_blocks_are_done(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "c.zarr", HEADER)
    assert writer.prepare("id/val", ROWS, IMAGES).tolist() == [False] * 3
    writer.write_block("id/val", 1, rows_of(draw(), 1))
    assert writer.prepare("id/val", ROWS, IMAGES).tolist() == [False, True, False]
    assert CacheWriter(tmp_path / "c.zarr", HEADER).prepare("id/val", ROWS, IMAGES).tolist() == [False, True, False]


def test_an_unfinished_split_is_refused_but_can_be_looked_at(tmp_path: Path) -> None:
    write(tmp_path / "c.zarr", draw(), blocks=(0, 2), seal=False)
    cache = open_cache(tmp_path / "c.zarr")
    message = (
        r"c\.zarr: id/val is not finished \(2 of 3 blocks\); finish it with:"
        r" nacpipe extract digits --model digits_cnn --cache .*c\.zarr$"
    )
    with pytest.raises(CacheError, match=message):
        cache["id/val"]
    assert cache.peek("id/val").marks().tolist() == [True, False, True]
    assert not cache.peek("id/val").sealed


def test_seal_refuses_missing_blocks(tmp_path: Path) -> None:
    write(tmp_path / "c.zarr", draw(), blocks=(1,), seal=False)
    with pytest.raises(CacheError, match=r"c\.zarr: id/val has 2 of 3 blocks to write$"):
        CacheWriter(tmp_path / "c.zarr", HEADER).seal("id/val")
    assert not open_cache(tmp_path / "c.zarr").peek("id/val").sealed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": None}, r"^id/val, block 0: got arrays .*, expected \[.*'logits'.*\]$"),
        ({"more": np.zeros(16)}, r"^id/val, block 0: got arrays .*'more'.*, expected "),
        ({"label": np.zeros(15, int)}, r"^id/val/label, block 0: got shape \(15,\), expected \(16,\)$"),
        ({"features": np.zeros((16, 1))}, r"^id/val/features, block 0: got shape \(16, 1\), expected \(16, 6\)$"),
    ],
)
def test_blocks_of_another_form_are_refused_unmarked(tmp_path: Path, change: Arrays, message: str) -> None:
    writer = CacheWriter(tmp_path / "c.zarr", HEADER)
    writer.prepare("id/val", ROWS, IMAGES)
    block = {key: array for key, array in {**rows_of(draw(), 0), **change}.items() if array is not None}
    with pytest.raises(CacheError, match=message):
        writer.write_block("id/val", 0, block)
    assert open_cache(tmp_path / "c.zarr").peek("id/val").marks().tolist() == [False] * 3


def test_other_numbers_of_rows_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "c.zarr", draw(), seal=False)
    with pytest.raises(CacheError, match=r"c\.zarr: id/val has 40 rows, not 41; drop it first with --redo id/val$"):
        CacheWriter(tmp_path / "c.zarr", HEADER).prepare("id/val", 41, IMAGES)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32])
def test_rows_need_not_fill_their_blocks(tmp_path: Path, rows: int) -> None:
    arrays = draw(rows)
    blocks = -(-rows // 16)
    write(tmp_path / "c.zarr", arrays, blocks=tuple(range(blocks)))
    cache = open_cache(tmp_path / "c.zarr")
    assert cache["id/val"].marks().size == blocks
    for key, array in read(cache).items():
        np.testing.assert_array_equal(array, arrays[key])


def test_chunks_of_zeros_and_of_the_fill_value_are_written(tmp_path: Path) -> None:
    arrays = {key: np.zeros_like(array) for key, array in draw().items()}
    arrays["logits"][:] = np.nan
    write(tmp_path / "c.zarr", arrays)
    for key in arrays:
        names = sorted(file.name for file in (tmp_path / "c.zarr/id/val" / key).glob("c.*"))
        assert names == [f"c.{block}{'.0' * (arrays[key].ndim > 1)}" for block in range(3)], key
    assert (open_cache(tmp_path / "c.zarr")["id/val"].label == 0).all()


def test_a_missing_chunk_reads_as_no_value_not_as_zeros(tmp_path: Path) -> None:
    arrays = draw()
    write(tmp_path / "c.zarr", arrays)
    (tmp_path / "c.zarr/id/val/layers/layer1/activation/c.1.0").unlink()
    (tmp_path / "c.zarr/id/val/label/c.2").unlink()
    with pytest.raises(
        CacheError, match=r"id/val/layers/layer1/activation is damaged \(1 of its chunks are not there\)"
    ):
        open_cache(tmp_path / "c.zarr")["id/val"]
    split = open_cache(tmp_path / "c.zarr").peek("id/val")
    found = np.asarray(split.array("layers/layer1/activation")[:])
    assert np.isnan(found[16:32]).all()
    np.testing.assert_array_equal(found[:16], arrays["layers/layer1/activation"][:16])
    np.testing.assert_array_equal(split["layer1"].activation[:16], arrays["layers/layer1/activation"][:16])
    with pytest.raises(CacheError, match=r"id/val/layers/layer1/activation is damaged \(row 16 holds no value\)"):
        split["layer1"].activation[:]
    assert (np.asarray(split.array("label")[32:]) == np.iinfo(np.int64).min).all()
    assert split.read("label", slice(0, 32)).tolist() == arrays["label"][:32].tolist()
    with pytest.raises(
        CacheError, match=r"id/val/label is damaged \(row 32 holds no value\); repair it with: nacpipe rep"
    ):
        _ = split.label


def test_a_missing_chunk_of_logits_is_refused_and_never_sealed(tmp_path: Path) -> None:
    write(tmp_path / "c.zarr", draw())
    (tmp_path / "c.zarr/id/val/logits/c.1.0").unlink()
    with pytest.raises(CacheError, match=r"id/val/logits is damaged \(row 16 holds no value\)"):
        open_cache(tmp_path / "c.zarr").peek("id/val").read("logits")
    writer = CacheWriter(tmp_path / "c.zarr", open_cache(tmp_path / "c.zarr").header)
    with pytest.raises(CacheError, match=r"id/val/logits lacks 1 of its chunks; repair it with: nacpipe repair"):
        writer.seal("id/val")


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    with pytest.raises(
        CacheError, match=r"^there is no cache at .*c\.zarr; make one with: nacpipe extract BENCHMARK --cache "
    ):
        open_cache(path)
    write(path, draw())
    cache = open_cache(path)
    message = (
        r"^split 'id/test' is not in .*c\.zarr; it holds id/val; add it with:"
        r" nacpipe extract digits --model digits_cnn --cache .*c\.zarr$"
    )
    with pytest.raises(InputError, match=message):
        cache["id/test"]
    with pytest.raises(
        InputError, match=r"^layer 'layer9' is not in this cache; it holds avgpool, layer1 \(.*c\.zarr\)$"
    ):
        cache["id/val"]["layer9"]
    with pytest.raises(CacheError, match=r"c\.zarr: id/val/loss is not in the store$"):
        cache["id/val"].array("loss")
