"""Where an extraction's time goes: stages inside one another, in threads, of a whole run, printed and as JSON."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import nacpipe
from nacpipe.cache import Cache, open_cache
from nacpipe.cli import main
from nacpipe.extraction import profile as module
from nacpipe.extraction.pipeline import copy_together, extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.profile import Profile
from nacpipe.extraction.request import ExtractRequest

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture
def sleep(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass."""
    now = [50.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    return pass_time


def seconds(profile: Profile) -> dict[str, float]:
    return {stage.name: stage.seconds for stage in profile.stages()}


def test_a_stage_inside_another_counts_for_itself(sleep: Callable[[float], None]) -> None:
    profile = Profile(CPU)
    profile.decoders, profile.writers = 3, 2
    with profile.run():
        with profile.time("network"):
            sleep(4)
            for _ in range(2):
                with profile.time("pool"):
                    sleep(1)
                    with profile.time("copy"):
                        sleep(0.5)
            sleep(2)
        with profile.time("wait for samples"):
            sleep(8)
        sleep(3)
    profile.add("decode", 12)
    profile.add("decode", 3)
    assert seconds(profile) == {
        "wait for samples": 8, "copy": 1, "network": 6, "pool": 2, "wait for writers": 0, "other": 3, "decode": 15
    }  # fmt: skip
    shares = {stage.name: stage.share for stage in profile.stages()}
    assert shares["network"] == 6 / 20
    assert shares["decode"] == 15 / (3 * 20)
    assert sum(share for name, share in shares.items() if name != "decode") == 1
    assert [stage.where for stage in profile.stages()] == ["this process"] * 6 + ["3 decoding at once"]
    assert profile.binds == "reading samples binds: more cores, more workers or smaller files make it faster"


def test_threads_do_not_count_into_each_other(sleep: Callable[[float], None]) -> None:
    profile = Profile(CPU)

    def write() -> None:
        with profile.time("write"):
            sleep(5)

    with profile.time("network"):
        sleep(1)
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert seconds(profile)["write"] == 5
    assert seconds(profile)["network"] == 6  # it waited; what another thread did meanwhile is not taken off


def test_an_error_ends_a_stage(sleep: Callable[[float], None]) -> None:
    profile = Profile(CPU)
    with profile.time("network"):
        with pytest.raises(RuntimeError), profile.time("pool"):
            sleep(2)
            raise RuntimeError
        sleep(1)
    assert (seconds(profile)["pool"], seconds(profile)["network"]) == (2, 1)


def test_text(sleep: Callable[[float], None]) -> None:
    profile = Profile(CPU)
    profile.samples = 30
    with profile.run(), profile.time("network"):
        sleep(4)
    lines = profile.to_text().splitlines()
    assert lines[0] == "30 samples in 4.00 s, 7.5 a second; the network binds: a faster device makes it faster"
    assert lines[3] == "network               4.00 s  100.0%  this process"
    assert len(lines) == 1 + 6


def test_nothing_was_run() -> None:
    profile = Profile(CPU)
    assert profile.rate == 0
    assert {stage.share for stage in profile.stages()} == {0.0}


def test_stages_of_an_extraction_add_up_and_values_are_the_same(request_: ExtractRequest, finished: Cache) -> None:
    plan = plan_extraction(replace(request_, splits=("id/val", "ood/val")))
    profile = Profile(plan.network.device)
    extract(plan, profile=profile)
    assert profile.samples == 40 + 21
    found = seconds(profile)
    assert set(found) == {
        "wait for samples", "copy", "network", "pool", "wait for writers", "other", "decode", "write"
    }  # fmt: skip
    assert min(found[name] for name in ("wait for samples", "copy", "network", "pool", "decode", "write")) > 0
    here = sum(stage.seconds for stage in profile.stages() if stage.where == "this process")
    assert here == pytest.approx(profile.seconds)
    cache = open_cache(request_.cache)
    for path in finished.header.arrays():
        np.testing.assert_array_equal(cache["id/val"].read(path), finished["id/val"].read(path))


@pytest.mark.parametrize("as_json", [False, True])
def test_command(root: Path, checkpoint: Path, tmp_path: Path, as_json: bool) -> None:
    words = ["extract", "cifar10", "--model", "resnet20", "--checkpoint", str(checkpoint), "--data-root", str(root)]
    words += ["--splits", "ood/val", "--batch-size", "8", "--device", "cpu", "--cache", str(tmp_path / "c.zarr")]
    result = CliRunner().invoke(main, [*words, "--profile", *(["--json"] if as_json else [])])
    assert result.exit_code == 0, result.output
    if as_json:
        found = json.loads(result.stdout)["profile"]
        assert found["samples"] == 21
        assert [stage["name"] for stage in found["stages"]][:3] == ["wait for samples", "copy", "network"]
        assert " binds: " in found["binds"]
        return
    lines = result.stdout.splitlines()
    (start,) = (row for row, line in enumerate(lines) if line.startswith("21 images in "))
    assert lines[start + 1].split() == ["stage", "where", "seconds", "share", "%"]
    assert [line.split("  ")[0] for line in lines[start + 2 : start + 10]] == [
        "wait for samples", "copy", "network", "pool", "wait for writers", "other", "decode", "write"
    ]  # fmt: skip


def test_python(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    data = [(x, int(x.sum() > 0)) for x in torch.randn(12, 4)]
    batches = [(torch.randn(6, 4), torch.zeros(6, dtype=torch.long)) for _ in range(2)]
    splits = {"id/train": data, "ood/val": batches.__iter__()}
    nacpipe.extract(network, splits, tmp_path / "x.zarr", batch_size=4, block_rows=4, progress=False, profile=True)
    lines = capfd.readouterr().err.splitlines()
    (start,) = (row for row, line in enumerate(lines) if line.startswith("24 samples in "))
    assert {line[:16].strip() for line in lines[start + 1 :]} >= {"wait for samples", "network", "pool", "write"}


def test_what_comes_in_one_copy_is_what_comes_in_many() -> None:
    tensors = {
        "a": torch.randn(5, 3),
        "b": torch.randn(5, 1).to(torch.bfloat16),
        "logits": torch.randn(5, 10, dtype=torch.float64),
        "d": torch.randn(7, 5).T,
    }
    found = copy_together(tensors)
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], value.float().numpy())
