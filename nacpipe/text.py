"""Text for people and files: commands that can be pasted, and names that are no text."""

from __future__ import annotations

import shlex


def command_line(*words: object) -> str:
    """Return a nacpipe command, quoted for the shell: `nacpipe repair 'my caches/c.zarr'`."""
    return shlex.join(["nacpipe", *map(str, words)])


def escape(character: str) -> str:
    """Return an escape for a character; for a byte of a file name that is no UTF-8, that byte: `\\xe9`."""
    code = ord(character)
    return f"\\x{code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code:02x}"


def escape_bytes(text: str) -> str:
    """Return text whose bytes that are no UTF-8 are escapes: a file name may hold some, and no file format can."""
    return "".join(escape(c) if "\ud800" <= c <= "\udfff" else c for c in text)
