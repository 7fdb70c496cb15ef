"""The networks: one row each. A new network is one row more."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from nacpipe.cache import LayerSpec
from nacpipe.core.benchmarks import IMAGENET_MEAN, IMAGENET_STD, Benchmark, Transform
from nacpipe.errors import CheckpointError, InputError
from nacpipe.network.digits_cnn import DigitsCNN
from nacpipe.network.resnets import CifarResNet, ResNet18For32
from nacpipe.network.taps import Taps, freeze

StateDict = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A row of the table."""

    name: str
    family: str
    """Published parameters are keyed by it: resnet, vit, …"""
    build: Callable[[int], nn.Module]
    """Number of classes → the network, weights random."""
    layers: Mapping[str, tuple[str, str]]
    """Alias → (module path, pooling)."""
    default: tuple[str, ...]
    """The layers tapped when nobody chooses: the paper's four."""
    classifier: str = "fc"
    """Path of the last linear layer."""
    transform: Transform | None = None
    """The network's own preparation of images; None means the benchmark's."""
    renames: Mapping[str, str] = field(default_factory=dict)
    """Prefixes of checkpoint keys → prefixes of ours."""
    packaged: str = ""
    """File of weights that ships with the package."""

    def choose_layers(self, names: tuple[str, ...]) -> dict[str, tuple[str, str]]:
        """Return alias → (path, pooling) for the given aliases, or for the default ones if there are none.

        Raises:
            InputError: an alias is not known, or given twice.
        """
        for name in names:
            if name not in self.layers:
                raise InputError(f"layer {name!r} is not known for {self.name}; known: {', '.join(self.layers)}")
            if names.count(name) > 1:
                raise InputError(f"layer {name!r} is given twice")
        return {name: self.layers[name] for name in names or self.default}


def _resnet_layers(stages: int) -> dict[str, tuple[str, str]]:
    names = ["conv1", *(f"layer{i}" for i in range(1, stages + 1)), "avgpool"]
    return {**{name: (name, "sum-nchw") for name in names}, "fc": ("fc", "none")}


_FOUR = ("avgpool", "layer3", "layer2", "layer1")  # of four-stage ResNets too, as in the paper


