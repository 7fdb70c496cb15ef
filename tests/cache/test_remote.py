"""Caches at s3://, against a real endpoint process: equal to those in a folder, and faults that nobody notices."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from zarr.core.buffer import cpu
from zarr.core.sync import sync

from nacpipe.cache import Cache, CacheWriter, SplitView, address, open_cache, store
from nacpipe.cache.keys import list_keys
from nacpipe.cache.lock import CacheLock
from nacpipe.cache.repair import repair_cache
from nacpipe.cache.verify import foreign_files, verify_cache
from nacpipe.errors import CacheError, FormatError, InputError, MissingExtra
from tests.alike import assert_alike
from tests.s3 import BUCKET, FAULTS, Proxy, endpoint, variables

obstore = pytest.importorskip("obstore")
pytest.importorskip("moto")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with endpoint(tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The endpoint, through a proxy that is told in the test what to do."""
    monkeypatch.setattr(store, "PAUSE", 0.01)
    with Proxy(server) as proxy:
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


def write_rows(writer: CacheWriter, split: SplitView, block: int, name: str) -> None:
    rows = slice(16 * block, 16 * block + 16)
    writer.write_block(name, block, {path: split.read(path)[rows] for path in writer.header.arrays()})


def copy(here: Cache, url: str, *names: str) -> Cache:
    """Write splits of a cache, and its classifier, to another place."""
    writer = CacheWriter(url, here.header)
    weights = here.classifier()
    assert weights is not None
    writer.write_classifier(*weights)
    for name in names:
        marks = writer.prepare(name, here[name].rows, here[name].images)
        for block in np.flatnonzero(~marks):
            write_rows(writer, here[name], int(block), name)
        writer.seal(name)
    return open_cache(url)


