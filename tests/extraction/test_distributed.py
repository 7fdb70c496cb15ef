"""Several processes on one cache: the same values as one, whoever dies on the way."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nacpipe.cache import Cache, open_cache
from nacpipe.extraction.distributed import Ranks, find_ranks
from tests.prefork import python_words

SPLITS = "id/val,ood/val,ood/near/letters"


def command(cache: Path, *launcher: str) -> list[str]:
    options = ["--cache", str(cache), "--splits", SPLITS, "--batch-size", "32", "--device", "cpu", "--workers", "1"]
    words = [sys.executable, *launcher] if launcher else python_words(environment())
    return [*words, "-m", "nacpipe", "extract", "digits", *options]


def two_ranks(cache: Path, port: int) -> list[str]:
    rendezvous = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    return command(cache, "-m", "torch.distributed.run", *rendezvous)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def children(parent: int) -> list[int]:
    """The processes whose parent this is."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            number, _, rest = stat.read_text().partition(" ")
            if int(rest.rpartition(")")[2].split()[1]) == parent:
                found.append(int(number))
    return found


def same(a: Cache, b: Cache) -> bool:
    return list(a) == list(b) and all(
        np.array_equal(a[name].read(path), b[name].read(path)) for name in a for path in a.header.arrays()
    )


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_unit_has_one_rank_and_ranges_are_contiguous(world: int, count: int) -> None:
    units = list(range(0, 3 * count, 3))
    shares = [Ranks(rank, world).share(units) for rank in range(world)]
    assert [unit for share in shares for unit in share] == units
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.slow
def test_two_ranks_of_which_one_is_killed_make_the_cache_of_one(tmp_path: Path) -> None:
    whole, shared = tmp_path / "whole.zarr", tmp_path / "shared.zarr"
    subprocess.run(command(whole), check=True, env=environment(), capture_output=True)
    port = 20000 + os.getpid() % 20000
    running = subprocess.Popen(
        two_ranks(shared, port), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    marks = shared / "ood" / "near" / "letters" / "blocks"
    deadline = time.monotonic() + 120
    while not any(marks.glob("c.*")) and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(max(children(running.pid)), signal.SIGKILL)
    running.communicate(timeout=120)
    assert running.returncode != 0, "the extraction ended before a rank could be killed"
    again = subprocess.run(two_ranks(shared, port + 1), env=environment(), capture_output=True, text=True)
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
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "whole").mkdir()
    (tmp_path / "shared").mkdir()
    words = [str(tmp_path / "program.py"), str(tmp_path / "whole")]
    subprocess.run([sys.executable, *words], check=True, env=environment(), capture_output=True)
    port = 22000 + os.getpid() % 20000
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    shared = [*launcher, "--master-port", str(port), words[0], str(tmp_path / "shared"), group]
    done = subprocess.run([sys.executable, *shared], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, other = sorted(map(int, done.stdout.split()))
    assert first + other == 2 * (100 + 20 + 50)
    assert first > 0
    for name in ("x.zarr", "y.zarr"):
        whole, both = open_cache(tmp_path / "whole" / name), open_cache(tmp_path / "shared" / name)
        assert [both[split].attributes["digest"] for split in both] == [whole[s].attributes["digest"] for s in whole]


def test_a_program_alone_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """WORLD_SIZE may be left over from another program; torchrun says more."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find_ranks() == Ranks()
    assert find_ranks(False) == Ranks()


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
