"""Baselines from a cache against pytorch-ood run on the network itself, and on made-up features of many classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pytorch_ood import detector as ood
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from nacpipe.benchmarks.digits import load_set
from nacpipe.cache import Cache, open_cache
from nacpipe.evaluation.baselines import BASELINES, MORE_BASELINES, score_baselines
from nacpipe.evaluation.posthoc.detector import Linear, Samples, Training
from nacpipe.evaluation.posthoc.distances import vim_dimension
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest
from nacpipe.networks.architectures import digits_cnn
from nacpipe.networks.architectures.digits_cnn import DigitsCNN
from tests.once import once

pytestmark = pytest.mark.usefixtures("one_thread")


WEIGHTS = Path(digits_cnn.__file__).with_name("digits_cnn.safetensors")
SPLITS = ("id/train", "id/val", "ood/val")


@pytest.fixture(scope="module")
def digits(common: Path) -> Cache:
    """300 training digits, 500 others and 500 letters through the packaged network; read only."""

    def build(path: Path) -> None:
        request = ExtractRequest(
            benchmark="digits", model="digits_cnn", cache=path, splits=SPLITS, train_images=300, device="cpu"
        )
        extract(plan_extraction(request))

    return open_cache(once(common / "built/digits300.zarr", build))


@pytest.fixture(scope="module")
def images(digits: Cache) -> dict[str, tuple[Tensor, Tensor]]:
    """Split → the same images (n, 1, 28, 28) and labels, from their source."""
    found = {}
    for split, name in zip(SPLITS, ("main_train", "val", "letters_val"), strict=True):
        pixels, _ = load_set(name)
        rows = digits[split].index
        inputs = (torch.tensor(pixels[rows], dtype=torch.float32) / 255 - digits_cnn.MEAN[0]) / digits_cnn.STD[0]
        found[split] = (inputs.unsqueeze(1), torch.tensor(digits[split].label))
    return found


class ToDouble(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


NETWORK: dict[str, Callable[[DigitsCNN], Any]] = {  # with the network's own modules, as pytorch-ood's users do
    "Entropy": lambda n: ood.Entropy(n),
    "KL-Matching": lambda n: ood.KLMatching(n),
    "OpenMax": lambda n: ood.OpenMax(torch.nn.Sequential(n, ToDouble())),  # it moves tails to 10,000
    "Mahalanobis": lambda n: ood.Mahalanobis(encode(n)),
    "RMD": lambda n: ood.RMD(encode(n)),
    "KNN": lambda n: ood.KNN(encode(n), k=50),
    "ViM": lambda n: ood.ViM(encode(n), d=32, w=n.fc.weight, b=n.fc.bias),
    "SHE": lambda n: ood.SHE(encode(n), n.fc),
    "ReAct": lambda n: ood.ReAct(encode(n), n.fc),
    "ASH-S@65": lambda n: ood.ASH(maps(n), lambda x: n.fc(x.flatten(1))),
    "SCALE@65": lambda n: ood.SCALE(maps(n), lambda x: n.fc(x.flatten(1))),
    "DICE": lambda n: ood.DICE(encode(n), n.fc.weight, n.fc.bias, p=0.9),
    "fDBD": lambda n: ood.fDBD(encode(n), n.fc),
    "NCI": lambda n: ood.NCI(encode(n), n.fc),
    "NNGuide": lambda n: ood.NNGuide(encode(n), n.fc),
}
OURS = ("Temperature", "GEN")  # pytorch-ood's are other numbers (docs/evaluate.md)
OPENOOD = (  # not there, or with other settings: test_baselines_openood.py
    *("MDS++", "RMDS++", "Relation", "CFOOD", "Residual", "GradNorm", "VRA", "ASH-B@90", "SCALE@85", "WeiPer"),
)
ROUNDING = {  # theirs, in standard deviations of the scores, where it is more than 1e-5; ours is float64
    "Entropy": 2e-4,  # probabilities are at least 1e-7
    "OpenMax": 1e-4,  # the likelihood is maximised by trying
    "Mahalanobis": 1e-4,  # a covariance is inverted in float32
    "RMD": 4e-3,  # two are, and their distances subtracted
    "ViM": 4e-3,  # eigenvectors in float32
}


def maps(network: DigitsCNN) -> torch.nn.Module:
    """Images → pooled features as maps of one pixel."""
    return torch.nn.Sequential(network.layer1, network.layer2, network.layer3, network.avgpool)


def encode(network: DigitsCNN) -> torch.nn.Module:
    return torch.nn.Sequential(maps(network), torch.nn.Flatten())


def with_every_class(openmax: Any, logits: Tensor) -> NDArray[np.float64]:
    """Theirs takes the distance to a class as 0 where no image of the same call is predicted as that class."""
    every = 100 * torch.eye(logits.shape[1], dtype=logits.dtype)
    return openmax.predict_logits(torch.cat([logits, every])).double().numpy()[: len(logits)]


def test_every_name_is_a_baseline_and_is_checked() -> None:
    assert tuple(BASELINES) == MORE_BASELINES
    assert {*NETWORK, *OURS, *OPENOOD} == {*MORE_BASELINES}


@pytest.mark.repeats(2)
@pytest.mark.parametrize("name", NETWORK)
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
            if name == "OpenMax":
                expected = -with_every_class(detector, network(images[split][0]).double())
            else:
                expected = -detector.predict(images[split][0]).double().numpy()
        assert found.scores[split].dtype == np.float64
        scale = expected.std()
        assert scale > 0
        assert np.abs(found.scores[split] - expected).max() <= ROUNDING.get(name, 1e-5) * scale


# --- the same numbers in, float64 throughout --------------------------------------------------------------------------


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library rounds to float32 in many places; here `.float()` is float64, and so is what it makes."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def made_up(classes: int, features: int, images: int) -> tuple[Training, Samples]:
    """A training set of every class with mistakes in it, and 200 images of which half belong to no class."""
    rng = np.random.RandomState(classes)
    centres = np.maximum(rng.normal(0, 1, (classes, features)), 0)
    bias = rng.normal(0, 0.1, classes) - (centres**2).sum(axis=1) / 2  # the nearest centre has the largest logit
    linear = Linear(weight=centres.astype(np.float32), bias=bias.astype(np.float32))
    label = np.arange(images) % classes  # every class has four images or more

    def samples(middle: NDArray[np.float64], spread: float) -> Samples:
        values = np.maximum(middle + spread * rng.normal(size=middle.shape), 0).astype(np.float32)
        logits = linear(values)
        return Samples(logits=logits, features=values, linear_logits=logits)

    train = samples(centres[label], 0.2)
    label[:: 3 * classes + 1] = (label[:: 3 * classes + 1] + 1) % classes
    tested = samples(np.concatenate([centres[np.arange(100) % classes], np.full((100, features), 0.4)]), 0.4)
    return Training(samples=train, label=label, linear=linear), tested


def head(linear: Linear) -> torch.nn.Linear:
    layer = torch.nn.Linear(linear.weight.shape[1], linear.weight.shape[0], dtype=torch.float64)
    layer.load_state_dict({"weight": torch.from_numpy(linear.weight), "bias": torch.from_numpy(linear.bias)})
    return layer.requires_grad_(False)


def pooled(linear: Linear) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), head(linear))


SAME_FEATURES: dict[str, Callable[[Linear], Any]] = {
    "KL-Matching": lambda n: ood.KLMatching(None),
    "OpenMax": lambda n: ood.OpenMax(None),
    "Mahalanobis": lambda n: ood.Mahalanobis(None),
    "RMD": lambda n: ood.RMD(None),
    "KNN": lambda n: ood.KNN(None, k=50),
    "ViM": lambda n: ood.ViM(
        None, vim_dimension(n.weight.shape[1]), torch.from_numpy(n.weight), torch.from_numpy(n.bias)
    ),
    "SHE": lambda n: ood.SHE(None, head(n)),
    "ReAct": lambda n: ood.ReAct(None, pooled(n)),
    "ASH-S@65": lambda n: ood.ASH(None, pooled(n)),
    "SCALE@65": lambda n: ood.SCALE(None, pooled(n)),
    "DICE": lambda n: ood.DICE(None, torch.from_numpy(n.weight), torch.from_numpy(n.bias), p=0.9),
    "fDBD": lambda n: ood.fDBD(None, head(n)),
    "NCI": lambda n: ood.NCI(None, head(n)),
    "NNGuide": lambda n: ood.NNGuide(None, head(n)),
}
MAPS = ("ReAct", "ASH-S@65", "SCALE@65")


@pytest.mark.usefixtures("double")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # scipy's Weibull distribution
@pytest.mark.parametrize(
    ("classes", "features", "images"),
    [(12, 30, 200), (40, 16, 400), (150, 70, 600), (20, 90, 85)],
    ids=["few classes", "classes than features", "many classes", "images than features"],
)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "OpenMax")) for name in SAME_FEATURES]
)
def test_scores_are_those_of_the_library_on_the_same_features(
    name: str, classes: int, features: int, images: int
) -> None:
    """Ours round to float32 in the last linear layer's logits alone; OpenMax's likelihood is maximised another way."""
    training, tested = made_up(classes, features, images)
    detector = SAME_FEATURES[name](training.linear)
    kind = "logits" if BASELINES[name].reads == "logits" else "feature_maps" if name in MAPS else "features"
    shape = (slice(None), slice(None), *([None, None] if name in MAPS else []))

    def values(samples: Samples) -> Tensor:
        array = samples.logits if kind == "logits" else samples.features
        return torch.from_numpy(array.astype(np.float64))[shape]

    if BASELINES[name].fitted_on:
        getattr(detector, f"fit_{kind}")(values(training.samples), torch.from_numpy(training.label))
    if name == "OpenMax":
        expected = -with_every_class(detector, values(tested))
    else:
        expected = -getattr(detector, f"predict_{kind}")(values(tested)).double().numpy()
    found = BASELINES[name].fit(training)(tested)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= (1e-4 if name == "OpenMax" else 4e-6) * expected.std()
