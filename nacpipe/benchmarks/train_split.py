"""Split a train list in two: main_train, for the coverage, and sub_train, for the overfitting check."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nacpipe.benchmarks.lists import BLANKS, check_labels, list_path, parse_list, read_lines
from nacpipe.benchmarks.standard import Benchmark
from nacpipe.errors import ImageError, InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSplit:
    """The two lists that a train list is split into."""

    main: Path
    sub: Path
    main_lines: tuple[str, ...]
    sub_lines: tuple[str, ...]


def plan_split(benchmark: Benchmark, root: Path, count: int, seed: int) -> TrainSplit:
    """Split the benchmark's train list as the authors do; writes nothing.

    Per class, in order of first appearance, a newly seeded RandomState shuffles the lines; the first count // classes
    go to sub_train, the others to main_train, class after class.

    Raises:
        InputError: the benchmark has no train list to split, a label is not a class, or the count does not fit.
        ImageError: the list does not exist or is malformed.
    """
    train = benchmark.split("id/train")
    if not train.fallback:
        raise InputError(
            f"benchmark {benchmark.name} has no train list to split: its id/train is {train.source} as it stands"
        )
    main = list_path(benchmark, train, root)
    sub = list_path(benchmark, benchmark.split("id/subtrain"), root)
    path = main.with_name(train.fallback)
    if not path.is_file():
        raise ImageError(f"there is no image list {path}; say where the data is with --data-root DIR")
    content = path.read_bytes()
    _, labels = parse_list(content, str(path))
    check_labels(train.name, labels, benchmark.classes, lambda row: f"line {row + 1} of {path}")
    lines = [line.strip(BLANKS) for line in read_lines(content, str(path))]
    by_class: dict[int, list[str]] = {}
    for line, label in zip(lines, labels.tolist(), strict=True):
        by_class.setdefault(label, []).append(line)
    each = count // len(by_class)
    if each < 1:
        raise InputError(f"count is {count}; it must be at least 1 for each of {path.name}'s {len(by_class)} classes")
    main_lines: list[str] = []
    sub_lines: list[str] = []
    for label, class_lines in by_class.items():
        if len(class_lines) <= each:
            raise InputError(
                f"count is {count}, {each} of each class, but class {label} has only {len(class_lines)} lines in {path}"
            )
        np.random.RandomState(seed).shuffle(class_lines)
        sub_lines += class_lines[:each]
        main_lines += class_lines[each:]
    return TrainSplit(main=main, sub=sub, main_lines=tuple(main_lines), sub_lines=tuple(sub_lines))


def write_split(split: TrainSplit, redo: bool = False) -> None:
    """Write both lists, each whole or not at all.

    Raises:
        InputError: one of them exists and `redo` is false.
    """
    existing = [str(path) for path in (split.main, split.sub) if path.exists()]
    if existing and not redo:
        raise InputError(
            f"{' and '.join(existing)} {'exists' if len(existing) == 1 else 'exist'}; --redo replaces both"
            " lists (a cache made from the old lists cannot be continued)"
        )
    for path, lines in ((split.sub, split.sub_lines), (split.main, split.main_lines)):
        draft = path.with_name(f"{path.name}.new")
        draft.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
        os.replace(draft, path)
