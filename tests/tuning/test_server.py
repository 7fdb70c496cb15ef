"""A study on a real PostgreSQL, shared by several commands through Optuna's RDB storage and its heartbeat."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from click.testing import CliRunner
from optuna.trial import FrozenTrial, TrialState

from nacpipe.cache import Cache
from nacpipe.cli import main
from nacpipe.errors import StudyError
from nacpipe.tuning.objective import Objective
from nacpipe.tuning.request import SearchRequest, SearchResult
from nacpipe.tuning.runner import run
from nacpipe.tuning.storage import HEARTBEAT, open_storage
from nacpipe.tuning.study import Search
from tests.prefork import python_words

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*psycopg:ResourceWarning"),  # a command ends with its connections
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]

ROOT = Path(__file__).resolve().parents[2]
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
PATIENCE = 300  # seconds for a command, on a busy machine


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
    asked = {"cache": Path(cache.path), "storage": url, "space": str(grid), "sampler": "grid"}
    return SearchRequest(**{**asked, "study": grid.parent.name, **more})


def start(cache: Cache, *options: str) -> subprocess.Popen[str]:
    command = [*python_words(), "-m", "nacpipe", "search", cache.path, "--threads", "1", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def start_grid(request: SearchRequest, cache: Cache, *more: str) -> subprocess.Popen[str]:
    output = str(Path(request.space).with_name("out.json"))
    options = ["--space", request.space, "--sampler", "grid", "--study", request.study, "--output", output]
    return start(cache, "--storage", str(request.storage), *options, *more)


def end(commands: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Wait for commands that all succeed, and return what they print on stderr."""
    found = []
    for command in commands:
        _, errors = command.communicate(timeout=PATIENCE)
        assert command.returncode == 0, errors
        found.append(errors)
    return found


def kill(commands: Sequence[subprocess.Popen[str]]) -> None:
    for command in commands:
        command.kill()
        command.communicate()


def trials_of(request: SearchRequest, *states: TrialState) -> list[FrozenTrial]:
    study = optuna.load_study(study_name=request.study_name, storage=open_storage(request.where))
    return study.get_trials(deepcopy=False, states=states or None)


def completed(request: SearchRequest) -> list[FrozenTrial]:
    return trials_of(request, TrialState.COMPLETE)


def wait_for(request: SearchRequest, trials: int) -> None:
    """Wait until a study has so many completed trials."""
    until, storage = time.monotonic() + PATIENCE, open_storage(request.where)
    while True:
        assert time.monotonic() < until, f"there are not {trials} completed trials yet"
        if request.study_name in optuna.get_all_study_names(storage):
            study = optuna.load_study(study_name=request.study_name, storage=storage)
            if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) >= trials:
                return
        time.sleep(0.1)


def values_by_combination(trials: Sequence[FrozenTrial]) -> dict[str, float | None]:
    return {repr(sorted(trial.params.items())): trial.value for trial in trials}


