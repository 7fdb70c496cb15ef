"""torchvision's data sets that draw random numbers or keep state: the same images whatever the workers."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from nacpipe.benchmarks.standard import Benchmark, Split, Transform
from nacpipe.cache import open_cache
from nacpipe.errors import ImageError
from nacpipe.extraction.dataset import ImageSet, open_images
from nacpipe.extraction.loader import load_batches
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest

pytestmark = pytest.mark.usefixtures("one_thread")

WORKERS = [0, 1, 2, 3, 8]
TOML = """
name = "noise"
classes = 3
transform = {resize = 8, crop = 8, mean = [0.5, 0.5, 0.5], std = [0.25, 0.25, 0.25]}
[id]
train = {torchvision = "FakeData", size = 30, image_size = [3, 8, 8], num_classes = 3}
val = {torchvision = "FakeData", size = 400, image_size = [3, 8, 8], num_classes = 3, random_offset = 1000}
test = {torchvision = "FakeData", size = 9, image_size = [3, 8, 8], num_classes = 3}
[ood]
val = {torchvision = "FakeData", size = 400, image_size = [3, 8, 8]}
"""
NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
"""


@pytest.mark.slow
def test_400_images_extracted_five_times_are_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "noise.toml").write_text(TOML)
    (tmp_path / "net.py").write_text(NET)
    found = []
    for workers in WORKERS:
        request = ExtractRequest(
            benchmark=str(tmp_path / "noise.toml"),
            model=f"{tmp_path}/net.py:net",
            layers=("2",),
            cache=tmp_path / f"{workers}.zarr",
            splits=("id/val", "ood/val"),
            device="cpu",
            batch_size=16,
            workers=workers,
        )
        extract(plan_extraction(request))
        cache = open_cache(request.cache)
        assert {name: cache[name].rows for name in cache} == {"id/val": 400, "ood/val": 400}
        found.append(
            {f"{name}/{array}": cache[name].read(array).tobytes() for name in cache for array in cache.header.arrays()}
        )
    assert len(found[0]) == 12
    assert all(one == found[0] for one in found[1:])


# --- classes of torchvision's, made up --------------------------------------------------------------------------------


def draw_torch() -> float:
    return float(torch.rand(1))


def draw_numpy() -> float:
    return float(np.random.rand())


def draw_python() -> float:
    return random.random()


DRAWS: dict[str, Callable[[], float]] = {"torch": draw_torch, "numpy": draw_numpy, "python": draw_python}


def grey(value: float) -> Image.Image:
    return Image.new("L", (2, 2), int(value * 255))


class Unseeded(torchvision.datasets.FakeData):
    """Draws its images, its labels and one number at the beginning from a global generator, never seeded."""

    draw = staticmethod(draw_torch)

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.first = self.draw()

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        label = int(self.draw() * 3)
        time.sleep(0.0005)  # another thread's turn
        return grey((self.draw() + self.first) / 2), label


