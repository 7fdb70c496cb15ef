"""Networks that torch.compile, DataParallel, … wrap, scripted modules, and detectors on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nacpipe
from nacpipe.benchmarks.digits import load_set
from nacpipe.benchmarks.standard import find_benchmark
from nacpipe.cache import Cache, open_cache
from nacpipe.detector.adapters.openood import NACPostprocessor
from nacpipe.detector.export import export_detector
from nacpipe.detector.file import write_detector
from nacpipe.detector.fit import fit_detector
from nacpipe.errors import DetectorError, InputError
from nacpipe.extraction.callback import Snapshots
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.networks.architectures.digits_cnn import DigitsCNN
from nacpipe.networks.build import blank_network, load_network
from nacpipe.networks.layers import list_layers
from nacpipe.networks.models import find_model
from nacpipe.networks.wrappers import find_device_and_dtype, named_state, unwrap
from nacpipe.scoring.coverage import score_splits
from tools.train_digits import to_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
PARAMS = NacParams(
    layers={
        "avgpool": LayerParams(bins=24, saturation=5, alpha=0.4, weight=2.0),
        "layer3": LayerParams(bins=51, saturation=100, alpha=0.03),
    }
)


@pytest.fixture(scope="module")
def cache(digits_cache: Path) -> Cache:
    return open_cache(digits_cache)


@pytest.fixture(scope="module")
def detector_file(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("detector") / "d.safetensors"
    write_detector(path, export_detector(cache, PARAMS))
    return path


def digits() -> nn.Module:
    return load_network(find_model("digits_cnn"), find_benchmark("digits"), None, CPU).module


@contextmanager
def process_group(folder: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def compiled(network: nn.Module) -> nn.Module:
    return torch.compile(network)  # type: ignore[return-value]


def compiled_in_place(network: nn.Module) -> nn.Module:
    network.compile()
    return network


def parallel_inside(network: nn.Module) -> nn.Module:
    network.layer3 = nn.DataParallel(network.get_submodule("layer3"))
    return network


def compiled_inside(network: nn.Module) -> nn.Module:
    network.layer3 = torch.compile(network.get_submodule("layer3"))  # type: ignore[assignment]
    return network


WRAPS: list[Callable[[nn.Module], nn.Module]] = [
    nn.DataParallel,
    torch.optim.swa_utils.AveragedModel,
    lambda network: nn.DataParallel(nn.DataParallel(network)),
    parallel_inside,
    pytest.param(compiled, marks=pytest.mark.filterwarnings("ignore")),  # type: ignore[list-item]  # torch's, of dynamo
    pytest.param(lambda network: nn.DataParallel(compiled(network)), marks=pytest.mark.filterwarnings("ignore")),  # type: ignore[list-item]
    pytest.param(compiled_in_place, marks=pytest.mark.filterwarnings("ignore")),  # type: ignore[list-item]
    pytest.param(compiled_inside, marks=pytest.mark.filterwarnings("ignore")),  # type: ignore[list-item]
]


@pytest.mark.repeats(1)
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_wrapped_network_is_scored_as_the_network(
    cache: Cache, detector_file: Path, tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    """By load_detector, fit_detector, OpenOOD's adapter and a snapshot; what wraps it is still there afterwards."""
    images, labels = load_set("val")
    images_, labels_ = to_inputs(images), torch.tensor(labels)
    batch, expected = images_[:128], score_splits(cache, PARAMS, ["id/val"])["id/val"][:128]
    network = wrap(digits())
    before = dict(network.named_modules())
    detector = nacpipe.load_detector(detector_file, network)
    np.testing.assert_array_equal(detector(batch).score.numpy(), expected)
    adapter = NACPostprocessor(detector_file)
    adapter.setup(network, {}, {})
    np.testing.assert_array_equal(adapter.postprocess(network, batch)[1].numpy(), expected)
    rows = cache["id/train"].index
    train = to_inputs(load_set("main_train")[0][rows])
    fitted = fit_detector(network, PARAMS, train.split(128), {})
    np.testing.assert_array_equal(fitted(batch).score.numpy(), expected)
    splits = {"id/train": list(zip(images_[:256].split(128), labels_[:256].split(128), strict=True))}
    taken = open_cache(Snapshots(tmp_path, splits, ["avgpool", "layer3"])(network, 0))
    assert taken.header.identity["weights"] == cache.header.identity["weights"]
    for path in ("layers/avgpool/activation", "layers/layer3/gradient", "logits"):
        np.testing.assert_array_equal(taken["id/train"].read(path), cache["id/val"].read(path)[:256])
    assert dict(network.named_modules()) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@pytest.mark.filterwarnings("ignore")  # torch's, of its own deprecations
