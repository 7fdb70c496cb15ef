"""Where a gradient begins and ends: no_grad and detach in forward, taps that are overwritten, layers by other names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from click.testing import CliRunner
from torch import Tensor, nn

from nacpipe.benchmarks.standard import Transform, find_benchmark
from nacpipe.cache import LayerSpec, open_cache
from nacpipe.cli import main
from nacpipe.detector.fit import fit_detector
from nacpipe.detector.module import Detector
from nacpipe.errors import InputError
from nacpipe.extraction.callback import Snapshots
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.networks.build import Network, blank_network
from nacpipe.networks.layers import list_layers, measure_layers
from nacpipe.networks.models import Model, find_model
from nacpipe.networks.taps import Taps, freeze
from tests.networks.test_taps import by_definition, spec

pytestmark = pytest.mark.usefixtures("one_thread")


def network_of(module: nn.Module, side: int = 16) -> Network:
    """A network of one's own, as extraction has it."""
    transform = Transform(resize=side, crop=side, mean=(0.0,) * 3, std=(1.0,) * 3)
    model = Model(name="net", family="custom", build=lambda _: module, classifier=None, known=False)
    return Network(model, freeze(module), "", transform, torch.device("cpu"), next(module.parameters()).dtype)


class Probe(nn.Module):
    """A backbone of three layers and a head of two; how forward runs the backbone is chosen."""

    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.backbone = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.flat, self.hidden, self.fc = nn.Flatten(), nn.Linear(5, 6), nn.Linear(6, 4)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                features = self.flat(self.backbone(x))
        elif self.how == "inference_mode":
            with torch.inference_mode():
                features = self.flat(self.backbone(x))
        elif self.how == "detach":
            features = self.flat(self.backbone(x)).detach()
        elif self.how == "data":
            features = self.flat(self.backbone(x)).data
        elif self.how == "numpy":
            features = torch.from_numpy(self.flat(self.backbone(x)).detach().numpy())
        else:
            features = self.flat(self.backbone(x))
        logits: Tensor = self.fc(torch.tanh(self.hidden(features)))
        return logits


class Whole(nn.Module):
    """A network whose forward runs under a mode as a whole."""

    def __init__(self, mode: Callable[[], Any]) -> None:
        super().__init__()
        self.net, self.mode = Probe(), mode

    def forward(self, x: Tensor) -> Tensor:
        with self.mode():
            logits: Tensor = self.net(x)
        return logits


HOWS = ["no_grad", "inference_mode", "detach", "data", "numpy"]
NO_GRADIENT = r"^layer '{}' has no gradient: the logits do not depend on its output, or forward runs what follows it"


@pytest.mark.parametrize("how", HOWS)
def test_a_graph_from_the_first_tap_on_is_enough(how: str) -> None:
    """The same states as those of the network that records everything."""
    images = torch.randn(3, 3, 16, 16)
    layers = [spec("hidden", "none"), spec("fc", "none")]
    if how in ("no_grad", "inference_mode"):
        layers.append(spec("flat", "none"))  # the last that runs in there: what leaves it begins a graph
    expected = by_definition(Probe(), layers, images)
    measured = measure_layers(network_of(Probe(how)), [layer.name for layer in layers])
    assert [s.name for s in measured.layers] == [layer.name for layer in layers]
    with Taps(freeze(Probe(how)), layers, "fc") as taps:
        for tapped in (taps(images), taps(images)):
            for name, (activation, gradient) in expected.items():
                torch.testing.assert_close(tapped.activation[name], activation)
                torch.testing.assert_close(tapped.gradient[name], gradient)


