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

The rule is a function of the seed and of the completed trials: it learns from them and proposes the parameters of a
position. So a study that was stopped goes on exactly as if it had not been. Where several processes try at once, a
trial is proposed before its predecessors are learnt from; it then starts from the best so far. A position is a trial's
place in this order: its number, but for a trial that is repeated, which keeps the position of the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from nacpipe.method.params import LayerParams, NacParams
from nacpipe.tuning.space import Space, fits_weights, with_weights

SPREAD, REFINE, SETTLE, LOCAL = 12, 12, 20, 24
FIRST_STEP, MIN_STEP, MAX_STEP = 0.15, 0.01, 0.4  # of a unit range
FIRST_TURN, MIN_TURN, MAX_TURN = 0.3, 0.02, 1.0  # of a weight, in e-folds
GROW, SHRINK = 1.5, 0.95
WEIGHT_STEPS = 0.2  # share of the local steps that move weights alone

Layers = Mapping[str, LayerParams]
Key = tuple[float, ...]
"""What is climbed; larger is better, and anything is larger than ()."""


@dataclass(frozen=True, slots=True)
class _Place:
    """What a position is for."""

    phase: str
    layer: str
    """The layer that is looked for; empty for local steps and the published parameters."""
    step: int
    """Within this layer's part: below SPREAD a point anywhere, then a step around the part's best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What to try."""

    position: int
    phase: str
    params: NacParams
    fit: bool = False
    """True: the weights are not these but come in closed form from the layer scores."""


