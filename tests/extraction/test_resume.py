"""Extraction that was stopped goes on with the same command and ends with the same values."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.cache.lock import CacheLock
from nacpipe.cache.options import format_command
from nacpipe.cache.repair import repair_cache
from nacpipe.cache.verify import verify_cache
from nacpipe.cli import main
from nacpipe.errors import CacheError, IdentityError, ImageError, StudyError
from nacpipe.extraction import pipeline as extraction
from nacpipe.extraction.distributed import Ranks
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest
from nacpipe.tuning.request import SearchRequest
from nacpipe.tuning.runner import run as run_search
from nacpipe.tuning.study import Search

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = 3 + 2 + 3 + 1 + 2 + 1  # of 16 rows: train, subtrain, val, test, tin, mnist


def values_of(cache: Cache) -> dict[str, NDArray[Any]]:
    return {f"{name}/{key}": np.asarray(cache[name].array(key)[:]) for name in cache for key in cache.header.arrays()}


def assert_equal(cache: Cache, other: Cache) -> None:
    found, expected = values_of(cache), values_of(other)
    assert set(found) == set(expected)
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)


class Crash(Exception):
    """Not one of nacpipe's."""


class CrashAfter:
    """A `CacheWriter.write_block` that raises after `left` blocks; several threads write."""

    def __init__(self) -> None:
        self.left, self._lock, self._whole = 0, threading.Lock(), CacheWriter.write_block

    @property
    def write_block(self) -> Callable[..., None]:
        def write_block(writer: CacheWriter, *args: Any) -> None:
            self._whole(writer, *args)
            with self._lock:
                self.left -= 1
                last = self.left == 0
            if last:
                raise Crash

        return write_block


