"""The lock of a cache's folder, for one extraction at a time. The kernel releases it when its process ends.

    one process        exclusive until it ends
    several ranks      the first exclusive while it creates the store, then all of them shared

Another extraction needs the exclusive lock. It is refused while any of these processes runs and succeeds when all have
ended. No file is left in the folder. Readers take no lock. There is no protection for caches at URLs, on file systems
without flock, and on Windows; there every process gets the lock.
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
    """The lock that a writer of a cache holds."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._enabled = sys.platform != "win32" and not is_url(path)
        self._handle: int | None = None

    def take(self) -> None:
        """Take the lock exclusively; the cache's folder is created if it does not exist.

        Raises:
            CacheError: another process holds it.
        """
        if not self._enabled or self.path.is_file():  # the writer refuses a file at this path
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock(shared=False)

    def share(self) -> None:
        """Share the lock with the other ranks; an exclusive lock of this process becomes a shared one.

        Raises:
            CacheError: another extraction holds it.
        """
        if self._enabled and self.path.is_dir():
            self._lock(shared=True)

    def _lock(self, *, shared: bool) -> None:
        if self._handle is None:
            self._handle = os.open(self.path, os.O_RDONLY)
        try:
            lock_handle(self._handle, shared=shared, wait=False)
        except BlockingIOError:
            raise CacheError(
                f"{self.path} is being written by another extract; wait until it ends (a killed one holds no lock)"
            ) from None
        except OSError:  # a file system without such locks
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
