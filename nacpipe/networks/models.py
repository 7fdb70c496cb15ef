"""The table of networks, `MODELS`: a new network is one more row.

A row has four default layers and a linear classifier. A network that torchvision lacks is a class in architectures/.
Beside the row: its side for the check of gradients in tests/networks/test_networks.py, and docs/own-network.md.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torchvision
from torch import nn

from nacpipe.benchmarks.standard import IMAGENET_MEAN, IMAGENET_STD, Transform
from nacpipe.errors import InputError
from nacpipe.networks.architectures.digits_cnn import DigitsCNN
from nacpipe.networks.architectures.resnets import CifarResNet, ResNet18For32
from nacpipe.networks.architectures.training_schemes import WRAPPERS
from nacpipe.networks.checkpoints import Weights, read_checkpoint, torchvision_weights
from nacpipe.networks.custom import build_from_file, build_timm, read_timm, timm_transform

DIGITS_WEIGHTS = Path(__file__).with_name("architectures") / "digits_cnn.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A row of the table of networks."""

    name: str
    family: str
    """The key of published parameters: resnet, vit, …"""
    build: Callable[[int], nn.Module]
    """Number of classes → the network, with random weights or with its own."""
    layers: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Alias → (module path, pooling). Other modules are tapped by their paths."""
    default: tuple[str, ...] = ()
    """The layers that are tapped by default: the paper's four."""
    classifier: str | None = "fc"
    """Path of the last linear layer; None if there is none."""
    outputs: str = "logits"
    """logits, or features: embeddings without classes, which the gradient treats like logits."""
    transform: Transform | None = None
    """The network's own transform; None: that of its weights or of the benchmark."""
    renames: Mapping[str, str] = field(default_factory=dict)
    """Prefixes of checkpoint keys → prefixes of the network's keys."""
    weights: Mapping[str, Weights] = field(default_factory=dict)
    """Name → published weights; `--checkpoint` takes these names."""
    default_weights: str | None = None
    """The name of the weights that are loaded by default; None: a checkpoint is required."""
    file: Path | None = None
    """The Python file that builds it; its source is part of a cache's identity."""
    model_argument: str = ""
    """The value of --model, if it differs from the name."""
    known: bool = True
    """Whether the network is in the table; if not, a trial batch finds its classifier."""
    benchmark: str = "imagenet"
    """The default benchmark of `nacpipe layers`."""


def _resnet_layers(stages: int) -> dict[str, tuple[str, str]]:
    names = ["conv1", *(f"layer{i}" for i in range(1, stages + 1)), "avgpool"]
    return {**{name: (name, "sum-nchw") for name in names}, "fc": ("fc", "none")}


_PAPER_LAYERS = ("avgpool", "layer3", "layer2", "layer1")  # of four-stage ResNets too, as in the paper


