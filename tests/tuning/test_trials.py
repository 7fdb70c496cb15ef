"""Optuna's trials and ours: there and back, the best of them, and the Pareto front."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from nacpipe.method.params import LayerParams, NacParams
from nacpipe.tuning.space import Choice, Interval, LayerSpace, Space, widen
from nacpipe.tuning.trials import (
    as_distribution,
    best_trial,
    completed_trials,
    distributions,
    flatten,
    pareto_front,
    recorded_fields,
    trial_metrics,
    trial_params,
)
from nacpipe.tuning.validation import DIRECTIONS, ObjectiveName, ValidationMetrics
from tests.tuning.trials import make_trial

SPACE: Space = {
    "avgpool": LayerSpace(  # everything is searched
        bins=Choice((50, 500)),
        saturation=Interval(1, 9, whole=True),
        alpha={"product": Interval(0.1, 2.0), "gradient": Interval(1.0, 50.0)},
        source=Choice(("product", "gradient")),
        edges=Choice(("log", "linear")),
        weight=Interval(0.0, 3.0, log=False),
    ),
    "layer1": LayerSpace(  # nothing is
        bins=Choice((20,)),
        saturation=Choice((5,)),
        alpha={"activation": Choice((0.5,))},
        source=Choice(("activation",)),
        edges=Choice(("linear",)),
        weight=Choice((1.0,)),
    ),
}
FIXED = LayerParams(bins=20, saturation=5, alpha=0.5, source="activation", edges="linear")
CHECKS = ValidationMetrics(val_auroc=0.75, val_fpr95=0.5, subtrain_auroc=0.25)


# --- there and back ---------------------------------------------------------------------------------------------------


def test_what_is_recorded() -> None:
    """The fields that always are, and source, edges and weight where there is a choice; weights as an attribute."""
    assert list(recorded_fields(SPACE["avgpool"])) == ["bins", "alpha", "saturation", "source", "edges", "weight"]
    assert list(recorded_fields(SPACE["layer1"])) == ["bins", "alpha", "saturation"]
    first = LayerParams(bins=500, saturation=3, alpha=7.5, source="gradient", edges="linear", weight=2.5)
    expected = {
        "avgpool.bins": 500,
        "avgpool.alpha": 7.5,
        "avgpool.saturation": 3,
        "avgpool.weight": 2.5,
        "avgpool.source": "gradient",
        "avgpool.edges": "linear",
        "layer1.bins": 20,
        "layer1.alpha": 0.5,
        "layer1.saturation": 5,
    }
    params = NacParams(layers={"avgpool": first, "layer1": FIXED})
    assert flatten(params, SPACE) == expected
    trial = make_trial(params, CHECKS, "auroc", SPACE)
    assert trial.params == expected
    assert trial.user_attrs == {
        "weights": {"avgpool": 2.5, "layer1": 1.0},
        "val_auroc": 0.75,
        "val_fpr95": 0.5,
        "subtrain_auroc": 0.25,
    }
    with_correlation = replace(CHECKS, val_correlation=0.125)
    assert make_trial(params, with_correlation, "guided", SPACE).user_attrs["val_correlation"] == 0.125


@given(
    bins=st.sampled_from([50, 500]),
    saturation=st.integers(1, 9),
    alpha=st.floats(0.1, 50.0),
    source=st.sampled_from(["product", "gradient"]),
    edges=st.sampled_from(["log", "linear"]),
    weight=st.floats(0.0, 3.0),
    subtrain=st.none() | st.floats(0, 1),
    objective=st.sampled_from(["auroc", "fpr95", "pareto"]),
)
def test_there_and_back(subtrain: float | None, objective: ObjectiveName, **fields: Any) -> None:
    """Alpha, suggested in the ranges of both sources, is kept inside its own source's."""
    tried = NacParams(layers={"avgpool": LayerParams(**fields), "layer1": FIXED})
    low, high = (0.1, 2.0) if fields["source"] == "product" else (1.0, 50.0)
    kept = replace(tried.layers["avgpool"], alpha=min(max(fields["alpha"], low), high))
    params = NacParams(layers={"avgpool": kept, "layer1": FIXED})
    checks = ValidationMetrics(val_auroc=0.875, val_fpr95=0.125, subtrain_auroc=subtrain)
    trial = make_trial(tried, checks, objective, SPACE)
    assert trial_params(trial, SPACE) == params
    assert trial_metrics(trial) == checks
    assert trial.values == {"auroc": [0.875], "fpr95": [0.125], "pareto": [0.875, 0.125]}[objective]


