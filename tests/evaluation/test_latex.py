"""A table in LaTeX: what is marked, what is escaped, and that every row has every column."""

from __future__ import annotations

import json
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
from nacpipe.evaluation.latex import comparison_to_latex, escape_latex, print_name, to_latex
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
        r"% needs \usepackage{booktabs,graphicx}; all in percent",
        r"\begin{table}",
        r"\centering",
        r"\caption{Far-OOD detection, in percent; ID is the test set (50 images, accuracy 90.00\%). Best bold, second"
        " underlined.}",
        r"\label{tab:ood-far}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
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
        r"\end{tabular}}",
        r"\end{table}",
        "% fitted on id/train (60 images): NAC",
    ]


def test_runs_intervals_and_published_rows() -> None:
    """Published rows are not ranked; one measured method alone is marked as nothing."""
    measured = {"runs": 3, "source": "measured", "fpr95_std": 0.01, "auroc_std": 0.002}
    measured |= {"fpr95_low": 0.05, "fpr95_high": 0.15, "auroc_low": math.nan, "auroc_high": math.nan}
    measured |= {"confidence": 0.9, "resamples": 50}
    printed = {"source": "published", "accuracy": math.nan, "auroc_std": 0.0014}
    frame = pd.DataFrame(
        [
            row("NAC", "mean", 0.1, 0.9, **measured),
            row("NAC", "mean", math.nan, 0.9491, **printed),
            row("fDBD", "mean", math.nan, 0.93, **printed),
        ]
    )
    lines = to_latex(frame).splitlines()
    assert lines[3] == (
        r"\caption{Far-OOD detection, in percent; ID is the test set (50 images, 3 training runs, mean $\pm$ standard"
        r" deviation, accuracy 90.00\%). Best bold, second underlined. Below: 90\% bootstrap intervals of 50 draws.}"
    )
    assert lines[12:-3] == [
        r"NAC & 10.00 $\pm$ 1.00 & 90.00 $\pm$ 0.20 \\",
        r" & {\scriptsize {[}5.00, 15.00]} &  \\",
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
        ("--space", "-{}-space"),
        ("a---b", "a-{}-{}-b"),
        ("a\nb", r"a\textbackslash{}x0ab"),
        ("a`b", r"a\textasciigrave{}b"),
        ("Größe", "Größe"),
        ("Gro\u0308ße", "Größe"),
    ],
)
def test_names_are_printed_as_they_are(name: str, expected: str) -> None:
    assert escape_latex(name) == expected


