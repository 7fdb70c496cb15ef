"""Decoding processes whose run ends while they start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys
import time

from nacpipe.extraction.loader import _context

if __name__ == "__mp_main__":
    time.sleep(1)  # the process imports this script before it takes its arguments


def work(*_):
    raise ValueError("of its work")


if __name__ == "__main__":
    context = _context()
    semaphore = context.Semaphore(0)
    process = context.Process(target=work, args=(semaphore,))
    process.start()
    if sys.argv[1] == "gone":
        del semaphore  # as when the run ends
    process.join()
    print(process.exitcode)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "says"), [("gone", ""), ("there", "ValueError: of its work")])
def test_a_process_whose_run_is_gone_ends_without_a_traceback(tmp_path: Path, how: str, says: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), how],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.stdout == "1\n"
    assert done.stderr.strip().endswith(says)
    assert bool(done.stderr.strip()) == bool(says), done.stderr
