"""A feature score as a member of the sum: the oracle's values, both ways to score, parameters, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from nacpipe.cache import Cache, open_cache
from nacpipe.errors import ParamsError
from nacpipe.method.coverage import combine_layers
from nacpipe.method.feature_scores import FEATURE_SCORES, FeatureScoreName, FusedScore
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.coverage import fit_coverage, score_splits
from nacpipe.scoring.fusion import compute_feature_scores, read_feature_score, why_not_fused
from nacpipe.scoring.params_file import read_params, write_params
from nacpipe.tuning.objective import Objective
from tests import oracle

LAYERS = {
    "avgpool": LayerParams(bins=20, saturation=5, alpha=0.5, weight=3.0),
    "layer1:activation": LayerParams(bins=9, saturation=2, alpha=1.0, source="activation"),
}
FUSED = FusedScore(method="ViM", mean=0.5, deviation=2.0, weight=0.25)
PARAMS = NacParams(layers=LAYERS, fused=FUSED)


def oracle_scores(cache: Cache, method: str, split: str) -> list[float]:
    train, classifier = cache["id/train"], cache.classifier()
    assert classifier is not None
    learnt = [a.astype(np.float64) for a in (train.read("features"), train.read("logits"), *classifier)]
    features, logits = (cache[split].read(what).astype(np.float64) for what in ("features", "logits"))
    return [oracle.feature_score(method, z, values, *learnt) for z, values in zip(features, logits, strict=True)]


@pytest.mark.parametrize("method", FEATURE_SCORES)
def test_feature_scores_are_the_oracles(small_cache: Cache, method: FeatureScoreName) -> None:
    splits = [small_cache[name] for name in ("id/val", "ood/far/textures")]
    found = compute_feature_scores(read_feature_score(small_cache, method), splits)
    expected = [score for split in splits for score in oracle_scores(small_cache, method, split.name)]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", FEATURE_SCORES)
def test_the_fused_score_is_one_more_member_of_the_weighted_sum(small_cache: Cache, method: FeatureScoreName) -> None:
    fused = replace(FUSED, method=method)
    found = score_splits(small_cache, replace(PARAMS, fused=fused), ["ood/val"])["ood/val"]
    coverage = score_splits(small_cache, NacParams(layers=LAYERS), ["ood/val"])["ood/val"]  # of weights 3 and 1
    standardised = (np.array(oracle_scores(small_cache, method, "ood/val")) - 0.5) / 2.0
    np.testing.assert_allclose(found, (4.0 * coverage + 0.25 * standardised) / 4.25, atol=1e-7)


@pytest.mark.parametrize("method", FEATURE_SCORES)
@pytest.mark.parametrize("block", [1, 7])
def test_block_boundaries_do_not_matter(small_cache: Cache, method: FeatureScoreName, block: int) -> None:
    coverage, split = (
        fit_coverage(small_cache, replace(PARAMS, fused=replace(FUSED, method=method))),
        "ood/near/letters",
    )
    whole = coverage.score(small_cache[split])
    np.testing.assert_array_equal(coverage.score(small_cache[split], block=block), whole)


@pytest.mark.parametrize("method", FEATURE_SCORES)
def test_the_search_scores_as_a_table_does(small_cache: Cache, method: FeatureScoreName) -> None:
    objective = Objective(small_cache)
    params = objective.weigh(NacParams(layers=LAYERS), method)
    assert params.fused is not None and params.fused.method == method
    weights = [*(layer.weight for layer in params.layers.values()), params.fused.weight]
    assert sum(weights) == pytest.approx(1.0) and min(weights) >= 0
    own = oracle_scores(small_cache, method, "id/val")
    assert (params.fused.mean, params.fused.deviation) == pytest.approx((np.mean(own), np.std(own)))
    found, coverage = objective.scorer.scores(params), fit_coverage(small_cache, params)
    for name, rows in objective.scorer.rows.items():
        np.testing.assert_array_equal(found[rows], coverage.score(small_cache[name]))


def test_a_fused_score_is_weighed_as_a_term_is(small_cache: Cache) -> None:
    """Its weight is what the ridge regression gives a column of its scores among the terms' columns."""
    from nacpipe.method.weights import ridge_weights

    objective = Objective(small_cache)
    params = objective.weigh(NacParams(layers=LAYERS), "NCI")
    assert params.fused is not None
    pair = [objective.scorer.rows[name] for name in ("id/val", "ood/val")]
    members = [*objective.scorer.layer_scores(LAYERS), params.fused.standardise(objective._feature_scores("NCI"))]
    columns = np.stack([np.concatenate([member[rows] for rows in pair]) for member in members], axis=1)
    assert objective.evaluator._target is not None
    expected = ridge_weights(columns, objective.evaluator._target)
    weights = [*(layer.weight for layer in params.layers.values()), params.fused.weight]
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    np.testing.assert_array_equal(objective.scorer.scores(params), combine_layers(np.stack(members), np.array(weights)))


def test_parameters_go_through_a_file(tmp_path: Path) -> None:
    write_params(tmp_path / "p.json", PARAMS)
    assert read_params(tmp_path / "p.json") == PARAMS
    assert eval(repr(PARAMS)) == PARAMS
    stored = json.loads((tmp_path / "p.json").read_text())
    assert stored["fused"] == {"method": "ViM", "mean": 0.5, "deviation": 2.0, "weight": 0.25}
    del stored["fused"]  # as an earlier nacpipe wrote it
    assert NacParams.from_json(stored) == NacParams(layers=LAYERS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "MSP"}, "^fused method is 'MSP'; known: NCI, fDBD, ViM$"),
        ({"deviation": 0.0}, r"^fused deviation is 0\.0; it must be above 0$"),
        ({"weight": -1}, r"^fused weight is -1\.0; it must be at least 0$"),
        ({"mean": float("nan")}, "^fused mean is nan; it must be a finite number$"),
        ({"mean": "1"}, "^fused mean is '1'; it must be a finite number$"),
        ({"more": 1}, "^fused must be an object with method, mean, deviation, weight$"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    data = PARAMS.to_json()
    with pytest.raises(ParamsError, match=message):
        NacParams.from_json({**data, "fused": {**data["fused"], **change}})


def test_a_cache_without_a_classifier_has_none(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    path = make_cache(tmp_path / "c.zarr").path
    del zarr.open_group(path, mode="r+")["classifier"]
    cache = open_cache(path)
    assert why_not_fused(cache) == "the cache holds no last linear layer"
    with pytest.raises(
        ParamsError, match=r"a fused ViM cannot be computed of .*c\.zarr: the cache holds no last linear"
    ):
        fit_coverage(cache, PARAMS)
