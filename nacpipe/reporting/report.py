"""One page about one cache, or about several training runs: how good NAC is, and why.

read_cache_report ──▶ draw_cache_report ──▶ render_report
cache → numbers        → figures             → HTML (page.py)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nacpipe.cache import Cache
from nacpipe.evaluation.inspection import summarise_cache
from nacpipe.evaluation.method_scores import MethodScores, ScoredCache, score_cache
from nacpipe.evaluation.tables import footnotes, verdicts
from nacpipe.method.metrics import Scores, auroc, detect
from nacpipe.method.params import NacParams
from nacpipe.method.plain_scores import energy
from nacpipe.reporting.figures import (
    draw_coverage,
    draw_histogram,
    draw_history,
    draw_importances,
    draw_roc,
    draw_weights,
    to_svg,
)
from nacpipe.reporting.page import commands, heading, panels, paragraph, render_page, side_by_side, table
from nacpipe.reporting.past import PastStudy, find_study
from nacpipe.scoring.coverage import Coverage, fit_coverage
from nacpipe.scoring.states import has_logits
from nacpipe.tuning.request import OVERFIT_POINTS

OTHER_CURVES = 5  # beside NAC's, in a figure
TASKS = {"ood": "OOD detection: ID is id/test", "fsood": "Full spectrum: ID is id/test and csid together"}
PAIRS = (("fpr95", "auroc"), ("aupr_in", "aupr_out"))
NAMES = {"fpr95": "FPR@95 ↓", "auroc": "AUROC ↑", "aupr_in": "AUPR-IN ↑", "aupr_out": "AUPR-OUT ↑"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """What a report shows of one cache."""

    cache: Cache
    run: ScoredCache
    """The cache scored by NAC under `params`, by the plain baselines, and by others that were asked for."""
    params: NacParams
    coverage: Coverage
    """Fitted under `params`."""
    overfitting: pd.DataFrame
    """`check_overfitting`'s frame."""
    study: PastStudy
    """The study that found `params`."""


def read_cache_report(
    cache: Cache,
    params: NacParams,
    *,
    more: Mapping[str, MethodScores] | None = None,
    choice: str | None = None,
) -> CacheReport:
    """Score a cache and gather what a report shows of it; each array of the cache is read once.

    Args:
        cache: a cache with id/test and at least one finished near or far set.
        params: NAC's parameters.
        more: further methods that have scored the cache, as `score_cache` takes them.
        choice: where the parameters are from, as `params_file.find_params` takes it: it leads to their study.

    Raises:
        InputError: there is nothing to evaluate.
        ParamsError: a layer is not in the cache.
    """
    coverage = fit_coverage(cache, params)
    return CacheReport(
        cache=cache,
        run=score_cache(cache, coverage, more=more),
        params=params,
        coverage=coverage,
        overfitting=check_overfitting(cache, coverage),
        study=find_study(cache, choice),
    )


def check_overfitting(cache: Cache, coverage: Coverage) -> pd.DataFrame:
    """Return one row for NAC and, where there are logits, one for Energy: how well they tell id/val from …

    Columns: method, val_auroc and val_fpr95 (from ood/val), subtrain_auroc (from id/subtrain; 0.5 is the ideal).
    A split that the cache does not hold, or not finished, is NaN.
    """
    names = ("id/val", "ood/val", "id/subtrain")
    splits = {name: cache[name] for name in names if name in cache and cache.peek(name).sealed}
    methods = {"NAC": {name: coverage.score(split) for name, split in splits.items()}}
    if has_logits(cache):
        methods["Energy"] = {name: energy(split.read("logits")) for name, split in splits.items()}
    rows = []
    for method, scores in methods.items():
        row = dict.fromkeys(("val_auroc", "val_fpr95", "subtrain_auroc"), math.nan)
        if {"id/val", "ood/val"} <= scores.keys():
            detection = detect(scores["id/val"], scores["ood/val"])
            row |= {"val_auroc": detection.auroc, "val_fpr95": detection.fpr95}
        if {"id/val", "id/subtrain"} <= scores.keys():
            row["subtrain_auroc"] = detect(scores["id/val"], scores["id/subtrain"]).auroc
        rows.append({"method": method, **row})
    return pd.DataFrame(rows)


