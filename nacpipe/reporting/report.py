"""One page about one cache, or about several training runs: how good NAC is, and why.

read_cache_report ──▶ draw_cache_report ──▶ render_report
cache → numbers        → figures             → HTML (report.html.j2)
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from nacpipe.cache import Cache
from nacpipe.evaluation.bootstrap import compare_methods
from nacpipe.evaluation.flagged import shown_flagged
from nacpipe.evaluation.inspection import summarise_cache
from nacpipe.evaluation.method_scores import ID_VAL, MethodScores, ScoredCache, score_cache
from nacpipe.evaluation.tables import footnotes, parameter_lines, verdicts
from nacpipe.method.guide import choose_guide, score_plainly
from nacpipe.method.metrics import KEEP, Scores, auroc, detect
from nacpipe.method.params import NacParams
from nacpipe.reporting.figures import (
    draw_coverage,
    draw_histogram,
    draw_history,
    draw_importances,
    draw_roc,
    draw_weights,
    to_svg,
)
from nacpipe.reporting.galleries import Gallery
from nacpipe.reporting.params_origin import ParamsOrigin, find_origin
from nacpipe.scoring.coverage import Coverage, fit_coverage
from nacpipe.scoring.params_summary import summarise_choice, summarise_params
from nacpipe.scoring.states import has_logits
from nacpipe.text import escape_bytes
from nacpipe.tuning.request import describe_overfitting

OTHER_CURVES = 5  # beside NAC's, in a figure
TASKS = {"ood": "OOD detection: ID is id/test", "fsood": "Full spectrum: ID is id/test and csid together"}
PAIRS = (("fpr95", "auroc"), ("aupr_in", "aupr_out"))
COVERAGE_SHOWN = 9  # panels, of the terms of most weight: a default search has some forty terms
COMPARED_DRAWS = 300  # of the images, for the interval of a difference
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
    study: ParamsOrigin
    """The study that found `params`."""
    val_scores: Scores | None
    """NAC's scores of id/val, (rows,); None where the cache holds no finished one."""


def read_cache_report(
    cache: Cache,
    params: NacParams,
    *,
    more: Mapping[str, MethodScores] | None = None,
    choice: str | None = None,
    study: ParamsOrigin | None = None,
) -> CacheReport:
    """Score a cache and gather what a report shows of it; each array of the cache is read once.

    Args:
        cache: a cache with id/test and at least one finished near or far set.
        params: NAC's parameters.
        more: further methods that have scored the cache, as `score_cache` takes them.
        choice: where the parameters are from, as `params_file.find_params` takes it: it leads to their study.
        study: what is known of it, in place of that.

    Raises:
        InputError: there is nothing to evaluate.
        ParamsError: a layer is not in the cache.
    """
    coverage = fit_coverage(cache, params)
    known = summarise_choice(cache, params, choice) if study is None else summarise_params(params)
    run = score_cache(cache, coverage, more=more, parameters={"NAC": known})
    scores = score_selection(cache, coverage, run.validation.scores)
    return CacheReport(
        cache=cache,
        run=run,
        params=params,
        coverage=coverage,
        overfitting=check_overfitting(cache, scores),
        study=find_origin(cache, choice) if study is None else study,
        val_scores=scores.get(ID_VAL),
    )


def score_selection(cache: Cache, coverage: Coverage, known: Mapping[str, Scores] | None = None) -> dict[str, Scores]:
    """Return NAC's scores of the finished splits that a search reads, (rows,) each; `known` ones as they are."""
    scores = dict(known or {})
    for name in (ID_VAL, "ood/val", "id/subtrain"):
        if name not in scores and name in cache and cache.peek(name).sealed:
            scores[name] = coverage.score(cache[name])
    return scores