def _cifar_resnet(depth: int) -> Model:
    return Model(
        name=f"resnet{depth}",
        family="resnet",
        build=lambda classes: CifarResNet((depth - 2) // 6, classes),
        layers=_resnet_layers(3),
        default=_FOUR,
        transform=Transform(resize=32, crop=32, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        renames={"linear.": "fc."},
    )


def _torchvision_resnet(name: str) -> Model:
    layers = {**_resnet_layers(4), "maxpool": ("maxpool", "sum-nchw")}
    return Model(
        name=name,
        family="resnet",
        build=lambda classes: torchvision.models.get_model(name, weights=None, num_classes=classes),
        layers=layers,
        default=_FOUR,
    )


MODELS: dict[str, Model] = {
    m.name: m
    for m in (
        Model(
            name="digits_cnn",
            family="digits_cnn",
            build=lambda classes: DigitsCNN(),
            layers={k: v for k, v in _resnet_layers(3).items() if k != "conv1"},
            default=_FOUR,
            packaged="digits_cnn.safetensors",
        ),
        *(_cifar_resnet(depth) for depth in (20, 32, 44, 56)),
        Model(
            name="resnet18_32x32",
            family="resnet",
            build=ResNet18For32,
            layers=_resnet_layers(4),
            default=_FOUR,
        ),
        _torchvision_resnet("resnet18"),
        _torchvision_resnet("resnet50"),
    )
}


def find_model(name: str) -> Model:
    """Return the row of that name.

    Raises:
        InputError: there is none.
    """
    if name not in MODELS:
        raise InputError(f"model {name!r} is not known; known: {', '.join(MODELS)}")
    return MODELS[name]


@dataclass(frozen=True, slots=True)
class Network:
    """A network with its weights, frozen and on its device, ready to be tapped."""

    model: Model
    module: nn.Module
    weights_sha256: str
    """Over names, types, shapes and values of the state dict: the same for the same weights in any file."""
    transform: Transform
    device: torch.device


def load_network(model: Model, benchmark: Benchmark, checkpoint: Path | None, device: torch.device) -> Network:
    """Build a network and load its weights.

    Raises:
        CheckpointError: the file is not there, is no checkpoint, or does not fit, naming the keys.
        InputError: no checkpoint was given and none ships with the package.
    """
    module = model.build(benchmark.classes)
    transform = model.transform or benchmark.transform
    channels = next(module.parameters()).shape[1]
    if channels != len(transform.mean):
        raise InputError(
            f"{model.name} takes images of {channels} channels, benchmark {benchmark.name} has {len(transform.mean)}"
        )
    if checkpoint is None:
        if not model.packaged:
            raise InputError(f"{model.name} has no packaged weights; give them with --checkpoint FILE")
        checkpoint = Path(__file__).with_name(model.packaged)
    load_weights(module, read_checkpoint(checkpoint), model.renames, str(checkpoint))
    return Network(model, freeze(module).to(device), hash_weights(module.state_dict()), transform, device)


def read_checkpoint(path: Path) -> StateDict:
    """Read a state dict from a `.safetensors` file or a `torch.save` file, never unpickling code.

    Raises:
        CheckpointError: it cannot be read, or holds no state dict.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} is not there")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} is no checkpoint, or holds more than tensors and is not loaded, since that could run"
            f" code: save its state_dict alone"
        ) from error
    except Exception as error:  # a damaged file can make torch raise anything
        raise CheckpointError(f"checkpoint {path} cannot be read: {_first_line(error)}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not (isinstance(content, dict) and content and all(isinstance(v, Tensor) for v in content.values())):
        raise CheckpointError(f"checkpoint {path} holds no state dict (a dictionary of tensors)")
    return dict(content)


def load_weights(module: nn.Module, state: StateDict, renames: Mapping[str, str], source: str) -> None:
    """Load a state dict into a network, key by key.

    `module.` prefixes (of DataParallel) are dropped; checkpoints from before torch counted batches in batch norms load.

    Raises:
        CheckpointError: keys are missing, left over, or of another shape, naming them.
    """
    ours: StateDict = {}
    for key, value in state.items():
        key = key.removeprefix("module.")
        for old, new in renames.items():
            key = new + key.removeprefix(old) if key.startswith(old) else key
        ours[key] = value
    wanted = module.state_dict()
    problems = {
        "it lacks": [k for k in wanted if k not in ours and not k.endswith("num_batches_tracked")],
        "it has left over": [k for k in ours if k not in wanted],
        "of another shape": [
            f"{k} ({_shape(ours[k])} for {_shape(wanted[k])})"
            for k in wanted
            if k in ours and ours[k].shape != wanted[k].shape
        ],
    }
    if any(problems.values()):
        said = "; ".join(f"{what} {_some(keys)}" for what, keys in problems.items() if keys)
        raise CheckpointError(f"checkpoint {source} does not fit the network: {said}")
    module.load_state_dict(ours, strict=False)


def hash_weights(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 (hex) of a state dict's names, types, shapes and values, without its idle batch counters."""
    digest = hashlib.sha256()
    for key in sorted(state):
        if key.endswith("num_batches_tracked"):
            continue
        array = state[key].detach().cpu().contiguous().numpy()
        digest.update(f"{key} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def measure_layers(network: Network, names: tuple[str, ...]) -> tuple[tuple[LayerSpec, ...], int, int]:
    """Run one blank image and return the chosen layers with their neurons, the classes, and the width of the features.

    Raises:
        InputError: a layer is not known or cannot be tapped.
    """
    chosen = network.model.choose_layers(names)
    draft = [LayerSpec(name=n, path=path, pooling=pooling, neurons=0) for n, (path, pooling) in chosen.items()]
    side = network.transform.crop
    blank = torch.zeros(1, len(network.transform.mean), side, side, device=network.device)
    with Taps(network.module, draft, network.model.classifier) as taps:
        tapped = taps(blank)
    layers = tuple(
        LayerSpec(name=s.name, path=s.path, pooling=s.pooling, neurons=tapped.activation[s.name].shape[1])
        for s in draft
    )
    features = 0 if tapped.features is None else tapped.features.shape[1]
    return layers, tapped.logits.shape[1], features


def classifier_weights(network: Network) -> tuple[Tensor, Tensor]:
    """Return the last linear layer's weight (classes, features) and bias (classes,)."""
    linear = network.module.get_submodule(network.model.classifier)
    assert isinstance(linear, nn.Linear)
    bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
    return linear.weight.detach().cpu(), bias.detach().cpu()


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _shape(tensor: Tensor) -> str:
    return "×".join(str(n) for n in tensor.shape) or "scalar"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