@pytest.mark.parametrize("how", HOWS)
def test_a_layer_below_it_is_named(how: str) -> None:
    network = network_of(Probe(how))
    with pytest.raises(InputError, match=NO_GRADIENT.format("backbone.0")):
        measure_layers(network, ("hidden", "backbone.0"))
    with (
        pytest.raises(InputError, match=NO_GRADIENT.format("backbone.0")),
        Taps(network.module, [spec("hidden", "none"), spec("backbone.0")], None) as taps,
    ):
        taps(torch.randn(2, 3, 16, 16))
    names = [layer.name for layer in list_layers(network)]
    assert "backbone.0" not in names
    assert names[-2:] == ["hidden", "fc"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_forward_that_records_nothing_is_named(mode: Callable[[], Any]) -> None:
    network = network_of(Whole(mode))
    for name in ("net.hidden", "net.backbone.0"):
        with pytest.raises(InputError, match=NO_GRADIENT.format(name)):
            measure_layers(network, (name,))
    # What leaves the block is the logits themselves.
    assert [layer.name for layer in list_layers(network)] == ["net.fc", "net"]


class NoDerivative(nn.Module):
    """Something in the midst of it has no derivative."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(48, 8), nn.Linear(8, 4), last

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        x = Rounded.apply(x)  # type: ignore[no-untyped-call]
        logits: Tensor = self.second(x)
        return Rounded.apply(logits) if self.last else logits  # type: ignore[no-untyped-call,no-any-return]


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round(decimals=3)


@pytest.mark.parametrize("last", [False, True])
def test_what_has_no_derivative_is_said(last: bool) -> None:
    network = network_of(NoDerivative(last), side=4)
    assert [layer.name for layer in list_layers(network)] == ([] if last else ["second"])
    with pytest.raises(InputError, match=NO_GRADIENT.format("first")):
        measure_layers(network, ("first",))
    message = (
        r"^no gradient of the logits can be computed in layer 'first' or another that is tapped: You must implement"
    )
    with (
        pytest.raises(InputError, match=message),
        Taps(network.module, [spec("first", "none")], None) as taps,
    ):
        taps(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (torch.float16, "float16, in which most gradients would be 0; run the network in float32 or bfloat16"),
        (torch.int64, r"torch\.int64, which has no gradient; tap a layer that gives floating-point numbers"),
    ],
)
def test_types_without_a_gradient_are_named(kind: torch.dtype, message: str) -> None:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(kind)

    class Net(Probe):
        def __init__(self) -> None:
            super().__init__()
            self.cast = Cast()

        def forward(self, x: Tensor) -> Tensor:
            features = self.flat(self.backbone(x))
            logits: Tensor = self.fc(torch.tanh(self.hidden(self.cast(100 * features).float())))
            return logits

    network = network_of(Net())
    with pytest.raises(InputError, match=rf"^layer 'cast' cannot be tapped: it gives {message}$"):
        measure_layers(network, ("cast",))
    with (
        pytest.raises(InputError, match=rf"^layer 'cast' gives {message}$"),
        Taps(network.module, [spec("cast", "none")], None) as taps,
    ):
        taps(torch.randn(2, 3, 16, 16))


def test_only_a_network_that_cannot_run_is_said_not_to_take_the_images() -> None:
    class Broken(Probe):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)  # type: ignore[no-any-return]

    with pytest.raises(InputError, match=r"^net cannot take images of 16×16 pixels: mat1 and mat2 shapes cannot be"):
        measure_layers(network_of(Broken()), ("fc",))


# --- overwritten in place ---------------------------------------------------------------------------------------------


class Overwriting(nn.Module):
    """What follows a layer changes its output in place, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv, self.norm, self.fc, self.how = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, 4), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        if self.how == "relu":
            x = F.relu(x, inplace=True)
        elif self.how == "+=":
            x += x.mean()
        elif self.how == "view":
            x.flatten(2)[:, 0] *= 2
        elif self.how == "twice":
            x = self.norm(F.relu_(x))
            x.mul_(3)
        elif self.how == "no_grad":
            with torch.no_grad():
                x.clamp_(max=0.5)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


class OutOfPlace(Overwriting):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        if self.how == "relu":
            x = F.relu(x)
        elif self.how == "+=":
            x = x + x.mean()
        elif self.how == "view":
            x = x * torch.tensor([2.0, 1, 1, 1, 1])[:, None, None]
        elif self.how == "twice":
            x = self.norm(F.relu(x)) * 3
        elif self.how == "no_grad":
            x = x + (x.clamp(max=0.5) - x).detach()
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


@pytest.mark.parametrize("how", ["relu", "+=", "view", "twice", "no_grad"])
@pytest.mark.parametrize("first", [["norm"], ["conv", "norm"]])
def test_a_tap_that_is_overwritten_is_kept_as_it_was(how: str, first: list[str]) -> None:
    images = torch.randn(3, 3, 16, 16)
    layers = [spec(name) for name in first]
    plain = freeze(OutOfPlace(how))
    with Taps(plain, layers, "fc") as taps:
        expected = taps(images)
        assert taps.overwritten == frozenset()
    network = network_of(Overwriting(how))
    assert [s.name for s in measure_layers(network, first).layers] == first
    assert "norm" in [layer.name for layer in list_layers(network)]
    for known in (None, {"norm"}):
        with Taps(network.module, layers, "fc", overwritten=known) as taps:
            for tapped in (taps(images), taps(images)):
                torch.testing.assert_close(tapped.logits, expected.logits)
                for name in first:
                    torch.testing.assert_close(tapped.activation[name], expected.activation[name])
                    torch.testing.assert_close(tapped.gradient[name], expected.gradient[name])
            assert taps.overwritten == {"norm"}