def check_overfitting(cache: Cache, nac: Mapping[str, Scores]) -> pd.DataFrame:
    """Return a row for NAC and, where there are logits, one for the best plain score: how well they tell id/val from …

    The best plain score is the search's guide: the one with the highest AUROC of id/val against ood/val. There is none
    where the cache holds no finished ood/val.

    Columns: method, val_auroc and val_fpr95 (from ood/val), subtrain_auroc (from id/subtrain; below ½ training images
    score higher).
    A split that the cache does not hold, or not finished, is NaN.

    Args:
        cache: the cache.
        nac: NAC's scores of its finished splits, (rows,) each.
    """
    splits = {name: cache[name] for name in nac}
    methods = {"NAC": dict(nac)}
    if has_logits(cache) and {"id/val", "ood/val"} <= splits.keys():
        plain = {name: score_plainly(split.read("logits")) for name, split in splits.items()}
        inside, outside = plain["id/val"], plain["ood/val"]
        is_id = np.repeat([True, False], [splits[name].rows for name in ("id/val", "ood/val")])
        guide = choose_guide({name: np.concatenate([inside[name], outside[name]]) for name in inside}, is_id)
        assert guide is not None
        methods[guide.name] = {name: scores[guide.name] for name, scores in plain.items()}
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
        histograms[f"scores-{slug}"] = draw_histogram(
            scores["NAC"]["id/test"], scores["NAC"][split], ("id/test", name), report.val_scores
        )
        pairs = {
            method: (by_split["id/test"], by_split[split])
            for method, by_split in scores.items()
            if {"id/test", split} <= by_split.keys()
        }
        curves[f"roc-{slug}"] = draw_roc(_best(pairs), f"id/test against {name}")
    fitted = report.coverage.layers
    order = sorted(fitted, key=lambda name: -report.params.layers[name].weight)[:COVERAGE_SHOWN]
    layers = {f"coverage-{name.replace(':', '-')}": draw_coverage(name, fitted[name]) for name in order}
    total = float(report.coverage.weights.sum())
    weights = {name: layer.weight / total for name, layer in report.params.layers.items()}
    if (fused := report.params.fused) is not None:
        weights[fused.method] = fused.weight / total
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of the page, as text."""

    columns: Sequence[str]
    """Headings; a line break parts what stands above each other."""
    rows: Sequence[Sequence[str]]
    bold: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of the cells that stand out."""
    kind: str = ""
    """`left` where the cells are words, `text` where they may be long."""


