"""Runs, means, empty cells, published rows and verdicts, by hand."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from nacpipe.cache import Cache, open_cache
from nacpipe.cli import main
from nacpipe.errors import IdentityError, InputError
from nacpipe.evaluation.bootstrap import add_confidence
from nacpipe.evaluation.method_scores import MethodScores, ScoredCache, score_cache
from nacpipe.evaluation.published_results import NETWORKS, RESULTS
from nacpipe.evaluation.tables import (
    METRICS,
    add_published,
    evaluate,
    evaluate_runs,
    footnotes,
    ordinal,
    tabulate,
    verdicts,
)
from nacpipe.method.metrics import detect
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.params_file import write_params

PARAMS = NacParams(layers={"avgpool": LayerParams(bins=20, saturation=5, alpha=0.5)})
OTHER = NacParams(layers={"layer1": LayerParams(bins=12, saturation=3, alpha=1.5)})


@pytest.fixture(scope="module")
def runs(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> list[Cache]:
    """Three training runs with a csid set and two far sets."""
    folder = tmp_path_factory.mktemp("runs")
    rows = {"csid/blurred": 25, "ood/far/faces": 40}
    caches = [
        make_cache(folder / f"s{seed}.zarr", rows=rows, seed=seed, identity={"weights": str(seed) * 64})
        for seed in range(3)
    ]
    for cache, params in zip(caches, (PARAMS, PARAMS, OTHER), strict=True):
        write_params(cache.path.replace(".zarr", ".params.json"), params)
    return caches


@pytest.fixture(scope="module")
def table(runs: list[Cache]) -> pd.DataFrame:
    return evaluate_runs(runs, [PARAMS, PARAMS, OTHER])


def invoke(*args: Any) -> Any:
    return CliRunner().invoke(main, ["evaluate", *map(str, args)])


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mean", "null"])
def test_a_set_of_a_reserved_name_has_rows_of_its_own(
    make_cache: Callable[..., Cache], tmp_path: Path, name: str
) -> None:
    """As a cache of an earlier nacpipe may hold it."""
    plain = score_cache(make_cache(tmp_path / "plain.zarr"), PARAMS)
    make_cache(tmp_path / "c.zarr")
    (tmp_path / "c.zarr/ood/near/letters").rename(tmp_path / f"c.zarr/ood/near/{name}")
    run = score_cache(open_cache(tmp_path / "c.zarr"), PARAMS)
    frame, expected = tabulate([run]), tabulate([plain])
    assert frame["dataset"].tolist() == [
        f"ood/near/{name}" if dataset == "letters" else dataset for dataset in expected["dataset"]
    ]
    pd.testing.assert_series_equal(frame["auroc"], expected["auroc"])
    reason = (
        "tables name the mean over a group's sets so"
        if name == "mean"
        else "pandas reads it as a missing value in a table"
    )
    assert frame.attrs["note"] == f"ood/near/{name} is listed by its whole name: '{name}' is reserved, {reason}"
    sure = add_confidence(frame, [run], resamples=20)
    sure_expected = add_confidence(expected, [plain], resamples=20)
    far = expected["group"] == "far"  # near draws are of another set's name
    pd.testing.assert_series_equal(sure["auroc_low"][far], sure_expected["auroc_low"][far])
    assert (sure["auroc_low"] < sure["auroc_high"]).all()
    printed = invoke(tmp_path / "c.zarr", "--params", write_there(tmp_path), "--csv")
    assert f"ood,near,ood/near/{name},NAC," in printed.stdout
    assert pd.read_csv(io.StringIO(printed.stdout))["dataset"].notna().all()


def write_there(folder: Path) -> Path:
    write_params(folder / "p.json", PARAMS)
    return folder / "p.json"


# --- several runs -----------------------------------------------------------------------------------------------------


def test_means_and_deviations_over_runs_by_hand(runs: list[Cache], table: pd.DataFrame) -> None:
    """Divided by the number of runs (ddof 0), and a group's deviation is that of the runs' group means."""
    singles = [evaluate(cache, params) for cache, params in zip(runs, (PARAMS, PARAMS, OTHER), strict=True)]
    keys = ["task", "group", "dataset", "method"]
    assert table[keys].equals(singles[0][keys])
    for row in range(len(table)):
        for metric in (*METRICS, "accuracy"):
            values = [float(single[metric].iloc[row]) for single in singles]
            mean = sum(values) / 3
            assert table[metric].iloc[row] == pytest.approx(mean, abs=1e-15)
            spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 3)
            assert table[f"{metric}_std"].iloc[row] == pytest.approx(spread, abs=1e-15)
    assert set(table["runs"]) == {3}
    nac = table.query("task == 'ood' and group == 'far' and dataset == 'mean' and method == 'NAC'").iloc[0]
    per_run = [
        np.mean(single.query("task == 'ood' and group == 'far' and dataset != 'mean' and method == 'NAC'")["auroc"])
        for single in singles
    ]
    assert nac["auroc_std"] == pytest.approx(np.std(per_run), abs=1e-15)
    assert nac["auroc_std"] > 0


def test_every_output_holds_the_runs(runs: list[Cache], table: pd.DataFrame, tmp_path: Path) -> None:
    paths = [cache.path for cache in runs]
    rows = [
        {k: v for k, v in row.items() if not k.startswith("flagged")}
        for row in json.loads(invoke(*paths, "--json").stdout)
    ]
    pd.testing.assert_frame_equal(pd.DataFrame(rows), table, rtol=1e-14)
    (tmp_path / "t.csv").write_text(invoke(*paths, "--csv").stdout)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "t.csv", keep_default_na=False), table)
    lines = invoke(*paths, "--markdown").stdout.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == list(table.columns)
    place = cells[0].index("auroc_std")
    assert [row[place] for row in cells[2:]] == [f"{value:.6g}" for value in table["auroc_std"]]
    printed = invoke(*paths).stdout
    first = table.iloc[0]
    assert printed.startswith(
        f"OOD: ID is id/test (50 images, 3 runs, accuracy {100 * first['accuracy']:.2f}"
        f" ± {100 * first['accuracy_std']:.2f} %); all in percent\n"
    )
    row = next(line for line in printed.splitlines() if line.startswith("near letters"))
    shown = [f"{100 * first[metric]:.2f} ± {100 * first[f'{metric}_std']:.2f}".split() for metric in METRICS]
    assert row.split() == ["near", "letters", "NAC", *(word for cell in shown for word in cell), "35"]


def test_parameters_once_for_all_or_once_for_each(runs: list[Cache], table: pd.DataFrame) -> None:
    paths = [cache.path for cache in runs]
    files = [path.replace(".zarr", ".params.json") for path in paths]
    each = json.loads(invoke(*paths, *(word for file in files for word in ("--params", file)), "--json").stdout)
    pd.testing.assert_frame_equal(pd.DataFrame(each)[list(table.columns)], table, rtol=1e-14)
    once = json.loads(invoke(*paths, "--params", files[0], "--json").stdout)
    assert once[0]["auroc"] == pytest.approx(evaluate_runs(runs, [PARAMS] * 3)["auroc"].iloc[0], abs=1e-15)
    assert once[0]["auroc"] != table["auroc"].iloc[0]
    printed = invoke(*paths, "--params", files[0], "--params", files[1])
    assert printed.exit_code == 2
    assert "--params is given 2 times for 3 caches; give it once for each." in printed.stderr


@pytest.mark.slow
def test_what_is_no_other_run_is_refused(make_cache: Callable[..., Cache], runs: list[Cache], tmp_path: Path) -> None:
    rows = {"csid/blurred": 25, "ood/far/faces": 40}
    wrong: Mapping[str, tuple[dict[str, Any], str]] = {
        "a": ({"rows": rows, "identity": {"weights": "a" * 64, "dtype": "bfloat16"}}, "dtype: stored float32, now bf"),
        "b": ({"rows": {**rows, "ood/far/words": 9}, "identity": {"weights": "b" * 64}}, r"splits\.ood/far/words: sto"),
        "c": ({"identity": {"weights": "c" * 64}}, r"splits\.csid/blurred: stored \{.*, now nothing"),
    }
    for name, (made, message) in wrong.items():
        other = make_cache(tmp_path / f"{name}.zarr", **made)
        with pytest.raises(IdentityError, match=rf"s0\.zarr \(stored\) and .*{name}\.zarr \(now\) differ .*{message}"):
            evaluate_runs([runs[0], other], [PARAMS, PARAMS])
        printed = invoke(runs[0].path, other.path)
        assert (printed.exit_code, printed.stdout) == (1, "")
    with pytest.raises(IdentityError, match=r"s1\.zarr and .*s1\.zarr hold the same weights: they are one run"):
        evaluate_runs([runs[0], runs[1], runs[1]], [PARAMS] * 3)


# --- empty cells ------------------------------------------------------------------------------------------------------


def scored(methods: Mapping[str, MethodScores], path: str = "x.zarr") -> ScoredCache:
    rows = {"id/test": 4, "ood/near/a": 2, "ood/far/b": 2, "ood/far/c": 2}
    return ScoredCache(path=path, methods=methods, rows=rows, correct={"id/test": 3}, note="")


INSIDE, OUTSIDE = np.array([4.0, 3.0, 2.0, 1.0]), np.array([2.5, 0.0])
WHOLE = MethodScores(scores={"id/test": INSIDE, **dict.fromkeys(("ood/near/a", "ood/far/b", "ood/far/c"), OUTSIDE)})
PART = MethodScores(
    scores={"id/test": INSIDE, "ood/near/a": OUTSIDE, "ood/far/b": OUTSIDE},
    reasons={"ood/far/c": "1 of 2 scores of ood/far/c are not finite"},
    fitted_on="id/val",
    n_fitted=7,
)
NONE = MethodScores(reasons=dict.fromkeys(("id/test", "ood/near/a", "ood/far/b", "ood/far/c"), "it cannot"))


def test_an_empty_set_empties_the_mean_and_says_why() -> None:
    table = tabulate([scored({"whole": WHOLE, "part": PART, "none": NONE})]).set_index(["group", "dataset", "method"])
    expected = detect(INSIDE, OUTSIDE).auroc
    assert expected == 6 / 8
    assert table.loc[("far", "b", "part"), "auroc"] == expected
    assert table.loc[("near", "mean", "part"), "auroc"] == expected
    assert math.isnan(table.loc[("far", "c", "part"), "auroc"])
    for metric in METRICS:
        assert math.isnan(table.loc[("far", "mean", "part"), metric])
        assert not math.isnan(table.loc[("far", "mean", "whole"), metric])
    assert table.loc[("far", "c", "part"), "reason"] == "1 of 2 scores of ood/far/c are not finite"
    assert table.loc[("far", "mean", "part"), "reason"] == "c: 1 of 2 scores of ood/far/c are not finite"
    assert table.loc[("far", "mean", "none"), "reason"] == "it cannot"
    assert (table.loc[("far", "c", "part"), "fitted_on"], table.loc[("far", "c", "part"), "n_fitted"]) == ("id/val", 7)
    assert set(table["accuracy"]) == {0.75}


def test_a_run_that_is_empty_empties_the_cell_over_runs() -> None:
    table = tabulate([scored({"m": WHOLE}, "one"), scored({"m": PART}, "two")]).set_index(["group", "dataset"])
    assert table.loc[("near", "a"), "auroc"] == 0.75
    assert math.isnan(table.loc[("far", "c"), "auroc"])
    assert math.isnan(table.loc[("far", "c"), "auroc_std"])
    assert table.loc[("far", "c"), "reason"] == "two: 1 of 2 scores of ood/far/c are not finite"


def test_footnotes() -> None:
    table = tabulate([scored({"whole": WHOLE, "part": PART, "none": NONE, "other": NONE})])
    assert footnotes(table) == [
        "fitted on id/val (7 images): part",
        "empty: none, other: it cannot",
        "empty: part: 1 of 2 scores of ood/far/c are not finite",
    ]


# --- verdicts ---------------------------------------------------------------------------------------------------------


def method(shift: float) -> MethodScores:
    inside = {"id/test": INSIDE}
    return MethodScores(scores={**inside, **dict.fromkeys(("ood/near/a", "ood/far/b", "ood/far/c"), OUTSIDE + shift)})


def test_verdicts_say_where_nac_ranks_among_those_that_have_a_value() -> None:
    table = tabulate([scored({"NAC": method(0), "A": method(-1), "B": method(2), "none": NONE})])
    # AUROC of NAC 6/8, of A 7/8 (1.5 and −1), of B (4.5 and 2) 2.5/8
    assert verdicts(table) == [
        "near-OOD: NAC ranks second of 3 by AUROC, 75.00 % (A 87.50 %)",
        "far-OOD: NAC ranks second of 3 by AUROC, 75.00 % (A 87.50 %)",
    ]
    table = tabulate([scored({"NAC": method(0), "A": method(0), "B": method(2)})])
    assert verdicts(table)[0] == "near-OOD: NAC shares first of 3 by AUROC, 75.00 % (A 75.00 %)"
    assert verdicts(tabulate([scored({"A": method(2), "B": method(0)})]))[0] == (
        "near-OOD: B ranks first of 2 by AUROC, 75.00 % (A 31.25 %)"
    )
    assert verdicts(tabulate([scored({"A": method(2)})]))[0] == "near-OOD: A ranks first of 1 by AUROC, 31.25 %"
    assert verdicts(tabulate([scored({"none": NONE})])) == []


def test_ordinals() -> None:
    said = {1: "first", 2: "second", 3: "third", 4: "4th", 11: "11th", 12: "12th", 21: "21st", 22: "22nd", 113: "113th"}
    assert {number: ordinal(number) for number in said} == said


# --- published --------------------------------------------------------------------------------------------------------


def share(percent: str) -> float | None:
    """90.93 → 0.9093, by moving the point."""
    return float(Decimal(percent).scaleb(-2)) if percent else None


def test_published_results_are_the_papers(shared: Path) -> None:
    """Every AUROC, deviation and FPR@95 that the sheet of facts names, and no other."""
    text = (shared / "paper.md").read_text("utf-8").split("## Published results")[1].split("\n## ")[0]
    benchmarks = {"CIFAR-10 ResNet-18": "cifar10", "CIFAR-100 ResNet-18": "cifar100"}
    benchmarks |= {"ImageNet-200 ResNet-18": "imagenet200", "ImageNet-1k ResNet-50": "imagenet"}
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    for name, nac, others in table[2:]:
        found = {(r.method, r.group): r for r in RESULTS[benchmarks[name]] if r.dataset == "mean"}
        assert name.endswith(NETWORKS[benchmarks[name]])
        cells, _, fpr = nac.partition("; FPR@95 far ")
        told = {("NAC-UE", group): cell for group, cell in zip(("near", "far"), cells.split(" / "), strict=True)}
        for other in others.split(", "):
            method, values = other.rsplit(" ", 1)
            told |= {(method, group): cell for group, cell in zip(("near", "far"), values.split("/"), strict=True)}
        for key, cell in told.items():
            auroc, _, spread = cell.partition(" ± ")
            assert found[key].auroc == share(auroc)
            assert found[key].auroc_std == share(spread)
        assert set(found) == set(told)
        value, _, spread = fpr.partition(" ± ")
        assert found["NAC-UE", "far"].fpr95 == share(value)
        assert found["NAC-UE", "far"].fpr95_std == share(spread)
    sets = text.split("NAC-UE FPR@95 / AUROC: ")[1].split(".\n")[0].split(", ")
    names = {"MNIST": "mnist", "SVHN": "svhn", "Textures": "texture", "Places": "places365"}
    expected = {names[one.split()[0]]: tuple(float(v) / 100 for v in one.split()[1].split("/")) for one in sets}
    far = {r.dataset: (r.fpr95, r.auroc) for r in RESULTS["cifar10"] if r.dataset != "mean"}
    assert far == {name: pytest.approx(values) for name, values in expected.items()}


def test_published_rows_are_marked_and_never_ranked() -> None:
    table = tabulate([scored({"NAC": method(0), "A": method(2)})])
    whole = add_published(table, "cifar10")
    measured = whole[whole["source"] == "measured"]
    pd.testing.assert_frame_equal(measured[list(table.columns)], table, check_dtype=False)
    published = whole[whole["source"] == "published"]
    assert len(whole) == len(measured) + len(published) == len(table) + len(RESULTS["cifar10"])
    nac = published.query("method == 'NAC-UE' and group == 'far' and dataset == 'mean'").iloc[0]
    assert (nac["auroc"], nac["auroc_std"], nac["fpr95"], nac["fpr95_std"]) == (0.946, 0.0049, 0.1831, 0.0092)
    assert published[["aupr_in", "aupr_out", "accuracy", "n_id", "n_ood", "n_fitted"]].isna().all(axis=None)
    assert measured[["auroc_std", "fpr95_std"]].isna().all(axis=None)
    assert set(published["reason"]) == {"published, ResNet-18"}
    assert verdicts(whole) == verdicts(table)
    assert footnotes(whole) == footnotes(table)
    with pytest.raises(InputError, match=r"^no published results are known for digits; they are for cifar10, cifar100"):
        add_published(table, "digits")


def test_published_rows_as_printed(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", identity={"benchmark": "cifar10"})
    write_params(tmp_path / "c.params.json", PARAMS)
    printed = invoke(cache.path, "--published-results").stdout
    line = next(line for line in printed.splitlines() if line.strip().startswith("NAC-UE (published, ResNet-18)"))
    assert line.split() == ["NAC-UE", "(published,", "ResNet-18)", "–", "90.93", "±", "0.23", "–", "–"]
    rows = json.loads(invoke(cache.path, "--published-results", "--json").stdout)
    assert [row["n_id"] for row in rows if row["source"] == "published"] == [None] * len(RESULTS["cifar10"])
    assert {row["n_id"] for row in rows if row["source"] == "measured"} == {50}
    lines = invoke(cache.path, "--published-results", "--markdown").stdout.splitlines()
    columns = [cell.strip() for cell in lines[0].strip("|").split("|")]
    last = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    told = {"task": "ood", "group": "far", "dataset": "mean", "method": "fDBD", "auroc": "0.9316"}
    told |= {"reason": "published, ResNet-18", "source": "published"}
    assert dict(zip(columns, last, strict=True)) == {**dict.fromkeys(columns, ""), **told}


@pytest.mark.parametrize("more", [["--published-results"], ["--baselines", "KNN"]])
def test_a_table_and_the_comparison_below_it(make_cache: Callable[..., Cache], tmp_path: Path, more: list[str]) -> None:
    cache = make_cache(tmp_path / "c.zarr", identity={"benchmark": "cifar10"})
    write_params(tmp_path / "c.params.json", PARAMS)
    against = ["--against", "MSP", "--resamples", "20"]
    printed = [invoke(cache.path, *options).stdout for options in (more, against, [*more, *against])]
    assert printed[2] == f"{printed[0]}\n{printed[1]}"
    refused = invoke(cache.path, *more, *against, "--json")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "Table and comparison are two tables, --json is one: leave out --against for the table, --ba" in " ".join(
        refused.stderr.split()
    )


def test_fsood_joins_id_and_csid(runs: list[Cache]) -> None:
    """By hand, from the scores themselves."""
    run = score_cache(runs[0], PARAMS)
    table = tabulate([run])
    row = table.query("task == 'fsood' and dataset == 'faces' and method == 'MSP'").iloc[0]
    found = run.methods["MSP"].scores
    pairs = [
        (a > b) + 0.5 * (a == b) for a in (*found["id/test"], *found["csid/blurred"]) for b in found["ood/far/faces"]
    ]
    assert row["auroc"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert row["n_id"] == 75
