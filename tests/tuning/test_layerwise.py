"""What is tried next: the order of phases, what each of them proposes, and going on after any trial."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from nacpipe.method.params import LayerParams, NacParams
from nacpipe.tuning.layerwise import LOCAL, REFINE, SETTLE, SPREAD, Candidate, LayerwiseRule
from nacpipe.tuning.space import Choice, Interval, LayerSpace, with_weights
from nacpipe.tuning.validation import ValidationMetrics


def ranges(bins: tuple[int, int], saturation: tuple[int, int], alpha: tuple[float, float]) -> LayerSpace:
    return LayerSpace(
        bins=Interval(*bins, whole=True),
        saturation=Interval(*saturation, whole=True),
        alpha={"product": Interval(*alpha)},
    )


SPACE = {
    "avgpool": ranges(bins=(4, 2000), saturation=(1, 1000), alpha=(1e-2, 1e3)),
    "layer3": ranges(bins=(4, 2000), saturation=(1, 1000), alpha=(1e-4, 1e1)),
    "layer2": ranges(bins=(4, 2000), saturation=(1, 500), alpha=(1e0, 1e6)),
}
TARGET = {"avgpool": (0.3, 0.7, 0.5), "layer3": (0.8, 0.4, 0.2), "layer2": (0.5, 0.5, 0.9)}
PUBLISHED = NacParams(
    layers={name: LayerParams(bins=3000, saturation=50, alpha=1e-5, weight=4.0) for name in SPACE}  # outside the ranges
)
ALONE, TURN = SPREAD + REFINE, SPREAD + SETTLE + LOCAL
TRIALS = 1 + 3 * ALONE + 4 * TURN  # every layer's round, and the first one's again


def weigh(params: NacParams) -> NDArray[np.float64]:
    """Weights that depend on the parameters, as Fisher's do."""
    return np.array([1.0 + layer.bins % 5 for layer in params.layers.values()])


def final(proposal: Candidate) -> NacParams:
    """What an evaluator makes of a proposal."""
    return with_weights(proposal.params.layers, weigh(proposal.params)) if proposal.fit else proposal.params


def value_of(params: NacParams) -> float:
    """A smooth hill with its top, 0, at TARGET and equal weights."""
    total = 0.0
    for name, layer in params.layers.items():
        away = SPACE[name].unit(layer) - np.array(TARGET[name])
        total -= layer.weight * float(away @ away) + (layer.weight - 1 / len(params.layers)) ** 2
    return total


def run(
    rule: LayerwiseRule, trials: int, objective: Callable[[NacParams], float] = value_of
) -> list[tuple[Candidate, NacParams, float]]:
    """Proposals, what was tried, and its value."""
    found = []
    for number in range(trials):
        proposal = rule.propose(number)
        params = final(proposal)
        value = objective(params)
        rule.learn(number, params, (value,))
        found.append((proposal, params, value))
    return found


Whole = list[tuple[Candidate, NacParams, float]]


@pytest.fixture(scope="module")
def whole() -> Whole:
    """An uninterrupted search through all phases."""
    return run(LayerwiseRule(SPACE, 7, published=PUBLISHED), TRIALS)


@pytest.mark.slow
def test_going_on_after_any_trial_proposes_what_the_uninterrupted_one_proposes(whole: Whole) -> None:
    for told in range(TRIALS):
        fresh = LayerwiseRule(SPACE, 7, published=PUBLISHED)
        for number, (_, params, value) in enumerate(whole[:told]):
            fresh.learn(number, params, (value,))
        assert fresh.propose(told) == whole[told][0], f"after {told} trials"


def test_proposing_twice_changes_nothing(whole: Whole) -> None:
    rule = LayerwiseRule(SPACE, 7, published=PUBLISHED)
    for number, (proposal, params, value) in enumerate(whole):
        assert rule.propose(number) == rule.propose(number) == proposal
        rule.learn(number, params, (value,))


def test_phases_in_order_and_of_the_documented_length(whole: Whole) -> None:
    expected = (
        ["published"]
        + [f"layer {name}" for name in ("avgpool", "layer3", "layer2") for _ in range(ALONE)]
        + [f"round {name}" for name in ("avgpool", "layer3", "layer2", "avgpool") for _ in range(TURN)]
    )
    assert [proposal.phase for proposal, _, _ in whole] == expected
    without = run(LayerwiseRule(SPACE, 7), 2)
    assert [proposal.phase for proposal, _, _ in without] == ["layer avgpool"] * 2
    assert (SPREAD, REFINE, SETTLE, LOCAL) == (12, 12, 20, 24)


