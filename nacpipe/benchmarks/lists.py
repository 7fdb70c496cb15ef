"""The images of a split by name: OpenOOD's image lists, and class folders in the same form.

A list's lines are `path label`, split at the last blank (space or tab): the path below the split's image folder, the
label an integer (−1 for OOD) or a Python dictionary with a `label`. Order is the list's order; nothing is shuffled,
dropped or repeated.
"""

from __future__ import annotations

import ast
import codecs
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from nacpipe.benchmarks.folders import SUFFIXES, list_folders, walk_images
from nacpipe.benchmarks.standard import Benchmark, Split
from nacpipe.errors import ImageError, InputError
from nacpipe.method.metrics import find_wrong_labels

BLANKS = " \t\r"  # around a line, and between path and label; a path may contain other white space
_USUAL = re.compile(
    r"([^ \t\r\0]+) (-1|0|[1-9][0-9]{0,8})"
)  # the usual form, matched at once: lists have up to a million lines
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
_BEFORE_DICTIONARY = re.compile(r"[ \t]+(?=\{)")
OOD = -1
NUMBER = "the benchmark's number of classes"  # what may be wrong where labels are


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageList:
    """The files of a split's images, and the labels."""

    source: str
    """The list's file name, or the folder of class folders as the benchmark names it."""
    path: Path
    """Path of the list or the folder."""
    folder: Path
    """The folder that `names` are relative to."""
    names: list[str]
    labels: NDArray[np.int64]
    """(rows,)"""
    sha256: str
    """Digest of the list's bytes; for a folder, of the equivalent list."""

    def file(self, row: int) -> Path:
        """Return the image file at a position of the list."""
        return self.folder / self.names[row]

    def where(self, row: int) -> str:
        """Return a position's file and line, for messages."""
        if self.path.is_dir():
            return str(self.file(row))
        return f"{self.file(row)} (line {row + 1} of {self.path})"

    def missing(self, rows: Iterable[int]) -> list[int]:
        """Return the positions whose file does not exist."""
        folder = str(self.folder)
        return [row for row in rows if not os.path.isfile(f"{folder}/{self.names[row]}")]


def list_path(benchmark: Benchmark, split: Split, root: Path) -> Path:
    """Return the path of a split's list, or of its folder of class folders."""
    return root / (benchmark.lists if split.kind == "list" else split.folder) / split.source


def read_list(benchmark: Benchmark, split: Split, root: Path) -> ImageList | None:
    """Return a split's images by name, or None if its list or folder does not exist.

    If the list does not exist, the split's fallback is read; `source` names the file that was read.

    Raises:
        ImageError: the list is malformed, naming file and line; the folder holds no images.
        InputError: a class folder is not a class of the benchmark.
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
        ImageError: a line has another form, or its path leaves the image folder; names list, line and reason.
    """
    names: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(read_lines(content, source), start=1):
        try:
            name, label = _parse_line(line.strip(BLANKS))
        except ValueError as error:
            shown = line.strip(BLANKS)[:80]
            raise ImageError(f"line {number} of {source} is not 'path label' ({error}): {shown!r}") from None
        if name[:1] == "/" or (".." in name and ".." in PurePosixPath(name).parts):
            raise ImageError(f"line {number} of {source} leaves the image folder: {name[:80]!r}")
        names.append(name)
        labels.append(label)
    if not names:
        raise ImageError(f"{source} lists no images")
    return names, np.asarray(labels, dtype=np.int64)


def read_lines(content: bytes, source: str) -> list[str]:
    """Return a list's lines, without a byte-order mark and without the empty lines at the end.

    Raises:
        ImageError: a line is not UTF-8 text.
    """
    text = content.removeprefix(codecs.BOM_UTF8)
    try:
        lines = text.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        line, byte = text.count(b"\n", 0, error.start) + 1, error.start + len(content) - len(text)
        raise ImageError(f"line {line} of {source} is not UTF-8 text: {error.reason} at byte {byte}") from None
    while lines and not lines[-1].strip(BLANKS):
        lines.pop()
    return lines


def check_labels(
    split: str,
    labels: NDArray[np.int64],
    classes: int,
    where: Callable[[int], str],
    number: str = NUMBER,
) -> None:
    """Refuse labels (rows,) of an ID or csid split that are not classes; labels of OOD splits are not checked.

    Args:
        split: the split's name.
        labels: one for each image.
        classes: number of classes of the benchmark.
        where: row → a description of the image, for the message.
        number: what may be wrong in place of the labels.

    Raises:
        InputError: counts the labels outside 0 … classes − 1 and names the first.
    """
    if split.startswith("ood/"):
        return
    if problem := describe_wrong_labels(labels, classes, where, number):
        raise InputError(f"{split}: {problem}")


