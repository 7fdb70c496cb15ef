"""Optuna's trials and ours: what is recorded of a combination, and what is read back.

params       layer.bins, layer.saturation, layer.alpha, layer.weight; layer.source and layer.edges where searched
value        the objective; two where both are searched for
user_attrs   number, phase, val_auroc, val_fpr95, subtrain_auroc, seconds (of all sessions until here); and
             val_correlation where that is searched for
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial

from nacpipe.method.params import LayerParams, NacParams
from nacpipe.tuning.objective import Candidate, Objective, TrialResult, ValidationMetrics
from nacpipe.tuning.space import FIELDS, Choice, Dimension, Interval, LayerSpace, Space

ALWAYS = ("bins", "alpha", "saturation")


def recorded_fields(layer: LayerSpace) -> list[str]:
    """Return the fields of a layer that its trials hold."""
    return [field for field in FIELDS if field in ALWAYS or field in layer.free] + ["weight"]


def distributions(space: Space, published: NacParams | None = None) -> dict[str, BaseDistribution]:
    """Return what Optuna records: the space, widened to hold the published parameters too."""
    found: dict[str, BaseDistribution] = {}
    for name, layer in space.items():
        layer = layer.including(published.layers[name]) if published else layer
        for field in recorded_fields(layer):
            if field == "weight":  # whatever the space says: a layer that is looked at alone has all of it
                found[f"{name}.weight"] = FloatDistribution(0.0, max(1.0, layer.weights()[1]))
            else:
                found[f"{name}.{field}"] = as_distribution(*layer.dimensions(field))
    return found


def as_distribution(*dimensions: Dimension) -> BaseDistribution:
    """Return the distribution that holds all of these; alpha has one dimension per state source."""
    choice = tuple(value for d in dimensions if isinstance(d, Choice) for value in d.values)
    if choice:
        return CategoricalDistribution(tuple(dict.fromkeys(choice)))
    ranges = [d for d in dimensions if isinstance(d, Interval)]
    low, high = min(d.low for d in ranges), max(d.high for d in ranges)
    if ranges[0].whole:
        return IntDistribution(int(low), int(high), log=ranges[0].log)
    return FloatDistribution(low, high, log=ranges[0].log)


def flatten(params: NacParams, space: Space) -> dict[str, Any]:
    """Return parameters as a trial has them."""
    return {
        f"{name}.{field}": getattr(layer, field)
        for name, layer in params.layers.items()
        for field in recorded_fields(space[name])
    }


def to_trial(
    proposal: Candidate,
    outcome: TrialResult,
    begun: datetime.datetime,
    *,
    seconds: float,
    objective: Objective,
    space: Space,
    record: dict[str, BaseDistribution],
) -> FrozenTrial:
    """Return a complete trial, to be added in one append."""
    checks = outcome.checks
    trial = optuna.trial.create_trial(
        values=checks.values(objective),
        params=flatten(outcome.params, space),
        distributions=record,
        user_attrs={
            "number": proposal.number,
            "phase": proposal.phase,
            "val_auroc": checks.val_auroc,
            "val_fpr95": checks.val_fpr95,
            "subtrain_auroc": checks.subtrain_auroc,
            "seconds": seconds,
            **({} if checks.val_correlation is None else {"val_correlation": checks.val_correlation}),
        },
    )
    trial.datetime_start, trial.datetime_complete = begun, datetime.datetime.now()
    return trial


def number_of(trial: FrozenTrial) -> int:
    """Return a trial's place in our order; workers complete them in another than Optuna's."""
    return int(trial.user_attrs["number"])


def trial_params(trial: FrozenTrial, space: Space) -> NacParams:
    """Return a trial's parameters as a record; what it does not hold, the space fixes."""
    layers = {}
    for name, layer in space.items():
        fixed = {"source": layer.source.values[0], "edges": layer.edges.values[0]}
        held = {field: trial.params[f"{name}.{field}"] for field in recorded_fields(layer)}
        layers[name] = LayerParams(**{**fixed, **held})
    return NacParams(layers=layers)


def trial_checks(trial: FrozenTrial) -> ValidationMetrics:
    """Return what was measured of a trial."""
    measured = trial.user_attrs
    return ValidationMetrics(
        val_auroc=measured["val_auroc"],
        val_fpr95=measured["val_fpr95"],
        subtrain_auroc=measured["subtrain_auroc"],
        val_correlation=measured.get("val_correlation"),
    )


def best_trial(trials: Sequence[FrozenTrial], objective: Objective) -> FrozenTrial:
    """Return the trial with the largest merit, the first among equals; of a Pareto front the one nearest the ideal."""
    if objective == "pareto":
        trials = pareto_front(trials)
        scale = _scale(trials)
        return min(trials, key=lambda trial: (_distance(trial_checks(trial), *scale), number_of(trial)))
    return max(trials, key=lambda trial: (*trial_checks(trial).objective_key(objective), -number_of(trial)))


def pareto_front(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that none beats in AUROC and FPR@95 both, by falling AUROC; of equals the first."""
    front: list[FrozenTrial] = []
    for trial in sorted(trials, key=lambda t: (-t.user_attrs["val_auroc"], t.user_attrs["val_fpr95"], number_of(t))):
        if not front or trial.user_attrs["val_fpr95"] < front[-1].user_attrs["val_fpr95"]:
            front.append(trial)
    return front


def _scale(front: Sequence[FrozenTrial]) -> tuple[ValidationMetrics, float, float]:
    """The ideal point of a front (its best AUROC, its best FPR@95) and the front's extent in both."""
    first, last = trial_checks(front[0]), trial_checks(front[-1])
    ideal = ValidationMetrics(val_auroc=first.val_auroc, val_fpr95=last.val_fpr95, subtrain_auroc=None)
    return ideal, (first.val_auroc - last.val_auroc) or 1.0, (first.val_fpr95 - last.val_fpr95) or 1.0


def _distance(checks: ValidationMetrics, ideal: ValidationMetrics, auroc_extent: float, fpr95_extent: float) -> float:
    away = (ideal.val_auroc - checks.val_auroc) / auroc_extent, (checks.val_fpr95 - ideal.val_fpr95) / fpr95_extent
    return away[0] ** 2 + away[1] ** 2
