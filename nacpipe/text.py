"""Text for output: commands to paste, escapes for bytes that are not UTF-8, reserved names of sets."""

from __future__ import annotations

import html
import shlex
from collections.abc import Iterable, Sequence


def command_line(*words: object) -> str:
    """Return a nacpipe command, quoted for the shell: `nacpipe repair 'my caches/c.zarr'`."""
    return shlex.join(["nacpipe", *map(str, words)])


def spell_option(name: str, value: object = None, *, python: bool) -> str:
    """Return how an option is given: `--batch-size 8`, or from Python `batch_size=8`; without a value its name."""
    if not python:
        return f"--{name}" if value is None else f"--{name} {shlex.quote(str(value))}"
    name = name.replace("-", "_")
    return f"{name}=" if value is None else f"{name}={value!r}"


def escape(character: str) -> str:
    """Return an escape for a character; for a byte of a file name that is not UTF-8, that byte: `\\xe9`."""
    code = ord(character)
    return f"\\x{code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code:02x}"


def escape_bytes(text: str) -> str:
    """Return text with escapes for bytes that are not UTF-8: file names may contain them, file formats cannot."""
    return "".join(escape(c) if "\ud800" <= c <= "\udfff" else c for c in text)


MISSING_NAMES = frozenset(  # pandas reads these as missing values in a table
    {
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A"),
        *("NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    }
)


def why_reserved(name: str) -> str | None:
    """Return why no set of images may have this name, or None if one may."""
    if name == "mean":
        return "tables name the mean over a group's sets so"
    return "pandas reads it as a missing value in a table" if name in MISSING_NAMES else None


def label_set(split: str) -> str:
    """Return how tables name a set: the last part of its split's name; all of it where that part is reserved."""
    name = split.rpartition("/")[2]
    return split if why_reserved(name) else name


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as HTML, with every text escaped."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', header)}</thead><tbody>{body}</tbody></table>"
