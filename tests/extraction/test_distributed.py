"""Several processes on one cache: the same values as one, whoever dies on the way."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.cache.consolidated import copy_is_stale
from nacpipe.errors import CacheError, InputError
from nacpipe.extraction.distributed import Ranks, find_ranks, join_ranks
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest
from tests.prefork import deadly, find_running, kill, python_words, torchrun_words

SPLITS = "id/val,ood/val,ood/near/letters"


OPTIONS = ["--splits", SPLITS, "--batch-size", "32", "--block-rows", "32", "--device", "cpu", "--workers", "0"]


def extract_words(cache: Path | str) -> list[str]:
    return ["-m", "nacpipe", "extract", "digits", "--cache", str(cache), *OPTIONS]


def command(cache: Path) -> list[str]:
    return [*python_words(environment()), *extract_words(cache)]


def two_ranks(words: list[str], port: int, *options: str) -> list[str]:
    """Return torchrun's command line for two ranks that run Python with `words`."""
    rendezvous = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    return torchrun_words([*rendezvous, *options], words, environment())


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def same(a: Cache, b: Cache) -> bool:
    return list(a) == list(b) and all(
        np.array_equal(a[name].read(path), b[name].read(path)) for name in a for path in a.header.arrays()
    )


def wait_until_it_writes(cache: Path, running: subprocess.Popen[Any]) -> None:
    """Wait until a block of the last split, the last rank's, is marked."""
    marks, deadline = cache / "ood" / "near" / "letters" / "blocks", time.monotonic() + 120
    while not any(marks.glob("c.*")) and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert running.poll() is None, "the extraction ended before a rank could be killed"


def kill_a_rank(cache: Path, running: subprocess.Popen[Any]) -> None:
    """Kill the rank that torchrun started last when it has written something."""
    wait_until_it_writes(cache, running)
    os.kill(find_running(extract_words(cache))[-1], deadly(running.args))  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [[], [5], [3, 3], [16] * 7, [16, 16, 5, 16, 16, 16, 1, 3], [1, 500, 1, 1]])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_unit_has_one_rank_and_parts_are_of_about_the_same_rows(world: int, rows: list[int]) -> None:
    units = list(range(len(rows)))
    shares = [Ranks(rank, world).share(units, rows) for rank in range(world)]
    assert [unit for share in shares for unit in share] == units
    for share in shares:
        assert abs(sum(rows[unit] for unit in share) - sum(rows) / world) <= max(rows, default=0)


def test_all_splits_are_shared_at_once(request_: ExtractRequest) -> None:
    """Of two ranks the cut lies within a split, and each has splits of its own."""
    plan = plan_extraction(request_)
    parts = [[(split.images.name, unit) for split, unit in plan.work(Ranks(rank, 2))] for rank in range(2)]
    assert (parts[0][0], parts[1][-1]) == (("id/train", 0), ("ood/far/mnist", 0))
    assert parts[0][-1][0] == parts[1][0][0] == "id/val"
    assert parts[0][-1][1] < parts[1][0][1]
    todo = [plan.todo_rows(Ranks(rank, 2)) for rank in range(2)]
    assert sum(todo) == plan.todo_rows(Ranks())
    by_split = plan.todo(Ranks(1, 2))
    assert list(by_split) == [split.images.name for split in plan.splits]
    assert sum(by_split.values()) == todo[1]
    assert by_split[plan.splits[0].images.name] == 0
    assert [(name, unit) for name, units in plan.units_of(Ranks(1, 2)).items() for unit in units] == parts[1]


