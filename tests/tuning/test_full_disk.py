"""A disk that fills up during a search: said in one line, what is recorded stays, the same command goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nacpipe.cache import Cache
from tests.prefork import python_words

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of files")

ROOT = Path(__file__).resolve().parents[2]
# The limit comes after imports, which compile; the kernel refuses in the middle of the journal's line.
LIMITED = """
import resource, sys
from nacpipe.tuning import study
if int(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from nacpipe.cli import main
from tests.prefork import python_words
main(sys.argv[2:], prog_name="nacpipe")
"""


def search(cache: Cache, folder: Path, limit: int) -> subprocess.CompletedProcess[str]:
    options = ["--trials", "20", "--storage", str(folder / "s.log"), "--output", str(folder / "p.json")]
    return subprocess.run(
        [*python_words(), "-c", LIMITED, str(limit), "search", cache.path, *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def trials(journal: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in journal.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return [{key: line[key] for key in ("value", "params")} for line in lines if "datetime_complete" in line]


@pytest.mark.slow
def test_a_journal_torn_by_a_full_disk_goes_on(small_cache: Cache, tmp_path: Path) -> None:
    (whole := tmp_path / "whole").mkdir()
    assert search(small_cache, whole, 0).returncode == 0
    size = (whole / "s.log").stat().st_size
    (torn := tmp_path / "torn").mkdir()
    done = search(small_cache, torn, size * 2 // 3)
    assert done.returncode == 1
    assert done.stdout == ""
    safe = "what was written is safe: free some space, and the same command goes on"
    assert done.stderr == f"nacpipe: File too large: {torn / 's.log'}; {safe}\n"
    content = (torn / "s.log").read_bytes()
    assert len(content) == size * 2 // 3 and not content.endswith(b"\n")  # a torn tail
    kept = trials(torn / "s.log")
    assert 0 < len(kept) < 20
    done = search(small_cache, torn, 0)
    assert done.returncode == 0, done.stderr
    assert trials(torn / "s.log")[: len(kept)] == kept
    assert trials(torn / "s.log") == trials(whole / "s.log")
    params = [json.loads((folder / "p.json").read_text())["layers"] for folder in (torn, whole)]
    assert params[0] == params[1]
