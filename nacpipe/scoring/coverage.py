"""The one path from cached states to scores (detector/module.py scores a network's own by the same fitted terms).

Two ways to walk it, which give the same integers and so the same scores:

    fit_coverage(cache, params).score(split)      any split, block by block, in bounded memory
    Scorer(…).layer_scores(params.layers)          the search's splits, indexed once, a few milliseconds per trial

The network's output is a layer too, `logits`: every sample's logits are in the cache, and their gradient is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nacpipe.cache import Cache, SplitView, as_cache
from nacpipe.method.coverage import combine_layers
from nacpipe.method.feature_scores import FittedFusion
from nacpipe.method.fitted_term import FittedTerm, fit_term
from nacpipe.method.params import NacParams, term_of
from nacpipe.method.term import Source
from nacpipe.scoring.fusion import read_feature_score
from nacpipe.scoring.states import check_layers, read_layer, read_source
from nacpipe.scoring.views import assign_groups, read_groups


@dataclass(frozen=True, slots=True)
class Coverage:
    """Everything that turns a sample's states into its score."""

    layers: Mapping[str, FittedTerm]
    """By the terms' names in the parameters."""
    fused: FittedFusion | None = None
    """The feature score beside them, if there is one."""

    def score(self, split: SplitView, block: int = 4096) -> NDArray[np.float64]:
        """Return the score of every sample of a split, (rows,), reading `block` rows at a time."""
        scores = np.empty(split.rows)
        for rows in split.row_slices(block):
            scores[rows] = combine_layers(np.stack(self._score_terms(split, rows)), self.weights)
        return scores

    def _score_terms(self, split: SplitView, rows: slice) -> list[NDArray[np.float64]]:
        """Each member's scores of some rows, the fused score's last.

        The source of a layer is read once for views that follow each other.
        """
        needs_logits = self.fused is not None or any(fitted.groups is not None for fitted in self.layers.values())
        logits = split.read("logits", rows) if needs_logits else None
        read: tuple[str, Source] | None = None
        term_scores = []
        for name, fitted in self.layers.items():
            term = term_of(name, fitted.params)
            if read != (term.layer, term.source):
                values, read = read_source(split, term.layer, term.source, rows), (term.layer, term.source)
            term_scores.append(fitted.score(values, logits))
        if self.fused is not None:
            assert logits is not None
            term_scores.append(self.fused.score(split.read("features", rows), logits))
        return term_scores

    @property
    def weights(self) -> NDArray[np.float64]:
        """(terms,), as given; the fused score's last."""
        fused = [] if self.fused is None else [self.fused.params.weight]
        return np.array([*(fitted.params.weight for fitted in self.layers.values()), *fused])


def fit_coverage(cache: Cache, params: NacParams) -> Coverage:
    """Count the training states of every term.

    Raises:
        ParamsError: a layer is not in the cache, a term needs classes that the network does not give, or a fused score
            the last linear layer that the cache does not hold.
        ValuesError: a state is not finite, or a term has no components.
    """
    check_layers(cache, list(params.layers))
    train = cache["id/train"]
    groups = train_groups = None
    if any(term_of(name, layer).view == "by_class" for name, layer in params.layers.items()):
        groups = read_groups(cache)
        train_groups = assign_groups(groups, train)
    read: tuple[str, Source] | None = None
    fitted = {}
    for name, layer in params.layers.items():
        term = term_of(name, layer)
        if read != (term.layer, term.source):
            values, read = read_layer([train], term.layer, term.source), (term.layer, term.source)
        fitted[name] = fit_term(name, layer, values, groups=groups, train_groups=train_groups)
    fused = None
    if params.fused is not None:
        fused = FittedFusion(params=params.fused, feature_score=read_feature_score(cache, params.fused.method))
    return Coverage(fitted, fused)


def score_splits(cache: Cache | str | Path, params: NacParams, splits: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Return split → scores (rows,); larger = more like the training data.

    Args:
        cache: the cache, or its path or URL.
        params: from `tune` or `read_params`.
        splits: names, such as `id/val`.

    Raises:
        ParamsError: a layer is not in the cache.
        InputError: a split is not in the cache.
        CacheError: the cache is not there, or id/train or a split is not finished.
        ValuesError: states are not finite.
    """
    opened = as_cache(cache)
    coverage = fit_coverage(opened, params)
    return {name: coverage.score(opened[name]) for name in splits}
