"""Every network of the table: what taps give is the plain definition's, whatever comes before the logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from nacpipe.benchmarks.standard import Transform, find_benchmark
from nacpipe.cache import LayerSpec
from nacpipe.errors import CheckpointError, InputError
from nacpipe.networks.architectures.training_schemes import WRAPPERS
from nacpipe.networks.build import blank_network, load_network
from nacpipe.networks.layers import guess_pooling, list_layers, measure_layers
from nacpipe.networks.models import BACKBONES, MODELS, find_model, plain_name
from nacpipe.networks.taps import Taps, freeze

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
IMAGENET, CIFAR10 = find_benchmark("imagenet"), find_benchmark("cifar10")

# Name → sides of images. Small ones where the network takes them: it is the same network.
SIDES: dict[str, tuple[int, ...]] = {
    "digits_cnn": (28,),
    "resnet20": (32, 20),
    "resnet56": (16,),
    "resnet18_32x32": (16,),
    "resnet18": (64, 49),
    "resnet50": (64,),
    "vit_b_16": (64,),
    "swin_t": (64,),
    **{f"resnet18_32x32+{scheme}": (8,) for scheme in WRAPPERS},
    "resnet18+godin": (32,),
}
NARROW: Mapping[str, Callable[[], nn.Module]] = {
    # As deep as vit_b_16, with the same modules; a backward pass for each of its layers takes a minute.
    "vit_b_16": lambda: torchvision.models.VisionTransformer(64, 16, 12, 4, hidden_dim=32, mlp_dim=64, num_classes=10),
}


def by_definition(
    network: nn.Module, layers: Sequence[LayerSpec], images: Tensor
) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Layer → (activation, gradient): nothing is detached, a backward pass for every layer, poolings by einsum."""
    sums = {"sum-nchw": "nchw->nc", "sum-nhwc": "nhwc->nc", "sum-tokens": "ntc->nc", "none": "nc->nc"}

    def pool(value: Tensor, pooling: str) -> Tensor:
        return value[:, 0, :] if pooling == "class-token" else torch.einsum(sums[pooling], value)

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
        found[layer.name] = pool(outputs[layer.name].detach(), layer.pooling), pool(gradient, layer.pooling)
    return found


def randomise(network: nn.Module) -> nn.Module:
    """Give norms and everything that starts at zero values that do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
                for name, value in module.state_dict(keep_vars=True).items():
                    noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
                    if name in ("weight", "running_var"):
                        value.copy_(0.5 + noise)
                    elif name in ("bias", "running_mean"):
                        value.copy_(0.4 * noise - 0.2)
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return freeze(network.double())


def draw(channels: int, side: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, channels, side, side, dtype=torch.float64, generator=generator)


def far(found: Tensor, expected: Tensor) -> float:
    """The distance, relative to the layer's own size."""
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.repeats(3)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "resnet50" else name for name in SIDES]
)
def test_every_network_gives_the_definitions_states(name: str) -> None:
    model = find_model(name)
    torch.manual_seed(0)
    network = randomise(NARROW[name]() if name in NARROW else model.build(10))
    layers = [LayerSpec(name=n, path=p, pooling=pooling, neurons=0) for n, (p, pooling) in model.layers.items()]
    for side in SIDES[name]:
        images = draw(1 if name == "digits_cnn" else 3, side, 2)
        expected = by_definition(network, layers, images)
        with Taps(network, layers, model.classifier) as taps:
            both, last = taps(images), taps(images[1:])
        for layer, (activation, gradient) in expected.items():
            assert float(gradient.abs().max()) > 0, layer
            assert far(both.activation[layer], activation) < 1e-9, layer
            assert far(both.gradient[layer], gradient) < 1e-9, layer
            assert far(last.activation[layer], activation[1:]) < 1e-9, layer  # a last batch of one image
            assert far(last.gradient[layer], gradient[1:]) < 1e-9, layer
        assert far(both.logits, network(images)) < 1e-9
    with Taps(network.float(), layers, model.classifier) as taps:
        single = taps(images.float())
    for layer, (activation, gradient) in expected.items():
        assert far(single.activation[layer], activation) < 1e-3, layer
        assert far(single.gradient[layer], gradient) < 1e-3, layer


def test_a_few_layers_give_what_all_of_them_give() -> None:
    """Where the graph begins changes nothing, not even attention's other path without one."""
    model = find_model("vit_b_16")
    torch.manual_seed(0)
    network = randomise(NARROW["vit_b_16"]())
    layers = [LayerSpec(name=n, path=p, pooling=k, neurons=0) for n, (p, k) in model.layers.items()]
    images = draw(3, 64, 3)
    with Taps(network, layers, model.classifier) as taps:
        everything = taps(images)
    with Taps(network, [s for s in layers if s.name in model.default], model.classifier) as taps:
        four = taps(images)
    for layer in model.default:
        assert far(four.activation[layer], everything.activation[layer]) < 1e-9
        assert far(four.gradient[layer], everything.gradient[layer]) < 1e-9


