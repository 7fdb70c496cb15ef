"""Work that is shared out over plain threads.

Numba's own threads are not used and its settings are left as they are: its threading layer is one for the whole
process, and the caller's too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import numba

Result = TypeVar("Result")


def run_in_parts(run: Callable[[int, int], Result], parts: int) -> list[Result]:
    """Call run(0, parts) … run(parts − 1, parts), the first in the caller's thread, and return what each returns."""
    try:
        others = [_helpers().submit(run, part, parts) for part in range(1, parts)]
    except RuntimeError:  # no thread can be started: the process may have no more, or Python is about to exit
        return [run(0, 1)]
    return [run(0, parts), *(other.result() for other in others)]


@cache
def _helpers() -> ThreadPoolExecutor:
    """Threads beside the caller's. A trial takes milliseconds, and here numba's own often woke on one core."""
    return ThreadPoolExecutor(max(_most_threads() - 1, 1), thread_name_prefix="nacpipe")


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_helpers.cache_clear)  # a forked child has none of its parent's threads


def set_threads(threads: int | None) -> None:
    """Let the loops use this many cores (all by default)."""
    global _threads
    _threads = min(threads or _most_threads(), _most_threads())


def get_threads() -> int:
    """Return how many cores the loops use."""
    return _threads


def _most_threads() -> int:
    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


_threads = _most_threads()
