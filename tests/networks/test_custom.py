"""Networks from a file of one's own and from timm; layers by module path, their poolings guessed and set."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nacpipe.benchmarks.standard import find_benchmark
from nacpipe.cache import open_cache
from nacpipe.errors import CheckpointError, IdentityError, InputError, MissingExtra
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest
from nacpipe.networks.build import blank_network, classifier_weights, load_network
from nacpipe.networks.layers import guess_pooling, list_layers, measure_layers
from nacpipe.networks.models import find_model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CIFAR10 = find_benchmark("cifar10")

FILE = """
import torch
from torch import nn

from my_blocks import Tokens


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, stride=4)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.tokens = Tokens(6, 5)
        self.mix = nn.Linear(5, 7)
        self.same, self.spare, self.pair = nn.Identity(), nn.Linear(5, 5), nn.LSTM(5, 5, batch_first=True)
        self.head = nn.Linear(7, 10)

    def forward(self, x):
        x = self.norm(self.stem(x))
        x += 1
        x = self.tokens(self.act(self.act(x)))
        self.spare(x)
        x = self.mix(self.same(x) + self.pair(x)[0])
        return self.head(torch.tanh(x).mean(dim=(1, 2)) if x.dim() == 4 else torch.tanh(x).mean(dim=1))


def build():
    torch.manual_seed(5)
    return Net()


def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 11))


def shapeless():
    return nn.LSTM(32, 10)


def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))


def text():
    return "no network"


def broken():
    raise RuntimeError("no weights\\nhere")


constant = 3
"""
BLOCKS = """
from torch import nn


