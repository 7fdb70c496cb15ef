"""The images of a split by name: OpenOOD's image lists, and class folders as if they were lists.

A list's lines are `path label`: the path below the split's image folder, the label an integer (−1 for OOD) or a Python
dictionary with a `label`. Order is the list's order; nothing is shuffled, dropped or repeated.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from nacpipe.core.benchmarks import Benchmark, Split
from nacpipe.errors import ImageError, InputError

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
OOD = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageList:
    """Which files a split's images are in, and their labels."""

    source: str
    """The list's file name, or the folder of class folders as the benchmark names it."""
    path: Path
    """Of the list or the folder."""
    folder: Path
    """Where the names start from."""
    names: list[str]
    labels: NDArray[np.int64]
    """(rows,)"""
    sha256: str
    """Of the list's bytes; of a folder, of the list that it would make."""

    def file(self, row: int) -> Path:
        """Return the image file at a position of the list."""
        return self.folder / self.names[row]

    def where(self, row: int) -> str:
        """Return a position's file and line, for people."""
        if self.path.is_dir():
            return str(self.file(row))
        return f"{self.file(row)} (line {row + 1} of {self.path})"

    def missing(self, rows: Iterable[int]) -> list[int]:
        """Return those of the positions whose file is not there."""
        folder = str(self.folder)
        return [row for row in rows if not os.path.isfile(f"{folder}/{self.names[row]}")]


def list_path(benchmark: Benchmark, split: Split, root: Path) -> Path:
    """Return where a split's list, or its folder of class folders, ought to be."""
    return root / (benchmark.lists if split.kind == "list" else split.folder) / split.source


def read_list(benchmark: Benchmark, split: Split, root: Path) -> ImageList | None:
    """Return a split's images by name, or None where its list or folder is not there.

    Where the list is not there, the split's fallback is taken; `source` tells.

    Raises:
        ImageError: the list is malformed, naming file and line; the folder holds no images.
        InputError: a class folder is no class of the benchmark.
    """
    path = list_path(benchmark, split, root)
    if split.kind == "folders":
        return _read_folders(benchmark, split, root) if path.is_dir() else None
    if not path.is_file() and split.fallback:
        path = path.with_name(split.fallback)
    if not path.is_file():
        return None
    content = path.read_bytes()
    names, labels = parse_list(content, str(path))
    source = split.source if path.name == Path(split.source).name else split.fallback
    return ImageList(
        source=source,
        path=path,
        folder=root / split.folder,
        names=names,
        labels=labels,
        sha256=hashlib.sha256(content).hexdigest(),
    )


def parse_list(content: bytes, source: str) -> tuple[list[str], NDArray[np.int64]]:
    """Return the paths and labels (rows,) of an image list.

    Raises:
        ImageError: a line has another form, or its path leaves the image folder; names list and line.
    """
    names: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(read_lines(content, source), start=1):
        name, _, label = line.strip().partition(" ")
        label = label.strip()
        try:
            value = int(label) if _INTEGER.fullmatch(label) and len(label) < 19 else _parse_label(label)
            if abs(value) > 2**31:
                raise ValueError
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise ImageError(f"line {number} of {source} is not 'path label': {line.strip()[:80]!r}") from None
        if name[:1] == "/" or "\0" in name or (".." in name and ".." in PurePosixPath(name).parts):
            raise ImageError(f"line {number} of {source} leaves the image folder: {name[:80]!r}")
        names.append(name)
        labels.append(value)
    if not names:
        raise ImageError(f"{source} lists no images")
    return names, np.asarray(labels, dtype=np.int64)


def read_lines(content: bytes, source: str) -> list[str]:
    """Return a list's lines, empty ones at the end dropped.

    Raises:
        ImageError: it is not text.
    """
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ImageError(f"{source} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _parse_label(text: str) -> int:
    label = ast.literal_eval(text)
    value = label.get("label", OOD) if isinstance(label, dict) else label
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError
    return value


def _read_folders(benchmark: Benchmark, split: Split, root: Path) -> ImageList:
    """Class folders in alphabetical order, their images sorted by path; OOD sets need no class folders."""
    folder = list_path(benchmark, split, root)
    names: list[str] = []
    labels: list[int] = []
    if split.name.startswith("ood/"):
        names = sorted(_walk(folder, ""))
        labels = [OOD] * len(names)
    else:
        classes = _class_names(benchmark, root) or tuple(_folders(folder))
        for name in _folders(folder):
            if name not in classes:
                raise InputError(f"{folder} has a class folder {name!r}, which is none of {_some(classes)}")
            images = sorted(_walk(folder, name))
            names += images
            labels += [classes.index(name)] * len(images)
        if len(classes) != benchmark.classes:
            raise InputError(
                f"{folder} has {len(classes)} class folders ({_some(classes)}), benchmark {benchmark.name} has"
                f" {benchmark.classes} classes; class_names = [...] in its file says which label each has"
            )
    if not names:
        raise ImageError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
    listed = "".join(f"{name} {label}\n" for name, label in zip(names, labels, strict=True))
    return ImageList(
        source=split.source,
        path=folder,
        folder=folder,
        names=names,
        labels=np.asarray(labels, np.int64),
        sha256=hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest(),
    )


def _class_names(benchmark: Benchmark, root: Path) -> tuple[str, ...]:
    """Return the names that labels count, so that a set which lacks a class does not shift the others."""
    train = benchmark.split("id/train")
    folder = list_path(benchmark, train, root)
    if benchmark.class_names or train.kind != "folders" or not folder.is_dir():
        return benchmark.class_names
    return tuple(_folders(folder))


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _walk(folder: Path, below: str) -> Iterator[str]:
    """Yield the image files under folder/below, as paths from `folder`, with forward slashes."""
    for where, _, files in os.walk(folder / below):
        for name in files:
            if PurePosixPath(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield (Path(where) / name).relative_to(folder).as_posix()


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
