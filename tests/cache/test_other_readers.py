"""A cache is a Zarr store like any other: other libraries open it and read the same values, without a warning."""

from __future__ import annotations

import numpy as np
import pytest
import zarr

from nacpipe.cache import Cache

LAYER = "id/val/layers/layer1"


@pytest.mark.parametrize("consolidated", [None, True, False])
def test_zarr(small_cache: Cache, consolidated: bool | None) -> None:
    root = zarr.open_group(small_cache.path, mode="r", use_consolidated=consolidated)
    assert root["id/val"].attrs["rows"] == 40
    for what in ("activation", "gradient"):
        array = root[f"{LAYER}/{what}"]
        assert isinstance(array, zarr.Array)
        np.testing.assert_array_equal(array[:], small_cache["id/val"].read_layer("layer1", what))
    assert sorted(dict(root["ood"].members(max_depth=None))) == sorted(  # type: ignore[union-attr]
        key.removeprefix("ood/") for key in dict(root.members(max_depth=None)) if key.startswith("ood/")
    )


@pytest.mark.parametrize("consolidated", [None, True, False])
def test_xarray(small_cache: Cache, consolidated: bool | None) -> None:
    xarray = pytest.importorskip("xarray")
    split = xarray.open_zarr(small_cache.path, group="id/val", consolidated=consolidated)
    assert dict(split.sizes) == {"sample": 40, "feature": 6, "class": 3, "block": 3}
    for name in ("logits", "features", "label", "index"):
        np.testing.assert_array_equal(split[name].values, small_cache["id/val"].read(name))
    assert split["label"].dtype == np.int64
    layer = xarray.open_zarr(small_cache.path, group=LAYER, consolidated=consolidated)
    assert dict(layer.sizes) == {"sample": 40, "neuron": 4}
    np.testing.assert_array_equal(layer["gradient"].values, small_cache["id/val"].read_layer("layer1", "gradient"))


def test_xarray_as_one_tree(small_cache: Cache) -> None:
    xarray = pytest.importorskip("xarray")
    tree = xarray.open_datatree(small_cache.path, engine="zarr")
    assert tree["ood/near/letters"].attrs["rows"] == 35
    np.testing.assert_array_equal(tree["classifier/bias"].values, np.array([0.1, 0.0, -0.1], np.float32))


@pytest.mark.parametrize("path", [f"{LAYER}/activation", "id/val/logits", "id/val/label", "classifier/weight"])
def test_tensorstore(small_cache: Cache, path: str) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    place = {"driver": "file", "path": f"{small_cache.path}/{path}/"}
    array = tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True).result()
    expected = zarr.open_array(f"{small_cache.path}/{path}", mode="r")
    np.testing.assert_array_equal(array.read().result(), expected[:])
    assert array.domain.labels == expected.metadata.dimension_names  # type: ignore[union-attr]