def describe_wrong_labels(
    labels: NDArray[np.int64], classes: int, where: Callable[[int], str], number: str = NUMBER
) -> str:
    """Return how many labels (rows,) are not classes, the first, and what to do; empty where all are.

    Args:
        labels: one for each image of an ID or csid split.
        classes: number of classes of the benchmark.
        where: row → a description of the image.
        number: what may be wrong in place of the labels.
    """
    wrong = find_wrong_labels(labels, classes)
    if not wrong.size:
        return ""
    first = int(wrong[0])
    remedy = f"correct the labels, or {number}"
    if (labels == OOD).all():
        remedy = (
            f"{OOD} marks OOD images, an ID image has its class; without labels, write the classes that the network"
            " predicts (docs/own-benchmark.md, Labels)"
        )
    return (
        f"{wrong.size} of {labels.size} labels are outside 0 … {classes - 1}; the first is {labels[first]}, of"
        f" {where(first)}; {remedy}"
    )


def _parse_line(line: str) -> tuple[str, int]:
    """Return path and label of a line.

    Raises:
        ValueError: the line is malformed; the message is the reason.
    """
    if usual := _USUAL.fullmatch(line):
        return usual[1], int(usual[2])
    if not line:
        raise ValueError("it is empty")
    if line[-1] == "}":
        name, label = _split_dictionary(line)
    elif (blank := max(line.rfind(" "), line.rfind("\t"))) < 0:
        raise ValueError("no label")
    else:
        name, label = line[:blank].rstrip(BLANKS), _read_integer(line[blank + 1 :])
    if "\0" in name:
        raise ValueError("its path has a NUL character; is it UTF-16?")
    if "\r" in name:
        raise ValueError("its path has a carriage return; lines end in LF or CRLF")
    if abs(label) > 2**31:
        raise ValueError("its label is too large")
    return name, label


def _split_dictionary(line: str) -> tuple[str, int]:
    for blanks in _BEFORE_DICTIONARY.finditer(line):
        try:
            entries = ast.literal_eval(line[blanks.end() :])
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(entries, dict):
            value = entries.get("label", OOD)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError("the 'label' of its dictionary is not an integer")
            return line[: blanks.start()], value
    raise ValueError("no label: the text that ends in } is not a dictionary")


def _read_integer(text: str) -> int:
    """Return the integer that a text denotes in Python."""
    if _INTEGER.fullmatch(text) and len(text) < 19:
        return int(text)
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        value = None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"label {text[:40]!r} is not an integer")
    return value


def _read_folders(benchmark: Benchmark, split: Split, root: Path) -> ImageList:
    """Read class folders in alphabetical order, their images sorted by path; OOD sets need no class folders."""
    folder = list_path(benchmark, split, root)
    names: list[str] = []
    labels: list[int] = []
    if split.name.startswith("ood/") and not split.synthetic:
        names += walk_images(folder).names
        labels = [OOD] * len(names)
    else:
        classes = _class_names(benchmark, root) or tuple(list_folders(folder))
        reached: dict[str, str] = {}  # real path → path, of all classes
        for name in list_folders(folder):
            if name not in classes:
                raise InputError(f"{folder} has a class folder {name!r}, which is none of {_shorten(classes)}")
            images = walk_images(folder / name)
            for real, path in images.folders.items():
                if real in reached:
                    raise InputError(f"{path} and {reached[real]} are one folder, in two classes; remove a link")
                reached[real] = path
            names += [f"{name}/{image}" for image in images.names]
            labels += [classes.index(name)] * len(images.names)
        if not names and (flat := walk_images(folder).names):
            raise InputError(
                f"{split.name}: {folder} has no class folders, its {len(flat)} images lie directly in it, so they have"
                ' no labels; in the benchmark\'s file write list = "FILE" in place of folders, a list of lines `path'
                f" label`, such as `{flat[0]} 0` (docs/own-benchmark.md, Labels)"
            )
        if len(classes) != benchmark.classes:
            raise InputError(
                f"{folder} has {len(classes)} class folders ({_shorten(classes)}), benchmark {benchmark.name} has"
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
    """Return the class names in the order of their labels, so that a set without one class keeps the others' labels."""
    train = benchmark.split("id/train")
    folder = list_path(benchmark, train, root)
    if benchmark.class_names or train.kind != "folders" or not folder.is_dir():
        return benchmark.class_names
    return tuple(list_folders(folder))


def _shorten(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