class Tokens(nn.Module):
    def __init__(self, channels, units):
        super().__init__()
        self.embed = nn.Linear(channels, units)

    def forward(self, x):
        return self.embed(x.flatten(2).transpose(1, 2))
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "nets"
    folder.mkdir()
    (folder / "net.py").write_text(FILE)
    (folder / "my_blocks.py").write_text(BLOCKS)
    for name in ("my_blocks", "nacpipe_network_net"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder / "net.py"


def test_a_network_of_ones_own_is_extracted(request_: ExtractRequest, file: Path) -> None:
    """Its weights its own, layers by path, poolings guessed and said aloud, set where told; and it goes on."""
    layers = ("stem", "tokens", "mix", "head")
    request = replace(request_, model=f"{file}:build", checkpoint=None, layers=layers, splits=("ood/val",))
    plan = plan_extraction(request)
    assert [n for n in plan.notes if n.startswith("layer")] == [
        "layer stem: its output (6, 8, 8) is pooled by sum-nchw, which is a guess; another with --pooling stem=KIND",
        "layer tokens: its output (64, 5) is pooled by sum-tokens, which is a guess; another with"
        " --pooling tokens=KIND",
        "layer mix: its output (64, 7) is pooled by sum-tokens, which is a guess; another with --pooling mix=KIND",
        "layer head: its output (10) is pooled by none, which is a guess; another with --pooling head=KIND",
    ]
    extract(plan)
    cache = open_cache(request.cache)
    assert cache.header.identity["architecture"] == "net.py:build"
    assert [(s.name, s.path, s.pooling, s.neurons) for s in cache.header.layers] == [
        ("stem", "stem", "sum-nchw", 6),
        ("tokens", "tokens", "sum-tokens", 5),
        ("mix", "mix", "sum-tokens", 7),
        ("head", "head", "none", 10),
    ]
    split = cache["ood/val"]
    weight, bias = cache.classifier() or (None, None)
    assert weight is not None
    np.testing.assert_allclose(split.features[:] @ weight.T + bias, split.logits[:], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(split["head"].activation[:], split.logits[:])
    softmax = torch.tensor(split.logits[:]).softmax(dim=1).numpy()
    np.testing.assert_allclose(split["head"].gradient[:], softmax - 0.1, atol=1e-6)
    assert plan_extraction(request).splits[0].state == "done"
    other = replace(request, poolings=(("tokens", "class-token"),))
    with pytest.raises(IdentityError, match=r"layers\.tokens"):
        plan_extraction(other)
    extract(plan_extraction(replace(other, cache=request.cache.with_name("d.zarr"))))
    first = open_cache(request.cache.with_name("d.zarr"))["ood/val"]["tokens"].activation[:]
    assert not np.allclose(first, split["tokens"].activation[:])


def test_a_dry_run_builds_it_too(request_: ExtractRequest, file: Path) -> None:
    request = replace(
        request_, model=f"{file}:build", checkpoint=None, layers=("mix",), poolings=(("mix", "sum-tokens"),)
    )
    plan = plan_extraction(request, dry=True)
    assert [(s.name, s.neurons) for s in plan.header.layers] == [("mix", 7)]
    assert not [n for n in plan.notes if n.startswith("layer")]  # told, not guessed


def test_a_checkpoint_can_be_given(file: Path, tmp_path: Path) -> None:
    model = find_model(f"{file}:build")
    own = load_network(model, CIFAR10, None, CPU)
    state = {key: value + 1 for key, value in own.module.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    given = load_network(model, CIFAR10, tmp_path / "w.pth", CPU)
    assert torch.equal(given.module.state_dict()["head.bias"], state["head.bias"])
    assert given.weights_sha256 != own.weights_sha256
    assert own.transform == CIFAR10.transform
    assert (own.model.classifier, own.model.family) == ("head", "custom")
    with pytest.raises(CheckpointError, match=r"^checkpoint none\.pth is not there, and net\.py:build has no weights"):
        load_network(model, CIFAR10, Path("none.pth"), CPU)


def test_layers_that_cannot_be_tapped_say_why(file: Path) -> None:
    network = load_network(find_model(f"{file}:build"), CIFAR10, None, CPU)
    reasons = {
        "same": "cannot be tapped: it returns its input unchanged; tap the module before it",
        "spare": r"has no gradient: the logits do not depend on its output, or forward runs what follows it under"
        r" torch\.no_grad, torch\.inference_mode or \.detach\(\); tap a layer behind that, or change forward",
    }
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=rf"^layer '{name}' {reason}$"):
            measure_layers(network, (name,))
    with pytest.raises(InputError, match=r"^layer 'nope' is not known for net\.py:build; known: the modules that this"):
        measure_layers(network, ("nope",))
    chosen = measure_layers(network, ())
    assert [spec.name for spec in chosen.layers] == ["mix", "pair", "tokens", "act"]
    (note,) = chosen.notes
    assert re.fullmatch(
        r"layers chosen: mix \(7 neurons, sum-tokens\), pair \(5 neurons, sum-tokens\),"
        r" tokens \(5 neurons, sum-tokens\), act \(6 neurons, sum-nchw\);"
        r" others: nacpipe layers /.*net\.py:build",
        note,
    )
    assert measure_layers(network, ("auto",)) == chosen
    assert [(s.name, s.shape, s.pooling, s.neurons, s.runs) for s in list_layers(network)] == [
        ("stem", (6, 8, 8), "sum-nchw", 6, 1),
        ("norm", (6, 8, 8), "sum-nchw", 6, 1),  # which what follows changes in place
        ("act", (6, 8, 8), "sum-nchw", 6, 2),
        ("tokens.embed", (64, 5), "sum-tokens", 5, 1),
        ("tokens", (64, 5), "sum-tokens", 5, 1),
        ("pair", (64, 5), "sum-tokens", 5, 1),
        ("mix", (64, 7), "sum-tokens", 7, 1),
        ("head", (10,), "none", 10, 1),
    ]


def test_every_listed_layer_can_be_tapped(file: Path) -> None:
    for name in (f"{file}:build", "digits_cnn"):
        model = find_model(name)
        network = blank_network(model, CIFAR10 if ":" in name else find_benchmark(model.benchmark), None)
        for layer in list_layers(network):
            (spec,) = measure_layers(network, (layer.name,)).layers
            assert (spec.path, spec.pooling, spec.neurons) == (layer.path, layer.pooling, layer.neurons)


def test_pools_that_do_not_fit_are_refused(file: Path) -> None:
    network = load_network(find_model(f"{file}:build"), CIFAR10, None, CPU)
    for poolings, message in [
        (
            (("mix", "mean"),),
            r"^pooling mix=mean: known poolings are sum-nchw, sum-nhwc, sum-ncdhw, sum-ndhwc, sum-ncl, sum-tokens,"
            r" sum-lnc, class-token, none$",
        ),
        ((("stem", "none"),), r"^pooling stem=none: the layers are mix$"),
        ((("mix", "sum-nchw"),), r"^layer 'mix' gives \(1, 64, 7\), which sum-nchw does not pool$"),
    ]:
        with pytest.raises(InputError, match=message):
            measure_layers(network, ("mix",), poolings)


def test_a_tables_layer_can_be_named_by_its_path_and_pooled_otherwise() -> None:
    network = blank_network(find_model("vit_b_16"), find_benchmark("imagenet"), None)
    measured = measure_layers(network, ("encoder.ln", "layer_3"), (("layer_3", "class-token"),))
    assert [(s.name, s.path, s.pooling) for s in measured.layers] == [
        ("encoder.ln", "encoder.ln", "class-token"),
        ("layer_3", "encoder.layers.encoder_layer_3.ln_2", "class-token"),
    ]
    assert measured.notes == ()


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Linear(5, 7), (2, 7), "none"),
        (nn.Linear(5, 7), (2, 9, 7), "sum-tokens"),
        (nn.Conv2d(3, 8, 3), (2, 8, 14, 14), "sum-nchw"),
        (nn.Conv2d(3, 8, 3), (2, 8, 1, 1), "sum-nchw"),
        (nn.LayerNorm(96), (2, 14, 14, 96), "sum-nhwc"),
        (nn.LayerNorm(8), (2, 8, 8, 8), "sum-nchw"),  # anything goes
        (nn.Sequential(nn.Conv2d(3, 96, 4), nn.LayerNorm(96)), (2, 14, 10, 96), "sum-nhwc"),
        (nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 96), nn.Flatten()), (2, 96, 14, 14), "sum-nchw"),  # ConvNeXt's
        (nn.Conv2d(3, 32, 4), (2, 16, 32), "sum-tokens"),  # flattened, and its channels last
        (nn.Conv2d(3, 32, 4), (2, 32, 16), "sum-ncl"),
        (nn.Sequential(nn.Conv2d(3, 16, 2), nn.BatchNorm2d(32)), (2, 16, 32), "sum-tokens"),
        (nn.Conv1d(3, 32, 4), (2, 64, 32), "sum-tokens"),  # another's channels: nothing is known
        (nn.AdaptiveAvgPool1d(1), (2, 32, 1), "sum-ncl"),
        (nn.AdaptiveAvgPool2d(7), (2, 7, 7, 5), "sum-nchw"),
        (nn.GELU(), (2, 14, 14, 384), "sum-nhwc"),
        (nn.GELU(), (2, 384, 14, 14), "sum-nchw"),
        (nn.GELU(), (2, 14, 10, 384), "sum-nchw"),
    ],
)
def test_guessed_poolings(module: nn.Module, shape: tuple[int, ...], expected: str) -> None:
    assert guess_pooling(module, shape) == expected


