"""What a network from a Python file is made of: the file, and the modules that it imports from its own folder.

net.py ── import blocks ─────────────▶ blocks.py              read from the text, wherever the statement stands
       ── importlib.import_module ──▶ models/wide.py          seen to be imported while the file ran
       ── import torch ─────────────▶ not from its folder
"""

from __future__ import annotations

import ast
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import nacpipe

_PACKAGES = ("site-packages", "dist-packages")
_INSTALLED = [
    *(Path(sysconfig.get_paths()[kind]) for kind in ("stdlib", "platstdlib")),
    Path(nacpipe.__file__).parent,
]
_seen: dict[Path, set[Path]] = {}
"""File → files of its folder that were imported while it ran, ever: a module is imported once, a file may run again."""


def hash_source(path: Path) -> str:
    """Return the sha256 (hex) over a network's file and the modules that it imports from its folder.

    It is the same wherever the folder is. Order is that of the relative paths, which are part of it.
    """
    start = _absolute(path)
    files = _follow_imports(start, _seen.get(start, set()))
    digest = hashlib.sha256()
    for name, file in sorted((file.relative_to(start.parent).as_posix(), file) for file in files):
        digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def note_imports(path: Path, before: frozenset[str]) -> None:
    """Remember what was imported from a file's folder since these modules were the only ones."""
    start = _absolute(path)
    new = [sys.modules[name] for name in sys.modules.keys() - before]
    files = (_absolute(file) for module in new if (file := getattr(module, "__file__", None)))
    _seen.setdefault(start, set()).update(file for file in files if _is_inside(file, start.parent))


def _follow_imports(start: Path, more: set[Path]) -> set[Path]:
    """The file and more of its folder, and all that import statements reach from them within it."""
    found: set[Path] = set()
    waiting = [start, *more]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _imported(file, start.parent)
    return found


def _imported(file: Path, folder: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # Python will say so where it is imported
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _resolve(folder, alias.name.split("."), folder)
        elif isinstance(node, ast.ImportFrom):
            base = folder if node.level == 0 else file.parents[node.level - 1]
            above = (node.module or "").split(".") if node.module else []
            for alias in node.names:
                yield from _resolve(base, [*above, alias.name], folder)


def _resolve(base: Path, names: list[str], folder: Path) -> Iterator[Path]:
    """The files of a dotted name and of the packages above it, as far as there are some."""
    loaded = getattr(sys.modules.get(names[0]), "__file__", None) if base == folder else None
    if loaded is not None and not _is_inside(_absolute(loaded), folder):
        return  # a module of that name from elsewhere is the one that is imported
    for depth in range(1, len(names) + 1):
        place = base.joinpath(*names[:depth])
        for file in (place / "__init__.py", place.with_name(f"{place.name}.py")):
            if file.is_file() and _is_inside(file, folder):
                yield file
                break


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 (links stay as they are: Python does not follow them either)


def _is_inside(file: Path, folder: Path) -> bool:
    """Return whether a file is of this folder, and not of a package that is installed below it."""
    installed = any(part in _PACKAGES for part in file.parts) or any(file.is_relative_to(root) for root in _INSTALLED)
    return file.is_relative_to(folder) and not installed