def draw_cache_report(report: CacheReport) -> dict[str, dict[str, Figure]]:
    """Return title of a group → name of a figure, which can be a file's → the figure."""
    run, explanation = report.run, report.study.explanation
    scores = {name: method.scores for name, method in run.methods.items()}
    histograms, curves = {}, {}
    for split in [name for name in run.ood_sets() if name not in run.unfinished]:
        name = split.removeprefix("ood/")
        slug = name.replace("/", "-")
        histograms[f"scores-{slug}"] = draw_histogram(scores["NAC"]["id/test"], scores["NAC"][split], ("id/test", name))
        pairs = {
            method: (by_split["id/test"], by_split[split])
            for method, by_split in scores.items()
            if {"id/test", split} <= by_split.keys()
        }
        curves[f"roc-{slug}"] = draw_roc(_best(pairs), f"id/test against {name}")
    fitted = report.coverage.layers
    layers = {f"coverage-{name.replace(':', '-')}": draw_coverage(name, layer) for name, layer in fitted.items()}
    total = float(report.coverage.weights.sum())
    weights = {name: layer.weight / total for name, layer in report.params.layers.items()}
    search = {"weights": draw_weights(weights)}
    if explanation is not None:
        if explanation.parameters["importance"].notna().any():
            search["importances"] = draw_importances(explanation.parameters)
        search["history"] = draw_history(explanation)
    return {"Scores": histograms, "ROC curves": curves, "Coverage": layers, "Layers and search": search}


def _best(pairs: Mapping[str, tuple[Scores, Scores]]) -> dict[str, tuple[Scores, Scores]]:
    """NAC and the others with the greatest AUROC, in the table's order: more curves cannot be told apart."""
    others = sorted((name for name in pairs if name != "NAC"), key=lambda name: -auroc(*pairs[name]))
    return {name: scores for name, scores in pairs.items() if name == "NAC" or name in others[:OTHER_CURVES]}


_CAPTIONS = {
    "Scores": "NAC's score of every image; larger = more like the training data.",
    "ROC curves": "How many OOD images a detector flags, over how many ID images it flags wrongly: NAC, and of the"
    " others the five with the greatest AUROC.",
    "Coverage": "How much of the training data each bin of states has seen, min(count / saturation, 1). A state is"
    " sigmoid(alpha × product), ½ where a neuron is silent, or that of the activation or gradient alone.",
    "Layers and search": "Shares of the layers in the score. The greatest importances of the search: how"
    " unlike the best tenth of the trials are to all (PED-ANOVA).",
}


def render_report(
    reports: Sequence[CacheReport],
    frame: pd.DataFrame,
    command: str,
    figures: Sequence[Mapping[str, Mapping[str, Figure]]],
) -> str:
    """Return the page.

    Args:
        reports: of each cache.
        frame: the table of all of them, `tables.tabulate`'s.
        command: the command that makes this page.
        figures: of each cache, `draw_cache_report`'s.
    """
    identity = reports[0].cache.header.identity
    title = f"{identity.get('architecture')} on {identity.get('benchmark')}"
    several = len(reports) > 1
    parts = [heading(1, title), *_summary(reports, frame)]
    parts += [
        heading(2, f"Results of {len(reports)} training runs, mean ± standard deviation" if several else "Results")
    ]
    parts += _results(frame)
    for number, (report, groups) in enumerate(zip(reports, figures, strict=True)):
        if several:
            parts.append(heading(2, f"Run {number + 1}: {report.cache.path}"))
        for name, group in groups.items():
            parts += [heading(3 if several else 2, name), paragraph(_CAPTIONS[name], "soft")]
            parts.append(panels((f"{name}: {figure.axes[0].get_title()}", to_svg(figure)) for figure in group.values()))
            if name == "Layers and search":
                parts += _search(report)
        parts += _provenance(report, 3 if several else 2)
    earlier = dict.fromkeys(line for report in reports for line in (report.cache.command(), report.study.command))
    parts += [heading(2, "Commands that made this"), commands([*filter(None, earlier), command])]
    return render_page(f"nacpipe: {title}", parts)


def _summary(reports: Sequence[CacheReport], frame: pd.DataFrame) -> list[str]:
    run = reports[0].run
    accuracy = frame["accuracy"].iloc[0]
    known = accuracy == accuracy
    classified = f", which the network classifies with an accuracy of {_percent(accuracy)} %" if known else ""
    sets = len(set(run.ood_sets()).difference(run.unfinished))
    lines = [
        paragraph(
            f"Neuron activation coverage (NAC-UE) and {len(run.methods) - 1} other methods tell"
            f" {run.rows['id/test']} ID test images{classified}, from {sets} OOD set{'s' * (sets > 1)}."
            + (f" Means over {len(reports)} training runs." if len(reports) > 1 else "")
        )
    ]
    lines += [paragraph(f"{text[0].upper()}{text[1:]}.", "verdict") for text in verdicts(frame)]
    lines += [paragraph(_overfitting(report, len(reports) > 1), "verdict") for report in reports]
    if note := frame.attrs.get("note"):
        lines.append(paragraph(note, "soft"))
    return lines


def _overfitting(report: CacheReport, named: bool) -> str:
    """The result of the overfitting check, in words."""
    where = f" ({report.cache.path})" if named else ""
    subtrain = dict(zip(report.overfitting["method"], report.overfitting["subtrain_auroc"], strict=True))
    nac, energy_auroc = subtrain["NAC"], subtrain.get("Energy", math.nan)
    if nac != nac:
        return f"Overfitting check{where}: not made, the cache has no finished id/subtrain and id/val."
    text = f"Overfitting check{where}: id/val against id/subtrain, AUROC {_percent(nac)} % (50 is ideal"
    if energy_auroc != energy_auroc:
        return f"{text})."
    overfits = nac < energy_auroc - OVERFIT_POINTS
    warning = f"more than {100 * OVERFIT_POINTS:g} points below Energy's: the coverage may be overfitted."
    return f"{text}; Energy's {_percent(energy_auroc)} %): {warning if overfits else 'no sign of overfitting.'}"


