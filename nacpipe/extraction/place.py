"""This process's place among those that a launcher started, from its environment variables; no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from nacpipe.errors import InputError


@dataclass(frozen=True, slots=True)
class Place:
    """Which of several processes this is; `rank` is torch's word."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """The rank among the processes on this machine; selects the GPU."""
    local_world: int = 1
    """Number of processes on this machine."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which creates the cache and its splits."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.world == 1


def read_place() -> Place:
    """Return this process's place among those that torchrun, or another launcher, started; they are not joined.

    Raises:
        InputError: WORLD_SIZE is there, and RANK is not or does not fit it.
    """
    world, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "")
    if world == "1":
        return Place()
    if not (world.isdecimal() and rank.isdecimal() and int(rank) < int(world)):
        raise InputError(
            f"WORLD_SIZE is {world!r} and RANK is {rank!r}: give each of several processes its own RANK, from 0 to"
            " WORLD_SIZE - 1, as torchrun does, or unset both"
        )
    return Place(int(rank), int(world), *read_local())


def read_local() -> tuple[int, int]:
    """Return the rank among the processes on this machine, and their number.

    Raises:
        InputError: the two do not fit.
    """
    local, world = os.environ.get("LOCAL_RANK", "0"), os.environ.get("LOCAL_WORLD_SIZE")
    if world is None and local.isdecimal():  # other launchers than torchrun
        return int(local), 1
    if not (local.isdecimal() and world and world.isdecimal() and int(local) < int(world)):
        raise InputError(
            f"LOCAL_RANK is {local!r} and LOCAL_WORLD_SIZE is {world!r}: give each process of a machine its own"
            " LOCAL_RANK, from 0 to LOCAL_WORLD_SIZE - 1, as torchrun does, or unset both"
        )
    return int(local), int(world)
