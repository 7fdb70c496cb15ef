"""Several processes on one cache, as started by torchrun.

    blocks   0 1 2 3 | 4 5 6 7 | 8 9 10      each rank writes a contiguous range of whole shards
             rank 0    rank 1    rank 2      rank 0 creates and seals, the others wait for it

Batches never cross a block, so the finished cache equals the one that a single process writes, value for value.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed

NOTE_SECONDS = 30.0  # of waiting for other ranks
TIMEOUT = datetime.timedelta(days=7)  # one rank may have much more work than another


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that torchrun started; `rank` is torch's word."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """The rank among the processes on this machine; selects the GPU."""
    local_world: int = 1
    """Number of processes on this machine."""
    group: Any = field(default=None, compare=False, repr=False)
    """torch's process group of these processes; None: the default one."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which creates and seals."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether no other process writes the cache."""
        return self.world == 1

    def share(self, units: Sequence[int]) -> Sequence[int]:
        """Return this rank's contiguous part of the units."""
        return units[self.rank * len(units) // self.world : (self.rank + 1) * len(units) // self.world]

    def wait(self) -> None:
        """Wait until all ranks have called this."""
        if self.world > 1:
            torch.distributed.barrier(self.group)

    def meet(self, note: Callable[[str], None]) -> None:
        """Wait until all ranks have called this; a note says so where it takes long."""
        if self.world == 1:
            return
        waiting, noted = torch.distributed.barrier(self.group, async_op=True), time.monotonic() + NOTE_SECONDS
        while not waiting.is_completed():
            time.sleep(0.01)
            if time.monotonic() >= noted:
                noted = float("inf")
                note(
                    f"rank {self.rank} of {self.world} waits for the others to call nacpipe.extract;"
                    " distributed=False extracts in one process alone"
                )
        waiting.wait()

    def agree(self, value: int) -> int:
        """Return rank 0's value; all ranks must call this."""
        if self.world == 1:
            return value
        shared = torch.tensor([value])
        torch.distributed.broadcast(shared, 0, group=self.group)
        return int(shared.item())


def join_ranks() -> Ranks:
    """Join the processes that torchrun started; without torchrun, return a single rank."""
    ranks = read_ranks()
    if not ranks.alone and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
    return ranks


def read_ranks() -> Ranks:
    """Return this process's place among those that torchrun, or another launcher, started; they are not joined."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    return Ranks(int(os.environ["RANK"]), world, *_local())


def _local() -> tuple[int, int]:
    """Return the rank among the processes on this machine, and their number."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


_own_group: list[tuple[Any, Any]] = []
"""A program's process group and ours beside it: one is made for all extractions of a program."""


def find_ranks(distributed: bool | None = None) -> Ranks:
    """Return this process among those of a program of the caller's, which may have a process group already.

    Without one, that of torchrun's processes is made (gloo), and stays: torch cannot be sure to make it twice.

    Args:
        distributed: whether the processes share the work; None: where there are several.
    """
    torch_distributed = torch.distributed
    if distributed is False or not torch_distributed.is_available():
        return Ranks()
    if not torch_distributed.is_initialized():
        if distributed is None and not torch_distributed.is_torchelastic_launched():
            return Ranks()
        return join_ranks()
    if (world := torch_distributed.get_world_size()) == 1:
        return Ranks()
    default = torch_distributed.group.WORLD
    if not (_own_group and _own_group[0][0] is default):  # theirs may be nccl's, or give up after minutes
        _own_group[:] = [(default, torch_distributed.new_group(backend="gloo", timeout=TIMEOUT))]
    return Ranks(torch_distributed.get_rank(), world, *_local(), group=_own_group[0][1])


def leave_ranks() -> None:
    """Destroy the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
