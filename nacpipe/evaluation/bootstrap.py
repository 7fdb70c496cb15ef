"""How sure a table is: bootstrap intervals, and whether two methods differ by more than chance.

ID images and those of every OOD set are drawn again with replacement, as many as there are. A set's draw number b is
the same for every method, run and cell of a task, so differences between methods are paired, and a group's mean is of
one draw; the full spectrum draws id/test and csid as one set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nacpipe.errors import InputError
from nacpipe.evaluation.method_scores import ScoredCache
from nacpipe.evaluation.tables import KEYS, describe_methods, tabulate
from nacpipe.method.resampling import draw_counts, rank_scores, redetect
from nacpipe.text import label_set

LEVEL = 0.95
RESAMPLES = 1000
MEASURED = ("fpr95", "auroc")  # what intervals are given for

Cell = tuple[str, ...]  # task, group, dataset, method
Draws = Mapping[Cell, NDArray[np.float64]]  # (resamples, 2): FPR@95, AUROC


def add_confidence(
    frame: pd.DataFrame,
    runs: Sequence[ScoredCache],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 1,
) -> pd.DataFrame:
    """Return a table with fpr95_low, fpr95_high, auroc_low, auroc_high, confidence and resamples.

    Percentile intervals over redrawn images. Of several runs they are for the mean over runs: how far the runs lie
    apart is in `*_std`.

    Args:
        frame: `tabulate(runs)`.
        runs: what it was made from.
        level: the share of draws inside the interval, between 0 and 1.
        resamples: how often the images are drawn.
        seed: of the draws.

    Raises:
        InputError: level or resamples is out of range.
    """
    draws = _draw(runs, list(runs[0].methods), level, resamples, seed)
    ends = np.array([_interval(draws[cell], level) for cell in frame[list(KEYS)].itertuples(index=False, name=None)])
    bounds = {
        f"{metric}_{end}": ends[:, i, j] for j, metric in enumerate(MEASURED) for i, end in enumerate(("low", "high"))
    }
    whole = frame.assign(**bounds, confidence=level, resamples=resamples)
    whole.attrs = dict(frame.attrs)
    return whole


def compare_methods(
    runs: Sequence[ScoredCache],
    first: str,
    second: str,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 1,
) -> pd.DataFrame:
    """Return how two methods differ on the same images, one row per task, set (or mean) and metric (fpr95, auroc).

    Columns: task, group, dataset, metric, first, second (their names), first_value, second_value, difference (first −
    second), low, high (a paired bootstrap interval of the difference), confidence, resamples, more_than_chance (whether
    0 lies outside the interval; None for an empty cell), reason, parameters (what NAC is here). All values are
    fractions. At a level of 0.95, one in twenty rows of two equal methods would be called more than chance: look at the
    means first.

    Raises:
        InputError: a name is not among the methods, or level or resamples is out of range.
    """
    for name in (first, second):
        if name not in runs[0].methods:
            raise InputError(f"method {name!r} was not evaluated; there are {', '.join(runs[0].methods)}")
    pair = [replace(run, methods={name: run.methods[name] for name in (first, second)}) for run in runs]
    draws = _draw(pair, [first, second], level, resamples, seed)
    whole = tabulate(pair)
    table = whole.set_index(list(KEYS))
    rows: list[dict[str, Any]] = []
    for task, group, dataset in dict.fromkeys(cell[:3] for cell in draws):
        a, b = (table.loc[(task, group, dataset, name)] for name in (first, second))
        low, high = _interval(draws[task, group, dataset, first] - draws[task, group, dataset, second], level)
        reason = "; ".join(dict.fromkeys(text for text in (a["reason"], b["reason"]) if text))
        for place, metric in enumerate(MEASURED):
            row: dict[str, Any] = {
                "task": task,
                "group": group,
                "dataset": dataset,
                "metric": metric,
                "first": first,
                "second": second,
            }
            row |= {"first_value": a[metric], "second_value": b[metric], "difference": a[metric] - b[metric]}
            row |= {"low": low[place], "high": high[place], "confidence": level, "resamples": resamples}
            chance = None if np.isnan(low[place]) else bool(low[place] <= 0 <= high[place])
            few = f"fewer than {least_images(level)} images say nothing" if chance is None and not reason else ""
            rows.append(row | {"more_than_chance": None if chance is None else not chance, "reason": reason or few})
    frame = pd.DataFrame(rows)
    frame["parameters"] = "; ".join(f"{name}: {text}" for name, text in describe_methods(runs).items())
    frame.attrs = dict(whole.attrs)
    return frame


def compare_with_best(
    runs: Sequence[ScoredCache],
    first: str,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 1,
) -> pd.DataFrame:
    """Return how a method differs from the best other one, which these test sets pick: `compare_methods`' columns.

    Of every task and group the method with the highest mean AUROC is `second`; rows of other parameters of NAC are no
    candidates. `among` is the number of methods that it was picked from. Intervals hold for the differences to all of
    them at once (`simultaneous_intervals`), and so for the picked one, however it was picked.

    Raises:
        InputError: there is no other method with a mean, or level or resamples is out of range.
    """
    others = [name for name in runs[0].methods if not name.startswith("NAC")]
    draws = _draw(runs, [first, *others], level, resamples, seed)
    table = tabulate(runs)
    values = table.set_index(list(KEYS)).sort_index()
    parts = []
    for task, group in dict.fromkeys(cell[:2] for cell in draws):
        means = values.loc[task, group, "mean"]["auroc"].reindex(others).dropna()
        if means.empty:
            continue
        picked = str(means.idxmax())
        pair = compare_methods(runs, first, picked, level=level, resamples=1, seed=seed)
        part = pair[(pair["task"] == task) & (pair["group"] == group)].assign(among=len(means), resamples=resamples)
        for row in part.index:
            dataset, metric = part.at[row, "dataset"], part.at[row, "metric"]
            place = MEASURED.index(str(metric))
            cells = [(str(task), str(group), str(dataset), name) for name in means.index]
            own = draws[task, group, str(dataset), first][:, place]
            drawn = np.stack([own - draws[cell][:, place] for cell in cells], axis=1)
            observed = np.array(
                [values.loc[(task, group, dataset, first), metric] - values.loc[c, metric] for c in cells]
            )
            low, high = simultaneous_intervals(observed, drawn, level)[list(means.index).index(picked)]
            part.loc[row, ["low", "high"]] = low, high
            part.at[row, "more_than_chance"] = None if np.isnan(low) else not low <= 0 <= high
        parts.append(part)
    if not parts:
        raise InputError("--against best: no other method has a mean; add some with: --baselines all")
    frame = pd.concat(parts, ignore_index=True)
    frame.attrs = dict(table.attrs)
    return frame


def name_second(rows: pd.DataFrame) -> str:
    """Return what a task's comparison is with: `GEN`, or `the best of 30 (GEN near, KNN far)`."""
    if "among" not in rows:
        return str(rows["second"].iloc[0])
    picked = rows.drop_duplicates("group")
    return (
        f"the best of {picked['among'].max()} ({', '.join(f'{row.second} {row.group}' for row in picked.itertuples())})"
    )


