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
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from nacpipe.benchmarks.folders import SUFFIXES, walk_images
from nacpipe.benchmarks.lists import BLANKS
from nacpipe.cache.objects import list_objects
from nacpipe.detector.parquet_file import read_parquet
from nacpipe.detector.tar_file import read_tar
from nacpipe.errors import ImageError, InputError
from nacpipe.extraction.image_content import EncodedImage, Unscored, read_content
from nacpipe.files import is_url

UNPACK = {  # ending → the module whose `open` reads it
    **dict.fromkeys((".tar.gz", ".tgz"), "gzip"),
    **dict.fromkeys((".tar.bz2", ".tbz2"), "bz2"),
    **dict.fromkeys((".tar.xz", ".txz"), "lzma"),
}
STREAMS = (".tar", *UNPACK, ".parquet")
NOT_READ = (".tar.zst", ".tar.lz4", ".tar.z", ".tzst", ".zip", ".7z", ".rar")
LIST = ".txt"
_BRACES = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<names>[^{},]*(?:,[^{},]*)+))\}")


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
            return read_tar(self.address, UNPACK.get(_ending(self.address)))
        if self.kind == "parquet":
            return read_parquet(self.address, column)
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