def test_each_split_is_sealed_once_by_the_rank_of_its_last_unit(
    request_: ExtractRequest, finished: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks as threads. The second goes first: it seals what is its own, and the first what both share."""
    barrier, second_is_done, store = threading.Barrier(2), threading.Event(), torch.distributed.HashStore()
    sealed: list[str] = []
    agreed: dict[str, int] = {}
    notes: tuple[list[str], list[str]] = ([], [])
    monkeypatch.setattr(Ranks, "wait", lambda _: barrier.wait(60))
    monkeypatch.setattr(Ranks, "agree", lambda _, value: agreed.setdefault("value", value))
    store.add("written/" + str(request_.cache) + "/id/val", 1)  # of a run that failed; and paths differ by machine
    seal = CacheWriter.seal

    def note_seal(writer: CacheWriter, name: str) -> None:
        sealed.append(name)
        seal(writer, name)
        if (
            name == "ood/far/mnist"
        ):  # the last of the second rank's work; its other blocks are written before or just now
            second_is_done.set()

    def hold(_split: str, _rows: int) -> None:
        assert second_is_done.wait(60)

    monkeypatch.setattr(CacheWriter, "seal", note_seal)
    plans = [plan_extraction(request_) for _ in range(2)]
    steps = (hold, lambda split, rows: None)
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(extract, plans[rank], steps[rank], Ranks(rank, 2, rank, 2, store), notes[rank].append)
            for rank in range(2)
        ]
        for run in runs:
            run.result(120)
    assert sorted(sealed) == sorted(finished)
    assert sealed.index("ood/far/mnist") < min(map(sealed.index, ("id/train", "id/subtrain", "id/val")))
    assert [len(said) for said in notes] == [1, 0]
    assert notes[0][0].startswith("id/train: accuracy ")
    cache = open_cache(request_.cache)
    assert same(finished, cache)
    assert not copy_is_stale(cache.root, cache.header)


def test_a_folder_that_this_machine_lacks_is_not_made_anew(request_: ExtractRequest) -> None:
    header = plan_extraction(request_).header
    message = r"c\.zarr: the first process made it, and it is not there for this one; several machines need a folder"
    with pytest.raises(CacheError, match=message):
        CacheWriter(request_.cache, header, first=False)
    assert not request_.cache.exists()


def test_who_is_gone_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **_options: object) -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1\nmore")

    message = (
        r"^another process of this extraction ended early \(Connection closed by peer \[127\.0\.0\.1\]:1\); what all of"
        r" them wrote stays, and the same command goes on$"
    )
    monkeypatch.setattr(torch.distributed, "barrier", gone)
    monkeypatch.setattr(torch.distributed, "broadcast", gone)
    for call in (Ranks(1, 2).wait, lambda: Ranks(1, 2).agree(3)):
        with pytest.raises(CacheError, match=message):
            call()


@pytest.mark.slow
def test_two_ranks_of_which_one_is_killed_make_the_cache_of_one(tmp_path: Path) -> None:
    whole, shared = tmp_path / "whole.zarr", tmp_path / "shared.zarr"
    subprocess.run(command(whole), check=True, env=environment(), capture_output=True)
    port = 20000 + os.getpid() % 20000
    words = extract_words(shared)
    running = subprocess.Popen(
        two_ranks(words, port), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    kill_a_rank(shared, running)
    running.communicate(timeout=120)
    assert running.returncode != 0
    again = subprocess.run(two_ranks(words, port + 1), env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("ood/near/letters") == 1, "only the first rank speaks"
    assert same(open_cache(whole), open_cache(shared))


PROGRAM = """
import sys
import torch
from torch import nn
from torch.utils.data import TensorDataset
import nacpipe

torch.set_num_threads(1)
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
x, y = torch.randn(100, 5), torch.arange(100) % 3
if "own" in sys.argv:
    torch.distributed.init_process_group("gloo")
rows = []
for name in ("x", "y"):  # two in one program
    splits = {"id/train": TensorDataset(x, y), "id/val": iter([(x[:9], y[:9]), (x[9:20], y[9:20])]),
              "ood/val": TensorDataset(2 * x[:50])}
    cache = nacpipe.extract(network, splits, f"{sys.argv[1]}/{name}.zarr", layers=["1"], batch_size=8, block_rows=8,
                            progress=lambda split, count: rows.append(count))
    assert all(cache[split].sealed for split in splits)
print(sum(rows))
"""


@pytest.mark.slow
@pytest.mark.parametrize("group", ["torchrun's", "own"])
def test_a_program_under_torchrun_shares_its_caches(group: str, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "shared").mkdir()
    alone = [*python_words(environment()), "-c", PROGRAM, str(tmp_path / "whole")]
    subprocess.run(alone, check=True, env=environment(), capture_output=True)
    both = two_ranks(["-c", PROGRAM, str(tmp_path / "shared"), group], 22000 + os.getpid() % 20000)
    done = subprocess.run(both, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, other = sorted(map(int, done.stdout.split()))
    assert first + other == 2 * (100 + 20 + 50)
    assert first > 0
    for name in ("x.zarr", "y.zarr"):
        whole, shared = open_cache(tmp_path / "whole" / name), open_cache(tmp_path / "shared" / name)
        digests = [[cache[split].attributes["digest"] for split in cache] for cache in (whole, shared)]
        assert digests[0] == digests[1]


def test_a_program_alone_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """WORLD_SIZE may be left over from another program; torchrun says more."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find_ranks() == Ranks()
    assert find_ranks(False) == Ranks()
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="WORLD_SIZE is '2' and RANK is ''"):
        join_ranks()