PICKED = "the best was picked by its mean AUROC on these test sets; intervals hold for the differences to all at once"


def simultaneous_intervals(
    observed: NDArray[np.float64],  # (differences,)
    draws: NDArray[np.float64],  # (resamples, differences)
    level: float,
) -> NDArray[np.float64]:
    """Return intervals that hold all differences together at a level, (differences, 2).

    Each is observed ± c · deviation of its draws; c is the level's quantile of a draw's greatest |draw − observed| /
    deviation (single-step and studentised: Romano and Wolf 2005, Stepwise Multiple Testing as Formalized Data Snooping,
    Econometrica 73(4), 1237-1282). A difference that never moves counts for nothing. NaN where a draw is.
    """
    spread = draws.std(axis=0)
    moved = spread > 0
    distance = np.abs(draws - observed)[:, moved] / spread[moved]
    factor = float(np.quantile(distance.max(axis=1), level)) if moved.any() else 0.0
    return np.stack([observed - factor * spread, observed + factor * spread], axis=1)


def _draw(runs: Sequence[ScoredCache], methods: list[str], level: float, resamples: int, seed: int) -> Draws:
    """Return every cell's metrics for every draw, means over runs; NaN where a method has no scores."""
    if not 0 < level < 1:
        raise InputError(f"confidence is {level}; it must lie between 0 and 1")
    if resamples < 1:
        raise InputError(f"resamples is {resamples}; it must be at least 1")
    found: dict[Cell, NDArray[np.float64]] = {}
    for task, id_splits in runs[0].tasks().items():
        for group in ("near", "far"):
            sets = [name for name in runs[0].ood_sets() if name.startswith(f"ood/{group}/")]
            drawn = {name: _draw_set(runs, methods, id_splits, name, level, resamples, seed) for name in sets}
            for place, method in enumerate(methods):
                for name, values in drawn.items():
                    found[task, group, label_set(name), method] = values[:, place]
            for place, method in enumerate(methods):
                if sets:
                    found[task, group, "mean", method] = np.mean(
                        [values[:, place] for values in drawn.values()], axis=0
                    )
    return found


def _draw_set(
    runs: Sequence[ScoredCache],
    methods: list[str],
    id_splits: list[str],
    ood: str,
    level: float,
    resamples: int,
    seed: int,
) -> NDArray[np.float64]:
    """One OOD set's metrics, (resamples, methods, 2), means over runs."""
    ranks = {}  # of one set at a time: 4 bytes per image, method and run
    for place, method in enumerate(methods):
        for number, run in enumerate(runs):
            scored = run.methods[method]
            if not {*id_splits, ood} & set(scored.reasons):
                inside = np.concatenate([scored.scores[split] for split in id_splits])
                ranks[place, number] = rank_scores(inside, scored.scores[ood])
    n_id, n_ood = sum(runs[0].rows[split] for split in id_splits), runs[0].rows[ood]
    values = np.full((resamples, len(methods), len(runs), 2), np.nan)
    if min(n_id, n_ood) < least_images(level):
        return np.asarray(values.mean(axis=2))
    for draw in range(resamples):
        id_counts = draw_counts(n_id, "+".join(id_splits), draw, seed)
        ood_counts = draw_counts(n_ood, ood, draw, seed)
        for (place, number), (id_ranks, ood_ranks) in ranks.items():
            values[draw, place, number] = redetect(id_ranks, ood_ranks, id_counts, ood_counts)
    return np.asarray(values.mean(axis=2))


def least_images(level: float) -> int:
    """Return of how many images of either side an interval of this level is given: the sign test's smallest sample.

    n images that all speak for one method have p = 2 · 2⁻ⁿ, which is no more than 1 − level from here on: 6 for 0.95.
    One image drawn again is itself: the interval would have no width, whatever the image.
    """
    return math.ceil(round(1 - math.log2(1 - level), 9))


def _interval(draws: NDArray[np.float64], level: float) -> NDArray[np.float64]:
    """The percentile interval of (resamples, 2): low and high ends, (2, 2)."""
    return np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
