"""What is tried next: the order of phases, what each of them proposes, and going on after any trial."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from nacpipe.core.params import LayerParams, NacParams
from nacpipe.search.space import LayerSpace
from nacpipe.search.strategy import LOCAL, REFINE, SETTLE, SPREAD, Layers, Proposal, Strategy

SPACE = {
    "avgpool": LayerSpace(bins=(4, 2000), saturation=(1, 1000), alpha=(1e-2, 1e3)),
    "layer3": LayerSpace(bins=(4, 2000), saturation=(1, 1000), alpha=(1e-4, 1e1)),
    "layer2": LayerSpace(bins=(4, 2000), saturation=(1, 500), alpha=(1e0, 1e6)),
}
TARGET = {"avgpool": (0.3, 0.7, 0.5), "layer3": (0.8, 0.4, 0.2), "layer2": (0.5, 0.5, 0.9)}
PUBLISHED = NacParams(
    layers={name: LayerParams(bins=3000, saturation=50, alpha=1e-5, weight=4.0) for name in SPACE}  # outside the ranges
)
ALONE, TURN = SPREAD + REFINE, SPREAD + SETTLE + LOCAL
TRIALS = 1 + 3 * ALONE + 4 * TURN  # every layer's round, and the first one's again


def weigh(layers: Layers) -> NDArray[np.float64]:
    """Weights that depend on the parameters, as Fisher's do."""
    return np.array([1.0 + layer.bins % 5 for layer in layers.values()])


def value_of(params: NacParams) -> float:
    """A smooth hill with its top, 0, at TARGET and equal weights."""
    total = 0.0
    for name, layer in params.layers.items():
        away = SPACE[name].unit(layer) - np.array(TARGET[name])
        total -= layer.weight * float(away @ away) + (layer.weight - 1 / len(params.layers)) ** 2
    return total


def run(
    strategy: Strategy, trials: int, objective: Callable[[NacParams], float] = value_of
) -> list[tuple[Proposal, float]]:
    found = []
    for _ in range(trials):
        proposal = strategy.ask()
        value = objective(proposal.params)
        strategy.tell(proposal.params, value)
        found.append((proposal, value))
    return found


@pytest.fixture(scope="module")
def whole() -> list[tuple[Proposal, float]]:
    """An uninterrupted search through all phases."""
    return run(Strategy(SPACE, 7, weigh, PUBLISHED), TRIALS)


def test_going_on_after_any_trial_asks_what_the_uninterrupted_one_asks(whole: list[tuple[Proposal, float]]) -> None:
    for told in range(TRIALS):
        fresh = Strategy(SPACE, 7, weigh, PUBLISHED)
        for proposal, value in whole[:told]:
            fresh.tell(proposal.params, value)
        assert fresh.ask() == whole[told][0], f"after {told} trials"


def test_asking_twice_changes_nothing(whole: list[tuple[Proposal, float]]) -> None:
    strategy = Strategy(SPACE, 7, weigh, PUBLISHED)
    for proposal, value in whole:
        assert strategy.ask() == strategy.ask() == proposal
        strategy.tell(proposal.params, value)


def test_phases_in_order_and_of_the_documented_length(whole: list[tuple[Proposal, float]]) -> None:
    expected = (
        ["published"]
        + [f"layer {name}" for name in ("avgpool", "layer3", "layer2") for _ in range(ALONE)]
        + [f"round {name}" for name in ("avgpool", "layer3", "layer2", "avgpool") for _ in range(TURN)]
    )
    assert [proposal.phase for proposal, _ in whole] == expected
    without = run(Strategy(SPACE, 7, weigh), 2)
    assert [proposal.phase for proposal, _ in without] == ["layer avgpool"] * 2
    assert (SPREAD, REFINE, SETTLE, LOCAL) == (12, 12, 20, 24)


def test_published_parameters_come_first_with_equal_weights(whole: list[tuple[Proposal, float]]) -> None:
    for name, layer in whole[0][0].params.layers.items():
        assert (layer.bins, layer.saturation, layer.alpha) == (3000, 50, 1e-5), name
        assert layer.weight == pytest.approx(1 / 3)


def test_a_layer_is_looked_for_alone_with_all_others_at_0(whole: list[tuple[Proposal, float]]) -> None:
    alone = [proposal for proposal, _ in whole if proposal.phase.startswith("layer")]
    assert len(alone) == 3 * ALONE
    for proposal in alone:
        weights = {name: layer.weight for name, layer in proposal.params.layers.items()}
        assert weights == {name: float(proposal.phase == f"layer {name}") for name in SPACE}


def parts(whole: list[tuple[Proposal, float]]) -> dict[str, list[tuple[LayerParams, float]]]:
    """Phase → what was looked for in it, in order; of the first round only where a layer has two."""
    found: dict[str, list[tuple[LayerParams, float]]] = {}
    for number, (proposal, value) in enumerate(whole[: 1 + 3 * ALONE + 3 * TURN]):
        name = proposal.phase.split()[-1]
        if number:
            found.setdefault(proposal.phase, []).append((proposal.params.layers[name], value))
    return found


