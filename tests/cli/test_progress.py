"""How far a command is: a bar that is written over on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import gc
import io
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nacpipe.cache import Cache
from nacpipe.cli import main
from nacpipe.cli import output as show
from nacpipe.cli.output import Progress
from tests.prefork import python_words

ROOT = Path(__file__).resolve().parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(show.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def watch(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> io.StringIO:
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def drain(stream: io.StringIO) -> str:
    text = stream.getvalue()
    stream.seek(0)
    stream.truncate()
    return text


def test_a_terminals_bar_moves_with_every_batch(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    stream = watch(monkeypatch, Terminal())
    progress = Progress("extract", {"id/train": 300, "id/val": 100}, {"id/train": 100})
    assert drain(stream).strip("\r ") == "extract:  25%|██▄       | 100/400 [00:00<?, ?it/s]"
    clock[0] += 2
    progress.step(20, "id/train")
    assert drain(stream).strip("\r ") == "extract id/train 120/300:  30%|███       | 120/400 [00:02<00:28, 10.00it/s]"
    clock[0] += 0.05
    progress.step(20, "id/train")
    assert drain(stream) == ""  # no more than ten times a second
    clock[0] += 1.95
    progress.step(160, "id/train")
    line = "extract id/train 300/300:  75%|███████▄  | 300/400 [00:04<00:02, 50.00it/s]"
    assert drain(stream).strip("\r ") == line
    progress.note("id/train: accuracy 99 %")
    cleared, noted = drain(stream).split("id/train: accuracy 99 %\n")
    assert cleared == "\r" + " " * len(line) + "\r"
    assert noted.strip("\r ") == line  # it is shown again below the note
    progress.step(100, "id/val")
    last = "extract id/val 100/100: 100%|██████████| 400/400 [00:04<00:00, 75.00it/s]"
    assert drain(stream) == f"\r{last}  \n"  # spaces over the rest of the longer line


def test_a_bar_counts_trials_and_shows_the_best(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    stream = watch(monkeypatch, Terminal())
    progress = Progress("search", {"": 200}, {"": 100}, unit="trial")
    clock[0] += 10
    progress.step(20, more="best 98.20 %")
    shown = drain(stream).split("\r")[-1]
    assert shown.strip() == "search:  60%|██████    | 120/200 [00:10<00:40,  2.00trial/s, best 98.20 %]"


def test_bytes_are_shown_by_their_powers(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    stream = watch(monkeypatch, Terminal())
    progress = Progress("unpack", {"bytes": 4_000_000_000}, unit="B")
    clock[0] += 10
    progress.step(1_000_000_000, "bytes")
    shown = drain(stream).split("\r")[-1]
    assert shown.strip() == "unpack bytes:  25%|██▄       | 1.00G/4.00G [00:10<00:30, 100MB/s]"


def test_nothing_left_to_do_shows_nothing(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    stream = watch(monkeypatch, Terminal())
    with Progress("search", {"": 200}, {"": 200}) as progress:
        progress.note("a note")
    assert drain(stream) == "a note\n"


def test_an_early_end_ends_the_line(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    """What is printed after an interrupt, an error or a time limit begins a line; the bar is not shown again."""
    stream = watch(monkeypatch, Terminal())
    with pytest.raises(KeyboardInterrupt), Progress("search", {"": 200}) as progress:
        clock[0] += 1
        progress.step(20)
        drain(stream)
        raise KeyboardInterrupt
    assert drain(stream) == "\rsearch:  10%|█         | 20/200 [00:01<00:09, 20.00it/s]\n"
    del progress
    gc.collect()
    assert drain(stream) == ""


def test_a_terminal_that_is_closed_meanwhile(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    watch(monkeypatch, Terminal())
    with Progress("search", {"": 200}) as progress:
        sys.stderr.close()
        clock[0] += 1
        progress.step(20)
        clock[0] += 1
        progress.step(20)
    assert progress.done == 40


def test_elsewhere_there_is_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    stream = watch(monkeypatch, io.StringIO())
    progress = Progress("search", {"": 100_000}, {"": 40_000})
    lines = []
    for _ in range(125):  # seconds
        clock[0] += 1
        progress.step(10, more="best 98.20 %")
        lines += drain(stream).splitlines()
    assert lines == [
        "search 40600/100000  best 98.20 %  10/s  1:39:00 left",
        "search 41200/100000  best 98.20 %  10/s  1:38:00 left",
    ]
    progress.note("a note")
    assert drain(stream) == "a note\n"
    clock[0] += 3
    progress.step(58_750)
    assert drain(stream) == ""  # the result follows


def test_a_slow_step_is_told_by_the_next(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    stream = watch(monkeypatch, io.StringIO())
    progress = Progress("extract", {"id/train": 1000})
    clock[0] += 128
    progress.step(512, "id/train")
    assert drain(stream) == "extract id/train 512/1000  4.0/s  2:02 left\n"


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_who_does_not_speak_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, clock: list[float], stream: io.StringIO
) -> None:
    """The other ranks of a torchrun."""
    watch(monkeypatch, stream)
    progress = Progress("extract", {})
    clock[0] += 100
    progress.step(5, "id/train")
    assert stream.getvalue() == ""


def test_foreign_names_do_not_reach_the_terminal_raw(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    stream = watch(monkeypatch, Terminal())
    progress = Progress("verify", {"ood/near/a\x1b[2J": 10})
    drain(stream)
    clock[0] += 1
    progress.step(5, "ood/near/a\x1b[2J")
    assert drain(stream) == "\rverify ood/near/a\\x1b[2J:  50%|█████     | 5/10 [00:01<00:01,  5.00it/s]"


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def nacpipe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command without a terminal; its minutes are over at once."""
    monkeypatch.setattr(show, "MINUTE", 0.0)

    def run(*args: object) -> Result:
        done = CliRunner().invoke(main, [str(arg) for arg in args])
        assert done.exit_code == 0, done.output
        return done

    return run


