"""Precisions: what is refused, what is set and restored, and how far values are from float32's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import nacpipe
from nacpipe.cache import Cache, LayerSpec, open_cache
from nacpipe.errors import InputError
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest
from nacpipe.networks import precision as precision_module
from nacpipe.networks.precision import (
    AUTOCAST,
    GRADIENT_SCALE,
    check_support,
    choose_format,
    computing,
    deterministic,
    laid_out,
    products,
)
from nacpipe.networks.taps import Taps, _without_cudnn, freeze

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def flags() -> list[object]:
    """What torch rounds products with, by both of its ways to say it, and what is deterministic."""
    backends = torch.backends
    kinds = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul)
    kinds += (backends.mkldnn.conv, backends.mkldnn.rnn)
    return [
        *(kind.fp32_precision for kind in kinds),
        torch.get_float32_matmul_precision(),
        backends.cudnn.allow_tf32,
        backends.cudnn.deterministic,
        backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        warnings.showwarning,
    ]


@pytest.fixture
def restored() -> Iterator[None]:
    """What a test chooses for torch is undone."""
    conv, whole = torch.backends.mkldnn.conv.fp32_precision, torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.mkldnn.conv.fp32_precision = conv
    torch.backends.cudnn.allow_tf32 = cudnn
    torch.set_float32_matmul_precision(whole)


def nothing() -> None: ...


CHOICES: list[Callable[[], object]] = [
    nothing,
    lambda: torch.set_float32_matmul_precision("high"),
    lambda: torch.set_float32_matmul_precision("medium"),
    lambda: setattr(torch.backends.mkldnn.conv, "fp32_precision", "bf16"),
    lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
]


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize(("precision", "expected"), [("fp32", "ieee"), ("bf16", "ieee"), ("tf32", "tf32")])
def test_a_precision_is_in_force_whatever_was_chosen_before(
    choose: Callable[[], object], precision: str, expected: str
) -> None:
    choose()
    before = flags()
    with products(precision):
        assert torch.backends.cuda.matmul.fp32_precision == expected
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision == "tf32")
        assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == (precision == "tf32")
        assert torch.backends.mkldnn.conv.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    assert flags() == before


@pytest.fixture
def everywhere() -> Iterator[None]:
    """TF32 is chosen for all of torch at once; undone afterwards."""
    before, whole = flags(), torch.get_float32_matmul_precision()
    torch.backends.fp32_precision = "tf32"
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision(whole)
    torch.backends.cudnn.allow_tf32 = before[7]
    mkldnn = torch.backends.mkldnn
    for kind, value in zip((mkldnn.matmul, mkldnn.conv, mkldnn.rnn), before[3:6], strict=True):
        kind.fp32_precision = value
    assert flags() == before


@pytest.mark.usefixtures("everywhere")
def test_what_is_chosen_for_all_of_torch_is_not_in_force() -> None:
    """A convolution of cuDNN has it where its own setting is none."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    kinds = (cudnn.conv, cudnn.rnn, cuda.matmul)
    before = [kind.fp32_precision for kind in kinds]
    assert before[0] == "tf32"
    with products("fp32"):
        assert {kind.fp32_precision for kind in kinds} == {"ieee"}
        assert not cudnn.allow_tf32  # and raises no error: the two ways do not contradict each other
        with _without_cudnn(True):
            assert cudnn.conv.fp32_precision == "ieee"
        assert cudnn.conv.fp32_precision == "ieee"
    assert [kind.fp32_precision for kind in kinds] == before


def test_cudnn_is_left_out_and_all_else_stays() -> None:
    cudnn = torch.backends.cudnn
    before = cudnn.enabled
    with deterministic(), _without_cudnn(True):
        assert (cudnn.enabled, cudnn.deterministic) == (False, True)
    assert cudnn.enabled == before
    with _without_cudnn(False):
        assert cudnn.enabled == before


def test_the_fastest_algorithm_of_a_day_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with deterministic():
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark


def test_all_is_restored_after_an_error() -> None:
    network, before = nn.Sequential(nn.Conv2d(3, 4, 3)), flags()
    kernel = network[0].weight
    with pytest.raises(RuntimeError, match="in the midst"), computing(network, "tf32", "channels_last"):
        assert flags() != before
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        raise RuntimeError("in the midst")
    assert flags() == before
    assert network[0].weight is kernel
    assert kernel.is_contiguous()


def test_a_workspace_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic():
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_kernels_are_laid_out_and_given_back_as_they_were() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv3d(1, 1, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    )
    table = nn.Parameter(torch.randn(1, 3, 4, 4))
    network.register_parameter("table", table)
    kernel, values, data = network[0].weight, network[0].weight.detach().clone(), network[0].weight.data_ptr()
    with laid_out(network, "channels_last"):
        assert kernel.stride() == (27, 1, 9, 3)
        assert torch.equal(kernel, values)
        assert table.is_contiguous()
    assert kernel.is_contiguous()
    assert kernel.data_ptr() == data


