"""The loops in processes of their own: whatever numba's settings are, and beside other people's parallel code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
USE = """
import os, signal, sys, threading
import numba
import numpy as np
from nacpipe.method import counting as kernels
from nacpipe.method import threads
from nacpipe.method.sorted_index import index_columns, sort_columns

values = np.random.RandomState(0).standard_normal((200, 300)).astype(np.float32)  # enough for several threads
borders = np.array([-np.inf, -1, 0, 1, np.inf], np.float32)
places = np.searchsorted(borders, values, side="right") - 1
wanted = sum(np.minimum(np.bincount(column, minlength=4), 30)[column] for column in places.T).tolist()

def use():
    counts = kernels.count_sorted(sort_columns(values), borders)
    (ranked,) = kernels.fill_ranked([(index_columns(values, values), borders, 30)])
    assert ranked.tolist() == wanted
    assert kernels.fill_rows(values, borders, counts, 30).tolist() == wanted
"""


def python(code: str, cwd: Path, **variables: str) -> str:
    """Run code after `USE`, with four threads whatever the machine has, and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_NUM_THREADS": "4", **variables}
    command = [sys.executable, "-c", USE + code]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=cwd, timeout=300
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), (done.returncode, done.stderr)
    return done.stdout


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({"NUMBA_DISABLE_JIT": "1"}, marks=pytest.mark.slow),
        pytest.param({"NUMBA_DISABLE_JIT": "1", "NUMBA_CACHE_DIR": "/dev/null/x"}, marks=pytest.mark.slow),
        pytest.param({"NUMBA_THREADING_LAYER": "tbb"}, marks=pytest.mark.slow),  # not installed with numba
        pytest.param({"NUMBA_THREADING_LAYER_PRIORITY": "tbb tbb tbb"}, marks=pytest.mark.slow),
        pytest.param({"NUMBA_CACHE_DIR": "/dev/null/x"}, marks=pytest.mark.slow),
    ],
    ids=lambda variables: ",".join(f"{name}={value}" for name, value in variables.items()),
)
def test_numbas_variables_do_not_stop_the_loops(tmp_path: Path, variables: dict[str, str]) -> None:
    fresh = {"NUMBA_CACHE_DIR": str(tmp_path / "compiled"), **variables}  # so that the loops are compiled here
    assert python("use(); print(threads.get_threads(), numba.config.DISABLE_JIT)", tmp_path, **fresh) == (
        f"4 {variables.get('NUMBA_DISABLE_JIT', '0')}\n"
    )


def test_numbas_settings_stay_as_they_are(tmp_path: Path) -> None:
    code = """
settings = {name: getattr(numba.config, name) for name in dir(numba.config) if name.isupper()}
threads.set_threads(1); use(); threads.set_threads(None); use()
for name, value in settings.items():
    assert getattr(numba.config, name) == value, name
print(numba.config.THREADING_LAYER)
try:
    numba.threading_layer()
except ValueError as error:
    print(error)
print(numba.get_num_threads())  # starts them
"""
    assert python(code, tmp_path) == "default\nThreading layer is not initialized.\n4\n"


@pytest.mark.slow
def test_other_peoples_parallel_loops_may_be_entered_from_several_threads(tmp_path: Path) -> None:
    """Numba's work queue ends the process then ("Concurrent access has been detected", exit code 134)."""
    code = """
@numba.njit(parallel=True)
def total(array):
    found = 0.0
    for row in numba.prange(array.shape[0]):
        found += array[row].sum()
    return found

total(np.ones((2, 3)))
found = []
def work():
    for _ in range(50):
        found.append(total(np.ones((300, 3))))
        use()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(found == [900.0] * 200)
"""
    assert python(code, tmp_path) == "True\n"


FORK = """
use()
child = os.fork()
if child == 0:
    signal.alarm(60)  # a child that hangs is ended
    {in_child}
    os._exit(0)
print(os.waitpid(child, 0)[1])
use()  # the parent's threads are still there
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows")
@pytest.mark.parametrize(
    "in_child",
    [
        pytest.param("use()", marks=pytest.mark.slow),
        pytest.param("threads.set_threads(2); use()", marks=pytest.mark.slow),
        pytest.param("threads.set_threads(1); use()", marks=pytest.mark.slow),
        "child = os.fork(); use(); (os.waitpid(child, 0)[1] and os._exit(7)) if child else None",  # a grandchild too
    ],
)
def test_a_forked_child_has_threads_of_its_own(tmp_path: Path, in_child: str) -> None:
    assert python(FORK.format(in_child=in_child), tmp_path) == "0\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows")
def test_multiprocessing_by_fork_goes_on(tmp_path: Path) -> None:
    code = """
import multiprocessing
use()
signal.alarm(60)
with multiprocessing.get_context("fork").Pool(2) as pool:
    print([pool.apply(use) for _ in range(4)])
"""
    assert python(code, tmp_path) == "[None, None, None, None]\n"


@pytest.mark.slow
def test_loops_run_where_no_thread_can_be_started(tmp_path: Path) -> None:
    """While Python exits, and where the system allows no more threads."""
    code = """
class Refusing:
    def submit(self, *_):
        raise RuntimeError("can't start new thread")
threads._helpers = lambda: Refusing()
use()
print("done")
"""
    late = """
def work():
    threading.main_thread().join()  # the main thread has ended: executors take no more work
    use()
    print("done")
threading.Thread(target=work).start()
"""
    assert python(code, tmp_path) == "done\n"
    assert python(late, tmp_path) == "done\n"
