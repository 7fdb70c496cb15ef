"""Two searches that begin in the same instant: one makes the study and runs, the other is refused in words."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from click.testing import CliRunner

from nacpipe.cache import Cache
from nacpipe.cli import main
from nacpipe.errors import StudyError
from nacpipe.tuning.request import SearchRequest
from nacpipe.tuning.storage import backend, is_server, only_runner, open_storage, study_file
from nacpipe.tuning.study import Search
from tests.prefork import python_words

ROOT = Path(__file__).resolve().parents[2]
TRIALS = 25
# A process that runs a command for each line that it gets. It is slow to make a study, so that the other is there.
SEARCHES = """
import json, sys, time, optuna
from click.testing import CliRunner
from nacpipe.cli import main
from tests.prefork import python_words

create = optuna.create_study

def create_slowly(*args, **kwargs):
    time.sleep(0.4)
    return create(*args, **kwargs)

optuna.create_study = create_slowly
for line in sys.stdin:
    done = CliRunner().invoke(main, json.loads(line))
    print(json.dumps([done.exit_code, done.stderr, repr(done.exception)]), flush=True)
"""
Together = Callable[[list[str], list[str]], list[tuple[int, str, str]]]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Together]:
    """The function that runs two commands in two processes at once and returns their exit codes, stderr and errors."""
    both = [
        subprocess.Popen(
            [*python_words(), "-c", SEARCHES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path_factory.mktemp("at-once"),
        )
        for _ in range(2)
    ]

    def run(*commands: list[str]) -> list[tuple[int, str, str]]:
        for process, command in zip(both, commands, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        return [tuple(json.loads(process.stdout.readline())) for process in both]  # type: ignore[union-attr, misc]

    run(["--version"], ["--version"])  # both are up
    yield run
    for process in both:
        process.communicate()


def search(cache: Cache, where: str, output: Path, *more: str) -> list[str]:
    return ["search", cache.path, "--storage", where, "--output", str(output), "--trials", str(TRIALS), *more]


def trials(where: str, study: str) -> list[int]:
    found = optuna.load_study(study_name=study, storage=open_storage(where)).get_trials(deepcopy=False)
    return sorted(trial.user_attrs["position"] for trial in found)


PLACES = ["{}/s.log", "sqlite:///{}/s.db", pytest.param("sqlite+pysqlite:///{}/s.db", marks=pytest.mark.slow)]


@pytest.mark.repeats(1)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Optuna closes its databases when they are collected
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "old",
    [pytest.param(False, id="new storage"),
     pytest.param(True, id="new study in an old storage", marks=pytest.mark.slow)],
)  # fmt: skip
def test_one_runs_and_the_other_is_refused(
    small_cache: Cache, tmp_path: Path, together: Together, place: str, old: bool
) -> None:
    for number in range(2 if place.startswith("sqlite") else 4):
        folder = tmp_path / str(number)
        folder.mkdir()
        where = place.format(folder)
        if old:
            first = CliRunner().invoke(
                main, search(small_cache, where, folder / "old.json", "--study", "old", "--trials", "2")
            )
            assert first.exit_code == 0, first.output
        found = together(*(search(small_cache, where, folder / f"{name}.json") for name in "ab"))  # type: ignore[arg-type]
        assert sorted(code for code, _, _ in found) == [0, 1], found
        (refused,) = (stderr for code, stderr, _ in found if code)
        assert refused == (
            f"nacpipe: study nac-seed1 in {where} is being searched by another process; wait for it\n"
        )  # fmt: skip
        assert trials(where, "nac-seed1") == list(range(TRIALS))
        assert sorted(path.suffix for path in folder.iterdir()) == sorted(
            [".json"] * (1 + old) + [Path(where).suffix]
        )  # the locks are gone  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("place", [pytest.param(PLACES[0], marks=pytest.mark.slow), PLACES[1]])
def test_two_studies_are_made_at_once_in_one_storage(
    small_cache: Cache, tmp_path: Path, together: Together, place: str
) -> None:
    for number in range(2):
        where = place.format(tmp_path).replace("/s.", f"/{number}.")
        commands = [search(small_cache, where, tmp_path / f"{name}.json", "--study", name) for name in "ab"]
        assert [code for code, _, _ in together(*commands)] == [0, 0]  # type: ignore[arg-type]
        assert sorted(optuna.get_all_study_names(open_storage(where))) == ["a-seed1", "b-seed1"]
        assert trials(where, "a-seed1") == trials(where, "b-seed1") == list(range(TRIALS))


@pytest.mark.repeats(2)
@pytest.mark.parametrize("option", ["--status", "--dry-run", "--explain"])
@pytest.mark.parametrize("place", PLACES)
def test_looking_needs_no_lock_and_writes_nothing(small_cache: Cache, tmp_path: Path, place: str, option: str) -> None:
    where = place.format(tmp_path)
    command = ["search", small_cache.path, "--storage", where, "--trials", "3", "--output", str(tmp_path / "p.json")]
    with only_runner(where, "nac-seed1"):  # somebody searches
        before = sorted(path.name for path in tmp_path.iterdir())
        looked = CliRunner().invoke(main, [*command, option])
        assert looked.exit_code == (0 if option == "--dry-run" else 1)
        assert "another process" not in looked.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == before == [f"{Path(where).name}.nac-seed1.running"]
    assert CliRunner().invoke(main, command).exit_code == 0
    with only_runner(where, "nac-seed1"):
        assert CliRunner().invoke(main, [*command, option]).exit_code == 0
        refused = CliRunner().invoke(main, command)
    assert (refused.exit_code, "is being searched by another process" in refused.stderr) == (1, True)


def test_a_search_that_fails_leaves_no_lock(small_cache: Cache, tmp_path: Path) -> None:
    where = str(tmp_path / "s.log")
    for wrong in (["--space", "nosuch.toml"], ["--study", "a/b"], ["--timeout", "-1"], ["--layers", "nosuch"]):
        failed = CliRunner().invoke(main, ["search", small_cache.path, "--storage", where, *wrong])
        assert isinstance(failed.exception, SystemExit) and failed.exit_code == 1, failed.output
        assert list(tmp_path.iterdir()) == []


def other_names(folder: Path) -> list[str]:
    """Of the journal s.log and the database s.db in a folder."""
    (folder / "link.log").symlink_to(folder / "s.log")
    (folder / "link.db").symlink_to(folder / "s.db")
    journal = [f"{folder}/s.log", f"{folder}/../{folder.name}/s.log", f"{folder}/link.log"]
    return [*journal, *(f"sqlite:///{folder}/{name}" for name in ("s.db", "./s.db", "link.db"))]


@pytest.mark.parametrize("first", [0, 1, 2, 3, 4, 5])
def test_a_study_is_held_whatever_way_its_file_is_named(tmp_path: Path, first: int) -> None:
    names = other_names(tmp_path)
    same = names[:3] if first < 3 else [*names[3:], f"sqlite+pysqlite:///{tmp_path}/s.db"]
    same.append(f"sqlite:///file:{tmp_path}/s.db?uri=true") if first >= 3 else None
    with only_runner(names[first], "s"):
        for second in same:
            with pytest.raises(StudyError, match="is being searched by another process"), only_runner(second, "s"):
                pass


def test_an_error_inside_is_not_taken_for_the_locks(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError, match="a pipe"), only_runner(str(tmp_path / "s.log"), "s"):
        raise BlockingIOError("a pipe is full")
    assert list(tmp_path.iterdir()) == []


# --- databases and paths ----------------------------------------------------------------------------------------------

URLS: dict[str, tuple[str, str | None]] = {  # → the kind, the file
    "s.log": ("", "s.log"),
    "/a b/s.log": ("", "/a b/s.log"),
    "sqlite.log": ("", "sqlite.log"),
    "postgresql.log": ("", "postgresql.log"),
    "sqlite:///x.db": ("sqlite", "x.db"),
    "sqlite:////a/x.db": ("sqlite", "/a/x.db"),
    "sqlite+pysqlite:///x.db": ("sqlite", "x.db"),
    "sqlite+pysqlite:///my studies/x.db?timeout=5": ("sqlite", "my studies/x.db"),
    "sqlite:///file:x.db?uri=true": ("sqlite", "x.db"),
    "sqlite:///file:///a/x%20y.db?uri=true": ("sqlite", "/a/x y.db"),
    "sqlite://": ("sqlite", None),
    "sqlite:///:memory:": ("sqlite", None),
    "sqlite://x.db": ("sqlite", None),  # a slash too few: SQLAlchemy refuses it
    "postgresql://nac@db/studies": ("postgresql", None),
    "postgresql+psycopg://nac:secret@db:5432/studies": ("postgresql", None),
    "postgresql+psycopg2://db/sqlite": ("postgresql", None),
    "mysql+pymysql://db/x": ("mysql", None),
    "mariadb://db/x": ("mariadb", None),
    "postgresql://nac@db:notaport/x": ("postgresql", None),
}


@pytest.mark.parametrize("where", URLS)
def test_a_url_is_told_from_a_path(where: str) -> None:
    kind, file = URLS[where]
    assert backend(where) == kind
    assert is_server(where) == (kind not in ("", "sqlite"))
    assert study_file(where) == (None if file is None else Path(file))


@pytest.mark.repeats(1)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    "url", ["sqlite:///{}/s.db", "sqlite+pysqlite:///{}/s.db", "sqlite:///file:{}/s.db?uri=true"]
)  # fmt: skip
def test_every_way_to_name_sqlite_is_searched_and_looked_at(small_cache: Cache, tmp_path: Path, url: str) -> None:
    folder = tmp_path / "my studies"
    folder.mkdir()
    where = url.format(folder)
    command = ["search", small_cache.path, "--storage", where, "--output", str(tmp_path / "p.json")]
    assert CliRunner().invoke(main, [*command, "--status"]).exit_code == 1
    assert list(folder.iterdir()) == []
    done = CliRunner().invoke(main, [*command, "--trials", "3"])
    assert done.exit_code == 0, done.output
    assert [path.name for path in folder.iterdir()] == ["s.db"]
    shown = CliRunner().invoke(main, [*command, "--status"])
    assert (shown.exit_code, shown.stderr.startswith("3 of 1081 trials; go on with: ")) == (0, True), shown.output


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql+psycopg2://db/x", r"^this needs psycopg2; install it$"),
        ("oracle+cx_oracle://db/x", r"^this needs cx_Oracle; install it$"),
        ("mysql+mysqldb://db/x", r"^this needs MySQLdb; install it$"),
    ],
)
def test_a_driver_that_no_extra_brings_is_not_promised_by_one(small_cache: Cache, url: str, message: str) -> None:
    from nacpipe.errors import MissingExtra

    request: dict[str, Any] = {"cache": small_cache.path, "storage": url, "output": Path("p.json")}
    with pytest.raises(MissingExtra, match=message):
        Search(SearchRequest(**request))


def test_a_study_name_that_is_no_text_is_refused(small_cache: Cache, tmp_path: Path) -> None:
    """SQLite and PostgreSQL cannot hold it."""
    for where in (f"{tmp_path}/s.log", f"sqlite:///{tmp_path}/s.db"):
        done = CliRunner().invoke(main, ["search", small_cache.path, "--storage", where, "--study", "caf\udce9"])
        assert done.stderr == "nacpipe: study is 'caf\\udce9'; a name must be UTF-8 without a / in it\n"
    assert list(tmp_path.iterdir()) == []