def test_the_memory_format_is_a_rule_of_device_and_precision() -> None:
    assert {choose_format(precision, CPU) for precision in AUTOCAST} == {"contiguous"}
    assert {precision: choose_format(precision, CUDA) for precision in AUTOCAST} == {
        "fp32": "contiguous", "tf32": "channels_last", "bf16": "channels_last", "fp16": "channels_last"
    }  # fmt: skip


def test_operations_without_a_deterministic_algorithm_are_named() -> None:
    found: list[str] = []
    with pytest.warns(UserWarning, match="of another kind") as others, deterministic(found.append):
        for _ in range(2):
            torch.ones(3).put_(torch.tensor([1]), torch.tensor([2.0]))
        warnings.warn("of another kind", stacklevel=1)
        warnings.warn("Deterministic behavior was enabled with x, but your program uses CuBLAS", stacklevel=1)
        warnings.warn("Flash Attention defaults to a non-deterministic algorithm. To explicitly", stacklevel=1)
    assert found == ["put_", "put_", "cuBLAS", "Flash Attention"]
    assert len(others) == 1


class Attention(torch.autograd.Function):
    """It stands in for CUDA's attention, which asks in its backward pass whether torch warns or refuses."""

    asked: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        Attention.asked.append(torch.is_deterministic_algorithms_warn_only_enabled())
        return gradient


class Attends(nn.Module):
    """A network with attention and, if asked for, an operation without a deterministic algorithm behind it."""

    def __init__(self, scatters: bool) -> None:
        super().__init__()
        self.first, self.fc, self.scatters = nn.Linear(4, 4), nn.Linear(4, 3), scatters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = Attention.apply(self.first(x.mul_(2)))  # what is run again must not be doubled twice
        if self.scatters:
            torch.ones(3).put_(torch.tensor([1]), torch.tensor([2.0]))
        return self.fc(found)


@pytest.mark.parametrize(("scatters", "asked"), [(False, [False, False]), (True, [True, True])])
def test_attention_has_its_deterministic_backward_pass(scatters: bool, asked: list[bool]) -> None:
    """It takes that where torch refuses others; a network that has no other runs again, with warnings."""
    torch.manual_seed(0)
    Attention.asked.clear()
    network, images, found = freeze(Attends(scatters)), torch.randn(5, 4), list[str]()
    layers = [LayerSpec(name="first", path="first", pooling="none", neurons=4)]
    with Taps(network, layers, "fc") as taps:
        expected = taps(images.clone())
    Attention.asked.clear()
    with computing(network, "fp32", "contiguous", found.append), Taps(network, layers, "fc") as taps:
        tapped = [taps(images.clone()) for _ in range(2)]
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert taps.strict is not scatters
    assert Attention.asked == asked
    assert found == ["put_"] * (2 if scatters else 0)
    for one in tapped:
        assert torch.equal(one.gradient["first"], expected.gradient["first"])
        assert torch.equal(one.logits, expected.logits)


# --- what a device does not compute in --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_cpu_computes_in(precision: str) -> None:
    check_support(precision, CPU)


