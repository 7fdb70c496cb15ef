"""The search as an Optuna study: open, go on, report.

Every evaluated combination is a trial with its parameters, value, duration and metrics. A search that is killed at any
moment loses the trial that it was computing and nothing else (runner.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from nacpipe.cache.identity import diff, fingerprint
from nacpipe.cache.options import FROM_PYTHON
from nacpipe.errors import InputError, NoValuesError, StudyError
from nacpipe.method.feature_scores import FEATURE_SCORES, FeatureScoreName
from nacpipe.method.params import NacParams
from nacpipe.method.term import layer_of
from nacpipe.method.threads import set_threads
from nacpipe.scoring.fusion import why_not_fused
from nacpipe.text import command_line, escape_bytes
from nacpipe.tuning.advice import Findings, advise
from nacpipe.tuning.objective import SUBTRAIN, Objective
from nacpipe.tuning.request import DEFAULT_TRIALS, SearchRequest, SearchResult
from nacpipe.tuning.samplers import LARGE_GRID, GridSampler, TermwiseSampler, make_sampler
from nacpipe.tuning.space import Interval, to_json
from nacpipe.tuning.space_file import NAMED
from nacpipe.tuning.storage import backend, is_there, open_storage, opening
from nacpipe.tuning.trials import best_trial, completed_trials, lone_term, pareto_front
from nacpipe.tuning.validation import DIRECTIONS, CrossValidation
from nacpipe.version import __version__

NO_FUSION = "none"  # in the record of cross-validation


class Search:
    """A study opened on its cache, ready to run (runner.py) or to be looked at."""

    def __init__(self, request: SearchRequest, *, create: bool = True) -> None:
        """Open cache and study; with `create=False` a study that is not there stays so.

        Raises:
            StudyError: the study was made with another cache, or for another search.
            CacheError: the cache is not there or not finished.
            InputError: the request makes no sense, or the sampler cannot search the space.
        """
        _check(request)
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # a trial that fails is told by the error that it raises
        set_threads(request.threads)
        self.request = request
        self.objective = Objective(  # before the study is made: a layer that tells nothing is refused here
            request.cache,
            objective=request.aim,
            space=request.space,
            layers=request.layers,
            val=request.val,
            published=(request.space, request.how) == ("paper", "layers"),
        )
        self.cache = self.objective.cache
        self._check_fusion()
        self.trials = _trials(request, self.make_sampler(0))
        self.study = self._open(create)
        self._chosen: tuple[str, ...] = ()
        """The terms of the result: those that were not tried yet are none of them."""

    def make_sampler(self, finished: int) -> BaseSampler:
        """Return the sampler of a study that has so many finished trials."""
        return make_sampler(self.request.how, self.objective, self.request.seed, finished)

    def _check_fusion(self) -> None:
        """Refuse a feature score that was asked for by name where there can be none."""
        fuse = self.request.fuse
        if fuse == "auto" or fuse == "none":
            return
        if not self.objective.fits:
            raise InputError(f'--fuse {fuse} is weighed in closed form: leave out weight, or say weight = "fit"')
        if why := why_not_fused(self.cache):
            raise InputError(f"--fuse {fuse} needs the last linear layer; {why}")
        self.objective.evaluator.standardise_fused(fuse)

    def _identity(self, terms: Collection[str]) -> dict[str, Any]:
        """The states of these terms' layers that the search reads."""
        layers = tuple(dict.fromkeys(map(layer_of, terms)))
        return self.cache.search_identity(self.objective.splits, layers)

    def _open(self, create: bool) -> optuna.Study | None:
        request = self.request
        if not create and not is_there(request.where):
            return None
        identity = self._identity(self.objective.layers)
        bound = {
            "identity": identity,
            "objective": request.aim,
            "space": to_json(self.objective.space),
            "options": request.to_json(),
            "fingerprint": fingerprint(identity),
        }
        with opening(request.where, create=create):
            return self._open_bound(bound, create)

    def _open_bound(self, bound: Mapping[str, Any], create: bool) -> optuna.Study | None:
        request = self.request
        storage = open_storage(request.where, write=create)
        names = optuna.get_all_study_names(storage)
        for name in names:
            if name == request.study_name or not backend(request.where):
                attributes = optuna.load_study(study_name=name, storage=storage).user_attrs
                _check_bound(request, name, attributes, bound)
        if request.study_name in names:
            study = optuna.load_study(study_name=request.study_name, storage=storage)
        elif create:
            study = optuna.create_study(
                study_name=request.study_name,
                storage=storage,
                directions=DIRECTIONS[request.aim],
                load_if_exists=True,
            )
        else:
            return None
        if create and "fingerprint" not in study.user_attrs:  # new, or its maker was killed before the last of these
            for key, value in {"seed": request.seed, "nacpipe": __version__, **bound}.items():
                study.set_user_attr(key, value)
        return study

    def completed(self) -> list[FrozenTrial]:
        """Return the study's completed trials, in the order of their numbers."""
        return [] if self.study is None else completed_trials(self.study)

    def result(self, ended: str) -> SearchResult:
        """Return what the study has found so far.

        Raises:
            StudyError: no trial is complete.
        """
        request, trials = self.request, self.completed()
        if self.study is None:
            raise StudyError(
                f"there is no study {request.study_name} in {request.shown} yet; start it with: {self.command()}"
            )
        if not trials:
            raise StudyError(
                f"there is no completed trial of {request.study_name} in {request.shown};"
                f" start or go on with: {self.command()}"
            )
        guide, measured = self.objective.guide, self.objective.measure_guide()
        params = self.choose(trials)
        result = SearchResult(
            params=params,
            checks=self.objective.measure(params),
            guide=guide.name if guide else None,
            guide_val=measured.val_auroc if measured else None,
            guide_subtrain=measured.subtrain_auroc if measured else None,
            cross_validated=self._cross_validated(trials),
            without_fusion=self._cross_validations(trials).get(None) if params.fused is not None else None,
            alone=self.alone(trials),
            trials=len(trials),
            seconds=session_seconds(trials),
            seed=request.seed,
            ended=ended,
            front=len(pareto_front(trials)) if request.aim == "pareto" else None,
            study=self.study,
        )
        return replace(result, advice=advise(self._findings(result, trials))) if len(trials) >= self.trials else result

    def _findings(self, result: SearchResult, trials: Sequence[FrozenTrial]) -> Findings:
        """What advice on this result depends on."""
        request, val = self.request, self.objective.val
        drawn = request.how not in ("terms", "grid")  # these two try what they planned, whatever they find
        return Findings(
            result=result,
            cache=str(request.cache),
            val=val,
            output="" if request.output is None else str(request.output),
            made_val="synthetic" in self.cache[val].images,
            python=self.cache.header.information.get("written_by") == FROM_PYTHON,
            images={name: self.cache[name].rows for name in ("id/train", "id/val", val)},
            at_edge=self._at_edge(result.params) if request.space not in (*NAMED, "published") else "",
            best_place=trials.index(best_trial(trials, request.aim)) / len(trials) if drawn else None,
            longer=self.command(trials=2 * len(trials)),
        )

    def _at_edge(self, params: NacParams) -> str:
        """The first parameter that stands at an end of its range, and where; empty where none does."""
        for name, layer in params.used().layers.items():
            for field in self.objective.space[name].free:
                dimension, value = self.objective.space[name].dimension(field, layer.source), getattr(layer, field)
                if isinstance(dimension, Interval) and dimension.ends_at(value):
                    ends = f"{dimension.low:.4g} … {dimension.high:.4g}"
                    return f"{name}.{field} is {value:.4g}, at the end of {ends} in {self.request.space}"
        return ""

    def cross_validate(self) -> None:
        """Measure how the result does on samples that it was not chosen by, and keep it with the study."""
        trials = self.completed()
        if self.study is None or self.request.how != "terms" or self._cross_validated(trials) is not None:
            return
        if measured := self.objective.cross_validate(trials, [None, *self._candidates()]):
            by_fusion = {method or NO_FUSION: one.to_json() for method, one in measured.items()}
            kept = {"trials": len(trials), "fuse": self.request.fuse, "by_fusion": by_fusion}
            self.study.set_user_attr("cross_validated", kept)

    def _candidates(self) -> list[FeatureScoreName]:
        """The feature scores that may be a member of the sum; of `auto` those that this cache has."""
        fuse = self.request.fuse
        if fuse != "auto":
            return [] if fuse == "none" else [fuse]
        if why_not_fused(self.cache) is not None:
            return []
        candidates: list[FeatureScoreName] = []
        for method in FEATURE_SCORES:
            with suppress(NoValuesError):
                self.objective.evaluator.standardise_fused(method)
                candidates.append(method)
        return candidates

    def _cross_validations(self, trials: Sequence[FrozenTrial]) -> dict[FeatureScoreName | None, CrossValidation]:
        """What was measured with so many trials, by fused score; empty where it was not, or for another `--fuse`."""
        assert self.study is not None
        kept = self.study.user_attrs.get("cross_validated", {})
        if (kept.get("trials"), kept.get("fuse")) != (len(trials), self.request.fuse):
            return {}
        return {
            None if method == NO_FUSION else method: CrossValidation(**one) for method, one in kept["by_fusion"].items()
        }

    def _cross_validated(self, trials: Sequence[FrozenTrial]) -> CrossValidation | None:
        """What was measured of the result of so many trials."""
        return self._cross_validations(trials).get(self._fused(trials))

    def _fused(self, trials: Sequence[FrozenTrial]) -> FeatureScoreName | None:
        """The feature score that is a member of the sum: the one asked for, or the best in cross-validation."""
        fuse = self.request.fuse
        if fuse != "auto":
            return None if fuse == "none" else fuse
        measured = self._cross_validations(trials)
        return max(measured, key=lambda method: measured[method].mean) if measured else None

    def choose(self, trials: Sequence[FrozenTrial]) -> NacParams:
        """Return the best trial's parameters; of terms that were tried alone, the best of each together."""
        sampler, fused = self.make_sampler(0), self._fused(trials)
        if isinstance(sampler, TermwiseSampler) and self.study is not None:
            params = sampler.together(self.study)
        else:
            params = self.objective.params(best_trial(trials, self.request.aim))
        if fused is not None:
            params = self.objective.weigh(params, fused)
        self._chosen = tuple(params.layers)
        return params

    def alone(self, trials: Sequence[FrozenTrial]) -> dict[str, float]:
        """Return term → the best validation AUROC that it reached alone, where it was tried."""
        alone: dict[str, float] = {}
        for trial in trials:
            if (name := lone_term(trial.user_attrs["weights"])) is not None:
                alone[name] = max(alone.get(name, 0.0), trial.user_attrs["val_auroc"])
        return alone

    def made_by(self) -> dict[str, Any]:
        """Return what params.json says of its making."""
        assert self.study is not None
        request = self.request
        return {
            "nacpipe": __version__,
            "cache": self.cache.path,
            "fingerprint": fingerprint(self._identity(self._chosen or self.objective.layers)),
            "study": request.shown,
            "study_name": request.study_name,
            "sampler": request.how,
            "objective": request.aim,
            "val": request.val,
            "options": request.to_json(),
            "space": to_json(self.objective.space),
        }

    def command(self, patience: int | None = None, trials: int | None = None) -> str:
        """Return the command that goes on, with more patience or trials where these are given."""
        asked, given = self.request, []
        storage = asked.shown if asked.storage else None
        for option, value, usual in (
            ("trials", trials or asked.trials, None), ("space", asked.space, "auto"), ("sampler", asked.sampler, None),
            ("objective", asked.objective, None), ("val", asked.val, "ood/val"),
            ("fuse", asked.fuse, "auto"), ("seed", asked.seed, 1),
            ("patience", patience or asked.patience, None),
            ("threads", asked.threads, None), ("storage", storage, None),
            ("study", asked.study, "nac"), ("layers", ",".join(asked.layers), ""), ("output", asked.output, None),
        ):  # fmt: skip
            given += [f"--{option}", str(value)] if value != usual else []
        return command_line("search", asked.cache, *given)


