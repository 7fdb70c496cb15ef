"""What to try next: layers one by one, then all together in rounds, each round one layer anew.

    published   the published parameters, where there are any
    layer NAME  per layer, alone (all other weights 0): SPREAD points over its ranges, REFINE steps around the best
    round NAME  a layer in turn, among the best of the others: SPREAD points, SETTLE steps around the best of these,
                then LOCAL small steps of any layer or of the weights; and the next layer's round

Layers add up in the score, so a layer's parameters can be found alone, in three dimensions instead of sixteen. But what
is good alone is not what is missing together (avgpool and the layer before it say nearly the same), so every layer is
looked for again among the others, far from where it stands, and given time to settle before it is judged.

A new set of layers gets its weights in closed form (weights.py), so the search moves in layer parameters alone and
only polishes weights.

A strategy is a function of the seed and the completed trials: `tell` them in order and `ask` for the next. So a study
that was stopped goes on exactly as if it had not been.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from nacpipe.core.params import LayerParams, NacParams
from nacpipe.search.space import Space, with_weights

SPREAD, REFINE, SETTLE, LOCAL = 12, 12, 20, 24
FIRST_STEP, MIN_STEP, MAX_STEP = 0.15, 0.01, 0.4  # of a unit range
FIRST_TURN, MIN_TURN, MAX_TURN = 0.3, 0.02, 1.0  # of a weight, in e-folds
GROW, SHRINK = 1.5, 0.95
WEIGHT_STEPS = 0.2  # share of the local steps that move weights alone

Layers = Mapping[str, LayerParams]


@dataclass(frozen=True, slots=True)
class Proposal:
    """What to try."""

    phase: str
    params: NacParams


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a trial stands."""

    phase: str
    layer: str
    """The layer that is looked for; empty for local steps and the published parameters."""
    step: int
    """Within this layer's part: below SPREAD a point anywhere, then a step around the part's best."""


