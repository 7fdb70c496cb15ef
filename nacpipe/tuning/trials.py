"""A study's trials and our parameters: what a trial suggests, what it records, what is read back.

params       layer.bins, layer.saturation, layer.alpha; layer.source, layer.edges and layer.weight where searched
value        the objective; two where AUROC and FPR@95 are searched for
user_attrs   weights, val_auroc, val_fpr95, subtrain_auroc (and val_correlation) of the objective; phase and position of
             a sampler of ours; seconds (wall time of all sessions until here) of a search
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import Study
from optuna.trial import FixedTrial, FrozenTrial, Trial, TrialState

from nacpipe.method.params import LayerParams, NacParams
from nacpipe.tuning.space import FIELDS, Choice, Dimension, Interval, LayerSpace, Space
from nacpipe.tuning.validation import ObjectiveName, ValidationMetrics

ALWAYS = ("bins", "alpha", "saturation")


def recorded_fields(layer: LayerSpace) -> dict[str, tuple[Dimension, ...]]:
    """Return the fields of a layer that its trials suggest, with their dimensions; of alpha one per source."""
    fields = {name: layer.dimensions(name) for name in FIELDS if name in ALWAYS or name in layer.free}
    return fields if layer.weight is None or not layer.weight.free else {**fields, "weight": (layer.weight,)}


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Return what Optuna records of a space, by parameter."""
    return {
        f"{name}.{field}": as_distribution(*dimensions)
        for name, layer in space.items()
        for field, dimensions in recorded_fields(layer).items()
    }


def as_distribution(*dimensions: Dimension) -> BaseDistribution:
    """Return the distribution that holds all of these; alpha has one dimension per source."""
    choice = tuple(value for d in dimensions if isinstance(d, Choice) for value in d.values)
    if choice:
        return CategoricalDistribution(tuple(dict.fromkeys(choice)))
    ranges = [d for d in dimensions if isinstance(d, Interval)]
    low, high = min(d.low for d in ranges), max(d.high for d in ranges)
    if ranges[0].whole:
        return IntDistribution(int(low), int(high), log=ranges[0].log)
    return FloatDistribution(low, high, log=ranges[0].log)


