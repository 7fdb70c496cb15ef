"""torchvision's data sets by name, as a benchmark file asks for them: images, labels, identity.

A data set may draw random numbers, or keep state from one image to the next (an open file, a counter). So that an image
is the same in every run, random numbers are seeded by its number, and whoever reads a set does so in order, from one
thread (`ImageSet.one_thread`).
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
from nacpipe.errors import ImageError, InputError
from nacpipe.extraction.image_file import CANNOT_READ, read_image, to_eight_bits

_GENERATORS = threading.Lock()  # torch's, numpy's and Python's global ones are the whole process's


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionSet:
    """A data set of torchvision's, opened."""

    open: Callable[[int], Image.Image]
    labels: NDArray[np.int64]
    """(rows,); −1 throughout for OOD sets."""
    sha256: str
    """Of the labels that torchvision gives, as int64; of ours where it gives none."""


def open_vision(split: Split, root: Path, allow_truncated: bool = False) -> VisionSet:
    """Open the data set of torchvision's that a split names; downloads it only where the split says so.

    Args:
        split: names the class and its arguments.
        root: the data root.
        allow_truncated: load truncated image files, where the class reads them with torchvision's own loader.

    Raises:
        InputError: there is no such class, or it does not take these arguments.
        ImageError: the data set is not there or cannot be read.
    """
    kind = getattr(torchvision.datasets, split.source, None)
    if split.source not in torchvision.datasets.__all__ or not isinstance(kind, type):
        raise InputError(f"{split.name}: torchvision.datasets has no {split.source!r}")
    takes = inspect.signature(kind).parameters
    arguments: dict[str, Any] = dict(split.arguments)
    for name in arguments:
        if name not in takes:
            raise InputError(f"{split.name}: torchvision's {split.source} takes no {name!r}; it takes {_names(takes)}")
    if split.download and "download" not in takes:
        raise InputError(f"{split.name}: torchvision's {split.source} cannot be downloaded; put it there by hand")
    folder = root / split.folder
    if "root" in takes:
        arguments["root"] = str(folder)
    if "loader" in takes and takes["loader"].default is torchvision.datasets.folder.default_loader:
        arguments["loader"] = partial(_load_rgb, allow_truncated)
    dataset = _make(kind, arguments, split, folder)
    labels = _labels(dataset, split)

    def open_one(row: int) -> Image.Image:
        image = _read_item(dataset, split, row)[0]
        if not isinstance(image, Image.Image):
            raise ImageError(f"{split.name}: torchvision's {split.source} gives {type(image).__name__}, not images")
        try:
            image.load()
            return to_eight_bits(image)
        except Exception as error:
            raise _cannot_read(split, row, error) from error

    return VisionSet(
        open=open_one,
        labels=np.full_like(labels, OOD) if split.name.startswith("ood/") else labels,
        sha256=hashlib.sha256(labels.tobytes()).hexdigest(),
    )


def _read_item(dataset: Any, split: Split, row: int) -> Any:
    """Return what a data set has at a position, the same each time where it draws random numbers."""
    try:
        with _seeded(row):
            return dataset[row]
    except Exception as error:  # a damaged file can make torchvision raise anything
        raise _cannot_read(split, row, error) from error


def _cannot_read(split: Split, row: int, error: Exception) -> ImageError:
    what = str(error).removeprefix(CANNOT_READ)
    return ImageError(f"{CANNOT_READ}number {row} of torchvision's {split.source}: {what}")


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's, numpy's and Python's global generators, for the CPU, and put them back; one thread at a time."""
    with _GENERATORS, torch.random.fork_rng(devices=[]):
        numpys, pythons = np.random.get_state(), random.getstate()
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpys)
            random.setstate(pythons)


def _load_rgb(allow_truncated: bool, path: str | Path) -> Image.Image:
    """torchvision's own loader, but for formats, and for values of more than 8 bits."""
    return read_image(Path(path), str(path), allow_truncated).convert("RGB")


def _make(kind: Any, arguments: Mapping[str, Any], split: Split, folder: Path) -> Any:
    """Build the data set; first without a download, so that nothing is fetched, or looked for again, that is there."""
    for download in (False, True) if split.download else (False,):
        try:
            with _seeded(0), contextlib.redirect_stdout(sys.stderr):  # some classes print; stdout is for results
                return kind(**arguments, **({"download": True} if download else {}))
        except (RuntimeError, OSError, ValueError, TypeError, ModuleNotFoundError) as error:
            if split.download and not download:
                continue
            message = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            hint = "" if split.download else "; download = true in the benchmark's file fetches it"
            raise ImageError(f"{split.name}: torchvision's {split.source} in {folder}: {message}{hint}") from error
    raise AssertionError


def _labels(dataset: Any, split: Split) -> NDArray[np.int64]:
    """Return the labels that the data set gives, read without decoding its images where it has them apart."""
    known = next((a for a in ("targets", "labels", "_labels") if hasattr(dataset, a)), None)
    try:
        if known is not None:
            targets = [int(label) for label in getattr(dataset, known)]
        elif split.name.startswith("ood/"):
            targets = [OOD] * len(dataset)
        else:
            targets = [int(_read_item(dataset, split, row)[1]) for row in range(len(dataset))]
    except (TypeError, ValueError):
        raise InputError(f"{split.name}: torchvision's {split.source} has not one label for each image") from None
    if len(targets) != len(dataset):
        raise InputError(f"{split.name}: torchvision's {split.source} has {len(targets)} labels, {len(dataset)} images")
    return np.asarray(targets, np.int64)


def _names(takes: Mapping[str, Any]) -> str:
    ours = ("root", "download", "transform", "transforms", "target_transform", "loader", "is_valid_file", "kwargs")
    return ", ".join(name for name in takes if name not in ours) or "nothing more"
