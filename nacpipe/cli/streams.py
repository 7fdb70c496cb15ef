"""stdout and stderr as a command finds them: closed, without a reader, or of an encoding that lacks characters."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from nacpipe.text import escape

# What is drawn and typeset, in ASCII; a picture is written in one piece, so that it is of one kind throughout.
_PLAIN = str.maketrans(
    dict(zip("▁▂▃▄▅▆▇█─━│┤└●·−–×→", "..::||##-=||+o.--x>", strict=True))
    | {"…": "...", "±": "+-", "≥": ">=", "≤": "<=", "∞": "inf", "½": "1/2"}
)


class Terminal:
    """A standard stream that takes any text: characters that its encoding lacks are replaced.

    What cannot be written to stderr is dropped, and so is everything where the stream is closed: the command goes on.
    """

    encoding, errors = "utf-8", "strict"  # of what it takes; click writes around a stream of ASCII

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
        """Hand on what was written."""
        if self._stream is not None:
            with suppress(*self._dropped):
                self._stream.flush()

    def isatty(self) -> bool:
        """Return whether a person looks at it."""
        with suppress(AttributeError, ValueError):
            return bool(self._stream.isatty())
        return False

    def write_bytes(self, content: bytes) -> None:
        """Write bytes as they are, whatever the encoding; to a stream without bytes, as the text that they are."""
        buffer = getattr(self._stream, "buffer", None)
        if buffer is None:
            self.write(content.decode())
            return
        self.flush()
        buffer.write(content)
        buffer.flush()

    def drain(self) -> None:
        """Leave nothing that Python would fail to write when it exits, with an exit code of its own."""
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
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    ours = {
        name: Terminal(stream, drops=name == "stderr")
        for name, stream in before.items()
        if not isinstance(stream, Terminal)  # a command in another thread
    }
    for name, terminal in ours.items():
        setattr(sys, name, terminal)
    try:
        yield
    finally:
        for name, terminal in ours.items():
            if exits:
                terminal.drain()
            if getattr(sys, name) is terminal:  # click leaves one of its own where a pipe is broken
                setattr(sys, name, before[name])


def _open_closed_files() -> None:
    """Open the null device in place of a closed standard file.

    The next file that is opened would get its number, and what libraries and child processes print would go there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number: this one