@pytest.mark.repeats(1)
@pytest.mark.parametrize("calls", [*(pytest.param(calls, marks=pytest.mark.slow) for calls in (1, 2, 3)), 4, 9])
def test_the_same_command_after_a_crash_gives_the_same_values(
    finished: Cache, request_: ExtractRequest, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Crash again and again, each time after this many blocks, until it is through."""
    crash, crashes = CrashAfter(), 0
    monkeypatch.setattr(CacheWriter, "write_block", crash.write_block)
    while True:
        crash.left = calls
        try:
            extract(plan_extraction(request_))
            break
        except Crash:
            crashes += 1
    most = calls + extraction.BLOCKS_IN_FLIGHT  # the blocks that are being written at the crash are written
    assert BLOCKS // most <= crashes <= BLOCKS // calls
    assert crashes > 0
    assert_equal(open_cache(request_.cache), finished)
    for name, split in open_cache(request_.cache).items():
        assert split.attributes["digest"] == finished[name].attributes["digest"]


@pytest.mark.slow
def test_an_unfinished_cache_of_version_1_is_finished_as_version_1(
    finished: Cache, request_: ExtractRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(request_.cache)
    CacheWriter(path, replace(plan_extraction(request_).header, version=1))
    crash = CrashAfter()
    crash.left = 5
    monkeypatch.setattr(CacheWriter, "write_block", crash.write_block)
    with pytest.raises(Crash):
        extract(plan_extraction(request_))
    extract(plan_extraction(request_))
    assert crash.left == 5 - BLOCKS  # each block was written once
    cache = open_cache(path)
    assert (cache.header.version, list(cache)) == (1, list(finished))
    for name in finished:
        for old, new in zip(cache.header.arrays(), finished.header.arrays(), strict=True):
            np.testing.assert_array_equal(cache[name].read(old), finished[name].read(new), err_msg=f"{name}/{new}")
    assert verify_cache(cache) == []
    assert (path / "id/val/label/c/2").exists()
    assert not (path / "id/val/layers").exists()
    assert "consolidated_metadata" not in json.loads((path / "zarr.json").read_text())
    extract(plan_extraction(request_))  # nothing is left to do
    assert crash.left == 5 - BLOCKS


@pytest.mark.slow
def test_a_run_with_processes_that_stops_goes_on(
    finished: Cache, request_: ExtractRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = CrashAfter()
    crash.left = 5
    monkeypatch.setattr(CacheWriter, "write_block", crash.write_block)
    request_ = replace(request_, workers=1)
    with pytest.raises(Crash):
        extract(plan_extraction(request_))
    extract(plan_extraction(request_))
    assert crash.left == 5 - BLOCKS  # each block was written once
    assert_equal(open_cache(request_.cache), finished)


def test_blocks_that_are_done_are_not_run_again(request_: ExtractRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(plan_extraction(request_))
    monkeypatch.setattr(extraction, "load_batches", lambda *_, **__: pytest.fail("nothing was left to do"))
    extract(plan_extraction(request_))


def test_progress_tells_every_batch_once(request_: ExtractRequest) -> None:
    told: list[tuple[str, int]] = []
    extract(plan_extraction(replace(request_, splits=("id/val", "ood/far/mnist"))), lambda *call: told.append(call))
    assert told == [*[("id/val", 8)] * 5, ("ood/far/mnist", 3)]


@pytest.mark.slow
def test_split_added_later_leaves_the_others_alone(finished: Cache, request_: ExtractRequest) -> None:
    extract(plan_extraction(replace(request_, splits=("id/val",))))
    assert list(open_cache(request_.cache)) == ["id/val"]
    extract(plan_extraction(request_))
    assert_equal(open_cache(request_.cache), finished)


def test_more_training_images_extract_id_train_alone(
    finished: Cache, request_: ExtractRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed on the way it goes on, and its command says so; the number that it began with was another."""
    extract(plan_extraction(replace(request_, train_images=10)))
    study = SearchRequest(cache=request_.cache, space="paper", trials=2, threads=1)
    run_search(Search(study))
    plan = plan_extraction(request_)
    assert {split.images.name: split.state for split in plan.splits if split.state != "done"} == {"id/train": "again"}
    assert plan.todo_rows(Ranks()) == 45 - 5  # balanced: four of each class
    assert [note for note in plan.notes if "extracted anew" in note] == [
        "id/train is extracted anew: --train-images is 45, it was 10; the other splits stay. Searches are bound to its"
        " images: give the next one another --storage FILE"
    ]
    crash = CrashAfter()
    crash.left = 1
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(CacheWriter, "write_block", crash.write_block)
        extract(plan)
    with pytest.raises(CacheError, match=r"finish it with: .* --train-images 45 "):
        open_cache(request_.cache)["id/train"]
    again = plan_extraction(request_)
    assert not [note for note in again.notes if "extracted anew" in note]
    told: list[tuple[str, int]] = []
    extract(again, lambda *call: told.append(call))
    assert {split for split, _ in told} == {"id/train"}
    assert sum(rows for _, rows in told) < 40
    assert_equal(open_cache(request_.cache), finished)
    with pytest.raises(StudyError, match=r"another cache than .*splits\.id/train\.images: stored 10, now 45"):
        Search(study)
    with pytest.raises(StudyError, match=r"Give another --storage FILE"):
        Search(study)


@pytest.mark.slow
def test_the_command_says_that_id_train_is_extracted_anew(request_: ExtractRequest) -> None:
    small = replace(request_, train_images=10, splits=("id/train", "id/val"))
    extract(plan_extraction(small))
    words = format_command(replace(small, train_images=20), request_.cache).split()[1:]
    done = CliRunner().invoke(main, [*words, "--splits", "id/train,id/val", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "id/train is extracted anew: --train-images is 20, it was 10; the other splits stay." in done.stderr
    states = {line.split()[0]: line.split()[-1] for line in done.stdout.splitlines() if line.startswith("id/")}
    assert states == {"id/train": "again", "id/val": "done"}


@pytest.mark.slow
def test_fewer_training_images_do_too_and_another_seed_asks_for_redo(finished: Cache, request_: ExtractRequest) -> None:
    both = replace(request_, splits=("id/train", "id/val"))
    extract(plan_extraction(both))
    with pytest.raises(IdentityError, match=r"images: stored 45, now 50; seed: stored 1, now 2.*--redo id/train"):
        plan_extraction(replace(both, train_images=50, train_seed=2))
    plan = plan_extraction(replace(both, train_images=10))
    assert [note for note in plan.notes if "extracted anew: --train-images is 10, it was 45;" in note]
    extract(plan)
    cache = open_cache(request_.cache)
    assert cache["id/train"].rows == 10
    assert cache["id/val"].attributes["digest"] == finished["id/val"].attributes["digest"]


@pytest.mark.slow
def test_left_out_the_number_is_the_caches(request_: ExtractRequest) -> None:
    """States that took work are not dropped because an option is left out."""
    few = replace(request_, train_images=10, splits=("id/train", "id/val"))
    extract(plan_extraction(few))
    words = [word for word in format_command(few, request_.cache).split()[1:] if word not in ("--train-images", "10")]
    for extra, rows, state in (([], "10", "done"), (["--train-images", "1000"], "40", "again")):
        done = CliRunner().invoke(main, [*words, *extra, "--splits", "id/train,id/val", "--dry-run"])
        assert done.exit_code == 0, done.output
        (line,) = [line.split() for line in done.stdout.splitlines() if line.startswith("id/train")]
        assert (line[2], line[-1]) == (rows, state)


def test_bad_image_stops_and_keeps_what_was_done(request_: ExtractRequest, root: Path) -> None:
    bad = root / "images_classic/val_cifar10/37.png"
    good = bad.read_bytes()
    bad.write_bytes(b"no image")
    try:
        with pytest.raises(ImageError, match=r"37\.png \(line 38 of .*val_cifar10\.txt\)"):
            extract(plan_extraction(replace(request_, splits=("id/val",))))
    finally:
        bad.write_bytes(good)
    assert open_cache(request_.cache).peek("id/val").marks().tolist() == [True, True, False]
    command = (
        f"nacpipe extract cifar10 --model resnet20 --checkpoint {request_.checkpoint} --data-root {root}"
        f" --train-images 45 --batch-size 8 --device cpu --block-rows 16 --cache {request_.cache}"
    )
    with pytest.raises(CacheError, match=f"finish it with: {re.escape(command)}$"):
        open_cache(request_.cache)["id/val"]


def test_rows_without_their_mark_are_written_again(
    finished: Cache, request_: ExtractRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between a block's rows and its mark, in the second block of the first split."""
    whole = CacheWriter._open
    marks = 0

    def open_until_second_mark(writer: CacheWriter, path: str) -> Any:
        nonlocal marks
        marks += path.endswith("/blocks")
        if marks == 2:
            raise Crash
        return whole(writer, path)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(CacheWriter, "_open", open_until_second_mark)
        extract(plan_extraction(request_))
    plan = plan_extraction(request_)
    assert plan.splits[0].todo == (1, 2)
    extract(plan)
    assert_equal(open_cache(request_.cache), finished)


def test_a_split_that_only_lacks_its_seal_is_sealed(
    finished: Cache, request_: ExtractRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(_writer: CacheWriter, _name: str) -> None:
        raise Crash

    only = replace(request_, splits=("ood/val",))
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(CacheWriter, "seal", crash)
        extract(plan_extraction(only))
    plan = plan_extraction(only)
    assert (plan.splits[0].state, plan.todo_rows(Ranks())) == ("to seal", 0)
    extract(plan)
    digest = open_cache(request_.cache)["ood/val"].attributes["digest"]
    assert digest == finished["ood/val"].attributes["digest"]


@pytest.mark.repeats(1)
@pytest.mark.parametrize(("shards", "rows"), [(1, [16]), (2, [32])], ids=["blocks", "shards"])
def test_after_repair_the_same_command_runs_the_damaged_rows_alone(
    request_: ExtractRequest, shards: int, rows: list[int]
) -> None:
    """Of a sharded cache the shard: it has one writer, which writes it whole."""
    only = replace(request_, splits=("id/val",), shard_blocks=shards)
    extract(plan_extraction(only))
    before = open_cache(request_.cache)["id/val"].attributes
    chunk = request_.cache / "id/val/layers/layer2/gradient/c.0.0"
    content = bytearray(chunk.read_bytes())
    content[40] ^= 4
    chunk.write_bytes(bytes(content))
    found = verify_cache(open_cache(request_.cache))
    assert [(d.split, d.array, d.rows) for d in found] == [("id/val", "layers/layer2/gradient", range(16))]
    repair_cache(request_.cache)
    told: list[int] = []
    extract(plan_extraction(only), lambda _split, count: told.append(count))
    assert told == [8] * (sum(rows) // 8)
    assert verify_cache(open_cache(request_.cache)) == []
    assert open_cache(request_.cache)["id/val"].attributes == before


def test_a_second_extraction_is_refused_while_the_first_lives(request_: ExtractRequest) -> None:
    only = replace(request_, splits=("ood/far/mnist",))
    with CacheLock(request_.cache) as lock:
        lock.take()
        with pytest.raises(CacheError, match=r"c\.zarr is being written by another extract; wait until it ends"):
            extract(plan_extraction(only))
        assert list(request_.cache.iterdir()) == []
    extract(plan_extraction(only))
    assert open_cache(request_.cache)["ood/far/mnist"].rows == 3
