"""Which library decodes the JPEGs of image files.

    pillow        the reference, and all other formats whichever is chosen
    torchvision   torchvision.io.decode_jpeg on the CPU
    nvjpeg        the same on a GPU, by one thread of the process that runs the network

A JPEG that is neither RGB nor grey, whose end is not there, or that the chosen library cannot decode is Pillow's too,
which reads or refuses it as ever. Orientation tags are left alone by all three.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from PIL import Image
from torchvision.transforms import functional as vision

from nacpipe.errors import InputError
from nacpipe.networks.batch_runner import is_out_of_memory
from nacpipe.text import spell_option

PILLOW, TORCHVISION, NVJPEG = "pillow", "torchvision", "nvjpeg"
DECODERS = (PILLOW, TORCHVISION, NVJPEG)
_START, _END = b"\xff\xd8", b"\xff\xd9"
_MODES = {"RGB": "RGB", "L": "GRAY"}  # Pillow's → torchvision's


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A decoder by its name; can be sent to another process."""

    name: str = PILLOW
    device: str = "cpu"
    """The GPU of nvJPEG."""

    def decode(self, content: bytes) -> Image.Image | None:
        """Return a JPEG's image, RGB or grey; None where Pillow is to decode the content.

        Raises:
            InputError: the GPU's memory is full.
        """
        mode = None if self.name == PILLOW else _find_mode(content)
        if mode is None:
            return None
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        try:
            pixels = _decode(encoded, mode, self.device if self.name == NVJPEG else "cpu")
        except RuntimeError as error:
            if is_out_of_memory(error):
                smaller = spell_option("batch-size", python=False)
                raise InputError(
                    f"the memory of {self.device} is full, on which JPEGs are decoded too; take a smaller {smaller}"
                ) from error
            return None
        return vision.to_pil_image(pixels.cpu())  # type: ignore[no-any-return]


def _decode(encoded: torch.Tensor, mode: str, device: str) -> torch.Tensor:  # (bytes,) → (channels, height, width)
    from torchvision.io import ImageReadMode, decode_jpeg  # here: deprecated since torchvision 0.29

    return decode_jpeg(encoded, ImageReadMode[mode], device)  # type: ignore[no-any-return]


def _find_mode(content: bytes) -> str | None:
    """Return how a whole RGB or grey JPEG is read, from its header; None of any other content."""
    if not (content.startswith(_START) and content.rstrip(b"\0").endswith(_END)):
        return None
    try:
        header = Image.open(io.BytesIO(content), formats=("JPEG",))  # decodes no pixels, refuses far too many
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return _MODES.get(header.mode) if header.format == "JPEG" else None


def check_decoder(name: str, packaged: bool) -> None:
    """Refuse a name that is no decoder's, and a choice where there is none.

    Args:
        name: as it was asked for.
        packaged: whether the benchmark's images come decoded with nacpipe.

    Raises:
        InputError: naming it.
    """
    if name not in DECODERS:
        raise InputError(f"--decoder is {name!r}; known: {', '.join(DECODERS)}")
    if name != PILLOW and not hasattr(torchvision.io, "decode_jpeg"):
        asked = spell_option("decoder", name, python=False)
        raise InputError(f"{asked}: torchvision {torchvision.__version__} decodes no JPEGs any more; leave it out")
    if packaged and name != PILLOW:
        asked = spell_option("decoder", name, python=False)
        raise InputError(f"{asked}: the benchmark's images are packaged, no file is decoded; leave it out")


def check_gpu(name: str, device: torch.device) -> None:
    """Refuse nvJPEG where the network runs on no GPU.

    Raises:
        InputError: naming the device.
    """
    if name == NVJPEG and device.type != "cuda":
        asked, instead = (spell_option("decoder", value, python=False) for value in (name, PILLOW))
        raise InputError(f"{asked} needs CUDA, and the network runs on {device}; take {instead}")


def stored_decoder(identity: Mapping[str, Any], device: torch.device) -> Decoder:
    """Return the decoder that a cache's images were read with; Pillow for nvJPEG's where there is no GPU."""
    name = str(identity.get("decoder", PILLOW))
    known = name in DECODERS and (name != NVJPEG or device.type == "cuda")
    return Decoder(name=name, device=str(device)) if known else Decoder()
