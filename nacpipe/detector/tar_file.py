"""Tar files of images, as WebDataset writes them, read from front to back; one that ends early is not taken for whole.

x/1.cls  x/1.jpg  x/1.json     members KEY.ENDING: what shares a KEY with an image belongs to it, and is left out
3.pdf                          what is no image and belongs to none has a row with an error
512 zeros                      the end of the archive; docs/decisions/reading-shards.md
"""

from __future__ import annotations

import importlib
import io
import itertools
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from nacpipe.benchmarks.folders import SUFFIXES, is_hidden
from nacpipe.cache.objects import READ_AHEAD, open_file
from nacpipe.errors import ImageError, NacError
from nacpipe.extraction.image_content import CANNOT_READ, EncodedImage, Unscored

MAX_IMAGE_BYTES = 1 << 29
_BLOCK = 512  # bytes


def read_tar(address: str, unpack: str | None = None) -> Iterator[EncodedImage | Unscored]:
    """Yield the members; those that share their key with an image and are none are left out, as its labels.

    Args:
        address: a path or a URL.
        unpack: the module whose `open` unpacks it: gzip, bz2 or lzma.

    Raises:
        ImageError: it cannot be read, or ends before its end.
        InputError: there is no such object at the URL.
        CacheError: its server does not answer.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open_file(address))
        try:
            if unpack is not None:
                file = stack.enter_context(importlib.import_module(unpack).open(file, "rb"))
            blocks: Any = _Blocks(file)
            with tarfile.open(fileobj=blocks, mode="r:") as archive:
                for _, members in itertools.groupby(_members(archive), key=lambda member: _key(member.name)):
                    yield from _read_group(address, archive, members)
                end, block = archive.offset, blocks.last
            if block != bytes(_BLOCK):
                found = "ends" if len(block) < _BLOCK else "is damaged"
                raise ImageError(f"{address} {found} at byte {end}, before the end of its archive; copy it anew")
            while unpack is not None and blocks.read(READ_AHEAD):
                pass  # to the checksum
        except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, RecursionError) as error:
            # The last three: of sizes and chains of names in damaged headers, which tarfile follows.
            raise ImageError(f"{address} cannot be read as a tar file: {error}") from None


class _Blocks(io.RawIOBase):
    """A tar file that keeps what was read last: the block at which the archive ends."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        try:
            self.last = self._file.read(size)
        except (NacError, OSError, EOFError):
            raise
        except Exception as error:  # zlib's and lzma's own
            raise OSError(str(error)) from None
        return self.last

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    end = 0
    while (member := archive.next()) is not None:
        if archive.offset <= end:  # of a negative size: tarfile would read the same members for ever
            raise tarfile.ReadError(f"{member.name!r} ends before it begins")
        end = archive.offset
        archive.members.clear()  # type: ignore[attr-defined]  # or it would keep all of them
        if not (member.isdir() or is_hidden(PurePosixPath(member.name).name)):
            yield member


def _key(name: str) -> str:
    """WebDataset's: all before the first dot of the file's name."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _read_group(
    address: str, archive: tarfile.TarFile, members: Iterator[tarfile.TarInfo]
) -> Iterator[EncodedImage | Unscored]:
    others, images = [], 0
    for member in members:
        where = f"{address}: {member.name}"
        if PurePosixPath(member.name).suffix.lower() not in SUFFIXES:
            others.append(member.name)
            continue
        images += 1
        if not member.isreg():
            yield Unscored(f"{CANNOT_READ}{where}: it is a link", member.name)
        elif member.size > MAX_IMAGE_BYTES:
            yield Unscored(f"{CANNOT_READ}{where}: it has {member.size} bytes", member.name)
        else:
            stream = archive.extractfile(member)
            assert stream is not None
            content = stream.read()
            if len(content) < member.size:
                raise ImageError(f"{address} ends within {member.name}; copy it anew")
            yield EncodedImage(name=member.name, where=where, read=partial(bytes, content), time=float(member.mtime))
    if not images:
        for name in others:
            yield Unscored(f"{address}: {name} is no image; known endings: {', '.join(sorted(SUFFIXES))}", name)