def test_distributed_data_parallel(cache: Cache, detector_file: Path, tmp_path: Path) -> None:
    batch = to_inputs(load_set("val")[0][:128])
    with process_group(tmp_path):
        network = nn.parallel.DistributedDataParallel(digits().requires_grad_(True))
        found = nacpipe.load_detector(detector_file, network)(batch).score.numpy()
        np.testing.assert_array_equal(found, score_splits(cache, PARAMS, ["id/val"])["id/val"][:128])


def test_a_network_inside_another_is_said_to_be_the_one(detector_file: Path) -> None:
    """Wrappers that do more, such as preparing images, are not seen through: they may change the logits."""

    class Prepared(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.network(x / 2)
            return logits

    for network, name in ((Prepared(digits()), "network"), (nn.Sequential(digits()), "0")):
        with pytest.raises(DetectorError, match=rf"it was exported for another network .*: give network\.{name}$"):
            nacpipe.load_detector(detector_file, network)
    with pytest.raises(
        DetectorError, match=r"give that network with those weights, or extract and export for this one"
    ):
        nacpipe.load_detector(detector_file, nn.DataParallel(DigitsCNN()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's, of dynamo
def test_a_detector_can_be_compiled_itself(cache: Cache, detector_file: Path) -> None:
    batch = to_inputs(load_set("val")[0][:128])
    detector = torch.compile(nacpipe.load_detector(detector_file, digits()), backend="eager")
    np.testing.assert_array_equal(
        detector(batch).score.numpy(), score_splits(cache, PARAMS, ["id/val"])["id/val"][:128]
    )


def test_names_and_places_of_wrapped_networks() -> None:
    network = DigitsCNN()
    keys = list(network.state_dict())
    inside = parallel_inside(DigitsCNN())
    assert list(named_state(nn.DataParallel(network))) == keys
    assert list(inside.state_dict()) != keys
    assert list(named_state(nn.DataParallel(inside))) == keys
    assert unwrap(nn.DataParallel(network)) is network
    assert unwrap(network) is network
    assert find_device_and_dtype(nn.DataParallel(network.double())) == (CPU, torch.float64)
    assert find_device_and_dtype(nn.ReLU()) == (CPU, torch.float32)


FILE = """
import torch
from nacpipe.networks.architectures.digits_cnn import DigitsCNN

def plain():
    torch.manual_seed(4)
    return DigitsCNN()

def compiled(): return torch.compile(plain())
def parallel(): return torch.nn.DataParallel(plain())
def in_place():
    network = plain()
    network.compile()
    return network
def inside():
    network = plain()
    network.layer3 = torch.compile(network.layer3)
    return network
"""


@pytest.mark.repeats(1)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "function", [pytest.param("compiled", marks=pytest.mark.slow), "parallel", "in_place", "inside"]
)
def test_extraction_of_a_wrapped_network_is_that_of_the_network(tmp_path: Path, function: str) -> None:
    (tmp_path / "net.py").write_text(FILE)
    request = ExtractRequest(
        benchmark="digits", model=f"{tmp_path / 'net.py'}:plain", cache=tmp_path / "plain.zarr", device="cpu",
        layers=("avgpool", "layer3"), splits=("ood/far/faces",),
    )  # fmt: skip
    other = replace(request, model=f"{tmp_path / 'net.py'}:{function}", cache=tmp_path / "other.zarr")
    network = blank_network(find_model(other.model), find_benchmark("digits"), None)
    assert [layer.path for layer in list_layers(network)][-2:] == ["avgpool", "fc"]
    caches = []
    for one in (request, other):
        extract(plan_extraction(one))
        caches.append(open_cache(one.cache))
    plain, wrapped = caches
    assert wrapped.header.identity["weights"] == plain.header.identity["weights"]
    assert wrapped.header.layers == plain.header.layers
    for path in plain.header.arrays():
        np.testing.assert_array_equal(wrapped["ood/far/faces"].read(path), plain["ood/far/faces"].read(path))


# --- scripted ---------------------------------------------------------------------------------------------------------


def script(module: nn.Module, example: Tensor | None = None, *, freeze: bool = False) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; people have such files all the same
        found = torch.jit.script(module.eval()) if example is None else torch.jit.trace(module.eval(), example)
        return torch.jit.freeze(found) if freeze else found  # type: ignore[no-untyped-call]


def with_script(kind: str) -> nn.Module:
    network = digits()
    layer3 = network.get_submodule("layer3")
    network.layer3 = script(layer3, torch.zeros(2, 32, 14, 14) if kind == "trace" else None)
    return network


@pytest.mark.parametrize("kind", ["script", "trace"])
def test_a_scripted_module_inside_a_network_is_tapped_as_a_whole(cache: Cache, detector_file: Path, kind: str) -> None:
    network = with_script(kind)
    batch = to_inputs(load_set("val")[0][:128])
    before = dict(network.named_modules())
    detector = nacpipe.load_detector(detector_file, network)
    found, expected = detector(batch).score.numpy(), score_splits(cache, PARAMS, ["id/val"])["id/val"][:128]
    assert (np.abs(found - expected) <= 1e-5).mean() >= 0.97  # a scripted module may be computed in another order
    assert dict(network.named_modules()) == before
    params = NacParams(layers={"layer3.0": LayerParams(bins=9, saturation=3, alpha=1.0)})
    with pytest.raises(InputError, match=r"^layer 'layer3\.0' is not known for DigitsCNN"):
        fit_detector(network, params, [batch], {})


def test_a_network_that_is_scripted_as_a_whole_gives_logits_alone(tmp_path: Path) -> None:
    network = script(digits())
    images = to_inputs(load_set("val")[0][:64])
    only = NacParams(layers={"logits": LayerParams(bins=9, saturation=3, alpha=1.0)})
    expected = fit_detector(digits(), only, [images], {})(images).score
    torch.testing.assert_close(fit_detector(network, only, [images], {})(images).score, expected)
    with pytest.raises(InputError, match=r"^layer 'avgpool' did not run in a forward pass \(it is part of a scripted"):
        fit_detector(network, PARAMS, [images], {})
    with pytest.raises(InputError, match=r"^layer 'layer2' did not run .* which takes no hooks\)$"):
        Snapshots(tmp_path, {"id/train": [(images, torch.zeros(64))]}, ["layer2"])(network, 0)


def test_a_frozen_script_has_no_weights_to_be_known_by(detector_file: Path) -> None:
    network = script(digits(), freeze=True)
    message = (
        r"^the network has a module of torch\.jit\.freeze, whose weights cannot be hashed; give the network before"
    )
    with pytest.raises(InputError, match=message):
        nacpipe.load_detector(detector_file, network)
    with pytest.raises(InputError, match=message):
        fit_detector(network, PARAMS, [torch.zeros(2, 1, 28, 28)], {})


def test_a_module_without_an_evaluation_mode_is_refused() -> None:
    program = torch.export.export(digits(), (torch.zeros(2, 1, 28, 28),)).module()
    message = r"^GraphModule cannot be put in evaluation mode: .*; give the network as a torch\.nn\.Module, a program"
    with pytest.raises(InputError, match=message):
        fit_detector(program, PARAMS, [torch.zeros(2, 1, 28, 28)], {})
