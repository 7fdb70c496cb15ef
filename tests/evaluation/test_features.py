"""A cache of a network that gives features and not logits: what needs logits is empty, and says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from nacpipe.cache import Cache
from nacpipe.cli import main
from nacpipe.evaluation.method_scores import score_cache
from nacpipe.evaluation.tables import METRICS, evaluate
from nacpipe.method.outputs import NO_LOGITS
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.plain_scores import LOGIT_BASELINES
from nacpipe.scoring.params_file import write_params
from nacpipe.scoring.states import has_logits

NOTE = "accuracy, MSP, MaxLogit, Energy are left empty: what this network gives are features, not logits"

PARAMS = NacParams(layers={"avgpool": LayerParams(bins=20, saturation=5, alpha=0.5)})


@pytest.fixture(scope="module")
def features(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("features") / "f.zarr", identity={"outputs": "features"})


@pytest.fixture(scope="module")
def logits(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("logits") / "l.zarr")


def test_only_nac_is_scored(features: Cache, logits: Cache) -> None:
    assert (has_logits(features), has_logits(logits)) == (False, True)
    scored = score_cache(features, PARAMS)
    assert [name for name, method in scored.methods.items() if method.scores] == ["NAC"]
    assert scored.correct == {}
    for name in LOGIT_BASELINES:
        assert scored.methods[name].reasons == dict.fromkeys(scored.rows, NO_LOGITS)


def test_what_needs_logits_is_empty(features: Cache, logits: Cache) -> None:
    found, other = evaluate(features, PARAMS), evaluate(logits, PARAMS)
    assert found[["task", "group", "dataset", "method", "n_id", "n_ood"]].equals(
        other[["task", "group", "dataset", "method", "n_id", "n_ood"]]
    )
    nac = found["method"] == "NAC"
    assert found.loc[nac, list(METRICS)].equals(other.loc[nac, list(METRICS)])
    assert found.loc[~nac, list(METRICS)].isna().all(axis=None)
    assert found["accuracy"].isna().all()
    assert other.notna().all(axis=None)
    assert (found.attrs.get("note"), other.attrs.get("note")) == (NOTE, None)
    assert set(found.loc[~nac, "reason"]) == {NO_LOGITS}
    assert set(found.loc[nac, "reason"]) == {""}
    assert evaluate(features, None)[list(METRICS)].isna().all(axis=None)


def test_the_table_says_why(features: Cache, tmp_path: Path) -> None:
    write_params(tmp_path / "p.json", PARAMS)
    printed = CliRunner().invoke(main, ["evaluate", features.path, "--params", str(tmp_path / "p.json")])
    assert printed.stderr == (
        "accuracy, MSP, MaxLogit, Energy are left empty: what this network gives are features, not logits\n"
    )
    assert "accuracy – %)" in printed.stdout
    assert f"\nempty: MSP, MaxLogit, Energy: {NO_LOGITS}\n" in printed.stdout
    assert next(line.split()[-5:-1] for line in printed.stdout.splitlines() if "Energy" in line) == ["–"] * 4
    printed = CliRunner().invoke(main, ["evaluate", features.path, "--params", str(tmp_path / "p.json"), "--json"])
    energy = next(row for row in json.loads(printed.stdout) if row["method"] == "Energy")
    assert (energy["auroc"], energy["accuracy"]) == (None, None)
