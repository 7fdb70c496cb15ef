"""A row of the table made real: the network with its weights, ready to be tapped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nacpipe.core.benchmarks import Benchmark, Transform
from nacpipe.errors import CheckpointError, InputError
from nacpipe.network.custom import try_network
from nacpipe.network.models import Model
from nacpipe.network.source import hash_source
from nacpipe.network.taps import freeze
from nacpipe.network.weights import Weights, hash_weights, load_weights, read_checkpoint


@dataclass(frozen=True, slots=True)
class Network:
    """A network with its weights, frozen and on its device, ready to be tapped."""

    model: Model
    module: nn.Module
    weights_sha256: str
    """Over names, types, shapes and values of the state dict: the same for the same weights in any file."""
    transform: Transform
    device: torch.device
    dtype: torch.dtype = torch.float32
    """Of the images it takes."""
    source: str = ""
    """sha256 of its source, where it is from a file (source.py)."""

    def blank(self, n: int) -> Tensor:
        """Return n blank images of the network's size, (n, channels, crop, crop)."""
        side = self.transform.crop
        return torch.zeros(n, len(self.transform.mean), side, side, device=self.device, dtype=self.dtype)


def load_network(model: Model, benchmark: Benchmark, checkpoint: Path | None, device: torch.device) -> Network:
    """Build a network and load its weights.

    Raises:
        CheckpointError: the file is not there, is no checkpoint, or does not fit, naming the keys.
        InputError: no checkpoint was given and none ships with the package; the network does not fit the benchmark.
    """
    module = model.build(benchmark.classes)
    _check_channels(model, module, benchmark)
    source, weights = _choose_weights(model, checkpoint)
    if weights.read is not None:
        load_weights(module, weights.read(), model.renames, source)
    sha256 = hash_weights(module.state_dict())
    transform = _transform(model, benchmark, weights)
    network = Network(model, freeze(module).to(device), sha256, transform, device, source=_source(model))
    return _look(network, benchmark)


def blank_network(model: Model, benchmark: Benchmark, checkpoint: Path | None) -> Network:
    """Return the network's shapes alone: nothing is downloaded or computed, and no checkpoint read.

    A network that is not in the table is built as it is, on the CPU: its code may not be made for less.

    Raises:
        CheckpointError: a checkpoint was given that is not there.
        InputError: the network does not fit the benchmark.
    """
    device = torch.device("meta" if model.known else "cpu")
    with device:
        module = freeze(model.build(benchmark.classes))
    _check_channels(model, module, benchmark)
    unknown = checkpoint is None and model.unasked is None
    weights = Weights(None) if unknown else _choose_weights(model, checkpoint)[1]
    network = Network(model, module, "", _transform(model, benchmark, weights), device, source=_source(model))
    return _look(network, benchmark)


def wrap_network(module: nn.Module, images: Tensor) -> Network:
    """Take a network in hand as one that is not in the table; images come prepared by whoever calls it.

    Call it, and what looks at the network then, with the network `frozen`.

    Args:
        module: the network, on whatever device.
        images: (n, channels, side, side) of the kind to come.

    Raises:
        InputError: images are no squares, or the network does not give logits for them.
    """
    if images.dim() != 4 or images.shape[2] != images.shape[3]:
        raise InputError(f"images are {tuple(images.shape)}; wanted: (n, channels, side, side)")
    side, name = images.shape[3], type(module).__name__
    channels = images.shape[1]
    transform = Transform(resize=side, crop=side, mean=(0.0,) * channels, std=(1.0,) * channels)
    with torch.no_grad():
        output = module(images[:1])
    classes = output.shape[-1] if isinstance(output, Tensor) else 0
    model = Model(name=name, family="custom", build=lambda _: module, known=False)
    model = replace(model, classifier=try_network(name, module, images[:2], classes))
    return Network(model, module, hash_weights(module.state_dict()), transform, images.device, images.dtype)


def classifier_weights(network: Network) -> tuple[Tensor, Tensor] | None:
    """Return the last linear layer's weight (classes, features) and bias (classes,), if there is such a layer."""
    if network.model.classifier is None:
        return None
    linear = network.module.get_submodule(network.model.classifier)
    assert isinstance(linear, nn.Linear)
    bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
    return linear.weight.detach().cpu(), bias.detach().cpu()


def _choose_weights(model: Model, checkpoint: Path | None) -> tuple[str, Weights]:
    """Return the weights asked for, or those of the model, and what to call them."""
    names = ", ".join(model.weights)
    if checkpoint is None:
        if model.unasked is None:
            more = f", or one of these names: {names}" if names else ""
            raise InputError(f"{model.name} has no packaged weights; give them with --checkpoint FILE{more}")
        return model.unasked, model.weights[model.unasked]
    if checkpoint.is_file():
        return str(checkpoint), Weights(partial(read_checkpoint, checkpoint))
    if str(checkpoint) in model.weights:
        return str(checkpoint), model.weights[str(checkpoint)]
    more = f", and {model.name} has no weights of that name; it has {names}" if names else ""
    raise CheckpointError(f"checkpoint {checkpoint} is not there{more}")


def _source(model: Model) -> str:
    """Once it is built: modules may be imported by its function."""
    return hash_source(model.file) if model.file is not None else ""


def _transform(model: Model, benchmark: Benchmark, weights: Weights) -> Transform:
    """The weights' own preparation of images, or the model's, or the benchmark's."""
    return weights.transform() if weights.transform else model.transform or benchmark.transform


def _check_channels(model: Model, module: nn.Module, benchmark: Benchmark) -> None:
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    expected = len((model.transform or benchmark.transform).mean)
    if first is not None and first.in_channels != expected:
        raise InputError(
            f"{model.name} takes images of {first.in_channels} channels, benchmark {benchmark.name} has {expected}"
        )


def _look(network: Network, benchmark: Benchmark) -> Network:
    """Run a network that is not in the table once, to see whether it fits and where its classifier is."""
    if network.model.known:
        return network
    classifier = try_network(network.model.name, network.module, network.blank(2), benchmark.classes)
    return replace(network, model=replace(network.model, classifier=classifier))
