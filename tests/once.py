"""What is built once for all xdist workers of a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def once(path: Path, build: Callable[[Path], object]) -> Path:
    """Return `path`, which the first worker that asks for it builds while others wait."""
    path.parent.mkdir(exist_ok=True)
    done, claim = path.with_name(f"{path.name}.done"), path.with_name(f"{path.name}.claim")
    while not done.exists():
        try:
            claim.mkdir()
        except FileExistsError:
            time.sleep(0.05)
            continue
        try:
            if not done.exists():
                build(path)
                done.touch()
        finally:
            claim.rmdir()
    return path
