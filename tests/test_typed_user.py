"""The library's types are what a user's strict checker wants: `make types` reads typed_user.py too, and uses all."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import nacpipe

ROOT = Path(__file__).resolve().parents[1]
USER = "tests/typed_user.py"


def test_every_public_name_is_used() -> None:
    used = set(re.findall(r"nacpipe\.(\w+)", (ROOT / USER).read_text("utf-8")))
    assert set(nacpipe.__all__) - used == set()


def test_it_is_checked_strictly() -> None:
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mypy"]
    assert USER in checked["files"]
    assert checked["strict"] is True
