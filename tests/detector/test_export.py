"""Exporting: the counts are the oracle's, the threshold keeps the share it was chosen for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.detector import export
from nacpipe.detector.export import export_detector
from nacpipe.detector.file import Exported, read_detector, write_detector
from nacpipe.errors import DetectorError, InputError, ParamsError
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.coverage import fit_coverage, score_splits
from nacpipe.scoring.states import read_source
from tests import oracle

PARAMS = NacParams(
    layers={
        "layer1": LayerParams(bins=11, saturation=7, alpha=0.5, weight=3.0, edges="linear", source="gradient"),
        "avgpool": LayerParams(bins=20, saturation=5, alpha=0.5, weight=1.0),
    }
)


def test_counts_are_the_oracles(small_cache: Cache) -> None:
    exported = export_detector(small_cache, PARAMS)
    assert [one.name for one in exported.terms] == ["layer1", "avgpool"]
    taps = [(tap.name, tap.path, tap.pooling, tap.neurons) for tap in exported.taps]
    assert taps == [("layer1", "layer1", "sum-nchw", 4), ("avgpool", "avgpool", "sum-nchw", 6)]
    for one in exported.terms:
        products = read_source(small_cache["id/train"], one.name, one.params.source)
        edges = oracle.bin_edges(one.params.bins, one.params.edges)
        assert not oracle.in_doubt(products, one.params.alpha, edges).any()
        bins = oracle.bins_of(oracle.states(products, one.params.alpha), edges)
        np.testing.assert_array_equal(one.counts, oracle.count(bins, one.params.bins - 1))


def test_what_was_exported_is_read(small_cache: Cache, tmp_path: Path) -> None:
    exported = export_detector(small_cache, PARAMS, keep=0.9)
    write_detector(tmp_path / "d.safetensors", exported)
    found = read_detector(tmp_path / "d.safetensors")
    assert found.to_json() == exported.to_json()
    for one, other in zip(found.terms, exported.terms, strict=True):
        assert one.counts.dtype == np.int32
        np.testing.assert_array_equal(one.counts, other.counts)
        np.testing.assert_array_equal(one.borders, other.borders)
    assert (found.classes, found.outputs, found.train_rows, found.keep, found.mantissa_bits) == (3, 3, 60, 0.9, 23)
    assert found.identity["weights"] == small_cache.header.identity["weights"]
    assert found.identity["splits"] == {name: dict(small_cache[name].images) for name in ("id/train", "id/val")}
    assert found.transform.mean == (0.5,)


def test_the_same_detector_makes_the_same_bytes(small_cache: Cache, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_detector(tmp_path / name, export_detector(small_cache, PARAMS))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_layers_of_weight_0_are_left_out(small_cache: Cache) -> None:
    without = NacParams(layers={**PARAMS.layers, "layer1": LayerParams(bins=9, saturation=2, alpha=1.0, weight=0.0)})
    assert [one.name for one in export_detector(small_cache, without).terms] == ["avgpool"]


def test_embeddings_have_classes_of_their_labels(make_cache: object, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "e.zarr", identity={"outputs": "features"})  # type: ignore[operator]
    exported: Exported = export_detector(cache, PARAMS)
    assert (exported.classes, exported.outputs) == (3, 3)


@pytest.mark.parametrize("keep", [1.0, 0.95, 0.5, 0.01])
def test_the_threshold_keeps_its_share_of_id_val(small_cache: Cache, keep: float) -> None:
    exported = export_detector(small_cache, PARAMS, keep)
    scores = score_splits(small_cache, PARAMS, ["id/val"])["id/val"]
    assert exported.threshold in scores
    assert (scores >= exported.threshold).mean() >= keep
    assert (scores > exported.threshold).mean() < keep  # a higher one would not do


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (2, r"its images have 2 channels; files are prepared as grey \(1\) or RGB \(3\)$"),
        (4, "its images have 4 channels"),
    ],
)
def test_what_score_would_refuse_is_not_exported(
    make_cache: Callable[..., Cache], tmp_path: Path, channels: int, message: str
) -> None:
    transform = {"resize": 28, "crop": 28, "mean": [0.5] * channels, "std": [0.5] * channels}
    cache = make_cache(tmp_path / "c.zarr", identity={"transform": transform})
    with pytest.raises(DetectorError, match=rf"^{cache.path} cannot be exported: {message}"):
        export_detector(cache, PARAMS)


def test_a_network_of_one_class_is_not_exported(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", identity={"outputs": "features"})
    label = zarr.open_group(cache.path, mode="r+", use_consolidated=False)["id/train/label"]
    label[:] = 0  # type: ignore[index]
    CacheWriter(cache.path, cache.header).seal("id/train")
    with pytest.raises(
        DetectorError, match=rf"^{cache.path} cannot be exported: classes is 1; it must be a whole number"
    ):
        export_detector(open_cache(cache.path), PARAMS)


def test_what_cannot_be_exported_is_refused(small_cache: Cache) -> None:
    with pytest.raises(InputError, match=r"keep is 1\.5; it must be above 0 and at most 1"):
        export_detector(small_cache, PARAMS, 1.5)
    with pytest.raises(ParamsError, match=r"layer 'layer9' is not in .*small\.zarr"):
        export_detector(small_cache, NacParams(layers={"layer9": LayerParams(bins=9, saturation=2, alpha=1.0)}))


def test_a_layer_once_per_source(small_cache: Cache) -> None:
    """Both terms have the layer's module, each its own counts."""
    layer = LayerParams(bins=20, saturation=5, alpha=0.5)
    terms = {f"layer1:{source}": replace(layer, source=source) for source in ("product", "activation")}
    exported = export_detector(small_cache, NacParams(layers=terms))
    assert [one.name for one in exported.terms] == list(terms)
    assert [tap.path for tap in exported.taps] == ["layer1"]
    for one in exported.terms:
        alone = export_detector(small_cache, NacParams(layers={"layer1": one.params})).terms[0]
        np.testing.assert_array_equal(one.counts, alone.counts)


