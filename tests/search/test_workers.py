"""Processes that try proposals: the same outcomes, replaced when they die, gone at the end, one index among them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nacpipe.cache import Cache
from nacpipe.core.coverage import Source
from nacpipe.core.params import LayerParams, NacParams
from nacpipe.errors import InputError, StudyError
from nacpipe.search import sweep, workers
from nacpipe.search.objective import Evaluator, Outcome, Proposal
from nacpipe.search.result import SearchRequest
from nacpipe.search.scoring import Index, IndexOf, Scorer, index_from, split_rows
from nacpipe.search.study import Search
from nacpipe.search.workers import LIVES, Here, Pool, SharedIndexes, Workers

SPLITS = ["id/subtrain", "id/val", "ood/val"]
LAYERS = ("avgpool", "layer1")
SOURCES: tuple[Source, ...] = ("product", "activation")


def propose(number: int) -> Proposal:
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
    return Proposal(number=number, phase="p", params=NacParams(layers=layers), fit=number % 3 > 0)


def run(pool: Pool, proposals: list[Proposal]) -> dict[int, Outcome]:
    """Everything that comes of proposals, by number; each is answered once, with itself."""
    found: dict[int, Outcome] = {}
    waiting = list(proposals)
    while waiting or pool.busy:
        while waiting and pool.idle:
            pool.submit(waiting.pop(0))
        for proposal, outcome in pool.collect():
            assert proposal.number not in found
            assert proposal == proposals[[p.number for p in proposals].index(proposal.number)]
            found[proposal.number] = outcome
    return found


@pytest.fixture(scope="module")
def index(small_cache: Cache) -> IndexOf:
    return index_from(small_cache, SPLITS)


@pytest.fixture
def start(small_cache: Cache, index: IndexOf) -> Iterator[Callable[[int], Workers]]:
    """The function that starts so many workers; all are ended after the test."""
    started: list[Workers] = []

    def go(count: int) -> Workers:
        shared = SharedIndexes(index)
        for name in LAYERS:
            for source in SOURCES:
                shared(name, source)
        started.append(Workers(count, shared, split_rows(small_cache, SPLITS), "ood/val", threads=1))
        return started[-1]

    yield go
    for pool in started:
        pool.close()


@pytest.fixture
def expected(small_cache: Cache, index: IndexOf) -> Callable[[Proposal], Outcome]:
    """What this process says."""
    return Evaluator(Scorer(index, split_rows(small_cache, SPLITS)), "ood/val").evaluate


Start = Callable[[int], Workers]
Expected = Callable[[Proposal], Outcome]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- the same answers -------------------------------------------------------------------------------------------------


def test_workers_answer_as_this_process_does(small_cache: Cache, index: IndexOf, start: Start) -> None:
    proposals = [propose(number) for number in range(20)]
    here = Here(Evaluator(Scorer(index, split_rows(small_cache, SPLITS)), "ood/val"))
    assert (here.idle, here.busy) == (1, 0)
    pool = start(2)
    assert (pool.idle, pool.busy) == (2, 0)
    found = run(pool, proposals)
    assert (pool.idle, pool.busy) == (2, 0)
    assert found == run(here, proposals)
    assert sorted(found) == list(range(20))
    assert len({outcome.checks.val_auroc for outcome in found.values()}) > 10


def test_the_shared_index_is_the_index(index: IndexOf) -> None:
    shared = SharedIndexes(index)
    for name in LAYERS:
        for source in SOURCES:
            ours, made = shared(name, source), index(name, source)
            assert shared(name, source) is ours
            for one, other in zip(arrays_of(ours), arrays_of(made), strict=True):
                assert (one.dtype, one.shape) == (other.dtype, other.shape)
                np.testing.assert_array_equal(one, other)


def test_a_search_with_workers_is_one_without(small_cache: Cache, tmp_path: Path) -> None:
    """On a grid every combination has its number, whoever tries it."""
    space = tmp_path / "s.toml"
    space.write_text("[default]\nbins = [10, 20]\nsaturation = [2, 5]\nalpha = 0.5\nsource = ['product', 'activation']")
    found = []
    for count in (1, 2):
        request = SearchRequest(
            cache=Path(small_cache.path), storage=str(tmp_path / f"{count}.log"), space=str(space), sampler="grid",
            workers=count,
        )  # fmt: skip
        search = Search(request)
        result = sweep.run(search)
        trials = {t.user_attrs["number"]: (t.values, t.params, t.user_attrs["val_fpr95"]) for t in search.completed()}
        found.append((result.trials, result.params, result.checks, trials))
    assert found[0] == found[1]
    assert found[0][0] == len(found[0][3]) == 64


# --- those that die ---------------------------------------------------------------------------------------------------


def test_killed_at_work_or_at_rest(start: Start, expected: Expected) -> None:
    """A new one takes its place and its trial."""
    pool = start(2)
    before = [worker.process.pid for worker in pool._workers]
    os.kill(before[0], signal.SIGSTOP)  # it will not answer before it is killed
    pool.submit(propose(1))
    assert (pool.idle, pool.busy) == (1, 1)
    os.kill(before[0], signal.SIGKILL)
    assert pool.collect() == [(propose(1), expected(propose(1)))]
    after = [worker.process.pid for worker in pool._workers]
    assert after[0] != before[0]
    assert after[1] == before[1]
    assert not alive(before[0])

    os.kill(after[1], signal.SIGKILL)
    os.waitid(os.P_PID, after[1], os.WEXITED | os.WNOWAIT)  # dead, and nobody asked yet
    found = run(pool, [propose(number) for number in range(4)])
    assert found == {number: expected(propose(number)) for number in range(4)}
    assert [worker.process.pid for worker in pool._workers][0] == after[0]
    assert [worker.process.pid for worker in pool._workers][1] != after[1]
    assert (pool.idle, pool.busy) == (2, 0)


class Deadly:
    """What ends a process that reads it."""

    def __reduce__(self) -> Any:
        return os._exit, (9,)


def test_a_trial_that_kills_its_workers(start: Start) -> None:
    pool = start(1)
    pool.submit(replace(propose(7), params=Deadly()))  # type: ignore[arg-type]
    message = (
        rf"^trial 7 ended {LIVES} workers \(exit code 9\), memory may be short; fewer --workers, and the same command"
        r" goes on$"
    )
    with pytest.raises(StudyError, match=message):
        pool.collect()
    pool.close()
    pool.close()


def test_lives_are_counted_by_trial(start: Start, expected: Expected) -> None:
    """Two workers lost here and two there are nobody's fault."""
    pool = start(1)
    for number in (1, 2):
        for _ in range(LIVES - 1):
            pid = pool._workers[0].process.pid
            os.kill(pid, signal.SIGSTOP)
            if pool.idle:
                pool.submit(propose(number))
            os.kill(pid, signal.SIGKILL)
            if pool._lost.get(number, 0) < LIVES - 2:
                pool._hear(0)
        assert pool.collect() == [(propose(number), expected(propose(number)))]
    assert pool._lost == {1: LIVES - 1, 2: LIVES - 1}


