"""Looking at a cache whose every value is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from nacpipe.cache import Cache, CacheWriter, Header, LayerSpec, open_cache
from nacpipe.errors import CacheError, IdentityError, InputError
from nacpipe.evaluation.inspection import (
    compare_splits,
    describe_bins,
    describe_layer,
    describe_layers,
    rank_rows,
    state_shares,
    suggest_alpha,
    summarise_cache,
    summarise_splits,
    value_histograms,
)
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.coverage import fit_coverage, score_splits
from nacpipe.tuning.request import SearchRequest
from nacpipe.tuning.study import Search

LAYER = LayerSpec(name="fc", path="body.fc", pooling="none", neurons=2)
HEADER = Header(
    identity={"benchmark": "digits", "weights": "0" * 64},
    information={"device": "cpu", "command": "nacpipe extract digits"},
    block_rows=4,
    layers=(LAYER,),
    classes=3,
    features=0,
)
# Eleven numbers and one that is none; the product with a gradient of 2 is twice as much.
ACTIVATION = np.array([[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, np.nan]], np.float32)


def write(path: Path, splits: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]) -> Cache:
    writer = CacheWriter(path, HEADER)
    for name, (activation, gradient) in splits.items():
        rows = len(activation)
        arrays = {
            "layers/fc/activation": activation,
            "layers/fc/gradient": gradient,
            "logits": np.zeros((rows, 3), np.float32),
            "label": np.zeros(rows, np.int64),
            "index": np.arange(rows),
        }
        writer.prepare(name, rows, {"list": f"{name}.txt", "sha256": "1" * 64})
        for block, start in enumerate(range(0, rows, 4)):
            writer.write_block(name, block, {key: array[start : start + 4] for key, array in arrays.items()})
        writer.seal(name)
    return open_cache(path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    train = np.array([[0, 0], [0, 1], [1, 1], [5, -5]], np.float32)
    return write(
        tmp_path_factory.mktemp("inspection") / "c.zarr",
        {
            "id/train": (train, np.ones_like(train)),
            "id/val": (ACTIVATION, np.full_like(ACTIVATION, 2)),
            "ood/val": (np.full((5, 2), np.inf, np.float32), np.zeros((5, 2), np.float32)),
        },
    )


def test_quantiles_zeros_and_what_is_no_number(cache: Cache) -> None:
    found = describe_layer(cache, "id/val", "fc").set_index("value")
    assert list(found.index) == ["activation", "gradient", "product"]
    expected = {"q0": 0, "q1": 0.1, "q10": 1, "q25": 2.5, "q50": 5, "q75": 7.5, "q90": 9, "q99": 9.9, "q100": 10}
    assert list(found.columns) == ["zeros", "nan", *expected]
    for name, value in expected.items():
        assert found.loc["activation", name] == pytest.approx(value, rel=1e-6)
        assert found.loc["product", name] == pytest.approx(2 * value, rel=1e-6)
        assert found.loc["gradient", name] == 2
    assert found["zeros"].tolist() == pytest.approx([1 / 12, 0, 1 / 12])
    assert found["nan"].tolist() == [1, 0, 1]


@pytest.mark.parametrize("source", ["product", "activation", "gradient"])
def test_with_parameters_the_states_too(cache: Cache, source: str) -> None:
    params = LayerParams(bins=4, saturation=1, alpha=0.5, source=source)  # type: ignore[arg-type]
    found = describe_layer(cache, "id/val", "fc", params).set_index("value")
    assert list(found.index) == ["activation", "gradient", "product", "state"]
    for name in ("q0", "q50", "q100"):  # numbers that are there, so no rounding of a quantile between two
        assert found.loc["state", name] == pytest.approx(1 / (1 + np.exp(-0.5 * found.loc[source, name])))


def test_infinities_are_looked_at_without_a_warning(cache: Cache) -> None:
    found = describe_layer(cache, "ood/val", "fc").set_index("value")
    assert found["nan"].tolist() == [10, 0, 10]
    assert found["zeros"].tolist() == [0, 1, 0]
    assert found.loc["activation", ["q0", "q50", "q100"]].isna().all()


def test_bins_that_training_samples_fell_in(cache: Cache) -> None:
    """Products of the first neuron: 0 0 1 5, of the second: 0 1 1 −5; alpha 1: states 0.5, 0.731, 0.993, 0.0067."""
    params = LayerParams(bins=5, saturation=2, alpha=1.0, edges="linear")
    found = describe_bins(fit_coverage(cache, NacParams(layers={"fc": params})), "fc")
    assert list(found.columns) == ["bin", "from", "to", "count", "coverage", "neurons"]
    assert found["bin"].tolist() == [0, 2, 3]  # nothing in [0.25, 0.5)
    assert found["from"].tolist() == [0, 0.5, 0.75]
    np.testing.assert_allclose(found["to"], [0.25, 0.75, 1.0])
    assert found["count"].tolist() == [0.5, 3, 0.5]
    assert found["coverage"].tolist() == [0.25, 1, 0.25]
    assert found["neurons"].tolist() == [0.5, 1, 0.5]


@pytest.mark.parametrize("bins", [4, 9, 50, 300])
@pytest.mark.parametrize("saturation", [1, 7, 1000])
def test_bins_add_up(small_cache: Cache, bins: int, saturation: int) -> None:
    params = LayerParams(bins=bins, saturation=saturation, alpha=0.8)
    coverage = fit_coverage(small_cache, NacParams(layers={"avgpool": params}))
    found = describe_bins(coverage, "avgpool")
    assert found["count"].sum() == pytest.approx(small_cache["id/train"].rows)
    assert (found["count"] > 0).all()
    assert found["bin"].is_monotonic_increasing
    assert found["bin"].max() < bins - 1
    assert ((found["coverage"] > 0) & (found["coverage"] <= 1)).all()
    assert ((found["neurons"] > 0) & (found["neurons"] <= 1)).all()
    assert (found["coverage"] <= np.minimum(found["count"] / saturation, 1) + 1e-12).all()
    assert (found["from"] < found["to"]).all()


def test_a_summary_is_plain_json(cache: Cache) -> None:
    found = summarise_cache(cache)
    assert json.loads(json.dumps(found)) == found
    assert found == {
        "path": cache.path,
        "identity": HEADER.identity,
        "information": HEADER.information,
        "block_rows": 4,
        "classes": 3,
        "features": 0,
        "layers": [{"name": "fc", "path": "body.fc", "pooling": "none", "neurons": 2}],
    }


def test_splits_with_what_is_done(tmp_path: Path) -> None:
    cache = write(tmp_path / "c.zarr", {"id/val": (ACTIVATION, ACTIVATION)})
    writer = CacheWriter(cache.path, HEADER)
    writer.prepare("ood/val", 10, {"list": "ood.txt"})
    block = {key: np.zeros((2, width) if width else 2, kind) for key, (width, kind) in HEADER.arrays().items()}
    writer.write_block("ood/val", 2, block)  # the last one, of two rows
    found = summarise_splits(open_cache(cache.path))
    row_bytes = 2 * 2 * 4 + 3 * 4 + 8 + 8
    assert found[["split", "rows", "done", "sealed", "raw_bytes", "list"]].to_dict("records") == [
        {"split": "id/val", "rows": 6, "done": 6, "sealed": True, "raw_bytes": 6 * row_bytes, "list": "id/val.txt"},
        {"split": "ood/val", "rows": 10, "done": 2, "sealed": False, "raw_bytes": 10 * row_bytes, "list": "ood.txt"},
    ]
    folders = [tmp_path / "c.zarr/id/val" / name for name in [*HEADER.arrays(), "blocks"]]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]  # chunks and metadata
    assert found.loc[0, "stored_bytes"] == sum(file.stat().st_size for file in files)
    only = summarise_splits(open_cache(cache.path), "ood/val")
    assert only["split"].tolist() == ["ood/val"]


def test_names_that_are_not_there(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^split 'id/test' is not in .*; it holds id/train, id/val, ood/val; add it with"
    ):
        summarise_splits(cache, "id/test")
    with pytest.raises(InputError, match=r"^layer 'conv' is not in .*; it holds fc, logits"):
        describe_layer(cache, "id/val", "conv")
    begun = CacheWriter(tmp_path / "c.zarr", HEADER)
    begun.prepare("id/val", 3, {})
    with pytest.raises(
        CacheError, match=r"id/val is not finished \(0 of 1 blocks\); finish it with: nacpipe extract digits"
    ):
        describe_layer(open_cache(tmp_path / "c.zarr"), "id/val", "fc")


# --- layers -----------------------------------------------------------------------------------------------------------


def test_layers_by_hand(tmp_path: Path) -> None:
    """One neuron of two is dead; |product| of id/train that is not 0: 1 1 1 5 5, of id/val 2 4 6."""
    train = np.array([[0, 1], [1, 1], [5, -5]], np.float32)
    val = np.array([[0, 1], [0, 2], [0, 3], [0, 0]], np.float32)
    cache = write(
        tmp_path / "c.zarr", {"id/train": (train, np.ones_like(train)), "id/val": (val, np.full_like(val, 2))}
    )
    params = NacParams(layers={"fc": LayerParams(bins=9, saturation=1, alpha=1.0)})
    (found,) = describe_layers(cache, "id/val", params).to_dict("records")
    assert found == {
        "layer": "fc",
        "neurons": 2,
        "dead": 1,
        "zeros": 5 / 8,
        "size": 4,
        "alpha_low": pytest.approx(0.1 / 5),  # the 99th percentile
        "alpha_high": pytest.approx(30 / 1),  # the median
        "alpha": 1.0,
        "flat": 0,
        "saturated": pytest.approx(1 / 3),  # sigmoid(6) = 0.9975
    }
    bare = describe_layers(cache, "id/val")
    assert bare[["alpha", "flat", "saturated"]].isna().all().all()
    assert bare.drop(columns=["alpha", "flat", "saturated"]).to_dict("records")[0].items() <= found.items()


def test_a_layer_has_a_row_per_source_of_the_parameters(small_cache: Cache) -> None:
    layer = LayerParams(bins=9, saturation=1, alpha=0.7)
    terms = {"avgpool:gradient": replace(layer, source="gradient"), "avgpool:product": layer}
    found = describe_layers(small_cache, "id/val", NacParams(layers=terms)).set_index("layer")
    assert list(found.index) == ["avgpool:gradient", "avgpool:product", "layer1"]
    for name, term in terms.items():
        alone = describe_layers(small_cache, "id/val", NacParams(layers={"avgpool": term})).set_index("layer")
        both = ["neurons", "dead", "zeros", "size", "alpha", "flat", "saturated"]
        pd.testing.assert_series_equal(found.loc[name, both], alone.loc["avgpool", both], check_names=False)
        assert tuple(found.loc[name, ["alpha_low", "alpha_high"]]) == suggest_alpha(small_cache, name)
        only = describe_layers(small_cache, "id/val", NacParams(layers={name: term}), only=name).set_index("layer")
        pd.testing.assert_series_equal(found.loc[name], only.loc[name])
    assert found.loc["avgpool:gradient", "flat"] != found.loc["avgpool:product", "flat"]


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, (0.5, 0)), (200.0, (0, 0.5)), (1e9, (0, 1)), (1e-9, (1, 0))])
def test_shares_of_states(alpha: float, expected: tuple[float, float]) -> None:
    """States of 0.03 and −0.03 at alpha 1: 0.5075 and 0.4925; of 0.05: 0.512; at 200 sigmoid(6), sigmoid(4)."""
    source = np.array([[0.03, 0.02, 0.05, -0.0401, 0.0, np.inf]], np.float32)
    if alpha == 200:
        source = np.array([[0.03, -0.02, 0.0201, -0.05]], np.float32)
    assert state_shares(source, alpha) == expected


def test_a_useful_alpha_is_the_search_s(small_cache: Cache) -> None:
    space = Search(SearchRequest(cache=Path(small_cache.path)), create=False).objective.space
    for layer in ("avgpool", "layer1"):
        alpha = space[layer].alpha["product"]
        assert suggest_alpha(small_cache, layer) == (alpha.low, alpha.high)  # type: ignore[union-attr]


def test_without_a_training_set_no_alpha(tmp_path: Path) -> None:
    found = suggest_alpha(write(tmp_path / "c.zarr", {"id/val": (ACTIVATION, ACTIVATION)}), "fc")
    assert np.isnan(found).all()
    zeros = np.zeros((4, 2), np.float32)
    assert np.isnan(suggest_alpha(write(tmp_path / "z.zarr", {"id/train": (zeros, zeros)}), "fc")).all()


def test_histograms_hold_every_number(cache: Cache) -> None:
    params = LayerParams(bins=4, saturation=1, alpha=0.5)
    found = value_histograms(cache, "id/val", "fc", params, bins=10)
    assert found.groupby("value", sort=False)["count"].agg(["size", "sum"]).values.tolist() == [
        [10, 11], [10, 12], [10, 11], [10, 11],
    ]  # fmt: skip
    activation = found[found["value"] == "activation"]  # 0 … 10, each once; the range is 0.1 … 9.9
    assert activation["count"].iloc[[0, -1]].tolist() == [2, 2]  # 0 and 1; 9 and 10
    assert activation["from"].iloc[0] == pytest.approx(0.1)
    assert activation["to"].iloc[-1] == pytest.approx(9.9)
    state = found[found["value"] == "state"]
    assert (state["from"].iloc[0], state["to"].iloc[-1]) == (0, 1)
    # states sigmoid(0 1 2 … 10): 0.5, 0.73, 0.88, 0.95 and on
    assert state["count"].tolist() == [0, 0, 0, 0, 0, 1, 0, 1, 1, 8]
    assert value_histograms(cache, "ood/val", "fc")["value"].unique().tolist() == ["gradient"]  # infinities have none


# --- two caches -------------------------------------------------------------------------------------------------------


def test_two_caches_by_hand(tmp_path: Path) -> None:
    train = np.array([[1, 1], [2, 1], [4, 3]], np.float32)
    one = np.array([[0, 1], [1, 2], [2, 4]], np.float32)
    other = np.array([[0, -3], [3, -6], [6, -12]], np.float32)  # three times as much; the second neuron turned round
    ones = np.ones_like(one)
    caches = [
        write(tmp_path / f"{n}.zarr", {"id/train": (train, train), "id/val": (x, ones)})
        for n, x in enumerate([one, other])
    ]
    found = compare_splits(*caches, "id/val")
    assert found.to_dict("records") == [
        {
            "layer": "fc",
            "neurons": 2,
            "dead": 0,
            "zeros": 1 / 6,
            "size": 2.0,
            "neurons_other": 2,
            "dead_other": 0,
            "zeros_other": 1 / 6,
            "size_other": 6.0,
            "ratio": 3.0,
            "alike": pytest.approx(0.0),  # 1 and −1
        }
    ]
    assert found.attrs["agree"] == 1.0
    assert compare_splits(caches[0], caches[0], "id/val")["alike"].tolist() == [pytest.approx(1.0)]


def test_other_images_are_refused(cache: Cache, tmp_path: Path) -> None:
    other = write(tmp_path / "c.zarr", {"id/val": (ACTIVATION[:4], ACTIVATION[:4])})
    with pytest.raises(IdentityError, match=r"^id/val of .* and of .* hold other images \(id/val.txt, id/val.txt\)"):
        compare_splits(cache, other, "id/val")


# --- images -----------------------------------------------------------------------------------------------------------


def test_the_most_typical_come_first(small_cache: Cache) -> None:
    params = NacParams(layers={"avgpool": LayerParams(bins=20, saturation=5, alpha=0.5)})
    found = rank_rows(small_cache, "ood/near/letters", params)
    scores = score_splits(small_cache, params, ["ood/near/letters"])["ood/near/letters"]
    assert found["score"].tolist() == sorted(scores, reverse=True)
    assert found["score"].tolist() == scores[found["row"]].tolist()
    assert sorted(found["row"]) == list(range(35))
    split = small_cache["ood/near/letters"]
    assert found["index"].tolist() == split.index[found["row"]].tolist()
    assert found["predicted"].tolist() == split.read("logits").argmax(axis=1)[found["row"]].tolist()
    assert set(found["label"]) == {-1}
