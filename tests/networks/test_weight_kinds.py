"""Weights that are no float32 tensors: how they are hashed, and networks that have them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nacpipe
from nacpipe.benchmarks.standard import find_benchmark
from nacpipe.cache import open_cache
from nacpipe.detector.export import export_detector
from nacpipe.detector.file import write_detector
from nacpipe.detector.fit import fit_detector
from nacpipe.errors import CheckpointError, InputError
from nacpipe.extraction.callback import Snapshots
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.networks.build import load_network
from nacpipe.networks.checkpoints import hash_weights
from nacpipe.networks.models import find_model
from nacpipe.networks.taps import Taps, freeze
from nacpipe.scoring.coverage import score_splits
from tests.networks.test_taps import by_definition, spec

pytestmark = pytest.mark.usefixtures("one_thread")

# Made with nacpipe before it knew other kinds; caches hold such hashes.
GRID = torch.arange(24, dtype=torch.float32)
KNOWN = {
    "a": ((GRID / 7).reshape(2, 3, 4), "a0a247b11ea35a65b6fdaafee31833a6840f771a1e235ba03c7f3b394276670c"),
    "b": ((GRID / 3).double(), "8d835f8a3fdff7c888bd51a1f0cb02d9d075b3b080911698053dc924e058755c"),
    "c": (torch.arange(5) - 2, "f2ef6fe551080d49376ba5edfd96bf922e58cea619394a770b4ccb7b9a7bf6bd"),
    "d": (torch.tensor(2.5), "fb7b71b647761d484cca1f6be4118b935107903dcb895f477d0a7ad38c00b63e"),
    "e": ((GRID / 9).half(), "fce518db6f432e00ebe7faa7715b379dfee74adf744d3a7cd9ee5a3425eee3dd"),
    "f": (torch.tensor([True, False]), "567ff00a75cb021fca37fec7ce04a29ccb5b12a0df3303d1bedbe3b4f6b1ad4d"),
    "g": (torch.arange(3, dtype=torch.uint8), "7c16ec7fd51e8f32859a022e4767b1003b59bbb05e04163b8333c55fdba56411"),
    "h": (torch.zeros(0, 3), "110dcaf0ce7170564a538b7a974e74ecd27d8102050f311e7d89bc9431ec0629"),
    "i": (torch.tensor([1 + 2j, 3 - 1j]), "f676471c53be837fd3e45d21135dc83b459b278cf05b14afb5ca347b111ba030"),
    "t": (GRID.reshape(4, 6).T, "aba2750d7a3170d80a4c9705825f009d9cbb3a00263d3360b40337dc785d7fd5"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_hashes_of_what_could_be_hashed_before_are_the_same(name: str) -> None:
    value, expected = KNOWN[name]
    assert hash_weights({name: value}) == expected


def test_the_hash_of_all_of_them_is_the_same() -> None:
    state = {name: value for name, (value, _) in KNOWN.items()}
    state["n.num_batches_tracked"] = torch.tensor(7)
    assert hash_weights(state) == "9f967faf2c2a8cbdec27d734733c2215499b00feddb2e1810bb5cb5ff97c217c"


def quantise(values: Tensor, scale: float = 0.1) -> Tensor:
    return torch.quantize_per_tensor(values, scale, 3, torch.qint8)


def per_channel(values: Tensor) -> Tensor:
    scales, zeros = torch.tensor([0.1, 0.2]), torch.tensor([0, 1])
    return torch.quantize_per_channel(values.reshape(2, 3), scales, zeros, 0, torch.qint8)


VALUES = torch.tensor([1.0, -2.0, 0.0, 3.5, 0.25, -0.5])
OTHER = torch.tensor([1.0, -2.0, 0.0, 3.5, 0.25, -1.5])
KINDS: dict[str, Callable[[Tensor], Any]] = {
    "bfloat16": lambda x: x.bfloat16(),
    "bfloat16 scalar": lambda x: x[5].bfloat16(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "other float8": lambda x: x.to(torch.float8_e5m2),
    "quantised": quantise,
    "per channel": per_channel,
    "conjugated": lambda x: (x + 1j * x).conj(),
    "sparse": lambda x: x.reshape(2, 3).to_sparse(),
    "compressed": lambda x: x.reshape(2, 3).to_sparse_csr(),
    "tuple": lambda x: (x, None),
    "dictionary": lambda x: {"history": [1, 2.5, "text"], "last": x},
    "set": lambda x: {float(x[5]), 7.0},
    "number": lambda x: float(x[5]),
    "text": lambda x: str(x),
    "bytes": lambda x: x.numpy().tobytes(),
    "stream": lambda x: io.BytesIO(x.numpy().tobytes()),
    "array": lambda x: x.numpy(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize")  # torch's, of what is in beta or to go
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_hash_that_tells_values_apart(kind: str) -> None:
    make = KINDS[kind]
    assert hash_weights({"x": make(VALUES)}) == hash_weights({"x": make(VALUES.clone())})
    assert hash_weights({"x": make(VALUES)}) != hash_weights({"x": make(OTHER)})
    assert hash_weights({"x": make(VALUES)}) != hash_weights({"y": make(VALUES)})


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize")
def test_kinds_are_told_apart_though_their_values_are_the_same() -> None:
    hashes = [hash_weights({"x": make(VALUES)}) for make in KINDS.values()] + [hash_weights({"x": VALUES})]
    same = [["bytes", "stream"], ["array", "tensor"]]
    assert len(set(hashes)) == len(hashes) - sum(len(names) - 1 for names in same)
    assert hash_weights({"x": quantise(VALUES)}) != hash_weights(
        {"x": quantise(VALUES, 0.2)}
    )  # the same integers or not


class Strange:
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            Strange(),
            r"^the network's state dict holds 'x', a Strange, which cannot be hashed; let get_extra_state return",
        ),
        ([1, Strange()], r"^the network's state dict holds 'x\[1\]', a Strange, which"),
        (np.array([Strange()]), r"holds 'x', a ndarray, which cannot be hashed"),
        (torch.zeros(3, device="meta"), r"^the network's weights 'x' have no values \(they are on the meta device\)"),
        (nn.LazyLinear(3).weight, r"^the network's weights 'x' are float32 in a form that cannot be hashed: "),
    ],
)
def test_what_has_no_fixed_bytes_is_refused(value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hash_weights({"x": value})


# --- networks that have them ------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.pool, self.fc = nn.Conv2d(3, 8, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.flatten(self.pool(torch.relu(self.conv(x))), 1))
        return logits


class Extra(Net):
    """It remembers something that is no tensor."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale / self.scale

    def get_extra_state(self) -> dict[str, Any]:
        return {"scale": self.scale, "names": ["a", "b"]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.scale = state["scale"]


FILE = """
import torch
from tests.networks.test_weight_kinds import Extra, Net

def bf16(): return Net().bfloat16()
def extra(): return Extra()
def half(): return Net().half()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(FILE)
    return tmp_path / "net.py"


PARAMS = NacParams(
    layers={
        "conv": LayerParams(bins=20, saturation=5, alpha=30.0),
        "pool": LayerParams(bins=20, saturation=5, alpha=30.0),
    }
)


@pytest.mark.parametrize(("function", "network"), [("bf16", Net().bfloat16()), ("extra", Extra())])
def test_they_are_extracted_exported_and_scored(
    request_: ExtractRequest, file: Path, tmp_path: Path, function: str, network: nn.Module
) -> None:
    request = replace(
        request_, model=f"{file}:{function}", checkpoint=None, layers=("conv", "pool"), splits=("id/train", "id/val")
    )
    plan = plan_extraction(request)
    assert plan.network.model.classifier == "fc"
    extract(plan)
    cache = open_cache(request.cache)
    assert cache.header.identity["weights"] == hash_weights(network.state_dict())
    split = cache["id/val"]
    assert {
        split.read(path).dtype for path in ("layers/conv/activation", "layers/conv/gradient", "logits", "features")
    } == {np.dtype(np.float32)}
    weight, bias = cache.classifier() or (None, None)
    assert weight is not None and weight.dtype == np.float32
    np.testing.assert_array_equal(weight, network.get_parameter("fc.weight").detach().float().numpy())
    close = {"bf16": 2e-2, "extra": 1e-4}[function]
    np.testing.assert_allclose(split.features[:] @ weight.T + bias, split.logits[:], atol=close)
    write_detector(tmp_path / "d.safetensors", export_detector(cache, PARAMS))
    detector = nacpipe.load_detector(tmp_path / "d.safetensors", network)
    images = torch.randn(6, 3, 32, 32)  # float32 for both
    assert detector(images).logits.dtype == torch.float32
    expected = score_splits(cache, PARAMS, ["id/val"])["id/val"]
    assert np.isfinite(expected).all()
    assert detector(images).score.isfinite().all()


def test_a_bfloat16_networks_states_are_near_those_in_float32() -> None:
    images = torch.randn(4, 3, 32, 32)
    layers = [spec("conv"), spec("pool")]
    expected = by_definition(Net(), layers, images)
    with Taps(freeze(Net().bfloat16()), layers, "fc") as taps:
        tapped = taps(images)
    for name, (activation, gradient) in expected.items():
        for found, wanted in ((tapped.activation[name], activation), (tapped.gradient[name], gradient)):
            assert found.dtype == torch.float32
            assert float((found - wanted).norm() / wanted.norm()) < 2e-2


def test_a_float64_network_takes_float32_images() -> None:
    network = Net().double()
    found = fit_detector(network, PARAMS, [torch.randn(8, 3, 32, 32)], {})(torch.randn(3, 3, 32, 32))
    assert found.logits.dtype == torch.float64


def test_a_float16_network_is_refused_in_words(request_: ExtractRequest, file: Path) -> None:
    request = replace(request_, model=f"{file}:half", checkpoint=None, layers=("conv", "pool"))
    message = "layer 'conv' cannot be tapped: it gives float16, in which most gradients would be 0; run the network in"
    with pytest.raises(InputError, match=message):
        plan_extraction(request)
    with pytest.raises(InputError, match=message):
        fit_detector(Net().half(), PARAMS, [torch.randn(8, 3, 32, 32)], {})


def test_extra_state_is_loaded_and_belongs_to_the_weights(file: Path, tmp_path: Path) -> None:
    model, benchmark = find_model(f"{file}:extra"), find_benchmark("cifar10")
    hashes = []
    for number, scale in enumerate((2.0, 4.0)):
        path = tmp_path / f"{number}.pth"
        torch.save({"model": Extra(scale).state_dict(), "epoch": 3}, path)
        network = load_network(model, benchmark, path, torch.device("cpu"))
        assert network.module.scale == scale
        hashes.append(network.weights_sha256)
    assert hashes[0] == hash_weights(Extra().state_dict()) != hashes[1]
    torch.save(Net().state_dict(), tmp_path / "without.pth")
    with pytest.raises(CheckpointError, match=r"does not fit the network: it lacks _extra_state$"):
        load_network(model, benchmark, tmp_path / "without.pth", torch.device("cpu"))
    broken = Extra().state_dict() | {"_extra_state": {"names": []}}
    torch.save(broken, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError, match=r"broken\.pth cannot be loaded: 'scale'$"):
        load_network(model, benchmark, tmp_path / "broken.pth", torch.device("cpu"))


def quantised(what: str) -> nn.Module:
    """A network of which one module is quantised for the CPU."""
    network = Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated; people have such networks all the same
        if what == "head":
            return torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-any-return,no-untyped-call]
        stem = torch.ao.quantization.QuantWrapper(nn.Conv2d(3, 3, 3, padding=1))  # type: ignore[no-untyped-call]
        stem.qconfig = torch.ao.quantization.get_default_qconfig(torch.backends.quantized.engine)
        torch.ao.quantization.prepare(stem, inplace=True)  # type: ignore[no-untyped-call]
        stem(torch.randn(4, 3, 32, 32))
        torch.ao.quantization.convert(stem, inplace=True)  # type: ignore[no-untyped-call]
        return nn.Sequential(stem, network)


@pytest.mark.filterwarnings("ignore")
def test_a_network_with_a_quantised_stem_runs_and_what_cannot_is_said(tmp_path: Path) -> None:
    network = quantised("stem")
    images = torch.randn(40, 3, 32, 32)
    splits = {"id/train": [(images, torch.zeros(40))]}
    cache = open_cache(Snapshots(tmp_path, splits, ["1.conv", "1.pool"])(network, 0))
    assert cache.header.identity["weights"] == hash_weights(network.state_dict())
    assert cache.header.features == 8
    with torch.no_grad():
        stem = network[0](images)  # type: ignore[index]
    expected = by_definition(network[1], [spec("conv"), spec("pool")], stem)  # type: ignore[index]
    for name, (activation, gradient) in expected.items():
        split = cache["id/train"][f"1.{name}"]
        np.testing.assert_allclose(split.activation[:], activation, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(split.gradient[:], gradient, rtol=1e-3, atol=1e-5)
    with pytest.raises(
        InputError, match=r"^layer '0\.module' cannot be tapped: it gives torch\.quint8, which has no gradient"
    ):
        Snapshots(tmp_path, splits, ["0.module"])(network, 1)


@pytest.mark.filterwarnings("ignore")
def test_a_network_with_a_quantised_head_is_refused_where_it_has_no_gradient(tmp_path: Path) -> None:
    network = quantised("head")
    images = torch.randn(8, 3, 32, 32)
    only = NacParams(layers={"logits": LayerParams(bins=9, saturation=3, alpha=1.0)})
    detector = fit_detector(network, only, [images], {})  # it runs
    assert detector.classifier is None
    with pytest.raises(InputError, match=r"^layer 'conv' has no gradient: |^no gradient of the logits can be computed"):
        fit_detector(network, PARAMS, [images], {})
