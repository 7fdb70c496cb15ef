"""The source of a network from a Python file: the file, and the modules that it imports from its folder.

net.py ── import blocks ─────────────▶ blocks.py              from import statements anywhere in the text
       ── importlib.import_module ──▶ models/wide.py          from the modules imported while the file ran
       ── import torch ─────────────▶ not from the folder, left out
"""

from __future__ import annotations

import ast
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_PACKAGES = ("site-packages", "dist-packages")
_INSTALLED = [
    *(Path(sysconfig.get_paths()[kind]) for kind in ("stdlib", "platstdlib")),
    Path(__file__).parents[1],
]
_imported_files: dict[Path, set[Path]] = {}
"""File → files of its folder that any of its runs imported: a later run does not import a module again."""


def hash_source(path: Path) -> str:
    """Return the sha256 (hex) over a network's file and the modules that it imports from its folder.

    It does not depend on where the folder is. Files are sorted by their relative paths, which are part of the hash.
    """
    main_file = _absolute(path)
    files = _follow_imports(main_file, _imported_files.get(main_file, set()))
    digest = hashlib.sha256()
    for name, file in sorted((file.relative_to(main_file.parent).as_posix(), file) for file in files):
        digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def record_imports(path: Path, before: frozenset[str]) -> None:
    """Record the modules from a file's folder that are not among the modules `before`."""
    main_file = _absolute(path)
    new = [sys.modules[name] for name in sys.modules.keys() - before]
    files = (_absolute(file) for module in new if (file := getattr(module, "__file__", None)))
    _imported_files.setdefault(main_file, set()).update(file for file in files if _is_inside(file, main_file.parent))


def _follow_imports(main_file: Path, more: set[Path]) -> set[Path]:
    """Return the file, `more`, and all files of its folder that their import statements reach."""
    files: set[Path] = set()
    unread = [main_file, *more]
    while unread:
        file = unread.pop()
        if file not in files:
            files.add(file)
            unread += _imported(file, main_file.parent)
    return files


def _imported(file: Path, folder: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # Python reports it at import
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _resolve(folder, alias.name.split("."), folder)
        elif isinstance(node, ast.ImportFrom):
            base = folder if node.level == 0 else file.parents[node.level - 1]
            package = (node.module or "").split(".") if node.module else []
            for alias in node.names:
                yield from _resolve(base, [*package, alias.name], folder)


def _resolve(base: Path, names: list[str], folder: Path) -> Iterator[Path]:
    """Yield the existing files of a dotted name and of its parent packages."""
    loaded = getattr(sys.modules.get(names[0]), "__file__", None) if base == folder else None
    if loaded is not None and not _is_inside(_absolute(loaded), folder):
        return  # an import finds the loaded module of that name, from another folder
    for depth in range(1, len(names) + 1):
        module_path = base.joinpath(*names[:depth])
        for file in (module_path / "__init__.py", module_path.with_name(f"{module_path.name}.py")):
            if file.is_file() and _is_inside(file, folder):
                yield file
                break


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 (Python does not resolve links either)


def _is_inside(file: Path, folder: Path) -> bool:
    """Return whether a file is in this folder and not in a package installed below it."""
    installed = any(part in _PACKAGES for part in file.parts) or any(file.is_relative_to(root) for root in _INSTALLED)
    return file.is_relative_to(folder) and not installed
