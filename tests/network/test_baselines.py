"""Baselines from a cache against pytorch-ood run on the network itself, and what is left empty."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from pytorch_ood import detector as ood
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from nacpipe.artifact import write_params
from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.cli import main
from nacpipe.core import baselines as core
from nacpipe.core.baselines import LOGIT_BASELINES, MORE_BASELINES, choose_baselines
from nacpipe.core.params import LayerParams, NacParams
from nacpipe.errors import InputError
from nacpipe.network import baselines, digits_cnn
from nacpipe.network.baselines import BASELINES, score_baselines
from nacpipe.network.digits import load_set
from nacpipe.network.digits_cnn import DigitsCNN
from nacpipe.network.digits_train import to_inputs
from nacpipe.network.extract import extract
from nacpipe.network.plan import plan_extraction
from nacpipe.network.request import ExtractRequest
from nacpipe.search.scored import score_cache
from nacpipe.search.tables import tabulate

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = Path(digits_cnn.__file__).with_name("digits_cnn.safetensors")
SPLITS = ("id/train", "id/val", "ood/val")
PARAMS = NacParams(layers={"avgpool": LayerParams(bins=20, saturation=5, alpha=0.5)})


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """300 training digits, 500 others and 500 letters through the packaged network."""
    path = tmp_path_factory.mktemp("baselines") / "d.zarr"
    request = ExtractRequest(
        benchmark="digits", model="digits_cnn", cache=path, splits=SPLITS, train_images=300, device="cpu"
    )
    extract(plan_extraction(request))
    return open_cache(path)


@pytest.fixture(scope="module")
def images(digits: Cache) -> dict[str, tuple[Tensor, Tensor]]:
    """Split → the same images (n, 1, 28, 28) and labels, from their source."""
    found = {}
    for split, name in zip(SPLITS, ("main_train", "val", "letters_val"), strict=True):
        pixels, _ = load_set(name)
        rows = digits[split].index
        found[split] = (to_inputs(pixels[rows]), torch.tensor(digits[split].label))
    return found


NETWORK: dict[str, Callable[[DigitsCNN], Any]] = {  # with the network's own modules, as pytorch-ood's users do
    "Temperature": lambda n: ood.TemperatureScaling(n),
    "Entropy": lambda n: ood.Entropy(n),
    "GEN": lambda n: ood.GEN(n, M=100),
    "KL-Matching": lambda n: ood.KLMatching(n),
    "OpenMax": lambda n: ood.OpenMax(n),
    "Mahalanobis": lambda n: ood.Mahalanobis(encode(n)),
    "RMD": lambda n: ood.RMD(encode(n)),
    "KNN": lambda n: ood.KNN(encode(n), k=50),
    "ViM": lambda n: ood.ViM(encode(n), d=32, w=n.fc.weight, b=n.fc.bias),
    "SHE": lambda n: ood.SHE(encode(n), n.fc),
    "ReAct": lambda n: ood.ReAct(encode(n), n.fc),
    "ASH": lambda n: ood.ASH(maps(n), lambda x: n.fc(x.flatten(1))),
    "SCALE": lambda n: ood.SCALE(maps(n), lambda x: n.fc(x.flatten(1))),
    "DICE": lambda n: ood.DICE(encode(n), n.fc.weight, n.fc.bias, p=0.9),
    "fDBD": lambda n: ood.fDBD(encode(n), n.fc),
    "NCI": lambda n: ood.NCI(encode(n), n.fc),
    "NNGuide": lambda n: ood.NNGuide(encode(n), n.fc),
}


def maps(network: DigitsCNN) -> torch.nn.Module:
    """Images → pooled features as maps of one pixel."""
    return torch.nn.Sequential(network.layer1, network.layer2, network.layer3, network.avgpool)


def encode(network: DigitsCNN) -> torch.nn.Module:
    return torch.nn.Sequential(maps(network), torch.nn.Flatten())


def test_every_name_is_a_baseline_and_is_checked() -> None:
    assert tuple(BASELINES) == MORE_BASELINES == tuple(NETWORK)


@pytest.mark.parametrize("name", MORE_BASELINES)
def test_scores_are_those_of_the_library_on_the_network_itself(
    digits: Cache, images: dict[str, tuple[Tensor, Tensor]], name: str
) -> None:
    """Fitted on the images, one batch or several; where pytorch-ood says outlier, ours is smaller."""
    network = DigitsCNN()
    network.load_state_dict(load_file(WEIGHTS))
    network.eval().requires_grad_(False)
    detector = NETWORK[name](network).to("cpu")
    if BASELINES[name].fitted_on:
        detector.fit(DataLoader(TensorDataset(*images[BASELINES[name].fitted_on]), batch_size=100))
    found = score_baselines(digits, [name], ["id/val", "ood/val"])[name]
    assert found.reasons == {}
    assert found.fitted_on == BASELINES[name].fitted_on
    assert found.n_fitted == {"": 0, "id/val": 500, "id/train": 300}[found.fitted_on]
    for split in ("id/val", "ood/val"):
        with torch.no_grad():
            expected = -detector.predict(images[split][0]).double().numpy()
        assert found.scores[split].dtype == np.float64
        scale = expected.std()
        assert scale > 0
        assert np.abs(found.scores[split] - expected).max() <= 2e-3 * scale


# --- in blocks --------------------------------------------------------------------------------------------------------


def test_blocks_change_nothing(digits: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """512 rows read at a time and one scored at a time: the same to float32's rounding, every row in its place."""
    names = [name for name in MORE_BASELINES if name != "OpenMax"]
    whole = score_baselines(digits, names, ["ood/val"])
    monkeypatch.setattr(core, "BLOCK_BYTES", 1)
    monkeypatch.setattr(baselines, "HELD", 1)
    for name, method in score_baselines(digits, names, ["ood/val"]).items():
        expected = whole[name].scores["ood/val"]
        assert np.abs(method.scores["ood/val"] - expected).max() <= 1e-3 * expected.std()