def test_distributions() -> None:
    found = distributions(SPACE)
    assert found == {
        "avgpool.bins": CategoricalDistribution((50, 500)),
        "avgpool.alpha": FloatDistribution(0.1, 50.0, log=True),  # both sources'
        "avgpool.saturation": IntDistribution(1, 9, log=True),
        "avgpool.source": CategoricalDistribution(("product", "gradient")),
        "avgpool.edges": CategoricalDistribution(("log", "linear")),
        "avgpool.weight": FloatDistribution(0.0, 3.0),
        "layer1.bins": CategoricalDistribution((20,)),
        "layer1.alpha": CategoricalDistribution((0.5,)),
        "layer1.saturation": CategoricalDistribution((5,)),
    }
    assert as_distribution(Choice((1.0, 2.0)), Choice((2.0, 3.0))) == CategoricalDistribution((1.0, 2.0, 3.0))
    assert as_distribution(Interval(0.0, 2.0, log=False)) == FloatDistribution(0.0, 2.0)


@pytest.mark.parametrize("weights", [(5.0,), (5.0, 2.0), (2.0, 5.0), (0.5, 5.0, 1.0)])
def test_weights_above_1_are_recorded(weights: tuple[float, ...]) -> None:
    space = {"layer1": replace(SPACE["layer1"], weight=Choice(weights))}
    found = distributions(space).get("layer1.weight")
    assert found == (CategoricalDistribution(weights) if len(weights) > 1 else None)  # a fixed one is no parameter
    trial = make_trial(NacParams(layers={"layer1": replace(FIXED, weight=5.0)}), CHECKS, "auroc", space)
    assert trial_params(trial, space).layers["layer1"].weight == 5.0


def test_published_parameters_widen_what_is_recorded() -> None:
    space = {
        "layer1": LayerSpace(
            bins=Interval(4, 100, whole=True), saturation=Interval(2, 9, whole=True), alpha={"product": Interval(1, 2)}
        )
    }
    far = NacParams(layers={"layer1": LayerParams(bins=5000, saturation=1, alpha=1e-6)})
    assert distributions(widen(space, far)) == {
        "layer1.bins": IntDistribution(4, 5000, log=True),
        "layer1.alpha": FloatDistribution(1e-6, 2.0, log=True),
        "layer1.saturation": IntDistribution(1, 9, log=True),
    }


# --- the best ---------------------------------------------------------------------------------------------------------


def measured(number: int, auroc: float, fpr95: float) -> FrozenTrial:
    trial = optuna.trial.create_trial(
        values=[auroc, fpr95], user_attrs={"val_auroc": auroc, "val_fpr95": fpr95, "subtrain_auroc": None}
    )
    trial.number = number
    return trial


def numbered(*points: tuple[float, float]) -> list[FrozenTrial]:
    return [measured(number, *point) for number, point in enumerate(points)]