def test_the_first_points_of_a_part_visit_every_twelfth_of_every_range(whole: list[tuple[Proposal, float]]) -> None:
    for phase, tried in parts(whole).items():
        space = SPACE[phase.split()[-1]]
        units = np.stack([space.unit(params) for params, _ in tried[:SPREAD]])
        assert sorted((units[:, 1] * SPREAD).astype(int)) == list(range(SPREAD)), phase  # alpha is not rounded
        for column in (0, 2):  # rounded to whole numbers, where small ones are far apart on a logarithmic scale
            assert np.abs(np.sort(units[:, column]) * SPREAD - np.arange(SPREAD) - 0.5).max() < 1.5, phase


def test_then_it_steps_around_the_best_of_the_part(whole: list[tuple[Proposal, float]]) -> None:
    """A step leaves a coordinate alone four times in ten, so many share one with the best so far."""
    for phase, tried in parts(whole).items():
        steps, shared = (REFINE if phase.startswith("layer") else SETTLE), 0
        for number in range(SPREAD, SPREAD + steps):
            best = max(tried[:number], key=lambda entry: entry[1])[0]
            params = tried[number][0]
            shared += params.alpha == pytest.approx(best.alpha, rel=1e-9) or params.bins == best.bins
        assert shared >= steps // 3, phase


def test_rounds_take_their_weights_in_closed_form(whole: list[tuple[Proposal, float]]) -> None:
    for start in range(1 + 3 * ALONE, TRIALS, TURN):
        for proposal, _ in whole[start : start + SPREAD + SETTLE]:
            expected = weigh(proposal.params.layers)
            found = [layer.weight for layer in proposal.params.layers.values()]
            np.testing.assert_allclose(found, expected / expected.sum())


def test_local_steps_move_one_layer_or_the_weights_alone(whole: list[tuple[Proposal, float]]) -> None:
    best, best_value, kinds = whole[0][0].params, -np.inf, []
    for number, (proposal, value) in enumerate(whole):
        place = (number - 1 - 3 * ALONE) % TURN
        if number > 3 * ALONE and place >= SPREAD + SETTLE:
            differ = [
                name
                for name, layer in proposal.params.layers.items()
                if (layer.bins, layer.saturation, layer.alpha)
                != (best.layers[name].bins, best.layers[name].saturation, best.layers[name].alpha)
            ]
            # A coordinate that goes through the unit cube and back may move by a rounding.
            assert len(differ) <= 1, number
            kinds.append(len(differ))
        if value > best_value:
            best, best_value = proposal.params, value
    assert len(kinds) == 4 * LOCAL
    assert kinds.count(0) >= 5
    assert kinds.count(1) >= 50


def test_parameters_stay_inside_their_ranges(whole: list[tuple[Proposal, float]]) -> None:
    for proposal, _ in whole[1 : 1 + 3 * ALONE]:
        name = proposal.phase.split()[-1]
        layer, space = proposal.params.layers[name], SPACE[name]
        assert space.including(layer) == space
    for proposal, _ in whole:
        for name, layer in proposal.params.layers.items():
            wider = SPACE[name].including(PUBLISHED.layers[name])
            assert wider.including(layer) == wider
        assert sum(layer.weight for layer in proposal.params.layers.values()) == pytest.approx(1)


def test_the_best_is_remembered(whole: list[tuple[Proposal, float]]) -> None:
    strategy = Strategy(SPACE, 7, weigh, PUBLISHED)
    found = run(strategy, TRIALS)
    assert strategy.told == TRIALS
    assert strategy.value == max(value for _, value in found)
    assert found == whole


@pytest.mark.parametrize("seed", range(4))
def test_a_hill_is_climbed(seed: int) -> None:
    """Top 0; points anywhere, all weights equal, lie around −0.45."""
    found = [value for _, value in run(Strategy(SPACE, seed, weigh), TRIALS)]
    assert max(found) > -0.03
    assert max(found) > max(found[: 3 * ALONE])
    assert np.median(found[-LOCAL:]) > np.median(found[: 3 * ALONE])


def test_seeds_differ() -> None:
    first, second = (run(Strategy(SPACE, seed, weigh), 3) for seed in (1, 2))
    assert first[0] != second[0]


def test_a_single_layer_is_searched_too() -> None:
    space = {"avgpool": SPACE["avgpool"]}
    found = run(Strategy(space, 3, lambda layers: np.ones(len(layers))), ALONE + 2 * TURN)
    assert [proposal.phase for proposal, _ in found] == ["layer avgpool"] * ALONE + ["round avgpool"] * 2 * TURN
    assert all(proposal.params.layers["avgpool"].weight == 1 for proposal, _ in found)
    assert max(value for _, value in found) > -0.005
    middle = [v for _, v in found[:SPREAD]]
    assert max(value for _, value in found) > max(middle)


def test_equal_values_keep_the_first() -> None:
    strategy = Strategy(SPACE, 1, weigh)
    first = run(strategy, 30, lambda _params: 0.5)[0][0]
    assert strategy.value == 0.5
    assert strategy.best is not None
    assert strategy.best.layers["avgpool"] == first.params.layers["avgpool"]