def test_published_parameters_come_first_with_equal_weights(whole: Whole) -> None:
    for name, layer in whole[0][0].params.layers.items():
        assert (layer.bins, layer.saturation, layer.alpha) == (3000, 50, 1e-5), name
        assert layer.weight == pytest.approx(1 / 3)


def test_a_layer_is_looked_for_alone_with_all_others_at_0(whole: Whole) -> None:
    alone = [proposal for proposal, _, _ in whole if proposal.phase.startswith("layer")]
    assert len(alone) == 3 * ALONE
    for proposal in alone:
        weights = {name: layer.weight for name, layer in proposal.params.layers.items()}
        assert weights == {name: float(proposal.phase == f"layer {name}") for name in SPACE}


def parts(whole: Whole) -> dict[str, list[tuple[LayerParams, float]]]:
    """Phase → what was looked for in it, in order; of the first round only where a layer has two."""
    found: dict[str, list[tuple[LayerParams, float]]] = {}
    for number, (proposal, params, value) in enumerate(whole[: 1 + 3 * ALONE + 3 * TURN]):
        name = proposal.phase.split()[-1]
        if number:
            found.setdefault(proposal.phase, []).append((params.layers[name], value))
    return found


def test_the_first_points_of_a_part_visit_every_twelfth_of_every_range(whole: Whole) -> None:
    for phase, tried in parts(whole).items():
        space = SPACE[phase.split()[-1]]
        units = np.stack([space.unit(params) for params, _ in tried[:SPREAD]])
        assert sorted((units[:, 1] * SPREAD).astype(int)) == list(range(SPREAD)), phase  # alpha is not rounded
        for column in (0, 2):  # rounded to whole numbers, where small ones are far apart on a logarithmic scale
            assert np.abs(np.sort(units[:, column]) * SPREAD - np.arange(SPREAD) - 0.5).max() < 1.5, phase


def test_then_it_steps_around_the_best_of_the_part(whole: Whole) -> None:
    """A step leaves a coordinate alone four times in ten, so many share one with the best so far."""
    for phase, tried in parts(whole).items():
        steps, shared = (REFINE if phase.startswith("layer") else SETTLE), 0
        for number in range(SPREAD, SPREAD + steps):
            best = max(tried[:number], key=lambda entry: entry[1])[0]
            params = tried[number][0]
            shared += params.alpha == pytest.approx(best.alpha, rel=1e-9) or params.bins == best.bins
        assert shared >= steps // 3, phase


def test_rounds_take_their_weights_in_closed_form(whole: Whole) -> None:
    for start in range(1 + 3 * ALONE, TRIALS, TURN):
        assert all(proposal.fit for proposal, _, _ in whole[start : start + SPREAD + SETTLE])
    assert not any(proposal.fit for proposal, _, _ in whole[: 1 + 3 * ALONE])


def test_local_steps_move_one_layer_or_the_weights_alone(whole: Whole) -> None:
    best, best_value, kinds = whole[0][1], -np.inf, []
    for number, (_, params, value) in enumerate(whole):
        place = (number - 1 - 3 * ALONE) % TURN
        if number > 3 * ALONE and place >= SPREAD + SETTLE:
            differ = [
                name
                for name, layer in params.layers.items()
                if (layer.bins, layer.saturation, layer.alpha)
                != (best.layers[name].bins, best.layers[name].saturation, best.layers[name].alpha)
            ]
            # A coordinate that goes through the unit cube and back may move by a rounding.
            assert len(differ) <= 1, number
            kinds.append(len(differ))
        if value > best_value:
            best, best_value = params, value
    assert len(kinds) == 4 * LOCAL
    assert kinds.count(0) >= 5
    assert kinds.count(1) >= 50


def test_parameters_stay_inside_their_ranges(whole: Whole) -> None:
    for proposal, _, _ in whole[1 : 1 + 3 * ALONE]:
        name = proposal.phase.split()[-1]
        layer, space = proposal.params.layers[name], SPACE[name]
        assert space.including(layer) == space
    for _, params, _ in whole:
        for name, layer in params.layers.items():
            wider = SPACE[name].including(PUBLISHED.layers[name])
            assert wider.including(layer) == wider
        assert sum(layer.weight for layer in params.layers.values()) == pytest.approx(1)


def test_the_best_is_remembered(whole: Whole) -> None:
    rule = LayerwiseRule(SPACE, 7, published=PUBLISHED)
    found = run(rule, TRIALS)
    assert rule.best_key == (max(value for _, _, value in found),)
    assert found == whole


