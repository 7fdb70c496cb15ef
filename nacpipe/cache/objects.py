"""Files at object stores that are no caches: shards of images, and what was made of them.

s3://bucket/shards/000.tar      read in ranges, and written whole; gs:// and az:// come with the same package
https://host/shards/000.tar     read alone
"""

from __future__ import annotations

import io
from pathlib import PurePosixPath
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from nacpipe.cache.store import CONNECT, OBJECTS, PAGES, TIMEOUT, first_line, permanent_error_advice
from nacpipe.errors import CacheError, InputError, MissingExtra

READ_AHEAD = 4 << 20  # bytes of one request


def open_object(url: str) -> BinaryIO:
    """Open an object for reading in pieces; failed requests are repeated.

    From a web server without byte ranges it is fetched whole, to a temporary file.

    Raises:
        InputError: the URL cannot be read, or there is no such object.
        MissingExtra: obstore is not installed.
    """
    import obstore

    store, name = _connect(url)
    try:
        reader = obstore.open_reader(store, name, buffer_size=READ_AHEAD)
        if url.startswith(PAGES):
            reader.read(1)
            reader.seek(0)
    except Exception as error:  # obstore's own
        if "not supported" in str(error):
            return _fetch(store, name, url)
        raise _named(error, url, "read") from error
    return io.BufferedReader(_RawObject(reader, url), READ_AHEAD)


def _fetch(store: Any, name: str, url: str) -> BinaryIO:
    import obstore

    file: Any = TemporaryFile()  # noqa: SIM115 (the caller closes it)
    try:
        for chunk in obstore.get(store, name).stream(min_chunk_size=READ_AHEAD):
            file.write(chunk)
    except Exception as error:  # obstore's own
        file.close()
        raise _named(error, url, "read") from error
    file.seek(0)
    return file  # type: ignore[no-any-return]


def write_object(url: str, content: bytes) -> None:
    """Write an object whole: it appears at once, or not at all.

    Raises:
        InputError: the URL cannot be written.
        CacheError: the server does not take it.
    """
    import obstore

    store, name = _connect(url, write=True)
    try:
        obstore.put(store, name, content, use_multipart=False)
    except Exception as error:  # obstore's own
        raise _named(error, url, "written") from error


def check_writable_object(url: str) -> None:
    """Refuse a URL that nothing can be written below; the server is not asked.

    Raises:
        InputError: it is no object store's.
    """
    if url.partition("://")[0] not in OBJECTS:
        raise InputError(f"{url} cannot be written; write to a folder or to s3://BUCKET/FOLDER")


def read_object(url: str) -> bytes | None:
    """Return an object; None if it does not exist.

    Raises:
        CacheError: the server does not answer.
    """
    import obstore

    store, name = _connect(url)
    try:
        return obstore.get(store, name).bytes().to_bytes()
    except FileNotFoundError:
        return None
    except Exception as error:  # obstore's own
        raise _named(error, url, "read") from error


def list_objects(url: str) -> list[str]:
    """Return the URLs of all objects below a folder at an object store, in alphabetical order.

    Raises:
        InputError: it is at a web server, which has no listing.
        CacheError: the server does not answer.
    """
    import obstore

    base = url.rstrip("/")
    if base.partition("://")[0] in PAGES:
        raise InputError(f"{url}: a web server has no listing; name its files, such as {base}/{{000..009}}.tar")
    store, _ = _connect(f"{base}/x", write=True)
    try:
        found = [str(meta["path"]) for page in obstore.list(store) for meta in page]
    except Exception as error:  # obstore's own
        raise _named(error, url, "listed") from error
    return sorted(f"{base}/{path}" for path in found)


class _RawObject(io.RawIOBase):
    """obstore's reader as Python's."""

    def __init__(self, reader: Any, url: str) -> None:
        self._reader, self._url = reader, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._reader.seek(offset, whence))

    def tell(self) -> int:
        return int(self._reader.tell())

    def readinto(self, buffer: Any) -> int:
        try:
            content = bytes(self._reader.read(len(buffer)))
        except Exception as error:  # obstore's own
            raise _named(error, self._url, "read") from error
        buffer[: len(content)] = content
        return len(content)


def _connect(url: str, *, write: bool = False) -> tuple[Any, str]:
    """Return the store of the folder that holds an object, and the object's name in it."""
    scheme, _, location = url.partition("://")
    if scheme not in OBJECTS + PAGES:
        raise InputError(f"{url}: images are not read from {scheme}://; known: {', '.join(OBJECTS + PAGES)}, and files")
    if write:
        check_writable_object(url)
    try:
        from obstore.store import HTTPStore, from_url
    except ImportError:
        raise MissingExtra(f"{url} needs obstore: pip install 'nacpipe[remote]'") from None
    path = PurePosixPath(location)
    if len(path.parts) < 2:
        raise InputError(f"{url} names a bucket, not a file in it, such as {url.rstrip('/')}/000.tar")
    folder = f"{scheme}://{path.parent.as_posix()}"
    options: Any = {"allow_http": True, "connect_timeout": CONNECT, "timeout": TIMEOUT}
    try:
        if scheme in PAGES:
            return HTTPStore.from_url(folder, client_options=options), path.name
        return from_url(folder, client_options=options), path.name
    except Exception as error:  # obstore's own
        raise InputError(f"{url} cannot be opened: {first_line(error)}") from error


def _named(error: Exception, url: str, verb: str) -> CacheError | InputError:
    if isinstance(error, CacheError | InputError):
        return error
    if isinstance(error, FileNotFoundError):
        return InputError(f"there is no {url}")
    advice = permanent_error_advice(error, url) or "is the server running, and is the address right?"
    return CacheError(f"{url} cannot be {verb} ({first_line(error)}); {advice}")