def test_a_rank_says_for_whom_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Barrier:
        left = 3

        def is_completed(self) -> bool:
            self.left -= 1
            return self.left == 0

        def wait(self) -> None:
            waited.append(self.left)

    waited: list[int] = []
    said: list[str] = []
    monkeypatch.setattr("torch.distributed.barrier", lambda group, async_op: Barrier())
    monkeypatch.setattr("nacpipe.extraction.distributed.NOTE_SECONDS", 0.0)
    Ranks(1, 2).meet(said.append)
    assert waited == [0]
    assert said == [
        "rank 1 of 2 waits for the others to call nacpipe.extract; distributed=False extracts in one process alone"
    ]
    Ranks().meet(said.append)
    assert len(said) == 1


@pytest.mark.slow
def test_torchrun_may_start_the_ranks_again(tmp_path: Path) -> None:
    """With --max-restarts they go on by themselves: they plan anew, and count from nothing."""
    whole, shared = tmp_path / "whole.zarr", tmp_path / "shared.zarr"
    subprocess.run(command(whole), check=True, env=environment(), capture_output=True)
    words = two_ranks(extract_words(shared), 20000 + (os.getpid() + 7) % 20000, "--max-restarts", "1")
    running = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    kill_a_rank(shared, running)
    _, said = running.communicate(timeout=240)
    assert running.returncode == 0, said.decode()
    assert same(open_cache(whole), open_cache(shared))


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_where_nobody_ends_the_others_they_end_in_words(tmp_path: Path, dead: int) -> None:
    """Ranks that a batch system started: torchrun would stop them."""
    whole, shared = tmp_path / "whole.zarr", tmp_path / "shared.zarr"
    subprocess.run(command(whole), check=True, env=environment(), capture_output=True)
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + (os.getpid() + 14 + dead) % 20000)}
    ranks = []
    for rank in ("0", "1"):
        names = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2", **port}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        ranks.append(subprocess.Popen(command(shared), env={**environment(), **names}, text=True, **streams))
    wait_until_it_writes(shared, ranks[dead])
    kill(ranks[dead])
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert ranks[1 - dead].returncode == 1, said
    last = said[1 - dead].splitlines()[-1]
    assert "another process of this extraction ended early (" in last
    assert last.endswith("; what all of them wrote stays, and the same command goes on")
    subprocess.run(command(shared), check=True, env=environment(), capture_output=True)
    assert same(open_cache(whole), open_cache(shared))