@pytest.fixture(scope="module")
def alone(small_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, SearchResult]:
    """One command on the same grid, with a journal."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "grid.toml").write_text(GRID)
    search = Search(request_(small_cache, str(folder / "s.log"), folder / "grid.toml"))
    return search, run(search)


# --- several commands -------------------------------------------------------------------------------------------------


def test_four_commands_two_killed_one_begun_anew(
    small_cache: Cache, postgres: str, grid: Path, alone: tuple[Search, SearchResult]
) -> None:
    """Each combination at least once, at most one trial more per machine, and nobody waits for the killed ones."""
    request = request_(small_cache, postgres, grid)
    commands = [start_grid(request, small_cache) for _ in range(4)]
    try:
        for number, victim in enumerate(commands[:2]):
            wait_for(request, 10 + 20 * number)
            assert victim.poll() is None
            victim.send_signal(signal.SIGKILL)
            victim.wait()
        assert len(completed(request)) < COMBINATIONS
        commands.append(start_grid(request, small_cache))
        end(commands[2:])
    finally:
        kill(commands)
    trials = completed(request)
    assert COMBINATIONS <= len(trials) <= COMBINATIONS + 5
    assert {trial.user_attrs["position"] for trial in trials} == set(range(COMBINATIONS))
    assert values_by_combination(trials) == values_by_combination(alone[0].completed())
    result = Search(request, create=False).result("stopped")
    assert result.checks == alone[1].checks
    times = sorted(t for trial in trials for t in (trial.datetime_start, trial.datetime_complete) if t)
    gaps = [(later - earlier).total_seconds() for earlier, later in itertools.pairwise(times)]
    assert max(gaps) < 2 * HEARTBEAT  # after which a silent trial is repeated


def test_the_default_search_is_shared_too(small_cache: Cache, postgres: str, tmp_path: Path) -> None:
    request = SearchRequest(cache=small_cache.path, space="paper", storage=postgres, study=tmp_path.name, trials=80)
    options = [
        "--space",
        "paper",
        "--storage",
        postgres,
        "--study",
        tmp_path.name,
        "--trials",
        "80",
        "--output",
        str(tmp_path / "o.json"),
    ]
    end([start(small_cache, *options) for _ in range(2)])
    trials = completed(request)
    assert 80 <= len(trials) <= 81
    assert [trial.user_attrs["position"] for trial in trials] == list(range(len(trials)))
    result = Search(request, create=False).result("stopped")
    assert result.checks.val_auroc == max(trial.value or 0 for trial in trials) > 0.9


def test_commands_that_draw_at_random_draw_different_trials(small_cache: Cache, postgres: str, tmp_path: Path) -> None:
    request = SearchRequest(cache=small_cache.path, storage=postgres, study=tmp_path.name, trials=6, sampler="random")
    searches = [Search(request) for _ in range(2)]
    run(searches[0])
    run(
        Search(
            SearchRequest(
                cache=small_cache.path, storage=postgres, study=f"{tmp_path.name}2", trials=6, sampler="random"
            )
        )
    )
    other = optuna.load_study(study_name=f"{tmp_path.name}2-random-seed1", storage=open_storage(postgres))
    assert not {repr(t.params) for t in other.trials} & {repr(t.params) for t in completed(request)}


@pytest.fixture
def empty(postgres: str) -> str:
    """A database of its own, without Optuna's tables."""
    engine = sqlalchemy.create_engine(postgres, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("DROP DATABASE IF EXISTS fresh WITH (FORCE)"))
        connection.execute(sqlalchemy.text("CREATE DATABASE fresh"))
    engine.dispose()
    return postgres.removesuffix("/postgres") + "/fresh"


def test_commands_that_start_at_once_on_an_empty_database(small_cache: Cache, empty: str, grid: Path) -> None:
    """Optuna's tables and the study are made by one of them."""
    request = request_(small_cache, empty, grid, trials=8)
    end([start_grid(request, small_cache, "--trials", "8") for _ in range(4)])
    trials = completed(request)
    assert 8 <= len(trials) <= 11
    assert {trial.user_attrs["position"] for trial in trials} >= set(range(8))
    study = optuna.load_study(study_name=request.study_name, storage=open_storage(empty))
    assert len(study.user_attrs["fingerprint"]) == 64


# --- signs of life ----------------------------------------------------------------------------------------------------


def age(url: str, trial: int) -> None:
    """Let a trial's last sign of life be older than Optuna waits."""
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    with engine.begin() as connection:
        changed = connection.execute(
            sqlalchemy.text(
                f"UPDATE trial_heartbeats SET heartbeat = heartbeat - interval '{2 * HEARTBEAT + 1} seconds'"
                " WHERE trial_id = :trial"
            ),
            {"trial": trial},
        )
        assert changed.rowcount == 1


def leave(search: Search, *, suggested: bool) -> optuna.Trial:
    """A running trial whose process is gone: asked for, or all of its parameters suggested."""
    assert search.study is not None
    search.study.sampler = search.make_sampler(0)
    trial = optuna.Trial(search.study, search.study._storage.create_new_trial(search.study._study_id))
    storage: Any = search.study._storage
    storage.record_heartbeat(trial._trial_id)
    if suggested:
        search.objective(trial)
    return trial


