"""Finished extractions: of a small data root in OpenOOD's layout with random weights, and of digits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from nacpipe.cache import Cache, open_cache
from tests.once import once

if TYPE_CHECKING:
    from nacpipe.extraction.request import ExtractRequest

COUNTS = {  # list → images; blocks are of 16 rows here, batches of 8
    "main_train_cifar10.txt": 45,
    "sub_train_cifar10.txt": 20,
    "val_cifar10.txt": 40,
    "test_cifar10.txt": 16,
    "val_tin.txt": 21,
    "test_mnist.txt": 3,
}


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random pictures and their lists."""
    from PIL import Image

    root = tmp_path_factory.mktemp("data")
    rng = np.random.RandomState(0)
    lists = root / "benchmark_imglist/cifar10"
    lists.mkdir(parents=True)
    for name, count in COUNTS.items():
        folder = root / "images_classic" / name.removesuffix(".txt")
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.randint(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
        label = (lambda i: i % 10) if name.endswith("_cifar10.txt") else (lambda i: -1)
        (lists / name).write_text("".join(f"{folder.name}/{i}.png {label(i)}\n" for i in range(count)))
    return root


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch  # here: the search side's tests need none

    from nacpipe.networks.models import find_model

    path = tmp_path_factory.mktemp("weights") / "resnet20.pth"
    torch.manual_seed(0)
    torch.save(find_model("resnet20").build(10).state_dict(), path)
    return path


@pytest.fixture
def request_(root: Path, checkpoint: Path, tmp_path: Path) -> ExtractRequest:
    """Everything there is, into a new cache."""
    return build_request(root, checkpoint, tmp_path / "c.zarr")


def build_request(root: Path, checkpoint: Path, cache: Path) -> ExtractRequest:
    from nacpipe.extraction.request import ExtractRequest

    return ExtractRequest(
        benchmark="cifar10",
        model="resnet20",
        cache=cache,
        checkpoint=checkpoint,
        data_root=root,
        train_images=45,
        batch_size=8,
        block_rows=16,
        device="cpu",
    )


@pytest.fixture(scope="session")
def finished(root: Path, checkpoint: Path, common: Path) -> Cache:
    """A cache that was made in one go; read only."""
    return open_cache(once(common / "finished.zarr", lambda path: _extract(build_request(root, checkpoint, path))))


@pytest.fixture(scope="session")
def digits_cache(common: Path) -> Path:
    """1,000 training digits, 500 others and 500 letters through the packaged network; to be read or copied."""
    from nacpipe.extraction.request import ExtractRequest

    def build(path: Path) -> None:
        _extract(
            ExtractRequest(
                benchmark="digits",
                model="digits_cnn",
                cache=path,
                device="cpu",
                splits=("id/train", "id/val", "ood/val"),
            )
        )

    return once(common / "digits.zarr", build)


def _extract(request: ExtractRequest) -> None:
    import torch

    from nacpipe.extraction.pipeline import extract
    from nacpipe.extraction.plan import plan_extraction

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests that compare with it: sums differ in their last digits otherwise
    try:
        extract(plan_extraction(request))
    finally:
        torch.set_num_threads(threads)
