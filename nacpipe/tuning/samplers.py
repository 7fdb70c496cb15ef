"""Samplers for Optuna studies of `Objective`: term by term, layer by layer, a grid, and Optuna's own by name."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, get_args

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from nacpipe.errors import InputError, MissingExtra
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.tuning.layerwise import Candidate, LayerwiseRule
from nacpipe.tuning.objective import Objective
from nacpipe.tuning.request import SamplerName
from nacpipe.tuning.space import Choice
from nacpipe.tuning.termwise import TermwiseRule
from nacpipe.tuning.trials import NewTrials, flatten, recorded_fields, trial_metrics

Rule = LayerwiseRule | TermwiseRule

LARGE_GRID = 100_000  # combinations that are tried without being asked for by number


class _PositionSampler(BaseSampler):
    """Samples all parameters of a trial at once, by the trial's position.

    A trial's position is its number; a trial that is repeated (`RetryHeartbeatStaleTrialCallback`) has another number
    and keeps the position. Position and phase are user attributes of the trial, and so are the weights where the
    sampler chooses them; the objective computes them otherwise. Parameters that are none of the objective's are drawn
    at random.
    """

    def __init__(self, objective: Objective | None, seed: int | None) -> None:
        self._objective = objective
        self._random = RandomSampler(None if seed is None else seed % 2**32)
        self._candidates: dict[int, Candidate] = {}
        """Trial's id → what it tries, from its beginning until its first parameter is suggested."""

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Choose what the trial tries, and say so in its user attributes, where the objective reads it."""
        if self._objective is None or "fixed_params" in trial.system_attrs:  # enqueued by a person
            return
        self._check(study)
        if "position" in trial.user_attrs:
            terms = trial.user_attrs.get("terms", self._objective.recorded)
            if self._objective.parameters(terms).keys() <= trial.params.keys():  # repeated, with all its parameters
                return
        candidate = self._propose(study, trial)
        self._candidates[trial._trial_id] = candidate
        attributes: dict[str, Any] = {"position": candidate.position, "phase": candidate.phase}
        if not candidate.fit:
            attributes["weights"] = {name: layer.weight for name, layer in candidate.params.layers.items()}
        if len(candidate.params.layers) < len(self._objective.space):
            attributes["terms"] = list(candidate.params.layers)
        for key, value in attributes.items():
            study._storage.set_trial_user_attr(trial._trial_id, key, value)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the distributions of the parameters that this trial tries."""
        if self._objective is None or trial._trial_id not in self._candidates:
            return {}
        return self._objective.parameters(self._candidates[trial._trial_id].params.layers)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return every parameter of the trial.

        Raises:
            ValueError: the study has several objectives, and the sampler's objective has one.
        """
        self._check(study)
        candidate = self._candidates.pop(trial._trial_id, None)
        if candidate is None or self._objective is None:
            return {}
        return flatten(candidate.params, self._objective.recorded)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw a parameter that is none of the objective's.

        Raises:
            ValueError: the study has several objectives, and the sampler's objective has one.
        """
        self._check(study)
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        """Seed what draws at random anew."""
        self._random.reseed_rng()

    def _propose(self, study: Study, trial: FrozenTrial) -> Candidate:
        raise NotImplementedError

    def _check(self, study: Study) -> None:
        if self._objective is None or self._objective.objective != "pareto":
            self._raise_error_if_multi_objective(study)


class _LearningSampler(_PositionSampler):
    """Samples by a rule, a function of the seed and of the completed trials of one study, whoever ran them."""

    def __init__(self, objective: Objective | None, seed: int | None, make: Callable[[int], Rule]) -> None:
        super().__init__(objective, seed)
        chosen = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._make: Callable[[], Rule] = partial(make, chosen)
        self._lock = threading.Lock()  # `n_jobs` of Optuna
        self._study = ""
        self._forget("")

    def _forget(self, study: str) -> None:
        self._study, self._trials = study, NewTrials()
        if self._objective is not None:
            self._rule = self._make()

    def _propose(self, study: Study, trial: FrozenTrial) -> Candidate:
        with self._lock:
            self._learn(study)
            return self._rule.propose(_position(trial))

    def _learn(self, study: Study) -> None:
        """Let the rule learn from the completed trials that it does not know."""
        objective = self._objective
        assert objective is not None
        if study.study_name != self._study:
            self._forget(study.study_name)
        for trial in self._trials.read(study):
            key = trial_metrics(trial).objective_key(objective.objective)
            self._rule.learn(trial.user_attrs.get("position"), objective.params(trial), key)


