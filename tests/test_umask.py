"""The umask decides who may read and write what nacpipe leaves on the disk."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nacpipe.cache import Cache
from tests.prefork import python_words

ROOT = Path(__file__).resolve().parents[1]

# Everything that writes. The umask belongs to the whole process.
CODE = """
import io, os, shutil, sys, zipfile
from dataclasses import replace
from pathlib import Path

os.umask(int(sys.argv[1], 8))
source = sys.argv[2]
from nacpipe.cache import CacheWriter, open_cache
from nacpipe.cli import main
from nacpipe.benchmarks.standard import find_benchmark
from nacpipe.benchmarks.archives import Archive
from nacpipe.benchmarks.download import DownloadPlan, download
from nacpipe.benchmarks.train_split import TrainSplit, write_split
from nacpipe.tuning.storage import only_runner, open_storage
from tests.prefork import python_words

run = lambda *args: main([*args], standalone_mode=False)
shutil.copytree(source, "x.zarr", copy_function=shutil.copyfile)
run("search", "x.zarr", "--trials", "3")
run("search", "x.zarr", "--trials", "3", "--storage", "sqlite:///x.db", "--output", "db.params.json")
run("export", "x.zarr")
run("evaluate", "x.zarr", "--scores", "scores.npz")
run("report", "x.zarr", "--output", "report.html", "--figures", "figures")
run("inspect", "x.zarr", "id/val", "layer1", "--plot", "plot.svg")
with only_runner("other.log", "nac"):
    shutil.copymode("other.log.nac.running", Path("lock").touch() or "lock")
CacheWriter("new.zarr", open_cache("x.zarr").header).prepare("id/val", 3, {"list": "l", "sha256": "0" * 64})
write_split(TrainSplit(main=Path("main.txt"), sub=Path("sub.txt"), main_lines=("a 0",), sub_lines=("b 0",)))
archive = Archive(name="a", drive="", folder="pictures")
Path("in").mkdir()
with zipfile.ZipFile("in/a.zip", "w") as made:
    made.writestr("one.png", b"x")
download(DownloadPlan(archive=archive, url="u", zip=Path("in/a.zip"), target=Path("pictures"), state="to unpack"))
"""
WRITTEN = [  # each by another piece of code
    *(
        "x.params.json",
        "x.study.log",
        "x.db",
        "x.detector.safetensors",
        "scores.npz",
        "report.html",
        "plot.svg",
        "lock",
    ),
    *("new.zarr/zarr.json", "new.zarr/id/val/logits/zarr.json", "main.txt", "sub.txt", "in/a.done", "pictures/one.png"),
]


def run_in_another_process(umask: str, source: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*python_words(), "-c", CODE, umask, source], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr


def run_here(umask: str, source: str) -> None:
    before = os.umask(0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["-c", umask, source])
            exec(compile(CODE, "everything that writes", "exec"), {})
    finally:
        os.umask(before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Optuna closes its databases when they are collected
@pytest.mark.parametrize(
    ("run", "umask", "mode"),
    [pytest.param(run_in_another_process, "077", 0o600, marks=pytest.mark.slow), (run_here, "002", 0o664)],
)
def test_the_umask_decides_the_mode_of_every_file(
    small_cache: Cache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[[str, str], None],
    umask: str,
    mode: int,
) -> None:
    source = str(Path(small_cache.path).resolve())
    monkeypatch.chdir(tmp_path)
    run(umask, source)
    files = {str(file.relative_to(tmp_path)): file for file in tmp_path.rglob("*") if file.is_file()}
    assert set(WRITTEN) <= set(files)
    assert any(name.startswith("figures/") for name in files)
    found = {name: stat.S_IMODE(file.stat().st_mode) for name, file in files.items() if not name.startswith("x.zarr/")}
    assert {name: oct(m) for name, m in found.items() if m != mode} == {}
