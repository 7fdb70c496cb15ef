"""The library's types are what a user's strict checker wants (typed_user.py)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import nacpipe

ROOT = Path(__file__).resolve().parents[1]
USER = ROOT / "tests/typed_user.py"


def test_every_public_name_is_used() -> None:
    used = set(re.findall(r"nacpipe\.(\w+)", USER.read_text("utf-8")))
    assert set(nacpipe.__all__) - used == set()


@pytest.mark.slow
def test_a_users_program_passes_strict_mypy(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="types are checked where mypy is installed")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(USER)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
