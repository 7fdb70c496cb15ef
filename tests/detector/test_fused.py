"""A detector with a feature score: its file, its scores on the network, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nacpipe.cache import Cache, open_cache
from nacpipe.detector import export
from nacpipe.detector.export import export_detector
from nacpipe.detector.file import Exported, read_detector, write_detector
from nacpipe.detector.fit import fit_detector
from nacpipe.detector.module import load_detector
from nacpipe.errors import DetectorError, InputError
from nacpipe.method.feature_scores import FEATURE_SCORES, FeatureScoreName, FusedScore
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.coverage import fit_coverage
from tests.detector.test_module import SPLITS, Case, make_case, run

LAYERS = {"avgpool": LayerParams(bins=20, saturation=5, alpha=0.5)}
FUSED = FusedScore(method="ViM", mean=0.5, deviation=2.0, weight=0.25)
PARAMS = NacParams(layers=LAYERS, fused=FUSED)


@pytest.mark.parametrize("method", FEATURE_SCORES)
def test_what_was_exported_is_read(small_cache: Cache, method: FeatureScoreName, tmp_path: Path) -> None:
    params = replace(PARAMS, fused=replace(FUSED, method=method))
    exported = export_detector(small_cache, params)
    write_detector(tmp_path / "d", exported)
    found = read_detector(tmp_path / "d")
    assert found.to_json() == exported.to_json()
    assert found.to_json()["nacpipe_detector"] == 4
    assert found.fused is not None and found.fused.params == params.fused
    split = small_cache["ood/val"]
    features, logits = split.read("features"), split.read("logits")
    expected = fit_coverage(small_cache, params).fused
    assert expected is not None
    np.testing.assert_array_equal(found.fused.score(features, logits), expected.score(features, logits))


def test_without_a_feature_score_the_file_is_as_it_was(small_cache: Cache) -> None:
    for params in (NacParams(layers=LAYERS), replace(PARAMS, fused=replace(FUSED, weight=0.0))):
        exported = export_detector(small_cache, params)
        assert exported.fused is None
        assert exported.to_json()["nacpipe_detector"] == 4 and "fused" not in exported.to_json()
        assert not any(name.startswith("fused") for name in exported.to_arrays())


def _drop(data: Any, arrays: Any) -> None:
    del arrays["fused.origin"]


def _shape(data: Any, arrays: Any) -> None:
    arrays["fused.principal"] = arrays["fused.principal"][:-1]


def _type(data: Any, arrays: Any) -> None:
    arrays["fused.alpha"] = arrays["fused.alpha"].astype(np.float32)


def _infinite(data: Any, arrays: Any) -> None:
    arrays["fused.origin"] = np.full_like(arrays["fused.origin"], np.inf)


def _more(data: Any, arrays: Any) -> None:
    arrays["fused.mean"] = np.zeros(6)


def _method(data: Any, arrays: Any) -> None:
    data["fused"]["method"] = "MSP"


def _none(data: Any, arrays: Any) -> None:
    del data["fused"]


def _older(data: Any, arrays: Any) -> None:
    data["nacpipe_detector"] = 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop, "^the origin of its fused ViM is not there$"),
        (_shape, r"^the principal of its fused ViM is float64 \(5, 3\); wanted: float64 \(6, 3\)$"),
        (_type, r"^the alpha of its fused ViM is float32 \(1,\); wanted: float64 \(1,\)$"),
        (_infinite, "^the origin of its fused ViM is not finite$"),
        (_more, "^array 'fused.mean' belongs to no term$"),
        (_method, "^fused method is 'MSP'; known: NCI, fDBD, ViM$"),
        (_none, "^its fused score is not there or has weight 0"),
        (_older, "^array 'fused.alpha' belongs to no term$"),
    ],
)
def test_what_is_wrong_is_named(small_cache: Cache, spoil: Callable[[Any, Any], None], message: str) -> None:
    exported = export_detector(small_cache, PARAMS)
    data, arrays = json.loads(json.dumps(exported.to_json())), dict(exported.to_arrays())
    spoil(data, arrays)
    with pytest.raises(DetectorError, match=message):
        Exported.from_json(data, arrays)


def test_its_arrays_count_for_the_size(small_cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = export_detector(small_cache, PARAMS)
    own = sum(array.nbytes for name, array in exported.to_arrays().items() if name.startswith("avgpool/"))
    monkeypatch.setattr(export, "MAX_BYTES", own)
    export_detector(small_cache, NacParams(layers=LAYERS))
    with pytest.raises(DetectorError, match="its arrays have"):
        export_detector(small_cache, PARAMS)


# --- on a network -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(digits_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    from nacpipe.extraction.request import ExtractRequest

    request = ExtractRequest(benchmark="digits", model="digits_cnn", cache=digits_cache, device="cpu", splits=SPLITS)
    return make_case(request, tmp_path_factory.mktemp("fused") / "d.safetensors")


@pytest.mark.repeats(1)
@pytest.mark.parametrize("method", FEATURE_SCORES)
def test_the_same_batches_give_the_caches_scores(digits: Case, method: FeatureScoreName, tmp_path: Path) -> None:
    params = replace(digits.params, fused=FusedScore(method=method, mean=1.0, deviation=2.0, weight=0.5))
    coverage = fit_coverage(digits.cache, params)
    write_detector(tmp_path / "d", export_detector(digits.cache, params))
    detector = load_detector(tmp_path / "d", digits.network())
    for split in ("id/val", "ood/val"):
        expected = coverage.score(digits.cache[split])
        assert np.abs(expected - digits.cached(split)).max() > 0.01  # it counts
        np.testing.assert_array_equal(run(detector, digits.images(split), 128), expected)
    images = digits.images("id/val")[:3].clone()
    images[1] = torch.nan
    found = detector(images)
    assert found.is_ood[1] and torch.isnan(found.score).tolist() == [False, True, False]


@pytest.mark.parametrize("method", FEATURE_SCORES)
@pytest.mark.slow
def test_a_detector_counted_from_batches_is_the_caches(digits: Case, method: FeatureScoreName) -> None:
    cache = open_cache(digits.cache.path)
    paths = {tap.name: tap.path for tap in digits.exported.taps}
    params = replace(digits.params, fused=FusedScore(method=method, mean=1.0, deviation=2.0, weight=0.5))
    batches = digits.images("id/train").split(128)
    detector = fit_detector(digits.network(), params, batches, {}, paths)
    expected = fit_coverage(cache, params).score(cache["ood/val"])
    np.testing.assert_allclose(run(detector, digits.images("ood/val"), 128), expected, atol=1e-6)


def test_a_network_without_a_last_linear_layer_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    params = NacParams(layers={"0": LayerParams(bins=9, saturation=2, alpha=1.0)}, fused=FUSED)
    with pytest.raises(InputError, match=r"^the score holds ViM, which needs the input of a last linear layer"):
        fit_detector(network, params, [torch.rand(4, 1, 8, 8)], {})