def test_at_most_so_many_images_are_learned_from(digits: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "FIT_ROWS", 100)
    found = score_baselines(digits, ["NCI", "KL-Matching", "GEN"], ["ood/val"])
    assert [method.n_fitted for method in found.values()] == [100, 100, 0]
    rows = np.linspace(0, 299, 100).round().astype(int)
    features, outside = (torch.from_numpy(digits[s].features[:]) for s in ("id/train", "ood/val"))
    weight, bias = digits.classifier() or (None, None)
    head = torch.nn.Linear(64, 10)
    head.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    detector = ood.NCI(None, head).fit_features(features[rows], torch.zeros(100))
    np.testing.assert_allclose(
        found["NCI"].scores["ood/val"], -detector.predict_features(outside), rtol=1e-4, atol=1e-5
    )


def test_fdbd_without_the_large_array(digits: Cache) -> None:
    weight, bias = digits.classifier() or (None, None)
    head = torch.nn.Linear(64, 10).requires_grad_(False)
    head.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    features = torch.from_numpy(digits["id/val"].features[:])
    theirs, ours = (kind(None, head).fit_features(features) for kind in (ood.fDBD, baselines._SlimFDBD))
    torch.testing.assert_close(ours._denom_matrix, theirs._denom_matrix)
    torch.testing.assert_close(ours.predict_features(features), theirs.predict_features(features))


def test_how_wide_vims_subspace_is() -> None:
    said = {2048: 1000, 1501: 1000, 1500: 512, 768: 512, 767: 383, 512: 256, 64: 32}
    assert {features: baselines._vim_dimension(features) for features in said} == said


# --- empty cells ------------------------------------------------------------------------------------------------------


def reasons(cache: Cache, *names: str) -> dict[str, set[str]]:
    found = score_baselines(cache, names, ["id/test", "ood/near/letters"])
    assert all(set(m.reasons) | set(m.scores) == {"id/test", "ood/near/letters"} for m in found.values())
    return {name: set(method.reasons.values()) for name, method in found.items()}


