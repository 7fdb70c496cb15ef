"""The objective of an Optuna study: a trial's parameters go in, its value comes out, its metrics become attributes.

    objective = nacpipe.Objective("cache/digits-digits_cnn.zarr")
    study = optuna.create_study(direction="maximize", sampler=nacpipe.TermwiseSampler(objective, seed=1))
    study.optimize(objective, n_trials=500)
    params = objective.params(study.best_trial)

Any sampler of Optuna works in its place, and any callbacks. User attributes that a trial gets: `weights` (layer →
share; in closed form unless the space or the sampler says otherwise), `val_auroc`, `val_fpr95`, `subtrain_auroc`, and
`val_correlation` where that is searched for.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.trial import FixedTrial, FrozenTrial, Trial

from nacpipe.cache import Cache, open_cache
from nacpipe.cache.identity import VAL, bound_splits
from nacpipe.errors import InputError, NoValuesError, ParamsError
from nacpipe.method.class_groups import count_groups_for
from nacpipe.method.cross_validation import cluster_folds, cross_validate_each, image_folds
from nacpipe.method.feature_scores import FeatureScoreName
from nacpipe.method.guide import choose_guide, guided_target, score_plainly
from nacpipe.method.metrics import auroc
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.plain_scores import score_in_parts
from nacpipe.method.published import published_params
from nacpipe.method.term import Source, parse_term, view_of
from nacpipe.scoring.fusion import compute_feature_scores, read_feature_score
from nacpipe.scoring.states import check_layers, has_logits
from nacpipe.scoring.term_index import TermIndex
from nacpipe.scoring.trial_scorer import IndexOf, Scorer, TermIndexes, split_rows
from nacpipe.tuning.space import (
    BINS,
    Given,
    Interval,
    LayerSpace,
    Space,
    fits_weights,
    measure_space,
    widen,
    with_weights,
)
from nacpipe.tuning.space_file import read_spec
from nacpipe.tuning.trials import attributes_of, distributions, layers_from, lone_term, suggest, trial_params
from nacpipe.tuning.validation import DIRECTIONS, CrossValidation, Evaluator, ObjectiveName, ValidationMetrics

SUBTRAIN = "id/subtrain"  # on which overfitting shows


class Objective:
    """A callable for `optuna.Study.optimize` that scores NAC's parameters on a cache's validation pair."""

    def __init__(
        self,
        cache: Cache | str | Path,
        *,
        objective: ObjectiveName | None = None,
        space: str | Path = "auto",
        layers: Sequence[str] = (),
        val: str = "ood/val",
        published: bool | None = None,
    ) -> None:
        """Open the cache and measure the space; a term's values are sorted when a trial first needs them.

        Args:
            cache: a finished extraction, or its address.
            objective: what a trial's value is: `auroc`, `fpr95`, `guided`, or `pareto` for AUROC and FPR@95 both; None:
                `guided` in the space `auto`, else `auroc`.
            space: `auto`, `paper`, `wide`, `terms`, `published`, or a TOML file.
            layers: names; none means all that the cache holds.
            val: the split that plays OOD.
            published: include the paper's parameters in the space, where it has some for these layers; None: in the
                space `paper` alone.

        Raises:
            CacheError: the cache is not there or not finished.
            InputError: the arguments make no sense for it.
            ValuesError: a value is not finite, or a term's values are 0 everywhere; `auto` leaves such a term out.
        """
        self.cache = cache if isinstance(cache, Cache) else open_cache(cache)
        self.objective: ObjectiveName = objective or ("guided" if space == "auto" else "auroc")
        spec = read_spec(str(space), self.cache, layers)
        check_layers(self.cache, list(spec))
        self.val = _check_val(self.cache, val)
        self.splits = bound_splits(self.val)
        with_subtrain = SUBTRAIN in self.cache and self.cache.peek(SUBTRAIN).sealed  # nothing is chosen by it
        scored = [*[SUBTRAIN] * with_subtrain, *self.splits[1:]]
        one_by_one = self._one_by_one = space == "auto"  # dozens of terms, most of which are tried one by one
        index = self._indexes = TermIndexes(self.cache, scored, self._index_bytes(scored) if one_by_one else None)
        self.scorer = Scorer(
            index,
            split_rows(self.cache, scored),
            one_by_one=one_by_one,
            feature_scores=functools.cache(self._feature_scores),
        )
        self._scoring = threading.Lock()  # `n_jobs` of Optuna: a trial is scored on all cores, one at a time
        id_rows, ood_rows = (self.cache[name].rows for name in ("id/val", self.val))
        self._is_id = np.repeat([True, False], [id_rows, ood_rows])
        self._plain: dict[str, NDArray[np.float64]] = {}
        if has_logits(self.cache):
            self._plain = score_plainly(self._read_logits(("id/val", self.val)))
        self.guide = choose_guide(self._plain, self._is_id)
        """The best plain score on the validation pair; None where the network gives no logits."""
        target = None
        if self.objective == "guided":
            target = guided_target(self._is_id, None if self.guide is None else self.guide.scores)
        self.evaluator = Evaluator(self.scorer, self.val, target)
        self.train_rows = self.cache["id/train"].rows
        measured = TermIndexes(self.cache, (), 0) if one_by_one else index
        self.space = self._measure_space(spec, measured, skip=one_by_one)
        self.layers = tuple(self.space)
        self.fits = fits_weights(self.space)
        if not self.fits and all(layer.weights()[0] == 0 for layer in self.space.values()):
            raise InputError("every layer's weight may be 0 at once, which is no score; keep one layer's above 0")
        self.published = None
        if space == "paper" if published is None else published:
            self.published = _published(self.cache, self.space)
        self.recorded: Space = widen(self.space, self.published)
        """The space of the study's parameters: `space`, widened to hold the published parameters too."""

    @property
    def directions(self) -> list[Literal["minimize", "maximize"]]:
        """Return what `optuna.create_study` is given: maximize or minimize, of each value."""
        return list(DIRECTIONS[self.objective])

    @functools.cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Return what a trial suggests, by parameter."""
        return distributions(self.recorded)

    def parameters(self, terms: Collection[str]) -> dict[str, BaseDistribution]:
        """Return what a trial of these terms alone suggests, by parameter."""
        if len(terms) == len(self.recorded):
            return self.distributions
        return distributions({name: self.recorded[name] for name in terms})

    def __call__(self, trial: Trial | FixedTrial) -> float | tuple[float, ...]:
        """Score one trial's parameters; see the module for the attributes that it gets."""
        asked = attributes_of(trial)  # by a sampler of ours, or by a trial that is repeated
        terms = [name for name in asked.get("terms", self.recorded) if name in self.recorded]
        layers = layers_from(suggest(trial, self.parameters(terms)), {name: self.recorded[name] for name in terms})
        weights, params = asked.get("weights"), NacParams(layers=layers)
        with self._scoring:
            if weights is not None and set(weights) == set(layers) and any(share > 0 for share in weights.values()):
                params = NacParams(layers={name: replace(p, weight=weights[name]) for name, p in layers.items()})
            elif self.fits:
                params = self.weigh(params)
            metrics = self.measure(params)
        trial.set_user_attr("weights", {name: layer.weight for name, layer in params.layers.items()})
        for name, value in metrics.to_attributes().items():
            trial.set_user_attr(name, value)
        values = metrics.values(self.objective)
        return values[0] if len(values) == 1 else tuple(values)

    def params(self, trial: FrozenTrial) -> NacParams:
        """Return a completed trial's parameters."""
        return trial_params(trial, self.recorded)

    def weigh(self, params: NacParams, fuse: FeatureScoreName | None = None) -> NacParams:
        """Return the parameters with weights in closed form from id/val and the split that plays OOD.

        Args:
            params: of all terms.
            fuse: a feature score that is weighed as one more term.

        Raises:
            ParamsError: the cache holds no last linear layer, which a feature score needs.
            NoValuesError: the feature score is the same for all images of id/val, or not finite.
        """
        fused = None if fuse is None else self.evaluator.standardise_fused(fuse)[0]
        return self.evaluator.weigh(replace(params, fused=fused))

    def measure(self, params: NacParams) -> ValidationMetrics:
        """Return the validation metrics of parameters."""
        return self.evaluator.measure(params)

    def measure_guide(self) -> ValidationMetrics | None:
        """Return the same metrics of the best plain score; None where the network gives no logits."""
        if self.guide is None:
            return None
        return self.evaluator.check(score_in_parts(self.guide.name, self._read_logits(self.scorer.rows)))

    def cross_validate(
        self, trials: Sequence[FrozenTrial], fuse: Sequence[FeatureScoreName | None] = (None,)
    ) -> dict[FeatureScoreName | None, CrossValidation]:
        """Return how the choice among these trials of single terms does on samples that it was not made by.

        Args:
            trials: completed ones.
            fuse: feature scores, each of which is one more term; None for none.

        Returns:
            The same for each of `fuse`; empty where a term was not tried alone.
        """
        terms: dict[str, list[LayerParams]] = {name: [] for name in self.space}
        for trial in trials:
            if (name := lone_term(trial.user_attrs["weights"])) is not None:
                terms[name].append(self.params(trial).layers[name])
        if not all(terms.values()):
            return {}
        pair = [self.scorer.rows[name] for name in ("id/val", self.val)]
        scores = []
        for name, tried in terms.items():
            of_trials = [self.scorer.layer_scores({name: layer})[0] for layer in dict.fromkeys(tried)]
            scores.append(
                np.stack([np.concatenate([one[rows] for rows in pair]).astype(np.float32) for one in of_trials])
            )
        predicted = self._read_logits(("id/val", self.val)).argmax(axis=1)
        folds = {"images": image_folds(self._is_id), "clusters": cluster_folds(self._is_id, predicted)}
        extras: list[NDArray[np.float64] | None] = []
        for method in fuse:
            fused = None if method is None else self.evaluator.standardise_fused(method)[1]
            extras.append(None if fused is None else np.concatenate([fused[rows] for rows in pair]))
        reached = {
            name: cross_validate_each(scores, self._is_id, self._plain, rows, extras) for name, rows in folds.items()
        }
        guide = self._guide_on(folds["images"])
        return {
            method: CrossValidation(
                images=images,
                clusters=images if math.isnan(clusters) else clusters,  # all are predicted as one class
                guide=guide,
            )
            for method, images, clusters in zip(fuse, reached["images"], reached["clusters"], strict=True)
        }

    def _feature_scores(self, method: FeatureScoreName) -> NDArray[np.float64]:
        """A feature score of all splits, (samples,) as `scorer.rows` has them."""
        if self._one_by_one:
            self._indexes.forget()  # all terms are scored by now
        fitted = read_feature_score(self.cache, method)
        return compute_feature_scores(fitted, [self.cache[name] for name in self.scorer.rows])

    def _guide_on(self, folds: Sequence[NDArray[np.intp]]) -> float | None:
        """The guide's mean AUROC over folds."""
        if self.guide is None:
            return None
        sides = [(self.guide.scores[rows], self._is_id[rows]) for rows in folds]
        return float(np.mean([auroc(scores[is_id], scores[~is_id]) for scores, is_id in sides]))

    def _read_logits(self, splits: Iterable[str]) -> NDArray[np.float32]:
        """Those of several splits, one behind the other, (samples, classes)."""
        return np.concatenate([self.cache[name].read("logits") for name in splits])

    def _measure_space(self, spec: Mapping[str, Given], index: IndexOf, *, skip: bool) -> Space:
        """Each term's ranges; one whose values tell nothing is refused, or skipped where others are left."""
        space: dict[str, LayerSpace] = {}
        refused: NoValuesError | None = None

        def values_of(name: str, source: Source) -> TermIndex:  # by class the same values are counted, in groups
            term = parse_term(name)
            return index(replace(term, view="plain").name if term.view == "by_class" else name, source)

        for name, given in spec.items():
            try:
                space[name] = measure_space(name, values_of, self._counted(name), {**self._few_bins(name), **given})
            except NoValuesError as error:
                if not skip:
                    raise
                refused = error
        if refused is not None and not space:
            raise refused
        return space

    def _index_bytes(self, splits: Sequence[str]) -> int:
        """The bytes of indexes to keep: a quarter of what one source of all layers and rows has, at least 64 MiB."""
        rows = sum(self.cache[name].rows for name in ("id/train", *splits))
        neurons = sum(spec.neurons for spec in self.cache.header.layers) + self.cache.header.classes
        return max(64 * 2**20, rows * neurons)

    def _few_bins(self, name: str) -> Given:
        """By class: at most ten bins per image that a group has on average, beyond which nearly all are empty."""
        if view_of(name) != "by_class":
            return {}
        return {"bins": Interval(BINS[0], min(5 * self._counted(name), BINS[1]), whole=True)}

    def _counted(self, name: str) -> int:
        """The samples that a bin can count at most, or nearly so: of id/train, by class twice a group's mean."""
        if view_of(name) != "by_class":
            return self.train_rows
        return 2 * self.train_rows // count_groups_for(self.train_rows, self.cache.header.classes)


def _check_val(cache: Cache, val: str) -> str:
    if val in ("id/train", SUBTRAIN, "id/val"):
        raise InputError(f"val is {val}; name a split that plays OOD, such as ood/val")
    if val not in cache and val != VAL:
        cache.peek(val)  # says what the cache holds
    return val


def _published(cache: Cache, space: Space) -> NacParams | None:
    """The paper's parameters for the layers that it has, the others without weight."""
    identity = cache.header.identity
    try:
        known = published_params(str(identity.get("benchmark")), str(identity.get("family")), tuple(space)).layers
    except ParamsError:
        return None
    layers = {name: known.get(name) or s.params(np.full(len(s.free), 0.5)) for name, s in space.items()}
    return with_weights(layers, np.array([float(name in known) for name in space]))