@pytest.mark.slow
def test_the_papers_layers_of_vit_b_16_itself() -> None:
    model = find_model("vit_b_16")
    torch.manual_seed(0)
    network = randomise(model.build(10))
    layers = [LayerSpec(name=n, path=model.layers[n][0], pooling=model.layers[n][1], neurons=0) for n in model.default]
    images = draw(3, 224, 1)
    with Taps(network, layers, model.classifier) as taps:
        tapped = taps(images)
    for layer, (activation, gradient) in by_definition(network, layers, images).items():
        assert far(tapped.activation[layer], activation) < 1e-9
        assert far(tapped.gradient[layer], gradient) < 1e-9


# --- the rows ---------------------------------------------------------------------------------------------------------


def rows(name: str, benchmark: str) -> dict[str, tuple[str, str, int]]:
    model = find_model(name)
    measured = measure_layers(blank_network(model, find_benchmark(benchmark), None), tuple(model.layers))
    return {s.name: (s.path, s.pooling, s.neurons) for s in measured.layers}


def test_aliases_of_vit_and_swin() -> None:
    """Modules, poolings and widths, written out."""
    vit = rows("vit_b_16", "imagenet")
    assert vit.pop("conv_proj") == ("conv_proj", "sum-nchw", 768)
    assert vit.pop("layer_norm") == ("encoder.ln", "class-token", 768)
    assert vit == {f"layer_{i}": (f"encoder.layers.encoder_layer_{i}.ln_2", "sum-tokens", 768) for i in range(12)}
    assert rows("swin_t", "imagenet") == {
        "conv_proj": ("features.0", "sum-nhwc", 96),
        "layer_1": ("features.1.1.mlp.0", "sum-nhwc", 384),
        "layer_3": ("features.3.1.mlp.0", "sum-nhwc", 768),
        "layer_5": ("features.5.5.mlp.0", "sum-nhwc", 1536),
        "layer_7": ("features.7.1.mlp.0", "sum-nhwc", 3072),
        "patch_2": ("features.2", "sum-nhwc", 192),
        "patch_4": ("features.4", "sum-nhwc", 384),
        "patch_6": ("features.6", "sum-nhwc", 768),
        "layer_norm": ("norm", "sum-nhwc", 768),
        "avgpool": ("avgpool", "sum-nchw", 768),
    }
    assert [find_model(n).family for n in ("vit_b_16", "swin_t", "resnet50", "resnet50+csi")] == [
        "vit",
        "swin",
        "resnet",
        "resnet",
    ]


def test_resnet18_for_imagenet200_has_its_classes() -> None:
    found = rows("resnet18", "imagenet200")
    assert found["fc"] == ("fc", "none", 200)
    assert found["maxpool"] == ("maxpool", "sum-nchw", 64)
    assert found["avgpool"] == ("avgpool", "sum-nchw", 512)


@pytest.mark.slow
def test_guessed_poolings_are_the_tables() -> None:
    """But for the class token, which no shape tells."""
    for name in (*MODELS, *(f"{backbone}+cider" for backbone in BACKBONES)):
        model = find_model(name)
        network = blank_network(model, find_benchmark(model.benchmark), None)
        for layer in list_layers(network):
            guess = guess_pooling(network.module.get_submodule(layer.path), (2, *layer.shape))
            assert guess == layer.pooling or layer.pooling == "class-token", (name, layer.path)


def test_other_names() -> None:
    assert plain_name("resnet18_32x32+cider") == "resnet18_32x32+cider"
    assert plain_name("timm:resnet18.a1_in1k") == "timm-resnet18.a1_in1k"
    assert plain_name("../my nets/net.py:build") == "net.py-build"
    message = r"^model 'resnet20\+cider' is not known; resnet18_32x32, resnet18, resnet50 can be followed by \+cider, "
    with pytest.raises(InputError, match=message):
        find_model("resnet20+cider")
    with pytest.raises(InputError, match=r"^model 'resnet18\+mos' is not known; .* \+godin, "):
        find_model("resnet18+mos")


# --- weights by name --------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands for torchvision's: address → state dict; what it was asked is under `asked`."""
    there: dict[str, Any] = {"asked": []}

    def get(url: str, **options: Any) -> Any:
        there["asked"].append((url, options))
        if url not in there:
            raise OSError("no route to host")
        print("Downloading")  # as torch does, on stdout
        return there[url]

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", get)
    return there


