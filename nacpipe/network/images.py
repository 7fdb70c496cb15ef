"""Image lists in OpenOOD's form, and packaged sets, as deterministic batches.

A list's lines are `path label`: the path below the split's image folder, the label an integer (−1 for OOD) or a Python
dictionary with a `label`. Order is the list's order; nothing is shuffled, dropped or repeated.
"""

from __future__ import annotations

import ast
import hashlib
import io
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor
from torchvision import transforms

from nacpipe.core.benchmarks import Benchmark, Split, Transform
from nacpipe.core.subset import choose_balanced
from nacpipe.errors import ImageError, InputError
from nacpipe.network import digits


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSet:
    """The images of one split, in order; nothing is decoded yet."""

    name: str
    """The split's name."""
    source: str
    """The list's file name, or the packaged set's name."""
    sha256: str
    """Of the list's bytes, or of the packaged images."""
    open: Callable[[int], Image.Image]
    """Position in the list → the decoded image."""
    labels: NDArray[np.int64]
    """(list's rows,)"""
    index: NDArray[np.int64]
    """(rows,): positions in the list of the samples to extract, in order."""
    check: Callable[[NDArray[np.int64]], None]
    """Raise ImageError for the first of these positions whose file is not there."""
    choice: dict[str, Any]
    """How `index` was chosen, for the cache's identity; empty where it is the whole list."""
    notes: tuple[str, ...] = ()
    """What to say aloud."""

    def identity(self) -> dict[str, Any]:
        """Return what the cache remembers of this set."""
        return {"list": self.source, "sha256": self.sha256, **self.choice}


def open_images(
    benchmark: Benchmark,
    split: Split,
    data_root: Path,
    *,
    train_images: int,
    train_seed: int,
    allow_truncated: bool = False,
) -> ImageSet | None:
    """Return a split's images, or None where its list is not there.

    Raises:
        ImageError: the list is malformed, naming file and line.
    """
    notes: list[str] = []
    source = split.source
    if benchmark.packaged:
        open_one, labels, sha256, check = _packaged(source)
    else:
        path = data_root / "benchmark_imglist" / benchmark.name / source
        if not path.is_file() and split.fallback:
            source, path = split.fallback, path.with_name(split.fallback)
            notes.append(f"{split.name}: there is no {split.source}, so {source} is used")
        if not path.is_file():
            return None
        open_one, labels, sha256, check = _listed(path, data_root / split.folder, allow_truncated)
    index, choice = np.arange(labels.size), {}
    if split.name == "id/train":
        try:
            index = choose_balanced(labels, benchmark.classes, train_images, train_seed)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        choice = {"images": train_images, "seed": train_seed}
        if train_images < benchmark.classes:
            notes.append(f"id/train: {train_images} images cannot cover {benchmark.classes} classes; chosen unbalanced")
        elif index.size < train_images:
            notes.append(
                f"id/train: {index.size} of the {train_images} images asked for, the same number of each class"
            )
    return ImageSet(
        name=split.name,
        source=source,
        sha256=sha256,
        open=open_one,
        labels=labels,
        index=index,
        check=check,
        choice=choice,
        notes=tuple(notes),
    )


_Opened = tuple[Callable[[int], Image.Image], NDArray[np.int64], str, Callable[[NDArray[np.int64]], None]]


def _packaged(source: str) -> _Opened:
    images, labels = digits.load_set(source)
    sha256 = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    return lambda row: Image.fromarray(images[row]), labels, sha256, lambda rows: None


def _listed(path: Path, folder: Path, allow_truncated: bool) -> _Opened:
    content = path.read_bytes()
    names, labels = parse_list(content, str(path))

    def where(row: int) -> str:
        return f"{folder / names[row]} (line {row + 1} of {path})"

    def check(rows: NDArray[np.int64]) -> None:
        missing = [row for row in rows.tolist() if not os.path.isfile(folder / names[row])]
        if missing:
            raise ImageError(f"{len(missing)} listed images are not there; the first is {where(missing[0])}")

    def open_one(row: int) -> Image.Image:
        try:
            image = Image.open(io.BytesIO((folder / names[row]).read_bytes()))
            _load(image, allow_truncated)
            return image
        except FileNotFoundError:
            raise ImageError(f"image is not there: {where(row)}") from None
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            hint = "; --allow-truncated loads it as OpenOOD does" if "truncated" in str(error) else ""
            what = re.sub(r" <_io.BytesIO object at \w+>", "", str(error) or type(error).__name__).splitlines()[0][:120]
            raise ImageError(f"image cannot be read: {where(row)}: {what}{hint}") from error

    return open_one, labels, hashlib.sha256(content).hexdigest(), check


def _load(image: Image.Image, allow_truncated: bool) -> None:
    ImageFile.LOAD_TRUNCATED_IMAGES = allow_truncated  # Pillow's only switch; the same for the whole command
    image.load()


def parse_list(content: bytes, source: str) -> tuple[list[str], NDArray[np.int64]]:
    """Return the paths and labels (rows,) of an image list.

    Raises:
        ImageError: a line has another form, or its path leaves the image folder; names list and line.
    """
    names: list[str] = []
    labels: list[int] = []
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ImageError(f"{source} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, start=1):
        name, _, label = line.strip().partition(" ")
        try:
            extra = ast.literal_eval(label.strip())
            value = extra.get("label", -1) if isinstance(extra, dict) else extra
            if isinstance(value, bool) or not isinstance(value, int) or abs(value) > 2**31:
                raise ValueError
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise ImageError(f"line {number} of {source} is not 'path label': {line.strip()[:80]!r}") from None
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise ImageError(f"line {number} of {source} leaves the image folder: {name[:80]!r}")
        names.append(name)
        labels.append(value)
    if not names:
        raise ImageError(f"{source} lists no images")
    return names, np.asarray(labels, dtype=np.int64)


def build_transform(transform: Transform) -> Callable[[Image.Image], Tensor]:
    """Return image → (channels, crop, crop) float32: OpenOOD's test transform."""
    mode = "L" if len(transform.mean) == 1 else "RGB"
    steps = transforms.Compose(  # not transforms.v2, whose scaling to 0 … 1 differs in the last bit
        [
            transforms.Resize(transform.resize, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(transform.crop),
            transforms.ToTensor(),
            transforms.Normalize(transform.mean, transform.std),
        ]
    )
    return lambda image: steps(image.convert(mode))


def load_batches(
    images: ImageSet,
    batches: Sequence[range],  # positions in images.index
    transform: Callable[[Image.Image], Tensor],
    workers: int,
) -> Iterator[Tensor]:
    """Yield one tensor (n, channels, height, width) per batch, in order, decoding ahead on `workers` threads."""

    def decode(batch: range) -> Tensor:
        return torch.stack([transform(images.open(int(images.index[row]))) for row in batch])

    if workers == 0:
        yield from map(decode, batches)
        return
    waiting: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(decode, batch))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
