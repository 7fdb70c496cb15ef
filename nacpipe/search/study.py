"""The search as an Optuna study: open, go on, record, report.

Every evaluated combination is a trial with its parameters, value, duration and checks. A trial is recorded whole, in
one append, after it was evaluated; killed at any moment a search loses the trial it was computing and nothing else.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

import nacpipe
from nacpipe.cache import Cache, open_cache
from nacpipe.core.baselines import energy
from nacpipe.core.kernels import set_threads
from nacpipe.core.metrics import auroc, fpr95
from nacpipe.core.params import LayerParams, NacParams
from nacpipe.core.provenance import SEARCH_SPLITS, diff, fingerprint
from nacpipe.core.published import published_params
from nacpipe.errors import InputError, ParamsError, StudyError
from nacpipe.search.evaluate import has_logits
from nacpipe.search.result import Checks, SearchRequest, SearchResult
from nacpipe.search.scoring import Scorer, check_layers
from nacpipe.search.space import Space, measure_space, to_json
from nacpipe.search.storage import is_there, open_storage
from nacpipe.search.strategy import Strategy
from nacpipe.search.weights import fisher_weights

FIELDS = ("bins", "alpha", "saturation", "weight")


class Search:
    """A study opened on its cache, ready to run or to be looked at."""

    def __init__(self, request: SearchRequest, *, create: bool = True) -> None:
        """Open cache and study; with `create=False` nothing is written and a study that is not there stays so.

        Raises:
            StudyError: the study was made with another cache.
            CacheError: the cache is not there or not finished.
        """
        if request.trials < 1:
            raise InputError(f"trials is {request.trials}; it must be at least 1")
        if request.timeout is not None and not request.timeout > 0:  # nor NaN
            raise InputError(f"timeout is {request.timeout}; it must be above 0 seconds")
        set_threads(request.threads)
        self.request = request
        self.cache = open_cache(request.cache)
        check_layers(self.cache, request.layers)
        held = [spec.name for spec in self.cache.header.layers]  # in the cache's order, whatever the order given
        self.layers = tuple(name for name in held if name in request.layers or not request.layers)
        splits = [name for name in SEARCH_SPLITS[1:] if name != "id/subtrain" or name in self.cache]
        self.scorer = Scorer(self.cache, self.layers, splits)
        self.published = _published(self.cache, self.layers)
        self._space = {  # before the study is made: a layer that tells nothing is refused here
            layer: measure_space(layer, self.scorer.index(layer).train, self.scorer.train_rows) for layer in self.layers
        }
        identity = self.cache.search_identity(SEARCH_SPLITS, self.layers)
        self.study = self._open(identity, create)

    def _open(self, identity: dict[str, Any], create: bool) -> optuna.Study | None:
        request = self.request
        if not create and not is_there(request.where):
            return None
        storage = open_storage(request.where, write=create)
        names = optuna.get_all_study_names(storage)
        bound = {"identity": identity, "fingerprint": fingerprint(identity)}
        for name in names:
            attributes = optuna.load_study(study_name=name, storage=storage).user_attrs
            if name == request.study_name or "://" not in request.where:
                _check_bound(request, name, attributes, bound)
        if request.study_name in names:
            study = optuna.load_study(study_name=request.study_name, storage=storage)
        elif create:
            study = optuna.create_study(study_name=request.study_name, storage=storage, direction="maximize")
        else:
            return None
        if create and "fingerprint" not in study.user_attrs:  # new, or its maker was killed before the last of these
            for key, value in {"seed": request.seed, "nacpipe": nacpipe.__version__, **bound}.items():
                study.set_user_attr(key, value)
        return study

    def space(self) -> Space:
        """Return every layer's ranges, from its training products."""
        return self._space

    def completed(self) -> list[FrozenTrial]:
        """Return the study's completed trials, oldest first."""
        if self.study is None:
            return []
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return sorted(trials, key=lambda trial: trial.number)

    def run(self, progress: Callable[[int, float], None] = lambda done, best: None) -> SearchResult:
        """Go on until the study has the trials asked for, or the time is up; Ctrl-C ends it too.

        Args:
            progress: called after every trial with the completed trials and the best value.
        """
        assert self.study is not None
        started = time.monotonic()
        strategy, ended = Strategy(self.space(), self.request.seed, self.weigh, self.published), "trials"
        distributions = _distributions(strategy.space, self.published)
        seconds = self._learn(strategy)
        shared = "://" in self.request.where  # others may add trials to a database while this runs
        try:
            while strategy.told < self.request.trials:
                if self.request.timeout is not None and time.monotonic() - started >= self.request.timeout:
                    ended = "timeout"
                    break
                begun = datetime.datetime.now()
                proposal = strategy.ask()
                checks = self.measure(proposal.params)
                trial = optuna.trial.create_trial(
                    value=checks.val_auroc,
                    params=_flatten(proposal.params),
                    distributions=distributions,
                    user_attrs={
                        "phase": proposal.phase,
                        "val_fpr95": checks.val_fpr95,
                        "subtrain_auroc": checks.subtrain_auroc,
                        "seconds": seconds + time.monotonic() - started,
                    },
                )
                trial.datetime_start, trial.datetime_complete = begun, datetime.datetime.now()
                self.study.add_trial(trial)
                if shared:
                    self._learn(strategy)
                else:
                    strategy.tell(proposal.params, checks.val_auroc)
                progress(strategy.told, strategy.value)
        except KeyboardInterrupt:
            if strategy.told == 0:
                raise  # there is nothing to report
            ended = "interrupted"
        return self.result(ended)

    def _learn(self, strategy: Strategy) -> float:
        """Tell the strategy the completed trials it does not know; return the seconds that the study has taken."""
        trials = self.completed()
        for trial in trials[strategy.told :]:
            strategy.tell(trial_params(trial, self.layers), float(trial.value or 0.0))
        return _seconds(trials)

    def measure(self, params: NacParams) -> Checks:
        """Score the search's splits under these parameters."""
        used = {name: layer for name, layer in params.layers.items() if layer.weight > 0}
        return self._checks(self.scorer.scores(NacParams(layers=used)))

    def weigh(self, layers: Mapping[str, LayerParams]) -> NDArray[np.float64]:
        """Return weights for these layers, (layers,), in closed form from id/val and ood/val."""
        scores = np.stack([self.scorer.layer_scores(name, layer) for name, layer in layers.items()])
        return fisher_weights(scores[:, self.scorer.rows["id/val"]], scores[:, self.scorer.rows["ood/val"]])

    def result(self, ended: str) -> SearchResult:
        """Return what the study has found so far.

        Raises:
            StudyError: no trial is complete.
        """
        trials = self.completed()
        if self.study is None or not trials:
            raise StudyError(
                f"there is no completed trial of {self.request.study_name} in {self.request.where};"
                f" start or go on with: {self.command()}"
            )
        best = max(trials, key=lambda trial: (trial.value, -trial.number))
        alone: dict[str, float] = {}
        for trial in trials:
            layer = str(trial.user_attrs.get("phase", "")).removeprefix("layer ")
            if layer in self.layers and trial.value is not None:
                alone[layer] = max(alone.get(layer, 0.0), trial.value)
        params = trial_params(best, self.layers)
        own = self._energy()
        return SearchResult(
            params=params,
            checks=self.measure(params),
            energy_subtrain=own.subtrain_auroc if own else None,
            energy_val=own.val_auroc if own else None,
            alone=alone,
            trials=len(trials),
            seconds=_seconds(trials),
            seed=self.request.seed,
            ended=ended,
        )

    def made_by(self) -> dict[str, Any]:
        """Return what params.json says of its making."""
        assert self.study is not None
        return {
            "nacpipe": nacpipe.__version__,
            "cache": self.cache.path,
            "fingerprint": self.study.user_attrs["fingerprint"],
            "study": self.request.where,
            "study_name": self.request.study_name,
            "space": to_json(self.space()),
        }

    def command(self) -> str:
        """Return the command that goes on."""
        given = [f"--seed {self.request.seed}"] if self.request.seed != 1 else []
        given += [f"--storage {self.request.storage}"] if self.request.storage else []
        given += [f"--study {self.request.study}"] if self.request.study != "nac" else []
        given += [f"--layers {','.join(self.request.layers)}"] if self.request.layers else []
        given += [f"--output {self.request.output}"] if self.request.output else []
        return " ".join(["nacpipe search", str(self.request.cache), f"--trials {self.request.trials}", *given])

    def _checks(self, scores: NDArray[np.float64]) -> Checks:
        split = {name: scores[rows] for name, rows in self.scorer.rows.items()}
        subtrain = split.get("id/subtrain")
        return Checks(
            val_auroc=auroc(split["id/val"], split["ood/val"]),
            val_fpr95=fpr95(split["id/val"], split["ood/val"]),
            subtrain_auroc=None if subtrain is None else auroc(split["id/val"], subtrain),
        )

    def _energy(self) -> Checks | None:
        """The same checks of Energy, where the network has logits."""
        if not has_logits(self.cache):
            return None
        return self._checks(np.concatenate([energy(self.cache[name].read("logits")) for name in self.scorer.rows]))


