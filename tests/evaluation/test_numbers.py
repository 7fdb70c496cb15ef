"""Numbers that go wrong: each has a defined result or an error in words."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.errors import FormatError, ValuesError
from nacpipe.evaluation.tables import evaluate
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.coverage import fit_coverage, score_splits
from nacpipe.tuning.request import SearchRequest
from nacpipe.tuning.runner import run
from nacpipe.tuning.study import Search
from tests.alike import prepare_split

ALL = ("id/train", "id/subtrain", "id/val", "id/test", "ood/val", "ood/near/letters", "ood/far/textures")


def params(layer: str = "layer1", **more: Any) -> NacParams:
    return NacParams(layers={layer: LayerParams(**{"bins": 20, "saturation": 5, "alpha": 0.5, **more})})


@pytest.fixture
def change(small_cache: Cache, tmp_path: Path) -> Callable[..., Cache]:
    """A copy in which arrays of some splits hold other values, written and sealed as extraction would have."""

    def changed(splits: tuple[str, ...], **values: Any) -> Cache:
        shutil.copytree(small_cache.path, tmp_path / "c.zarr")
        writer = CacheWriter(tmp_path / "c.zarr", small_cache.header)
        for name in splits:
            split = small_cache[name]
            arrays = {key: split.read(key).copy() for key in small_cache.header.arrays()}
            for key, value in values.items():
                layer, _, what = key.partition("__")
                arrays[small_cache.header.layer_array(layer, what) if what else key][...] = value
            writer.drop(name)
            prepare_split(writer, split)
            for block, start in enumerate(range(0, split.rows, 16)):
                writer.write_block(name, block, {key: array[start : start + 16] for key, array in arrays.items()})
            writer.seal(name)
        return open_cache(tmp_path / "c.zarr")

    return changed


def search(cache: Cache, tmp_path: Path) -> Search:
    request = SearchRequest(cache=Path(cache.path), space="paper", trials=3, storage=str(tmp_path / "s.log"))
    found = Search(request)
    run(found)
    return found


# --- logits and states that are no numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_refused_by_split_and_row(
    change: Callable[..., Cache], tmp_path: Path, value: float
) -> None:
    cache = change(("id/test", "ood/val"), logits=value)
    message = rf"c\.zarr: id/test/logits, row 0: the network gave {value}$"
    with pytest.raises(ValuesError, match=message):
        evaluate(cache, params())
    with pytest.raises(ValuesError, match=message.replace("id/test", "ood/val")):
        search(cache, tmp_path).result("trials")
    assert np.isfinite(score_splits(cache, params(), ["id/test"])["id/test"]).all()  # coverage needs no logits


def test_a_class_that_is_ruled_out_has_a_logit_of_minus_infinity(
    change: Callable[..., Cache], small_cache: Cache
) -> None:
    cache = change(("id/test", "ood/near/letters"), logits=[-math.inf, 1.0, 3.0])
    table = evaluate(cache, None)
    near = table[(table.task == "ood") & (table.dataset == "letters")].set_index("method")
    assert near.auroc.tolist() == [0.5] * 3  # all alike


@pytest.mark.parametrize(("activation", "gradient"), [(math.nan, 1.0), (math.inf, 1.0), (math.inf, 0.0), (1e38, 1e38)])
def test_states_that_are_no_numbers_are_refused(
    change: Callable[..., Cache], tmp_path: Path, activation: float, gradient: float
) -> None:
    cache = change(("id/val",), layer1__activation=activation, layer1__gradient=gradient)
    message = r"layer 'layer1', split id/val, row 0, neuron 0: the product is (nan|inf)"
    with pytest.raises(ValuesError, match=message):
        score_splits(cache, params(), ["id/val"])
    with pytest.raises(ValuesError, match=message):
        search(cache, tmp_path)


# --- states that say nothing ------------------------------------------------------------------------------------------


def test_a_dead_layer_has_one_score_for_all_and_is_not_searched(change: Callable[..., Cache], tmp_path: Path) -> None:
    """State ½ everywhere: the bin of ½ is full, so every sample is known."""
    cache = change(ALL, layer1__activation=0.0)
    scores = score_splits(cache, params(), list(ALL))
    assert {float(score) for values in scores.values() for score in values} == {1.0}
    table = evaluate(cache, params())
    nac = table[(table.method == "NAC") & (table.task == "ood")]
    assert nac.auroc.tolist() == [0.5] * len(nac)
    assert nac.fpr95.tolist() == [1.0] * len(nac)
    with pytest.raises(ValuesError, match=r"layer 'layer1': every product of id/train is 0; leave it out with --l"):
        search(cache, tmp_path)


def test_dead_in_training_and_alive_later_is_unknown(change: Callable[..., Cache]) -> None:
    cache = change(("id/train",), layer1__gradient=0.0)
    scores = score_splits(cache, params(alpha=1000.0), ["id/train", "id/val"])
    assert (scores["id/train"] == 1).all()
    assert scores["id/val"].max() < 1


def test_ties_everywhere(change: Callable[..., Cache], tmp_path: Path) -> None:
    """Every image the same states: chance level in every metric, in the search too."""
    same = {"layer1__activation": 1.0, "layer1__gradient": 0.25, "avgpool__activation": 1.0, "avgpool__gradient": -0.5}
    cache = change(ALL, **same, logits=[0.5, 1.0, -1.0], features=1.0)
    table = evaluate(cache, params())
    assert set(table.auroc) == {0.5}
    assert set(table.fpr95) == {1.0}
    result = search(cache, tmp_path).result("trials")
    assert (result.checks.val_auroc, result.checks.val_fpr95, result.checks.subtrain_auroc) == (0.5, 1.0, 0.5)


@pytest.mark.parametrize("edges", ["log", "linear"])
def test_an_alpha_that_saturates_everything_leaves_signs(small_cache: Cache, edges: str) -> None:
    """States are 0, ½ and 1: per neuron what counts is how many training products are below, at and above 0."""
    found = score_splits(small_cache, params(alpha=1e300, edges=edges, saturation=60, bins=8), ["id/val"])["id/val"]
    train, val = (
        np.sign(s.read("layers/layer1/activation") * s.read("layers/layer1/gradient"))
        for s in (small_cache["id/train"], small_cache["id/val"])
    )
    filled = (train[None, :, :] == val[:, None, :]).sum(axis=1) / 60  # (val rows, neurons)
    np.testing.assert_allclose(found, filled.mean(axis=1), rtol=1e-12)


def test_an_alpha_that_flattens_everything_leaves_two_bins(small_cache: Cache) -> None:
    """½ is an edge: a state is below it where its product is below 0, however little."""
    found = score_splits(small_cache, params(alpha=1e-30, bins=8, saturation=60), ["id/val"])["id/val"]
    train, val = (
        s.read("layers/layer1/activation") * s.read("layers/layer1/gradient") >= 0
        for s in (small_cache["id/train"], small_cache["id/val"])
    )
    filled = (train[None, :, :] == val[:, None, :]).sum(axis=1) / 60  # (val rows, neurons)
    np.testing.assert_allclose(found, filled.mean(axis=1), rtol=1e-12)


# --- sets that are too small ------------------------------------------------------------------------------------------


def test_a_saturation_above_the_training_set_is_legal_and_only_scales(small_cache: Cache) -> None:
    """60 training images fill no bin of 1000: the table is counts / 1000, the ranking that of 60."""
    scores = {s: score_splits(small_cache, params(saturation=s), ["id/val"])["id/val"] for s in (60, 1000)}
    np.testing.assert_allclose(scores[1000] * 1000, scores[60] * 60, rtol=1e-12)
    assert 0 < scores[1000].max() < 0.06


def test_an_ood_set_of_one_image(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", rows={"ood/val": 1, "ood/near/letters": 1})
    scores = score_splits(cache, params(), ["id/test", "ood/near/letters"])
    one = scores["ood/near/letters"][0]
    table = evaluate(cache, params())
    (row,) = table[(table.method == "NAC") & (table.dataset == "letters") & (table.task == "ood")].to_dict("records")
    above, ties = (scores["id/test"] > one).mean(), (scores["id/test"] == one).mean()
    assert row["auroc"] == pytest.approx(above + ties / 2)
    assert row["fpr95"] == pytest.approx(1 - above)
    assert (row["n_id"], row["n_ood"]) == (50, 1)
    result = search(cache, tmp_path).result("trials")
    assert 0 <= result.checks.val_auroc <= 1


def test_a_training_set_of_one_class_and_of_one_image(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    """Coverage never looks at labels; one image fills one bin per neuron."""
    cache = make_cache(tmp_path / "c.zarr", rows={"id/train": 1})
    assert set(cache["id/train"].label.tolist()) == {0}
    coverage = fit_coverage(cache, params(saturation=1))
    assert coverage.layers["layer1"].counts.sum(axis=1).tolist() == [1] * 4
    assert coverage.score(cache["id/train"]).tolist() == [1.0]
    assert 0 <= search(cache, tmp_path).result("trials").checks.val_auroc <= 1


def test_there_are_no_empty_splits(make_cache: Callable[..., Cache], tmp_path: Path, small_cache: Cache) -> None:
    """A list without images is refused when it is read; a cache that claims such a split is damaged."""
    writer = CacheWriter(tmp_path / "c.zarr", small_cache.header)
    with pytest.raises(FormatError, match=r"id/val/.*rows is 0, not a whole number from 1"):
        writer.prepare("id/val", 0, small_cache["id/val"].images)
