"""Several processes on one cache, as started by torchrun.

    id/train        id/val     ood/val         the units (blocks, or shards of them) of all splits, one after another
    0 1 2 3 4 5 6 │ 0 1 2 │ 3  0 1 2 3 4       each rank writes a contiguous part of them, of about the same rows
    rank 0          rank 1  │  rank 2          rank 0 creates all splits first; no rank waits for another until the end

Units are counted over all ranks when they are written. The rank that writes a split's last unit seals it, so one rank
does. Batches never cross a block, so the finished cache equals the one that a single process writes, value for value.
"""

from __future__ import annotations

import datetime
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch.distributed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from nacpipe.errors import CacheError, first_line
from nacpipe.extraction.place import Place, read_local, read_place

Unit = TypeVar("Unit")

NOTE_SECONDS = 30.0  # of waiting for other ranks
TIMEOUT = datetime.timedelta(days=7)  # one rank may have much more work than another


@dataclass(frozen=True, slots=True)
class Ranks(Place):
    """This process among those that torchrun started."""

    store: Store | None = field(default=None, compare=False, repr=False)
    """What the ranks count in; None for one alone."""
    group: Any = field(default=None, compare=False, repr=False)
    """torch's process group of these processes; None: the default one."""

    def share(self, units: Sequence[Unit], rows: Sequence[int]) -> Sequence[Unit]:
        """Return this rank's contiguous part of the units: those whose middle row lies in its part of all rows.

        Args:
            units: of all ranks, in order.
            rows: of each unit, at least one.
        """
        ends = np.cumsum(np.asarray(rows, np.int64))
        twice_middles = 2 * ends - np.asarray(rows, np.int64)  # twice: of whole numbers
        owners = twice_middles * self.world // (2 * ends[-1:])
        start, stop = np.searchsorted(owners, [self.rank, self.rank + 1])
        return units[int(start) : int(stop)]

    def wait(self) -> None:
        """Wait until all ranks have called this.

        Raises:
            CacheError: another rank is gone.
        """
        if self.world > 1:
            with _with_others():
                torch.distributed.barrier(self.group)

    def meet(self, note: Callable[[str], None]) -> None:
        """Wait until all ranks have called this; a note says so where it takes long."""
        if self.world == 1:
            return
        with _with_others():
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
        """Return rank 0's value; all ranks must call this.

        Raises:
            CacheError: another rank is gone.
        """
        if self.world == 1:
            return value
        shared = torch.tensor([value])
        with _with_others():
            torch.distributed.broadcast(shared, 0, group=self.group)
        return int(shared.item())


class WrittenUnits:
    """The number of written units of each split, over all ranks."""

    def __init__(self, ranks: Ranks, extraction: object) -> None:
        """Begin to count.

        Args:
            ranks: this process among those that count.
            extraction: the same for all of them, and for no other extraction of theirs: a store may outlive one.
        """
        self._store = None if ranks.store is None else PrefixStore(f"written/{extraction}", ranks.store)
        self._counts: Counter[str] = Counter()  # of a rank alone
        self._lock = threading.Lock()

    def add(self, split: str) -> int:
        """Count one more unit of a split and return the number; no two ranks get the same.

        Raises:
            CacheError: the process that counts is gone.
        """
        if self._store is not None:
            with _with_others():
                return self._store.add(split, 1)
        with self._lock:
            self._counts[split] += 1
            return self._counts[split]


@contextmanager
def _with_others() -> Iterator[None]:
    """Say in words that another process is gone, which torch raises as a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise CacheError(
            f"another process of this extraction ended early ({first_line(error)}); what all of them wrote stays, and"
            " the same command goes on"
        ) from error


def join_ranks() -> Ranks:
    """Join the processes that torchrun started; without torchrun, return a single rank."""
    ranks = Ranks(*astuple(read_place()))
    if ranks.alone:
        return ranks
    store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    if ranks.local_world == ranks.world:  # torchrun --max-restarts keeps its store, with the addresses of ranks gone
        store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    torch.distributed.init_process_group(
        "gloo",
        store=PrefixStore("group", store),
        rank=ranks.rank,
        world_size=ranks.world,
        timeout=TIMEOUT,
    )
    _own_group[:] = [(torch.distributed.group.WORLD, None, PrefixStore("nacpipe", store))]
    return replace(ranks, store=_own_group[0][2])


_own_group: list[tuple[Any, Any, Store]] = []
"""A program's process group, ours beside it and what we count in: made once for all extractions of a program."""

_extractions = itertools.count()


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
        joined = join_ranks()
        return joined if joined.alone else replace(joined, store=_count_anew())
    if (world := torch_distributed.get_world_size()) == 1:
        return Ranks()
    default = torch_distributed.group.WORLD
    if not (_own_group and _own_group[0][0] is default):  # theirs may be nccl's, or give up after minutes
        store = PrefixStore("nacpipe", torch_distributed.distributed_c10d._get_default_store())
        _own_group[:] = [(default, torch_distributed.new_group(backend="gloo", timeout=TIMEOUT), store)]
    return Ranks(torch_distributed.get_rank(), world, *read_local(), group=_own_group[0][1], store=_count_anew())


def _count_anew() -> Store:
    """Return what one extraction counts in; all ranks make their extractions in one order."""
    return PrefixStore(f"extraction {next(_extractions)}", _own_group[0][2])


def leave_ranks() -> None:
    """Destroy the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