def suggest(trial: Trial | FixedTrial, parameters: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """Return a trial's value of every parameter, suggested by the study's sampler."""
    values: dict[str, Any] = {}
    for name, distribution in parameters.items():
        if isinstance(distribution, IntDistribution):
            values[name] = trial.suggest_int(name, distribution.low, distribution.high, log=distribution.log)
        elif isinstance(distribution, FloatDistribution):
            values[name] = trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
        else:
            assert isinstance(distribution, CategoricalDistribution)
            values[name] = trial.suggest_categorical(name, distribution.choices)
    return values


def attributes_of(trial: Trial | FixedTrial) -> dict[str, Any]:
    """Return a running trial's user attributes, those of its sampler too, which the trial itself does not see."""
    if isinstance(trial, FixedTrial):
        return dict(trial.user_attrs)
    _ = trial.relative_params  # Optuna leaves the sampler out where every parameter has one value
    return trial.storage.get_trial_user_attrs(trial._trial_id)


def flatten(params: NacParams, space: Space) -> dict[str, Any]:
    """Return parameters as a trial has them."""
    return {
        f"{name}.{field}": getattr(layer, field)
        for name, layer in params.layers.items()
        for field in recorded_fields(space[name])
    }


def layers_from(values: Mapping[str, Any], space: Space) -> dict[str, LayerParams]:
    """Return layer → parameters of a trial's values: the rest is fixed, alpha in its source's range."""
    layers = {}
    for name, layer in space.items():
        fields = {field: values.get(f"{name}.{field}", layer.dimensions(field)[0].at(0.0)) for field in FIELDS}
        if isinstance(alpha := layer.alpha[fields["source"]], Interval):
            fields["alpha"] = min(max(fields["alpha"], alpha.low), alpha.high)
        if layer.weight is not None:
            fields["weight"] = values.get(f"{name}.weight", layer.weight.at(0.0))
        layers[name] = LayerParams(**fields)
    return layers


def trial_params(trial: FrozenTrial, space: Space) -> NacParams:
    """Return a completed trial's parameters, with the weights that it was scored with."""
    weights = trial.user_attrs["weights"]
    layers = layers_from(trial.params, {name: space[name] for name in weights})
    return NacParams(layers={name: replace(layer, weight=weights[name]) for name, layer in layers.items()})


def trial_metrics(trial: FrozenTrial) -> ValidationMetrics:
    """Return what was measured of a completed trial."""
    measured = trial.user_attrs
    return ValidationMetrics(
        val_auroc=measured["val_auroc"],
        val_fpr95=measured["val_fpr95"],
        subtrain_auroc=measured["subtrain_auroc"],
        val_correlation=measured.get("val_correlation"),
    )


def lone_term(weights: Mapping[str, float]) -> str | None:
    """Return the only term that has a weight above 0; None where several have one."""
    counted = [name for name, weight in weights.items() if weight > 0]
    return counted[0] if len(counted) == 1 else None


def completed_trials(study: Study) -> list[FrozenTrial]:
    """Return the trials of our objective that are complete, in the order of their numbers."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [trial for trial in trials if "val_auroc" in trial.user_attrs]


class NewTrials:
    """Reads a study's completed trials of our objective again and again, each once."""

    def __init__(self) -> None:
        self._start = 0  # all trials before it are finished and were read
        self._read: set[int] = set()

    def __len__(self) -> int:
        return len(self._read)

    def read(self, study: Study) -> list[FrozenTrial]:
        """Return those that completed since the last reading, in the order of their numbers."""
        trials = study.get_trials(deepcopy=False)
        new = [
            trial
            for trial in trials[self._start :]
            if trial.state == TrialState.COMPLETE and trial.number not in self._read and "val_auroc" in trial.user_attrs
        ]
        self._read.update(trial.number for trial in new)
        while self._start < len(trials) and trials[self._start].state.is_finished():
            self._start += 1
        return new


def best_trial(trials: Sequence[FrozenTrial], objective: ObjectiveName) -> FrozenTrial:
    """Return the trial with the largest key, the first among equals; of a Pareto front the one nearest the ideal."""
    if objective == "pareto":
        trials = pareto_front(trials)
        scale = _scale(trials)
        return min(trials, key=lambda trial: (_distance(trial_metrics(trial), *scale), trial.number))
    return max(trials, key=lambda trial: (*trial_metrics(trial).objective_key(objective), -trial.number))


def pareto_front(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that none beats in AUROC and FPR@95 both, by falling AUROC; of equals the first."""
    front: list[FrozenTrial] = []
    for trial in sorted(trials, key=lambda t: (-t.user_attrs["val_auroc"], t.user_attrs["val_fpr95"], t.number)):
        if not front or trial.user_attrs["val_fpr95"] < front[-1].user_attrs["val_fpr95"]:
            front.append(trial)
    return front


def _scale(front: Sequence[FrozenTrial]) -> tuple[ValidationMetrics, float, float]:
    """The ideal point of a front (its best AUROC, its best FPR@95) and the front's extent in both."""
    first, last = trial_metrics(front[0]), trial_metrics(front[-1])
    ideal = ValidationMetrics(val_auroc=first.val_auroc, val_fpr95=last.val_fpr95, subtrain_auroc=None)
    return ideal, (first.val_auroc - last.val_auroc) or 1.0, (first.val_fpr95 - last.val_fpr95) or 1.0


def _distance(metrics: ValidationMetrics, ideal: ValidationMetrics, auroc_extent: float, fpr95_extent: float) -> float:
    away = (ideal.val_auroc - metrics.val_auroc) / auroc_extent, (metrics.val_fpr95 - ideal.val_fpr95) / fpr95_extent
    return away[0] ** 2 + away[1] ** 2
