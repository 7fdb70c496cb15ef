"""Batches of pixels: order, values, errors, and the processes that decode them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import functional as vision

from nacpipe.benchmarks.standard import Transform, find_benchmark
from nacpipe.errors import ImageError
from nacpipe.extraction import loader
from nacpipe.extraction.dataset import ImageSet, Normalise, Pixels, build_transform, open_images
from nacpipe.extraction.loader import choose_stream_workers, choose_workers, load_batches, load_stream

pytestmark = pytest.mark.usefixtures("one_thread")

CIFAR10 = find_benchmark("cifar10")
GREY = Transform(resize=4, crop=4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
IN_PROCESSES = pytest.param(2, marks=pytest.mark.slow)


def grey_set(root: Path, name: str, values: Sequence[int | bytes]) -> ImageSet:
    """A split of CIFAR-10's whose images are of one grey value each; bytes are a file's content."""
    split = CIFAR10.split(name)
    folder = root / "images_classic" / name
    folder.mkdir(parents=True)
    for row, value in enumerate(values):
        if isinstance(value, bytes):
            (folder / f"{row}.png").write_bytes(value)
        else:
            Image.new("RGB", (4, 4), (value, value, value)).save(folder / f"{row}.png")
    lists = root / "benchmark_imglist/cifar10"
    lists.mkdir(parents=True, exist_ok=True)
    (root / CIFAR10.lists / split.source).write_text("".join(f"{name}/{row}.png 0\n" for row in range(len(values))))
    images = open_images(CIFAR10, split, root, train_images=1, train_seed=1)
    assert images is not None
    return images


@pytest.mark.parametrize("workers", [0, IN_PROCESSES])
def test_batches_of_all_splits_come_in_order(tmp_path: Path, workers: int) -> None:
    sets = [grey_set(tmp_path, "id/val", range(11)), grey_set(tmp_path, "id/test", range(100, 104))]
    sets[1] = replace(sets[1], index=np.array([3, 0, 2]))
    batches = [(0, range(3)), (0, range(3, 4)), (1, range(2)), (0, range(8, 11)), (1, range(2, 3)), (0, range(4, 8))]
    loaded = list(load_batches(sets, batches, GREY, workers))
    assert {batch.dtype for batch in loaded} == {torch.uint8}
    assert [tuple(batch.shape[1:]) for batch in loaded] == [(3, 4, 4)] * 6
    assert [batch[:, 0, 0, 0].tolist() for batch in loaded] == [
        [0, 1, 2], [3], [103, 100], [8, 9, 10], [102], [4, 5, 6, 7]
    ]  # fmt: skip


@pytest.mark.parametrize("workers", [0, IN_PROCESSES])
def test_a_bad_image_stops_the_batches_by_name(tmp_path: Path, workers: int) -> None:
    images = grey_set(tmp_path, "id/val", [7, b"no", 9])
    batches = load_batches([images], [(0, range(1)), (0, range(1, 2)), (0, range(2, 3))], GREY, workers)
    assert next(batches).flatten().tolist() == [7] * 48
    with pytest.raises(ImageError, match=r"^image cannot be read: .*/1\.png \(line 2 of .*val_cifar10\.txt\): cannot"):
        next(batches)


def test_pre_resized_images_must_agree_in_size(tmp_path: Path) -> None:
    images = replace(grey_set(tmp_path, "id/val", [1, 2]), pre_resized=True)
    Image.new("RGB", (5, 4)).save(images.listed.file(1))  # type: ignore[union-attr]
    batches = load_batches([images], [(0, range(1)), (0, range(2))], CIFAR10.transform, 0)
    assert next(batches).shape == (1, 3, 4, 4)
    with pytest.raises(ImageError, match=r"^id/val is pre_resized, but its images differ in size: 4×4, 5×4$"):
        next(batches)


@pytest.mark.parametrize("size", [(64, 64), (80, 48), (33, 70)])
def test_pixels_and_normalisation_are_pillow_to_tensor_normalize_bit_for_bit(size: tuple[int, int]) -> None:
    transform = Transform(resize=40, crop=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    pixels, normalise = Pixels(transform), Normalise(transform)
    random = np.random.default_rng(size)
    images = [Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)) for _ in range(4)]
    expected = [
        vision.normalize(
            vision.to_tensor(vision.center_crop(vision.resize(image, [40]), [32, 32])), transform.mean, transform.std
        )
        for image in images
    ]
    assert torch.equal(normalise(torch.stack([pixels(image) for image in images])), torch.stack(expected))
    assert torch.equal(build_transform(transform)(images[0]), expected[0])


def test_every_value_of_a_pixel_is_normalised_as_by_torchvision() -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, 16, 16)
    for mean, std in [(CIFAR10.transform.mean, CIFAR10.transform.std), ((0.5, 0.25, 0.1), (0.3, 0.7, 0.9))]:
        expected = vision.normalize(vision.to_tensor(values.permute(1, 2, 0).numpy()), mean, std)
        found = Normalise(replace(GREY, mean=mean, std=std))(values)
        assert torch.equal(found, expected)


def test_processes_are_chosen_by_files_number_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = grey_set(tmp_path, "id/val", [1])
    in_memory, stateful = replace(files, listed=None), replace(files, one_thread=True)
    monkeypatch.setattr(loader, "count_cores", lambda: 16)
    assert choose_workers(None, [files], [50_000], 224) == 14
    assert choose_workers(None, [files], [50_000], 224, local_world=4) == 2
    assert choose_workers(None, [files], [50_000], 224, local_world=16) == 0
    assert choose_workers(None, [files], [1_999], 224) == 0
    assert choose_workers(None, [files, files], [1_000, 1_000], 224) == 14
    assert choose_workers(None, [files], [60_000], 32) == 0
    assert choose_workers(None, [in_memory, stateful], [50_000, 50_000], 224) == 0
    assert choose_workers(3, [in_memory], [50_000], 224) == 0
    assert choose_workers(3, [files], [10], 32) == 3
    monkeypatch.setattr(loader, "count_cores", lambda: 1)
    assert choose_workers(None, [files], [50_000], 224) == 0


def test_a_thread_decodes_the_first_images_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "count_cores", lambda: 16)
    assert choose_stream_workers(None, 224) == (14, 2000)
    assert choose_stream_workers(None, 32, local_world=4) == (2, 98_000)
    assert choose_stream_workers(None, 224, local_world=16)[0] == 0
    assert choose_stream_workers(3, 224) == (3, 0)
    assert choose_stream_workers(0, 224) == (0, 0)


@pytest.mark.parametrize(("few", "here"), [(0, 0), (5, 2), (100, 4)])
def test_processes_start_where_a_stream_is_longer(monkeypatch: pytest.MonkeyPatch, few: int, here: int) -> None:
    batches, decoded_here = [[1, 2, 3], [], [4, 5], [6]], []
    here += here > 1  # the empty one

    def decode(dataset: Any, batches: Iterable[Any], pin: bool) -> Iterator[Any]:
        for batch in batches:
            decoded_here.append(batch)
            yield dataset[batch]

    monkeypatch.setattr(loader, "_decode_here", decode)
    monkeypatch.setattr(loader, "_decode_apart", lambda dataset, batches, workers, pin: map(dataset.get, batches))
    assert list(load_stream(Sums(), iter(batches), 2, few)) == [6, 0, 9, 6]
    assert len(decoded_here) == min(here, 4)
    decoded_here.clear()
    assert list(load_stream(Sums(), iter(batches), 0)) == [6, 0, 9, 6]
    assert decoded_here == batches


class Sums(Dataset[int]):
    def __getitem__(self, batch: Sequence[int]) -> int:
        return sum(batch)

    get = __getitem__


DECODING = """
import os, signal, sys
from pathlib import Path
from nacpipe.benchmarks.standard import find_benchmark
from nacpipe.errors import ImageError
from nacpipe.extraction.dataset import open_images
from nacpipe.extraction.loader import load_batches

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which what runs in the background ignores
    benchmark = find_benchmark("cifar10")
    images = open_images(benchmark, benchmark.split("id/val"), Path(sys.argv[1]), train_images=1, train_seed=1)
    batches = [(0, range(3))] * 1_000_000
    try:
        for batch in load_batches([images], batches, benchmark.transform, 2):
            print("batch", flush=True)
    except ImageError as error:
        print(error, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def children_of(parent: int) -> list[int]:
    """The processes below one, at any depth."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent and fields[0] != "Z":
                found += [int(entry.name), *children_of(int(entry.name))]
    return found


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("event", ["interrupt", "worker killed", "this process killed"])
def test_processes_end_with_the_run(tmp_path: Path, event: str) -> None:
    grey_set(tmp_path, "id/val", [1, 2, 3])
    (tmp_path / "decode.py").write_text(DECODING)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "decode.py"), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "batch\n"
        below = children_of(run.pid)
        workers = [process for process in below if children_of(process) == []]
        assert len(below) >= 3  # the server that starts processes, and two of them
        if event == "interrupt":
            os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        elif event == "worker killed":
            for process in below:
                command = Path(f"/proc/{process}/cmdline").read_text()
                if process in workers and "forkserver" in command:
                    os.kill(process, signal.SIGKILL)
        else:
            run.kill()
        shown, said = run.communicate(timeout=120)
        last = [line for line in shown.splitlines() if line != "batch"]
        if event == "interrupt":
            assert (run.returncode, said) == (130, "")
        elif event == "worker killed":
            (line,) = last
            assert line.startswith("a process that decodes images is gone (")  # torch notices, or a batch is cut short
            assert line.endswith("; the same command goes on; --workers 1 takes less")
            assert run.returncode == 1
        else:
            assert run.returncode == -signal.SIGKILL
        end = time.monotonic() + 60
        while any(map(is_running, below)) and time.monotonic() < end:
            time.sleep(0.1)
        assert [process for process in below if is_running(process)] == []
