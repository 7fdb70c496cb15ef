"""Where images to be scored come from: folders, lists, Parquet files and tar files, each read from front to back.

    photos/                       the image files in a folder, at any depth, in alphabetical order
    nightly.txt                   a list: a path a line, from the list's folder on
    crops.parquet                 a column of encoded images: bytes, or a struct with `bytes` and `path`
    shards/{000..099}.tar         WebDataset's shards: members KEY.ENDING; what shares a KEY with an image belongs to it
    shards/000.tar.gz             the same, packed: .tgz, .tar.bz2, .tar.xz too
    s3://bucket/shards/           every .tar, packed ones too, and .parquet below it; https://host/{000..099}.tar too

One of them is a shard: the unit of a part of the result. Memory holds a few batches of one, whatever its size.
"""

from __future__ import annotations

import codecs
import importlib
import io
import itertools
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from nacpipe.benchmarks.folders import SUFFIXES, is_hidden, walk_images
from nacpipe.benchmarks.lists import BLANKS
from nacpipe.cache.objects import READ_AHEAD, list_objects, open_object
from nacpipe.errors import ImageError, InputError, MissingExtra, NacError
from nacpipe.extraction.encoded_images import EncodedImage
from nacpipe.extraction.image_file import CANNOT_READ, read_content
from nacpipe.files import is_url

UNPACK = {".tar.gz": "gzip", ".tgz": "gzip", ".tar.bz2": "bz2", ".tar.xz": "lzma"}  # modules with an `open`
STREAMS = (".tar", *UNPACK, ".parquet")
NOT_READ = (".tar.zst", ".tar.lz4", ".tar.z", ".tzst", ".tbz2", ".txz", ".zip", ".7z", ".rar")
LIST = ".txt"
MAX_IMAGE_BYTES = 1 << 29
ROWS_AT_ONCE = 64  # of a Parquet file
_BRACES = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<names>[^{},]*(?:,[^{},]*)+))\}")
_BLOCK = 512  # bytes, of tar