def test_tf32_needs_a_gpu_from_ampere_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match=r"^--precision tf32 cannot be used on cpu: cpu has no TF32; take --precision fp32"
    ):
        check_support("tf32", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(InputError, match=r"precision='tf32' cannot be used on cuda: Tesla T4 is older than Ampere and"):
        check_support("tf32", CUDA, python=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_support("tf32", CUDA)


def test_a_half_type_that_a_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(*_: object) -> None:
        raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'\nand more")

    monkeypatch.setattr(precision_module.torch, "conv2d", lacks)
    with pytest.raises(
        InputError, match=r"fp16 cannot be used on cpu: \"slow_conv2d_cpu\" not implemented for 'Half'; take"
    ):
        check_support("fp16", CPU)
    monkeypatch.undo()

    def warns(*args: Any) -> torch.Tensor:  # as a backward pass on a GPU does, once
        warnings.warn("Attempting to run cuBLAS, but there was no current CUDA context!", stacklevel=1)
        return convolve(*args)

    convolve = torch.conv2d
    monkeypatch.setattr(precision_module.torch, "conv2d", warns)
    check_support("bf16", CPU)
    monkeypatch.undo()
    monkeypatch.setitem(precision_module.AUTOCAST, "fp16", torch.float64)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="fp16 cannot be used on cpu: In CPU autocast, but the target dtype is not"):
        check_support("fp16", CPU)


# --- values -----------------------------------------------------------------------------------------------------------


class Faint(nn.Module):
    """Its gradient at `first` is `scale` times that of the logits."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = scale
        with torch.no_grad():
            for linear in (self.first, self.fc):
                linear.weight.copy_(torch.eye(4))
                linear.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.first(x)) * self.scale)


def gradient(network: nn.Module, images: torch.Tensor, precision: str) -> torch.Tensor:
    layers = [LayerSpec(name="first", path="first", pooling="none", neurons=4)]
    with Taps(freeze(network), layers, "fc", precision=precision) as taps:
        return taps(images).gradient["first"]


def test_gradients_below_float16s_smallest_number_are_there() -> None:
    """2⁻²⁸ is 1/16 of float16's smallest; times 1024 it is in the range, and is divided out without rounding."""
    images, network = torch.tensor([[1.0, 0.0, 0.0, 0.0]]) + 1, Faint(2.0**-28)
    found = gradient(network, images, "fp16")
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.zeros(1, 4))  # the logits are alike: softmax − 1/4 is 0
    network.fc.bias.data = torch.tensor([20.0, 0.0, 0.0, 0.0])  # softmax is (1, 0, 0, 0)
    exact = torch.tensor([[0.75, -0.25, -0.25, -0.25]]) * 2.0**-28
    assert torch.equal(gradient(network, images, "fp16"), exact)
    assert float(exact.abs().max()) < 6e-8 < GRADIENT_SCALE * float(exact.abs().min())


def test_float16_is_nearer_to_float32_than_bfloat16(request_: ExtractRequest, finished: Cache) -> None:
    off = {}
    for precision in ("bf16", "fp16"):
        request = replace(request_, cache=request_.cache.with_name(precision), precision=precision, splits=("id/val",))
        extract(plan_extraction(request))
        cache = open_cache(request.cache)
        assert cache.header.identity["dtype"] == precision
        exact, found = (c["id/val"].read("layers/layer1/gradient") for c in (finished, cache))
        off[precision] = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    assert 1e-6 < off["fp16"] < off["bf16"] < 1


def test_what_float16_does_not_hold_is_refused(tmp_path: Path) -> None:
    data = [(torch.ones(4) * (1 + row % 2), row % 2) for row in range(4)]
    network = Faint(1.0)
    network.fc.weight.data *= 60_000
    with pytest.raises(
        InputError, match=r"layers/first/gradient exceeds float16's range, 65504, in fp16; take precision='bf16'"
    ):
        nacpipe.extract(
            network, {"id/train": data}, tmp_path / "x.zarr", layers=["first"], precision="fp16", progress=False
        )


class Scatter(nn.Module):
    """A network with an operation that torch knows no deterministic algorithm of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.ones(3).put_(torch.tensor([1]), torch.tensor([2.0]))
        return self.fc(torch.relu(self.first(x)))


def test_a_cache_names_operations_without_a_deterministic_algorithm(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    splits = {"id/train": [(x, int(x.sum() > 0)) for x in torch.randn(12, 4)]}
    before = flags()
    cache = nacpipe.extract(Scatter(), splits, tmp_path / "x.zarr", batch_size=4)
    assert cache.header.information["nondeterministic"] == ["put_"]
    told = capfd.readouterr().err
    assert told.count("no deterministic algorithm on cpu for put_: extracted anew, states may differ in the last") == 1
    assert flags() == before
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    cache = nacpipe.extract(plain, splits, tmp_path / "y.zarr", batch_size=4, progress=False)
    assert "nondeterministic" not in cache.header.information


FILE = """
import torch
from torch import nn

torch.set_float32_matmul_precision("high")


def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
"""


def test_a_networks_file_does_not_choose_the_precision(request_: ExtractRequest, tmp_path: Path) -> None:
    (tmp_path / "rounds.py").write_text(FILE)
    before = flags()
    request = replace(request_, model=f"{tmp_path / 'rounds.py'}:build", checkpoint=None, layers=("1",))
    plan = plan_extraction(request)
    assert plan.header.identity["arithmetic"]["tf32"] is False
    assert flags() == before


class Views(nn.Module):
    """It calls .view on what a convolution gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.first(x)
        return self.fc(found.view(len(x), -1))


def test_a_network_that_takes_no_channels_last_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("nacpipe.extraction.request.choose_format", lambda precision, device: "channels_last")
    data = [(torch.randn(3, 4, 4), row % 3) for row in range(6)]
    with pytest.raises(InputError, match=r"calls \.view on what a convolution gives.*or take precision='fp32'"):
        nacpipe.extract(Views(), {"id/train": data}, tmp_path / "x.zarr", progress=False)
