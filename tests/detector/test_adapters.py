"""pytorch-ood and OpenOOD's protocol give what the detector gives, with each tool's own sign."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nacpipe.benchmarks.digits import load_set
from nacpipe.benchmarks.standard import find_benchmark
from nacpipe.cache import Cache, open_cache
from nacpipe.detector.adapters.openood import NACPostprocessor
from nacpipe.detector.export import export_detector
from nacpipe.detector.file import read_detector, write_detector
from nacpipe.detector.fit import fit_detector
from nacpipe.detector.module import Detector
from nacpipe.errors import InputError, NacError, ParamsError, ValuesError
from nacpipe.method.metrics import detect
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.networks.architectures.digits_cnn import DigitsCNN
from nacpipe.networks.build import load_network
from nacpipe.networks.models import find_model
from nacpipe.scoring.coverage import score_splits
from nacpipe.scoring.params_file import write_params
from tools.train_digits import to_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

PARAMS = NacParams(
    layers={
        "avgpool": LayerParams(bins=24, saturation=5, alpha=0.4, weight=2.0),
        "layer3": LayerParams(bins=51, saturation=100, alpha=0.03),
    }
)


@pytest.fixture(scope="module")
def place(digits_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapters")
    shutil.copytree(digits_cache, place / "c.zarr")
    write_params(place / "p.json", PARAMS)
    write_detector(place / "d.safetensors", export_detector(open_cache(place / "c.zarr"), PARAMS))
    return place


@pytest.fixture(scope="module")
def cache(place: Path) -> Cache:
    return open_cache(place / "c.zarr")


@pytest.fixture
def network() -> nn.Module:
    return load_network(find_model("digits_cnn"), find_benchmark("digits"), None, torch.device("cpu")).module


def batches(cache: Cache, split: str, size: int = 128) -> Iterator[tuple[Tensor, Tensor]]:
    """A split's images and labels as its cache has them."""
    source = {"id/train": "main_train", "id/val": "val", "ood/val": "letters_val"}[split]
    rows = cache[split].index
    images, labels = load_set(source)
    yield from zip(to_inputs(images[rows]).split(size), torch.from_numpy(labels[rows].copy()).split(size), strict=True)


# --- counting without a cache -----------------------------------------------------------------------------------------


def test_counts_are_the_caches(cache: Cache, place: Path, network: nn.Module) -> None:
    fitted = fit_detector(network, PARAMS, (x for x, _ in batches(cache, "id/train")), {})
    assert [look.fitted.name for look in fitted._lookups] == ["avgpool", "layer3"]
    exported = read_detector(place / "d.safetensors")
    for ours, look in zip(exported.terms, fitted._lookups, strict=True):
        np.testing.assert_array_equal(look.fitted.counts, ours.counts)
    assert fitted._specs == list(exported.taps)
    images = next(batches(cache, "id/val"))[0]
    assert not fitted(images).is_ood.any()  # there is no threshold
    np.testing.assert_array_equal(
        fitted(images).score.numpy(), score_splits(cache, PARAMS, ["id/val"])["id/val"][: len(images)]
    )


def test_views_are_counted_as_the_cache_does(cache: Cache, network: nn.Module) -> None:
    """Without a cache, groups of classes and components come from the same images."""
    layer = LayerParams(bins=24, saturation=5, alpha=0.4)
    names = ("avgpool:by_class", "avgpool:components", "logits:by_class", "avgpool")
    params = NacParams(layers=dict.fromkeys(names, layer))
    fitted = fit_detector(network, params, (x for x, _ in batches(cache, "id/train")), {})
    images = next(batches(cache, "id/val"))[0]
    expected = score_splits(cache, params, ["id/val"])["id/val"][: len(images)]
    np.testing.assert_array_equal(fitted(images).score.numpy(), expected)


