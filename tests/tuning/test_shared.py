"""A study on a real PostgreSQL: several commands share it, some of them are killed, and every trial is there once."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from click.testing import CliRunner
from optuna.trial import TrialState

from nacpipe.cache import Cache
from nacpipe.cli import main
from nacpipe.errors import StudyError
from nacpipe.tuning.desk import Desk
from nacpipe.tuning.locks import ServerLocks
from nacpipe.tuning.request import SearchRequest, SearchResult
from nacpipe.tuning.runner import run
from nacpipe.tuning.shared import SharedDesk
from nacpipe.tuning.storage import open_storage
from nacpipe.tuning.study import Search
from nacpipe.tuning.trials import number_of

pytestmark = pytest.mark.filterwarnings("ignore:.*psycopg:ResourceWarning")  # a command ends with its connections

GRID = """
[layers.avgpool]
bins = [20, 50]
saturation = [2, 5]
alpha = [0.1, 0.5, 2.0]
weight = 1.0
[layers.layer1]
bins = [20, 50]
saturation = 5
alpha = [0.1, 0.5]
weight = [0.5, 1.0]
"""
COMBINATIONS = 2 * 2 * 3 * 2 * 2 * 2  # 96


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Optuna's connections are closed here, not in somebody else's test."""
    yield
    gc.collect()


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    return path


def request_(cache: Cache, url: str, grid: Path, **more: Any) -> SearchRequest:
    asked = {
        "cache": Path(cache.path),
        "storage": url,
        "space": str(grid),
        "sampler": "grid",
        "study": grid.parent.name,
    }
    return SearchRequest(**{**asked, **more})


def command(request: SearchRequest) -> list[str]:
    options = {"space": request.space, "sampler": "grid", "storage": request.storage, "study": request.study}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    output = str(Path(request.space).with_name("out.json"))
    return [sys.executable, "-m", "nacpipe", "search", str(request.cache), *given, "--threads", "1", "--output", output]


