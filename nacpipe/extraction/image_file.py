"""Decoding one image file: known formats only, at most 8 bits per value."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from nacpipe.errors import ImageError
from nacpipe.extraction.decoder import Decoder
from nacpipe.extraction.image_content import CANNOT_READ, read_content, reason_of

# Pillow chooses the format by content and passes PostScript to Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")

_EIGHT_BITS = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"})
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_WHITE_IS_ZERO, _SIGNED = 0, 2


def read_image(
    path: Path,
    where: str,
    allow_truncated: bool = False,
    if_truncated: str = "",
    decoder: Decoder = Decoder(),  # noqa: B008 (a frozen record)
) -> Image.Image:
    """Read and decode an image file, of at most 8 bits per value (`to_eight_bits`).

    Raises:
        ImageError: the file does not exist, cannot be read, or has values of unknown range; `where` names it.
    """
    return decode_image(read_content(path, where), where, allow_truncated, if_truncated, decoder)


def decode_image(
    content: bytes,
    where: str,
    allow_truncated: bool = False,
    if_truncated: str = "",
    decoder: Decoder = Decoder(),  # noqa: B008
) -> Image.Image:
    """Decode an image file's content, of at most 8 bits per value (`to_eight_bits`).

    Raises:
        ImageError: it cannot be read, or has values of unknown range; `where` names it.
    """
    try:
        if (decoded := decoder.decode(content)) is not None:
            return decoded
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        _load(image, allow_truncated)
        return to_eight_bits(image)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        hint = if_truncated if "truncated" in str(error) else ""
        raise ImageError(f"{CANNOT_READ}{where}: {reason_of(error)}{hint}") from error


def _load(image: Image.Image, allow_truncated: bool) -> None:
    ImageFile.LOAD_TRUNCATED_IMAGES = allow_truncated  # a global setting of Pillow, with one value per command
    image.load()


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Return an image whose values have at most 8 bits; Pillow's own conversion cuts wider ones off at 255.

        grey PNG of 16 bits                      v · 255 / 65535, rounded
        grey TIFF of 12 or 16 bits               v · 255 / (2^bits − 1), rounded; inverted if 0 is white
        PGM with a maximum above 255             the same, of the values 0 … 65535 that Pillow scales it to
        PNG, PPM, TIFF with 16 bits per colour   as Pillow reads it: 8 bits
        floats, signed or 32-bit integers, Lab   refused: their range is not known, or Pillow cannot convert them

    Raises:
        ValueError: the range of the values is not known.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode in _EIGHT_BITS and _SIGNED not in tags.get(_SAMPLE_FORMAT, ()):
        return image
    scaled_by_pillow = image.mode == "I" and image.format in ("PNG", "PPM")
    if not (image.mode.startswith("I;16") or scaled_by_pillow):
        raise ValueError(f"its values are {_describe(image)}; save it with 8 or 16 bits per value, unsigned")
    max_value = 2 ** max(tags.get(_BITS, (16,))) - 1
    values = np.asarray(image).astype(np.int64)  # (height, width)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = max_value - values
    return Image.fromarray(((values * 255 + max_value // 2) // max_value).astype(np.uint8))


def _describe(image: Image.Image) -> str:
    if image.mode == "F":
        return "floats of unknown range"
    if image.mode in _EIGHT_BITS or image.mode == "I":
        return "signed or 32-bit integers of unknown range"
    return f"of Pillow's mode {image.mode}, which cannot be converted to RGB"
