"""Several processes on one cache, as started by torchrun.

    blocks   0 1 2 3 | 4 5 6 7 | 8 9 10      each rank writes a contiguous range of whole shards
             rank 0    rank 1    rank 2      rank 0 creates and seals, the others wait for it

Batches never cross a block, so the finished cache equals the one that a single process writes, value for value.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed

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
            torch.distributed.barrier()

    def agree(self, value: int) -> int:
        """Return rank 0's value; all ranks must call this."""
        if self.world == 1:
            return value
        shared = torch.tensor([value])
        torch.distributed.broadcast(shared, 0)
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
    local, local_world = (
        int(os.environ.get(name, usual)) for name, usual in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    return Ranks(int(os.environ["RANK"]), world, local, local_world)


def leave_ranks() -> None:
    """Destroy the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
