"""Where studies are kept: torn journals, dead processes, databases, and whose study it is."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest

from nacpipe.cache import Cache
from nacpipe.errors import CacheError, StudyError
from nacpipe.tuning import runner as sweep
from nacpipe.tuning import storage
from nacpipe.tuning.request import SearchRequest
from nacpipe.tuning.storage import only_runner, open_storage
from nacpipe.tuning.study import Search
from tests.prefork import python_words

ROOT = Path(__file__).resolve().parents[2]
TRIALS = 30

Trials = list[tuple[float | None, dict[str, Any], dict[str, Any]]]


def request_(cache: Cache, where: object, **more: Any) -> SearchRequest:
    return SearchRequest(
        **{"cache": Path(cache.path), "space": "paper", "storage": str(where), "trials": TRIALS, **more}
    )


def trials_of(search: Search) -> Trials:
    """Everything of a trial but its clock."""
    return [
        (trial.value, dict(trial.params), {k: v for k, v in trial.user_attrs.items() if k != "seconds"})
        for trial in search.completed()
    ]


def run(request: SearchRequest) -> Search:
    search = Search(request)
    sweep.run(search)
    assert search.study is not None
    assert len(search.study.get_trials()) == len(search.completed())  # nothing is left running or failed
    return search


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def journal(small_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a finished study."""
    path = tmp_path_factory.mktemp("journal") / "s.log"
    run(request_(small_cache, path))
    return path


@pytest.fixture(scope="module")
def expected(small_cache: Cache, journal: Path) -> Trials:
    """Its trials."""
    trials = trials_of(Search(request_(small_cache, journal)))
    assert len(trials) == TRIALS
    return trials


# --- torn files and dead processes ------------------------------------------------------------------------------------


def test_every_trial_is_one_line(journal: Path) -> None:
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    trials = [line for line in lines if "datetime_complete" in line]
    assert len(trials) == TRIALS
    assert len(lines) - TRIALS == 8  # the study and its seven attributes