def test_a_remote_cache_equals_one_in_a_folder(
    proxy: Proxy, url: str, here: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    there = copy(here, url, "id/val", "ood/near/letters")
    assert there.path == url
    assert list(there) == ["id/val", "ood/near/letters"]
    assert_alike(here, there)
    assert [(d.array, d.what) for d in verify_cache(there)] == [(d.array, d.what) for d in verify_cache(here)]
    assert there["id/val"].stored_bytes() == here["id/val"].stored_bytes()
    assert proxy.requests["PUT"] > 50  # it was there, and nowhere else
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", FAULTS)
def test_a_request_that_fails_is_sent_again(proxy: Proxy, url: str, here: Cache, kind: str) -> None:
    proxy.share, proxy.only, proxy.slow = 0.2, kind, 0.03
    there = copy(here, url, "ood/far/textures")
    assert list(there) == ["ood/far/textures"]
    assert_alike(here, there)
    assert proxy.faults[kind] >= 15
    assert min(proxy.hit["GET"], proxy.hit["PUT"], proxy.hit["HEAD"]) >= 1


def test_an_answer_that_does_not_come_is_asked_for_again(
    proxy: Proxy, url: str, here: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(here, url)
    monkeypatch.setattr(store, "TIMEOUT", store.timedelta(milliseconds=500))
    proxy.only, proxy.slow, proxy.share, proxy.limit = "slow", 3.0, 1.0, 3
    assert open_cache(url).header == here.header
    assert proxy.faults["slow"] == 3


def test_a_writer_that_was_killed_goes_on(proxy: Proxy, url: str, here: Cache) -> None:
    """The process dies at once, in the midst of a block's objects; another writes what is not marked."""
    split = here["id/val"]
    script = f"""
        import os
        from nacpipe.cache import CacheWriter, open_cache
        from nacpipe.cache.store import RemoteStore

        here = open_cache({here.path!r})
        writer, split = CacheWriter({url!r}, here.header), here["id/val"]
        writer.prepare("id/val", split.rows, split.images)
        arrays = {{path: split.read(path) for path in here.header.arrays()}}
        writer.write_block("id/val", 0, {{path: array[:16] for path, array in arrays.items()}})
        put, puts = RemoteStore.set, []

        async def dying(self, key, value):
            puts.append(key)
            if len(puts) == 4:
                os._exit(9)
            await put(self, key, value)

        RemoteStore.set = dying
        writer.write_block("id/val", 1, {{path: array[16:32] for path, array in arrays.items()}})
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=120).returncode == 9
    with pytest.raises(CacheError, match=r"id/val is not finished \(1 of 3 blocks\)"):
        open_cache(url)["id/val"]
    marks = CacheWriter(url, here.header).prepare("id/val", split.rows, split.images)
    assert marks.tolist() == [True, False, False]
    assert_alike(here, copy(here, url, "id/val"))


def test_a_split_is_dropped(proxy: Proxy, url: str, here: Cache) -> None:
    copy(here, url, "id/val", "ood/far/textures")
    CacheWriter(url, here.header).drop("id/val")
    assert list(open_cache(url)) == ["ood/far/textures"]
    assert_alike(here, copy(here, url, "id/val"))


def test_a_changed_object_is_found(proxy: Proxy, url: str, here: Cache) -> None:
    there = copy(here, url, "id/val")
    changed = address.open_store(url, write=True)
    assert isinstance(changed, store.RemoteStore)
    for path, what in (("id/val/logits/c/0/0", b"1234"), ("id/val/label/c/1", b"5678")):
        obstore.put(changed.store, path, what)
    with pytest.raises(CacheError, match="id/val is not what was sealed"):
        open_cache(url)["id/val"]
    assert [(d.array, d.block) for d in verify_cache(there) if d.split == "id/val"] == [("logits", 0), ("label", 1)]
    obstore.delete(changed.store, "id/val/label/c/1")
    with pytest.raises(CacheError, match=r"id/val/label is damaged \(1 of its chunks are not there\)"):
        open_cache(url)["id/val"]


def test_a_damaged_cache_is_repaired_and_its_rows_alone_written_again(proxy: Proxy, url: str, here: Cache) -> None:
    """A chunk, metadata, a mark, a chunk beyond the rows; a split's attributes, the root's."""
    copy(here, url, "id/val", "ood/near/letters")
    objects = address.Objects(url)

    def flip(key: str, place: int) -> None:
        content = bytearray(objects.read(key) or b"")
        content[place] ^= 1
        objects.replace(key, bytes(content))

    assert repair_cache(url) == []
    flip("id/val/layer1/gradient/c/1/0", 20)
    flip("id/val/label/zarr.json", 40)
    flip("ood/near/letters/blocks/c/0", 0)
    objects.replace("ood/near/letters/label/c/9", b"12345")
    found = verify_cache(open_cache(url))
    assert [(d.split, d.array, d.block) for d in found] == [
        ("id/val", "label", None),
        ("id/val", "layer1/gradient", 1),
        ("ood/near/letters", "blocks", 0),
    ]
    flip("zarr.json", 150)
    with pytest.raises(FormatError, match=f"^{url}.*; repair does not change a root: put back a copy of its zarr.json"):
        repair_cache(url)
    flip("zarr.json", 150)
    assert sorted(repair_cache(url)) == [
        "id/val/label: metadata written anew",
        "id/val: block 1, rows 16 to 31, is to be computed again",
        "ood/near/letters/label/c/9 is a chunk beyond the last row: it is removed",
        "ood/near/letters: the mark of block 0 written anew",
    ]
    split = here["id/val"]
    assert open_cache(url).peek("id/val").marks().tolist() == [True, False, True]
    writer = CacheWriter(url, here.header)
    assert writer.prepare("id/val", split.rows, split.images).tolist() == [True, False, True]
    write_rows(writer, split, 1, "id/val")
    writer.seal("id/val")
    assert verify_cache(open_cache(url)) == []
    assert_alike(here, open_cache(url))
    flip("ood/near/letters/zarr.json", 3)
    (done,) = repair_cache(url)
    assert done.startswith("ood/near/letters: zarr.json is damaged (JSONDecodeError: ")
    assert done.endswith("); the split is dropped and is to be extracted again")
    assert [key for key in list_keys(objects.store) if key.startswith("ood/near/letters")] == []
    assert_alike(here, copy(here, url, "ood/near/letters"))


def test_a_repair_loses_no_fault_of_the_server(proxy: Proxy, url: str, here: Cache) -> None:
    """One request in five fails, and what is taken is the damaged block's mark alone."""
    there = copy(here, url, "id/val")
    address.Objects(url).replace("id/val/logits/c/2/0", b"12345678")
    address.Objects(url).replace("classifier/bias/c/0", b"12345678")
    proxy.share, proxy.slow = 0.2, 0.03
    assert repair_cache(url) == [
        "classifier: is to be written again",
        "id/val: block 2, rows 32 to 39, is to be computed again",
    ]
    proxy.share = 0.0
    assert proxy.faults.total() >= 20
    assert there.peek("id/val").marks().tolist() == [True, True, False]
    assert_alike(here, copy(here, url, "id/val"))


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
        copy(here, nowhere)
    one_line(error)
    asked = sum(proxy.requests.values())
    assert asked <= 4  # what cannot be mended is not asked for again
    monkeypatch.setattr(store, "TRIES", 3)
    proxy.share, proxy.only = 1.0, "503"
    with pytest.raises(CacheError, match=f"^{url} cannot be read .*503") as error:
        open_cache(url)
    one_line(error)
    assert sum(proxy.requests.values()) == asked + 3


def test_a_server_that_is_gone_is_said_in_words(
    proxy: Proxy, url: str, here: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it writes: what was written stays, and the same goes on when the server is back."""
    monkeypatch.setattr(store, "TRIES", 3)
    split, writer = here["id/val"], CacheWriter(url, here.header)
    writer.prepare("id/val", split.rows, split.images)
    write_rows(writer, split, 0, "id/val")
    proxy.share, proxy.only = 1.0, "refused"
    with pytest.raises(CacheError, match=f"^{url} cannot be written .*the same command goes on") as error:
        write_rows(writer, split, 1, "id/val")
    one_line(error)
    proxy.share = 0.0
    assert open_cache(url).peek("id/val").marks().tolist() == [True, False, False]
    assert_alike(here, copy(here, url, "id/val"))


def test_a_forbidden_request_names_the_credentials(server: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forbidden(Proxy):
        def draw(self, method: str, path: str) -> str:
            super().draw(method, path)
            return "403"

    with Forbidden(server) as proxy:
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
    copy(here, url)
    again = pickle.loads(pickle.dumps(address.open_store(url)))
    assert (again.url, again.read_only) == (url, True)
    assert sync(again.exists("zarr.json"))


def test_foreign_objects_stay_and_are_named(proxy: Proxy, url: str, here: Cache) -> None:
    """The split's own objects alone are removed, one by one."""
    copy(here, url, "id/val")
    objects = address.open_store(url, write=True)
    assert isinstance(objects, store.RemoteStore)
    foreign = ["id/val/logits/c/notes.txt", "id/val/notes.txt", "notes.txt"]
    for key in foreign:
        sync(objects.set(key, cpu.Buffer.from_bytes(b"somebody's")))
    assert open_cache(url)["id/val"].attributes == here["id/val"].attributes
    assert (verify_cache(open_cache(url)), foreign_files(open_cache(url))) == ([], foreign)
    assert repair_cache(url) == []
    CacheWriter(url, here.header).drop("id/val")
    assert [key for key in list_keys(objects) if key.startswith("id/val")] == foreign[:2]
    copy(here, url, "id/val")
    assert open_cache(url)["id/val"].attributes == here["id/val"].attributes
    assert foreign_files(open_cache(url)) == foreign