def test_files_that_give_no_network_are_refused(file: Path) -> None:
    for function, message in {
        "text": r"^model '.*net\.py:text' returns str, not a torch\.nn\.Module$",
        "broken": r"^model '.*net\.py:broken' failed with RuntimeError: no weights$",
        "constant": r"^model '.*net\.py:constant': .*net\.py has no function 'constant'$",
        "nope": r"^model '.*net\.py:nope': .*net\.py has no function 'nope'$",
        "lazy": r"^the network's weights '1\.weight' have no shape yet \(of a lazy module\); run a batch first$",
        "wide": r"^model 'net\.py:wide' gives \(4, 11\) for 4 images; expected are logits, \(4, 10\)$",
        "shapeless": r"^model 'net\.py:shapeless' fails on images of 32 pixels: ValueError: LSTM: Expected",
    }.items():
        with pytest.raises(InputError, match=message):
            load_network(find_model(f"{file}:{function}"), CIFAR10, None, CPU)
    with pytest.raises(InputError, match=r"^model 'none\.py:build': there is no file none\.py$"):
        load_network(find_model("none.py:build"), CIFAR10, None, CPU)
    with pytest.raises(InputError, match=r"^model 'net\.py' names no function; give net\.py:FUNCTION, which returns"):
        find_model("net.py")
    file.write_text("import nothing_of_that_name")
    with pytest.raises(InputError, match=r"failed with ModuleNotFoundError: No module named 'nothing_of_that_name'$"):
        load_network(find_model(f"{file}:build"), CIFAR10, None, CPU)
    assert str(file.parent) not in sys.path