def _results(frame: pd.DataFrame) -> list[str]:
    parts = []
    for task, rows in frame.groupby("task", sort=False):
        first = rows.iloc[0]
        accuracy = f"accuracy {_cell(first, 'accuracy')} %, " if first["accuracy"] == first["accuracy"] else ""
        parts.append(heading(3, f"{TASKS[str(task)]} ({first['n_id']} images, {accuracy}all in percent)"))
        for group, block in rows.groupby("group", sort=False):
            parts.append(side_by_side(_score_table(block, str(group), metrics) for metrics in PAIRS))
    parts.append(
        paragraph(
            "Bold: the best of its column, to the digits shown. Means over the sets of a group are unweighted.", "soft"
        )
    )
    return parts + [paragraph(line, "soft") for line in footnotes(frame)]


def _score_table(block: pd.DataFrame, group: str, metrics: Sequence[str]) -> str:
    """Methods below each other, sets and their metrics side by side, the mean last."""
    methods = list(dict.fromkeys(block["method"]))
    datasets = list(dict.fromkeys(block["dataset"]))
    cells = {(row["method"], row["dataset"]): row for _, row in block.iterrows()}
    columns = [(dataset, metric) for dataset in datasets for metric in metrics]
    bold = set()
    for place, (dataset, metric) in enumerate(columns):
        values = np.array([cells[method, dataset][metric] for method in methods], float)
        if np.isfinite(values).any():
            best = np.nanmin(values) if metric == "fpr95" else np.nanmax(values)
            # what is printed alike is bold alike
            bold |= {(row, place + 1) for row, value in enumerate(values) if _percent(value) == _percent(best)}
    rows = [[m, *(_cell(cells[m, dataset], metric) for dataset, metric in columns)] for m in methods]
    headings = [f"{f'{group} mean' if name == 'mean' else name}\n{NAMES[metric]}" for name, metric in columns]
    return table([group, *headings], rows, frozenset(bold))


def _search(report: CacheReport) -> list[str]:
    explanation = report.study.explanation
    explained = {} if explanation is None else explanation.layers.set_index("layer").to_dict("index")
    rows = []
    for name, layer in report.params.layers.items():
        aurocs = explained.get(name, {})
        rows.append([
            name, str(layer.bins), str(layer.saturation), f"{layer.alpha:.4g}", layer.source, layer.edges,
            f"{layer.weight:.4f}", *(_percent(aurocs.get(column, math.nan)) for column in ("alone", "without")),
        ])  # fmt: skip
    columns = ["layer", "bins", "saturation", "alpha", "state of", "edges", "weight"]
    columns += ["alone,\nAUROC %", "without it,\nAUROC %"]
    parts = [table(columns, rows)]
    if report.study.reason:
        parts.append(paragraph(report.study.reason, "soft"))
    checks = [
        [row.method, *(_percent(value) for value in (row.val_auroc, row.val_fpr95, row.subtrain_auroc))]
        for row in report.overfitting.itertuples()
    ]
    columns = ["id/val against", "ood/val,\nAUROC %", "ood/val,\nFPR@95 %", "id/subtrain,\nAUROC %"]
    return [*parts, table(columns, checks)]


def _provenance(report: CacheReport, level: int) -> list[str]:
    cache, summary = report.cache, summarise_cache(report.cache)
    facts: dict[str, Any] = {"cache": summary["path"], **summary["identity"], **summary["information"]}
    facts.pop("options", None)  # the command has them
    facts["parameters"] = report.study.source
    rows = [[key, value if isinstance(value, str) else json.dumps(value)] for key, value in facts.items()]
    layers = [[s["name"], s["path"], s["pooling"], str(s["neurons"])] for s in summary["layers"]]
    splits = []
    for name in cache:
        split = cache.peek(name)
        images = split.images
        splits.append([name, str(split.rows), str(images.get("list", "")), str(images.get("sha256", ""))[:16]])
    return [
        heading(level, "Provenance"),
        table(["", ""], rows, kind="text"),
        table(["layer", "module", "pooling", "neurons"], layers, kind="left"),
        table(["split", "images", "list", "sha256 of the list"], splits, kind="left"),
    ]


def _cell(row: pd.Series[Any], metric: str) -> str:
    spread = row.get(f"{metric}_std", math.nan)
    return _percent(row[metric]) + (f" ± {_percent(spread)}" if spread == spread else "")


def _percent(value: float) -> str:
    return f"{100 * value:.2f}" if value == value else "–"