VIEWS = NacParams(
    layers={
        "layer1": LayerParams(bins=9, saturation=2, alpha=1.0),
        "avgpool:by_class": LayerParams(bins=200, saturation=2, alpha=1.0),
        "avgpool:gradient:by_class": LayerParams(bins=4, saturation=2, alpha=1.0, source="gradient"),
        "layer1:components": LayerParams(bins=9, saturation=2, alpha=1.0),
    }
)


@pytest.fixture(scope="module")
def classes(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """300 training images of three classes: each is a group."""
    return make_cache(tmp_path_factory.mktemp("classes") / "c.zarr", rows={"id/train": 300})


def test_views_are_written_and_read(classes: Cache, tmp_path: Path) -> None:
    exported = export_detector(classes, VIEWS)
    arrays = exported.to_arrays()
    assert arrays["class_groups"].tolist() == [0, 1, 2]
    assert arrays["avgpool:by_class/starts"].shape == (3 * 6 + 1,)  # 199 bins, few of them filled
    assert arrays["avgpool:gradient:by_class/counts"].shape == (3 * 6, 3)  # 3 bins: smaller as they are
    assert arrays["layer1:components/matrix"].shape == (4, 4)
    write_detector(tmp_path / "d", exported)
    found = read_detector(tmp_path / "d")
    assert found.to_json() == exported.to_json()
    assert [tap.name for tap in found.taps] == ["layer1", "avgpool"]
    coverage = fit_coverage(classes, VIEWS)
    for fitted in found.terms:
        values = read_source(classes["ood/val"], fitted.term.layer, fitted.term.source)
        logits = classes["ood/val"].read("logits")
        np.testing.assert_array_equal(fitted.score(values, logits), coverage.layers[fitted.name].score(values, logits))
        np.testing.assert_array_equal(fitted.counts, coverage.layers[fitted.name].counts)


@pytest.mark.parametrize("name", ["avgpool", "avgpool:by_class"])
def test_counts_are_stored_in_the_smaller_form(classes: Cache, name: str) -> None:
    for bins in (4, 5000):
        params = NacParams(layers={name: LayerParams(bins=bins, saturation=2, alpha=1.0)})
        arrays = export_detector(classes, params).to_arrays()
        assert (f"{name}/starts" in arrays) == (bins == 5000)
        stored = sum(array.nbytes for key, array in arrays.items() if not key.endswith("borders"))
        assert stored < 25_000


def test_a_detector_that_is_too_large_is_not_exported(classes: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "MAX_BYTES", 1_000)
    message = (
        r"c\.zarr cannot be exported: its arrays have 0 MB, at most 0 are written; the largest term is"
        r" 'avgpool:by_class' with 0 MB of 300 training images in 200 bins; give that term fewer bins or weight 0 in a"
        r" copy of the parameters, and export again with --params COPY$"
    )
    with pytest.raises(DetectorError, match=message):
        export_detector(classes, VIEWS)
