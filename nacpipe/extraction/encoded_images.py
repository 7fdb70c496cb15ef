"""Encoded images → pixels, batch by batch: of files, members of archives, rows of tables.

One that cannot be read has an error in its place, and the others of its batch have pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from nacpipe.benchmarks.standard import Transform
from nacpipe.errors import ImageError
from nacpipe.extraction.dataset import Pixels
from nacpipe.extraction.decoder import Decoder
from nacpipe.extraction.image_content import EncodedImage
from nacpipe.extraction.image_file import decode_image


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedImages:
    """A batch of n images, some of which may have no pixels."""

    pixels: Tensor | None
    """(those without an error, channels, crop, crop) uint8, in order; None where there are none."""
    errors: tuple[ImageError | None, ...]
    """(n,): why an image has no pixels."""

    def pin_memory(self) -> DecodedImages:
        """Return the same with pixels in page-locked memory."""
        return self if self.pixels is None else replace(self, pixels=self.pixels.pin_memory())


class EncodedBatches(Dataset[Any]):
    """Encoded images → their pixels."""

    def __init__(self, transform: Transform, decoder: Decoder = Decoder()) -> None:  # noqa: B008 (a frozen record)
        """Store how images are decoded and prepared; `Normalise` does the rest."""
        self._pixels, self._decoder = Pixels(transform), decoder

    def __getitem__(self, images: Sequence[EncodedImage]) -> DecodedImages:
        decoded = [self._decode(image) for image in images]
        pixels = [found for found in decoded if isinstance(found, Tensor)]
        return DecodedImages(
            pixels=torch.stack(pixels) if pixels else None,
            errors=tuple(None if isinstance(found, Tensor) else found for found in decoded),
        )

    def _decode(self, image: EncodedImage) -> Tensor | ImageError:
        try:
            return self._pixels(decode_image(image.read(), image.where, decoder=self._decoder))
        except ImageError as error:
            return ImageError(str(error))  # without the cause, which another process may not be able to make
        except (OSError, ValueError, MemoryError, Image.DecompressionBombWarning) as error:  # of the transform
            return ImageError(f"image cannot be prepared: {image.where}: {str(error)[:120]}")
