"""An image's content before anything decodes it: a file's, a member's of an archive, a cell's of a table. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nacpipe.errors import ImageError, first_line

CANNOT_READ = "image cannot be read: "


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """An image that is not decoded yet; it can be sent to another process."""

    name: str
    """The file's path, or the name of a shard's member or row."""
    where: str
    """The same for messages."""
    read: Callable[[], bytes]
    """Returns its content; a file is read here."""
    time: float | None = None
    """When it was written last, in seconds since 1970; None where that is not known."""


class Unscored(ImageError):
    """A member of a shard that is no image; it has a name and no score."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


def read_content(path: Path, where: str) -> bytes:
    """Return an image file's content.

    Raises:
        ImageError: the file does not exist or cannot be read; `where` names it.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"image is not there: {where}") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{CANNOT_READ}{where}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """Return what an error of a read or a decoder says, in one short line, without the address of a file in memory."""
    return re.sub(r" <_io.BytesIO object at \w+>", "", first_line(error, 1000))[:120]
