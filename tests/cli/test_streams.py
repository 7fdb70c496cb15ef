"""Whatever stdout and stderr are: closed, without a reader, on a full disk, of another encoding, in another thread."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner, Result

from nacpipe.cache import Cache
from nacpipe.cli import main
from nacpipe.cli.streams import Terminal, standard_streams
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.params_file import write_params
from nacpipe.text import escape_bytes
from nacpipe.tuning import runner as sweep
from tests.prefork import python_words

ROOT = Path(__file__).resolve().parents[2]
PARAMS = NacParams(layers={"avgpool": LayerParams(bins=20, saturation=5, alpha=0.5)})


def run(folder: Path, redirect: str, *args: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command in a folder with its streams as a shell redirects them."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = ["bash", "-c", f'exec "$@" {redirect}', "bash", *python_words(environment), "-m", "nacpipe", *args]
    return subprocess.run(command, capture_output=True, check=False, env=environment, cwd=folder, timeout=300)


@pytest.fixture
def place(small_cache: Cache, tmp_path: Path) -> Path:
    """A folder with a cache and parameters."""
    shutil.copytree(small_cache.path, tmp_path / "c.zarr")
    write_params(tmp_path / "p.json", PARAMS)
    return tmp_path


def files_of(folder: Path) -> dict[str, Any]:
    """What a command left, without its clock."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json" and ".params" in path.name:
            content = json.loads(path.read_text())
            content["result"].pop("seconds")
            found[path.name] = content
        elif path.name.endswith(".log"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[path.name] = [line["params"] for line in lines if "datetime_complete" in line]
        elif path.is_file() and "c.zarr" not in path.parts:
            found[path.name] = path.read_bytes()
    return found


# --- closed -----------------------------------------------------------------------------------------------------------

QUICK = "<&- >&- 2>&-"  # a process each: make test tries all closed at once, make check one after the other as well
CLOSED = [QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in ("2>&-", ">&-", ">&- 2>&-", "<&-"))]


@pytest.fixture(scope="module")
def usual(
    small_cache: Cache, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[bytes], dict[str, Any]]:
    """A search with open streams, and what it left beside its cache and the parameters."""
    shutil.copytree(small_cache.path, (folder := tmp_path_factory.mktemp("usual")) / "c.zarr")
    write_params(folder / "p.json", PARAMS)
    return run(folder, "", "search", "c.zarr", "--trials", "20"), files_of(folder)


@pytest.mark.parametrize("redirect", CLOSED)
def test_a_search_with_closed_streams_does_what_it_does(
    place: Path, usual: tuple[subprocess.CompletedProcess[bytes], dict[str, Any]], redirect: str
) -> None:
    whole, left = usual
    done = run(place, redirect, "search", "c.zarr", "--trials", "20")
    assert done.returncode == whole.returncode == 0
    assert files_of(place) == left
    assert len(files_of(place)["c.study.log"]) == 20
    without_clock = [line for line in whole.stdout.splitlines() if b" trials in " not in line]
    shown = [line for line in done.stdout.splitlines() if b" trials in " not in line]
    assert shown == ([] if ">&-" in redirect.replace("2>&-", "") else without_clock)
    assert done.stderr == (b"" if "2>&-" in redirect else whole.stderr)


@pytest.mark.parametrize(
    "redirect", [">&- 2>&-", *(pytest.param(one, marks=pytest.mark.slow) for one in ("2>&-", "<&-"))]
)
def test_an_extraction_with_closed_streams_does_what_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redirect: str
) -> None:
    asked = ["extract", "digits", "--splits", "id/train", "--train-images", "10", "--cache", "c.zarr"]
    done = run(tmp_path, redirect, *asked)
    assert done.returncode == 0
    monkeypatch.chdir(tmp_path)
    looked = shown("utf-8", "verify", "c.zarr")
    assert (looked.exit_code, looked.stdout) == (0, "c.zarr: 1 splits, whole\n")
    assert (b"id/train" in done.stdout) == (redirect != ">&- 2>&-")


