"""torchvision's data sets by name; FakeData and small files of our own, nothing is downloaded."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image

from nacpipe.benchmarks.standard import Benchmark, Split, Transform
from nacpipe.errors import ImageError, InputError
from nacpipe.extraction.dataset import ImageSet, open_images
from nacpipe.extraction.torchvision_sets import open_vision

pytestmark = pytest.mark.usefixtures("one_thread")


def vision(name: str, source: str, folder: str = "", download: bool = False, **arguments: Any) -> Split:
    return Split(name=name, source=source, kind="torchvision", folder=folder, download=download, arguments=arguments)


def fake(name: str = "id/val", **arguments: Any) -> Split:
    return vision(name, "FakeData", **{"size": 12, "image_size": [3, 8, 8], "num_classes": 3, **arguments})


def opened(split: Split, root: Path) -> ImageSet:
    transform = Transform(resize=8, crop=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    benchmark = Benchmark(name="own", classes=3, transform=transform, splits=(split,))
    images = open_images(benchmark, split, root, train_images=6, train_seed=1)
    assert images is not None
    return images


def write_mnist(folder: Path, labels: list[int]) -> None:
    raw = folder / "MNIST/raw"
    raw.mkdir(parents=True)
    pixels = np.arange(len(labels) * 784, dtype=np.uint8)
    for part in ("train", "t10k"):
        images = struct.pack(">IIII", 2051, len(labels), 28, 28) + pixels.tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(labels)) + bytes(labels))
        for name in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(b""))


def test_images_and_labels_are_torchvisions(tmp_path: Path) -> None:
    write_mnist(tmp_path / "m", [3, 1, 2])
    images = opened(vision("id/val", "MNIST", "m", train=False), tmp_path)
    dataset = torchvision.datasets.MNIST(tmp_path / "m", train=False)
    assert images.labels.tolist() == [3, 1, 2]
    assert (np.asarray(images.open(2)) == np.asarray(dataset[2][0])).all()
    assert images.missing() == []
    images.check(images.index)


def test_labels_that_are_not_apart_are_read_one_by_one(tmp_path: Path) -> None:
    dataset = torchvision.datasets.FakeData(12, (3, 8, 8), 3)
    assert opened(fake(), tmp_path).labels.tolist() == [int(dataset[i][1]) for i in range(12)]


def test_identity_tells_class_arguments_length_and_labels(tmp_path: Path) -> None:
    one = opened(fake(), tmp_path).identity()
    assert one["list"] == "FakeData"
    assert one["arguments"] == {"size": 12, "image_size": [3, 8, 8], "num_classes": 3}
    assert one["length"] == 12
    assert one == opened(fake(), tmp_path / "elsewhere").identity()
    other = opened(fake(random_offset=7), tmp_path).identity()
    assert other["sha256"] != one["sha256"]
    assert opened(fake("id/train"), tmp_path).identity()["images"] == 6


def test_ood_sets_have_no_classes(tmp_path: Path) -> None:
    write_mnist(tmp_path, [3, 1, 2])
    with_labels = opened(vision("ood/far/x", "MNIST"), tmp_path)
    assert with_labels.labels.tolist() == [-1, -1, -1]
    assert with_labels.sha256 == opened(vision("id/val", "MNIST"), tmp_path).sha256  # of the labels that it gives
    assert opened(fake("ood/val"), tmp_path).labels.tolist() == [-1] * 12


class Printing(torchvision.datasets.FakeData):
    """Is not there before it is downloaded, and prints."""

    there = False

    def __init__(self, root: str, download: bool = False) -> None:
        super().__init__(2, (3, 8, 8), 2)
        print("Using downloaded file", root)
        type(self).there |= download
        if not self.there:
            raise RuntimeError("Dataset not found.\nYou can use download=True")


@pytest.fixture
def printing(monkeypatch: pytest.MonkeyPatch) -> type[Printing]:
    monkeypatch.setattr(torchvision.datasets, "SVHN", Printing)
    monkeypatch.setattr(Printing, "there", False)
    return Printing


def test_nothing_is_downloaded_unless_said(
    tmp_path: Path, printing: type[Printing], capfd: pytest.CaptureFixture[str]
) -> None:
    message = (
        rf"^ood/val: torchvision's SVHN in {tmp_path}/s: Dataset not found\.; download = true in the benchmark's fi"
    )
    with pytest.raises(ImageError, match=message):
        open_vision(vision("ood/val", "SVHN", "s"), tmp_path)
    assert not printing.there
    assert open_vision(vision("ood/val", "SVHN", "s", download=True), tmp_path).labels.size == 2
    assert printing.there
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (vision("id/val", "NoSuchSet"), r"^id/val: torchvision\.datasets has no 'NoSuchSet'$"),
        (vision("id/val", "mnist"), r"^id/val: torchvision\.datasets has no 'mnist'$"),  # a module
        (vision("id/val", "wrap_dataset_for_transforms_v2"), r"has no 'wrap_dataset_for_transforms_v2'$"),
        (
            fake(sizes=3),
            r"^id/val: torchvision's FakeData takes no 'sizes'; it takes size, image_size, num_classes, rand",
        ),
        (
            vision("id/val", "FakeData", download=True),
            r"^id/val: torchvision's FakeData cannot be downloaded; put it th",
        ),
    ],
)
def test_what_torchvision_does_not_have_is_refused(tmp_path: Path, split: Split, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_vision(split, tmp_path)


def test_sets_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"^id/val: torchvision's CIFAR10 in .*: Dataset not found or corrupted\."):
        open_vision(vision("id/val", "CIFAR10"), tmp_path)
    with pytest.raises(
        ImageError, match=r"^id/val: torchvision's SVHN in .*: Unknown value .tset. for argument split\."
    ):
        open_vision(vision("id/val", "SVHN", split="tset"), tmp_path)


def test_damaged_images_are_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    split = vision("id/val", "ImageFolder")
    images = open_vision(split, tmp_path)
    assert images.labels.tolist() == [0, 1]
    (tmp_path / "b/1.png").write_bytes(b"no")
    with pytest.raises(ImageError, match=r"^image cannot be read: number 1 of torchvision's ImageFolder: "):
        images.open(1)