def test_an_overwriting_that_depends_on_the_images_is_noticed() -> None:
    class Sometimes(Probe):
        def forward(self, x: Tensor) -> Tensor:
            inner = self.hidden(torch.tanh(self.flat(self.backbone(x))))
            if float(x.mean()) > 1:
                inner += inner.mean()
            logits: Tensor = self.fc(inner)
            return logits

    layers = [spec("flat", "none"), spec("hidden", "none")]
    images = torch.randn(3, 3, 16, 16)
    network = freeze(Sometimes())
    with Taps(network, layers, "fc") as taps:
        assert (taps(images).activation["hidden"].shape, taps.overwritten) == ((3, 6), frozenset())
        found = taps(images + 2)
        assert taps.overwritten == {"hidden"}
    with torch.no_grad():
        expected = network.hidden(torch.tanh(network.flat(network.backbone(images + 2))))
    torch.testing.assert_close(found.activation["hidden"], expected)


def test_a_module_that_works_in_place_itself_can_be_tapped() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu_(x)

    module = nn.Sequential(nn.Conv2d(3, 5, 3), InPlace(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
    plain = nn.Sequential(module[0], nn.ReLU(), *module[2:])
    images = torch.randn(3, 3, 16, 16)
    assert [layer.name for layer in list_layers(network_of(module))] == ["0", "1", "2", "3", "4"]
    layers = [spec("0"), spec("1")]
    expected = by_definition(plain, layers, images)
    with Taps(freeze(module), layers, None) as taps:
        tapped = taps(images)
    for name, (activation, gradient) in expected.items():
        torch.testing.assert_close(tapped.activation[name], activation)
        torch.testing.assert_close(tapped.gradient[name], gradient)


def test_detectors_and_counts_see_the_value_before_it_is_overwritten() -> None:
    network, plain = Overwriting("relu").eval(), OutOfPlace("relu").eval()
    images = torch.randn(40, 3, 16, 16)
    params = NacParams(layers={"norm": LayerParams(bins=9, saturation=3, alpha=2.0)})
    ours, theirs = (fit_detector(one, params, [images[:20], images[20:]], {}) for one in (network, plain))
    assert isinstance(ours, Detector)
    np.testing.assert_array_equal(ours._lookups[0].fitted.counts, theirs._lookups[0].fitted.counts)
    assert torch.equal(ours(images).score, theirs(images).score)


# --- torchvision's networks, and layers by other names ----------------------------------------------------------------

TORCHVISION = """
import torch, torchvision

def build(name):
    torch.manual_seed(0)
    return torchvision.models.get_model(name, num_classes=10)

def densenet121(): return build("densenet121")
def vgg11(): return build("vgg11")
def mobilenet_v2(): return build("mobilenet_v2")
"""
MAPS = {"densenet121": 1024, "vgg11": 512, "mobilenet_v2": 1280}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(TORCHVISION)
    return tmp_path / "net.py"


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "vgg11")) for name in MAPS])
def test_features_and_classifier_of_torchvisions_networks(name: str) -> None:
    """The layers with the commonest names; DenseNet's last feature map is overwritten by its functional ReLU."""
    torch.manual_seed(0)
    module = torchvision.models.get_model(name, num_classes=10).double()
    network = network_of(module, side=32)
    measured = measure_layers(network, ("maps=features", "top=classifier"))
    assert [(s.name, s.path, s.pooling, s.neurons) for s in measured.layers] == [
        ("maps", "features", "sum-nchw", MAPS[name]),
        ("top", "classifier", "none", 10),
    ]
    assert {"features", "classifier"} <= {layer.name for layer in list_layers(network)}
    layers = [LayerSpec(name="maps", path="features", pooling="sum-nchw", neurons=0)]
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with Taps(module, layers, None) as taps:
        tapped = taps(images)
        assert taps.overwritten == ({"maps"} if name == "densenet121" else frozenset())
    with torch.no_grad():
        maps = module.features(images)
    torch.testing.assert_close(tapped.activation["maps"], maps.sum(dim=(2, 3)))
    leaf = maps.clone().requires_grad_()
    if name == "densenet121":
        logits = module.classifier(F.relu(leaf).mean(dim=(2, 3)))
    elif name == "vgg11":
        logits = module.classifier(module.avgpool(leaf).flatten(1))
    else:
        logits = module.classifier(leaf.mean(dim=(2, 3)))
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, torch.full_like(logits, 0.1), reduction="sum"), leaf)
    torch.testing.assert_close(tapped.gradient["maps"], gradient.sum(dim=(2, 3)), rtol=1e-6, atol=1e-12)