@dataclass
class Strategy:
    """`ask` for the next trial's parameters, `tell` every completed trial in order."""

    space: Space
    seed: int
    weigh: Callable[[Layers], NDArray[np.float64]]
    """Layers → their weights in closed form."""
    published: NacParams | None = None
    told: int = 0
    value: float = -np.inf
    best: NacParams | None = None
    _part: tuple[float, LayerParams] | None = None
    """The best of the current layer's part."""
    _alone: dict[str, tuple[float, LayerParams]] = field(default_factory=dict)
    _steps: dict[str, float] = field(default_factory=dict)
    """Layer → size of its next local step; the empty name stands for the weights."""

    def place(self, number: int) -> _Place:
        """Return where trial `number` stands."""
        names = list(self.space)
        number -= self.published is not None
        if number < 0:
            return _Place("published", "", 0)
        layer, step = divmod(number, SPREAD + REFINE)
        if layer < len(names):
            return _Place(f"layer {names[layer]}", names[layer], step)
        turn, step = divmod(number - len(names) * (SPREAD + REFINE), SPREAD + SETTLE + LOCAL)
        name = names[turn % len(names)]
        return _Place(f"round {name}", name if step < SPREAD + SETTLE else "", step)

    def ask(self) -> Proposal:
        """Return the next trial's parameters."""
        place, random = self.place(self.told), np.random.default_rng([self.seed, self.told])
        if place.phase == "published":
            assert self.published is not None
            return Proposal(place.phase, with_weights(self.published.layers, np.ones(len(self.published.layers))))
        if not place.layer:
            return Proposal(place.phase, self._local(random))
        found = self._look_for(place, random)
        if place.phase.startswith("layer"):
            alone = {n: found if n == place.layer else self._held(n) for n in self.space}
            return Proposal(place.phase, with_weights(alone, np.array([float(n == place.layer) for n in self.space])))
        return Proposal(place.phase, self._weighed({**self._layers(), place.layer: found}))

    def tell(self, params: NacParams, value: float) -> None:
        """Learn from the next completed trial."""
        place = self.place(self.told)
        improved = value > self.value
        if place.layer:
            entry = (value, params.layers[place.layer])
            if place.step == 0 or self._part is None or value > self._part[0]:
                self._part = entry
            held = self._alone.get(place.layer)
            if place.phase.startswith("layer") and (held is None or value > held[0]):
                self._alone[place.layer] = entry
        elif place.phase.startswith("round"):
            self._learn_step(self._moved(params), improved)
        if improved:
            self.value, self.best = value, params
        if place.phase.startswith("layer") and self.best is not None:
            # What weighs nothing changes no value: the best carries every layer's best alone into the rounds.
            layers = {n: p if p.weight else replace(self._held(n), weight=0.0) for n, p in self.best.layers.items()}
            self.best = NacParams(layers=layers)
        self.told += 1

    def _look_for(self, place: _Place, random: np.random.Generator) -> LayerParams:
        """One layer, anywhere in its ranges or near the best of this part."""
        space = self.space[place.layer]
        if place.step < SPREAD or self._part is None:
            # A Latin hypercube per part: every twelfth of every range is visited once.
            part = np.random.default_rng([self.seed, self.told - place.step, 1])
            strata = part.permuted(np.tile(np.arange(SPREAD), (3, 1)), axis=1)[:, place.step]
            return space.params((strata + random.random(3)) / SPREAD)
        return space.params(_move(space.unit(self._part[1]), 0.3 * 0.9 ** (place.step - SPREAD), random))

    def _local(self, random: np.random.Generator) -> NacParams:
        """A small step from the best: one layer, or the weights."""
        assert self.best is not None
        layers = dict(self._layers())
        if len(layers) > 1 and random.random() < WEIGHT_STEPS:
            weights = np.array([max(self.best.layers[n].weight, 1e-4) for n in layers])
            turns = np.where(random.random(weights.size) < 0.5, random.normal(size=weights.size), 0.0)
            return with_weights(layers, weights * np.exp(self._steps.get("", FIRST_TURN) * turns))
        name = list(layers)[random.integers(len(layers))]
        space, step = self.space[name], self._steps.get(name, FIRST_STEP)
        layers[name] = space.params(_move(space.unit(layers[name]), step, random))
        return self._weighed(layers)

    def _learn_step(self, moved: str, improved: bool) -> None:
        first, low, high = (FIRST_STEP, MIN_STEP, MAX_STEP) if moved else (FIRST_TURN, MIN_TURN, MAX_TURN)
        self._steps[moved] = min(max(self._steps.get(moved, first) * (GROW if improved else SHRINK), low), high)

    def _moved(self, params: NacParams) -> str:
        """The layer in which parameters differ from the best's, weights apart; empty where only weights do."""
        assert self.best is not None
        for name, layer in params.layers.items():
            held = self.best.layers[name]
            if replace(layer, weight=held.weight) != held:
                return name
        return ""

    def _layers(self) -> Layers:
        """The best's layers; before all layers were looked at, their best alone."""
        if self.best is not None and not self.place(max(self.told - 1, 0)).phase.startswith(("layer", "published")):
            return self.best.layers
        return {name: self._held(name) for name in self.space}

    def _held(self, layer: str) -> LayerParams:
        return self._alone[layer][1] if layer in self._alone else self.space[layer].params(np.full(3, 0.5))

    def _weighed(self, layers: Layers) -> NacParams:
        return with_weights(layers, self.weigh(layers))


def _move(unit: NDArray[np.float64], step: float, random: np.random.Generator) -> NDArray[np.float64]:
    """A random step of some of the coordinates, kept inside the unit cube."""
    moves = random.random(unit.size) < 0.6
    moves[random.integers(unit.size)] = True
    return np.clip(unit + np.where(moves, random.normal(0.0, step, unit.size), 0.0), 0.0, 1.0)