class Counting(torchvision.datasets.FakeData):
    """Gives what it gave last plus one, modulo 251."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.targets, self.last = [0] * size, 0

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        last = self.last
        time.sleep(0.0005)
        self.last = (last + 1) % 251
        return Image.new("L", (2, 2), self.last), 0


class OneFile(torchvision.datasets.FakeData):
    """Reads all its images from one open file."""

    def __init__(self, size: int, file: str) -> None:
        super().__init__(size)
        self.targets, self.file = [0] * size, open(file, "rb")  # noqa: SIM115

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.file.seek(index)
        time.sleep(0.0005)
        return Image.new("L", (2, 2), self.file.read(1)[0]), 0

    def __del__(self) -> None:
        self.file.close()


class Watched(torchvision.datasets.FakeData):
    """Knows who reads it."""

    threads: ClassVar[set[int]] = set()
    order: ClassVar[list[int]] = []

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.threads.add(threading.get_ident())
        self.order.append(index)
        return grey(0), 0


def opened(
    kind: type, monkeypatch: pytest.MonkeyPatch, name: str = "ood/val", size: int = 40, **arguments: Any
) -> ImageSet:
    monkeypatch.setattr(torchvision.datasets, "FakeData", kind)
    split = Split(name=name, source="FakeData", kind="torchvision", arguments={"size": size, **arguments})
    transform = Transform(resize=2, crop=2, mean=(0.0,), std=(1 / 255,))
    benchmark = Benchmark(name="own", classes=3, transform=transform, splits=(split,))
    images = open_images(benchmark, split, Path(), train_images=1, train_seed=1)
    assert images is not None
    return images


def values(images: ImageSet, workers: int) -> list[int]:
    """The grey value of every image."""
    transform = Transform(resize=2, crop=2, mean=(0.0,), std=(1.0,))
    size = images.index.size
    batches = [(0, range(start, min(start + 3, size))) for start in range(0, size, 3)]
    return [int(value) for batch in load_batches([images], batches, transform, workers) for value in batch[:, 0, 0, 0]]


@pytest.mark.parametrize("generator", DRAWS)
@pytest.mark.repeats(1)
def test_random_images_and_labels_are_the_same_in_every_run(monkeypatch: pytest.MonkeyPatch, generator: str) -> None:
    monkeypatch.setattr(Unseeded, "draw", staticmethod(DRAWS[generator]))
    runs, labels = [], []
    for workers in WORKERS:
        images = opened(Unseeded, monkeypatch, "id/val")
        labels.append(images.labels.tolist())
        runs.append(values(images, workers))
    assert all(one == runs[0] for one in runs[1:])
    assert all(one == labels[0] for one in labels[1:])
    assert len(set(runs[0])) > 20 and set(labels[0]) == {0, 1, 2}  # they differ from image to image


@pytest.mark.parametrize("generator", DRAWS)
def test_an_image_is_the_same_whatever_was_read_before(monkeypatch: pytest.MonkeyPatch, generator: str) -> None:
    monkeypatch.setattr(Unseeded, "draw", staticmethod(DRAWS[generator]))
    images = opened(Unseeded, monkeypatch)
    expected = values(images, 0)
    assert [images.open(row).getpixel((0, 0)) for row in (7, 3, 7, 0)] == [expected[row] for row in (7, 3, 7, 0)]


@pytest.mark.parametrize("workers", WORKERS)
def test_a_set_with_a_counter_is_read_in_order(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    assert values(opened(Counting, monkeypatch, "id/val"), workers) == list(range(1, 41))


@pytest.mark.parametrize("workers", WORKERS)
def test_a_set_with_one_open_file_is_read_by_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    (tmp_path / "f").write_bytes(bytes(range(100, 140)))
    assert values(opened(OneFile, monkeypatch, file=str(tmp_path / "f")), workers) == list(range(100, 140))


@pytest.mark.parametrize("workers", WORKERS)
def test_one_thread_reads_in_the_order_of_the_batches(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(Watched, "threads", set())
    monkeypatch.setattr(Watched, "order", [])
    images = opened(Watched, monkeypatch)
    transform = Transform(resize=2, crop=2, mean=(0.0,), std=(1.0,))
    list(load_batches([images], [(0, range(10, 13)), (0, range(9)), (0, range(30, 40))], transform, workers))
    assert (len(Watched.threads), Watched.order) == (1, [10, 11, 12, *range(9), *range(30, 40)])


def generator_states() -> tuple[Any, ...]:
    numpys = np.random.get_state()
    return torch.get_rng_state().tolist(), numpys[1].tolist(), numpys[2], random.getstate()  # type: ignore[index]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("generator", DRAWS)
def test_the_global_generators_are_left_as_they_were(
    monkeypatch: pytest.MonkeyPatch, generator: str, workers: int
) -> None:
    monkeypatch.setattr(Unseeded, "draw", staticmethod(DRAWS[generator]))
    before = generator_states()
    values(opened(Unseeded, monkeypatch, "id/val"), workers)
    assert generator_states() == before


class Failing(Unseeded):
    """Cannot give its second image."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 1:
            draw_torch(), draw_numpy(), draw_python()
            raise KeyError("of the class itself")
        return super().__getitem__(index)


@pytest.mark.parametrize("name", ["id/val", "ood/val"])  # labels are read from the images, or are not
def test_an_image_that_cannot_be_read_is_named_and_generators_are_put_back(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = generator_states()
    with pytest.raises(
        ImageError, match=r"^image cannot be read: number 1 of torchvision's FakeData: 'of the class its"
    ):
        values(opened(Failing, monkeypatch, name), 2)
    assert generator_states() == before


class Lazy(torchvision.datasets.FakeData):
    """Gives files that Pillow has not decoded yet."""

    def __init__(self, size: int, file: str) -> None:
        super().__init__(size)
        self.file = file

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(self.file), 0


@pytest.fixture
def cut(tmp_path: Path) -> Iterator[str]:
    pixels = np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    yield str(tmp_path / "cut.png")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_file_that_is_decoded_late_is_named_too(monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    images = opened(Lazy, monkeypatch, file=cut)
    with pytest.raises(ImageError, match=r"^image cannot be read: number 0 of torchvision's FakeData: .*truncated"):
        values(images, 2)
