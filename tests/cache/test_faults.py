"""What stands in the way of a writer: another writer, a full disk, a folder that is read-only, a store that is gone."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.cache import writer as writing
from nacpipe.cache.lock import CacheLock
from nacpipe.cache.verify import verify_cache
from nacpipe.errors import CacheError
from tests.alike import prepare_split
from tests.prefork import python_words

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no flock, no limits"),
    pytest.mark.usefixtures("zarr_threads"),
]

ROOT = Path(__file__).resolve().parents[2]
ONLY_VAL = dict.fromkeys(["id/train", "id/subtrain", "id/test", "ood/val", "ood/near/letters", "ood/far/textures"], 0)


@pytest.fixture
def whole(make_cache: Callable[..., Cache], tmp_path: Path) -> Cache:
    return make_cache(tmp_path / "whole.zarr", rows=ONLY_VAL)


def fill(path: Path, whole: Cache, blocks: range = range(3)) -> CacheWriter:
    """Write these blocks of id/val."""
    writer = CacheWriter(path, whole.header)
    split = whole["id/val"]
    prepare_split(writer, split)
    for block in blocks:
        rows = slice(16 * block, 16 * block + 16)
        writer.write_block("id/val", block, {key: split.read(key)[rows] for key in whole.header.arrays()})
    return writer


def assert_whole(path: Path, whole: Cache) -> None:
    assert verify_cache(open_cache(path)) == []
    assert open_cache(path)["id/val"].attributes == whole["id/val"].attributes


# --- two at once ------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from nacpipe.cache.lock import CacheLock
from tests.prefork import python_words
lock = CacheLock(sys.argv[1])
getattr(lock, sys.argv[2])()
print("held", flush=True)
sys.stdin.read()
"""


def hold(path: Path, kind: str) -> subprocess.Popen[str]:
    """Another process that holds the lock until it is killed or its input ends."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), kind],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


@pytest.mark.parametrize("kind", ["take", "share"])
def test_a_second_writer_is_refused_while_the_first_lives_and_takes_over_when_it_died(
    tmp_path: Path, kind: str
) -> None:
    (path := tmp_path / "c.zarr").mkdir()
    with hold(path, kind) as other:
        try:
            with CacheLock(path) as lock, pytest.raises(CacheError, match=r"c\.zarr is being written by another extr"):
                lock.take()
        finally:
            other.send_signal(signal.SIGKILL)
    with CacheLock(path) as lock:
        lock.take()
    assert list(path.iterdir()) == []  # nothing is left that could go stale


def test_ranks_share_it_and_the_first_gives_up_being_alone(tmp_path: Path) -> None:
    (path := tmp_path / "c.zarr").mkdir()
    with CacheLock(path) as first, CacheLock(path) as second, CacheLock(path) as stranger:
        first.take()
        with pytest.raises(CacheError, match="another extract"):
            second.share()
        first.share()
        second.share()
        with pytest.raises(CacheError, match="another extract"):
            stranger.take()
        first.__exit__(None, None, None)
        with pytest.raises(CacheError, match="another extract"):  # one rank alone keeps others out
            stranger.take()


def test_a_split_may_be_read_while_another_is_written(tmp_path: Path, make_cache: Callable[..., Cache]) -> None:
    whole = make_cache(tmp_path / "c.zarr", rows={**ONLY_VAL, "id/train": 60})
    split, expected = whole["id/val"], whole["id/train"].read("logits")
    arrays = {key: split.read(key) for key in whole.header.arrays()}
    stop, errors = threading.Event(), list[BaseException]()

    def write() -> None:
        try:
            with CacheLock(whole.path) as lock:
                lock.take()
                writer = CacheWriter(whole.path, whole.header)
                while not stop.is_set():
                    writer.drop("ood/val")
                    prepare_split(writer, split, "ood/val")
                    for block in range(3):
                        rows = slice(16 * block, 16 * block + 16)
                        writer.write_block("ood/val", block, {key: array[rows] for key, array in arrays.items()})
                    writer.seal("ood/val")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(20):
            cache = open_cache(whole.path)
            np.testing.assert_array_equal(cache["id/train"].read("logits"), expected)
            np.testing.assert_array_equal(cache["id/val"].read("logits"), arrays["logits"])
    finally:
        stop.set()
        thread.join()
    assert errors == []


# --- no room, no right, no store --------------------------------------------------------------------------------------


def test_a_full_disk_is_said_and_the_same_calls_go_on(tmp_path: Path, whole: Cache) -> None:
    """A limit of the size of files stands in for the disk: the kernel refuses in the middle of a write."""
    path = tmp_path / "c.zarr"
    writer = fill(path, whole, range(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    split = whole["id/val"]
    rows = {key: split.read(key)[16:32] for key in whole.header.arrays()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(
            CacheError, match=r"c\.zarr: there is no space left to write it \(File too large\); what was"
        ):
            writer.write_block("id/val", 1, rows)
        with pytest.raises(CacheError, match="there is no space left"):
            CacheWriter(tmp_path / "new.zarr", whole.header)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert open_cache(path).peek("id/val").marks().tolist() == [True, False, False]
    assert verify_cache(open_cache(path)) == []
    fill(path, whole, range(1, 3)).seal("id/val")
    assert_whole(path, whole)
    fill(tmp_path / "new.zarr", whole).seal("id/val")
    assert_whole(tmp_path / "new.zarr", whole)


READ_ONLY = """
import os, sys
from nacpipe.cache import CacheWriter, open_cache
from nacpipe.errors import CacheError
from tests.alike import prepare_split
open_cache(sys.argv[1])["id/val"].read("logits")
if os.geteuid() == 0:  # whom no permission stops; by now everything is imported
    os.seteuid(65534)
