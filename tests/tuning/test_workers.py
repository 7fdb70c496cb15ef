"""Processes that try proposals: the same outcomes, replaced when they die, gone at the end, one index among them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nacpipe.cache import Cache
from nacpipe.errors import InputError, StudyError
from nacpipe.method.coverage import Source
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring import coverage as scoring
from nacpipe.scoring.trial_scorer import IndexOf, Scorer, index_from, split_rows
from nacpipe.tuning import workers
from nacpipe.tuning.objective import Candidate, Evaluator, TrialResult
from nacpipe.tuning.workers import LIVES, Here, Pool, SharedIndexes, Workers

SPLITS = ["id/subtrain", "id/val", "ood/val"]
LAYERS = ("avgpool", "layer1")
SOURCES: tuple[Source, ...] = ("product", "activation")


def propose(number: int) -> Candidate:
    """Another combination for every number; every third with weights of its own."""
    layers = {
        name: LayerParams(
            bins=10 + number,
            saturation=2 + number % 5,
            alpha=0.3 + 0.1 * number,
            weight=1.0 + place * number,
            source=SOURCES[(number + place) % 2],
        )
        for place, name in enumerate(LAYERS)
    }
    return Candidate(number=number, phase="p", params=NacParams(layers=layers), fit=number % 3 > 0)


def run(pool: Pool, proposals: list[Candidate]) -> dict[int, TrialResult]:
    """Everything that comes of proposals, by number; each is answered once, with itself."""
    found: dict[int, TrialResult] = {}
    waiting = list(proposals)
    while waiting or pool.busy:
        while waiting and pool.idle:
            pool.submit(waiting.pop(0))
        for proposal, outcome in pool.collect():
            assert proposal.number not in found
            assert proposal in proposals
            found[proposal.number] = outcome
    return found


@pytest.fixture(scope="module")
def index(small_cache: Cache) -> IndexOf:
    return index_from(small_cache, SPLITS)


@pytest.fixture(scope="module")
def shared(index: IndexOf) -> SharedIndexes:
    found = SharedIndexes(index)
    for name in LAYERS:
        for source in SOURCES:
            found(name, source)
    return found


@pytest.fixture(scope="module")
def start(small_cache: Cache, shared: SharedIndexes) -> Iterator[Callable[[int], Workers]]:
    """The function that starts so many workers; all are ended after the tests."""
    started: list[Workers] = []

    def go(count: int) -> Workers:
        started.append(Workers(count, shared, split_rows(small_cache, SPLITS), "ood/val", threads=1))
        return started[-1]

    yield go
    for pool in started:
        pool.close()


@pytest.fixture(scope="module")
def two(start: Callable[[int], Workers]) -> Workers:
    """For all tests that leave them at rest; to start takes a second or two."""
    return start(2)


@pytest.fixture
def here(small_cache: Cache, index: IndexOf) -> Evaluator:
    """What this process computes with."""
    return Evaluator(Scorer(index, split_rows(small_cache, SPLITS)), "ood/val")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and ") Z " in stat.read_text())  # dead, but its parent has not looked


# --- the same answers -------------------------------------------------------------------------------------------------


def test_workers_answer_as_this_process_does(two: Workers, here: Evaluator) -> None:
    proposals = [propose(number) for number in range(20)]
    assert (Here(here).idle, Here(here).busy) == (1, 0)
    assert (two.idle, two.busy) == (2, 0)
    found = run(two, proposals)
    assert (two.idle, two.busy) == (2, 0)
    assert found == run(Here(here), proposals)
    assert sorted(found) == list(range(20))
    assert len({outcome.checks.val_auroc for outcome in found.values()}) > 10


def test_the_shared_index_is_the_index(index: IndexOf, shared: SharedIndexes) -> None:
    for name in LAYERS:
        for source in SOURCES:
            ours, made = shared(name, source), index(name, source)
            assert shared(name, source) is ours
            for one, other in zip(arrays_of(ours), arrays_of(made), strict=True):
                assert (one.dtype, one.shape) == (other.dtype, other.shape)
                np.testing.assert_array_equal(one, other)


# --- those that die ---------------------------------------------------------------------------------------------------


def test_killed_at_work_or_at_rest(two: Workers, here: Evaluator) -> None:
    """A new one takes its place and its trial; what other trials cost is not held against it."""
    pool = two
    pool._lost = {99: LIVES - 1}
    before = [worker.process.pid for worker in pool._workers]
    os.kill(before[0], signal.SIGSTOP)  # it will not answer before it is killed
    pool.submit(propose(1))
    assert (pool.idle, pool.busy) == (1, 1)
    os.kill(before[0], signal.SIGKILL)
    assert pool.collect() == [(propose(1), here.evaluate(propose(1)))]
    after = [worker.process.pid for worker in pool._workers]
    assert after[0] != before[0]
    assert after[1] == before[1]
    assert not alive(before[0])

    os.kill(after[1], signal.SIGKILL)
    pool._workers[1].process.wait()  # dead, and the pool has not seen it
    found = run(pool, [propose(number) for number in range(4)])
    assert found == {number: here.evaluate(propose(number)) for number in range(4)}
    last = [worker.process.pid for worker in pool._workers]
    assert last[0] == after[0]
    assert last[1] != after[1]
    assert (pool.idle, pool.busy) == (2, 0)
    assert pool._lost == {99: LIVES - 1, 1: 2}


class Deadly:
    """What ends a process that reads it."""

    def __reduce__(self) -> Any:
        return os._exit, (9,)


def test_a_trial_that_kills_its_workers(start: Callable[[int], Workers]) -> None:
    pool = start(1)
    pool.submit(replace(propose(7), params=Deadly()))  # type: ignore[arg-type]
    with pytest.raises(
        StudyError, match=rf"^trial 7 ended {LIVES} workers \(exit code 9\), memory may be short; fewer"
    ):
        pool.collect()
    pool.close()
    pool.close()


def test_they_need_another_platform(monkeypatch: pytest.MonkeyPatch, start: Callable[[int], Workers]) -> None:
    monkeypatch.setattr(workers.sys, "platform", "win32")
    with pytest.raises(InputError, match=r"^--workers needs Linux or macOS; leave it out, one process uses all cores"):
        start(2)


# --- what is left -----------------------------------------------------------------------------------------------------


def test_an_error_is_raised_here_and_closed_all_are_gone(start: Callable[[int], Workers]) -> None:
    """One is at work then, one at rest."""
    pool = start(2)
    pids = [worker.process.pid for worker in pool._workers]
    nowhere = NacParams(layers={"nowhere": LayerParams(bins=4, saturation=1, alpha=1)})
    pool.submit(Candidate(number=0, phase="p", params=nowhere))
    with pytest.raises(KeyError, match="nowhere"):
        pool.collect()
    assert all(map(alive, pids))
    pool.close()
    pool.close()
    assert not any(map(alive, pids))


def test_nothing_is_left_in_the_temporary_folder(
    index: IndexOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even while they work: a process that is killed cannot clean up."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shared = SharedIndexes(index)
    shared("avgpool", "product")
    assert os.fstat(shared.file).st_dev == tmp_path.stat().st_dev
    assert os.fstat(shared.file).st_size > 0
    assert list(tmp_path.iterdir()) == []


PARENT = """
import sys
from nacpipe.tuning.workers import SharedIndexes, Workers
shared = SharedIndexes(lambda layer, source: None)
pool = Workers(1, shared, {}, "ood/val", 1)
print(*[worker.process.pid for worker in pool._workers], flush=True)
sys.stdin.read()
"""


def test_workers_end_with_their_parent() -> None:
    """Killed, it cannot tell them."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    assert parent.stdin
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert [alive(pid) for pid in pids] == [True]
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    until = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, pids))