def trial_params(trial: FrozenTrial, layers: tuple[str, ...]) -> NacParams:
    """Return a trial's parameters as a record."""
    return NacParams(
        layers={layer: LayerParams(**{field: trial.params[f"{layer}.{field}"] for field in FIELDS}) for layer in layers}
    )


def _seconds(trials: Sequence[FrozenTrial]) -> float:
    """Wall time of all sessions: every trial carries the sum so far, so a killed session's time is not lost."""
    return max((float(trial.user_attrs.get("seconds", 0.0)) for trial in trials), default=0.0)


def _flatten(params: NacParams) -> dict[str, Any]:
    return {f"{name}.{field}": getattr(layer, field) for name, layer in params.layers.items() for field in FIELDS}


def _distributions(space: Space, published: NacParams | None) -> dict[str, BaseDistribution]:
    """What Optuna records: the space, widened to hold the published parameters too."""
    found: dict[str, BaseDistribution] = {}
    for name, layer in space.items():
        layer = layer.including(published.layers[name]) if published else layer
        found[f"{name}.bins"] = IntDistribution(*layer.bins, log=True)
        found[f"{name}.alpha"] = FloatDistribution(*layer.alpha, log=True)
        found[f"{name}.saturation"] = IntDistribution(*layer.saturation, log=True)
        found[f"{name}.weight"] = FloatDistribution(0.0, 1.0)
    return found


def _published(cache: Cache, layers: tuple[str, ...]) -> NacParams | None:
    identity = cache.header.identity
    try:
        found = published_params(str(identity.get("benchmark")), str(identity.get("family")), layers)
    except ParamsError:
        return None
    if set(found.layers) != set(layers):
        return None
    return NacParams(layers={layer: found.layers[layer] for layer in layers})


def _check_bound(request: SearchRequest, name: str, stored: Mapping[str, Any], bound: Mapping[str, Any]) -> None:
    """Refuse a study that was made from other states: its trials' values would mean nothing here."""
    if stored.get("fingerprint") in (None, bound["fingerprint"]):
        return
    differences = diff(stored.get("identity", {}), bound["identity"])
    if name != request.study_name and all(phrase.startswith("layers") for phrase in differences):
        return  # the same states, other layers: a neighbour, not a stranger
    if all(phrase.startswith("layers") for phrase in differences):
        raise StudyError(
            f"study {name} in {request.where} searches other layers of this cache: {'; '.join(differences)}."
            " Give another --study NAME"
        )
    raise StudyError(
        f"study {name} in {request.where} was made with another cache than {request.cache}:"
        f" {'; '.join(differences)}. Give another --storage FILE"
    )