class LayerwiseSampler(_LearningSampler):
    """Layers one by one, then each again among the others (layerwise.py): the default sampler of most spaces.

    It learns from the study's completed trials, whoever ran them, so a study that is continued in another process goes
    on as if it had not been interrupted, trial for trial.
    """

    def __init__(self, objective: Objective | None = None, *, seed: int | None = None) -> None:
        """Sample the objective's space.

        Args:
            objective: what the study optimizes; without one every parameter is drawn at random.
            seed: None draws one.

        Raises:
            InputError: the space searches for weights, which this sampler leaves to their closed form.
        """
        super().__init__(objective, seed, self._make_rule)
        for name, layer in objective.space.items() if objective is not None else ():
            if layer.weight is not None and layer.weight.free:
                raise InputError(
                    f"layer {name!r}: a weight to be searched needs another sampler, such as --sampler tpe; by default"
                    ' weights come in closed form (weight = "fit") or are fixed'
                )

    @property
    def opening(self) -> int:
        """Positions before the first round; they do not count as trials without improvement."""
        return 0 if self._objective is None else self._make_rule(0).opening

    def _make_rule(self, seed: int) -> LayerwiseRule:
        assert self._objective is not None
        return LayerwiseRule(self._objective.space, seed, self._objective.published)


class TermwiseSampler(_LearningSampler):
    """Terms one by one, then all together (termwise.py): the default sampler of the space `auto`.

    It learns from the study's completed trials, as `LayerwiseSampler` does.
    """

    def __init__(self, objective: Objective, *, seed: int | None = None) -> None:
        """Sample the objective's space.

        Args:
            objective: what the study optimizes.
            seed: None draws one.

        Raises:
            InputError: the space has weights of its own; here they come in closed form.
        """
        super().__init__(objective, seed, self._make_rule)
        if not objective.fits:
            raise InputError('terms are weighed in closed form: leave out weight, or say weight = "fit"')

    @property
    def opening(self) -> int:
        """Positions of the first pass; they do not count as trials without improvement."""
        return self._make_rule(0).first_pass

    def together(self, study: Study) -> NacParams:
        """Return the best of every term, weighed in closed form."""
        assert self._objective is not None and isinstance(self._rule, TermwiseRule)
        self._learn(study)
        return self._objective.weigh(self._rule.together())

    def _make_rule(self, seed: int) -> TermwiseRule:
        assert self._objective is not None
        return TermwiseRule(self._objective.space, seed)


