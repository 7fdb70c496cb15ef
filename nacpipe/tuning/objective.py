"""The objective of an Optuna study: a trial's parameters go in, its value comes out, its metrics become attributes.

    objective = nacpipe.Objective("cache/digits-digits_cnn.zarr")
    study = optuna.create_study(direction="maximize", sampler=nacpipe.LayerwiseSampler(objective, seed=1))
    study.optimize(objective, n_trials=500)
    params = objective.params(study.best_trial)

Any sampler of Optuna works in its place, and any callbacks. User attributes that a trial gets: `weights` (layer →
share; in closed form unless the space or the sampler says otherwise), `val_auroc`, `val_fpr95`, `subtrain_auroc`, and
`val_correlation` where that is searched for.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.trial import FixedTrial, FrozenTrial, Trial

from nacpipe.cache import Cache, open_cache
from nacpipe.cache.identity import VAL, bound_splits
from nacpipe.errors import InputError, ParamsError
from nacpipe.method.params import NacParams
from nacpipe.method.plain_scores import energy
from nacpipe.method.published import published_params
from nacpipe.scoring.states import check_layers, has_logits, outputs_of
from nacpipe.scoring.trial_scorer import Scorer, index_from, split_rows
from nacpipe.tuning.space import Space, fits_weights, measure_space, widen, with_weights
from nacpipe.tuning.space_file import read_spec
from nacpipe.tuning.trials import attributes_of, distributions, layers_from, suggest, trial_params
from nacpipe.tuning.validation import DIRECTIONS, Evaluator, ObjectiveName, ValidationMetrics

SUBTRAIN = "id/subtrain"  # on which overfitting shows


class Objective:
    """A callable for `optuna.Study.optimize` that scores NAC's parameters on a cache's validation pair."""

    def __init__(
        self,
        cache: Cache | str | Path,
        *,
        objective: ObjectiveName = "auroc",
        space: str | Path = "auto",
        layers: Sequence[str] = (),
        val: str = "ood/val",
        published: bool | None = None,
    ) -> None:
        """Open the cache and measure the space; columns are sorted when a trial first needs them.

        Args:
            cache: a finished extraction, or its address.
            objective: what a trial's value is: `auroc`, `fpr95`, `guided`, or `pareto` for AUROC and FPR@95 both.
            space: `auto`, `wide`, `terms`, `published`, or a TOML file.
            layers: names; none means all that the cache holds.
            val: the split that plays OOD.
            published: include the paper's parameters in the space, where it has some for these layers; None: in the
                space `auto` alone.

        Raises:
            CacheError: the cache is not there or not finished.
            InputError: the arguments make no sense for it.
            ValuesError: a layer's states are 0 everywhere.
        """
        self.cache = cache if isinstance(cache, Cache) else open_cache(cache)
        self.objective: ObjectiveName = objective
        spec = read_spec(str(space), self.cache, layers)
        check_layers(self.cache, list(spec))
        self.layers = tuple(spec)
        self.val = _check_val(self.cache, val)
        self.splits = bound_splits(self.val)
        with_subtrain = SUBTRAIN in self.cache and self.cache.peek(SUBTRAIN).sealed  # nothing is chosen by it
        scored = [*[SUBTRAIN] * with_subtrain, *self.splits[1:]]
        self.scorer = Scorer(functools.cache(index_from(self.cache, scored)), split_rows(self.cache, scored))
        guide = None
        if objective == "guided":
            if not has_logits(self.cache):
                raise InputError(
                    f"{self.cache.path} holds {outputs_of(self.cache)}, not logits: without Energy, search for auroc"
                )
            guide = self._energy()
        self.evaluator = Evaluator(self.scorer, self.val, guide)
        self._scoring = threading.Lock()  # `n_jobs` of Optuna: a trial is scored on all cores, one at a time
        self.train_rows = self.cache["id/train"].rows
        self.space: Space = {
            name: measure_space(name, self.scorer.index, self.train_rows, given) for name, given in spec.items()
        }
        self.fits = fits_weights(self.space)
        if not self.fits and all(layer.weights()[0] == 0 for layer in self.space.values()):
            raise InputError("every layer's weight may be 0 at once, which is no score; keep one layer's above 0")
        self.published = None
        if space == "auto" if published is None else published:
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

    def __call__(self, trial: Trial | FixedTrial) -> float | tuple[float, ...]:
        """Score one trial's parameters; see the module for the attributes that it gets."""
        layers = layers_from(suggest(trial, self.distributions), self.recorded)
        weights = attributes_of(trial).get("weights")  # of a sampler that tries these, or of a trial that is repeated
        params = NacParams(layers=layers)
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

    def weigh(self, params: NacParams) -> NacParams:
        """Return the parameters with weights in closed form from id/val and the split that plays OOD."""
        return self.evaluator.weigh(params)

    def measure(self, params: NacParams) -> ValidationMetrics:
        """Return the validation metrics of parameters."""
        return self.evaluator.measure(params)

    def measure_energy(self) -> ValidationMetrics | None:
        """Return the same metrics of Energy; None where the network gives no logits."""
        return self.evaluator.check(self._energy()) if has_logits(self.cache) else None

    def _energy(self) -> NDArray[np.float64]:
        return np.concatenate([energy(self.cache[name].read("logits")) for name in self.scorer.rows])


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