@dataclass
class LayerwiseRule:
    """What `LayerwiseSampler` (samplers.py) samples by: it learns from completed trials and proposes the next."""

    space: Space
    seed: int
    published: NacParams | None = None
    best_key: Key = ()
    best: NacParams | None = None
    _part: tuple[int, Key, LayerParams] | None = None
    """The first trial of the newest part that was learnt from, and the best in that part."""
    _alone: dict[str, tuple[Key, LayerParams]] = field(default_factory=dict)
    _steps: dict[str, float] = field(default_factory=dict)
    """Layer → size of its next local step; the empty name stands for the weights."""

    def __post_init__(self) -> None:
        self._fits = fits_weights(self.space)

    @property
    def opening(self) -> int:
        """Trials before the first round; they do not count as trials without improvement."""
        return (self.published is not None) + len(self.space) * (SPREAD + REFINE)

    def place(self, position: int) -> _Place:
        """Return the phase, the layer and the step of a position."""
        names = list(self.space)
        position -= self.published is not None
        if position < 0:
            return _Place("published", "", 0)
        layer, step = divmod(position, SPREAD + REFINE)
        if layer < len(names):
            return _Place(f"layer {names[layer]}", names[layer], step)
        turn, step = divmod(position - len(names) * (SPREAD + REFINE), SPREAD + SETTLE + LOCAL)
        name = names[turn % len(names)]
        return _Place(f"round {name}", name if step < SPREAD + SETTLE else "", step)

    def propose(self, position: int) -> Candidate:
        """Return what to try at a position."""
        place, random = self.place(position), np.random.default_rng([self.seed, position])
        params, fit = self._propose(place, position, random)
        return Candidate(position=position, phase=place.phase, params=params, fit=fit)

    def learn(self, position: int | None, params: NacParams, key: Key) -> None:
        """Learn from a completed trial; without a position (another sampler's) only whether it is the best."""
        place = _Place("", "", 0) if position is None else self.place(position)
        improved = key > self.best_key
        if place.layer:
            assert position is not None
            start, layer = position - place.step, params.layers[place.layer]
            if self._part is None or start > self._part[0] or (start == self._part[0] and key > self._part[1]):
                self._part = (start, key, layer)
            if place.phase.startswith("layer") and (
                place.layer not in self._alone or key > self._alone[place.layer][0]
            ):
                self._alone[place.layer] = (key, layer)
        elif place.phase.startswith("round") and self.best is not None:
            self._learn_step(_moved(params, self.best), improved)
        if improved:
            self.best_key, self.best = key, params
        if place.phase.startswith("layer") and self.best is not None:
            # What weighs nothing changes no value: the best carries every layer's best alone into the rounds.
            layers = {n: p if p.weight else replace(self._held(n), weight=0.0) for n, p in self.best.layers.items()}
            self.best = NacParams(layers=layers)

    def _propose(self, place: _Place, position: int, random: np.random.Generator) -> tuple[NacParams, bool]:
        """Parameters, and whether their weights are left open."""
        if place.phase == "published":
            assert self.published is not None
            weights = np.array([layer.weight for layer in self.published.layers.values()])
            return with_weights(self.published.layers, weights), False
        if not place.layer:
            return self._step(position, random)
        layer = self._look_for(place, position, random)
        if place.phase.startswith("layer"):
            alone = {n: layer if n == place.layer else self._held(n) for n in self.space}
            return with_weights(alone, np.array([float(n == place.layer) for n in self.space])), False
        return self._open({**self._layers(position), place.layer: layer})

    def _look_for(self, place: _Place, position: int, random: np.random.Generator) -> LayerParams:
        """One layer, anywhere in its ranges or near the best of this part."""
        space, start = self.space[place.layer], position - place.step
        free = len(space.free)
        if place.step < SPREAD or self._part is None or self._part[0] != start:
            # A Latin hypercube per part: every twelfth of every range is visited once.
            part = np.random.default_rng([self.seed, start, 1])
            strata = part.permuted(np.tile(np.arange(SPREAD), (free, 1)), axis=1)[:, place.step % SPREAD]
            return space.params((strata + random.random(free)) / SPREAD)
        return space.params(_move(space.unit(self._part[2]), 0.3 * 0.9 ** (place.step - SPREAD), random))

    def _step(self, position: int, random: np.random.Generator) -> tuple[NacParams, bool]:
        """A small step from the best: one layer, or the weights."""
        layers = dict(self._layers(position))
        if self._fits and len(layers) > 1 and random.random() < WEIGHT_STEPS:
            held = self.best.layers if self.best is not None else layers
            weights = np.array([max(held[n].weight, 1e-4) for n in layers])
            turns = np.where(random.random(weights.size) < 0.5, random.normal(size=weights.size), 0.0)
            return with_weights(layers, weights * np.exp(self._steps.get("", FIRST_TURN) * turns)), False
        name = list(layers)[random.integers(len(layers))]
        space, step = self.space[name], self._steps.get(name, FIRST_STEP)
        layers[name] = space.params(_move(space.unit(layers[name]), step, random))
        return self._open(layers)

    def _learn_step(self, moved: str, improved: bool) -> None:
        first, low, high = (FIRST_STEP, MIN_STEP, MAX_STEP) if moved else (FIRST_TURN, MIN_TURN, MAX_TURN)
        self._steps[moved] = min(max(self._steps.get(moved, first) * (GROW if improved else SHRINK), low), high)

    def _layers(self, position: int) -> Layers:
        """The best's layers; before all layers were looked at, their best alone."""
        if self.best is not None and position > self.opening:
            return self.best.layers
        return {name: self._held(name) for name in self.space}

    def _held(self, layer: str) -> LayerParams:
        if layer in self._alone:
            return self._alone[layer][1]
        return self.space[layer].params(np.full(len(self.space[layer].free), 0.5))

    def _open(self, layers: Layers) -> tuple[NacParams, bool]:
        """These layers with their weights left open, or with the weights that the space fixes."""
        fixed = [1.0 if (weight := self.space[name].weight) is None else weight.at(0.5) for name in layers]
        return with_weights(layers, np.array(fixed)), self._fits


def _moved(params: NacParams, best: NacParams) -> str:
    """The layer in which parameters differ from the best's, weights apart; empty where only weights do."""
    for name, layer in params.layers.items():
        if replace(layer, weight=best.layers[name].weight) != best.layers[name]:
            return name
    return ""


def _move(unit: NDArray[np.float64], step: float, random: np.random.Generator) -> NDArray[np.float64]:
    """A random step of some of the coordinates, kept inside the unit cube."""
    if not unit.size:
        return unit
    moves = random.random(unit.size) < 0.6
    moves[random.integers(unit.size)] = True
    return np.clip(unit + np.where(moves, random.normal(0.0, step, unit.size), 0.0), 0.0, 1.0)
