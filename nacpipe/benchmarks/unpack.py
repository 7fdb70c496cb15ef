"""Unpack a zip archive that is not trusted."""

from __future__ import annotations

import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from nacpipe.errors import DownloadError

_PIECE = 1 << 20  # bytes


class BrokenArchive(DownloadError):
    """The file is not a complete zip archive, or not safe to unpack; another download may be."""


def unpack(archive: Path, folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Unpack a zip archive into a new folder. Nothing is written outside of it, and links are refused.

    Raises:
        BrokenArchive: the file is not a zip archive, is damaged, or has a path that leaves the folder.
        DownloadError: the disk has too little space.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = [entry for entry in opened.infolist() if not entry.is_dir()]
            for entry in opened.infolist():
                _check_name(archive, entry)
            total = sum(entry.file_size for entry in entries)
            folder.mkdir(parents=True)
            if total > (free := shutil.disk_usage(folder).free):
                raise DownloadError(f"{archive} needs {total >> 20} MiB unpacked, {folder.parent} has {free >> 20} MiB")
            done = 0
            for entry in entries:
                target = folder / entry.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(entry) as source, target.open("wb") as file:
                    while piece := source.read(_PIECE):
                        file.write(piece)
                        done += len(piece)
                        progress(done, total)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise BrokenArchive(f"{archive} is not a complete zip archive: {str(error) or type(error).__name__}") from error


def _check_name(archive: Path, entry: zipfile.ZipInfo) -> None:
    path = PurePosixPath(entry.filename)
    leaves = path.is_absolute() or ".." in path.parts or "\\" in entry.filename
    if leaves or stat.S_ISLNK(entry.external_attr >> 16):
        raise BrokenArchive(f"{archive} is not safe to unpack: {entry.filename[:80]!r} leaves its folder or is a link")
