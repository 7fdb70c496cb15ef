"""Images of lists, class folders, torchvision's data sets and packaged sets, as deterministic batches.

Images are in the list's order; none is shuffled, dropped or repeated.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import transforms

from nacpipe.benchmarks import digits
from nacpipe.benchmarks.lists import OOD, ImageList, check_labels, read_list
from nacpipe.benchmarks.standard import Benchmark, Split, Transform
from nacpipe.benchmarks.subset import choose_balanced
from nacpipe.benchmarks.synthetic import Synthesis
from nacpipe.errors import ImageError, InputError
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
    """Position in the list → the decoded image."""
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
) -> ImageSet | None:
    """Return a split's images, or None if its list does not exist.

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
        open_one, labels, sha256 = _opener(listed, allow_truncated), listed.labels, listed.sha256
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
    mode = _mode(transform)
    resize, crop = _resize(transform), transforms.CenterCrop(side)

    def load(row: int) -> NDArray[np.uint8]:
        image = base.open(row).convert(mode)
        return np.asarray(image if base.pre_resized else crop(resize(image)))

    def open_one(row: int) -> Image.Image:
        try:
            return Image.fromarray(synthesis.make(row, load))
        except InputError as error:
            raise ImageError(f"{split.name}, from {base.where(row)}: {error}") from None

    note = (
        f"{split.name}: made from the images of {base.name} (synthetic, version {synthesis.version}, seed"
        f" {synthesis.seed}): {', '.join(synthesis.kinds)}"
    )
    choice = {**synthesis.identity(), **({} if base.pre_resized else {"side": side})}
    return replace(
        base,
        name=split.name,
        source=f"synthetic, from {base.source}",
        open=open_one,
        labels=np.full_like(base.labels, OOD),
        choice={**base.choice, "synthetic": choice},
        notes=(note,),
    )


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
    return lambda row: Image.fromarray(images[row]), labels, sha256


def _opener(listed: ImageList, allow_truncated: bool) -> _Opener:
    hint = "; --allow-truncated loads it as OpenOOD does"
    return lambda row: read_image(listed.file(row), listed.where(row), allow_truncated, hint)


def build_transform(transform: Transform, pre_resized: bool = False) -> Callable[[Image.Image], Tensor]:
    """Return image → (channels, crop, crop) float32: OpenOOD's test transform; pre-resized: no resize, no crop."""
    mode = _mode(transform)
    geometry = [_resize(transform), transforms.CenterCrop(transform.crop)]
    steps = transforms.Compose(  # not transforms.v2, whose scaling to 0 … 1 differs in the last bit
        [
            *([] if pre_resized else geometry),
            transforms.ToTensor(),
            transforms.Normalize(transform.mean, transform.std),
        ]
    )
    return lambda image: steps(image.convert(mode))


def _mode(transform: Transform) -> str:
    """Pillow's name for the transform's channels."""
    return "L" if len(transform.mean) == 1 else "RGB"


def _resize(transform: Transform) -> transforms.Resize:
    return transforms.Resize(transform.resize, interpolation=transforms.InterpolationMode(transform.interpolation))


def load_batches(
    images: ImageSet,
    batches: Sequence[range],  # positions in images.index
    transform: Callable[[Image.Image], Tensor],
    workers: int,
    pin: bool = False,
) -> Iterator[Tensor]:
    """Yield one tensor (n, channels, height, width) per batch, in order, decoding ahead on `workers` threads.

    If `images.one_thread` is set, one thread reads the batches in order, for any number of workers.

    `pin` puts batches in page-locked memory, so that they are copied to a GPU while it computes.
    """

    def decode(batch: range) -> Tensor:
        decoded = [transform(images.open(int(images.index[row]))) for row in batch]
        if len({image.shape for image in decoded}) > 1:  # pre-resized sets alone
            sizes = sorted({"×".join(str(side) for side in image.shape[:0:-1]) for image in decoded})
            raise ImageError(f"{images.name} is pre_resized, but its images differ in size: {', '.join(sizes)}")
        return torch.stack(decoded).pin_memory() if pin else torch.stack(decoded)

    if workers == 0:
        yield from map(decode, batches)
        return
    if images.one_thread:
        workers = 1
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
