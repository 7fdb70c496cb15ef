"""One forward and one backward pass give what the plain definition gives with a backward pass for every layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from nacpipe.cache import LayerSpec
from nacpipe.errors import InputError
from nacpipe.networks.architectures.digits_cnn import DigitsCNN
from nacpipe.networks.architectures.resnets import CifarResNet, ResNet18For32
from nacpipe.networks.taps import POOLINGS, Taps, freeze

pytestmark = pytest.mark.usefixtures("one_thread")

# Pooling written out a second time, one image at a time.
PLAIN_POOLINGS: Mapping[str, Callable[[Tensor], list[float]]] = {
    "sum-nchw": lambda x: [float(channel.sum()) for channel in x],
    "sum-nhwc": lambda x: [float(x[..., channel].sum()) for channel in range(x.shape[-1])],
    "sum-tokens": lambda x: [float(x[:, unit].sum()) for unit in range(x.shape[1])],
    "class-token": lambda x: [float(value) for value in x[0]],
    "none": lambda x: [float(value) for value in x],
}
ANY_SHAPE = {"sum-ncdhw", "sum-ndhwc", "sum-ncl", "sum-lnc"}  # tests/extraction/test_library.py


def spec(name: str, pooling: str = "sum-nchw") -> LayerSpec:
    return LayerSpec(name=name, path=name, pooling=pooling, neurons=0)


def by_definition(network: nn.Module, layers: Sequence[LayerSpec], images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer → (activation, gradient) of the cross-entropy from the uniform distribution, a backward pass per layer."""
    network = copy.deepcopy(network).requires_grad_(True)
    modules, outputs = dict(network.named_modules()), {}
    for layer in layers:
        modules[layer.path].register_forward_hook(
            lambda _module, _inputs, output, name=layer.name: outputs.update({name: output})
        )
    logits = network(images)
    uniform = torch.full_like(logits, 1 / logits.shape[1])
    loss = F.cross_entropy(logits, uniform, reduction="sum")
    found = {}
    for layer in layers:
        (gradient,) = torch.autograd.grad(loss, outputs[layer.name], retain_graph=True)
        pool = PLAIN_POOLINGS[layer.pooling]
        found[layer.name] = (
            torch.tensor([pool(image) for image in outputs[layer.name].detach()], dtype=images.dtype),
            torch.tensor([pool(image) for image in gradient], dtype=images.dtype),
        )
    return found


