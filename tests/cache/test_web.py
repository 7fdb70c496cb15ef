"""Caches behind a plain web server: read as those in a folder, in one request and their chunks, and never written."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nacpipe.cache import Cache, CacheWriter, open_cache, store
from nacpipe.cache.repair import repair_cache
from nacpipe.cache.verify import STALE_COPY, check_metadata, foreign_files, verify_cache
from nacpipe.errors import CacheError, FormatError, InputError
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.coverage import score_splits
from tests.web import Blind, Plain, Ranges, serve

pytest.importorskip("obstore")

SERVERS = [Plain, Ranges, Blind]


@pytest.fixture(scope="module")
def here(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("here") / "x.zarr")


@pytest.fixture
def requests() -> Counter[str]:
    """What was requested from `url`."""
    return Counter()


@pytest.fixture(params=[Blind])
def url(request: pytest.FixtureRequest, here: Cache, requests: Counter[str]) -> Iterator[str]:
    """The cache's address at a server of the kind that a test names; one without listings if it names none."""
    with serve(Path(here.path).parent, request.param, requests) as address:
        yield f"{address}/x.zarr"


@pytest.fixture
def copy(here: Cache, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A copy of the cache for a test that changes it: its folder, and its address at a server without listings."""
    shutil.copytree(here.path, tmp_path / "x.zarr")
    with serve(tmp_path, Blind) as address:
        yield tmp_path / "x.zarr", f"{address}/x.zarr"


def edit(file: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_cache_is_read_as_one_in_a_folder(url: str, here: Cache) -> None:
    there = open_cache(url)
    assert list(there) == list(here)
    for name in ("id/val", "ood/near/letters"):
        assert there[name].attributes == here[name].attributes
        assert there[name].marks().tolist() == here[name].marks().tolist()
        for path in here.header.arrays():
            np.testing.assert_array_equal(there[name].read(path), here[name].read(path), err_msg=f"{name}/{path}")
    for ours, theirs in zip(here.classifier() or (), there.classifier() or (), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert there.search_identity(("id/train", "id/val"), ("layer1",)) == here.search_identity(
        ("id/train", "id/val"), ("layer1",)
    )


def chunks(array: str, count: int, end: str = ".0") -> list[str]:
    return [f"GET /x.zarr/{array}/c.{number}{end}" for number in range(count)]


def test_one_request_for_all_metadata_and_one_for_each_chunk_that_is_read(url: str, requests: Counter[str]) -> None:
    there = open_cache(url)
    assert list(there)[:3] == ["id/train", "id/subtrain", "id/val"]
    split = there["id/val"]  # checked: no request
    assert requests == {"GET /x.zarr/zarr.json": 1}
    requests.clear()
    assert split.logits[:].shape == (40, 3)
    assert requests == Counter(chunks("id/val/logits", 3))
    requests.clear()
    assert split["layer1"].gradient[17].shape == (4,)
    assert requests == {"GET /x.zarr/id/val/layers/layer1/gradient/c.1.0": 1}
    requests.clear()
    assert split.label.shape == split.index.shape == (40,)
    assert requests == {"GET /x.zarr/id/val/label/c.0": 1, "GET /x.zarr/id/val/index/c.0": 1}


def test_scores_need_the_chunks_of_their_terms_alone(url: str, here: Cache, requests: Counter[str]) -> None:
    layer = LayerParams(bins=10, saturation=5, alpha=0.5, weight=1.0, source="activation")
    params, names = NacParams(layers={"avgpool": layer}), ["id/val", "ood/val"]
    expected = score_splits(here, params, names)
    found = score_splits(open_cache(url), params, names)
    for name in names:
        np.testing.assert_array_equal(found[name], expected[name])
    read = [chunks(f"{name}/layers/avgpool/activation", count) for name, count in
            (("id/train", 4), ("id/val", 3), ("ood/val", 3))]  # fmt: skip
    assert requests == Counter(["GET /x.zarr/zarr.json", *(chunk for part in read for chunk in part)])


def test_sizes_are_those_of_the_chunks(url: str, here: Cache) -> None:
    assert open_cache(url)["id/val"].stored_bytes() == here["id/val"].stored_bytes()


def test_a_split_that_is_not_finished_is_not_there(copy: tuple[Path, str], here: Cache) -> None:
    path, url = copy
    writer, split = CacheWriter(path, here.header), here["id/val"]
    writer.drop("id/test")
    writer.prepare("id/test", split.rows, split.images, label=split.label, index=split.index)
    assert "id/test" not in open_cache(url)
    assert list(open_cache(url)) == [name for name in here if name != "id/test"]
    np.testing.assert_array_equal(open_cache(url)["id/val"].read("logits"), split.read("logits"))


def test_a_damaged_or_lost_chunk_is_refused_when_it_is_read(copy: tuple[Path, str]) -> None:
    path, url = copy
    file = path / "id/test/logits/c.1.0"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    split = open_cache(url)["id/test"]
    with pytest.raises(CacheError, match=rf"^{url}: id/test/logits is damaged \(.*checksum.*\); repair it with: "):
        split.read("logits")
    assert split.read("logits", slice(0, 16)).shape == (16, 3)
    file.unlink()
    with pytest.raises(CacheError, match=r"id/test/logits is damaged \(row 16 holds no value\)"):
        split.read("logits")
    (path / "id/test/label/c.0").unlink()
    with pytest.raises(CacheError, match=r"id/test/label is damaged \(row 0 holds no value\)"):
        open_cache(url)["id/test"].label  # noqa: B018


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", [Plain, Blind], indirect=True)
def test_it_is_not_written(url: str, here: Cache) -> None:
    for address in (url, f"{url.removesuffix('x.zarr')}new.zarr"):
        with pytest.raises(
            InputError, match=f"^{address} can only be read; write to a folder or to s3://BUCKET/x.zarr"
        ):
            CacheWriter(address, here.header)
    with pytest.raises(InputError, match=f"^{url} can only be read"):
        repair_cache(url)


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.repeats(1)
def test_version_1_is_refused_with_the_command_that_converts_it(
    make_cache: Callable[..., Cache], tmp_path: Path, kind: type[Plain]
) -> None:
    make_cache(tmp_path / "old.zarr", rows={"id/test": 0}, version=1)
    with serve(tmp_path, kind) as address:
        message = (
            rf"^{address}/old\.zarr has format version 1, which cannot be read over http; where it is kept, make a copy"
            r" that can: nacpipe convert OLD\.zarr NEW\.zarr$"
        )
        with pytest.raises(FormatError, match=message):
            open_cache(f"{address}/old.zarr")


def test_a_cache_without_consolidated_metadata_is_refused_in_words(copy: tuple[Path, str]) -> None:
    path, url = copy
    edit(path / "zarr.json", lambda content: content.pop("consolidated_metadata"))
    message = (
        rf"^{url} has no consolidated metadata, by which a cache is read over http: .*; where it is kept, finish it"
        " with: nacpipe extract digits --cache "
    )
    with pytest.raises(CacheError, match=message):
        open_cache(url)
    assert repair_cache(path) == ["consolidated metadata renewed"]
    assert len(open_cache(url)) == 7


def test_a_cache_of_which_no_split_is_finished_is_refused_in_words(tmp_path: Path, here: Cache) -> None:
    split, writer = here["id/val"], CacheWriter(tmp_path / "x.zarr", here.header)
    writer.prepare("id/val", split.rows, split.images, label=split.label, index=split.index)
    with serve(tmp_path, Plain) as address, pytest.raises(CacheError, match="no split of it is finished"):
        open_cache(f"{address}/x.zarr")


@pytest.mark.repeats(1)
@pytest.mark.parametrize("damage", ["[]", '{"metadata": 3}', '{"metadata": {"id/val": []}}', '{"metadata": null}', "7"])
def test_broken_consolidated_metadata_are_an_error_in_words(copy: tuple[Path, str], damage: str) -> None:
    path, url = copy
    edit(path / "zarr.json", lambda content: content.update(consolidated_metadata=json.loads(damage)))
    with pytest.raises(CacheError, match=r"consolidated metadata|is damaged|cannot be read"):
        open_cache(url)["id/val"]
    assert repair_cache(path) == ["consolidated metadata renewed"]
    assert open_cache(url)["id/val"].rows == 40


def test_what_is_not_there(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CacheError, match=f"there is no cache at {url}x"):
        open_cache(f"{url}x")
    monkeypatch.setattr(store, "ATTEMPTS", 2)
    with pytest.raises(CacheError, match=r"^http://127\.0\.0\.1:9/x\.zarr cannot be read .*asked 2 times"):
        open_cache("http://127.0.0.1:9/x.zarr")


# --- verify -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", SERVERS, indirect=True)
@pytest.mark.slow
def test_a_whole_cache_has_no_damage(url: str) -> None:
    there = open_cache(url)
    assert verify_cache(there) == []
    assert check_metadata(there) == []
    assert foreign_files(there) == []
    assert there["id/val"].rows == 40  # and is read by the copy again


def test_verify_finds_a_damaged_a_lost_and_an_exchanged_chunk(copy: tuple[Path, str]) -> None:
    path, url = copy
    file = path / "id/val/layers/layer1/gradient/c.2.0"
    file.write_bytes(file.read_bytes()[:-1])
    (path / "id/train/features/c.0.0").unlink()
    first, second = path / "ood/val/logits/c.0.0", path / "ood/val/logits/c.1.0"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    (path / "id/test/label/c.0").write_bytes(b"12345678")
    found = verify_cache(open_cache(url))
    assert [(d.split, d.array, d.block, d.rows) for d in found] == [
        ("id/train", "features", 0, range(16)),
        ("id/val", "layers/layer1/gradient", 2, range(32, 40)),
        ("id/test", "label", None, range(50)),
        ("ood/val", "", None, None),
    ]


def test_verify_finds_metadata_that_differ_from_the_copy(copy: tuple[Path, str]) -> None:
    path, url = copy
    edit(path / "id/val/logits/zarr.json", lambda content: content.update(dimension_names=["sample", "neutron"]))
    (path / "id/test/features/zarr.json").unlink()
    (path / "id/train/blocks/c.0").unlink()
    assert [(d.split, d.array, d.block) for d in verify_cache(open_cache(url))] == [
        ("id/test", "features", None),
        ("id/train", "blocks", 0),
        ("id/val", "logits", None),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("check", [verify_cache, check_metadata])
def test_verify_finds_a_stale_copy(copy: tuple[Path, str], check: Callable[[Cache], list[Any]]) -> None:
    path, url = copy

    def change(content: Any) -> None:
        content["consolidated_metadata"]["metadata"]["id/val"]["attributes"]["digest"] = "0" * 64

    edit(path / "zarr.json", change)
    for address in (url, path):
        (damage,) = check(open_cache(address))
        assert (damage.split, damage.array, damage.what) == ("", "zarr.json", STALE_COPY)
    assert repair_cache(path) == ["consolidated metadata renewed"]
    for address in (url, path):
        assert check(open_cache(address)) == []


@pytest.mark.slow
def test_no_more_requests_are_under_way_than_a_small_server_lets_wait(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a split asks for every chunk at once."""
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
    assert verify_cache(open_cache(url)) == []
    assert most == store.WEB_REQUESTS