@pytest.mark.parametrize("redirect", CLOSED)
@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["evaluate", "c.zarr", "--params", "p.json"], 0),
        (["evaluate", "c.zarr", "--params", "p.json", "--csv"], 0),
        (["inspect", "c.zarr", "--json"], 0),
        (["search", "nosuch.zarr"], 1),
        (["search", "--nosuch"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
@pytest.mark.repeats(2)
def test_exit_codes_stay(place: Path, redirect: str, args: list[str], code: int) -> None:
    """A closed stdout is not wanted, as one that goes to /dev/null is not: what goes there is dropped."""
    before = files_of(place)
    done = run(place, redirect, *args)
    assert done.returncode == code
    assert files_of(place) == before
    assert (done.stdout != b"") == (code == 0 and redirect in ("2>&-", "<&-"))
    assert (b"nacpipe: " in done.stderr) == (code != 0 and "2>&-" not in redirect)


def test_no_file_takes_the_number_of_a_closed_stream(place: Path) -> None:
    """Else what libraries and child processes print would be written into it."""
    code = """
import os, sys
from nacpipe.cli import main
try:
    main(["verify", "c.zarr"])
except SystemExit:
    file = open("c.zarr/zarr.json")
    os.write(2, b"somebody prints")
    sys.exit(0 if file.fileno() > 2 else 7)
"""
    whole = (place / "c.zarr/zarr.json").read_bytes()
    command = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *python_words(), "-c", code]
    assert subprocess.run(command, cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0
    assert (place / "c.zarr/zarr.json").read_bytes() == whole


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [lambda: None, closed], ids=["None", "closed"])
@pytest.mark.parametrize("names", [["stderr"], ["stdout"], ["stdout", "stderr"]], ids=" ".join)
@pytest.mark.repeats(2)
def test_a_host_without_streams(
    place: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], names: list[str]
) -> None:
    """Programs without a console, and hosts that close what they have."""
    monkeypatch.chdir(place)
    streams = {name: make() for name in names}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    for args in (["search", "c.zarr", "--trials", "3"], ["evaluate", "c.zarr", "--csv"], ["search", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(args)
        assert ended.value.code == 0, args
        assert all(getattr(sys, name) is stream for name, stream in streams.items())
    with pytest.raises(SystemExit) as ended:
        main(["search", "nosuch.zarr"])
    assert ended.value.code == 1
    assert json.loads((place / "c.params.json").read_text())["result"]["trials"] == 3


# --- nobody reads, no room --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    "redirect",
    [pytest.param("2> >(true)", marks=pytest.mark.slow), "2>/dev/full",
     pytest.param("2> >(exec head -c 1 >/dev/null)", marks=pytest.mark.slow)],
)  # fmt: skip
def test_what_stderr_does_not_take_is_dropped(place: Path, redirect: str) -> None:
    """A terminal that was closed, a pipe whose reader is gone, a full disk."""
    for args in (["search", "c.zarr", "--trials", "5"], ["search", "c.zarr", "--trials", "5"]):  # the second only notes
        done = run(place, redirect, *args)
        assert (done.returncode, done.stdout.count(b"5 trials in ")) == (0, 1)
    assert run(place, redirect, "search", "nosuch.zarr").returncode == 1
    assert json.loads((place / "c.params.json").read_text())["result"]["trials"] == 5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("more", [[], *(pytest.param([one], marks=pytest.mark.slow) for one in ("--csv", "--json"))])
def test_results_that_a_full_disk_does_not_take_are_said(place: Path, more: list[str]) -> None:
    done = run(place, ">/dev/full", "evaluate", "c.zarr", "--params", "p.json", *more)
    assert done.returncode == 1
    assert done.stderr == (
        b"nacpipe: No space left on device; what was written is safe: free some space, and the same command goes on\n"
    )


@pytest.mark.parametrize("more", [[], pytest.param(["--csv"], marks=pytest.mark.slow)])
def test_a_pipe_whose_reader_is_gone_ends_a_command(place: Path, more: list[str]) -> None:
    done = run(place, "> >(exec true)", "evaluate", "c.zarr", "--params", "p.json", *more)
    assert done.returncode in (0, 1)  # 0 where all was written before the reader ended
    assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr
    read, write = os.pipe()
    os.close(read)
    command = [*python_words(), "-m", "nacpipe", "evaluate", "c.zarr", "--params", "p.json", *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    gone = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=place, env=environment)
    os.close(write)
    assert (gone.returncode, gone.stderr) == (1, b"")


# --- encodings --------------------------------------------------------------------------------------------------------

ENCODINGS = ["cp1252", "latin-1", "ascii", "shift_jis"]


def shown(charset: str, *args: str) -> Result:
    done = CliRunner(charset=charset).invoke(main, list(args), prog_name="nacpipe")
    assert isinstance(done.exception, SystemExit | None), done.exception
    return done


@pytest.fixture(scope="module")
def studied(small_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache, in a folder whose name is not ASCII, with a study beside it."""
    folder = tmp_path_factory.mktemp("Größe 測定")
    shutil.copytree(small_cache.path, folder / "c.zarr")
    assert shown("utf-8", "search", str(folder / "c.zarr"), "--trials", "30").exit_code == 0
    return str(folder / "c.zarr")


COMMANDS = [
    ["inspect", "{}"],
    ["inspect", "{}", "id/val"],
    ["inspect", "{}", "id/val", "avgpool", "--alpha", "2"],
    ["search", "{}", "--explain"],
    ["search", "{}", "--status"],
    ["search", "{}", "--dry-run"],
    ["evaluate", "{}", "--confidence", "0.9", "--resamples", "20"],
    ["evaluate", "{}", "--markdown"],
    ["rank", "{}"],
    ["verify", "{}"],
    ["evaluate", "--help"],
    ["report", "--help"],
    ["extract", "--help"],
]


@pytest.mark.repeats(1)
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_terminal_shows_every_command(studied: str, command: list[str]) -> None:
    args = [arg.format(studied) for arg in command]
    usual = shown("utf-8", *args)
    for charset in ENCODINGS:
        done = shown(charset, *args)
        assert done.exit_code == usual.exit_code == 0, charset
        text, wanted = done.stdout_bytes.decode(charset), usual.stdout_bytes.decode()
        assert text.count("\n") == wanted.count("\n"), charset
        words = [word for word in wanted.split() if word.isascii()]
        assert [word for word in words if word not in text.split()] == [], charset  # what the terminal has is not lost
        assert done.stderr_bytes.decode(charset).count("\n") == usual.stderr.count("\n"), charset


@pytest.mark.parametrize("charset", ENCODINGS)
def test_pictures_are_drawn_in_ascii_where_blocks_are_lacking(studied: str, charset: str) -> None:
    """The same picture: something where something was, higher where it was higher."""
    args = ["inspect", studied, "id/val", "avgpool", "--alpha", "2"]
    usual, done = shown("utf-8", *args).stdout, shown(charset, *args).stdout_bytes.decode(charset)
    blocks = [line for line in usual.splitlines() if set(line) & set("▁▂▃▄▅▆▇█") and set(line) <= set(" ▁▂▃▄▅▆▇█")]
    assert len(blocks) > 10
    drawn = [line for old, line in zip(usual.splitlines(), done.splitlines(), strict=True) if old in blocks]
    for old, new in zip(blocks, drawn, strict=True):
        assert [c == " " for c in new] == [c == " " for c in old]
        assert new.strip(" .:|#") == ""
        assert new == old.translate(str.maketrans("▁▂▃▄▅▆▇█", "..::||##"))


@pytest.mark.parametrize(
    ("charset", "wanted"),
    [
        ("utf-8", ["≤", "┤━", "·", "└──", "●", " … ", "–"]),
        ("cp1252", ["<=", "|=", ".", "+--", "o", " … ", "–"]),  # it has … and –
        ("latin-1", ["<=", "|=", ".", "+--", "o", " ... ", "-"]),
        ("ascii", ["<=", "|=", ".", "+--", "o", " ... ", "-"]),
    ],
)
def test_an_explanation_says_the_same_in_every_encoding(studied: str, charset: str, wanted: list[str]) -> None:
    text = shown(charset, "search", studied, "--explain").stdout_bytes.decode(charset)
    assert [part for part in wanted if part not in text] == []
    head, *rows = text.splitlines()[:4]
    end = head.index("range") + len("range")
    assert [row[end - 1 : end + 1].strip() != "" and row[end : end + 2] for row in rows] == ["  "] * 3  # still aligned


@pytest.mark.parametrize("charset", ["cp1252", "latin-1", "ascii"])
def test_names_in_messages_are_shown_or_escaped(charset: str, tmp_path: Path) -> None:
    done = shown(charset, "inspect", f"{tmp_path}/Größe 測定.zarr")
    name = {"ascii": "Gr\\xf6\\xdfe \\x6e2c\\x5b9a.zarr"}.get(charset, "Größe \\x6e2c\\x5b9a.zarr")
    assert done.exit_code == 1
    assert f"there is no cache at {tmp_path}/{name}; make one with: " in done.stderr_bytes.decode(charset)


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        *(
            pytest.param(variables, marks=pytest.mark.slow)
            for variables in (
                {"PYTHONIOENCODING": "cp1252"},
                {"PYTHONIOENCODING": "latin-1:surrogateescape"},
                {"LC_ALL": "C"},
                {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
            )
        ),
    ],
    ids=str,
)
@pytest.mark.repeats(1)
def test_a_real_terminal_of_another_encoding(place: Path, variables: dict[str, str]) -> None:
    os.rename(place / "c.zarr", place / os.fsdecode(b"caf\xc3\xa9 \xff.zarr"))
    for args in (["inspect", "id/val", "avgpool"], ["search", "--trials", "25"], ["search", "--explain"]):
        command, *more = args
        done = run(place, "", command, os.fsdecode(b"caf\xc3\xa9 \xff.zarr"), *more, **variables)
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
        if "PYTHONIOENCODING" not in variables:
            assert b"?" not in done.stdout


@pytest.mark.repeats(1)
@pytest.mark.parametrize("charset", ["utf-8", pytest.param("cp1252", marks=pytest.mark.slow), "ascii"])
def test_csv_is_utf8_and_json_ascii_whatever_the_terminal(
    place: Path, monkeypatch: pytest.MonkeyPatch, charset: str
) -> None:
    """Also where a name is no UTF-8: what pandas reads is what was printed."""
    monkeypatch.chdir(place)
    names = ["café.json", "測定.json", os.fsdecode(b"caf\xe9.json")]
    for name in names:
        shutil.copy("p.json", name)
        args = ["evaluate", "c.zarr", "--params", "p.json", "--against", name]
        method = f"NAC ({escape_bytes(name)})"
        frame = pd.read_csv(io.BytesIO(shown(charset, *args, "--csv").stdout_bytes))
        assert set(frame["second"]) == {method}
        printed = shown(charset, *args, "--json").stdout_bytes
        assert {row["second"] for row in json.loads(printed.decode("ascii"))} == {method}
    assert method == "NAC (caf\\xe9.json)"
    for name in (os.fsdecode(b"a\xff.zarr"), "é.zarr"):
        shutil.copytree("c.zarr", name)
        (row,) = json.loads(shown(charset, "rank", name, "--json").stdout_bytes)["checkpoints"]
        frame = pd.read_csv(io.BytesIO(shown(charset, "rank", name, "--csv").stdout_bytes))
        assert list(frame["checkpoint"]) == [row["checkpoint"]] == [escape_bytes(name).removesuffix(".zarr")]


def test_csv_to_a_stream_of_text_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "stdout", stream := io.StringIO())
    assert main(["evaluate", "c.zarr", "--params", "p.json", "--csv"], standalone_mode=False) is None
    assert stream.getvalue().startswith("task,group,dataset,method,fpr95,")


# --- files that hold names --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_files_take_names_that_are_no_utf8(
    small_cache: Cache, make_cache: Callable[..., Cache], tmp_path: Path
) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9 $x$")
    caches = [make_cache(folder / f"{n}.zarr", identity={"weights": str(n) * 64}).path for n in (1, 2)]
    for cache in caches:
        assert shown("utf-8", "search", cache, "--trials", "3").exit_code == 0
    escaped = escape_bytes(str(folder))
    page, pictures = folder / "r.html", folder / "figures"
    assert shown("utf-8", "report", *caches, "--output", str(page), "--figures", str(pictures)).exit_code == 0
    assert f"Run 1: {escaped}/1.zarr" in page.read_text("utf-8")
    scores = [str(tmp_path / name) for name in ("s.npz", "s.parquet")]
    for file in scores:
        assert shown("utf-8", "evaluate", *caches, "--scores", file).exit_code == 0
    assert set(pd.read_parquet(scores[1])["cache"]) == {f"{escaped}/1.zarr", f"{escaped}/2.zarr"}
    plot = str(tmp_path / "x.svg")
    done = shown("utf-8", "inspect", caches[0], "id/val", "avgpool", "--compare", caches[1], "--plot", plot)
    assert done.exit_code == 0
    assert shown("utf-8", "rank", *caches).exit_code == 0


def test_a_split_whose_name_is_no_utf8_is_refused(place: Path) -> None:
    os.rename(place / "c.zarr/ood/near/letters", place / "c.zarr/ood/near" / os.fsdecode(b"l\xe9tters"))
    for command in (["inspect"], ["evaluate", "--params", str(place / "p.json")], ["search"], ["verify"]):
        done = shown("utf-8", command[0], str(place / "c.zarr"), *command[1:])
        assert done.stderr == (
            f"nacpipe: {place}/c.zarr: the name of split ood/near/l\\xe9tters is not UTF-8; rename its folder\n"
        )


# --- threads and signals ----------------------------------------------------------------------------------------------


def in_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize(
    ("args", "code", "printed"),
    [
        (["--help"], 0, "Usage: nacpipe "),
        (["search", "--help"], 0, "Usage: nacpipe search "),
        (["search", "c.zarr", "--trials", "3"], 0, "term "),
        (["evaluate", "c.zarr", "--params", "p.json"], 0, "OOD: ID is id/test"),
        (["search", "nosuch.zarr"], 1, ""),
        (["search", "--nosuch"], 2, ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_commands_run_outside_the_main_thread(
    place: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, printed: str
) -> None:
    monkeypatch.chdir(place)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    done: Result = in_thread(lambda: CliRunner().invoke(main, args, prog_name="nacpipe"))
    assert isinstance(done.exception, SystemExit | None), done.exception
    assert (done.exit_code, done.stdout.startswith(printed)) == (code, True)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_handlers_that_no_python_code_set_are_no_obstacle(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host in C has its own: Python gives None for them and takes no None."""
    real = signal.signal
    seen: list[tuple[int, Any]] = []

    def set_handler(number: int, handler: Any) -> None:
        assert handler is not None
        seen.append((number, handler))

    monkeypatch.setattr(signal, "signal", set_handler)
    with sweep._stopping():
        pass
    monkeypatch.chdir(place)
    assert CliRunner().invoke(main, ["inspect", "c.zarr"]).exit_code == 0
    monkeypatch.setattr(signal, "signal", real)
    assert seen[-1][1] == signal.SIG_DFL


def test_two_threads_leave_the_streams_as_they_were() -> None:
    before = sys.stdout, sys.stderr
    with standard_streams(exits=False):
        first = sys.stdout
        assert isinstance(first, Terminal)
        with standard_streams(exits=False):  # another thread's, meanwhile
            assert sys.stdout is first
        assert sys.stdout is first
    assert (sys.stdout, sys.stderr) == before


# `print` in a thread that is writing while the command ends: sys.stdout is set back between its write and its flush.
PRINTING = """
import sys, threading
from nacpipe.cli.streams import standard_streams

class Slow:
    def __init__(self, stream):
        self.stream = stream
    def write(self, text):
        self.stream.write(text)
        began.set()
        ended.wait(20)
        for _ in range(1000):  # what was freed is used again
            kept.append(bytearray(64))
    def flush(self):
        self.stream.flush()

began, ended, kept = threading.Event(), threading.Event(), []
sys.stdout = Slow(sys.stdout)
with standard_streams(exits=True):
    thread = threading.Thread(target=print, args=("text",), kwargs={"flush": True})
    thread.start()
    began.wait(20)
ended.set()
thread.join()
sys.exit(130)
"""


def test_a_thread_that_prints_while_the_command_ends_does_not_crash_it() -> None:
    words = [sys.executable, "-c", PRINTING]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "text\n", "")
