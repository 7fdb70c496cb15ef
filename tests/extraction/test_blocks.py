"""How many rows a block of a new cache has: chosen once by a trial batch's time, recorded, never chosen again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nacpipe.cache import Cache, CacheWriter, SplitView, open_cache
from nacpipe.errors import CacheError
from nacpipe.extraction import pipeline as extraction
from nacpipe.extraction.distributed import Ranks
from nacpipe.extraction.pipeline import choose_blocks, extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest, choose_block_rows
from tests.prefork import torchrun_words

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def open_request(request_: ExtractRequest) -> ExtractRequest:
    """One whose blocks are to be chosen."""
    return replace(request_, block_rows=None, splits=("id/val", "ood/val"))


def take(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say that a trial batch takes this long."""
    monkeypatch.setattr(extraction, "_time_batch", lambda plan: seconds)


@pytest.mark.parametrize(
    ("batch_size", "seconds", "rows"),
    [
        *((128, 0.0, 512), (128, 2.5, 512), (128, 2.6, 256), (128, 5.0, 256), (128, 5.1, 128), (128, 27.0, 128)),
        *((8, 0.001, 512), (8, 1.0, 64), (8, 1.3, 32), (1, 0.02, 256), (100, 0.0, 400), (6, 0.0, 384), (600, 0.1, 600)),
    ],
)
def test_a_block_is_a_power_of_two_of_batches_and_ten_seconds_at_most(
    batch_size: int, seconds: float, rows: int
) -> None:
    assert choose_block_rows(batch_size, seconds) == rows
    assert rows == batch_size or (rows <= 512 and rows // batch_size * seconds <= 10)


@pytest.mark.repeats(1)
@pytest.mark.parametrize(("seconds", "rows"), [(0.01, 512), (1.2, 64), (60.0, 8)])
def test_it_is_chosen_by_the_time_of_a_trial_batch_and_recorded(
    open_request: ExtractRequest, monkeypatch: pytest.MonkeyPatch, seconds: float, rows: int
) -> None:
    take(seconds, monkeypatch)
    plan = plan_extraction(open_request)
    assert (plan.blocks_are_open, plan.header.block_rows) == (True, 512)
    said: list[str] = []
    chosen = choose_blocks(plan, note=said.append)
    assert (chosen.blocks_are_open, chosen.header.block_rows) == (False, rows)
    assert [split.todo for split in chosen.splits] == [tuple(range(-(-n // rows))) for n in (40, 21)]
    slow = "a batch takes 60 s, which is what an interruption costs; a smaller --batch-size costs less"
    assert said == [slow] * (seconds > 10)
    extract(plan)  # chooses as well
    assert open_cache(open_request.cache).header.block_rows == rows
    monkeypatch.setattr(extraction, "_time_batch", lambda plan: pytest.fail("it was chosen before"))
    for batch_size in (8, 100):
        again = plan_extraction(replace(open_request, batch_size=batch_size, splits=("ood/far/mnist", "id/val")))
        assert (again.blocks_are_open, again.header.block_rows) == (False, rows)
    extract(again)
    assert open_cache(open_request.cache).header.block_rows == rows


def test_nothing_is_measured_for_a_look_or_where_it_is_set(
    open_request: ExtractRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "_time_batch", lambda plan: pytest.fail("nobody asked"))
    assert plan_extraction(open_request, dry=True).blocks_are_open
    by_hand = plan_extraction(replace(open_request, block_rows=24))
    assert (by_hand.blocks_are_open, by_hand.header.block_rows) == (False, 24)
    extract(by_hand)
    assert open_cache(open_request.cache).header.block_rows == 24
    plan = plan_extraction(replace(open_request, block_rows=16))
    assert plan.header.block_rows == 24
    assert plan.notes[-1] == (
        f"{open_request.cache} has blocks of 24 rows since it was made; --block-rows 16 is for a new cache"
    )
    assert not any("since it was made" in note for note in plan_extraction(replace(open_request, block_rows=24)).notes)


def test_a_shard_is_written_at_once(open_request: ExtractRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    take(1.0, monkeypatch)
    plan = choose_blocks(plan_extraction(replace(open_request, shard_blocks=4)))
    assert plan.header.block_rows == 16  # 2 batches, 8 s of a shard
    take(3.0, monkeypatch)
    said: list[str] = []
    assert (
        choose_blocks(plan_extraction(replace(open_request, shard_blocks=4)), note=said.append).header.block_rows == 8
    )
    assert said == [
        "a shard of 4 batches takes 12 s, which is what an interruption costs; a smaller --batch-size costs less"
    ]


@pytest.mark.parametrize("more", [{}, {"batch_size": 3}])
def test_the_second_of_two_batches_of_the_real_size_is_timed(
    open_request: ExtractRequest, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    seen, clock = list[tuple[int, ...]](), [0.0]

    class Slow(extraction.BatchRunner[Any]):
        def __call__(self, images: Any) -> Any:
            seen.append((*images.shape, images.unique().numel() > 100))
            clock[0] += 40.0 if len(seen) == 1 else 2.0  # the first compiles, allocates, …
            return super().__call__(images)

    monkeypatch.setattr(extraction, "BatchRunner", Slow)
    monkeypatch.setattr(extraction.time, "perf_counter", lambda: clock[0])
    plan = choose_blocks(plan_extraction(replace(open_request, **more)))
    size = plan.request.batch_size
    assert seen == [(size, 3, 32, 32, True)] * 2
    assert plan.header.block_rows == 4 * size


def test_the_trial_takes_real_time(open_request: ExtractRequest) -> None:
    assert 0 < extraction._time_batch(plan_extraction(open_request)) < 60


def test_a_trial_batch_is_no_larger_than_the_largest_of_the_run(open_request: ExtractRequest) -> None:
    """On the CPU, one that exceeds the memory ends the process."""
    sizes: list[int] = []
    plan = plan_extraction(replace(open_request, batch_size=1 << 20))
    plan.network.module.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    chosen = choose_blocks(plan)
    assert sizes == [40, 40]  # id/val has 40 images
    assert chosen.header.block_rows == 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows", [pytest.param(8, marks=pytest.mark.slow), 24, pytest.param(512, marks=pytest.mark.slow)]
)
def test_values_do_not_depend_on_it(finished: Cache, request_: ExtractRequest, rows: int) -> None:
    extract(plan_extraction(replace(request_, block_rows=rows)))
    made = open_cache(request_.cache)
    assert (made.header.block_rows, finished.header.block_rows) == (rows, 16)
    for name in finished:
        for path in finished.header.arrays():
            np.testing.assert_array_equal(made[name].read(path), finished[name].read(path))


def test_an_interruption_keeps_all_but_the_block_under_way(
    open_request: ExtractRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network of 6 s a batch: stopped in the fourth batch, three are kept."""
    take(6.0, monkeypatch)
    left = [4]

    def stop(_split: str, _rows: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(plan_extraction(open_request), stop)
    assert open_cache(open_request.cache).peek("id/val").marks().tolist() == [True] * 3 + [False] * 2


def test_a_cache_that_another_made_meanwhile_is_not_written(request_: ExtractRequest) -> None:
    plan = plan_extraction(request_)
    CacheWriter(request_.cache, replace(plan.header, block_rows=8))
    with pytest.raises(CacheError, match=r"c\.zarr was made by another extract meanwhile; the same command goes on$"):
        extract(plan)
    assert plan_extraction(request_).header.block_rows == 8


TWO = """
import os, sys
from nacpipe.cli import main
from nacpipe.extraction import pipeline as extract

extract._time_batch = lambda plan: {"0": 4.0, "1": 0.001}[os.environ["RANK"]]
main(sys.argv[1:], prog_name="nacpipe")
"""


@pytest.mark.slow
def test_the_first_ranks_choice_is_everybodys(tmp_path: Path) -> None:
    assert Ranks().agree(7) == 7
    port = 40000 + os.getpid() % 20000
    words = ["extract", "digits", "--cache", "c.zarr", "--splits", "ood/val", "--batch-size", "64", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    rendezvous = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    both = torchrun_words(rendezvous, ["-c", TWO, *words], environment)
    done = subprocess.run(both, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cache = open_cache(tmp_path / "c.zarr")
    assert cache.header.block_rows == 128
    assert cache["ood/val"].marks().all()


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_accuracy_is_said_once_id_train_is_done(finished: Cache, request_: ExtractRequest) -> None:
    """The weights are random, so there is something amiss."""
    said: list[str] = []
    extract(plan_extraction(replace(request_, splits=("id/val",))), note=said.append)
    assert said == []
    extract(plan_extraction(replace(request_, splits=("id/val", "id/train"))), note=said.append)
    train = finished["id/train"]
    share = float((train.logits[:].argmax(axis=1) == train.label).mean())
    assert said == [
        f"id/train: accuracy {100 * share:.2f} % of 40 images; a trained network classifies most images correctly:"
        " check the weights, the normalisation, the order of the classes"
    ]
    extract(plan_extraction(request_), note=said.append)
    assert len(said) == 1  # it was done before


@dataclass
class Split:
    """So many of ten images right."""

    right: int
    classes: int
    rows: int = 10
    row_slices = SplitView.row_slices

    @property
    def label(self) -> Any:
        return np.arange(self.rows) % self.classes

    def read(self, path: str, rows: slice) -> Any:
        assert path == "logits"
        chosen = np.where(np.arange(self.rows) < self.right, self.label, (self.label + 1) % self.classes)
        return np.eye(self.classes)[chosen][rows]


@pytest.mark.parametrize(
    ("right", "classes", "doubted"),
    [(10, 10, False), (5, 10, False), (4, 10, True), (7, 2, True), (8, 2, False), (0, 3, True)],
)
def test_less_than_half_right_is_doubted_and_of_two_classes_more(
    monkeypatch: pytest.MonkeyPatch, right: int, classes: int, doubted: bool
) -> None:
    monkeypatch.setattr(extraction, "open_cache", lambda _: {"id/train": Split(right, classes)})
    monkeypatch.setattr(extraction, "ACCURACY_ROWS", 3)
    text = extraction._accuracy("c.zarr", classes)
    assert text.startswith(f"id/train: accuracy {10 * right:.2f} % of 10 images")
    assert ("check the weights, the normalisation, the order of the classes" in text) is doubted


@pytest.mark.parametrize(
    ("right", "classes", "stated", "doubted"),
    [
        *((4, 10, 0.92, True), (5, 10, 0.92, False), (3, 10, 0.4, False)),
        *((2, 10, 0.4, True), (2, 10, 0.29, False)),  # three times chance is 0.3, which 0.29 is not
        *((4, 6, 0.7, True), (4, 5, 0.7, False)),  # of five classes three times chance is 0.6
    ],
)
def test_less_than_half_of_what_the_checkpoint_states_is_doubted_and_what_is_near_chance(
    monkeypatch: pytest.MonkeyPatch, right: int, classes: int, stated: float, doubted: bool
) -> None:
    monkeypatch.setattr(extraction, "open_cache", lambda _: {"id/train": Split(right, classes)})
    text = extraction._accuracy("c.zarr", classes, stated=stated)
    assert (f"while the checkpoint states {100 * stated:.2f} %: check the normalisation" in text) is doubted
    assert ("check" in text) is doubted


def test_logits_without_a_number_are_told(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", rows={"id/train": 0})
    source = cache["id/val"]
    writer = CacheWriter(cache.path, cache.header)
    writer.prepare("id/train", 40, {"list": "l", "sha256": "0" * 64})
    for block in range(3):
        arrays = {key: np.array(source.read(key)[16 * block : 16 * block + 16]) for key in cache.header.arrays()}
        arrays["logits"][2] = np.nan
        writer.write_block("id/train", block, arrays)
    writer.seal("id/train")
    assert extraction._accuracy(cache.path, 3) == f"{cache.path}: id/train/logits, row 2: the network gave nan"
