"""Studies without a cache: an objective of a made-up space, and trials that nobody measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial

from nacpipe.method.params import NacParams
from nacpipe.tuning.layerwise import Candidate
from nacpipe.tuning.objective import Objective
from nacpipe.tuning.samplers import GridSampler, LayerwiseSampler
from nacpipe.tuning.space import Space, fits_weights
from nacpipe.tuning.trials import distributions, flatten, trial_params
from nacpipe.tuning.validation import ObjectiveName, ValidationMetrics


def objective_of(space: Space, objective: ObjectiveName = "auroc", published: NacParams | None = None) -> Objective:
    """What a sampler asks of an objective."""
    found = SimpleNamespace(space=space, recorded=space, objective=objective, published=published)
    found.distributions = distributions(space)
    found.params = lambda trial: trial_params(trial, space)
    found.parameters = lambda terms: distributions({name: space[name] for name in terms})
    found.fits = fits_weights(space)
    return cast(Objective, found)


def make_trial(
    params: NacParams, metrics: ValidationMetrics, objective: ObjectiveName, space: Space, **attributes: Any
) -> FrozenTrial:
    """A completed trial as an objective leaves it; a weight outside its range is an attribute alone."""
    ranges = {name: d for name, d in distributions(space).items() if isinstance(d, FloatDistribution)}
    suggested = flatten(params, space)
    suggested |= {name: min(max(suggested[name], d.low), d.high) for name, d in ranges.items()}
    return optuna.trial.create_trial(
        values=metrics.values(objective),
        params=suggested,
        distributions=distributions(space),
        user_attrs={
            "weights": {name: layer.weight for name, layer in params.layers.items()},
            **metrics.to_attributes(),
            **attributes,
        },
    )


def ask(sampler: LayerwiseSampler | GridSampler, numbers: range) -> list[Candidate]:
    """What a sampler would try, without any trial's result."""
    study = optuna.create_study(sampler=sampler)
    places: Any = (SimpleNamespace(number=number, user_attrs={}, system_attrs={}) for number in numbers)
    return [sampler._propose(study, place) for place in places]