# --- timm -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_timm_is_an_extra() -> None:
    model = find_model("timm:resnet18")
    with pytest.raises(MissingExtra, match=r"^timm:NAME needs timm; install it with: pip install 'nacpipe\[timm\]'$"):
        load_network(model, CIFAR10, None, CPU)


class Plain(nn.Module):
    """What stands for a network of timm's."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.stem(x).mean(dim=(2, 3)))
        return logits


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for timm that knows `plain`, with 1000 classes; what is in it is its data configuration."""
    config = {"input_size": (3, 224, 224), "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bilinear"}
    config |= {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

    def create_model(name: str, pretrained: bool, num_classes: int = 1000) -> nn.Module:
        if name != "plain":
            raise RuntimeError(f"Unknown model ({name})")
        torch.manual_seed(pretrained)
        return Plain(num_classes)

    fake = types.ModuleType("timm")
    fake.create_model = create_model  # type: ignore[attr-defined]
    fake.data = types.SimpleNamespace(resolve_model_data_config=lambda _: config)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", fake)
    return config


def test_timms_networks(timm: dict[str, Any], tmp_path: Path) -> None:
    imagenet = find_benchmark("imagenet")
    model = find_model("timm:plain")
    network = load_network(model, imagenet, None, CPU)
    assert (network.model.name, network.model.family, network.model.classifier) == ("timm:plain", "timm", "fc")
    torch.manual_seed(True)
    assert torch.equal(network.module.state_dict()["fc.bias"], Plain(1000).fc.bias)
    assert (network.transform.resize, network.transform.crop) == (256, 224)
    assert (network.transform.mean, network.transform.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert classifier_weights(network) is not None
    torch.save(Plain(10).state_dict(), tmp_path / "own.pth")
    assert load_network(model, CIFAR10, tmp_path / "own.pth", CPU).transform == CIFAR10.transform
    with pytest.raises(CheckpointError, match=r"^checkpoint pretrained does not fit .* \(1000×4 for 10×4\)"):
        load_network(model, CIFAR10, None, CPU)
    with pytest.raises(InputError, match=r"^model 'timm:plane' cannot be made: Unknown model \(plane\)$"):
        load_network(find_model("timm:plane"), imagenet, None, CPU)
    timm["crop_mode"] = "squash"
    with pytest.raises(InputError, match=r"^model 'timm:plain' prepares images by squash to 224×224, which nacpipe"):
        load_network(model, imagenet, None, CPU)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_timm_itself(tmp_path: Path) -> None:
    from timm import create_model

    torch.save(create_model("resnet18", num_classes=10).state_dict(), tmp_path / "own.pth")
    network = load_network(find_model("timm:resnet18"), CIFAR10, tmp_path / "own.pth", CPU)
    measured = measure_layers(network, ("layer3", "global_pool"))
    assert [(s.pooling, s.neurons) for s in measured.layers] == [("sum-nchw", 256), ("none", 512)]
    assert (network.model.classifier, measured.features) == ("fc", 512)
