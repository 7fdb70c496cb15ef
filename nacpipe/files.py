"""Files that are written whole or not at all, locks on files, and where files beside a cache go."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from nacpipe.errors import InputError

if sys.platform != "win32":
    import fcntl

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(address: object) -> bool:
    """Return whether an address is a URL, beside which no files are written."""
    return _URL.match(str(address)) is not None


NEW_FILE = 0o666  # the kernel applies the umask; files of tempfile would be readable by the owner alone


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file atomically: whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    with writing_whole(path) as file:
        file.write(content)


@contextmanager
def writing_whole(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for an atomic write: it appears at the end of the `with` block, unless the block raises.

    Raises:
        InputError: the file cannot be written.
    """
    target = Path(path)
    try:
        draft = target.parent / f".{target.name}.{os.urandom(4).hex()}"
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), NEW_FILE)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
        except BaseException:
            os.unlink(draft)
            raise
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror or error}") from None


def lock_handle(handle: int, *, shared: bool = False, wait: bool = True) -> None:
    """Hold a flock on an open file or folder until it is closed, or its process ends, however it ends. Not on Windows.

    Raises:
        BlockingIOError: another process holds it, and this one does not wait.
        OSError: the file system has no such locks.
    """
    fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


@contextmanager
def lock_file(path: str, *, wait: bool) -> Iterator[None]:
    """Hold an exclusive flock on a lock file, which is made here and removed at the end; nothing on Windows.

    Raises:
        BlockingIOError: another process holds it, and this one does not wait.
    """
    if sys.platform == "win32":
        yield
        return
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, NEW_FILE)
        try:
            lock_handle(handle, wait=wait)
            with suppress(FileNotFoundError):
                if os.path.samestat(Path(path).stat(), os.fstat(handle)):
                    break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the holder before removed the file in the meantime
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)
        os.close(handle)


def check_writable(path: str | Path) -> None:
    """Refuse an output file that cannot be written, before the work for it.

    Raises:
        InputError: its folder does not exist or is not writable.
    """
    folder = Path(path).parent
    if Path(path).is_dir():
        raise InputError(f"{path} cannot be written: it is a folder; name a file in it")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{path} cannot be written: {folder} is not a folder that can be written to")


def beside_cache(cache: str, suffix: str, options: str = "--output FILE") -> Path:
    """Return the file beside a cache: `X.zarr` → `X` + suffix.

    Raises:
        InputError: the cache is at a URL, beside which no files are written; the message names the options to use.
    """
    if is_url(cache):
        raise InputError(f"{cache} is not on this machine, so that no files are written beside it; give {options}")
    path = Path(cache)
    path = path if path.name else path.resolve()
    return path.with_name(path.name.removesuffix(".zarr") + suffix)
