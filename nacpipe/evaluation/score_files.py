"""A file of every image's scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd

from nacpipe.cache import Cache
from nacpipe.errors import InputError, MissingExtra
from nacpipe.evaluation.method_scores import ScoredCache
from nacpipe.files import check_writable, writing_whole
from nacpipe.text import escape_bytes


def check_scores_file(path: Path) -> None:
    """Refuse a file that could not be written, before anything is scored.

    Raises:
        InputError: its ending is not .npz or .parquet, or its folder cannot be written to.
        MissingExtra: it is a Parquet file and pyarrow is not there.
    """
    if path.suffix not in (".npz", ".parquet"):
        raise InputError(f"{path}: scores are written as .npz or .parquet")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise MissingExtra(f"{path} needs pyarrow; install it with: pip install pyarrow, or name an .npz") from None
    check_writable(path)


def save_scores(path: Path, caches: Sequence[Cache], runs: Sequence[ScoredCache]) -> None:
    """Write every image's scores, larger = more like the training data, whole or not at all.

    `.npz`: arrays named SPLIT/index (position in the image list), SPLIT/label (−1 for OOD) and SPLIT/METHOD, each
    (rows,); of several caches CACHE/SPLIT/…. `.parquet`: one row per image with columns cache, split, index, label and
    one per method. A method without scores of a split is left out of an `.npz` and null in a `.parquet` file. A split
    that is not finished is in neither.

    Raises:
        InputError: the file cannot be written.
        MissingExtra: a Parquet file needs pyarrow.
    """
    check_scores_file(path)
    with writing_whole(path) as file:
        (_write_npz if path.suffix == ".npz" else _write_parquet)(file, caches, runs)


def _write_npz(file: BinaryIO, caches: Sequence[Cache], runs: Sequence[ScoredCache]) -> None:
    arrays: dict[str, Any] = {}
    for cache, run in zip(caches, runs, strict=True):
        prefix = f"{escape_bytes(run.path)}/" if len(runs) > 1 else ""
        for split in run.finished():
            arrays |= {f"{prefix}{split}/{name}": values for name, values in _columns(cache, run, split).items()}
    np.savez(file, allow_pickle=False, **arrays)


def _write_parquet(file: BinaryIO, caches: Sequence[Cache], runs: Sequence[ScoredCache]) -> None:
    parts = []
    for cache, run in zip(caches, runs, strict=True):
        for split in run.finished():
            columns = pd.DataFrame(_columns(cache, run, split))
            columns.insert(0, "split", split)
            columns.insert(0, "cache", escape_bytes(run.path))
            parts.append(columns.reindex(columns=["cache", "split", "index", "label", *run.methods]))
    pd.concat(parts, ignore_index=True).to_parquet(file, index=False)


def _columns(cache: Cache, run: ScoredCache, split: str) -> dict[str, Any]:
    scores = {name: method.scores[split] for name, method in run.methods.items() if split in method.scores}
    return {"index": cache[split].index, "label": cache[split].label, **scores}