def randomise(network: nn.Module) -> nn.Module:
    """Freeze a network in float64, its batch norms with statistics that do something."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            state = module.state_dict()  # the tensors themselves, not copies
            for name in ("running_mean", "bias"):
                state[name].copy_(0.2 * torch.randn(state[name].shape, generator=generator))
            for name in ("running_var", "weight"):
                state[name].copy_(0.5 + torch.rand(state[name].shape, generator=generator))
    return freeze(network.double())


def images_for(channels: int, side: int, n: int = 3) -> Tensor:
    return torch.randn(n, channels, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


FOUR = [spec(name) for name in ("avgpool", "layer3", "layer2", "layer1")]
NETWORKS = [
    pytest.param(lambda: CifarResNet(1, 10), FOUR, (3, 16), id="CifarResNet"),
    pytest.param(
        lambda: ResNet18For32(7, planes=(4, 6, 8, 10)),
        [spec("conv1"), *FOUR, spec("layer4"), spec("fc", "none")],
        (3, 16),
        id="ResNet18For32",
    ),
    pytest.param(
        lambda: torchvision.models.resnet18(weights=None, num_classes=10),
        [spec("maxpool"), spec("bn1"), *FOUR],
        (3, 32),
        id="torchvision-resnet18",
    ),
    pytest.param(DigitsCNN, FOUR, (1, 28), id="DigitsCNN"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("build", "layers", "image"), NETWORKS)
def test_activations_and_gradients_are_the_definitions(
    build: Callable[[], nn.Module], layers: list[LayerSpec], image: tuple[int, int], n: int
) -> None:
    network, images = randomise(build()), images_for(*image, n)
    expected = by_definition(network, layers, images)
    with Taps(network, layers, "fc") as taps:
        tapped = taps(images)
    assert list(tapped.activation) == list(tapped.gradient) == [layer.name for layer in layers]
    for name, (activation, gradient) in expected.items():
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(tapped.activation[name], activation, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(tapped.gradient[name], gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(tapped.logits, network(images), rtol=1e-12, atol=0)


def test_every_sample_has_a_gradient_of_its_own() -> None:
    """Alone, in a batch, in another order: the same numbers."""
    network, images = randomise(DigitsCNN()), images_for(1, 28, 4)
    with Taps(network, FOUR, "fc") as taps:
        together, reversed_ = taps(images), taps(images.flip(0))
        alone = [taps(images[i : i + 1]) for i in range(4)]
    for name in together.gradient:
        for kind in ("activation", "gradient"):
            expected = getattr(together, kind)[name]
            torch.testing.assert_close(torch.cat([getattr(one, kind)[name] for one in alone]), expected)
            torch.testing.assert_close(getattr(reversed_, kind)[name].flip(0), expected)


def test_features_are_the_classifiers_input() -> None:
    network, images = randomise(CifarResNet(1, 10)), images_for(3, 16)
    with Taps(network, [spec("layer2")], "fc") as taps:
        tapped = taps(images)
    assert tapped.features is not None
    torch.testing.assert_close(network.get_submodule("fc")(tapped.features), tapped.logits, rtol=1e-12, atol=0)
    with Taps(network, [spec("layer2")], None) as taps:
        assert taps(images).features is None


def test_closed_form_of_the_last_layers() -> None:
    """d loss / d logits = softmax − uniform, and through the linear layer times its weight."""
    network, images = randomise(DigitsCNN()), images_for(1, 28)
    with Taps(network, [spec("avgpool"), spec("fc", "none")], "fc") as taps:
        tapped = taps(images)
    start = tapped.logits.softmax(dim=1) - 0.1
    torch.testing.assert_close(tapped.gradient["fc"], start, rtol=1e-12, atol=1e-15)
    weight = network.get_submodule("fc").weight
    torch.testing.assert_close(tapped.gradient["avgpool"], start @ weight, rtol=1e-10, atol=1e-13)  # type: ignore[operator]


def test_no_graph_is_built_below_the_first_tap_and_no_parameter_gets_a_gradient() -> None:
    network, images = randomise(CifarResNet(1, 10)), images_for(3, 16)
    recorded: dict[str, bool] = {}
    for name in ("conv1", "layer1", "layer2", "layer3"):
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: recorded.update({name: output.requires_grad})
        )
    with Taps(network, [spec("layer2"), spec("avgpool")], "fc") as taps:
        tapped = taps(images)
    assert recorded == {"conv1": False, "layer1": False, "layer2": False, "layer3": True}
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    # What comes out holds no graph either, so that nothing grows with the number of batches.
    results = [*tapped.activation.values(), *tapped.gradient.values(), tapped.logits, tapped.features]
    assert not any(tensor.requires_grad for tensor in results if tensor is not None)


def test_hooks_are_gone_after_the_block_even_after_an_error() -> None:
    network = randomise(DigitsCNN())
    with pytest.raises(RuntimeError, match="channels"), Taps(network, FOUR, "fc") as taps:
        taps(images_for(3, 28))
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not network(images_for(1, 28)).requires_grad


def test_in_place_activations_after_a_tap_do_not_change_what_was_tapped() -> None:
    network = randomise(torchvision.models.resnet18(weights=None, num_classes=10))
    assert not any(getattr(module, "inplace", False) for module in network.modules())
    assert not network.training
    images = images_for(3, 32)
    with Taps(network, [spec("bn1")], "fc") as taps:
        activation = taps(images).activation["bn1"]
    plain = network.bn1(network.conv1(images)).sum(dim=(2, 3))  # type: ignore[operator]
    torch.testing.assert_close(activation, plain, rtol=1e-12, atol=1e-12)


class Tokens(nn.Module):
    """Four patches of an image as tokens; enough for the poolings that no network of the table uses yet."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.swap = nn.Linear(9, 5), nn.Linear(4, 4), nn.Identity()
        self.last, self.fc, self.unused = nn.Linear(5, 5), nn.Linear(5, 3), nn.Linear(5, 5)
        self.both = Both()

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(2, 3, 3).unfold(3, 3, 3).reshape(len(images), 4, 9)
        tokens = torch.tanh(self.embed(patches))
        tokens = self.mix(tokens.transpose(1, 2)).transpose(1, 2)
        tokens = self.swap(tokens.reshape(-1, 2, 2, 5)).reshape(-1, 4, 5)  # channels last
        self.unused(tokens)
        logits: Tensor = self.fc(torch.tanh(self.last(tokens))[:, 0] + self.both(tokens)[0])
        return logits


