"""docs/production.md: its scripts, its endpoint and its notebook run as they stand."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

import nacpipe
from nacpipe.benchmarks.digits import load_set
from nacpipe.cli import main
from nacpipe.detector.parts import read_part
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.networks.architectures import digits_cnn
from nacpipe.scoring.params_file import write_params
from tests.prefork import python_words
from tests.s3 import variables
from tests.shard_files import png, write_tar

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/production.md").read_text("utf-8")
SCRIPTS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
NOTEBOOK = json.loads((ROOT / "docs/examples/production.ipynb").read_text("utf-8"))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(digits_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector, its network's weights, a folder of digits and one of letters, and the command on the PATH."""
    place = tmp_path_factory.mktemp("production")
    layers = {"avgpool:activation": LayerParams(bins=200, saturation=40, alpha=0.4, source="activation")}
    write_params(place / "p.json", NacParams(layers=layers))
    words = ["export", str(digits_cache), "--params", str(place / "p.json")]
    done = CliRunner().invoke(main, [*words, "--output", str(place / "digits.detector.safetensors")])
    assert done.exit_code == 0, done.stderr
    (place / "digits_cnn.safetensors").symlink_to(digits_cnn.__file__.replace(".py", ".safetensors"))
    for day, name in (("2026-11-26", "val"), ("2026-11-27", "letters")):
        folder = place / "incoming" / day
        folder.mkdir(parents=True)
        for row, image in enumerate(load_set(name)[0][:120]):
            (folder / f"{row:03}.png").write_bytes(png(image))
    (place / "bin").mkdir()
    for name, command in (
        ("nacpipe", [*python_words(), "-m", "nacpipe"]),
        ("torchrun", [sys.executable, "-m", "torch.distributed.run"]),
    ):
        (place / "bin" / name).write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        (place / "bin" / name).chmod(0o755)
    return place


def run_script(place: Path, script: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{place}/bin:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **environment}
    command = ["sh", "-c", script, "recipe", *args]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_folder_every_night(place: Path) -> None:
    nightly = SCRIPTS[0]
    assert run_script(place, nightly, "nosuch").returncode == 1
    assert not (place / "scores").exists()
    done = run_script(place, nightly, "2026-11-26")
    assert (done.returncode, "no drift in 1 groups" in done.stderr) == (0, True), done.stderr
    done = run_script(place, nightly, "2026-11-27")
    assert done.returncode == 3
    assert "drift in 1 of 2 groups, first in scores/2026-11-27.csv" in done.stderr
    assert len(read_part(f"{place}/scores/2026-11-27.csv")) == 120
    assert (place / "drift.svg").exists()


@pytest.mark.slow
def test_a_bucket_on_a_cluster(place: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from nacpipe.cache.objects import write_object

    for name, value in variables(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    for number in range(4):
        images = [(f"{row}.png", png(load_set("val")[0][10 * number + row])) for row in range(10)]
        content = write_tar(place / "shard.tar", images).read_bytes()
        write_object(f"s3://caches/production/shards/{number:03}.tar", content)
    base = "s3://caches/production"
    done = run_script(place, SCRIPTS[1], SHARDS=f"{base}/shards/", SCORES=f"{base}/scores", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    frames = [read_part(f"{base}/scores/{number:03}.parquet") for number in range(4)]
    assert [len(frame) for frame in frames] == [10] * 4
    assert not nacpipe.watch([f"{base}/scores"])["drift"].any()


@pytest.fixture
def endpoint(place: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("fastapi")
    monkeypatch.chdir(place)
    spec = importlib.util.spec_from_file_location("endpoint", ROOT / "docs/examples/endpoint.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "endpoint", module)
    spec.loader.exec_module(module)
    return module


def test_the_endpoint_scores_what_waits_together(endpoint: ModuleType, place: Path) -> None:
    import httpx

    paths = sorted((place / "incoming/2026-11-27").iterdir())[:40]

    async def ask() -> list[Any]:
        transport = httpx.ASGITransport(app=endpoint.app)
        async with (
            endpoint.lifespan(endpoint.app),
            httpx.AsyncClient(transport=transport, base_url="http://e") as client,
        ):
            bodies = [path.read_bytes() for path in paths] + [b"no picture"]
            return await asyncio.gather(*(client.post("/classify", content=body) for body in bodies))

    *answers, refused = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [200] * 40
    assert (refused.status_code, "image cannot be read" in refused.json()["detail"]) == (422, True)
    wanted = nacpipe.score(endpoint.detector, paths).to_dict("records")
    for answer, row in zip(answers, wanted, strict=True):
        said = answer.json()
        assert (said["class"], said["is_ood"]) == (row["predicted"], row["is_ood"])
        assert said["score"] == pytest.approx(row["score"], abs=1e-5)
    assert sum(endpoint.sizes) == 40
    assert max(endpoint.sizes) > 1
    assert max(endpoint.sizes) <= endpoint.LARGEST


def test_the_notebook(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.rmtree(place / "scores", ignore_errors=True)
    monkeypatch.chdir(place)
    names: dict[str, Any] = {}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    flagged = int(names["rows"].is_ood.sum())
    assert printed == f"120 images, {flagged} flagged, 0 cannot be read\n"
    assert flagged > 30
    assert len(names["explanation"].neurons) == 5
    assert names["drift"]["drift"].tolist() == [False, True]