def session_seconds(trials: Sequence[FrozenTrial]) -> float:
    """Return the wall time of all sessions: every trial carries the sum so far, so a killed session's is not lost."""
    return max((float(trial.user_attrs.get("seconds", 0.0)) for trial in trials), default=0.0)


def _check(request: SearchRequest) -> None:
    for name, value in (("trials", request.trials), ("patience", request.patience)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    assert request.where and request.target  # or refused: of a cache at a URL both must be given
    if request.timeout is not None and not request.timeout > 0:  # nor NaN
        raise InputError(f"timeout is {request.timeout}; it must be above 0 seconds")
    if "/" in request.study or escape_bytes(request.study) != request.study:
        raise InputError(f"study is {request.study!r}; a name must be UTF-8 without a / in it")
    if request.space == "published" and request.how != "grid":
        raise InputError(f"the published space is a grid; leave out --sampler {request.sampler}")


def _trials(request: SearchRequest, sampler: BaseSampler) -> int:
    """How many completed trials the study shall have."""
    size = sampler.size if isinstance(sampler, GridSampler) else None
    if request.trials is not None:
        return min(request.trials, size or request.trials)
    if size is not None and size > LARGE_GRID:
        raise InputError(f"the grid has {size} combinations; say how many to try with --trials N")
    return sampler.opening if isinstance(sampler, TermwiseSampler) else size or DEFAULT_TRIALS


def _what(identity: Mapping[str, Any]) -> str:
    layers, splits = (", ".join(identity.get(key, ())) for key in ("layers", "splits"))
    return f"{layers} ({splits})"


def _chosen_by(identity: Mapping[str, Any]) -> dict[str, Any]:
    """A study's identity; of an earlier nacpipe without the split that nothing is chosen by."""
    return {**identity, "splits": {k: v for k, v in identity.get("splits", {}).items() if k != SUBTRAIN}}


def _shared(identity: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """An identity with those layers and splits alone that the other has too."""
    held = {key: other.get(key, {}) for key in ("layers", "splits")}
    return {**identity, **{key: {k: v for k, v in identity.get(key, {}).items() if k in held[key]} for key in held}}


def _check_bound(request: SearchRequest, name: str, stored: Mapping[str, Any], bound: Mapping[str, Any]) -> None:
    """Refuse a study of other states or other ranges: its trials' values would mean nothing here."""
    if stored.get("fingerprint") is None:
        return
    theirs, ours = _chosen_by(stored.get("identity", {})), bound["identity"]
    if differences := diff(_shared(theirs, ours), _shared(ours, theirs)):
        raise StudyError(
            f"study {name} in {request.shown} was made with another cache than {request.cache}:"
            f" {'; '.join(differences)}. Give another --storage FILE"
        )
    if name != request.study_name:
        return  # the same states, perhaps other layers or validation splits: a neighbour
    if diff(theirs, ours):
        raise StudyError(
            f"study {name} in {request.shown} searches {_what(theirs)} of this cache, not {_what(ours)}."
            " Give another --study NAME"
        )
    if stored.get("objective", request.aim) != request.aim:
        raise StudyError(
            f"study {name} in {request.shown} searches for {stored['objective']}, not {request.aim}. Give another"
            " --study NAME"
        )
    if "options" not in stored:
        raise StudyError(
            f"study {name} in {request.shown} was made by an earlier nacpipe; give another --study NAME, or remove it"
        )
    if moved := diff(stored.get("space", {}), bound["space"]):
        raise StudyError(
            f"study {name} in {request.shown} searches another space: {'; '.join(moved)}. Give another --study NAME"
        )