def start(request: SearchRequest, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*command(request), *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def completed(request: SearchRequest) -> list[optuna.trial.FrozenTrial]:
    study = optuna.load_study(study_name=request.study_name, storage=open_storage(request.where))
    return study.get_trials(deepcopy=False)


def wait_for(request: SearchRequest, trials: int, seconds: float = 90) -> None:
    until, storage = time.monotonic() + seconds, open_storage(request.where)
    while True:
        assert time.monotonic() < until, f"there are not {trials} trials yet"
        if request.study_name in optuna.get_all_study_names(storage):
            study = optuna.load_study(study_name=request.study_name, storage=storage)
            if len(study.get_trials(deepcopy=False)) >= trials:
                return
        time.sleep(0.1)


@pytest.fixture(scope="module")
def alone(small_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, SearchResult]:
    """One worker on the same grid, with a journal."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "grid.toml").write_text(GRID)
    search = Search(request_(small_cache, str(folder / "s.log"), folder / "grid.toml"))
    return search, run(search)


def test_four_workers_two_killed_one_replaced(
    small_cache: Cache, postgres: str, grid: Path, alone: tuple[Search, SearchResult]
) -> None:
    """Exactly the grid, each combination once, and the same best as one worker's."""
    request = request_(small_cache, postgres, grid)
    workers = [start(request) for _ in range(4)]
    try:
        for number, victim in enumerate(workers[:2]):
            wait_for(request, 10 + 20 * number)
            assert victim.poll() is None
            victim.send_signal(signal.SIGKILL)
            victim.wait()
        assert len(completed(request)) < COMBINATIONS - 20
        workers.append(start(request))
        for worker in workers[2:]:
            _, errors = worker.communicate(timeout=180)
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    trials = completed(request)
    assert all(trial.state == TrialState.COMPLETE for trial in trials)
    assert len(trials) == COMBINATIONS
    assert sorted(number_of(trial) for trial in trials) == list(range(COMBINATIONS))
    assert len({tuple(sorted(trial.params.items())) for trial in trials}) == COMBINATIONS
    expected = {number_of(t): (t.params, t.value) for t in alone[0].completed()}
    assert {number_of(t): (t.params, t.value) for t in trials} == expected
    result = Search(request, create=False).result("stopped")
    assert (result.params, result.checks) == (alone[1].params, alone[1].checks)


def test_workers_of_one_command_are_killed(
    small_cache: Cache, postgres: str, grid: Path, alone: tuple[Search, SearchResult]
) -> None:
    """The command replaces them; nobody else has to notice."""
    request = request_(small_cache, postgres, grid)
    parent = start(request, "--workers", "4")
    try:
        killed: set[int] = set()
        for _ in range(2):
            wait_for(request, 10 + 20 * len(killed))
            victim = next(pid for pid in children(parent.pid) if pid not in killed)
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
        _, errors = parent.communicate(timeout=180)
        assert parent.returncode == 0, errors
    finally:
        parent.kill()
        parent.communicate()
    expected = {number_of(t): (t.params, t.value) for t in alone[0].completed()}
    assert {number_of(t): (t.params, t.value) for t in completed(request)} == expected
    assert len(completed(request)) == COMBINATIONS


def children(pid: int) -> list[int]:
    """Processes that compute for a command."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_default_search_is_shared_too(small_cache: Cache, postgres: str, tmp_path: Path) -> None:
    request = SearchRequest(cache=Path(small_cache.path), storage=postgres, study=tmp_path.name, trials=80)
    options = ["--storage", postgres, "--study", tmp_path.name, "--trials", "80", "--output", str(tmp_path / "o.json")]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "nacpipe", "search", small_cache.path, *options], stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
    trials = completed(request)
    assert sorted(number_of(trial) for trial in trials) == list(range(80))
    assert Search(request, create=False).result("stopped").checks.val_auroc > 0.9


@pytest.fixture
def empty(postgres: str) -> str:
    """A database of its own, without Optuna's tables."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(postgres, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("DROP DATABASE IF EXISTS fresh"))
        connection.execute(sqlalchemy.text("CREATE DATABASE fresh"))
    engine.dispose()
    return postgres.removesuffix("/postgres") + "/fresh"


def test_commands_that_start_at_once_on_an_empty_database(small_cache: Cache, empty: str, grid: Path) -> None:
    """Optuna's tables and the study are made by one of them."""
    request = request_(small_cache, empty, grid)
    workers = [start(request, "--trials", "8") for _ in range(4)]
    for worker in workers:
        _, errors = worker.communicate(timeout=180)
        assert worker.returncode == 0, errors
    assert sorted(number_of(trial) for trial in completed(request)) == list(range(8))


def tables(url: str) -> list[str]:
    import sqlalchemy

    with sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool).connect() as connection:
        return sqlalchemy.inspect(connection).get_table_names()


@pytest.mark.parametrize("option", ["--status", "--explain", "--dry-run"])
def test_a_look_at_an_empty_database_makes_no_tables(small_cache: Cache, empty: str, option: str) -> None:
    done = CliRunner().invoke(main, ["search", small_cache.path, "--storage", empty, option])
    assert tables(empty) == []
    if option == "--status":
        said = f"there is no study nac-seed1 in {empty} yet; start it with: nacpipe search {small_cache.path} "
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith(f"nacpipe: {said}")
    if option == "--dry-run":
        assert done.stdout.endswith(f"study nac-seed1 in {empty}: 0 of 2000 trials done, sampler layers\n")


def test_a_look_needs_no_right_to_write(small_cache: Cache, empty: str, grid: Path) -> None:
    request = request_(small_cache, empty, grid, trials=8)
    found = run(Search(request))
    before = completed(request)
    reader = f"{empty}?options=-c%20default_transaction_read_only%3Don"
    result = Search(request_(small_cache, reader, grid, trials=8), create=False).result("stopped")
    assert (result.params, result.checks, result.trials) == (found.params, found.checks, 8)
    assert completed(request) == before


