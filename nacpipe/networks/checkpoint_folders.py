"""Training runs of one network, in OpenOOD's folders: `s0/best.ckpt`, `s1/best.ckpt`, …"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from nacpipe.benchmarks.folders import is_hidden
from nacpipe.errors import CheckpointError

BEST = "best.ckpt"
ONLY = "ckpt.pth"  # OpenOOD's name in a folder with one checkpoint: AugMix, DeepAugment, Stylized, …
_RUN = r"s[0-9]{1,9}"
_SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors", ".th")


def find_runs(folder: Path) -> dict[str, Path]:
    """Return run → checkpoint for a folder of run folders s0, s1, …: best.ckpt, or the only checkpoint in it.

    Raises:
        CheckpointError: there are no run folders, or one of them has several checkpoints or none.
    """
    runs = {name: _checkpoint(folder / name) for name in _run_names(folder)}
    if not runs:
        raise CheckpointError(f"checkpoint {folder} is a folder without run folders s0, s1, …; name a file in it")
    return runs


def find_checkpoint(folder: Path) -> Path:
    """Return the checkpoint of a folder: best.ckpt, ckpt.pth, or the only one in it or in its only run.

    Raises:
        CheckpointError: there is none, or several; if they are in run folders, the message names the runs.
    """
    runs = _run_names(folder)
    if len(runs) > 1:
        raise CheckpointError(
            f"checkpoint {folder} is a folder of {len(runs)} runs, {', '.join(runs[:5])}; name one of them:"
            f" --checkpoint {shlex.quote(str(folder / runs[0]))}"
        )
    return _checkpoint(folder / runs[0] if runs else folder)


def holds_runs(folder: Path) -> bool:
    """Return whether a folder has run folders s0, s1, …"""
    return bool(_run_names(folder))


def name_run(cache: str, run: str) -> str:
    """Return a run's cache: `{run}` replaced, or `-RUN` put before the ending."""
    if "{run}" in cache:
        return cache.replace("{run}", run)
    return f"{cache.removesuffix('.zarr')}-{run}.zarr"


def _run_names(folder: Path) -> list[str]:
    names = (path.name for path in folder.iterdir() if path.is_dir() and re.fullmatch(_RUN, path.name))
    return sorted(names, key=lambda name: int(name[1:]))


def _checkpoint(folder: Path) -> Path:
    for name in (BEST, ONLY):
        if (folder / name).is_file():
            return folder / name
    visible = (path for path in folder.iterdir() if not is_hidden(path.name))
    checkpoints = sorted(path for path in visible if path.suffix in _SUFFIXES and path.is_file())
    if not checkpoints and not re.fullmatch(_RUN, folder.name):
        raise CheckpointError(
            f"checkpoint {folder} is a folder without a checkpoint or run folders s0, s1, …; name a file"
        )
    if len(checkpoints) != 1:
        names = ", ".join(path.name for path in checkpoints) or "none"
        text = f"{folder} has no {BEST}, and not one checkpoint but {len(checkpoints)}: {names}"
        if checkpoints and re.fullmatch(_RUN, folder.name):
            text += f"; leave one in it, or call one {BEST}"
        elif checkpoints:
            text += (
                f"; name one of them: --checkpoint {shlex.quote(str(checkpoints[0]))}; of several training runs put"
                " each into a folder s0, s1, …"
            )
        raise CheckpointError(text)
    return checkpoints[0]
