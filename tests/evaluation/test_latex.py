"""A table in LaTeX: what is marked, what is escaped, and that every row has every column."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from nacpipe.cache import Cache
from nacpipe.cli import main
from nacpipe.evaluation.latex import escape_latex, to_latex
from nacpipe.evaluation.tables import evaluate
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.params_file import write_params

PARAMS = NacParams(layers={"avgpool": LayerParams(bins=20, saturation=5, alpha=0.5)})


def row(method: str, dataset: str, fpr95: float, auroc: float, **more: Any) -> dict[str, Any]:
    same = {"task": "ood", "group": "far", "accuracy": 0.9, "n_id": 50, "n_ood": 20, "fitted_on": "", "n_fitted": 0}
    return {**same, "method": method, "dataset": dataset, "fpr95": fpr95, "auroc": auroc, "reason": "", **more}


def test_a_table_by_hand() -> None:
    r"""99.12 and 99.12 are equal as printed, so both are best; of FPR@95 the smallest is."""
    frame = pd.DataFrame(
        [
            row("NAC", "a_b", 0.10, 0.99121, fitted_on="id/train", n_fitted=60),
            row("MSP", "a_b", 0.30, 0.99119),
            row("ASH-S@65", "a_b", 0.20, 0.98),
            row("NAC", "mean", 0.10, 0.9, fitted_on="id/train", n_fitted=60),
            row("MSP", "mean", math.nan, math.nan, reason="no logits"),
            row("ASH-S@65", "mean", 0.20, 0.95),
        ]
    )
    assert to_latex(frame).splitlines() == [
        r"% needs \usepackage{booktabs}; all in percent",
        "% far-OOD, ID is id/test (50 images, accuracy 90.00)",
        r"\begin{tabular}{lrrrr}",
        r"\toprule",
        r" & \multicolumn{2}{c}{a\_b} & \multicolumn{2}{c}{Far-OOD} \\",
        r"\cmidrule(lr){2-3} \cmidrule(lr){4-5}",
        r"Method & FPR@95 $\downarrow$ & AUROC $\uparrow$ & FPR@95 $\downarrow$ & AUROC $\uparrow$ \\",
        r"\midrule",
        r"NAC & \textbf{10.00} & \textbf{99.12} & \textbf{10.00} & \underline{90.00} \\",
        r"MSP & 30.00 & \textbf{99.12} & -- & -- \\",
        r"ASH-S@65 & \underline{20.00} & \underline{98.00} & \underline{20.00} & \textbf{95.00} \\",
        r"\bottomrule",
        r"\end{tabular}",
        "% fitted on id/train (60 images): NAC",
    ]


def test_runs_intervals_and_published_rows() -> None:
    """Published rows are not ranked; one measured method alone is marked as nothing."""
    measured = {"runs": 3, "source": "measured", "fpr95_std": 0.01, "auroc_std": 0.002}
    measured |= {"fpr95_low": 0.05, "fpr95_high": 0.15, "auroc_low": math.nan, "auroc_high": math.nan}
    printed = {"source": "published", "accuracy": math.nan, "auroc_std": 0.0014}
    frame = pd.DataFrame(
        [
            row("NAC", "mean", 0.1, 0.9, **measured),
            row("NAC", "mean", math.nan, 0.9491, **printed),
            row("fDBD", "mean", math.nan, 0.93, **printed),
        ]
    )
    lines = to_latex(frame).splitlines()
    assert lines[1] == "% far-OOD, ID is id/test (50 images, 3 runs, accuracy 90.00)"
    assert lines[8:-2] == [
        r"NAC & 10.00 $\pm$ 1.00 [5.00, 15.00] & 90.00 $\pm$ 0.20 \\",
        r"\midrule",
        r"NAC (published) & -- & 94.91 $\pm$ 0.14 \\",
        r"fDBD (published) & -- & 93.00 $\pm$ 0.14 \\",
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("places365", "places365"),
        ("NAC (my_file 5%.json)", r"NAC (my\_file 5\%.json)"),
        (r"a\b{c}", r"a\textbackslash{}b\{c\}"),
        ("$#&", r"\$\#\&"),
        ("x^2~y", r"x\textasciicircum{}2\textasciitilde{}y"),
        ("<|>", r"\textless{}\textbar{}\textgreater{}"),
        ("[1]", "{[}1]"),
        ('"', r"{\char34}"),
        ("a\nb", r"a\textbackslash{}x0ab"),
        ("Größe", "Größe"),
    ],
)
def test_names_are_printed_as_they_are(name: str, expected: str) -> None:
    assert escape_latex(name) == expected


@given(st.text(max_size=20))
def test_no_name_is_a_command(name: str) -> None:
    """What is left after the escapes that we write holds nothing that LaTeX takes for more than a letter."""
    rest = escape_latex(name)
    for text in (r"\textbackslash{}", r"\textasciicircum{}", r"\textasciitilde{}", r"\textless{}", r"\textgreater{}",
                 r"\textbar{}", r"{\char34}", "{[}", r"\{", r"\}", r"\$", r"\&", r"\#", r"\%", r"\_"):  # fmt: skip
        rest = rest.replace(text, "")
    assert not set(rest) & set('\\{}$&#%_^~"\n')


def test_the_command_prints_every_row_and_column(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", rows={"csid/blurred": 25, "ood/far/half_tones": 30})
    write_params(tmp_path / "c.params.json", PARAMS)
    done = CliRunner().invoke(main, ["evaluate", cache.path, "--latex"])
    assert (done.exit_code, done.stderr) == (0, "")
    table = evaluate(cache, PARAMS)
    assert done.stdout == to_latex(table)
    tabulars = re.findall(r"\\begin\{tabular\}\{l(r+)\}\n(.*?)\\end\{tabular\}", done.stdout, re.DOTALL)
    assert [len(columns) for columns, _ in tabulars] == [4, 6, 4, 6]  # near, far; the full spectrum
    for columns, body in tabulars:
        rows = [line for line in body.splitlines() if line.startswith(("Method", "NAC", "MSP", "MaxLogit", "Energy"))]
        assert len(rows) == 5
        assert {line.count("&") for line in rows} == {len(columns)}
        assert body.count(r"\textbf{") >= len(columns)
    assert done.stdout.count(r"{half\_tones}") == 2


def test_a_comparison_is_no_such_table(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr")
    done = CliRunner().invoke(main, ["evaluate", cache.path, "--latex", "--against", "MSP"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--latex prints the table; leave out --against, or print the comparison as --csv." in done.stderr