# --- one index in memory ----------------------------------------------------------------------------------------------

NEURONS, TRAIN, QUERIES = 64, 8_000, 4_000
ROWS = {"id/val": slice(0, QUERIES // 2), "ood/val": slice(QUERIES // 2, QUERIES)}


def arrays_of(record: Any) -> list[NDArray[Any]]:
    """All arrays in a record, and in the records in it."""
    if isinstance(record, np.ndarray):
        return [record]
    inner = [getattr(record, f.name) for f in fields(record)] if is_dataclass(record) else []
    return [array for value in inner for array in arrays_of(value)]


def mapped(pid: int, inode: int) -> dict[str, int]:
    """Bytes of a process's mappings of a file: Rss, Pss, Private_Dirty, …"""
    found, ours = dict[str, int](), False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = int(line.split()[4]) == inode
        elif ours and (match := re.match(r"(\w+): +(\d+) kB", line)):
            found[match[1]] = found.get(match[1], 0) + 1024 * int(match[2])
    return found


def make_large(monkeypatch: pytest.MonkeyPatch) -> IndexOf:
    """An index of some megabytes, made as a search makes it."""
    rng = np.random.default_rng(1)
    rows = {"id/train": TRAIN, "id/val": QUERIES // 2, "ood/val": QUERIES // 2}
    tables: Any = {name: rng.normal(size=(count, NEURONS)).astype(np.float32) for name, count in rows.items()}
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "read_layer", lambda tables, _layer, _source: np.concatenate(tables))
        made = index_from(tables, ["id/val", "ood/val"])("avgpool", "product")
    return lambda _layer, _source: made


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="memory is looked up in /proc, which is Linux's")
def test_all_share_one_index(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = SharedIndexes(make_large(monkeypatch))
    size = sum(array.nbytes for array in arrays_of(shared("avgpool", "product")))
    assert size >= 4 * NEURONS * (TRAIN + QUERIES)
    pool = Workers(2, shared, ROWS, "ood/val", threads=1)
    try:
        params = NacParams(layers={"avgpool": LayerParams(bins=1000, saturation=5, alpha=1.0)})
        for number in range(2):  # both at work at once: each has a look at the whole index
            pool.submit(Candidate(number=number, phase="p", params=params))
        while pool.busy:
            pool.collect()
        inode = os.fstat(shared.file).st_ino
        seen = [mapped(worker.process.pid, inode) for worker in pool._workers]
    finally:
        pool.close()
    assert sum(memory["Pss"] for memory in seen) <= 1.2 * size
    assert min(memory["Rss"] for memory in seen) >= 0.5 * size  # each of them has looked at most of it
    assert sum(memory["Anonymous"] for memory in seen) == 0  # and made no copy