@pytest.mark.parametrize(
    ("points", "auroc", "fpr95", "pareto"),
    [
        ([(0.5, 0.9)], 0, 0, 0),
        ([(0.5, 0.9), (0.6, 0.9), (0.6, 0.8), (0.4, 0.1)], 1, 3, 2),  # of equal AUROC the first
        ([(0.5, 0.2), (0.6, 0.2), (0.6, 0.2), (0.9, 0.3)], 3, 1, 1),  # of equal FPR@95 the higher AUROC, then the first
        # A front of three, from (0.9, 0.5) to (0.7, 0.1): in units of its extent the ideal is 1, 1 from its ends and
        # ((0.9 − 0.85) / 0.2, (0.2 − 0.1) / 0.4) = (¼, ¼) from the middle.
        ([(0.9, 0.5), (0.7, 0.1), (0.85, 0.2), (0.8, 0.3)], 0, 1, 2),
        ([(0.9, 0.5), (0.7, 0.1)], 0, 1, 0),  # equally far: the first
        ([(0.7, 0.1), (0.9, 0.5)], 1, 0, 0),
        ([(0.9, 0.5), (0.7, 0.1), (0.71, 0.45)], 0, 1, 0),  # on the front, but farther than its ends
    ],
)
def test_the_best_by_hand(points: list[tuple[float, float]], auroc: int, fpr95: int, pareto: int) -> None:
    trials = numbered(*points)
    objectives: list[tuple[ObjectiveName, int]] = [("auroc", auroc), ("fpr95", fpr95), ("pareto", pareto)]
    for objective, number in objectives:
        assert best_trial(trials, objective).number == number
        assert best_trial(trials[::-1], objective).number == number  # whatever order they were completed in


POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=25)


@given(points=POINTS)
def test_the_front_against_every_pair(points: list[tuple[int, int]]) -> None:
    trials = numbered(*[(a / 6, f / 6) for a, f in points])

    def beats(one: FrozenTrial, other: FrozenTrial) -> bool:
        (a, f), (b, g) = one.values, other.values
        return (a >= b and f <= g) and (a > b or f < g)

    unbeaten = [t for t in trials if not any(beats(other, t) for other in trials)]
    firsts = [t for t in unbeaten if not any(o.values == t.values and o.number < t.number for o in unbeaten)]
    front = pareto_front(trials)
    assert front == sorted(firsts, key=lambda t: -t.values[0])
    assert [t.values[1] for t in front] == sorted(t.values[1] for t in front)[::-1]
    assert pareto_front(front) == front

    study = optuna.create_study(directions=DIRECTIONS["pareto"])
    study.add_trials(trials)
    assert {tuple(t.values) for t in study.best_trials} == {tuple(t.values) for t in front}
    assert best_trial(trials, "pareto").number in {t.number for t in front}


@given(points=POINTS)
def test_the_best_of_one_objective_is_optunas(points: list[tuple[int, int]]) -> None:
    trials = numbered(*points)
    wanted: list[tuple[ObjectiveName, int]] = [("auroc", 0), ("fpr95", 1)]
    for objective, which in wanted:
        study = optuna.create_study(directions=DIRECTIONS[objective])
        study.add_trials([optuna.trial.create_trial(value=t.values[which]) for t in trials])
        assert best_trial(trials, objective).values[which] == study.best_value


def test_the_best_does_not_depend_on_the_units() -> None:
    """The front's extent is the measure: shrink one axis and the same trial is nearest to the ideal."""
    points = [(0.9, 0.5), (0.7, 0.1), (0.85, 0.2), (0.75, 0.12)]
    for scale, shift in itertools.product((1.0, 0.01), (0.0, 0.05)):
        trials = numbered(*[(a * scale + shift, f) for a, f in points])
        assert best_trial(trials, "pareto").number == 2


def test_trials_of_others_are_none_of_ours() -> None:
    """A person's trials in the study, failed ones and running ones are not learnt from."""
    study = optuna.create_study(direction="maximize")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"val_auroc": 0.5}))
    study.add_trial(optuna.trial.create_trial(value=0.5, user_attrs={"val_auroc": 0.5}))
    study.ask()
    assert [trial.number for trial in completed_trials(study)] == [2]
