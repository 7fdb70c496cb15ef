"""A byte that changes is found or changes nothing (bench/corrupt.py, which does 500)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

CHANGES = 30  # each reads the cache twice


@pytest.fixture
def corrupt(load_bench: Callable[[str], ModuleType]) -> ModuleType:
    return load_bench("corrupt")


@pytest.mark.slow
def test_a_changed_byte_is_found_or_changes_no_value(corrupt: ModuleType, tmp_path: Path) -> None:
    tally = corrupt.run_changes(tmp_path, CHANGES, seed=7)
    assert tally.failures == []
    assert tally.found + tally.harmless == CHANGES
    assert tally.found > 0.8 * CHANGES
    assert tally.mended[True] >= 1
