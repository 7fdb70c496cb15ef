"""A command killed at any moment and started again ends in the values that nobody disturbed (bench/kills.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

KILLS = 3  # of extraction, and of the search: a minute in all; `python bench/kills.py` does more

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")


@pytest.fixture
def kills(load_bench: Callable[[str], ModuleType]) -> ModuleType:
    return load_bench("kills")


@pytest.mark.slow
def test_killed_commands_end_in_the_values_that_nobody_disturbed(kills: ModuleType, tmp_path: Path) -> None:
    tally = kills.run_kills(tmp_path, kills=KILLS, seed=0)
    assert tally.differences == []
    assert tally.kills >= 2 * KILLS
    assert tally.writing >= 0.8 * tally.kills
    assert tally.between >= 2
