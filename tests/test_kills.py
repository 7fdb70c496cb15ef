"""A command killed at any moment and started again ends in the values that nobody disturbed (bench/kills.py)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

KILLS = 3  # of extraction, and of the search: a minute in all; `python bench/kills.py` does more

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/ is not a package: its scripts are loaded by path."""
    path = Path(__file__).resolve().parents[1] / "bench" / "kills.py"
    spec = importlib.util.spec_from_file_location("bench_kills", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_killed_commands_end_in_the_values_that_nobody_disturbed(kills: ModuleType, tmp_path: Path) -> None:
    tally = kills.run_kills(tmp_path, kills=KILLS, seed=0)
    assert tally.differences == []
    assert tally.kills >= 2 * KILLS
    assert tally.writing >= 0.8 * tally.kills
    assert tally.between >= 2
