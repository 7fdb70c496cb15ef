"""Images of lists, class folders, torchvision's data sets and packaged sets, one by one.

Images are in the list's order; none is shuffled, dropped or repeated. loader.py makes batches of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as vision

from nacpipe.benchmarks import digits
from nacpipe.benchmarks.lists import OOD, ImageList, check_labels, read_list
from nacpipe.benchmarks.standard import Benchmark, Split, Transform
from nacpipe.benchmarks.subset import choose_balanced
from nacpipe.benchmarks.synthetic import Synthesis
from nacpipe.errors import ImageError, InputError
from nacpipe.extraction.decoder import Decoder
from nacpipe.extraction.image_file import read_image
from nacpipe.extraction.torchvision_sets import open_vision


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSet:
    """The images of one split, in order; nothing is decoded yet."""

    name: str
    """The split's name."""
    source: str
    """The list's file name, the folder, torchvision's class, or the packaged set's name."""
    sha256: str
    """Digest of the list's bytes, of the packaged images, or of the labels of torchvision's data set."""
    open: Callable[[int], Image.Image]
    """Position in the list → the decoded image; can be sent to another process unless `one_thread` is set."""
    labels: NDArray[np.int64]
    """(list's rows,)"""
    index: NDArray[np.int64]
    """(rows,): positions in the list of the samples to extract, in order."""
    listed: ImageList | None = None
    """The image files; None if the images are not in separate files."""
    pre_resized: bool = False
    """Whether images are neither resized nor cropped, only normalised."""
    one_thread: bool = False
    """Whether one thread reads the images in order, because the data set may keep state between images."""
    choice: dict[str, Any] = field(default_factory=dict)
    """Further fields of the cache's identity: how `index` was chosen, torchvision's arguments."""
    notes: tuple[str, ...] = ()
    """Notes to print."""

    def identity(self) -> dict[str, Any]:
        """Return the attribute `images` of this set's split."""
        return {"list": self.source, "sha256": self.sha256, **self.choice}

    def where(self, row: int) -> str:
        """Return a description of the image at a position of the list, for messages."""
        return f"number {row} of {self.source}" if self.listed is None else self.listed.where(row)

    def check_labels(self, classes: int) -> None:
        """Refuse labels outside 0 … classes − 1; an OOD set's labels are not checked.

        Raises:
            InputError: counts the wrong labels and names the first.
        """
        check_labels(self.name, self.labels, classes, self.where)

    def missing(self) -> list[int]:
        """Return the positions in the list of the samples to extract whose file does not exist."""
        return [] if self.listed is None else self.listed.missing(self.index.tolist())

    def check(self, rows: NDArray[np.int64]) -> None:
        """Refuse positions whose file does not exist.

        Raises:
            ImageError: counts the missing files and names the first.
        """
        if self.listed is not None and (missing := self.listed.missing(rows.tolist())):
            raise ImageError(
                f"{len(missing)} listed images are not there; the first is {self.listed.where(missing[0])}"
            )


def open_images(
    benchmark: Benchmark,
    split: Split,
    data_root: Path,
    *,
    train_images: int,
    train_seed: int,
    allow_truncated: bool = False,
    decoder: Decoder = Decoder(),  # noqa: B008 (a frozen record)
) -> ImageSet | None:
    """Return a split's images, or None if its list does not exist; `decoder` is for files of lists and folders.

    Raises:
        ImageError: the list is malformed, naming file and line.
        InputError: a label of id/train is not a class of the benchmark.
    """
    if split.synthetic:
        base = open_images(
            benchmark,
            replace(split, name="id/val", synthetic=()),
            data_root,
            train_images=train_images,
            train_seed=train_seed,
            allow_truncated=allow_truncated,
            decoder=decoder,
        )
        return None if base is None else _synthesise(base, split, benchmark)
    notes: list[str] = []
    source, listed, choice = split.source, None, dict[str, Any]()
    if benchmark.packaged:
        open_one, labels, sha256 = _packaged(source)
    elif split.kind == "torchvision":
        vision = open_vision(split, data_root, allow_truncated)
        open_one, labels, sha256 = vision.open, vision.labels, vision.sha256
        choice |= {"arguments": dict(split.arguments), "length": int(labels.size)}
    else:
        listed = read_list(benchmark, split, data_root)
        if listed is None:
            return None
        open_one, labels, sha256 = _opener(listed, allow_truncated, decoder), listed.labels, listed.sha256
        if listed.source != source:
            notes.append(f"{split.name}: there is no {source}, so {listed.source} is used")
            source = listed.source
    if split.pre_resized:
        choice["untouched"] = True  # the key of format 1
    images = ImageSet(
        name=split.name,
        source=source,
        sha256=sha256,
        open=open_one,
        labels=labels,
        index=np.arange(labels.size),
        listed=listed,
        pre_resized=split.pre_resized,
        one_thread=split.kind == "torchvision",
        choice=choice,
        notes=tuple(notes),
    )
    return _choose_training(images, benchmark, train_images, train_seed) if split.name == "id/train" else images


