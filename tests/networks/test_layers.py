"""Which layers are chosen where nobody names any."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

from nacpipe.networks.build import Network, adopt_module
from nacpipe.networks.layers import FORWARD_ONLY, choose_layers, measure_layers
from nacpipe.networks.models import find_model
from nacpipe.networks.taps import freeze

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(into, out, 3, stride, 1)

    def forward(self, values: Tensor) -> Tensor:
        return self.conv(values).relu()


def stage(into: int, out: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(Block(into, out, 2), *(Block(out, out, 1) for _ in range(blocks - 1)))


def adopt(network: nn.Module, side: int) -> Network:
    torch.manual_seed(0)
    return adopt_module(freeze(network), torch.randn(4, 3, side, side))


def residual(blocks: int) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 4, 3),
            layer1=stage(4, 6, blocks), layer2=stage(6, 8, blocks), layer3=stage(8, 10, blocks),
            avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(10, 3),
        )
    )  # fmt: skip


ATTENTION = {"num_layers": 6, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16, "num_classes": 3}
HEAD = nn.Linear(5, 3)
TEN = "encoder.layers.encoder_layer_"
CHOSEN = {
    # The classifier's input stands for the last stage's end, which is it but for a factor.
    "residual": (
        lambda: adopt(residual(3), 32),
        ["flatten", "layer3.1", "layer2", "layer1"],
        ["flatten", "layer3.1", "layer3.0", "layer2", "layer2.1", "layer2.0", "layer1", "layer1.1"],
    ),
    "attention": (  # one stage of six blocks, and a stem that is none
        lambda: adopt(VisionTransformer(image_size=16, patch_size=8, **ATTENTION), 16),
        ["encoder.ln", "encoder.layers", f"{TEN}3", f"{TEN}1"],
        ["encoder.ln", "encoder.layers", f"{TEN}4", f"{TEN}3", f"{TEN}2", f"{TEN}1", f"{TEN}0"],
    ),
    "swin": (  # four stages inside a module that holds most of the parameters
        lambda: adopt(SwinTransformer([2, 2], 8, [1, 1, 1, 1], [1, 2, 2, 2], [2, 2], num_classes=3), 32),
        ["flatten", "features.5", "features.3", "features.1"],
        None,
    ),
    "chain": (  # no blocks anywhere
        lambda: adopt(nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), HEAD), 8),
        ["3", "2", "1"],
        ["3", "2", "1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOSEN)
def test_ends_of_stages_and_blocks_inside_them(name: str) -> None:
    build, ends, more = CHOSEN[name]
    network = build()
    assert list(choose_layers(network)) == ends
    if more is not None:
        assert list(choose_layers(network, more=FORWARD_ONLY)) == more


class Wrapper(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inner = network

    def forward(self, images: Tensor) -> Tensor:
        values: Tensor = self.inner(images)
        return values


@pytest.mark.parametrize("more", [0, FORWARD_ONLY])
@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (Wrapper, "inner."),
        (lambda network: Wrapper(Wrapper(network)), "inner.inner."),
        (lambda network: nn.Sequential(nn.BatchNorm2d(3), network), "1."),  # a normalisation in front
    ],
)
def test_a_wrapped_network_has_the_layers_of_the_network(
    wrap: Callable[[nn.Module], nn.Module], prefix: str, more: int
) -> None:
    """What wraps it gives the logits as its head does, and is taken apart."""
    own = choose_layers(adopt(residual(3), 32), more=more)
    assert list(choose_layers(adopt(wrap(residual(3)), 32), more=more)) == [prefix + path for path in own]


def test_the_input_of_a_heads_last_layer_is_tapped() -> None:
    head = nn.Sequential(nn.Linear(36, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 3))
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU()), nn.Flatten(), head)
    assert list(choose_layers(adopt(network, 8))) == ["2.1", "1", "0"]


def test_forward_passes_alone_tap_four_more_than_a_models_own() -> None:
    model = find_model("resnet20")
    network = replace(adopt(model.build(10), 32), model=model)
    own = ["avgpool", "layer3", "layer2", "layer1"]
    assert [spec.name for spec in measure_layers(network, ()).layers] == own
    measured = measure_layers(network, (), gradients=False)
    assert [(spec.name, spec.path, spec.neurons) for spec in measured.layers] == [
        *((name, name, neurons) for name, neurons in zip(own, (64, 64, 32, 16), strict=True)),
        *(("layer3.1", "layer3.1", 64), ("layer3.0", "layer3.0", 64)),
        *(("layer2.1", "layer2.1", 32), ("layer2.0", "layer2.0", 32)),
    ]
    assert measured.notes[0].startswith("layers chosen: avgpool (64 neurons, sum-nchw), layer3 (64 neurons")
    named = measure_layers(network, ("avgpool",), gradients=False)
    assert [spec.name for spec in named.layers] == ["avgpool"]