def test_letters_that_pdflatex_lacks_are_named(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    latin = make_cache(tmp_path / "c.zarr", rows={"ood/far/größe": 30})
    assert "lualatex" not in to_latex(evaluate(latin, PARAMS))
    other = make_cache(tmp_path / "d.zarr", rows={"ood/far/数字": 30, "ood/near/φ": 30})
    lines = to_latex(evaluate(other, PARAMS)).splitlines()
    assert lines[1] == "% for lualatex or xelatex, with a font that has φ 字 数"


@given(st.text(max_size=20))
def test_no_name_is_a_command(name: str) -> None:
    """What is left after the escapes that we write holds nothing that LaTeX takes for more than a letter."""
    rest = escape_latex(name)
    for text in (r"\textbackslash{}", r"\textasciicircum{}", r"\textasciitilde{}", r"\textless{}", r"\textgreater{}",
                 r"\textbar{}", r"{\char34}", "{[}", r"\{", r"\}", r"\$", r"\&", r"\#", r"\%", r"\_",
                 r"\textasciigrave{}", "-{}"):  # fmt: skip
        rest = rest.replace(text, "")
    assert not set(rest) & set('\\{}$&#%_^~"\n')


def test_the_command_prints_every_row_and_column(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", rows={"csid/blurred": 25, "ood/far/half_tones": 30})
    write_params(tmp_path / "c.params.json", PARAMS)
    done = CliRunner().invoke(main, ["evaluate", cache.path, "--latex"])
    assert (done.exit_code, done.stderr) == (0, "")
    table = evaluate(cache, PARAMS)
    source = f"% {cache.path}: NAC: parameters {{}}, no record of how they were chosen\n"
    from_file = source.format(tmp_path / "c.params.json")
    assert done.stdout.replace(from_file, source.format("given in Python")) == to_latex(table)
    tabulars = re.findall(r"\\begin\{tabular\}\{l(r+)\}\n(.*?)\\end\{tabular\}", done.stdout, re.DOTALL)
    assert [len(columns) for columns, _ in tabulars] == [4, 6, 4, 6]  # near, far; the full spectrum
    for columns, body in tabulars:
        rows = [line for line in body.splitlines() if line.startswith(("Method", "NAC", "MSP", "MaxLogit", "Energy"))]
        assert len(rows) == 5
        assert {line.count("&") for line in rows} == {len(columns)}
        assert body.count(r"\textbf{") >= len(columns)
    assert done.stdout.count(r"{half\_tones}") == 2


def test_the_note_and_the_comments_say_what_nac_is(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr")
    made_by = {"val": "ood/val", "objective": "guided", "options": {"space": "auto"}}
    views = {"avgpool:by_class": PARAMS.layers["avgpool"], **PARAMS.layers}
    result = {"trials": 2701, "seed": 3}
    write_params(tmp_path / "c.params.json", NacParams(layers=views), made_by=made_by, result=result)
    lines = CliRunner().invoke(main, ["evaluate", cache.path, "--latex"]).stdout.splitlines()
    told = (
        "NAC: 2 terms of 1 layer, chosen on id/val and ood/val (guided, 2,701 trials, seed 3); NAC-UE as published:"
        " nacpipe search CACHE --space paper"
    )
    assert lines[1:3] == [
        f"% {told}",
        f"% {cache.path}: NAC: parameters {tmp_path}/c.params.json, space auto, objective guided, 2,701 trials, seed 3,"
        " chosen on id/val and ood/val",
    ]
    shown = told.replace("--", "-{}-")
    assert lines.count(rf"\par\smallskip\parbox{{\linewidth}}{{\footnotesize {shown}.}}") == 2


def test_the_names_that_papers_print() -> None:
    names = ("cifar100", "tin", "svhn", "mnist", "textures", "places365", "ssb_hard", "ninco", "inaturalist")
    assert [print_name(name) for name in (*names, "openimage_o", "my_set")] == [
        *("CIFAR-100", "TIN", "SVHN", "MNIST", "Textures", "Places365", "SSB-hard", "NINCO", "iNaturalist"),
        *("OpenImage-O", "my_set"),
    ]
    frame = pd.DataFrame([row("NAC", "ssb_hard", 0.1, 0.9)])
    frame.attrs["benchmark"] = "imagenet200"
    text = to_latex(frame)
    assert r"\multicolumn{2}{c}{SSB-hard}" in text
    assert r"\caption{Far-OOD detection on ImageNet-200, in percent;" in text


def compared(dataset: str, metric: str, first: float, second: float, low: float, high: float) -> dict[str, Any]:
    same = {"task": "ood", "group": "near", "first": "NAC", "second": "K_NN", "confidence": 0.95, "resamples": 100}
    chance = None if math.isnan(low) else not low <= 0 <= high
    values = {"first_value": first, "second_value": second, "difference": first - second, "low": low, "high": high}
    return {**same, "dataset": dataset, "metric": metric, **values, "more_than_chance": chance, "reason": ""}


def test_a_comparison_by_hand() -> None:
    """A difference is bold where its interval does not hold 0."""
    frame = pd.DataFrame(
        [
            compared("tin", "fpr95", 0.4, 0.5, -0.15, -0.05),
            compared("tin", "auroc", 0.9, 0.89, -0.01, 0.03),
            compared("mean", "fpr95", 0.4, math.nan, math.nan, math.nan),
            compared("mean", "auroc", 0.9, 0.8, 0.08, 0.12),
        ]
    )
    assert comparison_to_latex(frame).splitlines() == [
        r"% needs \usepackage{booktabs,graphicx}; all in percent",
        r"\begin{table}",
        r"\centering",
        r"\caption{NAC against K\_NN, in percent; ID is the test set. Difference: with its 95\% interval over 100"
        " paired draws of the images; bold where it does not hold 0.}",
        r"\label{tab:ood-difference}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        r"\begin{tabular}{lrrrrrr}",
        r"\toprule",
        r" & \multicolumn{3}{c}{FPR@95 $\downarrow$} & \multicolumn{3}{c}{AUROC $\uparrow$} \\",
        r"\cmidrule(lr){2-4} \cmidrule(lr){5-7}",
        r"Set & NAC & K\_NN & difference & NAC & K\_NN & difference \\",
        r"\midrule",
        r"TIN & 40.00 & 50.00 & \textbf{-10.00} {\scriptsize {[}-15.00, -5.00]}"
        r" & 90.00 & 89.00 & +1.00 {\scriptsize {[}-1.00, +3.00]} \\",
        r"Near-OOD & 40.00 & -- & -- & 90.00 & 80.00 & \textbf{+10.00} {\scriptsize {[}+8.00, +12.00]} \\",
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]


def test_the_command_prints_a_comparison(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr")
    write_params(tmp_path / "c.params.json", PARAMS)
    asked = ["evaluate", cache.path, "--against", "MSP", "--resamples", "20"]
    done = CliRunner().invoke(main, [*asked, "--latex"])
    assert (done.exit_code, done.stderr) == (0, "")
    rows = json.loads(CliRunner().invoke(main, [*asked, "--json"]).stdout)
    body = [line for line in done.stdout.splitlines() if line.count("&") == 6]
    assert len(body) == 1 + len(rows) // 2
    for line, fpr95, auroc in zip(body[1:], rows[::2], rows[1::2], strict=True):
        cells = line.split(" & ")
        assert [cells[1], cells[4]] == [f"{100 * row['first_value']:.2f}" for row in (fpr95, auroc)]
        assert [(r"\textbf" in cells[place]) for place in (3, 6)] == [row["more_than_chance"] for row in (fpr95, auroc)]
    assert r"{\footnotesize NAC: as published (1 layer, equal weights).}" in done.stdout
    assert rows[0]["parameters"] == "NAC: as published (1 layer, equal weights)"