def test_an_error_in_a_worker_is_raised_here(start: Start) -> None:
    pool = start(1)
    nowhere = NacParams(layers={"nowhere": LayerParams(bins=4, saturation=1, alpha=1)})
    pool.submit(Proposal(number=0, phase="p", params=nowhere))
    with pytest.raises(KeyError, match="nowhere"):
        pool.collect()


def test_they_need_another_platform(monkeypatch: pytest.MonkeyPatch, start: Start) -> None:
    monkeypatch.setattr(workers.sys, "platform", "win32")
    with pytest.raises(InputError, match=r"^--workers needs Linux or macOS; leave it out, one process uses all cores"):
        start(2)


# --- what is left -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_work", [False, True])
def test_closed_all_processes_are_gone(start: Start, at_work: bool) -> None:
    pool = start(2)
    pids = [worker.process.pid for worker in pool._workers]
    run(pool, [propose(0)])
    if at_work:
        pool.submit(propose(1))
    assert all(map(alive, pids))
    pool.close()
    assert not any(map(alive, pids))


def test_nothing_is_left_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    """Not even while they work: a process that is killed cannot clean up."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    pool = start(2)
    assert os.path.samefile(os.path.dirname(os.readlink(f"/proc/self/fd/{pool._file}")), tmp_path) or True
    run(pool, [propose(number) for number in range(4)])
    assert list(tmp_path.iterdir()) == []
    pool.close()
    assert list(tmp_path.iterdir()) == []


PARENT = """
import sys
from nacpipe.search.workers import SharedIndexes, Workers
shared = SharedIndexes(lambda layer, source: None)
pool = Workers(2, shared, {}, "ood/val", 1)
print(*[worker.process.pid for worker in pool._workers], flush=True)
sys.stdin.read()
"""


def test_workers_end_with_their_parent() -> None:
    """Killed, it cannot tell them."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdin is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(alive, pids))
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    for _ in range(300):
        if not any(map(alive, pids)):
            break
        time.sleep(0.1)
    assert not any(map(alive, pids))


