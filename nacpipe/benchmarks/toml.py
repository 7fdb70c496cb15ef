"""A user's benchmark from a TOML file (docs/own-benchmark.md): values are read and checked into a record.

Nothing in the file is executed. Unknown keys and values of a wrong type are refused, naming file and key.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from nacpipe.benchmarks.standard import BENCHMARKS, INTERPOLATIONS, Benchmark, Split, Transform, find_benchmark
from nacpipe.benchmarks.synthetic import IMAGE_KINDS
from nacpipe.errors import InputError, first_line
from nacpipe.text import why_reserved

MAX_BYTES, MAX_CLASSES, MAX_SIDE = 1 << 20, 1_000_000, 4096
REQUIRED = ("id/train", "id/val", "id/test")
SOURCES = ("list", "folders", "torchvision")  # of a set's images, one of them
_TRANSFORM = "resize = 256, crop = 224, mean = [0.485, 0.456, 0.406], std = [0.229, 0.224, 0.225]"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_CODE = (
    "root",
    "transform",
    "transforms",
    "target_transform",
    "loader",
    "is_valid_file",
)  # set by nacpipe, or callables


def open_benchmark(name: str) -> Benchmark:
    """Return the benchmark of that name, or the one that a file ending in .toml describes.

    Raises:
        InputError: the name is not known, or the file does not describe a benchmark.
    """
    return read_benchmark(Path(name)) if name.endswith(".toml") else find_benchmark(name)


def choose_root(benchmark: Benchmark, data_root: Path | None) -> Path:
    """Return `data_root`, or the benchmark's data root if it is None."""
    return Path(benchmark.root) if data_root is None else data_root


