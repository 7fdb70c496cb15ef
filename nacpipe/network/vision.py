"""torchvision's data sets by name, as a benchmark file asks for them: images, labels, identity."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from numpy.typing import NDArray
from PIL import Image

from nacpipe.core.benchmarks import Split
from nacpipe.data.lists import OOD
from nacpipe.errors import ImageError, InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionSet:
    """A data set of torchvision's, opened."""

    open: Callable[[int], Image.Image]
    labels: NDArray[np.int64]
    """(rows,); −1 throughout for OOD sets."""
    sha256: str
    """Of the labels that torchvision gives, as int64; of ours where it gives none."""


def open_vision(split: Split, root: Path) -> VisionSet:
    """Open the data set of torchvision's that a split names; downloads it only where the split says so.

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
    dataset = _make(kind, arguments, split, folder)
    labels = _labels(dataset, split)

    def open_one(row: int) -> Image.Image:
        try:
            image = dataset[row][0]
        except Exception as error:  # a damaged file can make torchvision raise anything
            raise ImageError(f"image cannot be read: number {row} of torchvision's {split.source}: {error}") from error
        if not isinstance(image, Image.Image):
            raise ImageError(f"{split.name}: torchvision's {split.source} gives {type(image).__name__}, not images")
        return image

    return VisionSet(
        open=open_one,
        labels=np.full_like(labels, OOD) if split.name.startswith("ood/") else labels,
        sha256=hashlib.sha256(labels.tobytes()).hexdigest(),
    )


def _make(kind: Any, arguments: Mapping[str, Any], split: Split, folder: Path) -> Any:
    """Build the data set; first without a download, so that nothing is fetched, or looked for again, that is there."""
    for download in (False, True) if split.download else (False,):
        try:
            with contextlib.redirect_stdout(sys.stderr):  # some classes print; stdout is for results
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
            targets = [int(dataset[row][1]) for row in range(len(dataset))]
    except (TypeError, ValueError):
        raise InputError(f"{split.name}: torchvision's {split.source} has not one label for each image") from None
    if len(targets) != len(dataset):
        raise InputError(f"{split.name}: torchvision's {split.source} has {len(targets)} labels, {len(dataset)} images")
    return np.asarray(targets, np.int64)


def _names(takes: Mapping[str, Any]) -> str:
    ours = ("root", "download", "transform", "transforms", "target_transform", "loader", "is_valid_file", "kwargs")
    return ", ".join(name for name in takes if name not in ours) or "nothing more"