def test_a_layer_of_another_name_is_extracted_and_the_command_repeats_it(request_: ExtractRequest, file: Path) -> None:
    request = replace(
        request_,
        model=f"{file}:mobilenet_v2",
        checkpoint=None,
        layers=("maps=features", "features.0"),
        poolings=(("maps", "sum-nchw"),),
        splits=("ood/far/mnist",),
    )
    extract(plan_extraction(request))
    cache = open_cache(request.cache)
    assert [(s.name, s.path) for s in cache.header.layers] == [("maps", "features"), ("features.0", "features.0")]
    split = cache["ood/far/mnist"]
    np.testing.assert_allclose(split["maps"].activation[:] / 1, split.features[:], rtol=1e-4, atol=1e-6)  # 1×1 maps
    assert plan_extraction(request).splits[0].state == "done"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("logits=features",), r"layer name 'logits' is that of the network's output; give it another: --layers"
         r" logits_layer=logits$"),
        (("a/b=features",), r"layer name 'a/b' has other characters than letters, digits, _ \. and -; give it another:"
         r" --layers a_b_layer=a/b$"),
        ((".a=features",), r"layer name '\.a' has other characters .*; give it another: --layers a_layer=\.a$"),
        (("x:gradient=features",), r"layer name 'x:gradient' has other .*: --layers x_gradient_layer="),
        (("maps=",), r"^layer 'maps=' is not NAME=PATH, such as maps=features$"),
        (("=features",), r"^layer '=features' is not NAME=PATH"),
        (("a=features", "a=classifier"), r"^layer 'a' is given twice$"),
        (("maps=feature",), r"^layer 'feature' is not known for net\.py:vgg11; .*; did you mean features\?$"),
    ],
)  # fmt: skip
def test_names_that_cannot_be_say_what_to_type(
    request_: ExtractRequest, file: Path, given: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        plan_extraction(replace(request_, model=f"{file}:vgg11", checkpoint=None, layers=given), dry=True)


def test_aliases_can_be_named_too() -> None:
    network = blank_network(find_model("resnet18"), find_benchmark("imagenet200"), None)
    measured = measure_layers(network, {"last": "layer4", "pool": "avgpool"})
    assert [(s.name, s.path, s.neurons) for s in measured.layers] == [("last", "layer4", 512), ("pool", "avgpool", 512)]
    assert measured.notes == ()


@pytest.mark.slow
def test_layers_shows_what_to_type(file: Path) -> None:
    done = CliRunner().invoke(main, ["layers", f"{file}:vgg11", "--benchmark", "cifar10"])
    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert {"features", "classifier", "features.0"} <= set(rows)
    assert all("--layers" not in row for row in rows.values())  # every name can be that of a layer


def test_snapshots_and_fit_take_names_too(tmp_path: Path) -> None:
    network = torchvision.models.mobilenet_v2(num_classes=4).eval()
    images = torch.randn(8, 3, 32, 32)
    snapshots = Snapshots(tmp_path, {"id/train": [(images, torch.zeros(8))]}, {"maps": "features"})
    cache = open_cache(snapshots(network, 0))
    assert [(s.name, s.path) for s in cache.header.layers] == [("maps", "features")]
    with pytest.raises(InputError, match="give it another: --layers logits_layer=logits"):
        Snapshots(tmp_path, {"id/train": []}, {"logits": "features"})
    params = NacParams(layers={"maps": LayerParams(bins=9, saturation=3, alpha=2.0)})
    detector = fit_detector(network, params, [images], {}, {"maps": "features"})
    layer = detector._lookups[0].fitted
    assert (layer.name, layer.counts.shape) == ("maps", (1280, 8))


# --- hooks with keywords ----------------------------------------------------------------------------------------------


def test_modules_called_with_keywords_are_tapped() -> None:
    class Keywords(Probe):
        def forward(self, x: Tensor) -> Tensor:
            features = self.flat(input=self.backbone[1](input=self.backbone[0](input=x)).mean(dim=(2, 3)))
            logits: Tensor = self.fc(input=torch.tanh(self.hidden(input=features)))
            return logits

    images = torch.randn(3, 3, 16, 16)
    network = network_of(Keywords())
    names = [layer.name for layer in list_layers(network)]
    assert names == ["backbone.0", "backbone.1", "flat", "hidden", "fc"]  # flat returns what no module gave
    layers = [spec("backbone.0"), spec("flat", "none"), spec("hidden", "none")]
    expected = by_definition(Probe(), layers, images)
    with Taps(network.module, layers, "fc") as taps:
        tapped = taps(images)
    for name, (activation, gradient) in expected.items():
        torch.testing.assert_close(tapped.activation[name], activation)
        torch.testing.assert_close(tapped.gradient[name], gradient, rtol=1e-4, atol=1e-6)
    assert tapped.features is not None
    torch.testing.assert_close(network.module.fc(tapped.features), tapped.logits)