class Both(nn.Module):
    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return tokens.mean(dim=1), tokens


def test_poolings_of_tokens_and_of_channels_last() -> None:
    network, images = freeze(Tokens().double()), images_for(1, 6)
    layers = [spec("embed", "sum-tokens"), spec("swap", "sum-nhwc"), spec("last", "class-token"), spec("fc", "none")]
    expected = by_definition(network, layers, images)
    with Taps(network, layers, "fc") as taps:
        tapped = taps(images)
    for name, (activation, gradient) in expected.items():
        torch.testing.assert_close(tapped.activation[name], activation, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(tapped.gradient[name], gradient, rtol=1e-9, atol=1e-12)


def test_every_pooling_is_tested() -> None:
    assert set(POOLINGS) == set(PLAIN_POOLINGS) | ANY_SHAPE


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            LayerSpec(name="top", path="body.top", pooling="none", neurons=0),
            r"^layer 'top': the network has no module 'body\.top'$",
        ),
        (spec("unused", "sum-tokens"), r"^layer 'unused' has no gradient: the logits do not depend on its output, or"),
        (spec("dead", "none"), r"^layer 'dead' did not run in a forward pass$"),
    ],
)
def test_layers_that_cannot_be_tapped_are_refused(layer: LayerSpec, message: str) -> None:
    network = Tokens()
    network.add_module("dead", nn.Linear(2, 2))
    freeze(network.double())
    with pytest.raises(InputError, match=message), Taps(network, [spec("embed", "sum-tokens"), layer], "fc") as taps:
        taps(images_for(1, 6))


@pytest.mark.parametrize(("path", "pooling"), [("embed", "sum-nchw"), ("embed", "none"), ("swap", "class-token")])
def test_a_pooling_that_does_not_fit_the_output_is_refused(path: str, pooling: str) -> None:
    network = freeze(Tokens().double())
    with (
        pytest.raises(InputError, match=rf"layer '{path}'.*{pooling}"),
        Taps(network, [spec(path, pooling)], "fc") as taps,
    ):
        taps(images_for(1, 6))


class Residual(nn.Module):
    """`pass_on` returns what it gets; the sum reads that beside it, so that the gradients of both differ."""

    def __init__(self) -> None:
        super().__init__()
        self.pass_on, self.fc = nn.Identity(), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = (x * 2).requires_grad_() if not x.requires_grad else x * 2
        return self.fc(hidden + torch.tanh(self.pass_on(hidden)))


def test_the_gradient_of_an_identity_is_of_what_reads_it_alone() -> None:
    torch.manual_seed(0)
    network, x = freeze(Residual()), torch.randn(5, 4)
    layers = [LayerSpec(name="pass_on", path="pass_on", pooling="none", neurons=4)]
    with Taps(network, layers, None) as taps:
        tapped = taps(x)
    hidden = x * 2
    logits = network.fc(hidden + torch.tanh(hidden))
    expected = (logits.softmax(1) - 1 / 3) @ network.fc.weight * (1 - torch.tanh(hidden) ** 2)
    torch.testing.assert_close(tapped.activation["pass_on"], hidden)
    torch.testing.assert_close(tapped.gradient["pass_on"], expected)
