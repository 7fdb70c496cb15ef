"""Two caches that must hold the same, wherever they are."""

from __future__ import annotations

import numpy as np

from nacpipe.cache import Cache


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