@pytest.mark.parametrize("seed", range(4))
def test_a_hill_is_climbed(seed: int) -> None:
    """Top 0; points anywhere, all weights equal, lie around −0.45."""
    found = [value for _, _, value in run(LayerwiseRule(SPACE, seed), TRIALS)]
    assert max(found) > -0.03
    assert max(found) > max(found[: 3 * ALONE])
    assert np.median(found[-LOCAL:]) > np.median(found[: 3 * ALONE])


def test_seeds_differ() -> None:
    first, second = (run(LayerwiseRule(SPACE, seed), 3) for seed in (1, 2))
    assert first[0] != second[0]


def test_a_single_layer_is_searched_too() -> None:
    space = {"avgpool": SPACE["avgpool"]}
    found = run(LayerwiseRule(space, 3), ALONE + 2 * TURN)
    assert [proposal.phase for proposal, _, _ in found] == ["layer avgpool"] * ALONE + ["round avgpool"] * 2 * TURN
    assert all(params.layers["avgpool"].weight == 1 for _, params, _ in found)
    assert max(value for _, _, value in found) > -0.005
    middle = [v for _, _, v in found[:SPREAD]]
    assert max(value for _, _, value in found) > max(middle)


def test_equal_values_keep_the_first() -> None:
    rule = LayerwiseRule(SPACE, 1)
    _, first, _ = run(rule, 30, lambda _params: 0.5)[0]
    assert rule.best_key == (0.5,)
    assert rule.best is not None
    assert rule.best.layers["avgpool"] == first.layers["avgpool"]


def test_fpr95_is_climbed_downwards_and_among_equals_auroc() -> None:
    rule = LayerwiseRule(SPACE, 1)
    params = final(rule.propose(0))
    for number, (fpr, auroc) in enumerate([(0.5, 0.8), (0.4, 0.7), (0.4, 0.75), (0.45, 0.99)]):
        metrics = ValidationMetrics(val_auroc=auroc, val_fpr95=fpr, subtrain_auroc=None)
        rule.learn(number, params, metrics.objective_key("fpr95"))
    assert rule.best_key == (-0.4, 0.75)


@pytest.mark.parametrize("late", [1, 2, 5, 17])
def test_several_processes_at_once_try_different_things_and_climb_too(late: int) -> None:
    """Every trial is proposed when all but the `late` ones before it are learnt from."""
    rule, waiting, values, seen = LayerwiseRule(SPACE, 7, published=PUBLISHED), [], [], []
    for number in range(TRIALS):
        proposal = rule.propose(number)
        waiting.append((number, final(proposal)))
        seen.append(final(proposal))
        if len(waiting) > late:
            told, params = waiting.pop((number * 7) % len(waiting))  # in any order
            values.append(value_of(params))
            rule.learn(told, params, (values[-1],))
    assert max(values) > -0.03
    assert len({str(params) for params in seen}) > 0.98 * TRIALS


def test_choices_and_fixed_values_are_searched() -> None:
    """A layer with nothing to search keeps its value; a choice takes all of its values, and no others."""
    fixed = LayerSpace(bins=Choice((50,)), saturation=Choice((5,)), alpha={"product": Choice((2.0,))})
    mixed = LayerSpace(
        bins=Choice((20, 50)),
        saturation=Interval(1, 100, whole=True),
        alpha={"product": Interval(0.1, 1.0), "gradient": Interval(10.0, 100.0)},
        source=Choice(("product", "gradient")),
    )
    found = run(
        LayerwiseRule({"avgpool": fixed, "layer3": mixed}, 5), 2 * ALONE + 2 * TURN, lambda p: p.layers["layer3"].alpha
    )
    layers = [params.layers for _, params, _ in found]
    assert {(p["avgpool"].bins, p["avgpool"].saturation, p["avgpool"].alpha) for p in layers} == {(50, 5, 2.0)}
    assert {p["layer3"].bins for p in layers} == {20, 50}
    assert {p["layer3"].source for p in layers} == {"product", "gradient"}
    for p in layers:
        low, high = (0.1, 1.0) if p["layer3"].source == "product" else (10.0, 100.0)
        assert low <= p["layer3"].alpha <= high
    assert max(value for _, _, value in found) > 90


def test_weights_that_the_space_fixes_stay() -> None:
    space = {
        name: replace(SPACE[name], weight=Choice((weight,))) for name, weight in (("avgpool", 1.0), ("layer3", 3.0))
    }
    found = run(LayerwiseRule(space, 2), 2 * ALONE + 2 * TURN, lambda p: float(p.layers["avgpool"].bins))
    assert not any(proposal.fit for proposal, _, _ in found)
    for _, params, _ in found[2 * ALONE :]:
        assert [layer.weight for layer in params.layers.values()] == [0.25, 0.75]
