"""A command killed at any moment and started again ends in the values that nobody disturbed (bench/kills.py)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import prefork

KILLS = 3  # of extraction, and of the search: a minute in all; `python bench/kills.py` does more

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")


@pytest.fixture
def kills(load_bench: Callable[[str], ModuleType]) -> ModuleType:
    return load_bench("kills")


class Forked(subprocess.Popen[bytes]):
    """A command in a forked process, which needs no seconds for its imports; a kill is for it, not its client."""

    def kill(self) -> None:
        prefork.kill(self)


def start(stage: Any) -> Forked:
    stage.out.parent.mkdir(exist_ok=True)
    with stage.out.with_name("output.txt").open("wb") as output:
        return Forked([*prefork.python_words(), "-m", "nacpipe", *stage.command], stdout=output, stderr=output)


@pytest.mark.slow
def test_killed_commands_end_in_the_values_that_nobody_disturbed(
    kills: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kills, "start", start)
    tally = kills.run_kills(tmp_path, kills=KILLS, seed=0)
    assert tally.differences == []
    assert tally.kills >= 2 * KILLS
    assert tally.writing >= 0.8 * tally.kills
    assert tally.between >= 2
