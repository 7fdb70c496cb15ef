"""A step of the library on a network of any kind, which SIGKILL ends halfway (test_any_network.py).

python -m tests.killed_steps extract text FOLDER      after a few batches
python -m tests.killed_steps tune text FOLDER         after a few trials

The network's weights are in FOLDER/network.pt, the cache is FOLDER/x.zarr.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import nacpipe
from nacpipe.tuning.storage import Journal
from tests import networks_of_any_kind
from tests.networks_of_any_kind import Kind

EXTRACT: dict[str, Any] = {"batch_size": 8, "block_rows": 16, "progress": False}
TUNE: dict[str, Any] = {"space": "paper", "trials": 12, "threads": 1, "progress": False}
BATCHES, LINES = 7, 8  # after which it is killed: in the second block of four; in the middle of twelve trials


class Killer:
    """Kills this process when it was called so many times."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def load(name: str, folder: Path) -> Kind:
    """Return a kind with the weights that another process trained."""
    networks_of_any_kind.train = lambda network, *_: network.eval()
    kind = networks_of_any_kind.KINDS[name]()
    kind.network.load_state_dict(torch.load(folder / "network.pt", weights_only=True))
    return kind


def main(step: str, name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if step == "extract":
        kind = load(name, folder)
        options = {**EXTRACT, **kind.options, "progress": Killer(BATCHES)}
        nacpipe.extract(kind.network, kind.splits, folder / "x.zarr", **options)
        return
    append_logs, killer = Journal.append_logs, Killer(LINES)

    def append(journal: Journal, logs: list[dict[str, Any]]) -> None:
        append_logs(journal, logs)
        killer()

    Journal.append_logs = append  # type: ignore[method-assign]
    nacpipe.tune(folder / "x.zarr", **TUNE)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
