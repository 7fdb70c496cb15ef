"""A byte that changes is found or changes nothing (bench/corrupt.py, which does 500)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

CHANGES = 30  # each reads the cache twice


@pytest.fixture
def corrupt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/ is not a package: its scripts are loaded by path."""
    path = Path(__file__).resolve().parents[1] / "bench" / "corrupt.py"
    spec = importlib.util.spec_from_file_location("bench_corrupt", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_a_changed_byte_is_found_or_changes_no_value(corrupt: ModuleType, tmp_path: Path) -> None:
    tally = corrupt.run_changes(tmp_path, CHANGES, seed=7)
    assert tally.failures == []
    assert tally.found + tally.harmless == CHANGES
    assert tally.found > 0.8 * CHANGES
    assert tally.mended[True] >= 1