class Pausing(nn.Module):
    """A network in which a pass stops halfway, until another thread has been through or cannot be."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(49, 8), nn.Linear(8, 3)
        self.meanwhile: threading.Thread | None = None

    def forward(self, images: Tensor) -> Tensor:
        state = self.body(images.flatten(1))
        if (other := self.meanwhile) is not None:
            self.meanwhile = None
            other.start()
            other.join(0.3)
        logits: Tensor = self.head(state)
        return logits


@pytest.mark.parametrize("first", ["fit", "detector"])
def test_counting_and_a_detector_at_work_do_not_mix(first: str) -> None:
    network = Pausing().eval()
    params = NacParams(layers={"body": LayerParams(bins=9, saturation=3, alpha=2.0)})
    train, images = torch.randn(40, 1, 7, 7), torch.randn(40, 1, 7, 7)
    detector = fit_detector(network, params, [train], {})
    counts, scores = detector._lookups[0].fitted.counts, detector(images).score
    found: dict[str, Any] = {}

    def fit() -> None:
        found["fit"] = fit_detector(network, params, batches(), {})._lookups[0].fitted.counts

    def batches() -> Iterator[Tensor]:
        yield train[:20]
        if first == "fit":
            network.meanwhile = other
        yield train[20:]

    def score() -> None:
        found["detector"] = detector(images).score

    other = threading.Thread(target=score if first == "fit" else fit)
    if first == "fit":
        fit()
    else:
        network.meanwhile = other
        score()
    other.join()
    np.testing.assert_array_equal(found["fit"], counts)
    assert torch.equal(found["detector"], scores)


def test_counting_leaves_the_network_alone(cache: Cache) -> None:
    network = DigitsCNN().train()
    with torch.inference_mode():
        fitted = fit_detector(network, PARAMS, (x for x, _ in batches(cache, "id/val")), {})
    assert isinstance(fitted, Detector)
    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert int(network.state_dict()["layer1.1.num_batches_tracked"]) == 0


def test_poolings_and_logits(cache: Cache, network: nn.Module) -> None:
    params = NacParams(
        layers={
            "layer3": LayerParams(bins=9, saturation=2, alpha=1.0),
            "logits": LayerParams(bins=9, saturation=2, alpha=1.0),
        }
    )
    images = [x for x, _ in batches(cache, "id/val")]
    detector = fit_detector(network, params, images, {})
    looked = {look.fitted.name: look.fitted for look in detector._lookups}
    assert looked["layer3"].counts.shape == (64, 8)
    assert [(tap.name, tap.pooling) for tap in detector._specs] == [("layer3", "sum-nchw")]  # logits need no tap
    assert looked["logits"].counts.shape == (10, 8)
    assert looked["logits"].counts.sum(axis=1).tolist() == [500] * 10
    detector = fit_detector(network, params, images, {"layer3": "sum-nhwc"})
    assert [(tap.name, tap.pooling, tap.neurons) for tap in detector._specs] == [("layer3", "sum-nhwc", 7)]
    assert detector._lookups[0].fitted.counts.shape == (7, 8)


def test_what_cannot_be_counted_is_refused(network: nn.Module) -> None:
    images = torch.zeros(4, 1, 28, 28)
    layer = LayerParams(bins=9, saturation=2, alpha=1.0)
    with pytest.raises(InputError, match="there are no training samples to count"):
        fit_detector(network, PARAMS, [], {})
    with pytest.raises(InputError, match="layer 'layer9' is not known for DigitsCNN"):
        fit_detector(network, NacParams(layers={"layer9": layer}), [images], {})
    with pytest.raises(InputError, match="pooling layer2=sum-nchw: the layers are avgpool, layer3"):
        fit_detector(network, PARAMS, [images], {"layer2": "sum-nchw"})
    wide = fit_detector(network, PARAMS, [torch.rand(4, 1, 28, 20)], {})  # images need not be square
    assert wide(torch.rand(2, 1, 28, 20)).score.shape == (2,)
    with pytest.raises(ValuesError, match="layer 'avgpool': a training image's product is not finite"):
        fit_detector(network, PARAMS, [torch.full_like(images, float("nan"))], {})


# --- pytorch-ood ------------------------------------------------------------------------------------------------------

needs_pytorch_ood = pytest.mark.skipif(find_spec("pytorch_ood") is None, reason="pytorch-ood is not installed")


def auroc(scores: Tensor, labels: Tensor) -> float:
    from pytorch_ood.metrics import OODMetrics

    return float(OODMetrics().update(scores, labels).compute()["AUROC"])


@needs_pytorch_ood
@pytest.mark.parametrize("seed", range(5))
def test_their_metrics_are_ours(seed: int) -> None:
    rng = np.random.RandomState(seed)
    id_scores, ood_scores = (np.round(rng.randn(n) + shift, 2) for n, shift in ((301, 0.7), (170, 0.0)))  # with ties
    scores = torch.from_numpy(-np.concatenate([id_scores, ood_scores]))
    labels = torch.tensor([3] * 301 + [-1] * 170)
    assert auroc(scores, labels) == pytest.approx(detect(id_scores, ood_scores).auroc, abs=1e-6)


@pytest.mark.repeats(1)
@needs_pytorch_ood
@pytest.mark.parametrize("source", ["d.safetensors", "p.json", "record"])
def test_pytorch_ood_from_end_to_end(cache: Cache, place: Path, network: nn.Module, source: str) -> None:
    from pytorch_ood.api import Detector as Theirs
    from pytorch_ood.api import RequiresFittingException

    from nacpipe.detector.adapters.pytorch_ood import NAC

    detector = NAC(network, PARAMS if source == "record" else place / source)
    assert isinstance(detector, Theirs)
    assert detector.requires_fit == (source != "d.safetensors")
    if detector.requires_fit:
        with pytest.raises(RequiresFittingException):
            detector.predict(torch.zeros(2, 1, 28, 28))
    train = TensorDataset(
        torch.cat([x for x, _ in batches(cache, "id/train")] + [torch.ones(7, 1, 28, 28)]),
        torch.cat([y for _, y in batches(cache, "id/train")] + [torch.full((7,), -1)]),  # outliers: left out
    )
    assert detector.fit(DataLoader(train, batch_size=96)) is detector
    assert detector._detector is not None
    assert detector._detector._lookups[0].fitted.counts.sum(axis=1).tolist() == [1000] * 64
    scores, labels = [], []
    with torch.no_grad():  # as pytorch-ood's users do
        for split in ("id/val", "ood/val"):
            for x, y in batches(cache, split, 64):
                scores.append(detector(x))
                labels.append(y)
    ours = score_splits(cache, PARAMS, ["id/val", "ood/val"])
    expected = detect(ours["id/val"], ours["ood/val"]).auroc
    assert expected > 0.95
    assert auroc(torch.cat(scores), torch.cat(labels)) == pytest.approx(expected, abs=0.0005)
    np.testing.assert_allclose(-torch.cat(scores).numpy(), np.concatenate(list(ours.values())), atol=1e-3)
    assert detector.to("cpu").device == torch.device("cpu")


@needs_pytorch_ood
def test_only_so_many_images_are_counted(cache: Cache, network: nn.Module) -> None:
    from nacpipe.detector.adapters.pytorch_ood import NAC

    loader = list(batches(cache, "id/train", 64))
    few = NAC(network, PARAMS, train_images=100).fit(iter(loader))
    assert few._detector is not None
    assert few._detector._lookups[0].fitted.counts.sum(axis=1).tolist() == [100] * 64
    same = NAC(network, PARAMS).fit([(torch.cat([x for x, _ in loader])[:100], torch.zeros(100))])
    images = next(batches(cache, "id/val"))[0]
    np.testing.assert_allclose(few.predict(images).numpy(), same.predict(images).numpy(), atol=1e-3)


@pytest.mark.slow
def test_pytorch_ood_missing_is_said() -> None:
    code = "import sys; sys.modules['pytorch_ood'] = None; import nacpipe.detector.adapters.pytorch_ood"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        "nacpipe.errors.MissingExtra: this needs pytorch-ood; install it with: pip install 'nacpipe[pytorch-ood]'"
    )


# --- OpenOOD ----------------------------------------------------------------------------------------------------------


class BasePostprocessor:
    """What OpenOOD v1.5 calls, and how (openood/postprocessors, openood/evaluation_api): a stand-in, nothing more."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def setup(self, net: nn.Module, id_loader_dict: Any, ood_loader_dict: Any) -> None: ...

    def postprocess(self, net: nn.Module, data: Any) -> Any: ...

    def inference(self, net: nn.Module, data_loader: Any, progress: bool = True) -> Any: ...


