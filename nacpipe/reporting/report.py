"""One page about one cache, or about several training runs: how good NAC is, and why.

read_chapter ──▶ draw_chapter ──▶ render_report
cache → numbers   → pictures       → HTML (page.py)
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
from nacpipe.evaluation.inspection import summarise_cache, summarise_splits
from nacpipe.evaluation.method_scores import ScoredCache
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
from nacpipe.tuning.explain import Explanation
from nacpipe.tuning.request import OVERFIT_POINTS

OTHER_CURVES = 5  # beside NAC's, in a picture
TASKS = {"ood": "OOD detection: ID is id/test", "fsood": "Full spectrum: ID is id/test and csid together"}
PAIRS = (("fpr95", "auroc"), ("aupr_in", "aupr_out"))
NAMES = {"fpr95": "FPR@95 ↓", "auroc": "AUROC ↑", "aupr_in": "AUPR-IN ↑", "aupr_out": "AUPR-OUT ↑"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """What a report says of one cache."""

    cache: Cache
    run: ScoredCache
    params: NacParams
    coverage: Coverage
    checks: pd.DataFrame
    """`check_overfitting`'s."""
    past: PastStudy


def read_cache_report(cache: Cache, params: NacParams, run: ScoredCache, choice: str | None = None) -> CacheReport:
    """Gather what a report says of a cache.

    Args:
        cache: the cache.
        params: NAC's parameters.
        run: the cache scored under them, by `score_cache`.
        choice: where the parameters are from, as `evaluate.find_params` has it: it leads to their study.

    Raises:
        ParamsError: a layer is not in the cache.
    """
    coverage = fit_coverage(cache, params)
    checks = check_overfitting(cache, coverage)
    return CacheReport(
        cache=cache, run=run, params=params, coverage=coverage, checks=checks, past=find_study(cache, choice)
    )


def check_overfitting(cache: Cache, coverage: Coverage) -> pd.DataFrame:
    """Return one row for NAC and, where there are logits, one for Energy: how well they tell id/val from …

    Columns: method, val_auroc and val_fpr95 (from ood/val), subtrain_auroc (from id/subtrain; 0.5 is the ideal).
    A split that the cache does not hold, or not finished, is NaN.
    """
    held = [name for name in ("id/val", "ood/val", "id/subtrain") if name in cache and cache.peek(name).sealed]
    splits = {name: cache[name] for name in held}
    methods = {"NAC": {name: coverage.score(split) for name, split in splits.items()}}
    if has_logits(cache):
        methods["Energy"] = {name: energy(split.read("logits")) for name, split in splits.items()}
    rows = []
    for method, scores in methods.items():
        found = dict.fromkeys(("val_auroc", "val_fpr95", "subtrain_auroc"), math.nan)
        if {"id/val", "ood/val"} <= scores.keys():
            detection = detect(scores["id/val"], scores["ood/val"])
            found |= {"val_auroc": detection.auroc, "val_fpr95": detection.fpr95}
        if {"id/val", "id/subtrain"} <= scores.keys():
            found["subtrain_auroc"] = detect(scores["id/val"], scores["id/subtrain"]).auroc
        rows.append({"method": method, **found})
    return pd.DataFrame(rows)


def draw_cache_report(chapter: CacheReport) -> dict[str, dict[str, Figure]]:
    """Return title of a group → name of a picture, good as a file's → the picture."""
    run, found = chapter.run, chapter.past.explanation
    scores = {name: method.scores for name, method in run.methods.items()}
    histograms, curves = {}, {}
    for split in [name for name in run.ood_sets() if name not in run.unfinished]:
        name = split.removeprefix("ood/")
        slug = name.replace("/", "-")
        histograms[f"scores-{slug}"] = draw_histogram(scores["NAC"]["id/test"], scores["NAC"][split], ("id/test", name))
        sides = {
            m: (found["id/test"], found[split]) for m, found in scores.items() if {"id/test", split} <= found.keys()
        }
        curves[f"roc-{slug}"] = draw_roc(_best(sides), f"id/test against {name}")
    fitted = chapter.coverage.layers
    layers = {f"coverage-{name.replace(':', '-')}": draw_coverage(name, one) for name, one in fitted.items()}
    total = float(chapter.coverage.weights.sum())
    weights = {name: layer.weight / total for name, layer in chapter.params.layers.items()}
    mattered = {"weights": draw_weights(weights)}
    if found is not None:
        if found.parameters["importance"].notna().any():
            mattered["importances"] = draw_importances(found.parameters)
        mattered["history"] = draw_history(found)
    return {"Scores": histograms, "ROC curves": curves, "Coverage": layers, "Layers and search": mattered}


def _best(sides: Mapping[str, tuple[Scores, Scores]]) -> dict[str, tuple[Scores, Scores]]:
    """NAC and the others with the greatest AUROC, in the table's order: more curves cannot be told apart."""
    others = sorted((name for name in sides if name != "NAC"), key=lambda name: -auroc(*sides[name]))
    return {name: scores for name, scores in sides.items() if name == "NAC" or name in others[:OTHER_CURVES]}


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
    chapters: Sequence[CacheReport],
    frame: pd.DataFrame,
    command: str,
    pictures: Sequence[Mapping[str, Mapping[str, Figure]]],
) -> str:
    """Return the page.

    Args:
        chapters: of each cache.
        frame: the table of all of them, `tables.tabulate`'s.
        command: the command that makes this page.
        pictures: of each chapter, `draw_chapter`'s.
    """
    first = chapters[0].cache.header.identity
    title = f"{first.get('architecture')} on {first.get('benchmark')}"
    several = len(chapters) > 1
    parts = [heading(1, title), *_summary(chapters, frame)]
    parts += [
        heading(2, f"Results of {len(chapters)} training runs, mean ± standard deviation" if several else "Results")
    ]
    parts += _results(frame)
    for number, (chapter, drawn) in enumerate(zip(chapters, pictures, strict=True)):
        if several:
            parts.append(heading(2, f"Run {number + 1}: {chapter.cache.path}"))
        for name, figures in drawn.items():
            parts += [heading(3 if several else 2, name), paragraph(_CAPTIONS[name], "soft")]
            parts.append(
                panels((f"{name}: {figure.axes[0].get_title()}", to_svg(figure)) for figure in figures.values())
            )
            if name == "Layers and search":
                parts += _search(chapter)
        parts += _provenance(chapter, 3 if several else 2)
    made = dict.fromkeys(line for chapter in chapters for line in (chapter.cache.command(), chapter.past.command))
    parts += [heading(2, "Commands that made this"), commands([*filter(None, made), command])]
    return render_page(f"nacpipe: {title}", parts)