@pytest.mark.slow
def test_weights_by_name(server: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    state = torchvision.models.resnet18(weights=None).state_dict()
    url = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    server[url] = state
    network = load_network(find_model("resnet18"), IMAGENET, Path("IMAGENET1K_V1"), CPU)
    assert torch.equal(network.module.state_dict()["fc.weight"], state["fc.weight"])
    assert network.transform == IMAGENET.transform
    ((asked, options),) = server["asked"]
    assert (asked, options["weights_only"], options["check_hash"]) == (url, True, True)
    assert capsys.readouterr().out == ""
    with pytest.raises(CheckpointError, match=r"of another shape fc\.weight \(1000×512 for 200×512\)"):
        load_network(find_model("resnet18"), find_benchmark("imagenet200"), Path("IMAGENET1K_V1"), CPU)


def test_weights_bring_their_transform() -> None:
    """Known before anything is downloaded."""
    for name, weights, resize in [
        ("resnet50", "IMAGENET1K_V1", 256),
        ("resnet50", "IMAGENET1K_V2", 232),
        ("vit_b_16", "IMAGENET1K_V1", 256),
    ]:
        network = blank_network(find_model(name), IMAGENET, Path(weights))
        assert network.transform == replace(IMAGENET.transform, resize=resize)
    assert "IMAGENET1K_SWAG_E2E_V1" not in find_model("vit_b_16").weights  # for 384 pixels


@pytest.mark.skipif("interpolation" not in {f.name for f in fields(Transform)}, reason="only bilinear transforms yet")
def test_swins_weights_are_resized_bicubically() -> None:
    network = blank_network(find_model("swin_t"), IMAGENET, Path("IMAGENET1K_V1"))
    assert network.transform == replace(IMAGENET.transform, resize=232, interpolation="bicubic")


def test_unknown_weights_are_refused(server: dict[str, Any], tmp_path: Path) -> None:
    for load in (load_network, lambda m, b, c, _: blank_network(m, b, c)):
        message = (
            r"^checkpoint IMAGENET1K_V3 is not there, and resnet50 has no weights of that name; it has IMAGENET1K_V1,"
            r" IMAGENET1K_V2; did you mean IMAGENET1K_V2\?$"
        )
        with pytest.raises(CheckpointError, match=message):
            load(find_model("resnet50"), IMAGENET, Path("IMAGENET1K_V3"), CPU)
        with pytest.raises(CheckpointError, match=r"^checkpoint IMAGENET1K_V1 is not there$"):
            load(find_model("resnet20"), CIFAR10, Path("IMAGENET1K_V1"), CPU)
    message = r"with --checkpoint FILE, or one of these names: IMAGENET1K_V1, IMAGENET1K_V2$"
    with pytest.raises(InputError, match=message):
        load_network(find_model("resnet50"), IMAGENET, None, CPU)
    message = (
        r"^weights IMAGENET1K_V1 cannot be downloaded: no route to host; get https://download\.pytorch\.org/models/"
        r"resnet18-f37072fd\.pth and give the file with --checkpoint FILE$"
    )
    with pytest.raises(CheckpointError, match=message):
        load_network(find_model("resnet18"), IMAGENET, Path("IMAGENET1K_V1"), CPU)


def test_a_file_of_that_name_comes_first(
    server: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(find_model("resnet18").build(10).state_dict(), tmp_path / "IMAGENET1K_V1")
    load_network(find_model("resnet18"), replace(IMAGENET, classes=10), Path("IMAGENET1K_V1"), CPU)
    assert server["asked"] == []


@pytest.mark.repeats(1)
@pytest.mark.parametrize("form", ["augmix", "regmixup", "pixmix"])
def test_other_training_schemes_load_into_the_same_row(tmp_path: Path, form: str) -> None:
    """AugMix's and DeepAugment's files carry DataParallel's prefix and an optimizer; OpenOOD's are plain."""
    torch.manual_seed(0)
    state = find_model("resnet18").build(10).state_dict()
    optimizer = torch.optim.SGD([torch.zeros(3)], lr=0.1, momentum=0.9).state_dict()
    parallel = {f"module.{k}": v for k, v in state.items()}
    content = {
        "augmix": {"epoch": 90, "arch": "resnet18", "best_acc1": torch.tensor(77.5), "optimizer": optimizer},
        "pixmix": {"epoch": 89},
        "regmixup": state,
    }[form]
    if form != "regmixup":
        content = {**content, "state_dict": parallel}
    torch.save(content, tmp_path / "best.ckpt")
    network = load_network(find_model("resnet18"), replace(IMAGENET, classes=10), tmp_path / "best.ckpt", CPU)
    for key, value in network.module.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_images_that_a_network_cannot_take_are_refused() -> None:
    network = blank_network(find_model("vit_b_16"), CIFAR10, None)
    with pytest.raises(InputError, match=r"^vit_b_16 cannot take images of 32×32 pixels: Wrong image height"):
        measure_layers(network, ())
    with pytest.raises(InputError, match=r"^vit_b_16 takes images of 3 channels, benchmark digits has 1$"):
        blank_network(find_model("vit_b_16"), find_benchmark("digits"), None)
