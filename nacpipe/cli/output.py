"""Results on stdout: tables, JSON, CSV; progress and notes on stderr."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nacpipe.cli.streams import Terminal
from nacpipe.files import is_url
from nacpipe.text import escape, escape_bytes

if TYPE_CHECKING:
    import pandas as pd

REDRAW, MINUTE = 0.1, 60.0  # seconds between two lines of progress, on a terminal and elsewhere


class Address(click.Path):
    """A cache: a folder as a Path, or a URL as text, of which a Path would lose a slash."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the Path, or the URL."""
        return value if is_url(value) else super().convert(value, param, ctx)


def split_names(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Turn `a,b` into ("a", "b")."""
    return tuple(name.strip() for name in value.split(",") if name.strip()) if value else ()


def split_layers(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Turn `a,b` or `a b`, as OpenOOD's scripts have layers, into ("a", "b")."""
    return tuple(re.split(r"[,\s]+", value.strip(", \t\n"))) if value and value.strip(", \t\n") else ()


def note(text: str) -> None:
    """Print a line to stderr."""
    click.echo(printable(text), err=True)


def print_line(text: str) -> None:
    """Print a line of the result; control characters and line ends of foreign names are printed as escapes."""
    click.echo(printable(text).replace("\n", "\\x0a"))


def print_json(value: Any) -> None:
    """Print JSON to stdout, in ASCII."""
    click.echo(json.dumps(_to_json(value), indent=2, allow_nan=False))


def print_csv(text: str) -> None:
    """Print CSV to stdout, in UTF-8 whatever the terminal's encoding: it is read by programs."""
    text = escape_bytes(text)
    if isinstance(sys.stdout, Terminal):
        sys.stdout.write_bytes(text.encode())
    else:
        click.echo(text, nl=False)


def _to_json(value: Any) -> Any:
    """A value that JSON can hold: NaN and infinity are null, bytes of a file name that are no UTF-8 are escapes."""
    if isinstance(value, dict):
        return {escape_bytes(key): _to_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(entry) for entry in value]
    if isinstance(value, str):
        return escape_bytes(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(text: str) -> str:
    """Return text with control characters, which a foreign name may hold, as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else escape(c) for c in text)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print aligned columns; the first `left` are aligned to the left, a row of no cells is a blank line."""
    columns, rows = _fit(columns), [_fit(row) for row in rows]
    widths = [max(len(row[i]) for row in [columns, *rows] if row) for i in range(len(columns))]
    for row in [columns, *rows]:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=False))]
        print_line("  ".join(cells).rstrip())


def _fit(cells: Sequence[str]) -> list[str]:
    """Cells as the terminal can show them, so that columns stay aligned."""
    return [sys.stdout.fit(cell) for cell in cells] if isinstance(sys.stdout, Terminal) else [*cells]


def print_frame(frame: pd.DataFrame, output: str) -> None:
    """Print a frame as json (a list of rows), csv or markdown; a missing value is null or an empty cell."""
    if output == "json":
        print_json(frame.astype(object).where(frame.notna(), None).to_dict("records"))
    elif output == "csv":
        print_csv(frame.to_csv(index=False))
    else:
        shown = frame.astype(object).where(frame.notna(), "")
        cells = [[_cell(value) for value in row] for row in shown.itertuples(index=False)]
        click.echo("| " + " | ".join(frame.columns) + " |")
        click.echo("|" + "|".join(" --- " for _ in frame.columns) + "|")
        for row in cells:
            print_line("| " + " | ".join(row) + " |")


def params_option(command: Any) -> Any:
    """Add --params to a command of several caches, as `choices`."""
    text = "A file, or published; default: X.params.json beside X.zarr. Once for all caches, or once for each."
    return click.option("--params", "choices", metavar="FILE", multiple=True, help=text)(command)