@pytest.mark.repeats(3)
@pytest.mark.parametrize("line", [0, 1, 3, 4, 5, 20, 34, -1])
@pytest.mark.parametrize("keep", ["1", "half", "all but the line's end"])
def test_a_journal_torn_in_any_line_goes_on(
    small_cache: Cache, journal: Path, expected: Trials, tmp_path: Path, line: int, keep: str
) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    size = {"1": 1, "half": len(lines[line]) // 2, "all but the line's end": len(lines[line]) - 1}[keep]
    torn = tmp_path / "s.log"
    torn.write_bytes(b"".join(lines[:line]) + lines[line][:size])
    search = run(request_(small_cache, torn))
    assert trials_of(search) == expected
    assert search.made_by()["fingerprint"] == Search(request_(small_cache, journal)).made_by()["fingerprint"]


@pytest.mark.parametrize("garbage", [b"{", b'{"op_code": 4, "work', b"\0" * 5000, b"\xff\xfe", b"x" * 200_000])
def test_garbage_after_the_last_line_is_cut_off(
    small_cache: Cache, journal: Path, expected: Trials, tmp_path: Path, garbage: bytes
) -> None:
    torn, whole = tmp_path / "s.log", b"".join(journal.read_bytes().splitlines(keepends=True)[:20])
    torn.write_bytes(whole + garbage)
    assert trials_of(run(request_(small_cache, torn))) == expected
    assert torn.read_bytes().startswith(whole + b'{"op_code"')


@pytest.mark.parametrize("after", [b"", b"\n", b'": 1}\n', "the next lines"])
def test_lines_that_a_power_cut_left_unwritten_are_cut_off(
    small_cache: Cache, journal: Path, expected: Trials, tmp_path: Path, after: bytes | str
) -> None:
    """Between two waits for the disk the system writes in an order of its own: a hole reads as zeros."""
    lines = journal.read_bytes().splitlines(keepends=True)
    torn, whole = tmp_path / "s.log", b"".join(lines[:20])
    rest = b"".join(lines[21:]) if isinstance(after, str) else after
    torn.write_bytes(whole + lines[20][:40] + b"\0" * 4096 + rest)
    assert trials_of(run(request_(small_cache, torn))) == expected
    assert torn.read_bytes().startswith(whole + b'{"op_code"')


def test_a_journal_waits_for_the_disk_at_the_end_and_four_times_a_second(
    small_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, synced, clock = tmp_path / "s.log", list[int](), [0.0]
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    monkeypatch.setattr(storage.time, "monotonic", lambda: clock[0])
    journal = storage.Journal(str(where), storage.TailMendingLock(str(where)))
    for clock[0] in (0.0, 0.1, 0.2, 0.3, 0.4, 0.6):
        journal.append_logs([{"op_code": 1}])
    line = len(b'{"op_code":1}\n')
    assert synced == [line, 4 * line, 6 * line]
    storage.sync_study(str(where))
    assert synced[3:] == [6 * line]
    assert list(journal.read_logs(0)) == [{"op_code": 1}] * 6


def test_a_line_that_is_no_json_is_refused(small_cache: Cache, journal: Path, tmp_path: Path) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    bad = tmp_path / "s.log"
    bad.write_bytes(b"".join([*lines[:8], b"{]\n", *lines[8:]]))
    with pytest.raises(StudyError, match=r"^the study's storage .*s\.log cannot be opened: JSONDecodeError: "):
        Search(request_(small_cache, bad))


def test_a_lock_left_by_a_dead_process_is_free(
    small_cache: Cache, journal: Path, expected: Trials, tmp_path: Path
) -> None:
    where = tmp_path / "s.log"
    shutil.copy(journal, where)
    hold = "import sys, time; from nacpipe.tuning.storage import TailMendingLock as L; L(sys.argv[1]).acquire();"
    child = subprocess.Popen(
        [*python_words(), "-c", hold + "print('held', flush=True); time.sleep(600)", str(where)],
        stdout=subprocess.PIPE,
        env=environment(),
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with where.open("r+") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        child.kill()
        child.communicate()
    search = run(request_(small_cache, where, trials=TRIALS + 5))
    assert len(search.completed()) == TRIALS + 5
    assert trials_of(search)[:TRIALS] == expected


@pytest.mark.slow
def test_killed_three_times_it_ends_with_the_trials_asked_for(small_cache: Cache, tmp_path: Path) -> None:
    """SIGKILL, each time once this many lines are in the journal and somewhere in the next few milliseconds."""
    killed = tmp_path / "killed.log"
    command = [*python_words(), "-m", "nacpipe", "search", small_cache.path, "--storage", str(killed)]
    command += ["--trials", "1000000", "--output", str(tmp_path / "p.json")]
    for lines in (2, 40, 150):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())
        while child.poll() is None and (not killed.exists() or killed.read_bytes().count(b"\n") < lines):
            time.sleep(0.001)
        time.sleep(0.004 * (os.urandom(1)[0] / 256))
        child.kill()
        assert child.communicate()[1] == b""
        assert child.returncode == -signal.SIGKILL
        assert not (tmp_path / "p.json").exists()
    trials = len(Search(request_(small_cache, killed), create=False).completed()) + 30
    search = run(request_(small_cache, killed, trials=trials))
    assert len(search.completed()) == trials
    assert trials_of(search) == trials_of(run(request_(small_cache, tmp_path / "whole.log", trials=trials)))


# --- databases --------------------------------------------------------------------------------------------------------


def test_a_database_keeps_the_same_trials(small_cache: Cache, expected: Trials, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    run(request_(small_cache, url, trials=7))
    assert trials_of(run(request_(small_cache, url))) == expected
    assert trials_of(Search(request_(small_cache, url), create=False)) == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("{}/no/s.log", r"^the folder of the study .*/no/s\.log is not there$"),
        ("sqlite:///{}/no/s.db", r"^the study's storage sqlite:///.*/no/s\.db cannot be opened: .*unable to open"),
        ("nosuch://{}", r"^the study's storage nosuch://.* cannot be opened: .*nosuch"),
        ("{}", r"^the study's storage .* cannot be opened: IsADirectoryError: "),
    ],
)
def test_places_that_cannot_be_opened(small_cache: Cache, tmp_path: Path, where: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        Search(request_(small_cache, where.format(tmp_path)))
    assert not list(tmp_path.iterdir())


# --- whose study it is ------------------------------------------------------------------------------------------------


@pytest.fixture
def other(make_cache: Callable[..., Cache], tmp_path: Path) -> Cache:
    """A cache of other weights."""
    return make_cache(tmp_path / "other.zarr", identity={"weights": "0123456789abcdef" * 4})


def test_a_study_of_another_cache_is_refused(small_cache: Cache, other: Cache, journal: Path, tmp_path: Path) -> None:
    where = tmp_path / "s.log"
    shutil.copy(journal, where)
    message = (
        r"^study nac-paper-seed1 in .*s\.log was made with another cache than .*other\.zarr:"
        r" weights: stored [0-9a-f]{8}…, now 01234567…\. Give another --storage FILE$"
    )
    for more in ({}, {"seed": 2}, {"study": "mine"}):  # in one file, one cache's studies
        with pytest.raises(StudyError, match=message):
            Search(request_(other, where, **more))
    assert where.read_bytes() == journal.read_bytes()
    with pytest.raises(StudyError, match=message):
        Search(request_(other, where), create=False)


def test_in_a_database_only_the_study_itself_must_be_the_caches_own(
    small_cache: Cache, other: Cache, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    run(request_(small_cache, url, trials=2))
    with pytest.raises(StudyError, match="was made with another cache than"):
        Search(request_(other, url))
    assert len(run(request_(other, url, trials=2, study="other")).completed()) == 2


def test_the_same_cache_with_other_layers_is_a_neighbour(small_cache: Cache, journal: Path, tmp_path: Path) -> None:
    where = tmp_path / "s.log"
    shutil.copy(journal, where)
    splits = r"\(id/train, id/val, ood/val\)"
    message = rf"searches avgpool, layer1 {splits} of this cache, not layer1 {splits}\. Give another --study NAME$"
    with pytest.raises(StudyError, match=message):
        Search(request_(small_cache, where, layers=("layer1",)))
    search = run(request_(small_cache, where, layers=("layer1",), study="one", trials=3))
    assert search.made_by()["study_name"] == "one-paper-seed1"
    assert len(Search(request_(small_cache, where)).completed()) == TRIALS
    assert optuna.get_all_study_names(open_storage(str(where))) == ["nac-paper-seed1", "one-paper-seed1"]


@pytest.mark.parametrize("split", ["id/train", "id/val", "ood/val"])
def test_an_unfinished_split_is_refused(small_cache: Cache, tmp_path: Path, split: str) -> None:
    path = tmp_path / "c.zarr"
    shutil.copytree(small_cache.path, path)
    metadata = path / split / "zarr.json"
    content = json.loads(metadata.read_text())
    content["attributes"].update(sealed=False, digest=None)
    metadata.write_text(json.dumps(content))
    with pytest.raises(CacheError, match=rf"^{path}: {split} is not finished \(\d of \d blocks\); finish it with: "):
        Search(SearchRequest(cache=path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.zarr"]


# --- looking, and where ---------------------------------------------------------------------------------------------


def test_looking_at_a_study_that_is_not_there(small_cache: Cache, tmp_path: Path) -> None:
    search = Search(request_(small_cache, tmp_path / "s.log"), create=False)
    assert search.completed() == []
    message = r"^there is no study nac-paper-seed1 in .*s\.log yet; start it with: nacpipe search "
    with pytest.raises(StudyError, match=message):
        search.result("stopped")
    assert not list(tmp_path.iterdir())


def test_a_study_without_trials_is_looked_at(small_cache: Cache, tmp_path: Path) -> None:
    search = Search(request_(small_cache, tmp_path / "s.log"))
    message = r"^there is no completed trial of nac-paper-seed1 in .*s\.log; start or go on with: nacpipe search "
    with pytest.raises(StudyError, match=message):
        search.result("stopped")


def test_looking_writes_nothing(small_cache: Cache, journal: Path, tmp_path: Path) -> None:
    where = tmp_path / "s.log"
    where.write_bytes(journal.read_bytes() + b'{"torn')
    assert len(Search(request_(small_cache, where), create=False).completed()) == TRIALS
    assert where.read_bytes() == journal.read_bytes() + b'{"torn'
    url = f"sqlite:///{tmp_path}/s.db"
    assert Search(request_(small_cache, url), create=False).completed() == []
    assert not (tmp_path / "s.db").exists()


@pytest.mark.parametrize("url", ["sqlite:///{}", "sqlite+pysqlite:///{}"])
def test_looking_at_a_database_of_something_else_writes_nothing(small_cache: Cache, tmp_path: Path, url: str) -> None:
    path = tmp_path / "other.db"
    assert Search(request_(small_cache, url.format(path)), create=False).study is None
    assert not path.exists()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE studies (name TEXT)")
    before = path.read_bytes()
    assert Search(request_(small_cache, url.format(path)), create=False).study is None
    assert path.read_bytes() == before


def test_the_default_place_is_beside_the_cache(small_cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "copy.zarr"
    shutil.copytree(small_cache.path, path)
    assert SearchRequest(cache=path).where == str(tmp_path / "copy.study.log")
    search = run(SearchRequest(cache=path, trials=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy.study.log", "copy.zarr"]
    assert search.command() == f"nacpipe search {path} --trials 1"
    more = SearchRequest(cache=path, trials=2, seed=3, storage=str(tmp_path / "x.log"), study="b", layers=("layer1",))
    assert Search(more).command() == (
        f"nacpipe search {path} --trials 2 --seed 3 --storage {tmp_path}/x.log --study b --layers layer1"
    )


# --- one search at a time, and nothing but journals -------------------------------------------------------------------


def test_a_second_search_of_a_study_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    where = f"{tmp_path}/s.log"
    with only_runner(where, "nac-seed1"):
        with (
            pytest.raises(StudyError, match=r"nac-seed1 in .* is being searched by another process"),
            only_runner(where, "nac-seed1"),
        ):
            pass
        with only_runner(where, "nac-seed2"):  # another study in the same journal
            pass
    with only_runner(where, "nac-seed1"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"SQLite format 3\x00 and more", b"notes\nof mine", b"{}\n"])
def test_a_file_that_is_no_journal_is_left_as_it_is(small_cache: Cache, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "notes").write_bytes(content)
    with pytest.raises(StudyError, match="notes is not a study's journal; name another --storage FILE"):
        Search(request_(small_cache, tmp_path / "notes"))
    assert (tmp_path / "notes").read_bytes() == content