@pytest.mark.parametrize("kind", ["grid", "layers"])
@pytest.mark.parametrize("suggested", [False, True])
def test_a_stale_trial_is_repeated_in_its_position(
    small_cache: Cache, postgres: str, tmp_path: Path, kind: str, suggested: bool
) -> None:
    (tmp_path / "grid.toml").write_text(GRID)
    asked = {"space": str(tmp_path / "grid.toml"), "sampler": "grid"} if kind == "grid" else {}
    request = SearchRequest(cache=small_cache.path, storage=postgres, study=tmp_path.name, trials=4, **asked)  # type: ignore[arg-type]
    run(Search(request))
    stale = leave(Search(request), suggested=suggested)
    assert stale.number == 4
    running = SearchRequest(cache=small_cache.path, storage=postgres, study=tmp_path.name, trials=6, **asked)  # type: ignore[arg-type]
    run(Search(running))  # the trial is young: nobody repeats it, nobody waits for it
    assert [t.number for t in trials_of(request, TrialState.RUNNING)] == [4]
    assert [t.user_attrs["position"] for t in completed(request)] == [0, 1, 2, 3, 5, 6]
    age(postgres, stale._trial_id)
    run(Search(SearchRequest(cache=small_cache.path, storage=postgres, study=tmp_path.name, trials=8, **asked)))  # type: ignore[arg-type]
    assert [t.number for t in trials_of(request, TrialState.FAIL)] == [4]
    assert [(t.number, t.user_attrs["position"]) for t in completed(request)] == [
        *((0, 0), (1, 1), (2, 2), (3, 3), (5, 5), (6, 6)),
        *((7, 4), (8, 8)),
    ]
    if suggested:
        assert trials_of(request)[7].params == trials_of(request)[4].params


