"""Term by term: the order of phases, what each proposes, and going on after any trial."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nacpipe.method.params import LayerParams, NacParams
from nacpipe.tuning.layerwise import Candidate
from nacpipe.tuning.space import Choice, Interval, LayerSpace
from nacpipe.tuning.termwise import AGAIN, REFINE, SPREAD, TermwiseRule


def ranges(bins: tuple[int, int], alpha: tuple[float, float]) -> LayerSpace:
    return LayerSpace(
        bins=Interval(*bins, whole=True),
        saturation=Interval(1, 1000, whole=True),
        alpha={"product": Interval(*alpha)},
    )


SPACE = {"avgpool": ranges((4, 2000), (1e-2, 1e3)), "layer3": ranges((10, 500), (1e-4, 1e1))}
TARGET = {"avgpool": (0.3, 0.7, 0.5), "layer3": (0.8, 0.4, 0.2)}
FIRST = SPREAD + REFINE
TRIALS = 2 * FIRST + 1 + 2 * AGAIN + 1
Run = list[tuple[Candidate, NacParams, float]]


def value_of(params: NacParams) -> float:
    """A hill with its top, 0, at TARGET; all terms together are better than each."""
    layers = {name: layer for name, layer in params.layers.items() if layer.weight > 0}
    away = [float(np.square(SPACE[n].unit(p) - np.array(TARGET[n])).sum()) for n, p in layers.items()]
    return (len(layers) > 1) - sum(away)


def run(rule: TermwiseRule, positions: range) -> Run:
    tried = []
    for position in positions:
        candidate = rule.propose(position)
        weight = 0.5 if candidate.fit else 1.0
        params = NacParams(layers={n: replace(p, weight=weight) for n, p in candidate.params.layers.items()})
        tried.append((candidate, params, value_of(params)))
        rule.learn(position, params, (tried[-1][2],))
    return tried


@pytest.fixture(scope="module")
def whole() -> Run:
    return run(TermwiseRule(SPACE, 7), range(TRIALS))


def test_phases_in_order(whole: Run) -> None:
    expected = ["term avgpool"] * FIRST + ["term layer3"] * FIRST + ["all terms"]
    expected += ["term avgpool"] * AGAIN + ["term layer3"] * AGAIN + ["all terms"]
    assert [candidate.phase for candidate, _, _ in whole] == expected
    assert (SPREAD, REFINE, AGAIN) == (36, 24, 24)
    assert TermwiseRule(SPACE, 7).first_pass == 2 * FIRST + 1


def test_a_term_is_tried_alone_and_all_are_weighed_in_closed_form(whole: Run) -> None:
    for candidate, _, _ in whole:
        if candidate.phase == "all terms":
            assert (list(candidate.params.layers), candidate.fit) == (["avgpool", "layer3"], True)
        else:
            assert list(candidate.params.layers) == [candidate.phase.removeprefix("term ")]
            assert not candidate.fit


def test_going_on_after_any_trial_proposes_what_the_uninterrupted_one_does(whole: Run) -> None:
    for known in range(TRIALS):
        fresh = TermwiseRule(SPACE, 7)
        for position, (_, params, value) in enumerate(whole[:known]):
            fresh.learn(position, params, (value,))
        assert fresh.propose(known) == whole[known][0], f"after {known} trials"


def test_together_are_the_best_of_each(whole: Run) -> None:
    rule = TermwiseRule(SPACE, 7)
    for position in np.random.default_rng(0).permutation(TRIALS).tolist():  # in any order
        rule.learn(position, whole[position][1], (whole[position][2],))
    for name, layer in rule.together().layers.items():
        alone = [(value, params.layers[name]) for _, params, value in whole if list(params.layers) == [name]]
        assert layer == max(alone, key=lambda entry: entry[0])[1]


def test_of_equals_the_first_whatever_the_order() -> None:
    one, two = (LayerParams(bins=bins, saturation=5, alpha=1.0) for bins in (10, 20))
    for order in ((0, 1), (1, 0)):
        rule = TermwiseRule(SPACE, 1)
        for position in order:
            rule.learn(position, NacParams(layers={"avgpool": (one, two)[position]}), (0.5,))
        assert rule.together().layers["avgpool"] == one


def test_terms_that_were_not_tried_are_left_out() -> None:
    rule, layer = TermwiseRule(SPACE, 1), LayerParams(bins=20, saturation=5, alpha=1.0)
    for name, params in rule.together().layers.items():  # none was: the middle of all ranges
        np.testing.assert_allclose(SPACE[name].unit(params), 0.5, atol=0.01)
    rule.learn(0, NacParams(layers={"layer3": layer}), (0.5,))
    assert rule.together().layers == {"layer3": layer}


def test_the_first_points_visit_every_part_of_every_range(whole: Run) -> None:
    for start, name in ((0, "avgpool"), (FIRST, "layer3")):
        points = [params.layers[name] for _, params, _ in whole[start : start + SPREAD]]
        units = np.stack([SPACE[name].unit(point) for point in points])
        assert sorted((units[:, 1] * SPREAD).astype(int)) == list(range(SPREAD))  # alpha is not rounded


def test_steps_start_at_the_best_and_grow_smaller(whole: Run) -> None:
    sizes = []
    for position in range(SPREAD, FIRST):
        best = max(whole[:position], key=lambda entry: entry[2])[1].layers["avgpool"]
        sizes.append(np.abs(SPACE["avgpool"].unit(whole[position][1].layers["avgpool"]) - SPACE["avgpool"].unit(best)))
    moved = np.stack(sizes)
    assert (moved.max(axis=1) < 1).all()
    assert moved[:8].mean() > 2 * moved[-8:].mean()
    assert (moved[:, 1] < 1e-9).sum() >= 2  # three in ten coordinates stay


def test_a_hill_is_climbed(whole: Run) -> None:
    alone = [value for _, params, value in whole[:FIRST]]
    assert max(alone) > -0.01
    assert whole[2 * FIRST][2] > 0.97 and whole[-1][2] >= whole[2 * FIRST][2]


def test_seeds_and_names_differ_and_terms_do_not_depend_on_each_other() -> None:
    first, second = (TermwiseRule(SPACE, seed).propose(0).params.layers["avgpool"] for seed in (1, 2))
    assert first != second
    alone = TermwiseRule({"layer3": SPACE["layer3"]}, 1).propose(0)
    both = TermwiseRule(SPACE, 1).propose(FIRST)
    assert alone.params == both.params


def test_another_samplers_trials_are_learnt_from_where_one_term_counts() -> None:
    rule, layer = TermwiseRule(SPACE, 1), LayerParams(bins=20, saturation=5, alpha=1.0)
    rule.learn(None, NacParams(layers={"avgpool": layer, "layer3": replace(layer, weight=0.0)}), (0.5,))
    rule.learn(None, NacParams(layers={"avgpool": layer, "layer3": layer}), (0.9,))
    assert rule.together().layers["avgpool"] == layer
    assert list(rule.together().layers) == ["avgpool"]


def test_a_fixed_term_is_proposed_as_it_is() -> None:
    fixed = LayerSpace(bins=Choice((50,)), saturation=Choice((5,)), alpha={"product": Choice((2.0,))})
    tried = run(TermwiseRule({"avgpool": fixed}, 3), range(0))
    rule = TermwiseRule({"avgpool": fixed}, 3)
    assert tried == []
    layers = {rule.propose(position).params.layers["avgpool"] for position in (0, SPREAD, FIRST - 1)}
    assert layers == {LayerParams(bins=50, saturation=5, alpha=2.0)}