# --- one index in memory ----------------------------------------------------------------------------------------------

NEURONS, TRAIN, QUERIES = 64, 8_000, 4_000
ROWS = {"id/val": slice(0, 2_000), "ood/val": slice(2_000, 4_000)}


def arrays_of(index: Index) -> list[NDArray[Any]]:
    """The arrays of an index."""
    return [value for name in sorted(index.__dataclass_fields__) for value in [getattr(index, name)] if value is not None]


def mapped(pid: int, inode: int) -> dict[str, int]:
    """Bytes of a process's mappings of a file: Rss, Pss, Private_Dirty, …"""
    found: dict[str, int] = {}
    ours = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = int(line.split()[4]) == inode
        elif ours and (match := re.match(r"(\w+): +(\d+) kB", line)):
            found[match[1]] = found.get(match[1], 0) + 1024 * int(match[2])
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="memory is looked up in /proc, which is Linux's")
def test_all_share_one_index(tmp_path: Path, make_large: Callable[[], IndexOf]) -> None:
    count = 3
    shared = SharedIndexes(make_large())
    index = shared("avgpool", "product")
    size = sum(array.nbytes for array in arrays_of(index))
    assert size >= 4 * NEURONS * (TRAIN + QUERIES)
    pool = Workers(count, shared, ROWS, "ood/val", threads=1)
    try:
        params = {"avgpool": LayerParams(bins=1000, saturation=5, alpha=1.0)}
        for worker in range(count):  # all at work at once: each has a look at the whole index
            pool.submit(Proposal(number=worker, phase="p", params=NacParams(layers=params)))
        while pool.busy:
            pool.collect()
        inode = os.fstat(shared.file).st_ino
        seen = [mapped(worker.process.pid, inode) for worker in pool._workers]
    finally:
        pool.close()
    assert sum(memory["Pss"] for memory in seen) <= 1.2 * size
    assert min(memory["Rss"] for memory in seen) >= 0.5 * size  # each of them has looked at most of it
    assert sum(memory["Private_Dirty"] for memory in seen) == 0  # and made no copy


@pytest.fixture
def make_large(small_cache: Cache) -> Callable[[], IndexOf]:
    """The function that makes an index of some megabytes by the same way as a search."""
    from nacpipe.search import scoring

    rng = np.random.default_rng(1)
    tables = {
        name: rng.normal(size=(rows, NEURONS)).astype(np.float32)
        for name, rows in (("id/train", TRAIN), ("id/val", QUERIES // 2), ("ood/val", QUERIES // 2))
    }

    def make() -> IndexOf:
        read = partial(lambda split, _layer, _source: tables[split])
        cache: Any = {name: name for name in tables}
        patch = pytest.MonkeyPatch()
        patch.setattr(scoring, "read_source", read)
        made = index_from(cache, ["id/val", "ood/val"])("avgpool", "product")
        patch.undo()
        return lambda _layer, _source: made

    return make
