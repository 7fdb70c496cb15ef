"""A lock file is held by one process at a time, and is gone afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nacpipe.files import lock_file

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no flock")

COUNT = """
import sys
from pathlib import Path
from nacpipe.files import lock_file

lock, counter = sys.argv[1:]
for _ in range(100):
    with lock_file(lock, wait=True):
        Path(counter).write_text(str(int(Path(counter).read_text()) + 1))
"""


def test_processes_that_make_and_remove_a_lock_file_hold_it_in_turn(tmp_path: Path) -> None:
    """Each removes the file that others wait for; two who held it at once would lose a count."""
    lock, counter = tmp_path / "lock", tmp_path / "counter"
    counter.write_text("0")
    words = [sys.executable, "-c", COUNT, str(lock), str(counter)]
    others = [subprocess.Popen(words) for _ in range(4)]
    assert [other.wait(timeout=120) for other in others] == [0] * 4
    assert counter.read_text() == "400"
    assert not lock.exists()


def test_who_does_not_wait_is_refused(tmp_path: Path) -> None:
    lock = str(tmp_path / "lock")
    with lock_file(lock, wait=False):
        with pytest.raises(BlockingIOError), lock_file(lock, wait=False):
            pass
        assert Path(lock).exists()
    with lock_file(lock, wait=False):
        pass
    assert not Path(lock).exists()


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    lock = str(tmp_path / "lock")
    hold = (
        "import sys, time; from nacpipe.files import lock_file\n"
        "with lock_file(sys.argv[1], wait=True): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        child.kill()
    with lock_file(lock, wait=False):
        pass
