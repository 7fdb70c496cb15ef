"""Where images to be scored come from: folders, lists, Parquet files and tar files, each read from front to back.

    photos/                       the image files in a folder, at any depth, in alphabetical order
    nightly.txt                   a list: a path a line, from the list's folder on
    crops.parquet                 a column of encoded images: bytes, or a struct with `bytes` and `path`
    shards/{000..099}.tar         WebDataset's shards: members KEY.ENDING; what shares a KEY with an image belongs to it
    s3://bucket/shards/           every .tar and .parquet below it; https://host/{000..099}.tar too

One of them is a shard: the unit of a part of the result. Memory holds a few batches of one, whatever its size.
"""

from __future__ import annotations

import itertools
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from nacpipe.benchmarks.folders import SUFFIXES, is_hidden, walk_images
from nacpipe.cache.objects import READ_AHEAD, list_objects, open_object
from nacpipe.errors import ImageError, InputError, MissingExtra
from nacpipe.extraction.encoded_images import EncodedImage
from nacpipe.extraction.image_file import CANNOT_READ, read_content
from nacpipe.files import is_url

STREAMS = (".tar", ".parquet")
LIST = ".txt"
MAX_IMAGE_BYTES = 1 << 29
ROWS_AT_ONCE = 64  # of a Parquet file
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_BLOCK = 512  # bytes, of tar


