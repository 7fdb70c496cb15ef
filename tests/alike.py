"""Two caches that must hold the same, wherever they are, and how one is made from the other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nacpipe.cache import Cache, CacheWriter, SplitView, open_cache


def assert_alike(one: Cache, other: Cache) -> None:
    """Of every split that the other holds, every value and the seal (its digest covers metadata and checksums)."""
    assert one.header.whole_identity() == other.header.whole_identity()
    for name in other:
        here, there = one[name], other[name]
        assert here.attributes == there.attributes
        for path in other.header.arrays():
            np.testing.assert_array_equal(here.read(path), there.read(path), err_msg=f"{name}/{path}")
    for ours, theirs in zip(one.classifier() or (), other.classifier() or (), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def key_in(version: int, key: str) -> str:
    """Return a key of version 2 as it is in a version: in 1, id/val/layer1/gradient/c/7/0 for …/c.7.0 below layers/."""
    if version == 2:
        return key
    folder, _, name = key.replace("/layers/", "/").rpartition("/")
    return f"{folder}/{name.replace('.', '/') if name.startswith('c.') else name}"


def prepare_split(writer: CacheWriter, split: SplitView, name: str = "") -> NDArray[np.bool_]:
    """Prepare a split, or another of that name, as extraction does: with its labels and places; return the marks."""
    return writer.prepare(name or split.name, split.rows, split.images, label=split.label, index=split.index)


def write_rows(writer: CacheWriter, split: SplitView, block: int, name: str) -> None:
    rows = slice(16 * block, 16 * block + 16)
    writer.write_block(name, block, {path: split.read(path)[rows] for path in writer.header.arrays()})


def copy_splits(here: Cache, address: str, *names: str) -> Cache:
    """Write splits of a cache, and its classifier, to another place."""
    writer = CacheWriter(address, here.header)
    weights = here.classifier()
    assert weights is not None
    writer.write_classifier(*weights)
    for name in names:
        marks = prepare_split(writer, here[name])
        for block in np.flatnonzero(~marks):
            write_rows(writer, here[name], int(block), name)
        writer.seal(name)
    return open_cache(address)
