"""What must be on the disk before something else is, when the power may go: files, and the folders that name them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from nacpipe.errors import CacheError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sync_files(files: Iterable[Path], root: Path) -> None:
    """Wait until these files are on the disk, and every folder from theirs up to the root."""
    files = list(files)
    folders = {folder for file in files for folder in file.parents if folder == root or root in folder.parents}
    for path in (*files, *sorted(folders)):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # folders on some file systems
                raise
        finally:
            os.close(handle)


def replace_file(file: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    draft = file.with_name(f"{file.name}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    with draft.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    draft.replace(file)


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Dress what the operating system says while a cache is written.

    Raises:
        CacheError: the disk is full, the folder cannot be written, or the store is gone.
    """
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        if error.errno in FULL:
            raise CacheError(
                f"{path}: there is no room left to write it ({what}); what was written is safe: make room, and the"
                " same command goes on"
            ) from error
        raise CacheError(
            f"{path} cannot be written ({what}: {error.filename}); what was written is safe, and the same command goes"
            " on"
        ) from error
