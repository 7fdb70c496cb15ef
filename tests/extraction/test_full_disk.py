"""A disk that fills up during `nacpipe extract`: said in one line, what is written stays, the same command goes on."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.cli import main
from tests.alike import assert_alike

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of files, no tmpfs")

SPLITS = ["id/train", "id/val"]  # two blocks and one


def extract(cache: Path) -> Result:
    words = f"extract digits --device cpu --batch-size 64 --splits {','.join(SPLITS)} --cache {cache}".split()
    return CliRunner().invoke(main, [*words, "--block-rows", "512"], prog_name="nacpipe")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("undisturbed") / "x.zarr"
    done = extract(path)
    assert done.exit_code == 0, done.output
    return open_cache(path)


@contextlib.contextmanager
def limited_files() -> Iterator[None]:
    """A limit of the size of files, from the second block on: the kernel refuses in the middle of a write."""
    import resource

    write, calls = CacheWriter.write_block, list[Any]()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_block(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
        write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "write_block", write_block)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of its own; the function makes it as large as one says, and larger."""
    (folder := tmp_path / "disk").mkdir()

    def resize(size: str, kind: tuple[str, ...] = ("-o", "remount")) -> Path:
        command = ["mount", *kind, "-o", f"size={size}", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode and "remount" not in kind:
            pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        return folder

    resize("64k", ("-t", "tmpfs", "tmpfs"))
    yield resize
    subprocess.run(["umount", str(folder)], check=True)


def assert_refused(done: Result, cache: Path, what: str) -> None:
    """One line after what the plan says, exit code 1, and what is there is whole. id/train may be done."""
    assert (done.exit_code, done.stdout) == (1, "")
    note, *lines = done.stderr.splitlines()
    assert note.startswith("images are prepared by the benchmark digits: resize 28 ")
    assert [line for line in lines if line != "id/train: accuracy 100.00 % of 1000 images"] == [
        f"nacpipe: {cache}: there is no space left to write it ({what}); what was written is safe: free some space,"
        " and the same command goes on"
    ]
    verified = CliRunner().invoke(main, ["verify", str(cache)])
    assert verified.exit_code == 0, verified.output


def marks(cache: Path) -> dict[str, list[bool]]:
    held = open_cache(cache)
    return {name: held.peek(name).marks().tolist() for name in held}


def assert_finished(cache: Path, undisturbed: Cache) -> None:
    done = extract(cache)
    assert done.exit_code == 0, done.output
    assert list(open_cache(cache)) == SPLITS
    assert_alike(undisturbed, open_cache(cache))
    assert not list(cache.rglob("*.partial"))


@pytest.mark.slow
def test_a_file_that_cannot_grow(undisturbed: Cache, tmp_path: Path) -> None:
    cache = tmp_path / "x.zarr"
    with limited_files():
        assert_refused(extract(cache), cache, "File too large")
    assert marks(cache) == {"id/train": [True, False], "id/val": [False]}
    rows = cache / "id/train/logits/c.0.0"
    before = rows.stat().st_mtime_ns
    assert_finished(cache, undisturbed)
    assert rows.stat().st_mtime_ns == before  # what was written was not computed again


@pytest.mark.slow
def test_a_disk_that_fills_up_again_and_again(undisturbed: Cache, disk: Callable[[str], Path]) -> None:
    """At the first split's metadata, then within the second's rows."""
    cache = disk("64k") / "x.zarr"
    assert_refused(extract(cache), cache, "No space left on device")
    assert marks(cache) == {"id/train": [False, False]}
    assert not (cache / "id/train/blocks").exists()
    disk("1900k")
    assert_refused(extract(cache), cache, "No space left on device")
    assert marks(cache) == {"id/train": [True, True], "id/val": [False]}
    assert open_cache(cache)["id/train"].sealed
    disk("64m")
    assert_finished(cache, undisturbed)
