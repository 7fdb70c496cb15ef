"""Cutting a train list: the authors' rule by hand, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nacpipe.benchmarks.standard import find_benchmark
from nacpipe.benchmarks.train_split import plan_split, write_split
from nacpipe.errors import ImageError, InputError

CIFAR10 = find_benchmark("cifar10")

# Class 3 comes first, then 0; RandomState(1).shuffle of four lines gives the order 3, 2, 0, 1 (that of
# numpy.random.RandomState(1), which never changes), and of five 2, 1, 4, 0, 3.
TRAIN = "a.png 3\nb.png 0\nc.png 3\nd.png 0\ne.png 3\nf.png 0\ng.png 3\nh.png 0\ni.png 0\n"
SUB = "g.png 3\nf.png 0\n"
MAIN = "e.png 3\na.png 3\nc.png 3\nd.png 0\ni.png 0\nb.png 0\nh.png 0\n"


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmark_imglist/cifar10"
    folder.mkdir(parents=True)
    (folder / "train_cifar10.txt").write_text(TRAIN)
    return folder


@pytest.mark.parametrize("count", [2, 3])
def test_the_rule_by_hand(lists: Path, tmp_path: Path, count: int) -> None:
    write_split(plan_split(CIFAR10, tmp_path, count, seed=1))
    assert (lists / "sub_train_cifar10.txt").read_text() == SUB
    assert (lists / "main_train_cifar10.txt").read_text() == MAIN
    assert sorted(path.name for path in lists.iterdir()) == [
        "main_train_cifar10.txt",
        "sub_train_cifar10.txt",
        "train_cifar10.txt",
    ]


def test_the_two_lists_are_the_train_list(lists: Path, tmp_path: Path) -> None:
    rng = np.random.RandomState(0)
    lines = [f"{i}.png {label}" for i, label in enumerate(rng.permutation(np.repeat(np.arange(10), 30)))]
    (lists / "train_cifar10.txt").write_text("\r\n".join(lines) + "\r\n\n")
    split = plan_split(CIFAR10, tmp_path, 100, seed=5)
    assert sorted(split.main_lines + split.sub_lines) == sorted(lines)
    assert len(split.sub_lines) == 100
    assert [sum(line.endswith(f" {label}") for line in split.sub_lines) for label in range(10)] == [10] * 10
    assert split != plan_split(CIFAR10, tmp_path, 100, seed=6)


def test_lists_that_are_there_are_kept_unless_forced(lists: Path, tmp_path: Path) -> None:
    split = plan_split(CIFAR10, tmp_path, 2, seed=1)
    (lists / "main_train_cifar10.txt").write_text("mine.png 0\n")
    with pytest.raises(InputError, match=r"^\S*/main_train_cifar10\.txt exists; --redo replaces both lists \("):
        write_split(split)
    assert not (lists / "sub_train_cifar10.txt").exists()
    write_split(split, redo=True)
    assert (lists / "main_train_cifar10.txt").read_text() == MAIN
    with pytest.raises(InputError, match=r"main_train_cifar10\.txt and \S*/sub_train_cifar10\.txt exist; --redo"):
        write_split(split)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (1, r"^count is 1; it must be at least 1 for each of train_cifar10\.txt's 2 classes$"),
        (-5, r"^count is -5; it must be at least 1"),
        (8, r"^count is 8, 4 of each class, but class 3 has only 4 lines in .*train_cifar10\.txt$"),
    ],
)
def test_counts_that_do_not_fit(lists: Path, tmp_path: Path, count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_split(CIFAR10, tmp_path, count, seed=1)


def test_what_cannot_be_cut(tmp_path: Path) -> None:
    message = r"^there is no image list .*/train_cifar10\.txt; say where the data is with --data-root DIR$"
    with pytest.raises(ImageError, match=message):
        plan_split(CIFAR10, tmp_path, 10, seed=1)
    with pytest.raises(
        InputError, match=r"^benchmark digits has no train list to split: its id/train is main_train as"
    ):
        plan_split(find_benchmark("digits"), tmp_path, 10, seed=1)


def test_the_cut_lists_are_what_extraction_reads(lists: Path, tmp_path: Path) -> None:
    split = plan_split(CIFAR10, tmp_path, 2, seed=1)
    assert split.main.name == CIFAR10.split("id/train").source
    assert split.sub.name == CIFAR10.split("id/subtrain").source


@pytest.mark.parametrize(("label", "line"), [(-1, 3), (10, 1)])
def test_a_train_list_with_labels_that_are_no_classes_is_not_cut(
    lists: Path, tmp_path: Path, label: int, line: int
) -> None:
    lines = TRAIN.splitlines()
    lines[line - 1] = f"x.png {label}"
    (lists / "train_cifar10.txt").write_text("\n".join(lines))
    message = (
        rf"^id/train: 1 of 9 labels are outside 0 … 9; the first is {label}, of line {line} of .*/train_cifar10\.txt"
    )
    with pytest.raises(InputError, match=message):
        plan_split(CIFAR10, tmp_path, 2, seed=1)


def test_a_list_of_another_editor_is_cut_line_by_line(lists: Path, tmp_path: Path) -> None:
    """The byte-order mark stays with no line, a path keeps its blanks, and both lists are read again."""
    text = TRAIN.replace("a.png", "my a.png").replace("\n", "\r\n")
    (lists / "train_cifar10.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    write_split(plan_split(CIFAR10, tmp_path, 2, seed=1))
    assert (lists / "sub_train_cifar10.txt").read_text() == SUB
    assert (lists / "main_train_cifar10.txt").read_text() == MAIN.replace("a.png", "my a.png")
