"""`nacpipe doctor` tells what is there and what is missing, and its self-test finds what is broken."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from nacpipe import __version__
from nacpipe.cli import main
from nacpipe.cli.doctor import EXTRAS
from nacpipe.method import counting

ROOT = Path(__file__).resolve().parents[2]
doctor = sys.modules["nacpipe.cli.doctor"]  # the package's name of it is the command


def nacpipe(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), prog_name="nacpipe")


def test_it_names_versions_devices_and_extras() -> None:
    done = nacpipe("doctor", "--no-test", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["zarr"] == importlib.metadata.version("zarr")
    assert said["nacpipe"] == __version__
    assert said["devices"].startswith("cpu")
    assert re.fullmatch(r"\d+, \d+ of them for this process", said["cores"])
    assert re.fullmatch(r"[\d.]+ GiB|not known", said["memory"])
    assert "OMP_NUM_THREADS=1" in said["environment"].split()  # conftest.py sets it
    assert said["extras"]["extract"] is True
    assert said["self_test"] == []


def test_every_extra_of_users_is_known() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert set(EXTRAS) == set(extras) - {"dev", "docs"}


def test_a_missing_extra_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "timm", ("no_such_module",))
    done = nacpipe("doctor", "--no-test")
    assert "missing      timm: pip install 'nacpipe[timm]'  (no_such_module)" in done.stdout.splitlines()


@pytest.mark.slow
def test_the_self_test_passes_here() -> None:
    done = nacpipe("doctor")
    assert done.exit_code == 0, done.output
    assert len([line for line in done.stdout.splitlines() if line.startswith("self-test") and ": ok (" in line]) == 2


def test_the_self_test_sees_a_wrong_count(monkeypatch: pytest.MonkeyPatch) -> None:
    right = counting.fill_ranked
    doctor._check_loops()
    monkeypatch.setattr(counting, "fill_ranked", lambda asked: [sums + (np.arange(40) < 3) for sums in right(asked)])
    with pytest.raises(AssertionError, match=r"^3 of 40 sums differ$"):
        doctor._check_loops()


@pytest.mark.parametrize(
    ("built_for", "there", "said"),
    [
        (None, False, "torch was built without it"),
        ("13.0", True, "13.0, which torch was built for"),
        ("13.0", False, "13.0, which torch was built for; no device of it is here"),
    ],
)
def test_cuda_is_told_apart_from_a_device_of_it(built_for: str | None, there: bool, said: str) -> None:
    assert doctor._cuda(built_for, there) == said


def test_a_failed_self_test_is_told_and_ends_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no\nluck")

    monkeypatch.setattr(doctor, "_check_loops", broken)
    monkeypatch.setattr(doctor, "_check_pipeline", lambda: None)
    done = nacpipe("doctor")
    assert done.exit_code == 1
    assert "compiled loops against plain numpy: failed: RuntimeError: no luck (" in done.stdout
