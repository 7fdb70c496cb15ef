"""A table of `tables.tabulate` in LaTeX, as papers print it: methods down, sets across, FPR@95 and AUROC in percent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from nacpipe.evaluation.tables import footnotes, measured_rows
from nacpipe.text import escape

METRICS = {"fpr95": r"FPR@95 $\downarrow$", "auroc": r"AUROC $\uparrow$"}
SIGNS = {"fpr95": 1.0, "auroc": -1.0}  # times the value: smaller is better
MEANS = {"near": "Near-OOD", "far": "Far-OOD"}
TASKS = {"ood": "ID is id/test", "fsood": "full spectrum: ID is id/test and csid together"}
EMPTY = "--"

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
    "[": "{[}",  # where a row begins with it, it would be an option of the row before
}


def to_latex(frame: pd.DataFrame) -> str:
    r"""Return a table in LaTeX, for a paper: one booktabs `tabular` per task and group of a table.

    Of each column the best method is bold and the second best underlined, by the digits that are printed: equals are
    marked alike. Published rows stand below a rule and are not ranked. Several runs are mean $\pm$ standard deviation,
    and intervals stand in brackets behind. Comments say what is ID, what methods were fitted on and why cells
    are empty.

    Args:
        frame: as `tabulate` gives it, with or without `add_confidence` and `add_published`.
    """
    measured = measured_rows(frame)
    blocks = [r"% needs \usepackage{booktabs}; all in percent"]
    for (task, group), rows in measured.groupby(["task", "group"], sort=False):
        of_task = frame[(frame["task"] == task) & (frame["group"] == group)]
        first = rows.iloc[0]
        runs = f", {int(first['runs'])} runs" if "runs" in frame else ""
        accuracy = "" if math.isnan(first["accuracy"]) else f", accuracy {100 * first['accuracy']:.2f}"
        blocks.append(f"% {group}-OOD, {TASKS[str(task)]} ({int(first['n_id'])} images{runs}{accuracy})")
        blocks.append(_tabular(of_task, str(group), list(dict.fromkeys(rows["dataset"]))))
    blocks += [_comment(line) for line in footnotes(frame)]
    return "\n".join(blocks) + "\n"


def escape_latex(text: str) -> str:
    """Return text that LaTeX prints as it is; control characters, which a foreign name may hold, as escapes."""
    shown = "".join(c if c.isprintable() else escape(c) for c in text)
    return "".join(_SPECIAL.get(c, c) for c in shown)


@dataclass(frozen=True, slots=True)
class _Marks:
    """What is printed of the best and the second best of a column; None where no method is compared."""

    best: str | None
    second: str | None


def _tabular(rows: pd.DataFrame, group: str, datasets: Sequence[str]) -> str:
    """A task's and group's table: a column per set, the mean last."""
    columns = [(dataset, metric) for dataset in datasets for metric in METRICS]
    heads = [MEANS[group] if dataset == "mean" else escape_latex(dataset) for dataset in datasets]
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
        shown = []
        for dataset, metric in columns:
            row = cells.get((dataset, method, source))
            shown.append(EMPTY if row is None else _cell(row, metric, marks[dataset, metric], source == "measured"))
        name = escape_latex(method) + (" (published)" if source == "published" else "")
        lines.append(" & ".join([name, *shown]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _mark(rows: pd.DataFrame, dataset: str, metric: str) -> _Marks:
    """The best and second best of a column, as printed."""
    values = rows[rows["dataset"] == dataset][metric].dropna()
    ranked = list(dict.fromkeys(_percent(value) for value in values.iloc[(SIGNS[metric] * values).argsort()]))
    if len(values) < 2 or not ranked:
        return _Marks(None, None)
    return _Marks(ranked[0], ranked[1] if len(ranked) > 1 else None)


def _cell(row: pd.Series[Any], metric: str, marks: _Marks, ranked: bool) -> str:
    """A value with its mark, its deviation over runs and its interval."""
    if pd.isna(row[metric]):
        return EMPTY
    text = value = _percent(row[metric])
    if ranked and value in (marks.best, marks.second):
        text = rf"\{'textbf' if value == marks.best else 'underline'}{{{value}}}"
    if pd.notna(spread := row.get(f"{metric}_std")):
        text += rf" $\pm$ {_percent(spread)}"
    if pd.notna(low := row.get(f"{metric}_low")):
        text += f" [{_percent(low)}, {_percent(row[f'{metric}_high'])}]"
    return text


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _comment(text: str) -> str:
    return "% " + "".join(c if c.isprintable() else escape(c) for c in text)