cache = open_cache(sys.argv[1])
print(len(cache["id/val"].read("logits")))
for path in sys.argv[1], sys.argv[2]:
    try:
        CacheWriter(path, cache.header).drop("id/val")
    except CacheError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_read_only_folder_is_read_and_never_written(tmp_path: Path, whole: Cache) -> None:
    for folder, _, files in os.walk(tmp_path):
        for name in files:
            os.chmod(Path(folder, name), 0o444)
        os.chmod(folder, 0o555)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for folder in tmp_path.parents:
        if folder.name.startswith(("pytest-", "popen-", "nacpipe-tests-")):  # pytest's own, and those of its workers
            os.chmod(folder, 0o755)
    try:
        done = subprocess.run(
            [*python_words(), "-c", READ_ONLY, whole.path, str(tmp_path / "new.zarr")],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    finally:
        for folder, _, _ in os.walk(tmp_path):
            os.chmod(folder, 0o755)
    lines = done.stdout.splitlines()
    assert lines[0] == "40", done.stderr
    assert [line.split(" (")[0] for line in lines[1:]] == [
        f"{whole.path} cannot be written",
        f"{tmp_path / 'new.zarr'} cannot be written",
    ]
    assert all("Permission denied" in line for line in lines[1:])
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_store_that_disappears_is_not_made_anew_by_its_rows(tmp_path: Path, whole: Cache) -> None:
    path = tmp_path / "c.zarr"
    writer = fill(path, whole, range(2))
    shutil.move(path, tmp_path / "moved.zarr")
    rows = {key: whole["id/val"].read(key)[32:] for key in whole.header.arrays()}
    for act in (lambda: writer.write_block("id/val", 2, rows), lambda: writer.seal("id/val")):
        with pytest.raises(
            CacheError, match=r"c\.zarr does not exist any more: it was moved, removed or unmounted while it was writt"
        ):
            act()
    assert not path.exists()
    fill(tmp_path / "moved.zarr", whole, range(2, 3)).seal("id/val")
    assert_whole(tmp_path / "moved.zarr", whole)


def test_a_store_that_disappears_under_a_reader_gives_no_numbers(tmp_path: Path, whole: Cache) -> None:
    split = whole["id/val"]
    shutil.move(whole.path, tmp_path / "moved.zarr")
    for key in whole.header.arrays():
        with pytest.raises(CacheError, match=rf"id/val/{key} is (damaged \(row 0 holds no value\)|not in the store)"):
            split.read(key)


# --- the power goes ---------------------------------------------------------------------------------------------------


def test_what_a_mark_or_a_seal_vouches_for_is_on_the_disk_before_it(
    tmp_path: Path, whole: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is written, then synced, then vouched for: the order of calls, as no test can cut the power."""
    calls: list[str] = []
    fsync, opened = os.fsync, writing.CacheWriter._open

    def note_fsync(handle: int) -> None:
        calls.append(os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path / "c.zarr"))
        fsync(handle)

    def note_open(writer: CacheWriter, path: str) -> object:
        calls.append(f"open {path}")
        return opened(writer, path)

    writer = fill(tmp_path / "c.zarr", whole, range(2))
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(writing.CacheWriter, "_open", note_open)
    rows = {key: whole["id/val"].read(key)[32:] for key in whole.header.arrays()}
    writer.write_block("id/val", 2, rows)
    assert calls[-1] == "open id/val/blocks"  # the mark, last of all
    arrays = {f"id/val/{key}" for key, array in rows.items() if array.ndim > 1}
    assert sorted(call for call in calls if not call.startswith("open ")) == sorted(
        [*(f"{array}/c.2.0" for array in arrays), *arrays]  # each once: labels and places are written before, in `fill`
    )
    calls.clear()
    writer.seal("id/val")
    files = {str(f.relative_to(tmp_path / "c.zarr")) for f in (tmp_path / "c.zarr/id/val").rglob("*") if f.is_file()}
    last = max(i for i, call in enumerate(calls) if call == "id/val/zarr.json")
    assert files <= {*calls[:last]}  # everything before the seal, then the seal itself
    last_calls = [re.sub(r"\.[0-9a-f]{16}\.", ".X.", call) for call in calls[last + 1 :]]
    assert last_calls == [
        ".",
        "id",
        "id/val",
        "zarr.json.X.partial",
        ".",
    ]  # last the copy of metadata


def test_labels_are_on_the_disk_before_the_first_mark_can_be_written(
    tmp_path: Path, whole: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again in every run: a chunk that is there may be of a run that a power cut ended."""
    calls: list[str] = []
    fsync, create = os.fsync, writing.create_marks

    def note_fsync(handle: int) -> None:
        calls.append(os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path / "c.zarr"))
        fsync(handle)

    def note_marks(*args: Any) -> Any:
        calls.append("marks")
        return create(*args)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(writing, "create_marks", note_marks)
    fill(tmp_path / "c.zarr", whole, range(1))
    before = calls[: calls.index("marks")]
    for key in ("label", "index"):
        assert {f"id/val/{key}/c.0", f"id/val/{key}", "id/val", "id", "."} <= {*before}
        (tmp_path / "c.zarr/id/val" / key / "c.0").write_bytes(b"")  # torn
    calls.clear()
    fill(tmp_path / "c.zarr", whole, range(1, 3)).seal("id/val")
    assert "marks" not in calls
    assert {"id/val/label/c.0", "id/val/index/c.0"} <= {*calls[: calls.index("id/val/logits/c.1.0")]}
    assert_whole(tmp_path / "c.zarr", whole)
