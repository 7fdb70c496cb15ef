"""The packaged benchmark end to end: two training runs in one table, and the full spectrum, by hand."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from nacpipe.cache import Cache, open_cache
from nacpipe.cli import main
from nacpipe.evaluation.method_scores import score_cache
from nacpipe.evaluation.tables import evaluate, evaluate_runs
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.params_file import write_params

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]  # a network is trained

SPLITS = "id/train,id/test,csid/digits8x8,ood/near/letters,ood/far/faces"
PARAMS = NacParams(
    layers={
        "avgpool": LayerParams(bins=13, saturation=1, alpha=0.3, weight=3),
        "layer3": LayerParams(bins=51, saturation=65, alpha=0.03),
    }
)
METRICS = ("fpr95", "auroc", "aupr_in", "aupr_out")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits_train: ModuleType) -> list[Cache]:
    """The packaged network, and one trained by the script from another seed for two epochs."""
    folder = tmp_path_factory.mktemp("runs")
    weights = folder / "seed2.safetensors"
    trained = CliRunner().invoke(digits_train.main, ["--seed", "2", "--epochs", "2", "--output", str(weights)])
    assert trained.exit_code == 0, trained.output
    for name, more in (("s1", []), ("s2", ["--checkpoint", str(weights)])):
        command = ["extract", "digits", "--cache", str(folder / f"{name}.zarr"), "--splits", SPLITS, "--device", "cpu"]
        done = CliRunner().invoke(main, [*command, *more])
        assert done.exit_code == 0, done.output
        write_params(folder / f"{name}.params.json", PARAMS)
    return [open_cache(folder / f"{name}.zarr") for name in ("s1", "s2")]


def printed(runs: list[Cache], form: str) -> str:
    done = CliRunner().invoke(main, ["evaluate", *(cache.path for cache in runs), form])
    assert done.exit_code == 0, done.output
    return done.stdout


def read_table(text: str, form: str) -> list[dict[str, Any]]:
    """Any of the three forms as rows of words."""
    if form == "--json":
        return [{key: str(value) for key, value in row.items()} for row in json.loads(text)]
    if form == "--csv":
        return list(csv.DictReader(io.StringIO(text)))
    cells = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


@pytest.mark.parametrize(("form", "digits"), [("--json", 1e-14), ("--csv", 1e-14), ("--markdown", 1e-5)])
def test_two_training_runs(runs: list[Cache], form: str, digits: float) -> None:
    """Means and deviations by hand from the two tables; with two values the deviation is half their distance."""
    first, second = (evaluate(cache, PARAMS).to_dict("records") for cache in runs)
    rows = read_table(printed(runs, form), form)
    assert len(rows) == len(first) == len(second) == 2 * 4 * 4
    moved = 0
    for row, a, b in zip(rows, first, second, strict=True):
        assert [row[key] for key in ("task", "group", "dataset", "method")] == [
            a[key] for key in ("task", "group", "dataset", "method")
        ]
        assert row["runs"] == "2"
        for metric in (*METRICS, "accuracy"):
            assert float(row[metric]) == pytest.approx((a[metric] + b[metric]) / 2, rel=digits, abs=1e-15)
            assert float(row[f"{metric}_std"]) == pytest.approx(abs(a[metric] - b[metric]) / 2, rel=digits, abs=1e-15)
            moved += a[metric] != b[metric]
    assert moved > 50
    assert evaluate_runs(runs, [PARAMS, PARAMS])["auroc"].iloc[0] == pytest.approx(float(rows[0]["auroc"]), rel=digits)


def test_the_full_spectrum(runs: list[Cache]) -> None:
    """ID is the test digits and those of another data set: every pair is counted, every method has a finite cell."""
    cache = runs[0]
    table = evaluate(cache, PARAMS).query("task == 'fsood'")
    assert np.isfinite(table[[*METRICS, "accuracy"]].to_numpy()).all()
    assert set(table["n_id"]) == {1000 + 1797}
    right = sum(
        int((np.asarray(cache[name].logits[:]).argmax(axis=1) == cache[name].label).sum())
        for name in ("id/test", "csid/digits8x8")
    )
    assert set(table["accuracy"]) == {right / 2797}
    for method, scored in score_cache(cache, PARAMS).methods.items():
        for name in ("ood/near/letters", "ood/far/faces"):
            inside = [*scored.scores["id/test"], *scored.scores["csid/digits8x8"]]
            outside = scored.scores[name]
            above = sum(int((value > outside).sum()) for value in inside)
            tied = sum(int((value == outside).sum()) for value in inside)
            row = table[(table["dataset"] == name.split("/")[-1]) & (table["method"] == method)].iloc[0]
            assert row["auroc"] == pytest.approx((above + tied / 2) / (2797 * len(outside)), abs=1e-12)
            # FPR@95: the lowest threshold that flags 95 % of the OOD images.
            threshold = next(t for t in sorted(outside) if (outside <= t).sum() >= 0.95 * len(outside))
            assert row["fpr95"] == sum(value <= threshold for value in inside) / 2797
    path = Path(cache.path)
    rows = json.loads(CliRunner().invoke(main, ["evaluate", str(path), "--json"]).stdout)
    assert [row["auroc"] for row in rows if row["task"] == "fsood"] == pytest.approx(list(table["auroc"]), rel=1e-14)