class NAC(NACPostprocessor, BasePostprocessor):
    """As the page tells people to write it."""


def evaluate(net: nn.Module, postprocessor: Any, loaders: Any) -> float:
    """The Evaluator's steps: ask for its class, set up, infer, compare confidences; AUROC with ID positive."""
    assert isinstance(postprocessor, BasePostprocessor)
    postprocessor.setup(net, loaders["id"], loaders["ood"])
    assert not postprocessor.APS_mode or not postprocessor.hyperparam_search_done
    net.eval()
    id_pred, id_conf, id_gt = postprocessor.inference(net, loaders["id"]["test"], False)
    assert (id_pred == id_gt).mean() > 0.97
    ood_pred, ood_conf, _ = postprocessor.inference(net, loaders["ood"]["near"]["letters"])
    for array in (id_pred, id_gt, ood_pred):
        assert array.dtype == int
    return detect(id_conf, ood_conf).auroc


@pytest.mark.parametrize("source", ["d.safetensors", "p.json"])
@pytest.mark.repeats(1)
def test_openood_from_end_to_end(cache: Cache, place: Path, network: nn.Module, source: str) -> None:
    def loader(split: str, size: int) -> list[dict[str, Tensor]]:
        return [{"data": x, "label": y} for x, y in batches(cache, split, size)]

    loaders = {
        "id": {"train": loader("id/train", 100), "test": loader("id/val", 200)},
        "ood": {"val": [], "near": {"letters": loader("ood/val", 200)}},
    }
    ours = score_splits(cache, PARAMS, ["id/val", "ood/val"])
    expected = detect(ours["id/val"], ours["ood/val"]).auroc
    postprocessor = NAC(place / source)
    assert evaluate(network, postprocessor, loaders) == pytest.approx(expected, abs=0.0005)
    images = loaders["id"]["test"][0]["data"]
    pred, conf = postprocessor.postprocess(network, images)
    with torch.no_grad():
        assert torch.equal(pred, network(images).argmax(dim=1))
    np.testing.assert_allclose(conf.numpy(), ours["id/val"][:200], atol=1e-3)