def counts(done: Result, start: str) -> list[str]:
    """What the lines of progress begin with, without rates."""
    return [line.split("  ")[0] for line in done.stderr.splitlines() if line.startswith(start)]


def test_verify(nacpipe: Callable[..., Result], small_cache: Cache) -> None:
    done = nacpipe("verify", small_cache.path)
    assert counts(done, "verify id/val") == ["verify id/val 16/40", "verify id/val 32/40", "verify id/val 40/40"]
    assert "  total 60/275  " in done.stderr


def test_search(nacpipe: Callable[..., Result], small_cache: Cache, tmp_path: Path) -> None:
    shutil.copytree(small_cache.path, tmp_path / "c.zarr")
    done = nacpipe("search", tmp_path / "c.zarr", "--trials", 3)
    assert counts(done, "search ") == ["search 1/3", "search 2/3", "search 3/3"]
    assert "  best " in done.stderr
    done = nacpipe("search", tmp_path / "c.zarr", "--trials", 5)
    assert counts(done, "search ") == ["search 4/5", "search 5/5"]


def test_an_interrupt_on_a_terminal_leaves_a_clean_line(small_cache: Cache, tmp_path: Path) -> None:
    """The terminal says that it has no columns, as a new one does."""
    shutil.copytree(small_cache.path, tmp_path / "c.zarr")
    ours, theirs = pty.openpty()
    command = [*python_words(), "-m", "nacpipe", "search", "c.zarr", "--space", "paper", "--trials", "1000000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, cwd=tmp_path, env=environment) as process:
        os.close(theirs)
        shown, interrupted = b"", False
        with suppress(OSError):  # EIO: the other end is closed
            while chunk := os.read(ours, 65536):
                shown += chunk
                if b"trial/s, best " in shown and not interrupted:
                    interrupted = True
                    process.send_signal(signal.SIGINT)
    os.close(ours)
    assert process.returncode == 130
    bar, *rest = shown.decode().removesuffix("\r\n").split("\r\n")
    assert re.search(r"\rsearch: +0%\|.*\| \d+/1000000 \[.*trial/s, best \d+\.\d\d %\] *$", bar)
    assert rest == [
        "wrote c.params.json",
        "",
        "nacpipe: interrupted; what was written is safe, go on with:"
        " nacpipe search c.zarr --space paper --trials 1000000",
    ]


def test_score(nacpipe: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from nacpipe.detector import file, network_options, shards
    from nacpipe.detector import predict as score

    def rows(_ready: object, paths: list[Path], *_: Any) -> Iterator[score.ScoredImage]:
        for path in paths:
            yield score.ScoredImage(image=str(path), score=0.5, percentile=40.0, is_ood=False, predicted=1, error=None)

    monkeypatch.setattr(shards, "find_paths", lambda paths: list(paths))
    detector: Any = SimpleNamespace(exported=SimpleNamespace(threshold=0.4, keep=0.95))
    monkeypatch.setattr(file, "read_detector", lambda _: detector.exported)
    monkeypatch.setattr(network_options, "check_network_is_named", lambda *_: None)
    monkeypatch.setattr(score, "prepare", lambda *_: score.Ready(detector, None, None, True))  # type: ignore[arg-type]
    monkeypatch.setattr(score, "score_images", rows)
    done = nacpipe("score", "d.safetensors", "a.png", "b.png")
    assert counts(done, "score ") == ["score 1/2", "score 2/2"]
    assert "0 of 2 images flagged (0.0 %): they score below the threshold 0.4, as at most 5 % do" in done.stderr


def test_extract(nacpipe: Callable[..., Result], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    words = ("extract", "digits", "--cache", tmp_path / "c.zarr", "--device", "cpu", "--batch-size", 256)
    done = nacpipe(*words, "--splits", "id/train,ood/val", "--block-rows", 512)
    assert counts(done, "extract ") == [
        *(f"extract id/train {rows}/1000" for rows in (256, 512, 768, 1000)),
        *(f"extract ood/val {rows}/500" for rows in (256, 500)),
    ]
    assert done.stderr.count("id/train: accuracy 100.00 % of 1000 images\n") == 1
    (tmp_path / "c.zarr/ood/val/blocks/c.0").unlink()
    (tmp_path / "c.zarr/ood/val/logits/c.0.0").unlink()
    nacpipe("repair", tmp_path / "c.zarr")
    done = nacpipe(*words, "--splits", "ood/val")
    assert counts(done, "extract ") == ["extract ood/val 256/500", "extract ood/val 500/500"]


def test_the_plan_says_what_blocks_there_will_be(nacpipe: Callable[..., Result], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    words = ("extract", "digits", "--cache", tmp_path / "c.zarr", "--dry-run", "--splits", "id/val")
    done = nacpipe(*words)
    assert done.stdout.splitlines()[-1] == (
        "blocks of at most 512 rows, about ten seconds of work: a trial batch is timed first"
    )
    assert nacpipe(*words, "--block-rows", 256).stdout.splitlines()[-1] == "blocks of 256 rows"
