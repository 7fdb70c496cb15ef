"""Folders of images. Class folders, OOD sets and `nacpipe score` follow the same rules:

names that begin with a dot, and __MACOSX     skipped, files and folders alike
links to folders                              followed; a folder that is reached twice is read once
links to a folder that contains them          refused by name
broken links                                  refused by name, unless the link has the suffix of an image
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nacpipe.errors import ImageError

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderImages:
    """The images in a folder, at any depth."""

    names: tuple[str, ...]
    """Paths below the folder, with forward slashes, in alphabetical order."""
    folders: Mapping[str, str]
    """Real path of every folder that was read → the path through which it was reached."""


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is skipped: a dot file, or one that macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def list_folders(folder: Path) -> list[str]:
    """Return the names of the folders, and of the links to folders, in a folder, in alphabetical order.

    Raises:
        ImageError: the folder cannot be read, or a link in it is broken.
    """
    return [entry.name for entry in _scan(folder) if _is_folder(entry)]


def walk_images(folder: Path) -> FolderImages:
    """Find the image files (by suffix) in a folder, at any depth.

    A folder that is reached twice is read under the path that comes first in alphabetical order.

    Raises:
        ImageError: a folder cannot be read, or a link is broken or leads to a folder that contains it.
    """
    names: list[str] = []
    reached: dict[str, str] = {}  # real path → path
    entered_from: dict[str, str] = {}  # real path → real path of the folder in which it was found
    unread = [("", "")]  # (path below the folder, real path of the folder in which it was found)
    while unread:
        below, parent = unread.pop()
        path = folder / below
        real = os.path.realpath(path)
        if real in reached:
            if real in _ancestors(parent, entered_from):
                raise ImageError(
                    f"a link leads to a folder that contains it: {path} is {reached[real]} again; remove the link"
                )
            continue
        reached[real], entered_from[real] = str(path), parent
        subfolders = []
        for entry in _scan(path):
            name = f"{below}/{entry.name}" if below else entry.name
            if _is_folder(entry):
                subfolders.append((name, real))
            elif _is_image(entry.name):
                names.append(name)
        unread += reversed(subfolders)
    return FolderImages(names=tuple(sorted(names)), folders=reached)


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder that are not hidden, in alphabetical order."""
    try:
        with os.scandir(folder) as entries:
            visible = sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise ImageError(f"folder {folder} cannot be read: {error.strerror or error}") from error
    for entry in visible:
        leads_nowhere = entry.is_symlink() and not os.path.exists(entry.path)  # noqa: PTH110 (Path's may raise)
        if leads_nowhere and not _is_image(entry.name):
            raise ImageError(f"link {entry.path} is broken; correct it or remove it")
    return visible


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path)  # noqa: PTH112 (Path's and DirEntry's raise where a link is a loop)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _ancestors(real: str, entered_from: Mapping[str, str]) -> Iterator[str]:
    """Yield a folder and the folders through which it was reached."""
    while real:
        yield real
        real = entered_from[real]
