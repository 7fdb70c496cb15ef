"""One extraction at a time: a lock on the cache's folder that the kernel drops with the process that holds it.

    one process        exclusive until it ends
    several ranks      the first exclusive while it creates the store, then all of them shared

so another extraction, which wants it exclusive, is refused while any of them lives, and takes over when all are dead.
Nothing is left in the folder. Readers take no lock. Not guarded: caches at URLs, file systems without flock
(there it is as if nobody held it), and Windows.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from nacpipe.errors import CacheError
from nacpipe.files import is_url, lock_handle


class CacheLock:
    """The right to write a cache."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._guards = sys.platform != "win32" and not is_url(path)
        self._handle: int | None = None

    def take(self) -> None:
        """Take it for this process alone; the cache's folder is made where there is none.

        Raises:
            CacheError: another process has it.
        """
        if not self._guards or self.path.is_file():  # what is in the way is the writer's to say
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock(shared=False)

    def share(self) -> None:
        """Share it with the other ranks, instead of holding it alone where this process did.

        Raises:
            CacheError: another extraction has it.
        """
        if self._guards and self.path.is_dir():
            self._lock(shared=True)

    def _lock(self, *, shared: bool) -> None:
        if self._handle is None:
            self._handle = os.open(self.path, os.O_RDONLY)
        try:
            lock_handle(self._handle, shared=shared, wait=False)
        except BlockingIOError:
            raise CacheError(
                f"{self.path} is being written by another extract; wait until it ends (a dead one holds nothing)"
            ) from None
        except OSError:  # a file system without such locks
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
