"""`nacpipe doctor` tells what is there and what is missing, and its self-test finds what is broken."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nacpipe.cli import main
from nacpipe.cli.doctor import EXTRAS

ROOT = Path(__file__).resolve().parents[2]


def nacpipe(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), prog_name="nacpipe")


def test_it_names_versions_devices_and_extras() -> None:
    done = nacpipe("doctor", "--no-test", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["zarr"] == importlib.metadata.version("zarr")
    assert said["devices"].startswith("cpu")
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


def test_a_failed_self_test_is_told_and_ends_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no\nluck")

    module = sys.modules["nacpipe.cli.doctor"]
    monkeypatch.setattr(module, "_check_loops", broken)
    monkeypatch.setattr(module, "_check_pipeline", lambda: None)
    done = nacpipe("doctor")
    assert done.exit_code == 1
    assert "compiled loops against plain numpy: failed: RuntimeError: no luck (" in done.stdout
