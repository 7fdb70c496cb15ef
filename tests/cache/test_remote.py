"""Caches at s3://, against a real endpoint process: equal to those in a folder, and faults that nobody notices."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from zarr.core.sync import sync

from nacpipe.cache import Cache, CacheWriter, address, open_cache, store
from nacpipe.cache.lock import CacheLock
from nacpipe.cache.repair import repair_cache
from nacpipe.errors import CacheError, InputError, MissingExtra
from tests.alike import assert_alike, copy_splits, prepare_split, write_rows
from tests.s3 import BUCKET, FAULTS, Proxy, variables

obstore = pytest.importorskip("obstore")
pytest.importorskip("moto")


@pytest.fixture
def proxy(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The endpoint, through a proxy that is told in the test what to do."""
    monkeypatch.setattr(store, "PAUSE", 0.01)
    with Proxy(s3_endpoint) as proxy:
        for name, value in variables(proxy.url).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """A cache of this test's own."""
    return f"s3://{BUCKET}/folder/{request.node.name.replace('[', '-').replace(']', '')}.zarr"


@pytest.fixture(scope="module")
def here(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The same things in a folder."""
    return make_cache(tmp_path_factory.mktemp("here") / "x.zarr")


def test_a_remote_cache_is_there_and_nowhere_else(
    proxy: Proxy, url: str, here: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert copy_splits(here, url, "id/val", "ood/near/letters").path == url
    assert proxy.requests["PUT"] > 50
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", FAULTS)
def test_a_request_that_fails_is_sent_again(proxy: Proxy, url: str, here: Cache, kind: str) -> None:
    proxy.share, proxy.only, proxy.slow = 0.2, kind, 0.03
    there = copy_splits(here, url, "ood/far/textures")
    assert list(there) == ["ood/far/textures"]
    assert_alike(here, there)
    assert proxy.faults[kind] >= 15
    assert min(proxy.hit["GET"], proxy.hit["PUT"], proxy.hit["HEAD"]) >= 1


def test_an_answer_that_does_not_come_is_asked_for_again(
    proxy: Proxy, url: str, here: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_splits(here, url)
    monkeypatch.setattr(store, "TIMEOUT", store.timedelta(milliseconds=500))
    proxy.only, proxy.slow, proxy.share, proxy.limit = "slow", 3.0, 1.0, 3
    assert open_cache(url).header == here.header
    assert proxy.faults["slow"] == 3


def test_a_repair_loses_no_fault_of_the_server(proxy: Proxy, url: str, here: Cache) -> None:
    """One request in five fails, and what is taken is the damaged block's mark alone."""
    there = copy_splits(here, url, "id/val")
    address.Objects(url).replace("id/val/logits/c.2.0", b"12345678")
    address.Objects(url).replace("classifier/bias/c.0", b"12345678")
    proxy.share, proxy.slow = 0.2, 0.03
    assert repair_cache(url) == [
        "classifier: is to be written again",
        "id/val: block 2, rows 32 to 39, is to be computed again",
    ]
    proxy.share = 0.0
    assert proxy.faults.total() >= 20
    assert there.peek("id/val").marks().tolist() == [True, True, False]
    assert_alike(here, copy_splits(here, url, "id/val"))


def one_line(error: pytest.ExceptionInfo[CacheError]) -> str:
    text = error.value.one_line()
    assert "\n" not in text and len(text) < 700
    return text


def test_what_a_server_refuses_is_said_in_words(
    proxy: Proxy, url: str, here: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "s3://nobody/x.zarr"
    with pytest.raises(CacheError, match=f"there is no cache at {url}"):
        open_cache(url)
    with pytest.raises(CacheError, match=f"^{nowhere} cannot be .*there is no such bucket") as error:
        copy_splits(here, nowhere)
    one_line(error)
    asked = sum(proxy.requests.values())
    assert asked <= 4  # what cannot be mended is not asked for again
    monkeypatch.setattr(store, "ATTEMPTS", 3)
    proxy.share, proxy.only = 1.0, "503"
    with pytest.raises(CacheError, match=f"^{url} cannot be read .*503") as error:
        open_cache(url)
    one_line(error)
    assert sum(proxy.requests.values()) == asked + 3


def test_a_server_that_is_gone_is_said_in_words(
    proxy: Proxy, url: str, here: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it writes: what was written stays, and the same goes on when the server is back."""
    monkeypatch.setattr(store, "ATTEMPTS", 3)
    split, writer = here["id/val"], CacheWriter(url, here.header)
    prepare_split(writer, split)
    write_rows(writer, split, 0, "id/val")
    proxy.share, proxy.only = 1.0, "refused"
    with pytest.raises(CacheError, match=f"^{url} cannot be written .*the same command goes on") as error:
        write_rows(writer, split, 1, "id/val")
    one_line(error)
    proxy.share = 0.0
    assert open_cache(url).peek("id/val").marks().tolist() == [True, False, False]
    assert_alike(here, copy_splits(here, url, "id/val"))


def test_a_forbidden_request_names_the_credentials(s3_endpoint: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forbidden(Proxy):
        def draw(self, method: str, path: str) -> str:
            super().draw(method, path)
            return "403"

    with Forbidden(s3_endpoint) as proxy:
        for name, value in variables(proxy.url).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(CacheError, match=f"^{url} cannot be read .*AWS_ACCESS_KEY_ID") as error:
            open_cache(url)
        one_line(error)
        assert sum(proxy.requests.values()) == 1


def test_without_credentials_it_is_said_what_to_set(proxy: Proxy, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # of a machine that is in no cloud
    with pytest.raises(CacheError, match=f"^{url} cannot be read .*; give AWS_ACCESS_KEY_ID and AWS_SECRET") as error:
        open_cache(url)
    one_line(error)
    assert not proxy.requests


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("s3://caches", "names a bucket, not a cache in it, such as s3://caches/x.zarr"),
        ("ftp://host/x.zarr", "caches are not kept at ftp://; known: s3, gs, az, http, https, and folders"),
        ("file:///tmp/x.zarr", "caches are not kept at file://"),
    ],
)
def test_addresses_that_are_none(address: str, what: str) -> None:
    with pytest.raises(InputError, match=what):
        open_cache(address)


def test_without_obstore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    monkeypatch.setitem(sys.modules, "obstore.exceptions", None)
    with pytest.raises(MissingExtra, match=r"s3://b/x.zarr needs obstore: pip install 'nacpipe\[remote\]'"):
        open_cache("s3://b/x.zarr")


def test_no_folder_is_made_for_a_url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with CacheLock("s3://b/x.zarr") as lock:
        lock.take()
        lock.share()
    assert not any(tmp_path.iterdir())


def test_a_store_survives_a_pickle(proxy: Proxy, url: str, here: Cache) -> None:
    copy_splits(here, url)
    again = pickle.loads(pickle.dumps(address.open_store(url)))
    assert (again.url, again.read_only) == (url, True)
    assert sync(again.exists("zarr.json"))
