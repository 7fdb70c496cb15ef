"""Several processes on one cache, as started by torchrun.

    blocks   0 1 2 3 | 4 5 6 7 | 8 9 10      each rank a contiguous range of whole shards; one writer per shard
             rank 0    rank 1    rank 2      the first rank creates and seals, the others wait for it

Batches never cross a block, so the finished cache equals the one that a single process writes, value for value.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed

PATIENCE = datetime.timedelta(days=7)  # a rank may have much more to do than another


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its fellows."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """Among those on this machine; picks the GPU."""
    local_world: int = 1
    """How many are on this machine."""

    @property
    def first(self) -> bool:
        """True for the one that creates and seals."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """True where no other process shares the cache."""
        return self.world == 1

    def share(self, units: Sequence[int]) -> Sequence[int]:
        """Return this rank's contiguous part of what is to be done."""
        return units[self.rank * len(units) // self.world : (self.rank + 1) * len(units) // self.world]

    def wait(self) -> None:
        """Wait until all are here."""
        if self.world > 1:
            torch.distributed.barrier()

    def agree(self, value: int) -> int:
        """Return the first rank's value; all call this."""
        if self.world == 1:
            return value
        shared = torch.tensor([value])
        torch.distributed.broadcast(shared, 0)
        return int(shared.item())


def join_ranks() -> Ranks:
    """Join the processes that torchrun started; alone where it did not."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    local, local_world = (
        int(os.environ.get(name, usual)) for name, usual in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    return Ranks(int(os.environ["RANK"]), world, local, local_world)


def leave_ranks() -> None:
    """Part from the others."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
