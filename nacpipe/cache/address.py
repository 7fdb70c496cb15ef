"""From a cache's address, a path or URL, to its Zarr store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.abc.store import Store
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, ObjectStore

from nacpipe.cache.durability import replace_file
from nacpipe.cache.store import CONNECT, OBJECTS, PAGES, TIMEOUT, RemoteStore, WebStore, first_line
from nacpipe.errors import InputError, MissingExtra
from nacpipe.files import is_url

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Client

    Base = ObjectStore[Client]
else:
    Base = ObjectStore


def open_store(address: str | Path, *, write: bool = False) -> Store | Path:
    """Return the store of a cache; a folder is returned as its path, which Zarr opens.

    Raises:
        InputError: the URL has an unknown scheme, names no cache, or is to be written and can only be read.
        MissingExtra: obstore is not installed.
    """
    if not is_url(address):
        return Path(address)
    url = str(address).rstrip("/")
    scheme, _, location = url.partition("://")
    if scheme not in OBJECTS + PAGES:
        known = ", ".join(OBJECTS + PAGES)
        raise InputError(f"{url}: caches are not kept at {scheme}://; known: {known}, and folders")
    if write and scheme in PAGES:
        raise InputError(f"{url} can only be read; write to a folder or to s3://BUCKET/x.zarr")
    if scheme in OBJECTS and not location.partition("/")[2]:
        raise InputError(f"{url} names a bucket, not a cache in it, such as {url}/x.zarr")
    try:
        from obstore.exceptions import BaseError
        from obstore.store import HTTPStore, from_url
    except ImportError:
        raise MissingExtra(f"{url} needs obstore: pip install 'nacpipe[remote]'") from None
    options: Any = {"allow_http": True, "connect_timeout": CONNECT, "timeout": TIMEOUT}
    retries: Any = {"max_retries": 0}  # RemoteStore repeats requests, also interrupted listings and unconfirmed writes
    try:
        if scheme in PAGES:
            return WebStore(HTTPStore.from_url(url, client_options=options, retry_config=retries), url, read_only=True)
        return RemoteStore(from_url(url, client_options=options, retry_config=retries), url, read_only=not write)
    except (BaseError, ValueError) as error:
        raise InputError(f"{url} cannot be opened: {first_line(error)}") from error


def holds_cache(address: str | Path) -> bool:
    """Return whether a root group exists.

    Raises:
        CacheError: the server does not answer.
    """
    store = open_store(address)
    return (store / "zarr.json").exists() if isinstance(store, Path) else sync(store.exists("zarr.json"))


def is_empty(url: str) -> bool:
    """Return whether no object exists below a URL."""
    store = open_store(url)
    assert isinstance(store, Store)
    return sync(store.is_empty(""))


class Objects:
    """A cache's objects as bytes, for repair: read, replaced and removed whole."""

    def __init__(self, address: str | Path) -> None:
        store = open_store(address, write=True)
        self._disk = store if isinstance(store, Path) else None
        self.store: Store = LocalStore(store) if isinstance(store, Path) else store
        """The store of the objects."""

    def read(self, key: str) -> bytes | None:
        """Return an object; None if it does not exist."""
        buffer = sync(self.store.get(key, default_buffer_prototype()))
        return None if buffer is None else buffer.to_bytes()

    def replace(self, key: str, content: bytes) -> None:
        """Write an object atomically; it is on the disk when this returns."""
        if self._disk:
            replace_file(self._disk / key, content)
        else:
            sync(self.store.set(key, cpu.Buffer.from_bytes(content)))

    def remove(self, key: str) -> None:
        """Remove an object if it exists."""
        sync(self.store.delete(key))
