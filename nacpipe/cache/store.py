"""The Zarr store of a cache at a server.

    cache/x.zarr                    a folder
    s3://bucket/x.zarr              objects, read and written; gs:// and az:// come with the same package
    https://host/x.zarr             files of a web server, read-only

A failed request is repeated. Every request reads, writes or removes a whole object, or lists names, so repeating it is
harmless. A request that still fails is a CacheError that names the URL.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.common import concurrent_map
from zarr.storage import ObjectStore

from nacpipe.errors import CacheError

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Client

    Base = ObjectStore[Client]
else:
    Base = ObjectStore

OBJECTS, PAGES = ("s3", "gs", "az"), ("http", "https")
REMOTE_SHARD = 8  # blocks in one object, because a request costs more than its bytes
ATTEMPTS = 9  # the pauses between them are 0.2 s, 0.4 s, … and 26 s together
MAX_REQUESTS = 64  # at once
PAUSE, LONGEST_PAUSE = 0.2, 5.0  # seconds
CONNECT, TIMEOUT = timedelta(seconds=5), timedelta(minutes=2)  # of one request; a shard can be large

WEB_REQUESTS = 6  # at once at a web server, as in browsers: `python -m http.server` queues five

Entries = list[Buffer | None]  # the class below has a method `list`

_T = TypeVar("_T")


class RemoteStore(Base):
    """Objects on a server; requests are repeated, and errors name the URL."""

    def __init__(self, store: Client, url: str, *, read_only: bool = False) -> None:
        super().__init__(store, read_only=read_only)
        self.url = url

    def with_read_only(self, read_only: bool = False) -> RemoteStore:
        """Return the same store, read-only or not."""
        return type(self)(self.store, self.url, read_only=read_only)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return an object or a range of its bytes; None if it does not exist."""
        return await self._repeat("read", lambda: super(RemoteStore, self).get(key, prototype, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> Entries:
        """Return parts of several objects."""
        return list(await asyncio.gather(*(self.get(key, prototype, wanted) for key, wanted in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Return whether an object exists."""
        return await self._repeat("read", lambda: super(RemoteStore, self).exists(key))

    async def getsize(self, key: str) -> int:
        """Return an object's size in bytes."""
        return await self._repeat("read", lambda: super(RemoteStore, self).getsize(key))

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object in one request, so that it exists whole or not at all."""
        import obstore

        self._check_writable()
        content = value.to_bytes()
        await self._repeat("written", lambda: obstore.put_async(self.store, key, content, use_multipart=False))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write an object unless it exists."""
        await self._repeat("written", lambda: super(RemoteStore, self).set_if_not_exists(key, value))

    async def delete(self, key: str) -> None:
        """Remove an object."""
        await self._repeat("written", lambda: super(RemoteStore, self).delete(key))

    async def delete_dir(self, prefix: str) -> None:
        """Remove all objects below a prefix."""
        self._check_writable()
        below = f"{prefix.rstrip('/')}/" if prefix else ""
        await concurrent_map([(key,) async for key in self.list_prefix(below)], self.delete, MAX_REQUESTS)

    async def getsize_prefix(self, prefix: str) -> int:
        """Return the size in bytes of all objects below a prefix."""
        return sum(size for _, size in await self._objects(prefix))

    def list(self) -> AsyncGenerator[str, None]:
        """Yield every key."""
        return self.list_prefix("")

    async def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        """Yield every key that starts with a prefix."""
        for key, _ in await self._objects(prefix):
            yield key

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """Yield the names directly below a prefix."""

        async def request() -> Sequence[str]:
            return [name async for name in super(RemoteStore, self).list_dir(prefix)]

        for name in await self._repeat("read", request):
            yield name

    async def _objects(self, prefix: str) -> Sequence[tuple[str, int]]:
        """Return all pages of a listing; an interrupted listing is repeated, because objects would seem missing."""

        async def request() -> Sequence[tuple[str, int]]:
            return [(meta["path"], meta["size"]) async for meta in self._list(prefix)]

        return await self._repeat("read", request)

    async def _repeat(self, verb: str, request: Callable[[], Awaitable[_T]]) -> _T:
        from obstore.exceptions import BaseError, NotSupportedError

        for attempt in range(ATTEMPTS):
            try:
                return await request()
            except FileNotFoundError:
                if verb == "read":
                    raise
                raise CacheError(f"{self.url} cannot be written: {NO_BUCKET}") from None
            except NotSupportedError:  # the caller handles it
                raise
            except (BaseError, OSError) as error:
                if (advice := permanent_error_advice(error, self.url)) is None and attempt < ATTEMPTS - 1:
                    await asyncio.sleep(min(PAUSE * 2**attempt, LONGEST_PAUSE))
                    continue
                raise CacheError(
                    f"{self.url} cannot be {verb} ({first_line(error)}); {advice or _retry_advice(verb)}"
                ) from error
        raise AssertionError


class WebStore(RemoteStore):
    """Files of a web server, which has no listing: the root's consolidated metadata say what is there.

    The metadata of every group and array are answered from that copy, and the keys of chunks follow from the shapes, so
    that a cache is read in one request and its chunks. A server without byte ranges sends the whole object, from which
    the bytes are taken.
    """

    ranges = True  # False after the server refused a byte range

    def __init__(self, store: Client, url: str, *, read_only: bool = True) -> None:
        super().__init__(store, url, read_only=read_only)
        self._root: bytes | None = None
        self._metadata: Mapping[str, Any] | None = None
        self._uses_copy = True

    @contextlib.contextmanager
    def without_copy(self) -> Iterator[None]:
        """Request the metadata of groups and arrays themselves while this lasts, for a comparison with the copy."""
        self._uses_copy = False
        try:
            yield
        finally:
            self._uses_copy = True

    async def metadata(self) -> Mapping[str, Any]:
        """Return the consolidated metadata, path → the content of its zarr.json; empty where the root has none."""
        if self._metadata is None:
            if self._root is None:
                found = await self._request("zarr.json", default_buffer_prototype(), None)
                self._root = b"" if found is None else found.to_bytes()
            self._metadata = read_consolidated(self._root)
        return self._metadata

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return an object or a range of its bytes; None if it does not exist."""
        path, _, name = key.rpartition("/")
        if name != "zarr.json" or not self._uses_copy:
            return await self._request(key, prototype, byte_range)
        metadata = await self.metadata()
        content = json.dumps(metadata[path]).encode() if path in metadata else b"" if path else self._root
        return prototype.buffer.from_bytes(content) if content else None

    async def exists(self, key: str) -> bool:
        """Return whether an object exists."""
        path, _, name = key.rpartition("/")
        if name == "zarr.json" and self._uses_copy:
            metadata = await self.metadata()
            return path in metadata if path else bool(self._root)
        return await super().exists(key)

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """Yield the names of the groups and arrays directly below a prefix."""
        above = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        paths = (path.removeprefix(above) for path in await self.metadata() if path.startswith(above))
        for name in dict.fromkeys(path.partition("/")[0] for path in paths):
            yield name

    async def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        """Yield every key below a prefix: those of metadata, and those of chunks, which follow from the shapes."""
        metadata = await self.metadata()
        if "zarr.json".startswith(prefix) and self._root:
            yield "zarr.json"
        for path, content in metadata.items():
            for key in (f"{path}/zarr.json", *_chunk_keys(path, content)):
                if key.startswith(prefix):
                    yield key

    async def getsize_prefix(self, prefix: str) -> int:
        """Return the bytes of everything below a prefix."""

        async def size(key: str) -> int:
            with contextlib.suppress(FileNotFoundError):  # a key by the shapes, of a lost chunk
                return await self.getsize(key)
            return 0

        return sum(await asyncio.gather(*[size(key) async for key in self.list_prefix(prefix)]))

    async def _request(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer | None:
        from obstore.exceptions import NotSupportedError

        if byte_range is not None and self.ranges:
            try:
                return await super().get(key, prototype, byte_range)
            except NotSupportedError:
                self.ranges = False
        whole = await super().get(key, prototype)
        if whole is None or byte_range is None:
            return whole
        content = whole.to_bytes()
        if isinstance(byte_range, RangeByteRequest):
            part = content[byte_range.start : byte_range.end]
        elif isinstance(byte_range, OffsetByteRequest):
            part = content[byte_range.offset :]
        else:
            part = content[-byte_range.suffix :]
        return prototype.buffer.from_bytes(part)

    async def _repeat(self, verb: str, request: Callable[[], Awaitable[_T]]) -> _T:
        async with _SEMAPHORES.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(WEB_REQUESTS)):
            return await super()._repeat(verb, request)


_SEMAPHORES: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
    WeakKeyDictionary()
)  # by event loop, because a forked process has its own


def read_consolidated(root: bytes) -> Mapping[str, Any]:
    """Return the consolidated metadata in the content of a root's zarr.json; empty where there are none."""
    try:
        found = json.loads(root)["consolidated_metadata"]["metadata"]
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _chunk_keys(path: str, content: Any) -> Iterator[str]:
    """Yield the keys of an array's chunks by its shape; none of a group, and none where the metadata are damaged."""
    with contextlib.suppress(Exception):  # a crafted copy raises any error; the array itself is refused in words
        if content["node_type"] == "array":
            rows, size = int(content["shape"][0]), int(content["chunk_grid"]["configuration"]["chunk_shape"][0])
            dot = content["chunk_key_encoding"].get("configuration", {}).get("separator", "/")
            rest = f"{dot}0" * (len(content["shape"]) - 1)
            yield from (f"{path}/c{dot}{number}{rest}" for number in range(-(-rows // size)))


NO_BUCKET = "there is no such bucket at that server (AWS_ENDPOINT_URL)"


def _retry_advice(verb: str) -> str:
    advice = f"asked {ATTEMPTS} times: is the server running, and is the address right?"
    return advice if verb == "read" else f"{advice} What was written is safe, and the same command goes on"


def permanent_error_advice(error: Exception, url: str) -> str | None:
    """Return advice for an error that repeating the request cannot solve; None if it may."""
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    text = str(error)
    if "NoSuchBucket" in text:
        return NO_BUCKET
    if "/latest/api/token" in text or "credential" in text.lower():  # the metadata server of cloud machines
        return "give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket"
    if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError):
        if url.startswith("http"):
            return "the server refuses access: its files must be readable"
        return "the server does not let these credentials (AWS_ACCESS_KEY_ID, …) do that"
    return None


def first_line(error: Exception) -> str:
    """Return obstore's message without the dump of the error's structure."""
    text = str(error).split("\n\nDebug source")[0]
    return re.sub(r"\s+", " ", text).strip()[:300] or type(error).__name__