class Unscored(ImageError):
    """A member of a shard that is no image; it has a name and no score."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class ShardError(ImageError):
    """A shard cannot be read, or not to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One folder, list, Parquet or tar file; or image files that were named one by one."""

    address: str
    """A path or a URL."""
    kind: str
    """files, folder, list, parquet or tar."""
    files: tuple[Path, ...] = ()
    """Of `files`."""

    @property
    def stem(self) -> str:
        """What a part of the result is called."""
        name = (
            PurePosixPath(self.address.rstrip("/")).name if is_url(self.address) else Path(self.address).resolve().name
        )
        if self.kind == "files":
            return "images"
        name = name if self.kind == "folder" else name.rsplit(".", 1)[0]
        return name.lstrip(".") or "images"  # parts are no hidden files

    def check(self) -> None:
        """Refuse what is named and not there, which would be a part of no images; at a URL this is not looked at.

        Raises:
            ImageError: naming the first.
        """
        named = self.files if self.kind == "files" else () if is_url(self.address) else (Path(self.address),)
        for path in named:
            if not path.exists():
                raise ImageError(f"there is no {path}")

    def images(self, column: str | None = None) -> Iterator[EncodedImage | Unscored]:
        """Yield its images in order; an error where a member is none.

        Args:
            column: of a Parquet file; None: the first that holds images.

        Raises:
            ImageError: the shard itself cannot be read, or ends before its end.
        """
        if self.kind == "tar":
            return _read_tar(self.address)
        if self.kind == "parquet":
            return _read_parquet(self.address, column)
        return map(_file, self.paths())

    def paths(self) -> list[Path]:
        """Return the files of a folder or a list, or those named.

        Raises:
            ImageError: there is none, or the folder or list cannot be read.
        """
        if self.kind == "list":
            return _read_list(Path(self.address))
        if self.kind == "folder":
            folder = Path(self.address)
            if not (inside := [Path(folder, name) for name in walk_images(folder).names]):
                raise ImageError(f"there is no image in {folder}; known endings: {', '.join(sorted(SUFFIXES))}")
            return sorted(inside)
        return list(self.files)


def find_shards(sources: Sequence[str | Path]) -> list[Shard]:
    """Return the shards that sources name, in the order in which they are named.

    Raises:
        InputError: a folder at a URL holds no shard.
        CacheError: its server does not answer.
    """
    shards: list[Shard] = []
    files: list[Path] = []
    for source in itertools.chain.from_iterable(expand_ranges(str(source)) for source in sources):
        ending = PurePosixPath(source).suffix.lower()
        if is_url(source) and ending not in STREAMS:
            below = [url for url in list_objects(source) if url.lower().endswith(STREAMS)]
            if not below:
                raise InputError(f"there is no shard below {source}; known endings: {', '.join(STREAMS)}")
            shards += [Shard(address=url, kind=url.rsplit(".", 1)[1].lower()) for url in below]
        elif ending in STREAMS and not Path(source).is_dir():
            shards.append(Shard(address=source, kind=ending[1:]))
        elif Path(source).is_dir():
            shards.append(Shard(address=source, kind="folder"))
        elif ending == LIST:
            shards.append(Shard(address=source, kind="list"))
        else:
            files.append(Path(source))
    if files:
        shards.append(Shard(address=", ".join(map(str, files[:3])), kind="files", files=tuple(files)))
    return shards


def expand_ranges(address: str) -> list[str]:
    """Return the addresses of `{000..099}`, as WebDataset writes them, with as many digits.

    Raises:
        InputError: a range ends before it begins.
    """
    match = _RANGE.search(address)
    if match is None:
        return [address]
    first, last, digits = int(match[1]), int(match[2]), len(match[1])
    if last < first:
        raise InputError(f"{address}: the range {match[0]} ends before it begins")
    head, tail = address[: match.start()], address[match.end() :]
    return [head + f"{number:0{digits}}" + rest for number in range(first, last + 1) for rest in expand_ranges(tail)]


def _file(path: Path) -> EncodedImage:
    try:
        time = path.stat().st_mtime
    except OSError:
        time = None  # `read` says why
    return EncodedImage(name=str(path), where=str(path), read=partial(read_content, path, str(path)), time=time)


def _read_list(path: Path) -> list[Path]:
    try:
        lines = path.read_text("utf-8-sig", "surrogateescape").splitlines()
    except OSError as error:
        raise ImageError(f"list {path} cannot be read: {error.strerror or error}") from None
    if not (found := [path.parent / line for line in map(str.strip, lines) if line]):
        raise ImageError(f"list {path} is empty; write a path a line")
    return found


def _open(address: str) -> BinaryIO:
    if is_url(address):
        return open_object(address)
    try:
        return open(address, "rb")
    except OSError as error:
        raise ImageError(f"{address} cannot be read: {error.strerror or error}") from None


def _read_tar(address: str) -> Iterator[EncodedImage | Unscored]:
    """Yield the members; those that share their key with an image and are none are left out, as its labels."""
    with _open(address) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for _, members in itertools.groupby(_members(archive), key=lambda member: _key(member.name)):
                    yield from _read_group(address, archive, members)
                end = archive.offset
            file.seek(end)
            if (block := file.read(_BLOCK)) != bytes(_BLOCK):
                found = "ends" if len(block) < _BLOCK else "is damaged"
                raise ImageError(f"{address} {found} at byte {end}, before the end of its archive; copy it anew")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ImageError(f"{address} cannot be read as a tar file: {error}") from None


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
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


def _read_parquet(address: str, column: str | None) -> Iterator[EncodedImage | Unscored]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra(f"{address} needs pyarrow; install it with: pip install 'nacpipe[score]'") from None
    with _open(address) as file:
        try:
            # Without the two it reads all images of a row group first, and many files are one row group.
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=READ_AHEAD)
            chosen = _image_column(address, table.schema_arrow, column)
            row = 0
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=[chosen]):
                for value in batch.column(0).to_pylist():
                    yield _parquet_row(address, row, value)
                    row += 1
        except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: of names that are no UTF-8
            raise ImageError(f"{address} cannot be read as Parquet: {str(error).splitlines()[0][:200]}") from None


def _image_column(address: str, schema: Any, column: str | None) -> str:
    """The name of the column of images: bytes, or a struct with a field of bytes, as Hugging Face's data sets have."""
    import pyarrow.types as types

    def holds_images(kind: Any) -> bool:
        if types.is_struct(kind):
            return bool(kind.get_field_index("bytes") >= 0 and holds_images(kind.field("bytes").type))
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    fitting = [field.name for field in schema if holds_images(field.type)]
    if column is None and fitting:
        return str(fitting[0])
    if column in fitting:
        return str(column)
    wanted = "a column of encoded images" if column is None else f"a column {column!r} of encoded images"
    raise ImageError(f"{address} has not {wanted} (bytes, or a struct with bytes); it has {', '.join(schema.names)}")


def _parquet_row(address: str, row: int, value: Any) -> EncodedImage | Unscored:
    name = str(row)
    if isinstance(value, dict):
        name, value = str(value.get("path") or name), value.get("bytes")
    where = f"{address}: row {row}" + (f", {name}" if name != str(row) else "")
    if value is None:
        return Unscored(f"{CANNOT_READ}{where}: it is null", name)
    return EncodedImage(name=name, where=where, read=partial(bytes, value))


def check_stems(shards: Sequence[Shard]) -> None:
    """Refuse two shards whose parts would have one name.

    Raises:
        InputError: naming both.
    """
    seen: dict[str, Shard] = {}
    for shard in shards:
        other = seen.setdefault(os.path.normcase(shard.stem), shard)
        if other is not shard:
            raise InputError(
                f"{other.address} and {shard.address} would both be written as {shard.stem}; score them into two"
                " folders"
            )