def _cifar_resnet(depth: int) -> Model:
    return Model(
        name=f"resnet{depth}",
        family="resnet",
        build=lambda classes: CifarResNet((depth - 2) // 6, classes),
        layers=_resnet_layers(3),
        default=_PAPER_LAYERS,
        transform=Transform(resize=32, crop=32, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        renames={"linear.": "fc."},
        benchmark="cifar10",
    )


def _torchvision(
    name: str, family: str, layers: dict[str, tuple[str, str]], default: tuple[str, ...], classifier: str
) -> Model:
    return Model(
        name=name,
        family=family,
        build=lambda classes: torchvision.models.get_model(name, weights=None, num_classes=classes),
        layers=layers,
        default=default,
        classifier=classifier,
        weights=torchvision_weights(name),
    )


def _torchvision_resnet(name: str) -> Model:
    return _torchvision(name, "resnet", {**_resnet_layers(4), "maxpool": ("maxpool", "sum-nchw")}, _PAPER_LAYERS, "fc")


_VIT_LAYERS = {
    "conv_proj": ("conv_proj", "sum-nchw"),
    **{f"layer_{i}": (f"encoder.layers.encoder_layer_{i}.ln_2", "sum-tokens") for i in range(12)},
    "layer_norm": ("encoder.ln", "class-token"),
}
_SWIN_LAYERS = {
    "conv_proj": ("features.0", "sum-nhwc"),
    **{f"layer_{i}": (f"features.{i}.{5 if i == 5 else 1}.mlp.0", "sum-nhwc") for i in (1, 3, 5, 7)},
    **{f"patch_{i}": (f"features.{i}", "sum-nhwc") for i in (2, 4, 6)},
    "layer_norm": ("norm", "sum-nhwc"),
    "avgpool": ("avgpool", "sum-nchw"),
}

MODELS: dict[str, Model] = {
    m.name: m
    for m in (
        Model(
            name="digits_cnn",
            family="digits_cnn",
            build=lambda classes: DigitsCNN(),
            layers={k: v for k, v in _resnet_layers(3).items() if k != "conv1"},
            default=_PAPER_LAYERS,
            weights={"packaged": Weights(partial(read_checkpoint, DIGITS_WEIGHTS))},
            default_weights="packaged",
            benchmark="digits",
        ),
        *(_cifar_resnet(depth) for depth in (20, 32, 44, 56)),
        Model(
            name="resnet18_32x32",
            family="resnet",
            build=ResNet18For32,
            layers=_resnet_layers(4),
            default=_PAPER_LAYERS,
            benchmark="cifar10",
        ),
        _torchvision_resnet("resnet18"),
        _torchvision_resnet("resnet50"),
        _torchvision("vit_b_16", "vit", _VIT_LAYERS, ("layer_norm", "layer_11", "layer_10", "layer_9"), "heads.head"),
        # The paper has no Swin: these are the ResNet's four in its place.
        _torchvision("swin_t", "swin", _SWIN_LAYERS, ("avgpool", "layer_5", "layer_3", "layer_1"), "head"),
    )
}
BACKBONES = ("resnet18_32x32", "resnet18", "resnet50")  # the networks that OpenOOD wraps in WRAPPERS
PLAIN_SCHEMES = (  # OpenOOD's training schemes whose network is the plain one, with other weights
    *("base", "augmix", "pixmix", "regmixup", "randaugment", "deepaugment", "stylized", "logitnorm", "mixup", "cutmix"),
    *("cutout", "oe", "mixoe"),
)
# OpenOOD's and other usual names → names in MODELS; in lower case, _ for -, a scheme without its _net.
ALIASES = {"resnet18_224x224": "resnet18", "resnet18_256x256": "resnet18", "vit_b16": "vit_b_16", "swin": "swin_t"}
SCHEME_ALIASES = {"conf_branch": "confbranch", "rot": "rotpred", "baseline": "base"}


def find_model(name: str) -> Model:
    """Return the row of that name, `BACKBONE+SCHEME`, `timm:NAME` or `path/to/file.py:function`.

    OpenOOD's names are accepted too: `resnet18_224x224`, `vit-b-16`, `resnet18_32x32+conf_branch`. A scheme that trains
    the plain network (`resnet50+augmix`) returns that network's row.

    Raises:
        InputError: there is no such model.
    """
    path, _, function = name.rpartition(":")
    if name.startswith("timm:"):
        known = name.removeprefix("timm:")
        return Model(
            name=name,
            family="timm",
            build=partial(build_timm, known),
            weights={"pretrained": Weights(partial(read_timm, known), partial(timm_transform, known))},
            default_weights="pretrained",
            known=False,
        )
    if path.endswith(".py"):
        return Model(
            name=f"{Path(path).name}:{function}",  # without the folder
            file=Path(path),
            model_argument=name,
            family="custom",
            build=lambda classes: build_from_file(Path(path), function),
            weights={"its own": Weights(None)},
            default_weights="its own",
            known=False,
        )
    if name.endswith(".py"):
        raise InputError(f"model {name!r} names no function; give {name}:FUNCTION, which returns the network")
    backbone, _, scheme = name.lower().replace("-", "_").partition("+")
    backbone, scheme = ALIASES.get(backbone, backbone), scheme.removesuffix("_net")
    scheme = SCHEME_ALIASES.get(scheme, scheme)
    if backbone in MODELS and scheme in ("", *PLAIN_SCHEMES):
        return MODELS[backbone]
    if backbone in BACKBONES and scheme in WRAPPERS:
        return _wrap_backbone(MODELS[backbone], scheme)
    if backbone in MODELS:
        raise InputError(
            f"model {name!r} is not known; {', '.join(BACKBONES)} can be followed by +{', +'.join(WRAPPERS)}, every"
            f" network by +{', +'.join(PLAIN_SCHEMES)}"
            + suggest_name(scheme, [*WRAPPERS, *PLAIN_SCHEMES, *SCHEME_ALIASES])
        )
    raise InputError(
        f"model {name!r} is not known; known: {', '.join(MODELS)}; see too: nacpipe models"
        + suggest_name(backbone, [*MODELS, *ALIASES])
    )


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean …?` if a known name is similar to this one, else an empty text."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close and close[0] != name else ""


def plain_name(name: str) -> str:
    """Return a model's name for use in a file name, without folders and colons."""
    return re.sub(r"[^\w.+-]+", "-", name.rpartition("/")[2])


def _wrap_backbone(row: Model, scheme: str) -> Model:
    """Return the row of a backbone in a training scheme's network: the same aliases, with paths below `backbone.`."""
    wrapper = WRAPPERS[scheme]
    layers = {alias: (f"backbone.{path}", pooling) for alias, (path, pooling) in row.layers.items() if alias != "fc"}
    if wrapper.classifier is not None:
        layers["fc"] = (wrapper.classifier, "none")
    return replace(
        row,
        name=f"{row.name}+{scheme}",
        build=lambda classes: wrapper(row.build(classes), classes),
        layers=layers,
        classifier=wrapper.classifier,
        outputs=wrapper.outputs,
        weights={},
    )
