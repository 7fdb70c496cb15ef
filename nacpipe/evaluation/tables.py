"""Scores → tables: per set and on the means, over runs as mean ± standard deviation, and the ranks of methods.

A row is one task, OOD set (or a group's mean) and method. A cell that cannot be computed is NaN and its row's `reason`
says why; a mean over sets of which one is empty is empty too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nacpipe.cache import Cache, as_cache
from nacpipe.evaluation.flagged import find_flagged
from nacpipe.evaluation.method_scores import MethodScores, ScoredCache, score_cache
from nacpipe.evaluation.published_results import NETWORKS, published_results
from nacpipe.evaluation.training_runs import check_runs
from nacpipe.method.metrics import detect
from nacpipe.method.params import NacParams
from nacpipe.scoring.params_summary import describe_params
from nacpipe.text import label_set

KEYS = ("task", "group", "dataset", "method")
METRICS = ("fpr95", "auroc", "aupr_in", "aupr_out")
COLUMNS = (*KEYS, *METRICS, "accuracy", "n_id", "n_ood", "fitted_on", "n_fitted", "reason", "parameters")


def tabulate(runs: Sequence[ScoredCache]) -> pd.DataFrame:
    """Return the table of one cache, or of several training runs: means, and `*_std` with ddof 0 as OpenOOD has it.

    Columns: task (ood, fsood), group (near, far), dataset (a set's name or "mean"), method, fpr95, auroc, aupr_in,
    aupr_out, accuracy (of the network on the task's ID samples), n_id, n_ood, fitted_on (the split that the method
    learned from; empty for none), n_fitted (images), reason (why metrics are empty), parameters (what NAC is here, in
    rows of NAC). Of several runs: `runs` and a `_std` beside each metric and the accuracy; a group's mean is taken per
    run, so its deviation is that of the means. All metrics are fractions. `attrs` holds the `note` of the caches, their
    `benchmark`, `sources`, a line of each on where its parameters are from, and `flagged`, what NAC's detector flags
    (`flagged.find_flagged`).
    """
    tables = [pd.DataFrame(_rows(run), columns=list(COLUMNS)) for run in runs]
    frame = tables[0] if len(tables) == 1 else _over_runs(tables, [run.path for run in runs])
    if notes := [run.note if len(runs) == 1 else f"{run.path}: {run.note}" for run in runs if run.note]:
        frame.attrs["note"] = ". ".join(notes)
    frame.attrs |= find_flagged(runs)
    frame.attrs["benchmark"] = runs[0].benchmark
    frame.attrs["sources"] = [
        f"{run.path}: " + "; ".join(f"{name}: {one.describe_source()}" for name, one in run.parameters.items())
        for run in runs
        if run.parameters
    ]
    described = describe_methods(runs)
    frame["parameters"] = [described.get(method, "") for method in frame["method"]]
    return frame


def describe_methods(runs: Sequence[ScoredCache]) -> dict[str, str]:
    """Return method → what it is under its parameters, of the methods that have some: NAC, NAC (published), …."""
    return {name: describe_params([run.parameters[name] for run in runs]) for name in runs[0].parameters}


def _rows(run: ScoredCache) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for task, id_splits in run.tasks().items():
        n_id = sum(run.rows[split] for split in id_splits)
        classified = all(split in run.correct for split in id_splits)
        accuracy = sum(run.correct[split] for split in id_splits) / n_id if classified else math.nan
        for group in ("near", "far"):
            sets = [name for name in run.ood_sets() if name.startswith(f"ood/{group}/")]
            cells = {name: [_cell(method, id_splits, split) for split in sets] for name, method in run.methods.items()}
            lines = [(name, *line) for name, values in cells.items() for line in zip(sets, values, strict=True)]
            lines += [(name, "mean", _mean(values, sets)) for name, values in cells.items() if sets]
            for name, dataset, cell in lines:
                label = dataset if dataset == "mean" else label_set(dataset)
                row = {"task": task, "group": group, "dataset": label, "method": name, **cell}
                n_ood = sum(run.rows[split] for split in (sets if dataset == "mean" else [dataset]))
                row |= {"accuracy": accuracy, "n_id": n_id, "n_ood": n_ood}
                method = run.methods[name]
                rows.append(row | {"fitted_on": method.fitted_on, "n_fitted": method.n_fitted, "parameters": ""})
    return rows


def _cell(method: MethodScores, id_splits: list[str], ood_split: str) -> dict[str, Any]:
    """Metrics and reason of one method on one set."""
    for split in (*id_splits, ood_split):
        if split in method.reasons:
            return {**dict.fromkeys(METRICS, math.nan), "reason": method.reasons[split]}
    inside = np.concatenate([method.scores[split] for split in id_splits])
    return {**asdict(detect(inside, method.scores[ood_split])), "reason": ""}


def _mean(cells: list[dict[str, Any]], sets: list[str]) -> dict[str, Any]:
    """The unweighted mean over a group's sets."""
    reasons = [f"{label_set(name)}: {c['reason']}" for name, c in zip(sets, cells, strict=True) if c["reason"]]
    distinct = {cell["reason"] for cell in cells}
    reason = distinct.pop() if len(distinct) == 1 else "; ".join(reasons)
    return {**{metric: sum(cell[metric] for cell in cells) / len(cells) for metric in METRICS}, "reason": reason}


def _over_runs(tables: list[pd.DataFrame], paths: list[str]) -> pd.DataFrame:
    frame = tables[0].copy()
    for metric in (*METRICS, "accuracy"):
        values = np.stack([table[metric].to_numpy() for table in tables])  # (runs, rows)
        frame[metric] = values.mean(axis=0)
        frame[f"{metric}_std"] = values.std(axis=0, ddof=0)
    reasons = []
    for row in range(len(frame)):
        by_path = {path: table["reason"].iloc[row] for path, table in zip(paths, tables, strict=True)}
        distinct = set(by_path.values())
        joined = "; ".join(f"{path}: {reason}" for path, reason in by_path.items() if reason)
        reasons.append(distinct.pop() if len(distinct) == 1 else joined)
    frame["reason"] = reasons
    frame["n_fitted"] = np.stack([table["n_fitted"].to_numpy() for table in tables]).min(axis=0)
    frame["runs"] = len(tables)
    spread = [f"{metric}_std" for metric in (*METRICS, "accuracy")]
    return frame[[*KEYS, *METRICS, "accuracy", *spread, "runs", *COLUMNS[len(KEYS) + len(METRICS) + 1 :]]]


def add_published(frame: pd.DataFrame, benchmark: str) -> pd.DataFrame:
    """Return the table with the published results below, told apart by a column `source` (measured, published).

    Published rows hold the numbers printed in the papers alone; they are of other weights and images, and `verdicts`
    does not rank them.

    Raises:
        InputError: none are known for this benchmark.
    """
    rows = [asdict(result) for result in published_results(benchmark)]
    columns = {
        "task": "ood",
        "fitted_on": "",
        "parameters": "",
        "reason": f"published, {NETWORKS[benchmark]}",
        "source": "published",
    }
    published = pd.DataFrame(rows).astype(dict.fromkeys(("fpr95", "fpr95_std", "auroc_std"), float)).assign(**columns)
    whole = pd.concat([frame.assign(source="measured"), published])
    for column in ("n_id", "n_ood", "n_fitted", "runs"):
        if column in whole:
            whole[column] = whole[column].astype("Int64")  # not a float because one is missing
    spread = [c for c in ("fpr95_std", "auroc_std") if c not in frame]
    whole = whole[[*frame.columns, *spread, "source"]].reset_index(drop=True)
    whole.attrs = dict(frame.attrs)
    return whole


def verdicts(frame: pd.DataFrame) -> list[str]:
    """Return one sentence per task and group: the rank of NAC, or else of the best method, by mean AUROC."""
    sentences = []
    measured = measured_rows(frame)
    for (task, group), rows in measured[measured["dataset"] == "mean"].groupby(["task", "group"], sort=False):
        ranked = rows[rows["auroc"].notna()].sort_values("auroc", ascending=False, kind="stable")
        if ranked.empty:
            continue
        where = f"{group}-OOD" if task == "ood" else f"{group}-OOD, full spectrum"
        values = ranked["auroc"].to_numpy()
        names = ranked["method"].tolist()
        place = next((i for i, name in enumerate(names) if name.startswith("NAC")), 0)
        rank = int((values > values[place]).sum()) + 1
        shared = "shares" if int((values == values[place]).sum()) > 1 else "ranks"
        text = f"{where}: {names[place]} {shared} {ordinal(rank)} of {len(names)} by AUROC, {100 * values[place]:.2f} %"
        if len(names) > 1:
            other = 0 if place else 1
            text += f" ({names[other]} {100 * values[other]:.2f} %)"
        sentences.append(text)
    return sentences


def measured_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table's rows without the published ones, which are of other weights and images."""
    return frame if "source" not in frame else frame[frame["source"] == "measured"]


def ordinal(rank: int) -> str:
    """1 → first, 2 → second, 3 → third, 4 → 4th, …."""
    words = {1: "first", 2: "second", 3: "third"}
    ending = {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th") if rank % 100 not in (11, 12, 13) else "th"
    return words.get(rank, f"{rank}{ending}")


def parameter_lines(frame: pd.DataFrame) -> list[str]:
    """Return what NAC is in this table or comparison, `NAC: 45 terms of 8 layers, …`; a line for each text."""
    if "parameters" not in frame:
        return []  # made by hand
    rows = frame[frame["parameters"] != ""].drop_duplicates("parameters")
    return [
        f"{row['method']}: {row['parameters']}" if "method" in row else row["parameters"] for _, row in rows.iterrows()
    ]


def footnotes(frame: pd.DataFrame) -> list[str]:
    """Return what each method was fitted on, and why cells are empty, one line each."""
    measured = measured_rows(frame)
    methods_by_split: dict[str, list[str]] = {}
    for row in measured.drop_duplicates("method").itertuples():
        if row.n_fitted:
            methods_by_split.setdefault(f"{row.fitted_on} ({row.n_fitted} images)", []).append(row.method)
    lines = [f"fitted on {split}: {', '.join(methods)}" for split, methods in methods_by_split.items()]
    methods_by_reason: dict[str, list[str]] = {}
    for row in measured[(measured["reason"] != "") & (measured["dataset"] != "mean")].itertuples():
        methods = methods_by_reason.setdefault(row.reason, [])
        if row.method not in methods:
            methods.append(row.method)
    return lines + [f"empty: {', '.join(methods)}: {reason}" for reason, methods in methods_by_reason.items()]


def evaluate(
    cache: Cache | str | Path, params: NacParams | None, *, more: Mapping[str, MethodScores] | None = None
) -> pd.DataFrame:
    """Return one row per task, OOD set and method, and one per group's mean; `tables.tabulate` names the columns.

    Where the network gives features and not logits (CIDER, NPOS), metrics of methods that need logits are NaN, and
    `reason` says why.

    Args:
        cache: a cache with id/test and at least one finished near or far set, or its path or URL.
        params: NAC's parameters; None evaluates the baselines alone.
        more: further methods, as `nacpipe.evaluation.baselines.score_baselines` gives them.

    Raises:
        InputError: there is nothing to evaluate.
        ParamsError: a layer is not in the cache.
    """
    return tabulate([score_cache(as_cache(cache), params, more=more)])


def evaluate_runs(caches: Sequence[Cache], params: Sequence[NacParams | None]) -> pd.DataFrame:
    """Return the table of several training runs: means, and standard deviations (ddof 0) in columns `*_std`.

    Args:
        caches: the same in everything but the weights.
        params: of each cache.

    Raises:
        IdentityError: the caches differ in more than their weights, naming what.
        InputError: there is nothing to evaluate.
        ParamsError: a layer is not in a cache.
    """
    check_runs(caches)
    return tabulate([score_cache(cache, chosen) for cache, chosen in zip(caches, params, strict=True)])
