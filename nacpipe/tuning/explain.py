"""What mattered in a study: parameters, layers, and how it went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.trial import FrozenTrial

from nacpipe.errors import StudyError
from nacpipe.method.feature_scores import FusedScore
from nacpipe.method.params import NacParams
from nacpipe.tuning.space import Choice, Interval, LayerSpace
from nacpipe.tuning.study import Search
from nacpipe.tuning.validation import SHOWN, ObjectiveName

FEW = 20  # trials from which importances are worth a look
WIDTH, HEIGHT = 72, 12  # of the picture, in characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Three frames and a picture."""

    parameters: pd.DataFrame
    """layer, parameter, value (the best trial's), importance (share), low, high, choices, place (in the range, 0 … 1),
    at_edge; of what is searched.
    """
    layers: pd.DataFrame
    """layer, weight, alone (best validation AUROC with all the weight), without (AUROC when it is left out); the last
    row is the fused score's, if there is one.
    """
    history: pd.DataFrame
    """number, phase, value, best (so far)."""
    objective: ObjectiveName
    fused: FusedScore | None = None
    """The feature score in the sum."""

    @property
    def maximize(self) -> bool:
        """Return whether larger values are better."""
        return self.objective != "fpr95"

    def to_json(self) -> dict[str, Any]:
        """Return the frames as lists of records; NaN as null."""
        return {
            name: frame.astype(object).where(frame.notna(), None).to_dict("records")
            for name, frame in (("parameters", self.parameters), ("layers", self.layers), ("history", self.history))
        }

    def picture(self) -> str:
        """Return the history as a picture in text: the best trial of every column, and the best so far."""
        values, best = self.history["value"].to_numpy(float), self.history["best"].to_numpy(float)
        columns = np.array_split(np.arange(values.size), min(WIDTH, values.size))
        pick = np.max if self.maximize else np.min
        tops = np.array([pick(values[part]) for part in columns])
        line = np.array([best[part[-1]] for part in columns])
        seen = np.concatenate([tops, line])
        low, high = np.quantile(seen, [0.1, 1.0] if self.maximize else [0.0, 0.9]).tolist()  # failures lie far off
        if high == low:
            low = float(seen.min()) if self.maximize else low
            high = high if self.maximize else float(seen.max())
        rows = [[" "] * len(columns) for _ in range(HEIGHT)]
        for column, (top, reached) in enumerate(zip(tops, line, strict=True)):
            for value, mark in ((top, "·"), (reached, "━")):
                place = min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.5
                rows[HEIGHT - 1 - round(place * (HEIGHT - 1))][column] = mark
        over, under = (mark if beyond else "" for mark, beyond in (("≥", seen.max() > high), ("≤", seen.min() < low)))
        ends = [f"{f'{mark}{100 * value:.2f}':>7}" for mark, value in ((over, high), (under, low))]
        labels = [ends[0], *[" " * 7] * (HEIGHT - 2), ends[1]]
        drawn = [f"{label} ┤{''.join(row)}".rstrip() for label, row in zip(labels, rows, strict=True)]
        last = int(self.history["number"].iloc[-1])
        foot = f"{'':7} └{'─' * len(columns)}\n{'':9}0{f'trial {last}':>{max(len(columns) - 1, 1)}}"
        return "\n".join([*drawn, foot, f"{'':9}━ best so far   · best of the column: {SHOWN[self.objective]}, %"])


def explain(search: Search) -> Explanation:
    """Return what mattered in a study.

    Importances are Optuna's PED-ANOVA: how unlike the values of a parameter among the best tenth of the trials are to
    those among all. They say what this study's trials show, and a search that keeps to good values shows less.

    Raises:
        StudyError: no trial is complete.
    """
    trials = search.completed()
    objective = search.request.aim
    if search.study is None or not trials:
        raise StudyError(f"there is no completed trial to explain; start with: {search.command()}")
    history = pd.DataFrame(
        {
            "number": [trial.number for trial in trials],
            "phase": [str(trial.user_attrs.get("phase", "")) for trial in trials],
            "value": [_value(trial) for trial in trials],
        }
    )
    history["best"] = history["value"].cummin() if objective == "fpr95" else history["value"].cummax()
    params = search.choose(trials)
    return Explanation(
        parameters=_parameters(search, trials, params),
        layers=_layers(search, trials, params),
        history=history,
        objective=objective,
        fused=params.fused,
    )