def read_benchmark(path: Path) -> Benchmark:
    """Read a benchmark file.

    Raises:
        InputError: the file does not exist, is not TOML, or a value is wrong, naming file and key.
    """
    if not path.is_file():
        raise InputError(f"benchmark file {path} is not there")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"benchmark file {path} is larger than {MAX_BYTES >> 20} MiB")
    try:
        content = tomllib.loads(path.read_text("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"benchmark file {path} is not TOML: {first_line(error)}") from None
    return _benchmark(_Table(path, "", content))


class _Table:
    """One table of the file. Each key is taken once; `done` refuses the remaining keys as unknown."""

    def __init__(self, path: Path, key: str, values: Mapping[str, Any]) -> None:
        self.path, self.key, self.values = path, key, dict(values)

    def fail(self, key: str, message: str) -> NoReturn:
        raise InputError(f"{self.path}: {self.dotted(key)}: {message}")

    def dotted(self, key: str) -> str:
        return ".".join(part for part in (self.key, key) if part)

    def take(self, key: str, kind: type | tuple[type, ...], what: str, default: Any = None) -> Any:
        """Take a value of one of these types; true and false do not count as numbers."""
        value = self.values.pop(key, None)
        if value is None:
            if default is None:
                self.fail(key, f"is not there; it must be {what}")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.fail(key, f"is {_show(value)}; it must be {what}")
        return value

    def whole(self, key: str, low: int, high: int) -> int:
        value: int = self.take(key, int, what := f"a whole number from {low} to {high}")
        if not low <= value <= high:
            self.fail(key, f"is {value}; it must be {what}")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        what = "one number per channel, 1 or 3"
        values = self.take(key, list, what)
        good = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
        if len(values) not in (1, 3) or not good:
            self.fail(key, f"is {_show(values)}; it must be {what}")
        return tuple(float(v) for v in values)

    def below(self, key: str, default: str | None = None) -> str:
        """Take a path that stays below the data root."""
        value: str = self.take(key, str, "a path below the root", default)
        if "\0" in value or PurePosixPath(value).is_absolute() or ".." in PurePosixPath(value).parts:
            self.fail(key, f"is {_show(value)}; it must be a path below the root")
        return str(PurePosixPath(value)) if value else ""

    def table(self, key: str) -> _Table:
        values = self.take(key, dict, "a table", {})
        return _Table(self.path, self.dotted(key), values)

    def tables(self) -> Iterator[tuple[str, _Table]]:
        """Yield every named table in this table."""
        for name in list(self.values):
            if not _NAME.fullmatch(name):
                self.fail(name, f"is not a name for a set: {_NAME.pattern}")
            if reason := why_reserved(name):
                self.fail(name, f"is reserved, {reason}; give the set another name")
            yield name, self.table(name)

    def done(self) -> None:
        for key in self.values:
            self.fail(key, "is not known")


def _benchmark(table: _Table) -> Benchmark:
    name = table.take("name", str, "a name")
    if not _NAME.fullmatch(name) or name in BENCHMARKS:
        table.fail("name", f"is {_show(name)}; it must match {_NAME.pattern} and be none of {', '.join(BENCHMARKS)}")
    classes = table.whole("classes", 2, MAX_CLASSES)
    class_names = table.take("class_names", list, "a list of names", [])
    if class_names and (not all(isinstance(n, str) for n in class_names) or len({*class_names}) != len(class_names)):
        table.fail("class_names", "must be different names, the class folders in the order of their labels")
    if class_names and len(class_names) != classes:
        table.fail("class_names", f"has {len(class_names)} names for {classes} classes")
    root = table.take("root", str, "a folder, relative to this file", "")
    if "\0" in root:
        table.fail("root", f"is {_show(root)}; it must be a folder, relative to this file")
    if "transform" not in table.values:
        example = f"write [transform] and, a line each, {_TRANSFORM}"
        table.fail("transform", f"is not there; {example} (docs/own-benchmark.md)")
    transform = _transform(table.table("transform"))
    splits: list[Split] = []
    ids, csid, ood = table.table("id"), table.table("csid"), table.table("ood")
    for part in ("train", "subtrain", "val", "test"):
        if part in ids.values:
            splits.append(_split(f"id/{part}", ids.table(part)))
    ids.done()
    splits += [_split(f"csid/{key}", inner) for key, inner in csid.tables()]
    val = ood.table("val") if "val" in ood.values else None
    if val is not None and "synthetic" not in val.values:
        splits.append(_split("ood/val", val))
    elif id_val := next((split for split in splits if split.name == "id/val"), None):
        kinds = IMAGE_KINDS if val is None else _synthetic(val)
        splits.append(replace(id_val, name="ood/val", synthetic=kinds))
    for part in ("near", "far"):
        splits += [_split(f"ood/{part}/{key}", inner) for key, inner in ood.table(part).tables()]
    ood.done()
    table.done()
    for split in REQUIRED:
        if split not in {s.name for s in splits}:
            table.fail(split.replace("/", "."), "is not there; every benchmark needs " + ", ".join(REQUIRED))
    return Benchmark(
        name=name,
        classes=classes,
        transform=transform,
        splits=tuple(splits),
        root=str(table.path.parent / root),
        class_names=tuple(class_names),
    )


def _synthetic(table: _Table) -> tuple[str, ...]:
    """Take `synthetic`: true for all kinds of synthetic images, or a list of kinds."""
    if given := [kind for kind in SOURCES if kind in table.values]:
        table.fail("", f"has {' and '.join(given)} and synthetic; it needs one of {', '.join(SOURCES)}, synthetic")
    value = table.values.pop("synthetic")
    kinds = list(IMAGE_KINDS) if value is True else value
    known = isinstance(kinds, list) and all(kind in IMAGE_KINDS for kind in kinds)
    if not known or not kinds or len(set(kinds)) != len(kinds):
        table.fail("synthetic", f"is {_show(value)}; it must be true, or a list of {', '.join(IMAGE_KINDS)}")
    table.done()
    return tuple(kinds)


def _transform(table: _Table) -> Transform:
    resize = table.whole("resize", 1, MAX_SIDE)
    crop = table.whole("crop", 1, resize)
    mean, std = table.numbers("mean"), table.numbers("std")
    if len(mean) != len(std):
        table.fail("std", f"has {len(std)} channels, mean has {len(mean)}")
    if min(std) <= 0:
        table.fail("std", f"is {list(std)}; it must be positive")
    interpolation = table.take("interpolation", str, what := f"one of {', '.join(INTERPOLATIONS)}", "bilinear")
    if interpolation not in INTERPOLATIONS:
        table.fail("interpolation", f"is {_show(interpolation)}; it must be {what}")
    table.done()
    return Transform(resize=resize, crop=crop, mean=mean, std=std, interpolation=interpolation)


def _split(name: str, table: _Table) -> Split:
    kinds = [kind for kind in SOURCES if kind in table.values]
    if len(kinds) != 1:
        known = [*SOURCES, *(["synthetic"] if name == "ood/val" else [])]
        table.fail("", f"has {' and '.join(kinds) or 'no source'}; it needs one of {', '.join(known)}")
    common = {
        "name": name,
        "optional": name not in (*REQUIRED, "ood/val"),
        "pre_resized": table.take("pre_resized", bool, "true or false", False),
    }
    if kinds == ["list"]:
        split = Split(kind="list", source=table.below("list"), folder=table.below("folder", ""), **common)
    elif kinds == ["folders"]:
        split = Split(kind="folders", source=table.below("folders"), **common)
    else:
        source = table.take("torchvision", str, "the name of a class in torchvision.datasets")
        if not source.isidentifier() or source.startswith("_"):
            table.fail("torchvision", f"is {_show(source)}; it must be the name of a class in torchvision.datasets")
        folder = table.below("folder", "")
        download = table.take("download", bool, "true or false", False)
        split = Split(
            kind="torchvision", source=source, folder=folder, download=download, arguments=_arguments(table), **common
        )
    table.done()
    return split


def _arguments(table: _Table) -> dict[str, Any]:
    """Take the remaining keys as arguments of torchvision's class: numbers, texts, true, false, and lists of them."""
    arguments = {}
    for key in list(table.values):
        value = table.values.pop(key)
        if key in _CODE:
            table.fail(key, "cannot be given")
        if not all(isinstance(v, str | int | float | bool) for v in (value if isinstance(value, list) else [value])):
            table.fail(key, f"is {_show(value)}; it must be a number, text, true or false, or a list of them")
        arguments[key] = value
    return arguments


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
