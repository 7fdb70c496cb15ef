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
    """Refuse caches whose means would mix what does not belong together.

    Raises:
        IdentityError: two differ in more than their weights, or hold the same weights; the message says what differs.
    """
    for first, second in pairwise(caches):
        a, b = _common(first), _common(second)
        if differences := diff(comparable_fields(b, a), comparable_fields(a, b)):
            raise IdentityError(
                f"{first.path} (stored) and {second.path} (now) differ in more than their weights: "
                + "; ".join(differences)
            )
    seen: dict[str, str] = {}
    for cache in caches:
        weights = str(cache.header.identity.get("weights"))
        if weights in seen:
            raise IdentityError(f"{seen[weights]} and {cache.path} hold the same weights: they are one run, not two")
        seen[weights] = cache.path


def _common(cache: Cache) -> dict[str, Any]:
    """What runs have in common: the identity without the weights, and the images of every split in a table.

    Weights differ, so it does not matter that one run's values are of a GPU and another's of a CPU.
    """
    layers = tuple(spec.name for spec in cache.header.layers)
    splits = ("id/train", "id/val", *table_splits(cache))
    return {k: v for k, v in cache.search_identity(splits, layers).items() if k not in ("weights", "arithmetic")}