def _synthesise(base: ImageSet, split: Split, benchmark: Benchmark) -> ImageSet:
    """Make OOD images from ID images, each of its own size or of the square in its middle that the benchmark sees.

    The square has the side that the benchmark's transform resizes to: what is done to pixels is then neither lost nor
    enlarged by the transform that follows.
    """
    transform, side = benchmark.transform, benchmark.transform.resize
    synthesis = Synthesis(labels=base.labels, kinds=split.synthetic)
    prepare = Pixels(replace(transform, crop=side), base.pre_resized)
    note = (
        f"{split.name}: made from the images of {base.name} (synthetic, version {synthesis.version}, seed"
        f" {synthesis.seed}): {', '.join(synthesis.kinds)}"
    )
    choice = {**synthesis.identity(), **({} if base.pre_resized else {"side": side})}
    return replace(
        base,
        name=split.name,
        source=f"synthetic, from {base.source}",
        open=_Synthetic(name=split.name, base=base, synthesis=synthesis, prepare=prepare),
        labels=np.full_like(base.labels, OOD),
        choice={**base.choice, "synthetic": choice},
        notes=(note,),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Synthetic:
    """Opens the images that are made of a set's."""

    name: str
    base: ImageSet
    synthesis: Synthesis
    prepare: Pixels

    def __call__(self, row: int) -> Image.Image:
        try:
            return Image.fromarray(self.synthesis.make(row, self._load))
        except InputError as error:
            raise ImageError(f"{self.name}, from {self.base.where(row)}: {error}") from None

    def _load(self, row: int) -> NDArray[np.uint8]:
        return np.asarray(self.prepare.image(self.base.open(row)))


def _choose_training(images: ImageSet, benchmark: Benchmark, count: int, seed: int) -> ImageSet:
    """Choose the same number of images of every class; the choice is part of the set's identity."""
    images.check_labels(benchmark.classes)
    try:
        index = choose_balanced(images.labels, benchmark.classes, count, seed)
    except InputError as error:
        raise InputError(f"{images.source}: {error}") from None
    notes = images.notes
    if count < benchmark.classes:
        notes += (f"id/train: {count} images cannot cover {benchmark.classes} classes; chosen unbalanced",)
    elif index.size < count:
        notes += (f"id/train: {index.size} of the {count} images asked for, the same number of each class",)
    return replace(images, index=index, choice={**images.choice, "images": count, "seed": seed}, notes=notes)


_Opener = Callable[[int], Image.Image]


def _packaged(source: str) -> tuple[_Opener, NDArray[np.int64], str]:
    images, labels = digits.load_set(source)
    sha256 = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    return partial(_open_packaged, images), labels, sha256


def _open_packaged(images: NDArray[np.uint8], row: int) -> Image.Image:
    return Image.fromarray(images[row])


def _opener(listed: ImageList, allow_truncated: bool, decoder: Decoder) -> _Opener:
    return partial(_open_listed, listed, allow_truncated, decoder)


def _open_listed(listed: ImageList, allow_truncated: bool, decoder: Decoder, row: int) -> Image.Image:
    hint = "; --allow-truncated loads it as OpenOOD does"
    return read_image(listed.file(row), listed.where(row), allow_truncated, hint, decoder)


class Pixels:
    """An image → its pixels: OpenOOD's test transform as far as it is Pillow's, resize and crop."""

    def __init__(self, transform: Transform, pre_resized: bool = False) -> None:
        """Store the transform.

        Args:
            transform: resize, crop, interpolation and the number of channels.
            pre_resized: neither resize nor crop.
        """
        self._mode = "L" if len(transform.mean) == 1 else "RGB"  # Pillow's names
        mode = transforms.InterpolationMode(transform.interpolation)
        geometry = [transforms.Resize(transform.resize, interpolation=mode), transforms.CenterCrop(transform.crop)]
        self._geometry = transforms.Compose([] if pre_resized else geometry)

    def image(self, image: Image.Image) -> Image.Image:
        """Return the image, converted, resized and cropped."""
        return self._geometry(image.convert(self._mode))  # type: ignore[no-any-return]

    def __call__(self, image: Image.Image) -> Tensor:
        """Return (channels, height, width) uint8."""
        return vision.pil_to_tensor(self.image(image))  # type: ignore[no-any-return]


class Normalise:
    """Pixels → what a network gets, on a device: bit for bit torchvision's ToTensor and Normalize.

    Three steps: folded constants and a product with 1/255 differ in the last bit. The divisors are tensors on the
    device, because CUDA multiplies by the reciprocal of a number.
    """

    def __init__(self, transform: Transform, device: torch.device | None = None) -> None:
        """Store the mean and the deviation of the channels on a device; None: the CPU."""
        self._scale = torch.tensor([255.0], device=device)
        self._mean, self._std = (
            torch.tensor(values, device=device)[:, None, None] for values in (transform.mean, transform.std)
        )

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return (…, channels, height, width) float32 of (…, channels, height, width) uint8."""
        return pixels.to(torch.float32).div_(self._scale).sub_(self._mean).div_(self._std)


def build_transform(transform: Transform, pre_resized: bool = False) -> Callable[[Image.Image], Tensor]:
    """Return image → (channels, crop, crop) float32: OpenOOD's test transform; pre-resized: no resize, no crop."""
    pixels, normalise = Pixels(transform, pre_resized), Normalise(transform)
    return lambda image: normalise(pixels(image))
