"""Training runs of one network, in OpenOOD's folders: `s0/best.ckpt`, `s1/best.ckpt`, …"""

from __future__ import annotations

import re
from pathlib import Path

from nacpipe.data.folders import is_hidden
from nacpipe.errors import CheckpointError

BEST = "best.ckpt"
_SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors", ".th")


def find_runs(folder: Path) -> dict[str, Path]:
    """Return run → checkpoint for a folder of run folders s0, s1, …: best.ckpt, or the only checkpoint in there.

    Raises:
        CheckpointError: there are no run folders, or one does not say which checkpoint is meant.
    """
    names = (path.name for path in folder.iterdir() if path.is_dir() and re.fullmatch(r"s[0-9]{1,9}", path.name))
    runs = {name: _checkpoint(folder / name) for name in sorted(names, key=lambda name: int(name[1:]))}
    if not runs:
        raise CheckpointError(f"checkpoint {folder} is a folder without run folders s0, s1, …; name a file in it")
    return runs


def name_run(cache: str, run: str) -> str:
    """Return a run's cache: `{run}` replaced, or `-RUN` put before the ending."""
    if "{run}" in cache:
        return cache.replace("{run}", run)
    return f"{cache.removesuffix('.zarr')}-{run}.zarr"


def _checkpoint(folder: Path) -> Path:
    if (folder / BEST).is_file():
        return folder / BEST
    visible = (path for path in folder.iterdir() if not is_hidden(path.name))
    found = sorted(path for path in visible if path.suffix in _SUFFIXES and path.is_file())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(f"{folder} has no {BEST}, and not one checkpoint but {len(found)}: {names}")
    return found[0]
