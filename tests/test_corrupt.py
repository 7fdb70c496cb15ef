"""A byte that changes is found or changes nothing; repair keeps docs/trust.md (bench/corrupt.py: 500 and 50)."""

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
    tally = corrupt.run_changes(tmp_path, CHANGES, repairs=0, seed=7)
    assert tally.failures == []
    assert tally.found + tally.harmless == CHANGES
    assert tally.found > 0.8 * CHANGES


@pytest.mark.slow
def test_a_damaged_copy_is_repaired_as_promised(corrupt: ModuleType, tmp_path: Path) -> None:
    """Each kind of object once, of a plain cache or of a sharded one."""
    tally = corrupt.run_changes(tmp_path, changes=0, repairs=len(corrupt.KINDS), seed=3)
    assert tally.failures == []
    assert tally.repaired == dict.fromkeys(corrupt.KINDS, 1)