def render_report(
    reports: Sequence[CacheReport],
    frame: pd.DataFrame,
    command: str,
    figures: Sequence[Mapping[str, Mapping[str, Figure]]],
    galleries: Sequence[Sequence[Gallery] | str] = (),
) -> str:
    """Return the page, which needs no other file; names and messages are escaped.

    Args:
        reports: of each cache.
        frame: the table of all of them, `tables.tabulate`'s.
        command: the command that makes this page.
        figures: of each cache, `draw_cache_report`'s.
        galleries: of each cache, `galleries.build_galleries`', or why there are none; empty: without.
    """
    identity = reports[0].cache.header.identity
    several = len(reports) > 1
    earlier = dict.fromkeys(line for report in reports for line in (report.cache.command(), report.study.command))
    environment = Environment(
        loader=PackageLoader("nacpipe", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page = environment.get_template("report.html.j2").render(
        title=f"{identity.get('architecture')} on {identity.get('benchmark')}",
        summary=_summary(reports, frame),
        verdicts=[
            *_verdicts([report.run for report in reports], frame),
            *(_overfitting(report, several) for report in reports),
        ],
        note=frame.attrs.get("note"),
        parameters=parameter_lines(frame),
        tasks=_results(frame),
        flagged=_flagged(frame),
        not_flagged=frame.attrs.get("flagged_reason", ""),
        keep=f"{100 * KEEP:g}",
        footnotes=footnotes(frame),
        runs=[
            _run(report, groups, shown)
            for report, groups, shown in zip(reports, figures, galleries or [""] * len(reports), strict=True)
        ],
        commands=[*filter(None, earlier), command],
    )
    return escape_bytes(page)


def _flagged(frame: pd.DataFrame) -> Table:
    """What NAC's detector flags of each set."""
    shown = shown_flagged(frame)
    return Table(columns=["flagged, %", *shown], rows=[["NAC", *shown.values()]] if shown else [])


def _run(
    report: CacheReport, groups: Mapping[str, Mapping[str, Figure]], galleries: Sequence[Gallery] | str
) -> dict[str, Any]:
    """What the page shows of one cache."""
    return {
        "galleries": [] if isinstance(galleries, str) else galleries,
        "no_galleries": galleries if isinstance(galleries, str) else "",
        "path": report.cache.path,
        "figures": {
            name: [
                (f"{name}: {figure.axes[0].get_title()}", base64.b64encode(to_svg(figure, transparent=True)).decode())
                for figure in group.values()
            ]
            for name, group in groups.items()
        },
        "layers": _layers(report),
        "fused": "" if report.params.fused is None else f"{report.params.fused.describe()}.",
        "reason": report.study.reason,
        "checks": _checks(report),
        "provenance": _provenance(report),
    }


def _summary(reports: Sequence[CacheReport], frame: pd.DataFrame) -> str:
    run = reports[0].run
    accuracy = frame["accuracy"].iloc[0]
    known = accuracy == accuracy
    classified = f", which the network classifies with an accuracy of {_percent(accuracy)} %" if known else ""
    sets = len(set(run.ood_sets()).difference(run.unfinished))
    return (
        f"Neuron activation coverage (NAC) and {len(run.methods) - 1} other methods tell"
        f" {run.rows['id/test']} ID test images{classified}, from {sets} OOD set{'s' * (sets > 1)}."
        + (f" Means over {len(reports)} training runs." if len(reports) > 1 else "")
    )


def _overfitting(report: CacheReport, named: bool) -> str:
    """The result of the overfitting check, in words."""
    subtrain = dict(zip(report.overfitting["method"], report.overfitting["subtrain_auroc"], strict=True))
    nac = subtrain.pop("NAC")
    text = describe_overfitting(None if math.isnan(nac) else nac, next(iter(subtrain.items()), None))
    where = f" ({report.cache.path})" if named else ""
    return f"{text[0].upper()}{text[1:]}.".replace(":", f"{where}:", 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaderboard:
    """The methods of one group of sets, the best mean AUROC first; methods without any value are left out."""

    group: str
    columns: Sequence[str]
    """`mean` where the group has one, then the sets."""
    main: Table
    """FPR@95 and AUROC, side by side."""
    more: Table
    """AUPR-IN and AUPR-OUT, behind a fold."""
    empty: Sequence[str]
    """Methods that are left out."""


def _results(frame: pd.DataFrame) -> list[tuple[str, list[Leaderboard]]]:
    """Of each task its heading and a leaderboard per group."""
    tasks = []
    for task, rows in frame.groupby("task", sort=False):
        first = rows.iloc[0]
        accuracy = f"accuracy {_cell(first, 'accuracy')} %, " if first["accuracy"] == first["accuracy"] else ""
        heading = f"{TASKS[str(task)]} ({first['n_id']} images, {accuracy}all in percent)"
        groups = rows.groupby("group", sort=False)
        tasks.append((heading, [_leaderboard(block, str(name)) for name, block in groups]))
    return tasks


def _leaderboard(block: pd.DataFrame, group: str) -> Leaderboard:
    datasets = sorted(dict.fromkeys(block["dataset"]), key=lambda name: name != "mean")  # the mean first
    means = block[block["dataset"] == "mean"].set_index("method")["auroc"]
    metrics = [metric for pair in PAIRS for metric in pair]
    empty = block.set_index("method")[metrics].isna().all(axis=1).groupby(level=0, sort=False).all()
    ranked = means[~empty[means.index]].sort_values(ascending=False, kind="stable", na_position="last")
    main, more = (_score_table(block, list(ranked.index), datasets, group, pair) for pair in PAIRS)
    left_out = [name for name in means.index if empty[name]]
    return Leaderboard(group=group, columns=datasets, main=main, more=more, empty=left_out)


def _score_table(
    block: pd.DataFrame, methods: Sequence[str], datasets: Sequence[str], group: str, metrics: Sequence[str]
) -> Table:
    """Methods below each other, sets and their metrics side by side, the mean first."""
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
    return Table(columns=[group, *(NAMES[metric] for _, metric in columns)], rows=rows, bold=frozenset(bold))


def _verdicts(runs: Sequence[ScoredCache], frame: pd.DataFrame) -> list[str]:
    """Return one sentence per task and group: NAC's rank, and how far it is from the best other method."""
    means = frame[(frame["dataset"] == "mean") & frame["auroc"].notna()]
    best = {}
    for key, rows in means.groupby(["task", "group"], sort=False):
        others = rows[rows["method"] != "NAC"]
        if (rows["method"] == "NAC").any() and not others.empty:
            best[key] = str(others.loc[others["auroc"].idxmax(), "method"])
    names = dict.fromkeys(best.values())
    compared = {name: compare_methods(runs, "NAC", name, resamples=COMPARED_DRAWS) for name in names}
    lines = []
    for key, text in zip(means.groupby(["task", "group"], sort=False).groups, verdicts(frame), strict=True):
        line = f"{text[0].upper()}{text[1:]}"
        if key in best:
            rows = compared[best[key]].set_index(["task", "group", "dataset", "metric"])
            row = rows.loc[(*key, "mean", "auroc")]
            points, low, high = (100 * row[name] for name in ("difference", "low", "high"))
            line += (
                f": {abs(points):.2f} points {'above' if points >= 0 else 'below'} {best[key]}, the best other method;"
                f" with other images {_signed(low)} to {_signed(high)} ({row['confidence']:.0%} interval),"
                f" {'more' if row['more_than_chance'] else 'no more'} than chance"
            )
        lines.append(f"{line}.")
    return lines


def _signed(points: float) -> str:
    return f"{points:+.2f}".replace("-", "−")


def _layers(report: CacheReport) -> Table:
    explanation = report.study.explanation
    explained = {} if explanation is None else explanation.layers.set_index("layer").to_dict("index")
    rows = []
    for name, layer in report.params.layers.items():
        aurocs = explained.get(name, {})
        rows.append([
            name, str(layer.bins), str(layer.saturation), f"{layer.alpha:.4g}", layer.source, layer.edges,
            f"{layer.weight:.4f}", *(_percent(aurocs.get(column, math.nan)) for column in ("alone", "without")),
        ])  # fmt: skip
    if (fused := report.params.fused) is not None:
        reached = explained.get(fused.method, {})
        alone, without = (_percent(reached.get(column, math.nan)) for column in ("alone", "without"))
        rows.append([fused.method, *["–"] * 5, f"{fused.weight:.4f}", alone, without])
    columns = ["layer", "bins", "saturation", "alpha", "state of", "edges", "weight"]
    columns += ["alone,\nAUROC %", "without it,\nAUROC %"]
    return Table(columns=columns, rows=rows)


def _checks(report: CacheReport) -> Table:
    rows = [
        [row.method, *(_percent(value) for value in (row.val_auroc, row.val_fpr95, row.subtrain_auroc))]
        for row in report.overfitting.itertuples()
    ]
    columns = ["id/val against", "ood/val,\nAUROC %", "ood/val,\nFPR@95 %", "id/subtrain,\nAUROC %"]
    return Table(columns=columns, rows=rows)


def _provenance(report: CacheReport) -> list[Table]:
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
        Table(columns=["", ""], rows=rows, kind="text"),
        Table(columns=["layer", "module", "pooling", "neurons"], rows=layers, kind="left"),
        Table(columns=["split", "images", "list", "sha256 of the list"], rows=splits, kind="left"),
    ]


def _cell(row: pd.Series[Any], metric: str) -> str:
    spread = row.get(f"{metric}_std", math.nan)
    return _percent(row[metric]) + (f" ± {_percent(spread)}" if spread == spread else "")


def _percent(value: float) -> str:
    return f"{100 * value:.2f}" if value == value else "–"
