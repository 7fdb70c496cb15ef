"""What is said to be there."""

from __future__ import annotations

from pathlib import Path

import pytest

from nacpipe.benchmarks.standard import find_benchmark
from nacpipe.benchmarks.status import SetStatus, read_status
from nacpipe.benchmarks.toml import read_benchmark
from nacpipe.errors import ImageError

CIFAR100 = find_benchmark("cifar100")


def test_every_set_is_looked_at(tmp_path: Path) -> None:
    lists = tmp_path / "benchmark_imglist/cifar100"
    lists.mkdir(parents=True)
    for name in ("train", "val", "test"):
        (lists / f"{name}_cifar100.txt").write_text(f"{name}/0.png 0\n{name}/1.png 1\n")
        (tmp_path / "images_classic" / name).mkdir(parents=True)
    for name in ("train/0", "train/1", "val/1"):
        (tmp_path / f"images_classic/{name}.png").touch()
    found = {s.split: s for s in read_status(CIFAR100, tmp_path)}
    assert list(found) == [split.name for split in CIFAR100.splits]
    first = f"{tmp_path}/images_classic/val/0.png (line 1 of {lists}/val_cifar100.txt)"
    assert found["id/val"] == SetStatus(split="id/val", source="val_cifar100.txt", images=2, missing=1, first=first)
    assert {name: (s.source, s.state, s.complete) for name, s in found.items() if name.startswith("id/")} == {
        "id/train": ("train_cifar100.txt", "complete", True),  # there is no main_train
        "id/subtrain": ("sub_train_cifar100.txt", "no list", False),
        "id/val": ("val_cifar100.txt", "incomplete", False),
        "id/test": ("test_cifar100.txt", "missing", False),
    }
    assert found["ood/near/tin"].first == f"{lists}/test_tin.txt"


def test_nothing_is_there(tmp_path: Path) -> None:
    assert {s.state for s in read_status(CIFAR100, tmp_path / "nowhere")} == {"no list"}


def test_what_is_not_looked_for_says_why(tmp_path: Path) -> None:
    assert {s.state for s in read_status(find_benchmark("digits"), tmp_path)} == {"in Python packages"}
    path = tmp_path / "b.toml"
    path.write_text(
        'name = "b"\nclasses = 2\ntransform = {resize = 8, crop = 8, mean = [0], std = [1]}\n'
        'id = {train = {torchvision = "MNIST"}, val = {folders = "val"}, test = {folders = "test"}}\n'
        'ood = {val = {folders = "ood"}}\n'
    )
    for name in ("val/a/1.png", "val/b/1.png", "ood/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    benchmark = read_benchmark(path)
    assert {s.split: (s.state, s.images) for s in read_status(benchmark, tmp_path)} == {
        "id/train": ("torchvision's, looked for when extracted", 0),
        "id/val": ("complete", 2),
        "id/test": ("no list", 0),
        "ood/val": ("complete", 1),
    }


def test_a_bad_list_is_named(tmp_path: Path) -> None:
    lists = tmp_path / "benchmark_imglist/cifar100"
    lists.mkdir(parents=True)
    (lists / "val_tin.txt").write_text("a.png\n")
    with pytest.raises(ImageError, match=r"^line 1 of .*val_tin\.txt is not 'path label' \(no label\): 'a\.png'$"):
        read_status(CIFAR100, tmp_path)


def test_labels_that_are_no_classes_are_named(tmp_path: Path) -> None:
    """Of ID and csid lists; an OOD list's labels mean nothing."""
    lists = tmp_path / "benchmark_imglist/cifar10"
    lists.mkdir(parents=True)
    (tmp_path / "images_classic").mkdir()
    (tmp_path / "images_classic/a.png").touch()
    for name, text in {
        "val_cifar10.txt": "a.png 0\na.png 10\na.png -1\n",
        "test_cifar10.txt": "a.png 9\n",
        "test_cifar10c.txt": "a.png 3\nb.png {'x': 1}\n",
        "test_mnist.txt": "a.png 12\n",
    }.items():
        (lists / name).write_text(text)
    found = {s.split: s for s in read_status(find_benchmark("cifar10"), tmp_path)}
    image = f"{tmp_path}/images_classic/a.png"
    assert found["id/val"] == SetStatus(
        split="id/val", source="val_cifar10.txt", images=3, missing=0, wrong_labels=2,
        label_problem=f"2 of 3 labels are outside 0 … 9; the first is 10, of {image} (line 2 of {lists}/val_cifar10.txt"
        "); correct the labels, or the benchmark's number of classes",
    )  # fmt: skip
    assert {name: (s.state, s.wrong_labels, s.complete) for name, s in found.items() if s.images} == {
        "id/val": ("wrong labels", 2, True),
        "id/test": ("complete", 0, True),
        "csid/cifar10c": ("wrong labels", 1, False),
        "ood/far/mnist": ("complete", 0, True),
    }
