"""A table of `tables.tabulate` in LaTeX, as papers print it: methods down, sets across, FPR@95 and AUROC in percent."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from nacpipe.evaluation.bootstrap import PICKED, name_second
from nacpipe.evaluation.tables import footnotes, measured_rows, parameter_lines
from nacpipe.text import escape

METRICS = {"fpr95": r"FPR@95 $\downarrow$", "auroc": r"AUROC $\uparrow$"}
SIGNS = {"fpr95": 1.0, "auroc": -1.0}  # times the value: smaller is better
MEANS = {"near": "Near-OOD", "far": "Far-OOD"}
TASKS = {"ood": "ID is the test set", "fsood": "full spectrum: ID is the test set and the covariate-shifted sets"}
EMPTY = "--"
LAST_LATIN = "\u017f"  # of the letters that pdflatex knows
PRINTED = {  # the names of OpenOOD's lists
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "imagenet": "ImageNet-1K",
    "imagenet200": "ImageNet-200",
    "tin": "TIN",
    "mnist": "MNIST",
    "svhn": "SVHN",
    "texture": "Textures",
    "textures": "Textures",
    "places365": "Places365",
    "ssb_hard": "SSB-hard",
    "ninco": "NINCO",
    "inaturalist": "iNaturalist",
    "openimage_o": "OpenImage-O",
}

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"{\char34}",
    "`": r"\textasciigrave{}",
    "[": "{[}",  # where a row begins with it, it would be an option of the row before
}


def to_latex(frame: pd.DataFrame) -> str:
    r"""Return tables in LaTeX, for a paper: one `table` per task and group, with a caption, a label and a note.

    Of each column the best method is bold and the second best underlined, by the digits that are printed: equals are
    marked alike. Published rows stand below a rule and are not ranked. Several runs are mean $\pm$ standard deviation,
    and intervals stand smaller in a second line. A table that is wider than the line is shrunk to it. Sets and
    benchmarks have the names that papers print. The note says what NAC is; comments say where its parameters are from,
    what methods were fitted on and why cells are empty.

    Args:
        frame: as `tabulate` gives it, with or without `add_confidence` and `add_published`.
    """
    measured = measured_rows(frame)
    blocks = _head(frame)
    for (task, group), rows in measured.groupby(["task", "group"], sort=False):
        of_task = frame[(frame["task"] == task) & (frame["group"] == group)]
        tabular = _tabular(of_task, str(group), list(dict.fromkeys(rows["dataset"])))
        caption = _caption(frame, rows.iloc[0], str(group))
        blocks.append(_table(tabular, caption, f"tab:{task}-{group}", parameter_lines(frame)))
    blocks += [_comment(line) for line in footnotes(frame)]
    return _join(blocks)


def comparison_to_latex(frame: pd.DataFrame) -> str:
    r"""Return a comparison in LaTeX: one `table` per task, sets down, and the difference with its interval.

    A difference that is more than chance is bold.

    Args:
        frame: as `compare_methods` or `compare_with_best` gives it.
    """
    blocks = _head(frame)
    for task, rows in frame.groupby("task", sort=False):
        first = rows.iloc[0]
        picked = "among" in frame
        names = [escape_latex(first["first"]), "best" if picked else escape_latex(first["second"])]
        caption = (
            f"{names[0]} against {escape_latex(name_second(rows))}{_on_benchmark(frame)}, in percent;"
            f" {TASKS[str(task)]}. Difference: with its {100 * first['confidence']:g}"
            rf"\% interval over {first['resamples']} paired draws of the images; bold where it does not hold 0."
        )
        if picked:
            caption += f" {PICKED[0].upper()}{PICKED[1:]}."
        tabular = _compared(rows, names)
        blocks.append(_table(tabular, caption, f"tab:{task}-difference", parameter_lines(frame)))
    reasons = dict.fromkeys(reason for reason in frame["reason"] if reason)
    blocks += [_comment(f"empty: {reason}") for reason in reasons]
    return _join(blocks)


def print_name(name: str) -> str:
    """Return how papers print the name of a set or benchmark; one that is not known as it is."""
    return PRINTED.get(name, name)


def _head(frame: pd.DataFrame) -> list[str]:
    """The comments before the tables: what they need, what NAC is, and where its parameters are from."""
    lines = [*parameter_lines(frame), *frame.attrs.get("sources", [])]
    return [r"% needs \usepackage{booktabs,graphicx}; all in percent", *(_comment(line) for line in lines)]


def _join(blocks: Sequence[str]) -> str:
    """Return the whole; letters that pdflatex stops at, Latin apart, are named in a comment at its head."""
    head, *rest = blocks
    printed = (line for block in rest for line in block.splitlines() if not line.startswith("%"))
    if foreign := sorted({c for line in printed for c in line if c > LAST_LATIN}):
        head += "\n" + _comment(f"for lualatex or xelatex, with a font that has {' '.join(foreign)}")
    return "\n".join([head, *rest]) + "\n"


def _table(tabular: str, caption: str, label: str, notes: Sequence[str]) -> str:
    """A `table` around a `tabular`, shrunk to the line where it is wider, and a note below."""
    note = [rf"\par\smallskip\parbox{{\linewidth}}{{\footnotesize {escape_latex('. '.join(notes))}.}}"] if notes else []
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\label{{{label}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            tabular + "}",
            *note,
            r"\end{table}",
        ]
    )


def _caption(frame: pd.DataFrame, first: pd.Series[Any], group: str) -> str:
    """What a table of results shows."""
    runs = f", {int(first['runs'])} training runs, mean $\\pm$ standard deviation" if "runs" in frame else ""
    accuracy = "" if math.isnan(first["accuracy"]) else rf", accuracy {100 * first['accuracy']:.2f}\%"
    text = (
        f"{MEANS[group]} detection{_on_benchmark(frame)}, in percent; {TASKS[str(first['task'])]}"
        f" ({int(first['n_id'])} images{runs}{accuracy}). Best bold, second underlined."
    )
    if "confidence" in frame:
        text += rf" Below: {100 * first['confidence']:g}\% bootstrap intervals of {int(first['resamples'])} draws."
    return text


def _on_benchmark(frame: pd.DataFrame) -> str:
    name = frame.attrs.get("benchmark", "")
    return f" on {escape_latex(print_name(name))}" if name else ""


def escape_latex(text: str) -> str:
    """Return text that LaTeX prints as it is; control characters, which a foreign name may hold, as escapes."""
    composed = unicodedata.normalize("NFC", text)  # of a letter and its accent one letter
    shown = "".join(c if c.isprintable() else escape(c) for c in composed)
    return re.sub("-(?=-)", "-{}", "".join(_SPECIAL.get(c, c) for c in shown))  # two hyphens would be a dash


@dataclass(frozen=True, slots=True)
class _Marks:
    """What is printed of the best and the second best of a column; None where no method is compared."""

    best: str | None
    second: str | None


def _tabular(rows: pd.DataFrame, group: str, datasets: Sequence[str]) -> str:
    """A task's and group's table: a column per set, the mean last."""
    columns = [(dataset, metric) for dataset in datasets for metric in METRICS]
    heads = [MEANS[group] if dataset == "mean" else escape_latex(print_name(dataset)) for dataset in datasets]
    width = len(METRICS)
    rules = [rf"\cmidrule(lr){{{2 + width * i}-{1 + width * (i + 1)}}}" for i in range(len(heads))]
    cells = {(row["dataset"], row["method"], row.get("source", "measured")): row for _, row in rows.iterrows()}
    names = [(method, source) for _, method, source in cells]
    marks = {column: _mark(measured_rows(rows), *column) for column in columns}
    lines = [
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        "".join(rf" & \multicolumn{{{width}}}{{c}}{{{head}}}" for head in heads) + r" \\",
        " ".join(rules),
        "Method & " + " & ".join(METRICS[metric] for _, metric in columns) + r" \\",
        r"\midrule",
    ]
    previous = "measured"
    for method, source in dict.fromkeys(names):
        if source != previous:
            lines.append(r"\midrule")
        previous = source
        shown, intervals = [], []
        for dataset, metric in columns:
            row = cells.get((dataset, method, source))
            shown.append(EMPTY if row is None else _cell(row, metric, marks[dataset, metric], source == "measured"))
            intervals.append("" if row is None else _interval(row.get(f"{metric}_low"), row.get(f"{metric}_high")))
        name = escape_latex(method) + (" (published)" if source == "published" else "")
        lines.append(" & ".join([name, *shown]) + r" \\")
        if any(intervals):
            lines.append(" & ".join(["", *intervals]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _mark(rows: pd.DataFrame, dataset: str, metric: str) -> _Marks:
    """The best and second best of a column, as printed."""
    values = rows[rows["dataset"] == dataset][metric].dropna()
    ranked = list(dict.fromkeys(_percent(value) for value in values.iloc[(SIGNS[metric] * values).argsort()]))
    if len(values) < 2 or not ranked:
        return _Marks(None, None)
    return _Marks(ranked[0], ranked[1] if len(ranked) > 1 else None)


def _cell(row: pd.Series[Any], metric: str, marks: _Marks, ranked: bool) -> str:
    """A value with its mark and its deviation over runs."""
    if pd.isna(row[metric]):
        return EMPTY
    text = value = _percent(row[metric])
    if ranked and value in (marks.best, marks.second):
        text = rf"\{'textbf' if value == marks.best else 'underline'}{{{value}}}"
    if pd.notna(spread := row.get(f"{metric}_std")):
        text += rf" $\pm$ {_percent(spread)}"
    return text


def _interval(low: float | None, high: float | None, form: str = ".2f") -> str:
    """An interval in small type; empty where there is none."""
    if low is None or high is None or pd.isna(low):
        return ""
    return rf"{{\scriptsize {{[}}{100 * low:{form}}, {100 * high:{form}}]}}"


def _compared(rows: pd.DataFrame, names: Sequence[str]) -> str:
    """A task's comparison: a row per set, near and far below each other."""
    lines = [
        rf"\begin{{tabular}}{{l{'rrr' * len(METRICS)}}}",
        r"\toprule",
        "".join(rf" & \multicolumn{{3}}{{c}}{{{head}}}" for head in METRICS.values()) + r" \\",
        r"\cmidrule(lr){2-4} \cmidrule(lr){5-7}",
        "Set & " + " & ".join([*names, "difference"] * len(METRICS)) + r" \\",
    ]
    for group, of_group in rows.groupby("group", sort=False):
        lines.append(r"\midrule")
        for dataset, of_set in of_group.groupby("dataset", sort=False):
            head = MEANS[str(group)] if dataset == "mean" else escape_latex(print_name(str(dataset)))
            by_metric = of_set.set_index("metric")
            cells = [cell for metric in METRICS for cell in _difference(by_metric.loc[metric])]
            lines.append(" & ".join([head, *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _difference(row: pd.Series[Any]) -> list[str]:
    """Both values, and their difference with its interval; bold where it is more than chance."""
    values = [EMPTY if pd.isna(row[name]) else _percent(row[name]) for name in ("first_value", "second_value")]
    if row["more_than_chance"] is None:
        return [*values, EMPTY]
    text = f"{100 * row['difference']:+.2f}"
    text = rf"\textbf{{{text}}}" if row["more_than_chance"] else text
    return [*values, f"{text} {_interval(row['low'], row['high'], '+.2f')}"]


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _comment(text: str) -> str:
    return "% " + "".join(c if c.isprintable() else escape(c) for c in text)
