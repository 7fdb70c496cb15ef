"""stdout and stderr that take any text, also where they are closed, have no reader, or lack characters."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from nacpipe.text import escape

# Plots and typography in ASCII; a plot is written in one piece, so that it is either all blocks or all ASCII.
_PLAIN = str.maketrans(
    dict(zip("▁▂▃▄▅▆▇█─━│┤└●·−–×→", "..::||##-=||+o.--x>", strict=True))
    | {"…": "...", "±": "+-", "≥": ">=", "≤": "<=", "∞": "inf", "½": "1/2"}
)


# Terminals of a process that is ending. `print` in another thread holds no reference to the sys.stdout it writes to
# (CPython until 3.13): freed under it, the process would end with a segmentation fault in place of its exit code.
_KEPT: list[Terminal] = []


class Terminal:
    """A standard stream that takes any text: characters that its encoding lacks are replaced.

    Text that stderr does not take is dropped, and so is all text where the stream is closed: the command goes on.
    """

    encoding, errors = "utf-8", "strict"  # what write() takes; click would not use a stream of ASCII

    def __init__(self, stream: Any, *, drops: bool) -> None:
        """Write to a stream, which may be None or closed."""
        self._stream: Any = None if getattr(stream, "closed", False) else stream
        self._drops = drops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def fit(self, text: str) -> str:
        """Return text as it will be written."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        for fitting in (text, plain := text.translate(_PLAIN)):
            if _can_encode(fitting, encoding):
                return fitting
        return "".join(c if _can_encode(c, encoding) else escape(c) for c in plain)

    def write(self, text: str) -> int:
        """Write text."""
        fitting = self.fit(text)
        if self._stream is not None:
            with suppress(*self._dropped):
                self._stream.write(fitting)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        if self._stream is not None:
            with suppress(*self._dropped):
                self._stream.flush()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        with suppress(AttributeError, ValueError):
            return bool(self._stream.isatty())
        return False

    def write_bytes(self, content: bytes) -> None:
        """Write bytes whatever the stream's encoding; to a stream that takes text alone, decode them as UTF-8."""
        buffer = getattr(self._stream, "buffer", None)
        if buffer is None:
            self.write(content.decode())
            return
        self.flush()
        buffer.write(content)
        buffer.flush()

    def drain(self) -> None:
        """Flush, or discard what cannot be written: Python would fail on it at exit, with an exit code of its own."""
        try:
            self._stream.flush()
        except (AttributeError, ValueError):  # closed
            pass
        except OSError:
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
                self._stream.flush()

    @property
    def _dropped(self) -> tuple[type[Exception], ...]:
        return (OSError, ValueError) if self._drops else ()  # ValueError: it was closed meanwhile


def _can_encode(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def standard_streams(exits: bool) -> Iterator[None]:
    """Let a command write to stdout and stderr whatever they are; `exits`: Python exits after it."""
    _open_closed_files()
    previous = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    terminals = {
        name: Terminal(stream, drops=name == "stderr")
        for name, stream in previous.items()
        if not isinstance(stream, Terminal)  # a command in another thread
    }
    for name, terminal in terminals.items():
        setattr(sys, name, terminal)
    try:
        yield
    finally:
        for name, terminal in terminals.items():
            if exits:
                terminal.drain()
                _KEPT.append(terminal)
            if getattr(sys, name) is terminal:  # click sets a stream of its own where a pipe is broken
                setattr(sys, name, previous[name])


def _open_closed_files() -> None:
    """Open the null device in place of a closed standard file.

    The next file that is opened would get its number, and what libraries and child processes print would go there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number: this one
