"""Feature scores of a cache: fitted on id/train, computed of any split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nacpipe.cache import Cache, SplitView
from nacpipe.errors import ParamsError
from nacpipe.method.feature_scores import FeatureScore, FeatureScoreName, fit_feature_score
from nacpipe.scoring.states import piece_rows

FEATURES = 2**20  # that are scored at once


def why_not_fused(cache: Cache) -> str | None:
    """Return why a cache has no feature scores, None where it has."""
    if cache.classifier() is None:
        why = cache.header.information.get("no_classifier")
        return "the cache holds no last linear layer" + (f": {why}" if why else "")
    return None


def read_feature_score(cache: Cache, method: FeatureScoreName) -> FeatureScore:
    """Return a feature score fitted on id/train.

    Raises:
        ParamsError: the cache holds no last linear layer.
    """
    classifier = cache.classifier()
    if classifier is None:
        raise ParamsError(f"a fused {method} cannot be computed of {cache.path}: {why_not_fused(cache)}")
    train = cache["id/train"]
    return fit_feature_score(method, train.read("features"), train.read("logits"), *classifier)


def compute_feature_scores(fitted: FeatureScore, splits: Sequence[SplitView]) -> NDArray[np.float64]:
    """Return the scores of several splits, one behind the other, (samples,)."""
    parts = [np.empty(0)]
    for split in splits:
        for rows in split.row_slices(piece_rows(split.array("features").shape[1])):
            features, logits = split.read("features", rows), split.read("logits", rows)
            count = 1 + features.size // FEATURES  # a score needs several times their float64
            some = zip(np.array_split(features, count), np.array_split(logits, count), strict=True)
            parts += [fitted.score(*part) for part in some]
    return np.concatenate(parts)