class GridSampler(_PositionSampler):
    """Every combination of the objective's space once, in an order that depends on the seed alone.

    The combination is the trial's number's; numbers beyond the grid, which a study has where trials failed, take the
    combinations that are not complete. `study.optimize` ends when all are.
    """

    def __init__(self, objective: Objective, *, seed: int = 1) -> None:
        """Sample the objective's space.

        Raises:
            InputError: a field is a range.
        """
        super().__init__(objective, seed)
        self._axes: list[tuple[str, str, Choice]] = []
        for name, layer in objective.space.items():
            for field, dimensions in recorded_fields(layer).items():
                if not all(isinstance(dimension, Choice) for dimension in dimensions):
                    raise InputError(
                        f"a grid needs values, and {name}.{field} is a range; list its values in a --space FILE, or"
                        " take another --sampler"
                    )
                assert isinstance(dimensions[0], Choice)
                self._axes.append((name, field, dimensions[0]))
        self.size = math.prod(len(choice.values) for _, _, choice in self._axes)
        # position → combination: a stride without a common factor visits each once, the first ones far apart.
        random, length = np.random.default_rng(seed), self.size.bit_length() // 8 + 9
        self._start, stride = (int.from_bytes(random.bytes(length), "little") % self.size for _ in range(2))
        self._stride = stride | 1
        while math.gcd(self._stride, self.size) > 1:
            self._stride += 2

    def params(self, position: int) -> NacParams:
        """Return the combination at a position, from 0 to `size` − 1."""
        assert self._objective is not None
        place = (self._start + position * self._stride) % self.size
        fields: dict[str, dict[str, Any]] = {
            name: {field: layer.dimensions(field)[0].at(0.0) for field in ("source", "edges")}
            | ({} if layer.weight is None else {"weight": layer.weight.at(0.0)})
            for name, layer in self._objective.space.items()
        }
        for name, field, choice in reversed(self._axes):
            place, which = divmod(place, len(choice.values))
            fields[name][field] = choice.values[which]
        return NacParams(layers={name: LayerParams(**values) for name, values in fields.items()})

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """End `study.optimize` where this trial completes the grid."""
        if state != TrialState.COMPLETE or trial.number + 1 < self.size:
            return
        if len(self.complete(study) | ({trial.user_attrs.get("position")} - {None})) >= self.size:
            with suppress(RuntimeError):  # in a loop of the caller's own
                study.stop()

    def complete(self, study: Study) -> set[int]:
        """Return the positions that are complete."""
        return _positions(study, TrialState.COMPLETE)

    def _propose(self, study: Study, trial: FrozenTrial) -> Candidate:
        assert self._objective is not None
        position = _position(trial)
        if position >= self.size:
            done = self.complete(study)
            open_positions = [number for number in range(self.size) if number not in done]
            running = _positions(study, TrialState.RUNNING, TrialState.WAITING)
            idle = [number for number in open_positions if number not in running]
            position = (idle or open_positions or [position % self.size])[0]
        params = self.params(position)
        return Candidate(position=position, phase="grid", params=params, fit=True)  # weights are fields, or closed form


def _position(trial: FrozenTrial) -> int:
    """A trial's position; of one that is repeated and never got as far as to have one, the first's number."""
    return int(trial.user_attrs.get("position", trial.system_attrs.get("failed_trial", trial.number)))


def _positions(study: Study, *states: TrialState) -> set[int]:
    trials = study.get_trials(deepcopy=False, states=states)
    return {trial.user_attrs["position"] for trial in trials if "position" in trial.user_attrs}


def make_sampler(name: SamplerName, objective: Objective, seed: int, finished: int) -> BaseSampler:
    """Return the sampler of this name.

    Args:
        name: `terms`, `layers`, `grid`, or one of Optuna's.
        objective: what the study optimizes.
        seed: of the search.
        finished: trials that the study has; Optuna's samplers are seeded from the seed and this number, so that a
            study that goes on does not draw the same again.

    Raises:
        InputError: it cannot search this space.
        MissingExtra: cmaes is not installed.
    """
    if name == "layers":
        return LayerwiseSampler(objective, seed=seed)
    if name == "terms":
        return TermwiseSampler(objective, seed=seed)
    if name == "grid":
        return GridSampler(objective, seed=seed)
    if name == "cmaes" and objective.objective == "pareto":
        raise InputError("cmaes has one objective; search for auroc, fpr95 or guided, or take --sampler nsga2 or tpe")
    return _OPTUNA[name](int(np.random.SeedSequence([seed, finished]).generate_state(1)[0]))


def _cmaes(seed: int) -> BaseSampler:
    try:
        import cmaes  # noqa: F401
    except ModuleNotFoundError:
        raise MissingExtra("this needs cmaes; install it with: pip install 'nacpipe[cmaes]'") from None
    return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)


_OPTUNA: Mapping[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "cmaes": _cmaes,
}
assert {"layers", "terms", "grid", *_OPTUNA} == set(get_args(SamplerName))