def output_options(command: Any) -> Any:
    """Add --json, --csv and --markdown to a command as `output`."""
    for name in ("markdown", "csv", "json"):
        command = click.option(f"--{name}", "output", flag_value=name, help=f"Print {name.upper()}.")(command)
    return command


def percent(value: float | None, digits: int = 2) -> str:
    """Return a fraction in percent: 0.12345 → 12.35; None and NaN → –."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"


def format_bytes(count: int) -> str:
    """Return a number of bytes as text: 12345678 → 11.8 MiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class Progress:
    """Progress on stderr: on a terminal tqdm's bar, elsewhere a line a minute. A context manager, which ends the bar.

    extract id/train 512/1000:   5%|▃         | 512/9345 [00:14<04:12, 35.02it/s]
    extract id/train 512/1000  total 512/9345  35/s  4:12 left
    """

    def __init__(
        self, verb: str, totals: Mapping[str, int], done: Mapping[str, int] | None = None, unit: str = "it"
    ) -> None:
        """Count up to these totals.

        Args:
            verb: the first word of the line.
            totals: part → how much there is to do of it; a single part may have an empty name. Empty: nothing is shown.
            done: part → how much of it was done before.
            unit: what the bar counts; B (bytes) is shown as k, M, G.
        """
        self._verb, self._totals, self._done = verb, dict(totals), dict.fromkeys(totals, 0) | dict(done or {})
        self._total, self._done_before = sum(totals.values()), self.done
        self._started = self._shown = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm  # 0.1 s

            self._bar = tqdm(
                desc=verb,
                total=self._total,
                initial=self.done,
                disable=self.done >= self._total,
                file=sys.stderr,
                mininterval=REDRAW,
                miniters=1,  # a step that is slower than those before is shown too
                smoothing=0,  # the mean rate, as without a terminal
                **_size(),
                ascii=" ▁▂▃▄▅▆▇█",  # characters that `streams` can replace
                unit=unit,
                unit_scale=unit == "B",
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def done(self) -> int:
        """How much of all parts together is done."""
        return sum(self._done.values())

    def step(self, count: int, part: str = "", more: str = "") -> None:
        """Add to a part, and show it: on a terminal at most ten times a second, elsewhere once a minute."""
        if not self._totals:
            return
        self._done[part] += count
        several = len(self._totals) > 1
        name = f"{self._verb} {part}".rstrip()
        counted = f"{name} {self._done[part]}/{self._totals[part]}"
        if self._bar is not None:
            self._bar.set_description_str(printable(counted if several else name), refresh=False)
            self._bar.set_postfix_str(more, refresh=False)
            self._bar.update(count)
            if self.done >= self._total:
                self._bar.close()
            return
        now = time.monotonic()
        if now - self._shown < MINUTE:
            return
        self._shown = now
        rate = (self.done - self._done_before) / max(now - self._started, 1e-9)
        seconds_left = max(self._total - self.done, 0) / max(rate, 1e-9)
        words = [counted, *[f"total {self.done}/{self._total}"] * several, *[more] * bool(more)]
        note("  ".join([*words, f"{rate:.{0 if rate >= 10 else 1}f}/s", f"{_clock(seconds_left)} left"]))

    def note(self, text: str) -> None:
        """Print a line to stderr above the progress."""
        with nullcontext() if self._bar is None else self._bar.external_write_mode(sys.stderr):
            note(text)


def _size() -> dict[str, Any]:
    """The size for tqdm, which shows nothing on a terminal of 0 columns, as a new one in a container can be."""
    with suppress(OSError, ValueError):  # no file: tqdm has a width of its own
        if 0 in os.get_terminal_size(sys.stderr.fileno()):
            return {"ncols": 79, "nrows": 24}
    return {"dynamic_ncols": True}


def _clock(seconds: float) -> str:
    """125.0 → 2:05; an hour and more with hours."""
    minutes, whole_seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{whole_seconds:02d}" if hours else f"{minutes}:{whole_seconds:02d}"
