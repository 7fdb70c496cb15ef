"""OOD samples made from ID samples, for a search that nobody has OOD data for.

One sample is made of each ID sample, of the kinds in turn: sample 0 of the first, sample 1 of the second, …

    images (uint8)                                                  other arrays
    shuffle   2 × 2 or 4 × 4 patches in another order               mix      a sum of the samples of two classes, or,
    mix       a sum of two classes, 0.4 to 0.6 of each                       of whole numbers, half of each
    phases    the image's own amplitudes, random phases             shuffle  the longest axis in another order
    noise     the image and noise of 0.25 to 0.5 of the range       noise    the sample and noise as wide as its own
    blur      averaged over about a quarter of a side                        range, or, of whole numbers, every second
    negative  255 − the image                                                place from another sample
    patches   4 × 4 patches, half of them from another class
    turn      by 90°, 180° or 270°; 180° where it is not square

A sample depends on `version`, `seed` and its row alone, so that it can be made alone. Draws are RandomState's, whose
streams numpy keeps for ever; all arithmetic on images is on whole numbers, except the Fourier transform of `phases`,
which is rounded to whole numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

from nacpipe.errors import InputError

VERSION, SEED = 1, 1
IMAGE_KINDS = ("shuffle", "mix", "phases", "noise", "blur", "negative", "patches", "turn")
ARRAY_KINDS = ("mix", "shuffle", "noise")

Image = NDArray[Any]  # (height, width) or (height, width, channels), uint8
Sample = NDArray[Any]  # of any shape and type
Load = Callable[[int], Sample]


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthesis:
    """How samples are made of others: nothing but whole numbers and names, part of a cache's identity."""

    labels: NDArray[np.int64]  # (samples,)
    """The ID samples' classes."""
    kinds: Sequence[str] = IMAGE_KINDS
    """Of `IMAGE_KINDS`, or of `ARRAY_KINDS` for arrays that are no images."""
    seed: int = SEED
    version: int = VERSION

    def __post_init__(self) -> None:
        """Refuse what nothing can be made with.

        Raises:
            InputError: a version or kind is not known, or there are fewer than two classes to mix.
        """
        if self.version != VERSION:
            raise InputError(f"synthetic version {self.version} is not known; this nacpipe makes version {VERSION}")
        if not self.kinds:
            raise InputError(f"synthetic samples need at least one kind; known: {', '.join(IMAGE_KINDS)}")
        if wrong := [kind for kind in self.kinds if kind not in IMAGE_KINDS]:
            raise InputError(f"synthetic kind {wrong[0]!r} is not known; known: {', '.join(IMAGE_KINDS)}")
        if len(np.unique(self.labels)) < 2:
            raise InputError("synthetic samples are mixed from two classes; these ID samples are of one")

    def identity(self) -> dict[str, object]:
        """Return what the samples follow from, beside the ID samples."""
        return {"version": self.version, "seed": self.seed, "kinds": list(self.kinds)}

    def kind(self, row: int) -> str:
        """Return the kind that a row is of."""
        return self.kinds[row % len(self.kinds)]

    def partner(self, row: int) -> int:
        """Return the row of another class that a mixture takes."""
        return self._draw(row)[1]

    def make(
        self,
        row: int,
        load: Load,  # row → the ID sample
    ) -> Sample:
        """Return a row's sample, of the shape and type of its ID sample; its partner is loaded only where it is used.

        Raises:
            InputError: the partner has another shape.
        """
        rng, partner = self._draw(row)
        sample = load(row)
        image = sample.dtype == np.uint8 and sample.ndim in (2, 3)
        make = _MAKERS[self.kind(row)][0 if image else 1]
        if make is None:
            raise InputError(
                f"synthetic kind {self.kind(row)!r} is for images of 8 bits; for others: {', '.join(ARRAY_KINDS)}"
            )

        def other() -> Sample:
            found = load(partner)
            if found.shape != sample.shape:
                raise InputError(
                    f"samples {row} and {partner} cannot be mixed: shapes {sample.shape} and {found.shape}"
                )
            return found

        return make(sample, other, rng)

    def _draw(self, row: int) -> tuple[RandomState, int]:
        """The row's own random numbers, and its partner, the first of them."""
        rng = RandomState([self.version, self.seed, row])
        others = np.flatnonzero(self.labels != self.labels[row])
        return rng, int(others[_whole(rng, 0, len(others))])


