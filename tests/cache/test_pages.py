"""Caches behind a plain web server: read as those in a folder, never written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nacpipe.cache import Cache, CacheWriter, open_cache, pages, store
from nacpipe.cache.repair import repair_cache
from nacpipe.errors import CacheError, InputError
from tests.pages import Blind, Plain, Ranges, serve

pytest.importorskip("obstore")


@pytest.fixture(scope="module")
def here(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("here") / "x.zarr")


@pytest.fixture
def url(request: pytest.FixtureRequest, here: Cache) -> Iterator[str]:
    """The cache's address at a server of the kind that a test names."""
    with serve(Path(here.path).parent, request.param) as address:
        yield f"{address}/x.zarr"


@pytest.mark.parametrize("url", [Plain, Ranges], indirect=True)
def test_a_cache_is_read_as_one_in_a_folder(url: str, here: Cache) -> None:
    there = open_cache(url)
    assert list(there) == list(here)
    for name in ("id/val", "ood/near/letters"):
        assert there[name].attributes == here[name].attributes  # compared with its digest on the way
        assert there[name].stored_bytes() == here[name].stored_bytes()
        for path in here.header.arrays():
            np.testing.assert_array_equal(there[name].read(path), here[name].read(path), err_msg=f"{name}/{path}")


@pytest.mark.parametrize("url", [Plain, Ranges], indirect=True)
def test_a_changed_file_is_found(url: str, here: Cache) -> None:
    file = Path(here.path, "id/test/label/c.1")
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CacheError, match=f"^{url}: id/test is not what was sealed"):
            open_cache(url)["id/test"]
        file.unlink()
        with pytest.raises(CacheError, match=r"id/test/label is damaged \(1 of its chunks are not there\)"):
            open_cache(url)["id/test"]
    finally:
        file.write_bytes(content)
    assert open_cache(url)["id/test"].rows == 50


@pytest.mark.parametrize("url", [Plain], indirect=True)
def test_it_is_not_written(url: str, here: Cache) -> None:
    for address in (url, f"{url.removesuffix('x.zarr')}new.zarr"):
        with pytest.raises(
            InputError, match=f"^{address} can only be read; write to a folder or to s3://BUCKET/x.zarr"
        ):
            CacheWriter(address, here.header)
    with pytest.raises(InputError, match=f"^{url} can only be read"):
        repair_cache(url)


@pytest.mark.parametrize("url", [Blind], indirect=True)
def test_a_server_without_pages_is_refused_in_words(url: str) -> None:
    with pytest.raises(CacheError, match=f"^{url}: the server shows no page of id/, .*copy the cache here"):
        open_cache(url)


@pytest.mark.parametrize("url", [Plain], indirect=True)
def test_what_is_not_there(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CacheError, match=f"there is no cache at {url}x"):
        open_cache(f"{url}x")
    monkeypatch.setattr(store, "ATTEMPTS", 2)
    with pytest.raises(CacheError, match=r"^http://127\.0\.0\.1:9/x\.zarr cannot be read .*asked 2 times"):
        open_cache("http://127.0.0.1:9/x.zarr")


@pytest.mark.parametrize("url", [Plain], indirect=True)
def test_no_more_requests_are_under_way_than_a_small_server_lets_wait(
    url: str, here: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A split's digest asks for every chunk at once."""
    repeat, at_once, most = store.RemoteStore._repeat, 0, 0

    async def count(*args: Any) -> Any:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        try:
            return await repeat(*args)
        finally:
            at_once -= 1

    monkeypatch.setattr(store.RemoteStore, "_repeat", count)
    assert open_cache(url)["id/train"].rows == here["id/train"].rows
    assert most == pages.IN_FLIGHT