def test_an_interrupted_command_gives_its_trial_back(small_cache: Cache, postgres: str, grid: Path) -> None:
    """Whenever the signal comes: the command ends, and what it tried is free."""
    request = request_(small_cache, postgres, grid)
    for trials in (3, 9, 15):
        worker = start(request)
        wait_for(request, trials)
        worker.send_signal(signal.SIGINT)
        _, errors = worker.communicate(timeout=60)
        assert worker.returncode == 130, errors
        assert errors.splitlines()[-1].startswith("nacpipe: interrupted; what was written is safe, go on with: ")
    found = run(Search(request_(small_cache, postgres, grid, trials=30)))
    assert found.trials >= 30
    numbers = sorted(number_of(trial) for trial in completed(request))
    assert numbers == list(range(len(numbers)))


# --- the book ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def study(postgres: str, tmp_path: Path) -> Iterator[optuna.Study]:
    yield optuna.create_study(storage=open_storage(postgres), study_name=tmp_path.name)


def eventually(what: Callable[[], bool]) -> bool:
    """A server takes a moment to notice that a connection ended."""
    until = time.monotonic() + 10
    while not (found := what()) and time.monotonic() < until:
        time.sleep(0.02)
    return found


def trial(number: int) -> optuna.trial.FrozenTrial:
    return optuna.trial.create_trial(value=float(number), user_attrs={"number": number})


def test_a_number_is_handed_out_once(postgres: str, study: optuna.Study) -> None:
    first, second = SharedDesk(study, 3, [], postgres), SharedDesk(study, 3, [], postgres)
    assert first.claim() == (0, [])
    assert second.claim() == (1, [])
    assert first.record(0, trial(0))
    number, news = second.claim()
    assert (number, [number_of(t) for t in news]) == (2, [0])
    number, news = first.claim()
    assert (number, news) == (None, [])  # all are being tried
    assert not first.finished
    assert second.record(1, trial(1))
    assert second.record(2, trial(2))
    number, news = first.claim()
    assert (number, [number_of(t) for t in news]) == (None, [1, 2])
    assert first.finished
    first.close()
    second.close()


def test_what_the_dead_were_trying_is_free_again(postgres: str, study: optuna.Study) -> None:
    dead, living = SharedDesk(study, 2, [], postgres), SharedDesk(study, 2, [], postgres)
    assert dead.claim()[0] == 0
    assert living.claim()[0] == 1
    assert living.claim()[0] is None
    dead.close()
    assert eventually(lambda: living.claim()[0] == 0)
    assert living.record(0, trial(0))
    # It comes back from the dead, as one whose connection was lost: its late result is not counted.
    late = SharedDesk(study, 2, [], postgres)
    assert not late.record(0, trial(0))
    assert [number_of(t) for t in study.get_trials()] == [0]
    for desk in (living, late):
        desk.close()


def test_the_living_are_told_from_the_dead(postgres: str, tmp_path: Path) -> None:
    mine, other = ServerLocks(postgres, tmp_path.name), ServerLocks(postgres, tmp_path.name)
    mine.live("a")
    assert other.lives("a")
    assert not other.lives("b")
    assert not ServerLocks(postgres, "another").lives("a")
    mine.close()
    assert eventually(lambda: not other.lives("a"))


def test_one_desk_hands_out_in_order(tmp_path: Path) -> None:
    study = optuna.create_study(storage=open_storage(str(tmp_path / "s.log")))
    study.add_trial(trial(1))
    study.add_trial(optuna.trial.create_trial(value=1.0))  # somebody else's, without a number
    desk = Desk(study, 4, [1])
    assert [desk.claim()[0] for _ in range(4)] == [0, 2, 3, None]
    desk.close()
    assert desk.claim()[0] == 0
    assert desk.record(0, trial(0))
    assert [desk.claim()[0], desk.claim()[0]] == [2, 3]
    assert not desk.finished


def test_a_database_without_such_locks_is_refused() -> None:
    with pytest.raises(StudyError, match=r"^a study cannot be shared on sqlite; use PostgreSQL or MySQL"):
        ServerLocks("sqlite://", "s")


def test_a_server_that_is_not_there(small_cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(
        StudyError, match=r"^the study's storage postgresql\+psycopg://nac@127\.0\.0\.1:1/x cannot be opened"
    ):
        Search(SearchRequest(cache=Path(small_cache.path), storage="postgresql+psycopg://nac@127.0.0.1:1/x"))