def test_openood_needs_setup_with_the_same_network(place: Path, network: nn.Module) -> None:
    postprocessor = NACPostprocessor(place / "d.safetensors")
    with pytest.raises(InputError, match="call setup"):
        postprocessor.postprocess(network, torch.zeros(2, 1, 28, 28))
    postprocessor.setup(network, {}, {})
    with pytest.raises(InputError, match="call setup"):
        postprocessor.postprocess(DigitsCNN(), torch.zeros(2, 1, 28, 28))


@needs_pytorch_ood
def test_adapters_name_what_is_wrong(place: Path) -> None:
    from nacpipe.detector.adapters.pytorch_ood import NAC as PytorchOod

    with pytest.raises(NacError, match="it was exported for another network"):
        PytorchOod(DigitsCNN(), place / "d.safetensors")
    with pytest.raises(ParamsError, match=r"there is no parameter file nosuch\.json"):
        PytorchOod(DigitsCNN(), "nosuch.json").fit([])


@pytest.mark.slow
def test_openood_adapter_needs_neither_library(place: Path) -> None:
    code = """
import sys
sys.modules["openood"] = sys.modules["pytorch_ood"] = None
from nacpipe.detector.adapters.openood import NACPostprocessor
print(NACPostprocessor("x.safetensors").APS_mode)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("False\n", "")
