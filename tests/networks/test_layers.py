"""Which layers are chosen where nobody names any."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

from nacpipe.errors import InputError
from nacpipe.networks.build import Network, adopt_module
from nacpipe.networks.layers import FORWARD_ONLY, choose_layers, list_layers, measure_layers
from nacpipe.networks.models import find_model
from nacpipe.networks.taps import find_penultimate, freeze

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


def dense(units: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(units, 8), nn.BatchNorm1d(8), nn.ReLU())


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
    "equal widths": (  # one stage, of which a layer ends with its activation; the input in another shape is none
        lambda: adopt(nn.Sequential(nn.Flatten(), *(m for n in (192, 8, 8) for m in dense(n)), nn.Linear(8, 3)), 8),
        ["9", "6", "3"],
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


# --- what gives the logits is no layer --------------------------------------------------------------------------------


class Headed(nn.Module):
    """Two convolutions, their average over positions, and a head, whose output `finish` makes logits."""

    def __init__(self, head: nn.Module, finish: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), head
        self.finish = finish

    def forward(self, images: Tensor) -> Tensor:
        return self.finish(self.head(self.second(self.first(images).relu()).relu().mean(dim=(2, 3), keepdim=True)))


class Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, maps: Tensor) -> Tensor:
        return F.linear(F.normalize(maps.flatten(1)), F.normalize(self.weight))


def flat(units: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(6, units))


HEADS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "linear": (lambda: flat(5), lambda z: z),
    "temperature": (lambda: flat(5), lambda z: z / 0.07),
    "temperature of each sample": (lambda: flat(5), lambda z: z * z.detach().abs().mean(1, keepdim=True)),
    "log-probabilities": (lambda: flat(5), lambda z: z.log_softmax(1)),
    "probabilities": (lambda: flat(5), lambda z: z.softmax(1)),
    "convolution": (lambda: nn.Conv2d(6, 5, 1), lambda z: z[:, :, 0, 0]),
    "cosine": (Cosine, lambda z: 16 * z),
    "sigmoid": (lambda: flat(1), lambda z: torch.cat([torch.zeros_like(z), z], 1)),
    "two classes": (lambda: flat(2), lambda z: z),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_is_no_layer_whatever_it_is(kind: str) -> None:
    torch.manual_seed(1)
    head, finish = HEADS[kind]
    chosen = list(choose_layers(adopt(Headed(head(), finish), 8)))
    assert not [path for path in chosen if path.startswith("head") and path != "head.0"]  # what it reads is one
    assert chosen[-2:] == ["second", "first"]


class TwoHeads(Headed):
    """The mean of two heads' logits, of which neither is the network's."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 5), lambda z: z)
        self.other = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.second(self.first(images).relu()).relu().mean(dim=(2, 3))
        return (self.head(features) + self.other(features)) / 2


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Headed(flat(5), lambda z: z), Headed(flat(5), lambda z: z)

    def forward(self, images: Tensor) -> Tensor:
        return self.a(images) + self.b(images)


def test_several_heads_are_no_layers() -> None:
    assert list(choose_layers(adopt(TwoHeads(), 8))) == ["second", "first"]
    chosen = list(choose_layers(adopt(Ensemble(), 8)))
    assert chosen and not {"a", "b"} & set(chosen)


class Routed(nn.Module):
    """Each sample goes through one of two experts; a table of positions is the same for all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.experts = nn.Linear(6, 10), nn.ModuleList(nn.Linear(10, 8) for _ in range(2))
        self.places, self.head = nn.Embedding(3, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, chosen = self.stem(x).relu(), (x[:, 0] > 0).long()
        out = torch.zeros(len(x), 8)
        for number, expert in enumerate(self.experts):
            if (rows := chosen == number).any():
                out[rows] = expert(hidden[rows])
        return self.head(out + self.places(torch.zeros(len(x), dtype=torch.long)))


def test_what_runs_for_some_samples_alone_or_gives_the_same_for_all_is_left_out() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 6)
    x[:, 0] = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 1.0])  # the first two, by which layers are listed, are alike
    assert list(choose_layers(adopt_module(freeze(Routed()), x))) == ["stem"]


# --- what forward computes itself -------------------------------------------------------------------------------------


class LastState(nn.Module):
    """The head reads an LSTM's last state, which is none of its outputs' first; `middle` hands it on."""

    def __init__(self, middle: nn.Module | None) -> None:
        super().__init__()
        self.steps, self.middle, self.head = nn.LSTM(5, 7, batch_first=True), middle, nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = self.steps(x)[1][0][-1]
        return self.head(state if self.middle is None else self.middle(state))


class FlattensBetween(nn.Module):
    """Forward flattens what is pooled, and a dropout hands that on to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.pool = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.drop, self.head = nn.Dropout(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.pool(self.act(self.conv(x))).flatten(1)))


