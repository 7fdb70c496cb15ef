"""The commands on a cache at s3:// or http://: the same words as of one in a folder, and what must be named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from nacpipe.cache import Cache, address, open_cache
from nacpipe.cli import main
from nacpipe.scoring.params_file import read_params
from tests import prefork
from tests.alike import assert_alike
from tests.s3 import BUCKET, Proxy, variables
from tests.web import Plain, Ranges, serve

pytest.importorskip("obstore")
pytest.importorskip("moto")

ROOT = Path(__file__).resolve().parents[2]
URL = f"s3://{BUCKET}/small.zarr"


@pytest.fixture(scope="module")
def proxy(s3_endpoint: str) -> Iterator[Proxy]:
    """The endpoint behind a proxy; every tenth request fails."""
    with Proxy(s3_endpoint, share=0.1) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setattr("nacpipe.cache.store.PAUSE", 0.01)
        proxy.slow = 0.05
        for name, value in variables(proxy.url).items():
            patch.setenv(name, value)
        yield proxy


@pytest.fixture(scope="module")
def remote(proxy: Proxy, make_cache: Callable[..., Cache]) -> Cache:
    return make_cache(URL)


def nacpipe(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), prog_name="nacpipe")


def assert_found_alike(url: str, here: Path) -> None:
    """Search and evaluate at a URL give what they give in a folder, in which `here` is."""
    files = {name: str(here.parent / name) for name in ("study.log", "params.json")}
    asked = ("--storage", files["study.log"], "--output", files["params.json"], "--trials", "30")
    said = nacpipe("search", url, *asked)
    assert said.exit_code == 0, said.output
    assert f"next: nacpipe evaluate {url} --params {files['params.json']}" in said.stderr
    assert nacpipe("search", str(here), "--trials", "30").exit_code == 0
    assert read_params(files["params.json"]) == read_params(here.with_suffix(".params.json"))
    tables = [
        nacpipe("evaluate", cache, "--params", files["params.json"], "--json").stdout for cache in (url, str(here))
    ]
    assert json.loads(tables[0]) == json.loads(tables[1])


def test_search_and_evaluate_find_what_they_find_in_a_folder(
    proxy: Proxy, remote: Cache, make_cache: Callable[..., Cache], tmp_path: Path
) -> None:
    make_cache(tmp_path / "x.zarr")
    faults = proxy.faults.total()
    assert_found_alike(URL, tmp_path / "x.zarr")
    assert proxy.faults.total() > faults


@pytest.mark.repeats(1)
@pytest.mark.parametrize("kind", [Plain, Ranges])
def test_search_and_evaluate_read_a_web_server(
    make_cache: Callable[..., Cache], tmp_path: Path, kind: type[Plain]
) -> None:
    make_cache(tmp_path / "x.zarr")
    with serve(tmp_path, kind) as address:
        assert_found_alike(f"{address}/x.zarr", tmp_path / "x.zarr")
        said = nacpipe("search", f"{address}/x.zarr", "--trials", "3")
    assert said.exit_code == 1
    assert said.stderr.splitlines()[-1].endswith(f"{address}/x.zarr is not on this machine, so that no files are"
        " written beside it; give --storage and --output")  # fmt: skip


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
        f"{URL} is not on this machine, so that no files are written beside it; give {options}"
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
    assert said.stderr.count(f"{url}: two extractions into it at once are not refused, as they are") == 1
    assert "a search needs id/train, ood/val too\nnext: nacpipe extract digits " in said.stderr
    made = open_cache(url)
    assert list(made) == ["id/val", "ood/near/letters"]
    assert made.header.shard_blocks == 8
    assert made["id/val"].array("logits").shards == (8 * made.header.block_rows, 10)
    assert made.command() == f"nacpipe extract digits --model digits_cnn --batch-size 16 --cache {url}"
    again = nacpipe(*words)
    assert again.exit_code == 0, again.output


def test_repair_takes_what_is_damaged_there_and_extract_computes_it_again(proxy: Proxy) -> None:
    """Of a sharded cache the shard; verify names the rows."""
    pytest.importorskip("torch")
    url = f"s3://{BUCKET}/damaged.zarr"
    words = ("extract", "digits", "--splits", "id/val,ood/near/letters", "--batch-size", "64")
    words += ("--block-rows", "512", "--cache", url)
    assert nacpipe(*words).exit_code == 0
    before = {name: split.attributes for name, split in open_cache(url).items()}
    values = open_cache(url)["id/val"].read("layers/layer3/gradient")
    objects = address.Objects(url)
    content = bytearray(objects.read("id/val/layers/layer3/gradient/c.0.0") or b"")
    content[100] ^= 16
    objects.replace("id/val/layers/layer3/gradient/c.0.0", bytes(content))
    said = nacpipe("verify", url)
    assert said.exit_code == 1
    assert said.stdout.splitlines()[1].split()[:4] == ["id/val", "layers/layer3/gradient", "0", f"0-{len(values) - 1}"]
    assert said.stderr == f"nacpipe: {url}: 1 damaged; repair it with: nacpipe repair {url}\n"
    mended = nacpipe("repair", url)
    assert (mended.exit_code, mended.stdout) == (0, f"{open_cache(url).command()}\n"), mended.output
    assert mended.stderr == f"id/val: block 0, rows 0 to {len(values) - 1}, is to be computed again\n"
    planned = json.loads(nacpipe(*words, "--dry-run", "--json").stdout)["splits"]
    assert {split["split"]: split["blocks_to_write"] for split in planned} == {"id/val": 1, "ood/near/letters": 0}
    assert nacpipe(*words).exit_code == 0
    assert nacpipe("verify", url).stdout == f"{url}: 2 splits, whole\n"
    assert {name: split.attributes for name, split in open_cache(url).items()} == before
    np.testing.assert_array_equal(open_cache(url)["id/val"].read("layers/layer3/gradient"), values)


class Deadly(Proxy):
    """Kills the process that writes, as it writes one object: before the endpoint has it, or once it has."""

    victim: subprocess.Popen[str] | None = None
    key, stored = "", True

    def draw(self, method: str, path: str) -> str:
        if method == "PUT" and path.endswith(self.key) and self.victim is not None and self.victim.poll() is None:
            prefork.kill(self.victim)
            return "lost" if self.stored else "refused"
        return super().draw(method, path)


KILLS = [  # the object, whether it is stored, the marks that are there then
    ("id/train/layers/layer2/gradient/zarr.json", True, [False, False]),
    ("id/train/blocks/c.0", False, [False, False]),  # every row, no mark
    ("id/train/features/c.1.0", False, [True, False]),
    ("id/train/zarr.json", False, [True, True]),  # every mark, no seal
]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_a_killed_extract_goes_on_and_ends_in_the_cache_that_nobody_disturbed(
    s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    url, here = f"s3://{BUCKET}/killed.zarr", str(tmp_path / "whole.zarr")
    words = ("extract", "digits", "--device", "cpu", "--splits", "id/train,id/val", "--batch-size", "64")
    words += ("--block-rows", "512", "--shard-blocks", "1", "--cache")
    with Deadly(s3_endpoint) as proxy:
        for name, value in variables(proxy.url).items():  # this endpoint, not the one of the module's other tests
            monkeypatch.setenv(name, value)
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [*prefork.python_words(env), "-m", "nacpipe", *words]
        whole = subprocess.run([*command, here], env=env, text=True, capture_output=True, check=False)
        assert whole.returncode == 0, whole.stderr
        command.append(url)
        for proxy.key, proxy.stored, marks in KILLS:
            proxy.victim = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            said = proxy.victim.communicate(timeout=300)
            assert proxy.victim.returncode == -signal.SIGKILL, (proxy.key, said)
            split = open_cache(url).peek("id/train")
            assert (split.marks().tolist(), split.sealed) == (marks, False), proxy.key
        proxy.victim = None
        puts = proxy.requests["PUT"]
        done = subprocess.run(command, env=env, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert list(open_cache(url)) == ["id/train", "id/val"]
        assert_alike(open_cache(here), open_cache(url))
        assert nacpipe("verify", url).stdout == f"{url}: 2 splits, whole\n"
        assert 0 < proxy.requests["PUT"] - puts < 120  # id/val's, and the seal of id/train, whose rows were there
