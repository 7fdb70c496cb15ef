"""fsync of files and of their folders, so that a power cut cannot reorder writes."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from nacpipe.errors import CacheError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sync_files(files: Iterable[Path], root: Path) -> None:
    """Wait until these files, all below the root, are on the disk, and every folder from theirs up to the root."""
    files, folders = list(files), {root}
    for file in files:
        folder = file.parent
        while folder not in folders:
            folders.add(folder)
            folder = folder.parent
    for path in (*files, *sorted(folders)):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # folders on some file systems
            raise
    finally:
        os.close(handle)


def replace_file(file: Path, content: bytes) -> None:
    """Write a file atomically, with fsync of it and its folder; of two processes at once, one's content stays."""
    draft = file.with_name(f"{file.name}.{os.urandom(8).hex()}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    with draft.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    draft.replace(file)
    _sync(file.parent)  # the new name


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Raise a CacheError for an OSError while a cache is written.

    Raises:
        CacheError: the disk is full, the folder cannot be written, or the store does not exist any more.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in DISK_FULL:
            raise CacheError(
                f"{path}: there is no space left to write it ({reason}); what was written is safe: free some space,"
                " and the same command goes on"
            ) from error
        raise CacheError(
            f"{path} cannot be written ({reason}: {error.filename}); what was written is safe, and the same command"
            " goes on"
        ) from error