def _summary(chapters: Sequence[CacheReport], frame: pd.DataFrame) -> list[str]:
    counts = chapters[0].run.rows
    accuracy = frame["accuracy"].iloc[0]
    told = f", which the network classifies with an accuracy of {_percent(accuracy)} %" if accuracy == accuracy else ""
    sets = len(set(chapters[0].run.ood_sets()).difference(chapters[0].run.unfinished))
    lines = [
        paragraph(
            f"Neuron activation coverage (NAC-UE) and {len(chapters[0].run.methods) - 1} other methods tell"
            f" {counts['id/test']} ID test images{told}, from {sets} OOD set{'s' * (sets > 1)}."
            + (f" Means over {len(chapters)} training runs." if len(chapters) > 1 else "")
        )
    ]
    lines += [paragraph(f"{text[0].upper()}{text[1:]}.", "verdict") for text in verdicts(frame)]
    lines += [paragraph(_overfitting(chapter, len(chapters) > 1), "verdict") for chapter in chapters]
    if note := frame.attrs.get("note"):
        lines.append(paragraph(note, "soft"))
    return lines


def _overfitting(chapter: CacheReport, named: bool) -> str:
    """What the overfitting check says, in words."""
    where = f" ({chapter.cache.path})" if named else ""
    found = dict(zip(chapter.checks["method"], chapter.checks["subtrain_auroc"], strict=True))
    nac, own = found["NAC"], found.get("Energy", math.nan)
    if nac != nac:
        return f"Overfitting check{where}: the cache has no id/subtrain and id/val to make it with."
    text = f"Overfitting check{where}: id/val against id/subtrain, AUROC {_percent(nac)} % (50 is ideal"
    if own != own:
        return f"{text})."
    judged = f"more than {100 * OVERFIT_POINTS:g} points below Energy's: the coverage may be overfitted"
    return f"{text}; Energy's {_percent(own)} %): " + (
        f"{judged}." if nac < own - OVERFIT_POINTS else "no sign of overfitting."
    )


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
    heads = [f"{group} mean" if d == "mean" else d for d, _ in columns]
    names = [f"{name}\n{NAMES[metric]}" for name, (_, metric) in zip(heads, columns, strict=True)]
    return table([group, *names], rows, frozenset(bold))


def _search(chapter: CacheReport) -> list[str]:
    found: Explanation | None = chapter.past.explanation
    told = {} if found is None else found.layers.set_index("layer").to_dict("index")
    rows = []
    for name, layer in chapter.params.layers.items():
        more = told.get(name, {})
        rows.append([
            name, str(layer.bins), str(layer.saturation), f"{layer.alpha:.4g}", layer.source, layer.edges,
            f"{layer.weight:.4f}", _percent(more.get("alone", math.nan)), _percent(more.get("without", math.nan)),
        ])  # fmt: skip
    columns = ["layer", "bins", "saturation", "alpha", "state of", "edges", "weight"]
    columns += ["alone,\nAUROC %", "without it,\nAUROC %"]
    parts = [table(columns, rows)]
    if chapter.past.reason:
        parts.append(paragraph(chapter.past.reason, "soft"))
    checks = [
        [row.method, *(_percent(value) for value in (row.val_auroc, row.val_fpr95, row.subtrain_auroc))]
        for row in chapter.checks.itertuples()
    ]
    heads = ["id/val against", "ood/val,\nAUROC %", "ood/val,\nFPR@95 %", "id/subtrain,\nAUROC %"]
    return [*parts, table(heads, checks)]


def _provenance(chapter: CacheReport, level: int) -> list[str]:
    summary, splits = summarise_cache(chapter.cache), summarise_splits(chapter.cache)
    facts: dict[str, Any] = {"cache": summary["path"], **summary["identity"], **summary["information"]}
    facts["parameters"] = chapter.past.source
    rows = [[key, value if isinstance(value, str) else json.dumps(value)] for key, value in facts.items()]
    layers = [[s["name"], s["path"], s["pooling"], str(s["neurons"])] for s in summary["layers"]]
    held = [
        [row.split, f"{row.rows}", row.list, str(chapter.cache.peek(row.split).images.get("sha256", ""))[:16]]
        for row in splits.itertuples()
    ]
    return [
        heading(level, "Provenance"),
        table(["", ""], rows, kind="text"),
        table(["layer", "module", "pooling", "neurons"], layers, kind="left"),
        table(["split", "images", "list", "sha256 of the list"], held, kind="left"),
    ]


def _cell(row: pd.Series[Any], metric: str) -> str:
    spread = row.get(f"{metric}_std", math.nan)
    return _percent(row[metric]) + (f" ± {_percent(spread)}" if spread == spread else "")


def _percent(value: float) -> str:
    return f"{100 * value:.2f}" if value == value else "–"
