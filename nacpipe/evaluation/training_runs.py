"""Several training runs of one network: the same in everything but the weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from nacpipe.cache import Cache
from nacpipe.cache.identity import comparable_fields, diff
from nacpipe.errors import IdentityError
from nacpipe.evaluation.method_scores import table_splits


def check_runs(caches: Sequence[Cache]) -> None:
    """Refuse caches that are not training runs of one network on one benchmark.

    Raises:
        IdentityError: two differ in more than their weights, or hold the same weights; the message says what differs.
    """
    for first, second in pairwise(caches):
        a, b = _common(first), _common(second)
        if differences := diff(comparable_fields(b, a), comparable_fields(a, b), ("first", "second")):
            raise IdentityError(
                f"{first.path} and {second.path} differ in more than their weights: {'; '.join(differences)}; they are"
                " no training runs of one network: evaluate each alone"
            )
    path_by_weights: dict[str, str] = {}
    for cache in caches:
        weights = str(cache.header.identity.get("weights"))
        if weights in path_by_weights:
            raise IdentityError(
                f"{path_by_weights[weights]} and {cache.path} hold the same weights: they are one run, not two"
            )
        path_by_weights[weights] = cache.path


def _common(cache: Cache) -> dict[str, Any]:
    """Return what runs must share: the identity without weights and arithmetic, and the images of a table's splits.

    Runs differ in their weights, so one may have been extracted on a GPU and another on a CPU.
    """
    layers = tuple(spec.name for spec in cache.header.layers)
    splits = ("id/train", "id/val", *table_splits(cache))
    return {k: v for k, v in cache.search_identity(splits, layers).items() if k not in ("weights", "arithmetic")}