@pytest.mark.parametrize("moment", ["before its parameters", "after its value"])
def test_a_machine_that_was_silent_too_long_goes_on(
    small_cache: Cache, postgres: str, grid: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Its trial has been ended by another machine meanwhile: it takes another one."""
    request = request_(small_cache, postgres, grid, trials=6)
    call, calls = Objective.__call__, iter(range(10**6))

    def silent(objective: Objective, trial: Any) -> Any:
        value = call(objective, trial) if moment == "after its value" else None
        if next(calls) == 2:
            trial.study._storage.record_heartbeat(trial._trial_id)  # its thread may not have been that far
            age(postgres, trial._trial_id)
            optuna.storages.fail_stale_trials(trial.study)
        return call(objective, trial) if value is None else value

    monkeypatch.setattr(Objective, "__call__", silent)
    result = run(Search(request))
    assert (result.ended, result.trials) == ("trials", 6)
    assert [t.number for t in trials_of(request, TrialState.FAIL)] == [2]
    assert [t.user_attrs["position"] for t in completed(request)] == [0, 1, 2, 4, 5, 6]  # number 3 repeats position 2


def test_an_error_of_the_objective_is_not_taken_for_silence(
    small_cache: Cache, postgres: str, grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_objective: Objective, _trial: Any) -> float:
        raise ValueError("no such thing")

    monkeypatch.setattr(Objective, "__call__", fail)
    with pytest.raises(ValueError, match=r"^no such thing$"):
        run(Search(request_(small_cache, postgres, grid, trials=6)))


def test_an_interrupted_command_loses_no_completed_trial(small_cache: Cache, postgres: str, grid: Path) -> None:
    """Whenever the signal comes: the trial is finished, the command ends and says how to go on."""
    request = request_(small_cache, postgres, grid)
    before = 0
    for _ in range(2):
        command = start_grid(request, small_cache)
        wait_for(request, before + 3)
        command.send_signal(signal.SIGINT)
        _, errors = command.communicate(timeout=PATIENCE)
        assert command.returncode == 130, errors
        assert errors.splitlines()[-1].startswith("nacpipe: interrupted; what was written is safe, go on with: ")
        before = len(completed(request))
        assert len(trials_of(request)) == before
    found = run(Search(request_(small_cache, postgres, grid, trials=before + 5)))
    assert found.trials == before + 5
    assert [t.user_attrs["position"] for t in completed(request)] == list(range(found.trials))


# --- looking, and passwords -------------------------------------------------------------------------------------------


def tables(url: str) -> list[str]:
    with sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool).connect() as connection:
        return sqlalchemy.inspect(connection).get_table_names()


def rows(url: str) -> dict[str, list[Any]]:
    """Everything in a database, as text."""
    with sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool).connect() as connection:
        return {
            table: sorted(map(repr, connection.execute(sqlalchemy.text(f'SELECT * FROM "{table}"'))))
            for table in sqlalchemy.inspect(connection).get_table_names()
        }


@pytest.mark.parametrize("option", ["--status", "--explain", "--dry-run"])
def test_a_look_at_an_empty_database_makes_no_tables(small_cache: Cache, empty: str, option: str) -> None:
    done = CliRunner().invoke(main, ["search", small_cache.path, "--storage", empty, option])
    assert tables(empty) == []
    if option == "--status":
        said = f"there is no study nac-seed1 in {empty} yet; start it with: nacpipe search {small_cache.path} "
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith(f"nacpipe: {said}")
    if option == "--dry-run":
        assert done.stdout.endswith(f"study nac-seed1 in {empty}: 0 of 1081 trials done, sampler terms\n")


def test_a_look_writes_nothing_and_needs_no_right_to(small_cache: Cache, empty: str, grid: Path) -> None:
    """Not even that a stale trial failed."""
    request = request_(small_cache, empty, grid, trials=8)
    found = run(Search(request))
    age(empty, leave(Search(request), suggested=True)._trial_id)
    before = rows(empty)
    assert len(before["trials"]) == 9
    reader = f"{empty}?options=-c%20default_transaction_read_only%3Don"
    result = Search(request_(small_cache, reader, grid, trials=8), create=False).result("stopped")
    assert (result.params, result.checks, result.trials) == (found.params, found.checks, 8)
    command = ["search", small_cache.path, "--storage", reader, "--space", str(grid), "--sampler", "grid"]
    for option in ("--status", "--explain", "--dry-run"):
        done = CliRunner().invoke(main, [*command, "--study", grid.parent.name, option])
        assert done.exit_code == 0, done.output
    assert rows(empty) == before


def test_the_password_is_shown_nowhere(small_cache: Cache, empty: str, tmp_path: Path) -> None:
    """Neither printed, nor in the parameters, nor in the study."""
    where = empty.replace("nac@", "nac:sesame@")
    options = ["search", small_cache.path, "--storage", where, "--output", str(tmp_path / "p.json")]
    said: list[str] = []
    for more in (["--dry-run"], ["--trials", "3"], ["--status"], ["--explain"], ["--status", "--json"]):
        done = CliRunner().invoke(main, [*options, *more])
        assert done.exit_code == 0, done.output
        said.append(done.output)
    refused = CliRunner().invoke(main, [*options, "--layers", "layer1"])
    assert refused.exit_code == 1
    gone = where.replace("/fresh", "/nowhere")
    missing = CliRunner().invoke(main, [*options, "--storage", gone])
    assert missing.exit_code == 1
    said += [refused.output, missing.output, (tmp_path / "p.json").read_text(), repr(rows(empty))]
    assert not [text for text in said if "sesame" in text]
    assert "nac:***@127.0.0.1" in said[1] and "nac:***@127.0.0.1" in missing.output


def test_a_server_that_is_not_there(small_cache: Cache) -> None:
    with pytest.raises(
        StudyError, match=r"^the study's storage postgresql\+psycopg://nac@127\.0\.0\.1:1/x cannot be opened"
    ):
        Search(SearchRequest(cache=small_cache.path, storage="postgresql+psycopg://nac@127.0.0.1:1/x"))


@pytest.mark.server
def test_a_server_that_goes_away_is_said_in_one_line(small_cache: Cache, tmp_path: Path) -> None:
    from tests.tuning.postgres import find_programs, running

    programs = find_programs()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed; on Debian: apt-get install postgresql")
    with running(programs) as url:
        request = SearchRequest(cache=small_cache.path, storage=url, trials=100_000)
        command = start(small_cache, "--storage", url, "--trials", "100000", "--output", str(tmp_path / "p.json"))
        wait_for(request, 3)
        gc.collect()
    _, errors = command.communicate(timeout=PATIENCE)
    assert command.returncode == 1, errors
    lines = [line for line in errors.splitlines() if not line.startswith("search")]
    assert len(lines) == 1, errors
    assert lines[0].startswith("nacpipe: the study's storage went away: "), errors
    again = f"search {small_cache.path} --trials 100000 --threads 1 --storage {url} --output {tmp_path}/p.json"
    assert lines[0].endswith(f"go on with: nacpipe {again}")
