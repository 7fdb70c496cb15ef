"""Other ways to choose what is tried: every combination of a grid, or one of Optuna's samplers.

Each is a strategy as strategy.py's: `ask` for the parameters of a number, `tell` the completed trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, get_args

import numpy as np
import optuna
from optuna.trial import Trial, TrialState

from nacpipe.errors import InputError, MissingExtra
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.tuning.objective import DIRECTIONS, Candidate, Objective, ValidationMetrics
from nacpipe.tuning.request import Sampler
from nacpipe.tuning.space import FIELDS, Choice, Dimension, Interval, LayerSpace, Space, fits_weights
from nacpipe.tuning.strategy import Strategy
from nacpipe.tuning.trials import as_distribution

LARGE_GRID = 100_000  # combinations that are tried without being asked for by number


class Asker(Protocol):
    """What every way to choose can do."""

    @property
    def size(self) -> int | None:
        """How many trials there are in all; None where it never ends."""

    @property
    def opening(self) -> int:
        """Trials that do not count as without improvement."""

    def ask(self, number: int) -> Candidate:
        """Return the parameters of trial `number`."""

    def tell(self, number: int, params: NacParams, checks: ValidationMetrics) -> None:
        """Learn from a completed trial."""


def make_asker(
    sampler: Sampler, space: Space, seed: int, objective: Objective, published: NacParams | None = None
) -> Asker:
    """Return the way to choose that has this name.

    Raises:
        InputError: it cannot search this space.
        MissingExtra: cmaes is not installed.
    """
    asker: Asker
    if sampler == "grid":
        asker = Grid(space, seed)
    elif sampler == "layers":
        for name, layer in space.items():
            if layer.weight is not None and layer.weight.free:
                raise InputError(
                    f"layer {name!r}: a weight to be searched needs another sampler, such as --sampler tpe; by default"
                    ' weights come in closed form (weight = "fit") or are fixed'
                )
        asker = Strategy(space, seed, objective, published)
    else:
        asker = OptunaSampler(sampler, space, seed, objective)
    if not fits_weights(space) and all(layer.weights()[0] == 0 for layer in space.values()):
        raise InputError("every layer's weight may be 0 at once, which is no score; keep one layer's above 0")
    return asker


class Grid:
    """Every combination once, in an order that depends on the seed alone."""

    opening = 0

    def __init__(self, space: Space, seed: int) -> None:
        """Refuse a space with ranges.

        Raises:
            InputError: naming the field that is a range.
        """
        self._space = space
        self._axes: list[tuple[str, str, Choice]] = []
        for name, layer in space.items():
            for field, (dimension, *_) in _axes(layer):
                if not isinstance(dimension, Choice):
                    raise InputError(
                        f"a grid needs values, and {name}.{field} is a range; list its values in a --space FILE, or"
                        " take another --sampler"
                    )
                self._axes.append((name, field, dimension))
        self.size = math.prod(len(choice.values) for _, _, choice in self._axes)
        # number → combination: a stride without a common factor visits each once, and the first ones lie far apart.
        random, length = np.random.default_rng(seed), self.size.bit_length() // 8 + 9
        self._start, stride = (int.from_bytes(random.bytes(length), "little") % self.size for _ in range(2))
        self._stride = stride | 1
        while math.gcd(self._stride, self.size) > 1:
            self._stride += 2

    def ask(self, number: int) -> Candidate:
        """Return combination `number`, below `size`."""
        place = (self._start + number * self._stride) % self.size
        found: dict[str, dict[str, Any]] = {name: {} for name in self._space}
        for name, field, choice in reversed(self._axes):
            place, which = divmod(place, len(choice.values))
            found[name][field] = choice.values[which]
        params = NacParams(layers={name: LayerParams(**fields) for name, fields in found.items()})
        return Candidate(number=number, phase="grid", params=params, fit=fits_weights(self._space))

    def tell(self, number: int, params: NacParams, checks: ValidationMetrics) -> None:
        """Learn nothing: what is tried next does not depend on it."""


class OptunaSampler:
    """One of Optuna's samplers, in a study of its own in memory.

    Its random numbers are a function of the seed and the trial's number. What it remembers of earlier trials it gets
    back, when a study goes on, by being asked for them again.
    """

    opening = 0
    size = None

    def __init__(self, sampler: Sampler, space: Space, seed: int, objective: Objective) -> None:
        """Check that this sampler can search this space.

        Raises:
            InputError: it cannot.
            MissingExtra: cmaes is not installed.
        """
        if sampler == "cmaes" and objective == "pareto":
            raise InputError(
                "cmaes has one objective; search for auroc, fpr95 or guided, or take --sampler nsga2 or tpe"
            )
        self._name, self._space, self._seed, self._objective = sampler, space, seed, objective
        self._distributions = {
            f"{name}.{field}": as_distribution(*dimensions)
            for name, layer in space.items()
            for field, dimensions in _axes(layer)
        }
        self._names = {f"{name}.{field}": (name, field) for name, layer in space.items() for field, _ in _axes(layer)}
        self._make = _SAMPLERS[sampler]
        self._make(0)
        self._study = optuna.create_study(directions=DIRECTIONS[objective])
        self._asked: dict[int, Trial] = {}

    def ask(self, number: int) -> Candidate:
        """Return the parameters of trial `number`."""
        if number not in self._asked:
            self._study.sampler = self._make(int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0]))
            self._asked[number] = self._study.ask(self._distributions)
        values = self._asked[number].params
        layers = {name: LayerParams(**_fields(name, layer, values)) for name, layer in self._space.items()}
        return Candidate(
            number=number, phase=self._name, params=NacParams(layers=layers), fit=fits_weights(self._space)
        )

    def tell(self, number: int, params: NacParams, checks: ValidationMetrics) -> None:
        """Learn from a completed trial, this one's or another process's."""
        values = checks.values(self._objective)
        given = {name: getattr(params.layers[layer], field) for name, (layer, field) in self._names.items()}
        held = self._asked[number].params if number in self._asked else {}
        if self._name in ("nsga2", "cmaes"):  # what they know lies in the trials that they asked for
            asked_for = self.ask(number).params  # again where a study goes on; alpha as it was tried
            held = {name: getattr(asked_for.layers[layer], field) for name, (layer, field) in self._names.items()}
        asked = self._asked.pop(number, None)
        if asked is not None and held == given:
            self._study.tell(asked, values)
            return
        if asked is not None:
            self._study.tell(asked, state=TrialState.FAIL)
        self._study.add_trial(optuna.trial.create_trial(values=values, params=given, distributions=self._distributions))


def _cmaes(seed: int) -> optuna.samplers.BaseSampler:
    try:
        import cmaes  # noqa: F401
    except ModuleNotFoundError:
        raise MissingExtra("this needs cmaes; install it with: pip install 'nacpipe[cmaes]'") from None
    return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)


_SAMPLERS: Mapping[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "cmaes": _cmaes,
}
assert {"layers", "grid", *_SAMPLERS} == set(get_args(Sampler))


def _axes(layer: LayerSpace) -> list[tuple[str, tuple[Dimension, ...]]]:
    """A layer's fields and their dimensions; weights that come in closed form are none."""
    fields = [(field, layer.dimensions(field)) for field in FIELDS]
    return fields if layer.weight is None else [*fields, ("weight", (layer.weight,))]


def _fields(name: str, layer: LayerSpace, values: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's parameters from a trial's: what is not there is fixed; alpha is kept inside its source's range."""
    found = {field: values.get(f"{name}.{field}", layer.dimensions(field)[0].at(0.0)) for field in FIELDS}
    if isinstance(alpha := layer.alpha[found["source"]], Interval):
        found["alpha"] = min(max(found["alpha"], alpha.low), alpha.high)
    if layer.weight is not None:
        found["weight"] = values.get(f"{name}.weight", layer.weight.at(0.0))
    return found