class Unscored(ImageError):
    """A member of a shard that is no image; it has a name and no score."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


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
        name = name if self.kind == "folder" else name[: -len(_ending(name))]
        return name.lstrip(".") or "images"  # parts are no hidden files

    def check(self) -> None:
        """Refuse what is named and not there, which would be a part of no images; at a URL this is not looked at.

        Raises:
            ImageError: naming the first.
        """
        named = self.files if self.kind == "files" else () if is_url(self.address) else (Path(self.address),)
        for path in named:
            if not os.path.exists(path):  # noqa: PTH110 (Path's raises where a name is too long)
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
                shards = sorted(path for path in folder.iterdir() if _ending(path.name) in STREAMS)
                advice = f"; shards are named one by one, such as {shards[0]}" if shards else ""
                raise ImageError(f"there is no image in {folder}; known endings: {', '.join(sorted(SUFFIXES))}{advice}")
            return sorted(inside)
        return list(self.files)


def find_shards(sources: Sequence[str | Path]) -> list[Shard]:
    """Return the shards that sources name, in the order in which they are named.

    Raises:
        InputError: a folder at a URL holds no shard, or an archive is of a kind that is not read.
        CacheError: its server does not answer.
    """
    shards: list[Shard] = []
    files: list[Path] = []
    for source in itertools.chain.from_iterable(expand_braces(str(source)) for source in sources):
        ending = _ending(source)
        if not is_url(source) and os.path.isdir(source):  # noqa: PTH112 (Path's raises where a name is too long)
            shards.append(Shard(address=source, kind="folder"))
        elif ending in NOT_READ:
            raise InputError(f"{source}: archives {ending} are not read; pack it anew, as one of {', '.join(STREAMS)}")
        elif ending in STREAMS:
            shards.append(_stream(source))
        elif is_url(source):
            below = list_objects(source)
            if not (found := [url for url in below if _ending(url) in STREAMS]):
                unread = next((f"; {url} is not read" for url in below if _ending(url) in NOT_READ), "")
                raise InputError(f"there is no shard below {source}; known endings: {', '.join(STREAMS)}{unread}")
            shards += map(_stream, found)
        elif ending == LIST:
            shards.append(Shard(address=source, kind="list"))
        else:
            files.append(Path(source))
    if files:
        shards.append(Shard(address=", ".join(map(str, files[:3])), kind="files", files=tuple(files)))
    return shards


def find_paths(sources: Sequence[str | Path]) -> list[Path]:
    """Return the image files that sources name, in the order in which they are named; errors as `find_shards`.

    Raises:
        ImageError: a folder holds no image, a list is empty, or one of them cannot be read.
    """
    return [path for source in sources for shard in find_shards([source]) for path in shard.paths()]


def _ending(address: str) -> str:
    """The ending that says what a file is, in lower case, such as .tar.gz."""
    name = PurePosixPath(address).name.lower()
    known = [ending for ending in (*STREAMS, *NOT_READ) if name.endswith(ending)]
    return max(known, key=len) if known else PurePosixPath(name).suffix


def _stream(address: str) -> Shard:
    return Shard(address=address, kind="parquet" if _ending(address) == ".parquet" else "tar")


def expand_braces(address: str) -> list[str]:
    """Return the addresses of `{000..099}`, with as many digits, and of `{train,val}`, as WebDataset writes them.

    Raises:
        InputError: a range ends before it begins.
    """
    match = _BRACES.search(address)
    if match is None or (not is_url(address) and os.path.lexists(address)):
        return [address]
    if match["names"] is not None:
        chosen = match["names"].split(",")
    else:
        first, last, digits = int(match["first"]), int(match["last"]), len(match["first"])
        if last < first:
            raise InputError(f"{address}: the range {match[0]} ends before it begins")
        chosen = [f"{number:0{digits}}" for number in range(first, last + 1)]
    head, tail = address[: match.start()], address[match.end() :]
    return [head + one + rest for one in chosen for rest in expand_braces(tail)]


def _file(path: Path) -> EncodedImage:
    try:
        time = path.stat().st_mtime
    except (OSError, ValueError):
        time = None  # `read` says why
    return EncodedImage(name=str(path), where=str(path), read=partial(read_content, path, str(path)), time=time)


def _read_list(path: Path) -> list[Path]:
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape").split("\n")
    except OSError as error:
        raise ImageError(f"list {path} cannot be read: {error.strerror or error}") from None
    if not (found := [path.parent / line for line in (line.strip(BLANKS) for line in lines) if line]):
        raise ImageError(f"list {path} is empty; write a path a line")
    return found


def _open(address: str) -> BinaryIO:
    if is_url(address):
        return open_object(address)
    try:
        return open(address, "rb")
    except OSError as error:
        raise ImageError(f"{address} cannot be read: {error.strerror or error}") from None


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


def _read_tar(address: str) -> Iterator[EncodedImage | Unscored]:
    """Yield the members; those that share their key with an image and are none are left out, as its labels."""
    module = UNPACK.get(_ending(address))
    with ExitStack() as stack:
        file = stack.enter_context(_open(address))
        try:
            if module is not None:
                file = stack.enter_context(importlib.import_module(module).open(file, "rb"))
            blocks: Any = _Blocks(file)
            with tarfile.open(fileobj=blocks, mode="r:") as archive:
                for _, members in itertools.groupby(_members(archive), key=lambda member: _key(member.name)):
                    yield from _read_group(address, archive, members)
                end, block = archive.offset, blocks.last
            if block != bytes(_BLOCK):
                found = "ends" if len(block) < _BLOCK else "is damaged"
                raise ImageError(f"{address} {found} at byte {end}, before the end of its archive; copy it anew")
            while module is not None and blocks.read(READ_AHEAD):
                pass  # to the checksum
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
        return any(test(kind) for test in (types.is_binary, types.is_large_binary, types.is_binary_view,
                                           types.is_fixed_size_binary))  # fmt: skip

    def bytes_of(kind: Any) -> Any:
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        return kind.value_type if types.is_dictionary(kind) else kind

    fitting = [field.name for field in schema if holds_images(bytes_of(field.type))]
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
