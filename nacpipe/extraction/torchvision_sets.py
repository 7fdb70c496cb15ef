"""torchvision's data sets by name, as in benchmark files: images, labels, identity.

A data set may draw random numbers, or keep state from one image to the next (an open file, a counter). So that an image
is the same in every run, random generators are seeded with its number, and one thread reads a set in order
(`ImageSet.one_thread`).
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image

from nacpipe.benchmarks.lists import OOD
from nacpipe.benchmarks.standard import Split
from nacpipe.errors import ImageError, InputError, first_line
from nacpipe.extraction.image_content import CANNOT_READ
from nacpipe.extraction.image_file import read_image, to_eight_bits

_GENERATORS = threading.Lock()  # the global generators of torch, numpy and Python are shared by all threads


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionSet:
    """An opened data set of torchvision."""

    open: Callable[[int], Image.Image]
    labels: NDArray[np.int64]
    """(rows,); −1 throughout for OOD sets."""
    sha256: str
    """Digest of torchvision's labels, as int64; of −1 for each image if it has none."""


def open_vision(split: Split, root: Path, allow_truncated: bool = False) -> VisionSet:
    """Open the torchvision data set of a split; download it only if the split allows it.

    Args:
        split: the class and its arguments.
        root: the data root.
        allow_truncated: load truncated image files, if the class uses torchvision's default loader.

    Raises:
        InputError: the class does not exist, or does not take these arguments.
        ImageError: the data set does not exist or cannot be read.
    """
    dataset_class = getattr(torchvision.datasets, split.source, None)
    if split.source not in torchvision.datasets.__all__ or not isinstance(dataset_class, type):
        raise InputError(f"{split.name}: torchvision.datasets has no {split.source!r}")
    parameters = inspect.signature(dataset_class).parameters
    arguments: dict[str, Any] = dict(split.arguments)
    for name in arguments:
        if name not in parameters:
            raise InputError(
                f"{split.name}: torchvision's {split.source} takes no {name!r}; it takes {_list_arguments(parameters)}"
            )
    if split.download and "download" not in parameters:
        raise InputError(f"{split.name}: torchvision's {split.source} cannot be downloaded; put it there by hand")
    folder = root / split.folder
    if "root" in parameters:
        arguments["root"] = str(folder)
    if "loader" in parameters and parameters["loader"].default is torchvision.datasets.folder.default_loader:
        arguments["loader"] = partial(_load_rgb, allow_truncated)
    dataset = _build_dataset(dataset_class, arguments, split, folder)
    labels = _labels(dataset, split)

    def open_one(row: int) -> Image.Image:
        image = _read_item(dataset, split, row)[0]
        if not isinstance(image, Image.Image):
            raise ImageError(f"{split.name}: torchvision's {split.source} gives {type(image).__name__}, not images")
        try:
            image.load()
            return to_eight_bits(image)
        except Exception as error:
            image.close()
            raise _cannot_read(split, row, error) from error

    return VisionSet(
        open=open_one,
        labels=np.full_like(labels, OOD) if split.name.startswith("ood/") else labels,
        sha256=hashlib.sha256(labels.tobytes()).hexdigest(),
    )


def _read_item(dataset: Any, split: Split, row: int) -> Any:
    """Return a data set's item at a position, with seeded random generators."""
    try:
        with _seeded(row):
            return dataset[row]
    except Exception as error:  # torchvision raises errors of any kind for a damaged file
        raise _cannot_read(split, row, error) from error


def _cannot_read(split: Split, row: int, error: Exception) -> ImageError:
    reason = str(error).removeprefix(CANNOT_READ)
    return ImageError(f"{CANNOT_READ}number {row} of torchvision's {split.source}: {reason}")


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's (CPU), numpy's and Python's global generators, then restore them; one thread at a time."""
    with _GENERATORS, torch.random.fork_rng(devices=[]):
        numpy_state, python_state = np.random.get_state(), random.getstate()
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def _load_rgb(allow_truncated: bool, path: str | Path) -> Image.Image:
    """Load an image as torchvision's default loader does, with this package's formats and bit depths."""
    return read_image(Path(path), str(path), allow_truncated).convert("RGB")


def _build_dataset(dataset_class: Any, arguments: Mapping[str, Any], split: Split, folder: Path) -> Any:
    """Build the data set, first without a download, so that existing data are not downloaded or searched again."""
    for download in (False, True) if split.download else (False,):
        try:
            with _seeded(0), contextlib.redirect_stdout(sys.stderr):  # some classes print, and stdout is for results
                return dataset_class(**arguments, **({"download": True} if download else {}))
        except (RuntimeError, OSError, ValueError, TypeError, ModuleNotFoundError) as error:
            if split.download and not download:
                continue
            message = first_line(error)
            hint = "" if split.download else "; download = true in the benchmark's file fetches it"
            raise ImageError(f"{split.name}: torchvision's {split.source} in {folder}: {message}{hint}") from error
    raise AssertionError


def _labels(dataset: Any, split: Split) -> NDArray[np.int64]:
    """Return the data set's labels, without decoding images if it has an attribute for them."""
    label_attribute = next((a for a in ("targets", "labels", "_labels") if hasattr(dataset, a)), None)
    try:
        if label_attribute is not None:
            targets = [int(label) for label in getattr(dataset, label_attribute)]
        elif split.name.startswith("ood/"):
            targets = [OOD] * len(dataset)
        else:
            targets = [int(_read_item(dataset, split, row)[1]) for row in range(len(dataset))]
    except (TypeError, ValueError):
        raise InputError(f"{split.name}: torchvision's {split.source} has not one label for each image") from None
    if len(targets) != len(dataset):
        raise InputError(f"{split.name}: torchvision's {split.source} has {len(targets)} labels, {len(dataset)} images")
    return np.asarray(targets, np.int64)


def _list_arguments(parameters: Mapping[str, Any]) -> str:
    ours = ("root", "download", "transform", "transforms", "target_transform", "loader", "is_valid_file", "kwargs")
    return ", ".join(name for name in parameters if name not in ours) or "nothing more"
