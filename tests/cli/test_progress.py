"""How far a command is: a line that is written over on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nacpipe.cache import Cache
from nacpipe.cli import main
from nacpipe.cli import output as show
from nacpipe.cli.output import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(show.time, "monotonic", lambda: now[0])
    return now


def watch(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> io.StringIO:
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def drain(stream: io.StringIO) -> str:
    text = stream.getvalue()
    stream.seek(0)
    stream.truncate()
    return text


def test_a_terminals_line_moves_with_every_batch(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    stream = watch(monkeypatch, Terminal())
    progress = Progress("extract", {"id/train": 300, "id/val": 100}, {"id/train": 100})
    clock[0] += 2
    progress.step(20, "id/train")
    assert drain(stream) == "\r\x1b[Kextract id/train 120/300  total 120/400  10/s  0:28 left"
    clock[0] += 0.05
    progress.step(20, "id/train")
    assert drain(stream) == ""  # no more than ten times a second
    clock[0] += 1.95
    progress.step(160, "id/train")
    assert drain(stream) == "\r\x1b[Kextract id/train 300/300  total 300/400  50/s  0:02 left"
    progress.note("id/train: accuracy 99 %")
    assert drain(stream) == "\r\x1b[Kid/train: accuracy 99 %\n"
    progress.step(100, "id/val")
    assert drain(stream) == "\r\x1b[Kextract id/val 100/100  total 400/400  75/s  0:00 left\n"


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
    clock[0] += 1
    progress.step(5, "ood/near/a\x1b[2J")
    assert drain(stream) == "\r\x1b[Kverify ood/near/a\\x1b[2J 5/10  5.0/s  0:01 left"


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


def test_score(nacpipe: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from nacpipe.detector import predict as score

    def rows(_ready: object, paths: list[Path], *_: Any) -> Iterator[score.ScoredImage]:
        for path in paths:
            yield score.ScoredImage(image=str(path), score=0.5, is_ood=False, predicted=1, error=None)

    monkeypatch.setattr(score, "find_images", lambda paths: list(paths))
    monkeypatch.setattr(score, "prepare", lambda *_: score.Ready(None, None, None, True))  # type: ignore[arg-type]
    monkeypatch.setattr(score, "score_images", rows)
    done = nacpipe("score", "d.safetensors", "a.png", "b.png")
    assert counts(done, "score ") == ["score 1/2", "score 2/2"]


def test_extract(nacpipe: Callable[..., Result], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    words = ("extract", "digits", "--cache", tmp_path / "c.zarr", "--device", "cpu", "--batch-size", 256)
    done = nacpipe(*words, "--splits", "id/train,ood/val", "--block-rows", 512)
    assert counts(done, "extract ") == [
        *(f"extract id/train {rows}/1000" for rows in (256, 512, 768, 1000)),
        *(f"extract ood/val {rows}/500" for rows in (256, 500)),
    ]
    assert done.stderr.count("id/train: accuracy 100.00 % of 1000 images\n") == 1
    (tmp_path / "c.zarr/ood/val/blocks/c/0").unlink()
    (tmp_path / "c.zarr/ood/val/logits/c/0/0").unlink()
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