def make_synthetic(
    images: Sample,  # (samples, height, width[, channels]) uint8, or (samples, …) of any type
    labels: NDArray[np.int64],  # (samples,)
    seed: int = SEED,
    version: int = VERSION,
    kinds: Sequence[str] | None = None,
) -> Sample:
    """Return one OOD sample made from each ID sample, of the same shape and type; the same bytes on every machine.

    Args:
        images: the ID samples; uint8 of 3 or 4 axes are images, all else is not.
        labels: their classes, at least two.
        seed: of every draw.
        version: of the rules above.
        kinds: what is made in turn; None: all that this type of array allows.

    Raises:
        InputError: a version or kind is not known, or there are fewer than two classes.
    """
    if kinds is None:
        kinds = IMAGE_KINDS if images.dtype == np.uint8 and images.ndim in (3, 4) else ARRAY_KINDS
    if max(images.shape[1:], default=1) < 2:
        kinds = [kind for kind in kinds if kind != "shuffle"]
    synthesis = Synthesis(labels=labels, kinds=kinds, seed=seed, version=version)
    return np.stack([synthesis.make(row, lambda row: np.asarray(images[row])) for row in range(len(images))])


Other = Callable[[], Sample]


def _shuffle_patches(image: Image, _other: Other, rng: RandomState) -> Image:
    cuts = (2, 4)[_whole(rng, 0, 2)]
    boxes = _boxes(image, cuts)
    order = _another_order(len(boxes), rng)
    shuffled = image.copy()
    for box, source in zip(boxes, order, strict=True):
        shuffled[box] = image[boxes[source]]
    return shuffled


