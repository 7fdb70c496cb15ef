"""What pytorch-ood's own tests ask of every detector, asked of ours: their networks, loaders and statements, restated.

Those of detectors, through `fit`, call and `to`, of their metadata and of hyperparameters.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nacpipe.errors import InputError
from nacpipe.method.params import LayerParams, NacParams

pytest.importorskip("pytorch_ood", reason="pytorch-ood is an extra")

from pytorch_ood.api import (
    Detector,
    DetectorInfo,
    FeatureMapsDetector,
    FeaturesDetector,
    LogitsDetector,
    RequiresFittingException,
    StructuredDetector,
    Task,
)
from pytorch_ood.metrics import OODMetrics

from nacpipe.detector.adapters.pytorch_ood import NAC

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(123)


class Dense(nn.Module):
    """A hidden layer, dropout, a classifier: 10 values, 3 classes. In training mode, as they hand it over."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.dropout, self.classifier = nn.Linear(10, 10), nn.Dropout(0.5), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.layer1(x).tanh()))


class Convolutions(nn.Module):
    """Two blocks, a batch normalisation, a head."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.block1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.block2 = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.bn = nn.BatchNorm2d(16)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.block2(self.block1(x))))


def params(*layers: str, **more: Any) -> NacParams:
    return NacParams(
        layers={name: LayerParams(**{"bins": 50, "saturation": 10, "alpha": 10.0, **more}) for name in layers}
    )


def images(rows: int, size: int = 8, seed: int = 0, side: int = 16) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(rows, 3, side, side, generator=generator), torch.randint(10, (rows,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=size)


def clusters(rows: int, seed: int, dimensions: int = 10) -> TensorDataset:
    """Gaussian clusters around three centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(scale=5, size=(3, dimensions))
    y = np.repeat(np.arange(3), rows)
    x = centres[y] + rng.normal(size=(len(y), dimensions))
    return TensorDataset(torch.tensor(x, dtype=torch.float32), torch.tensor(y))


def check_scores(scores: Tensor, rows: int) -> None:
    assert isinstance(scores, Tensor)
    assert scores.shape == (rows,)
    assert torch.isfinite(scores).all()


def test_fitting_is_required() -> None:
    for network, layer, x in (
        (Dense(), "layer1", torch.zeros(128, 10)),
        (Convolutions(), "bn", torch.randn(4, 3, 16, 16)),
    ):
        with pytest.raises(RequiresFittingException):
            NAC(network, params(layer))(x)


@pytest.mark.parametrize("training", [True, False])
def test_vectors_one_by_one_with_float_labels(training: bool) -> None:
    network = Dense().train(training)
    y = torch.cat([torch.zeros(10), torch.ones(10)])
    loader = DataLoader(TensorDataset(torch.randn(20, 10), y))  # batches of one
    detector = NAC(network, params("layer1"))
    assert detector.fit(loader) is detector
    check_scores(detector(torch.randn(128, 10)), 128)
    check_scores(detector(torch.ones(10, 10) * 10), 10)
    check_scores(detector.predict(torch.zeros(1, 10)), 1)
    assert network.training == training


def test_images_in_batches_of_every_size() -> None:
    network = Convolutions().eval()
    detector = NAC(network, params("block2", "bn"))
    detector.to("cpu")
    detector.fit(images(32, seed=1))
    x = torch.randn(16, 3, 16, 16)
    with torch.enable_grad():
        check_scores(detector(x), 16)
    with torch.no_grad():
        check_scores(detector(x), 16)
    with torch.inference_mode():
        check_scores(detector(x), 16)
    assert detector.device == torch.device("cpu")
    assert detector.to("cpu") is detector


def test_the_same_seed_gives_the_same_scores() -> None:
    scores = []
    for _ in range(2):
        torch.manual_seed(123)
        detector = NAC(Convolutions().eval(), params("block2", "bn", alpha=20.0)).fit(images(32, seed=7))
        scores.append(detector(torch.randn(16, 3, 16, 16)))
    assert torch.equal(*scores)


def test_scores_vary_with_the_input() -> None:
    detector = NAC(Convolutions().eval(), params("block2", "bn", bins=100)).fit(images(64, seed=11))
    generator = torch.Generator().manual_seed(99)
    for shift in (0, 1.5):
        assert detector(torch.randn(64, 3, 16, 16, generator=generator) + shift).std() > 1e-6


def train(network: nn.Module, loader: DataLoader[Any], epochs: int, rate: float) -> nn.Module:
    optimizer = torch.optim.Adam(network.train().parameters(), lr=rate)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
    return network.eval()


def coloured(rows: int, seed: int) -> TensorDataset:
    """A class lights one channel."""
    y = torch.repeat_interleave(torch.arange(3), rows)
    x = F.one_hot(y, 3)[:, :, None, None] + 0.05 * torch.randn(
        3 * rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed)
    )
    return TensorDataset(x, y)


@pytest.mark.parametrize("kind", ["images", "vectors"])
@pytest.mark.repeats(1)
def test_outliers_score_higher(kind: str) -> None:
    if kind == "images":
        train_set, test_set = coloured(120, 1), coloured(30, 2)
        network, layers = (
            train(Convolutions(3), DataLoader(train_set, batch_size=32, shuffle=True), 5, 3e-3),
            ("block2", "bn"),
        )
        outliers = 0.05 * torch.randn(90, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    else:
        train_set, test_set = clusters(300, 1), clusters(100, 2)
        layers = ("layer1",)
        network = train(Dense(), DataLoader(train_set, batch_size=64, shuffle=True), 10, 0.01)
        outliers = torch.randn(128, 10)
    detector = NAC(network, params(*layers, alpha=20.0)).fit(DataLoader(train_set, batch_size=32, shuffle=True))
    metrics = OODMetrics()
    metrics.update(detector(outliers), torch.full((len(outliers),), -1))
    for x, y in DataLoader(test_set, batch_size=64, shuffle=True):
        metrics.update(detector(x), y)
    assert metrics.compute()["AUROC"] > 0.9


def test_its_place_among_their_classes() -> None:
    """A detector of the model alone: none of the families that take logits, features or maps."""
    assert issubclass(NAC, Detector)
    assert not issubclass(NAC, LogitsDetector | FeaturesDetector | FeatureMapsDetector | StructuredDetector)
    assert NAC.requires_fit
    for what in ("logits", "features", "feature_maps", "structured"):
        assert not hasattr(NAC, f"predict_{what}")
    assert not inspect.isabstract(NAC)
    assert isinstance(vars(NAC)["info"], DetectorInfo)
    assert NAC.info.tasks == {Task.CLASSIFICATION}
    detector = NAC(Dense(), params("layer1"))
    assert detector.get_hyperparameters() == {}
    with pytest.raises(ValueError, match="Unknown hyperparameter 'alpha' for NAC"):
        detector.set_hyperparameters(alpha=1.0)


def test_segmentation_is_refused() -> None:
    """It is not among its tasks: a score of each pixel has no states of its own."""
    network = nn.Sequential(nn.Conv2d(3, 3, 1))
    loader = DataLoader(TensorDataset(torch.randn(4, 3, 8, 8), torch.zeros(4)), batch_size=4)
    with pytest.raises(InputError, match=r"gives \(4, 3, 8, 8\) for 4 images; expected are logits"):
        NAC(network, params("0")).fit(loader)