def test_too_few_images(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    """One image per class, as of ImageNet with 1,000 training images."""
    cache = make_cache(tmp_path / "c.zarr", rows={"id/train": 3})
    found = reasons(cache, "all")
    covariance = {"the covariance of 6 features in 3 classes needs 9 images; id/train has 3"}
    assert found["Mahalanobis"] == found["RMD"] == covariance
    assert found["OpenMax"] == {"it needs 2 images of every class; id/train has a class with 1"}
    assert found["KNN"] == {"pytorch-ood: k=50 exceeds the number of ID samples (3)"}
    assert found["NNGuide"] == {"pytorch-ood: Need at least k=10 ID samples, got 3"}
    assert found["ReAct"] == found["Temperature"] == found["ViM"] == set()
    method = score_baselines(cache, ["KNN"], ["id/test"])["KNN"]
    assert (method.fitted_on, method.scores) == ("id/train", {})


def test_what_a_cache_lacks(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "f.zarr", identity={"outputs": "features"})
    assert set().union(*reasons(cache, "all").values()) == {"what this network gives are features, not logits"}
    cache = make_cache(tmp_path / "v.zarr", rows={"id/val": 0})
    assert reasons(cache, "Temperature", "Entropy") == {"Temperature": {"the cache has no id/val"}, "Entropy": set()}
    shutil.rmtree(tmp_path / "v.zarr/classifier")
    found = reasons(open_cache(tmp_path / "v.zarr"), "DICE", "GEN")
    assert found == {"DICE": {"the cache holds no last linear layer"}, "GEN": set()}


def test_scores_that_are_no_numbers(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    """ASH divides by the features that it keeps: an image whose features are all 0 has no score."""
    cache = make_cache(tmp_path / "z.zarr")
    array = zarr.open_group(cache.path, mode="r+")["ood/near/letters/features"]
    array[5] = 0.0
    CacheWriter(cache.path, cache.header).seal("ood/near/letters")
    method = score_baselines(open_cache(cache.path), ["ASH"], ["id/test", "ood/near/letters"])["ASH"]
    bad = int((np.asarray(array[:]).sum(axis=1) == 0).sum())
    assert method.reasons == {"ood/near/letters": f"{bad} of 35 scores of ood/near/letters are not finite"}
    assert list(method.scores) == ["id/test"]


# --- names and the command --------------------------------------------------------------------------------------------


def test_names() -> None:
    assert choose_baselines(["all"]) == list(MORE_BASELINES)
    assert choose_baselines(["vim", "KNN", "ViM", *LOGIT_BASELINES]) == ["ViM", "KNN"]
    with pytest.raises(
        InputError, match=r"^baseline 'nosuch' is not known; known: all, MSP, MaxLogit, Energy, Temperat"
    ):
        choose_baselines(["KNN", "nosuch"])
    with pytest.raises(
        InputError, match=r"^baseline ODIN runs the network itself; a cache does not hold what it needs$"
    ):
        choose_baselines(["ODIN"])


def test_the_command_shows_them_all(make_cache: Callable[..., Cache], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", rows={"id/train": 45})
    write_params(tmp_path / "c.params.json", PARAMS)
    more = score_baselines(cache, ["all"], ["id/test", "ood/near/letters", "ood/far/textures"])
    expected = tabulate([score_cache(cache, PARAMS, more=more)])
    printed = CliRunner().invoke(main, ["evaluate", cache.path, "--baselines", "all", "--json"])
    assert printed.exit_code == 0, printed.stderr
    rows = json.loads(printed.stdout)
    assert len({row["method"] for row in rows}) == 1 + 3 + 17
    for row, (_, known) in zip(rows, expected.iterrows(), strict=True):
        assert (row["method"], row["fitted_on"], row["n_fitted"], row["reason"]) == (
            known["method"], known["fitted_on"], known["n_fitted"], known["reason"],
        )  # fmt: skip
        assert row["auroc"] == (None if math.isnan(known["auroc"]) else pytest.approx(known["auroc"], abs=1e-6))
    table = CliRunner().invoke(main, ["evaluate", cache.path, "--baselines", "knn,gen"]).stdout
    assert "\nfitted on id/train (45 images): NAC\n" in table
    assert "\nempty: KNN: pytorch-ood: k=50 exceeds the number of ID samples (45)\n" in table
    line = next(line for line in table.splitlines() if line.split()[:1] == ["KNN"])
    assert line.split() == ["KNN", "–", "–", "–", "–", "35"]
    against = CliRunner().invoke(main, ["evaluate", cache.path, "--against", "gen", "--resamples", "20", "--json"])
    assert {row["second"] for row in json.loads(against.stdout)} == {"GEN"}


def test_without_the_extra(make_cache: Callable[..., Cache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path / "c.zarr")
    write_params(tmp_path / "c.params.json", PARAMS)
    monkeypatch.delitem(sys.modules, "nacpipe.network.baselines")
    monkeypatch.setitem(sys.modules, "pytorch_ood", None)
    printed = CliRunner().invoke(main, ["evaluate", cache.path, "--baselines", "KNN"])
    assert printed.exit_code == 1
    assert printed.stderr == "nacpipe: KNN needs pytorch_ood; install it with: pip install 'nacpipe[baselines]'\n"
    assert CliRunner().invoke(main, ["evaluate", cache.path, "--baselines", "MSP"]).exit_code == 0