def test_what_hands_on_all_of_an_output_in_another_shape_is_no_layer() -> None:
    torch.manual_seed(0)
    network = adopt_module(freeze(FlattensBetween()), torch.randn(4, 1, 8, 8))
    assert "drop" not in [layer.path for layer in list_layers(network)]
    assert next(iter(choose_layers(network))) == "pool"


def test_without_a_layer_the_reason_and_a_way_are_said() -> None:
    x = torch.randn(4, 6, 5)
    with pytest.raises(
        InputError, match=r"the last state of an LSTM\); let forward pass .*self\.features = torch\.nn\.Id"
    ):
        choose_layers(adopt_module(freeze(LastState(None)), x))
    assert list(choose_layers(adopt_module(freeze(LastState(nn.Identity())), x))) == ["middle"]
    linear = adopt_module(freeze(nn.Sequential(nn.Linear(5, 3))), x[:, 0])
    with pytest.raises(InputError, match="no module that can be tapped: all that it runs give the logits; let forward"):
        choose_layers(linear)
    half = adopt_module(freeze(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).half()), x[:, 0])
    with pytest.raises(InputError, match=r"it gives float16, in which most gradients would be 0; .*gradient=False"):
        choose_layers(half)
    with pytest.warns(FutureWarning):
        script = torch.jit.script(residual(1).eval())  # type: ignore[no-untyped-call]
    scripted = adopt_module(freeze(script), torch.randn(4, 3, 32, 32))
    with pytest.raises(
        InputError, match=r"it is scripted \(torch\.jit\), inside which nothing can be tapped; give the"
    ):
        choose_layers(scripted)


# --- poolings ---------------------------------------------------------------------------------------------------------


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps, self.head = nn.GRU(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.steps(x.transpose(0, 1))[0][-1])


@pytest.mark.parametrize("length", [2, 3, 6])
def test_sequences_as_long_as_the_trials_samples_are_many(length: int) -> None:
    (layer,) = measure_layers(adopt_module(freeze(TimeFirst()), torch.randn(4, length, 5)), ()).layers
    assert (layer.name, layer.pooling, layer.neurons) == ("steps", "sum-lnc", 7)


class Tokens(nn.Module):
    """Patches as tokens, 16 of 32 units, where a convolution on the way gives 16 channels; then their average."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = Patches()
        self.mix, self.average, self.head = nn.Linear(32, 32), nn.AdaptiveAvgPool1d(1), nn.Linear(32, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.average(self.mix(self.patches(images)).tanh().transpose(1, 2)).flatten(1))


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 2, 2), nn.Conv2d(16, 32, 2, 2))

    def forward(self, images: Tensor) -> Tensor:
        return self.down(images).flatten(2).transpose(1, 2)


def test_tokens_of_convolutions_and_averages_over_them_are_told_from_channels() -> None:
    measured = measure_layers(adopt(Tokens(), 16), ("patches", "average"))
    assert [(s.name, s.pooling, s.neurons) for s in measured.layers] == [
        ("patches", "sum-tokens", 32),
        ("average", "sum-ncl", 32),
    ]


def test_weights_of_two_types_are_compared() -> None:
    network = Headed(flat(5).double(), lambda z: z)
    network.head.register_forward_pre_hook(lambda _module, args: args[0].double())
    adopted = adopt_module(freeze(network), torch.randn(4, 3, 8, 8))
    assert adopted.model.classifier == "head.1"
    layers = measure_layers(adopted, ()).layers
    assert find_penultimate(adopted.module, layers, "head.1", adopted.examples) == {"head.0"}