def _mix_images(image: Image, other: Other, rng: RandomState) -> Image:
    share = _whole(rng, 103, 154)  # of 256: 0.4 to 0.6
    return ((share * image.astype(np.int64) + (256 - share) * other().astype(np.int64) + 128) // 256).astype(np.uint8)


def _randomise_phases(image: Image, _other: Other, rng: RandomState) -> Image:
    """F ↦ F · N / |N| with N the transform of noise, which has all phases; the same for all channels."""
    noise = np.fft.rfft2(rng.randint(0, 256, image.shape[:2], np.int64) - 128)
    length = np.sqrt(noise.real**2 + noise.imag**2)
    turns = np.where(length > 0, noise / np.where(length > 0, length, 1), 1)
    turns[0, 0] = 1  # the mean stays
    channels = np.atleast_3d(image).transpose(2, 0, 1)
    turned = np.fft.irfft2(np.fft.rfft2(channels) * turns, s=image.shape[:2])
    whole = np.rint(turned).clip(0, 255).astype(np.uint8)
    return np.asarray(whole.transpose(1, 2, 0).reshape(image.shape))


def _add_noise_to_image(image: Image, _other: Other, rng: RandomState) -> Image:
    """The sum of four uniform numbers, nearly normal, with a standard deviation of 64 to 128."""
    noise = rng.randint(0, 256, (4, *image.shape), np.int64).sum(axis=0) - 510  # standard deviation 147.8
    amplitude = _whole(rng, 111, 223)  # of 256
    return np.asarray((image.astype(np.int64) + noise * amplitude // 256).clip(0, 255), np.uint8)


def _blur(image: Image, _other: Other, _rng: RandomState) -> Image:
    """Three averages over a fifth of the longer side, along both axes: nearly Gaussian, a tenth of the side wide."""
    width = 2 * max(1, max(image.shape[:2]) // 10) + 1
    blurred = image.astype(np.int64)
    for axis in (0, 1) * 3:
        sides = [(0, 0)] * image.ndim
        sides[axis] = (width // 2 + 1, width // 2)
        sums = np.pad(blurred, sides, mode="edge").cumsum(axis=axis)
        length = image.shape[axis]
        upper, lower = (np.take(sums, np.arange(start, start + length), axis=axis) for start in (width, 0))
        blurred = (upper - lower + width // 2) // width
    return blurred.astype(np.uint8)


def _negative(image: Image, _other: Other, _rng: RandomState) -> Image:
    return 255 - image


def _mix_patches(image: Image, other: Other, rng: RandomState) -> Image:
    boxes = _boxes(image, 4)
    second, mixed = other(), image.copy()
    for place in rng.permutation(len(boxes))[: len(boxes) // 2]:
        mixed[boxes[place]] = second[boxes[place]]
    return mixed


def _turn(image: Image, _other: Other, rng: RandomState) -> Image:
    quarters = _whole(rng, 1, 4)
    return np.ascontiguousarray(np.rot90(image, quarters if image.shape[0] == image.shape[1] else 2))


def _mix_arrays(sample: Sample, other: Other, rng: RandomState) -> Sample:
    second = other()
    if np.issubdtype(sample.dtype, np.inexact):
        share = sample.dtype.type(_whole(rng, 103, 154) / 256)
        return np.asarray(share * sample + (1 - share) * second, sample.dtype)
    taken = np.zeros(sample.size, bool)
    taken[rng.permutation(sample.size)[: (sample.size + 1) // 2]] = True
    return np.where(taken.reshape(sample.shape), second, sample)


def _shuffle_axis(sample: Sample, _other: Other, rng: RandomState) -> Sample:
    axis = int(np.argmax(sample.shape))
    return np.take(sample, _another_order(sample.shape[axis], rng), axis=axis)


def _add_noise_to_array(sample: Sample, other: Other, rng: RandomState) -> Sample:
    if np.issubdtype(sample.dtype, np.inexact):
        wide = (sample.max() - sample.min()) or 1
        return np.asarray(sample + wide * (rng.random_sample(sample.shape) - 0.5), sample.dtype)
    return np.where(np.arange(sample.size).reshape(sample.shape) % 2 == 0, other(), sample)


def _whole(rng: RandomState, low: int, high: int) -> int:
    """Draw a number from low … high − 1; of a type of its own, since the default's width is the machine's."""
    return int(rng.randint(low, high, dtype=np.int64))


def _boxes(image: Image, cuts: int) -> list[tuple[slice, slice]]:
    """Cut an image into cuts × cuts patches of one size; what is left over on the right and below stays."""
    height, width = (side // cuts for side in image.shape[:2])
    return [
        (slice(y * height, (y + 1) * height), slice(x * width, (x + 1) * width))
        for y in range(cuts)
        for x in range(cuts)
    ]


def _another_order(count: int, rng: RandomState) -> NDArray[np.int64]:
    """A random order that is not the one that is there, where there is another."""
    while True:
        order = rng.permutation(count)
        if count < 2 or (order != np.arange(count)).any():
            return order


_Maker = Callable[[Sample, Other, RandomState], Sample]
_MAKERS: dict[str, tuple[_Maker | None, _Maker | None]] = {  # kind → of images, of other arrays
    "shuffle": (_shuffle_patches, _shuffle_axis),
    "mix": (_mix_images, _mix_arrays),
    "phases": (_randomise_phases, None),
    "noise": (_add_noise_to_image, _add_noise_to_array),
    "blur": (_blur, None),
    "negative": (_negative, None),
    "patches": (_mix_patches, None),
    "turn": (_turn, None),
}
