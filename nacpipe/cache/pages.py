"""A read-only store for a cache behind a web server that lists its folders.

    https://host/x.zarr/id          a page with a link to each entry, a folder's ending in / (Apache, nginx, python -m
                                    http.server); HTTP itself has no listing

Byte ranges are requested; a server without them sends the whole object, from which the bytes are taken. At most six
requests run at once, as in browsers: `python -m http.server` queues five, and a refused one is repeated a second later.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar
from urllib.parse import unquote, urlsplit
from weakref import WeakKeyDictionary

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from nacpipe.cache.store import RemoteStore
from nacpipe.errors import CacheError

IN_FLIGHT = 6  # requests
_SEMAPHORES: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
    WeakKeyDictionary()
)  # by event loop, because a forked process has its own
_T = TypeVar("_T")
_LINK = re.compile(r"""<a\s[^>]*?href=["']([^"'?#]+)["']""", re.IGNORECASE)


class PageStore(RemoteStore):
    """Files of a web server, listed from its pages."""

    ranges = True  # False after the server refused a byte range

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return an object or a range of its bytes; None if it does not exist."""
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

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """Yield the names directly below a prefix."""
        for name in await self._entries(prefix):
            yield name.rstrip("/")

    async def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        """Yield every key below a folder."""
        for key in await self._walk(prefix.rstrip("/")):
            yield key

    async def getsize_prefix(self, prefix: str) -> int:
        """Return the bytes of everything below a folder."""
        return sum([await self.getsize(key) async for key in self.list_prefix(prefix)])

    async def _repeat(self, verb: str, request: Callable[[], Awaitable[_T]]) -> _T:
        async with _SEMAPHORES.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(IN_FLIGHT)):
            return await super()._repeat(verb, request)

    async def _walk(self, folder: str) -> Sequence[str]:
        paths = [f"{folder}/{name}" if folder else name for name in await self._entries(folder)]
        below = await asyncio.gather(*(self._walk(path.rstrip("/")) for path in paths if path[-1] == "/"))
        return [path for path in paths if path[-1] != "/"] + [key for keys in below for key in keys]

    async def _entries(self, folder: str) -> Sequence[str]:
        """Return the entries of a folder's page, folders with a / at their end; empty if there is no such folder."""
        page = await super().get(folder, default_buffer_prototype())
        if page is None:
            if folder == "id":
                raise CacheError(
                    f"{self.url}: the server shows no page of {folder}/, and which splits there are is read from pages;"
                    " let it list its folders (autoindex), or copy the cache here"
                )
            return []
        base_path = "/".join([urlsplit(self.url).path, *filter(None, [folder])]) + "/"
        links = (unquote(link) for link in _LINK.findall(page.to_bytes().decode("utf-8", "replace")))
        names = (link.removeprefix(base_path).removeprefix("./") for link in links)
        return [name for name in dict.fromkeys(names) if re.fullmatch(r"[^/.:][^/:]*/?", name)]