def _value(trial: FrozenTrial) -> float:
    """The objective's value, of two the first."""
    return float((trial.values or [0.0])[0])


def _parameters(search: Search, trials: Sequence[FrozenTrial], params: NacParams) -> pd.DataFrame:
    importances = _importances(search, trials)
    rows = []
    for name, layer in params.layers.items():
        for field in _searched(search.objective.space[name]):
            value, dimension = getattr(layer, field), search.objective.space[name].dimension(field, layer.source)
            choices = ", ".join(map(str, dimension.values)) if isinstance(dimension, Choice) else ""
            low = high = place = np.nan
            at_edge = False
            if isinstance(dimension, Interval):
                low, high, place = dimension.low, dimension.high, dimension.unit(value)
                at_edge = dimension.ends_at(value)
            importance = importances.get(f"{name}.{field}", np.nan)
            rows.append((name, field, value, importance, low, high, choices, place, at_edge))
    columns = ["layer", "parameter", "value", "importance", "low", "high", "choices", "place", "at_edge"]
    frame = pd.DataFrame(rows, columns=columns)
    frame["value"] = pd.Series([row[2] for row in rows], dtype=object)  # whole numbers stay whole
    return frame


def _searched(layer: LayerSpace) -> list[str]:
    """The fields of a layer that take more than one value; a weight in closed form is a result, not a parameter."""
    return [*layer.free, *(["weight"] if layer.weight is not None and layer.weight.free else [])]


def _importances(search: Search, trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """Parameter → its share; where terms were tried alone, among that term's trials and parameters."""
    groups: dict[tuple[str, ...], list[FrozenTrial]] = {}
    for trial in trials:
        groups.setdefault(tuple(trial.user_attrs["weights"]), []).append(trial)
    shares: dict[str, float] = {}
    for terms, of_terms in sorted(groups.items(), key=lambda item: -len(item[0])):
        names = [f"{name}.{field}" for name in terms for field in _searched(search.objective.space[name])]
        shares |= _importances_of(search, of_terms, names)
    return shares


def _importances_of(search: Search, trials: Sequence[FrozenTrial], names: list[str]) -> dict[str, float]:
    """Parameter → its share; empty where there are too few trials, or all are equally good."""
    if len(trials) < FEW or not names:
        return {}
    sign = -1.0 if search.request.aim == "fpr95" else 1.0
    if len({_value(trial) for trial in trials}) == 1:
        return {}
    ours = optuna.create_study(direction="maximize")  # without others' trials, with one value each
    for trial in trials:
        ours.add_trial(
            optuna.trial.create_trial(
                value=sign * _value(trial), params=trial.params, distributions=trial.distributions
            )
        )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return dict(optuna.importance.get_param_importances(ours, evaluator=evaluator, params=names))


def _layers(search: Search, trials: Sequence[FrozenTrial], params: NacParams) -> pd.DataFrame:
    alone = search.alone(trials)
    rows = []
    for name, layer in params.layers.items():
        others = {other: p for other, p in params.layers.items() if other != name}
        without = np.nan
        if any(p.weight > 0 for p in others.values()):
            without_it = NacParams(layers=others)
            fused = None if params.fused is None else params.fused.method
            weighed = search.objective.weigh(without_it, fused) if search.objective.fits else without_it
            without = search.objective.measure(weighed).val_auroc
        rows.append({"layer": name, "weight": layer.weight, "alone": alone.get(name, np.nan), "without": without})
    if (member := params.fused) is not None:
        evaluator = search.objective.evaluator
        scores = evaluator.standardise_fused(member.method)[1]
        coverage = search.objective.measure(search.objective.weigh(NacParams(layers=params.layers)))
        reached = {"alone": evaluator.check(scores).val_auroc, "without": coverage.val_auroc}
        rows.append({"layer": member.method, "weight": member.weight, **reached})
    return pd.DataFrame(rows, columns=["layer", "weight", "alone", "without"])
