"""`nacpipe verify` and `nacpipe repair` as typed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nacpipe.cache import Cache
from nacpipe.cli import main
from tests.prefork import python_words


def nacpipe(*args: str) -> Result:
    return CliRunner().invoke(main, args)


@pytest.fixture
def damaged(small_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, named c.zarr in the working folder, with one damaged chunk."""
    shutil.copytree(small_cache.path, tmp_path / "c.zarr")
    monkeypatch.chdir(tmp_path)
    chunk = tmp_path / "c.zarr/id/val/layers/layer1/gradient/c.1.0"
    content = bytearray(chunk.read_bytes())
    content[20] ^= 1
    chunk.write_bytes(bytes(content))
    return tmp_path / "c.zarr"


def test_a_whole_cache_is_said_to_be_whole(small_cache: Cache) -> None:
    for option, word in (((), "whole"), (("--format",), "of the right form")):
        done = nacpipe("verify", small_cache.path, *option)
        assert (done.exit_code, done.stdout, done.stderr) == (0, f"{small_cache.path}: 7 splits, {word}\n", "")
    done = nacpipe("repair", small_cache.path)
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr == f"{small_cache.path}: whole, nothing was done\n"


def test_damage_is_named_and_exits_with_1(damaged: Path) -> None:
    assert nacpipe("verify", "c.zarr", "--format").exit_code == 0  # no chunk is read
    done = nacpipe("verify", "c.zarr")
    assert done.exit_code == 1
    assert done.stderr == "nacpipe: c.zarr: 1 damaged; repair it with: nacpipe repair c.zarr\n"
    heading, line = done.stdout.splitlines()
    assert heading.split() == ["split", "array", "block", "rows", "what"]
    assert line.split()[:4] == ["id/val", "layers/layer1/gradient", "1", "16-31"]
    done = nacpipe("verify", "c.zarr", "--json")
    assert done.exit_code == 1
    (found,) = json.loads(done.stdout)["damage"]
    assert {key: found[key] for key in ("split", "array", "block", "rows")} == {
        "split": "id/val",
        "array": "layers/layer1/gradient",
        "block": 1,
        "rows": [16, 31],
    }


def test_repair_prints_the_command_that_computes_what_is_missing(damaged: Path, small_cache: Cache) -> None:
    done = nacpipe("repair", "c.zarr")
    assert (done.exit_code, done.stdout) == (0, small_cache.command() + "\n")
    assert done.stderr == "id/val: block 1, rows 16 to 31, is to be computed again\n"
    assert nacpipe("verify", "c.zarr").exit_code == 0


def test_what_is_no_cache_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    for name in ("nosuch", "folder", "file"):
        for command in ("verify", "repair"):
            done = nacpipe(command, name)
            assert (done.exit_code, done.stdout) == (1, ""), done.exception
            assert done.stderr.count("\n") == 1
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_damaged_cache_gives_no_score(damaged: Path, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"layers": {"layer1": {"bins": 20, "saturation": 5, "alpha": 0.5}}}')
    for command in (
        ["search", "c.zarr", "--space", "paper", "--trials", "2"],
        ["inspect", "c.zarr", "id/val", "layer1"],
    ):
        done = nacpipe(*command)
        assert done.exit_code == 1
        assert "id/val/layers/layer1/gradient is damaged" in done.stderr
        assert "repair it with: nacpipe repair c.zarr" in done.stderr


# --- one line, and nothing after it -----------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
# The damaged chunk is there at once; its siblings' reads are still under way when the process ends.
SLOW = """
import asyncio, sys
from zarr.storage import LocalStore
from nacpipe.cli import main

get = LocalStore.get

async def slow(self, key, *rest, **more):
    if "gradient/c." in key and "/c.1.0" not in key:
        print("reading", flush=True)
        await asyncio.sleep(60)
    return await get(self, key, *rest, **more)

LocalStore.get = slow
main(sys.argv[1:], prog_name="nacpipe")
"""
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_reads_that_are_still_under_way_say_nothing_at_the_end(damaged: Path) -> None:
    """asyncio would write of each that it was destroyed."""
    words = [*python_words(), "-c", SLOW, "inspect", "c.zarr", "id/val", "layer1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=ENV, timeout=50)
    assert done.returncode == 1
    assert "reading" in done.stdout
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("nacpipe: c.zarr: id/val/layers/layer1/gradient is damaged (")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a child on Windows")
def test_nor_do_they_when_a_read_is_interrupted(small_cache: Cache) -> None:
    words = [*python_words(), "-c", SLOW, "inspect", small_cache.path, "id/val", "layer1"]
    with subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV) as child:
        assert child.stdout is not None and child.stdout.readline() == "reading\n"
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=50)
    assert child.returncode == 130
    assert said.splitlines()[1:] == [
        f"nacpipe: interrupted; what was written is safe, go on with: nacpipe inspect {small_cache.path} id/val layer1"
    ]


@pytest.mark.slow
def test_one_damaged_chunk_among_hundreds_is_one_line_each_time(
    make_cache: Callable[..., Cache], tmp_path: Path
) -> None:
    """As it is typed: most of these processes wrote hundreds of lines more."""
    others = dict.fromkeys(["id/train", "id/subtrain", "id/test", "ood/val", "ood/near/letters", "ood/far/textures"], 0)
    path = Path(make_cache(tmp_path / "c.zarr", rows={**others, "id/val": 16 * 300}).path)
    chunk = path / "id/val/layers/layer1/gradient/c.0.0"
    content = bytearray(chunk.read_bytes())
    content[20] ^= 1
    chunk.write_bytes(bytes(content))
    words = [*python_words(), "-m", "nacpipe", "inspect", str(path), "id/val", "layer1"]
    for _ in range(4):
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=ENV)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith(f"nacpipe: {path}: id/val/layers/layer1/gradient is damaged (")
