"""The commands on a cache at s3://: the same words as of one in a folder, and what must be named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nacpipe.artifact import read_params
from nacpipe.cache import Cache, open_cache, store
from nacpipe.cli import main
from tests.s3 import BUCKET, Proxy, endpoint, variables

pytest.importorskip("obstore")
pytest.importorskip("moto")

URL = f"s3://{BUCKET}/small.zarr"


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The endpoint behind a proxy; every tenth request fails."""
    with (
        endpoint(tmp_path_factory.mktemp("moto")) as url,
        Proxy(url, share=0.1) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(store, "PAUSE", 0.01)
        proxy.slow = 0.05
        for name, value in variables(proxy.url).items():
            patch.setenv(name, value)
        yield proxy


@pytest.fixture(scope="module")
def remote(proxy: Proxy, make_cache: Callable[..., Cache]) -> Cache:
    return make_cache(URL)


def nacpipe(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), prog_name="nacpipe")


def test_search_and_evaluate_find_what_they_find_in_a_folder(
    proxy: Proxy, remote: Cache, make_cache: Callable[..., Cache], tmp_path: Path
) -> None:
    here = make_cache(tmp_path / "x.zarr")
    files = {name: str(tmp_path / name) for name in ("study.log", "params.json")}
    faults = proxy.faults.total()
    asked = ("--storage", files["study.log"], "--output", files["params.json"], "--trials", "30")
    said = nacpipe("search", URL, *asked)
    assert said.exit_code == 0, said.output
    assert f"next: nacpipe evaluate {URL} --params {files['params.json']}" in said.stderr
    assert nacpipe("search", here.path, "--trials", "30").exit_code == 0
    assert read_params(files["params.json"]) == read_params(tmp_path / "x.params.json")
    tables = [
        nacpipe("evaluate", cache, "--params", files["params.json"], "--json").stdout for cache in (URL, here.path)
    ]
    assert json.loads(tables[0]) == json.loads(tables[1])
    assert proxy.faults.total() > faults


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (("search", URL), "--storage and --output"),
        (("search", URL, "--storage", "x.log"), "--storage and --output"),
        (("search", URL, "--output", "x.json"), "--storage and --output"),
        (("evaluate", URL), "--params FILE"),
        (("export", URL), "--output FILE"),
    ],
)
def test_what_would_be_beside_a_cache_must_be_named(
    remote: Cache, words: tuple[str, ...], options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = nacpipe(*words)
    assert said.exit_code == 1
    assert said.stderr.splitlines()[-1].endswith(
        f"{URL} is not on this machine, so that nothing is kept beside it; give {options}"
    )
    assert not any(tmp_path.iterdir())


def test_extract_writes_there_in_shards_and_says_what_is_not_guarded(proxy: Proxy) -> None:
    pytest.importorskip("torch")
    url = f"s3://{BUCKET}/digits.zarr"
    words = ("extract", "digits", "--splits", "id/val,ood/near/letters", "--batch-size", "16", "--cache", url)
    planned = nacpipe(*words, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert f"\n{url}: new, " in planned.stdout
    said = nacpipe(*words)
    assert said.exit_code == 0, said.output
    assert said.stderr.count(f"{url}: two extractions into it at once are not kept apart") == 1
    assert f"next: nacpipe search {url}" in said.stderr
    made = open_cache(url)
    assert list(made) == ["id/val", "ood/near/letters"]
    assert made.header.shard_blocks == 8
    assert made["id/val"].logits.shards == (8 * made.header.block_rows, 10)
    assert made.command() == f"nacpipe extract digits --batch-size 16 --cache {url} --model digits_cnn"
    again = nacpipe(*words)
    assert again.exit_code == 0, again.output
