"""A row of the table made real: the network with its weights, ready to be tapped."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nacpipe.benchmarks.standard import Benchmark, Transform
from nacpipe.errors import CheckpointError, InputError
from nacpipe.networks.checkpoint_folders import find_checkpoint
from nacpipe.networks.checkpoints import (
    Weights,
    hash_network,
    load_weights,
    published_sha256,
    read_checkpoint,
    recognise_weights,
)
from nacpipe.networks.models import Model, hint
from nacpipe.networks.source import hash_source
from nacpipe.networks.taps import freeze
from nacpipe.networks.trial import Trial, run_trial
from nacpipe.networks.wrappers import find_place, unwrap, unwrap_children


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
    no_classifier: str = ""
    """Why it has no last linear layer; empty where it has one, or was not tried."""
    notes: tuple[str, ...] = ()
    """What to say aloud of its weights and outputs."""
    prepared_by: str = ""
    """Whose transform it is, for people."""

    def blank(self, n: int) -> Tensor:
        """Return n blank images of the network's size, (n, channels, crop, crop)."""
        side = self.transform.crop
        return torch.zeros(n, len(self.transform.mean), side, side, device=self.device, dtype=self.dtype)


def load_network(
    model: Model,
    benchmark: Benchmark,
    checkpoint: Path | None,
    device: torch.device,
    weights_transform: str | None = None,
) -> Network:
    """Build a network, load its weights and try it on a few random images.

    Args:
        model: the row.
        benchmark: whose classes and images.
        checkpoint: a file, a folder with one, or a name of the model's weights; None takes the model's own.
        device: where to.
        weights_transform: whose preparation of images is used: published weights' by their name, or `benchmark`; None
            chooses by the weights.

    Raises:
        CheckpointError: the file is not there, is no checkpoint, or does not fit, naming the keys.
        InputError: no checkpoint was given and none ships with the package; the network does not fit the benchmark, or
            is random in evaluation mode.
    """
    module = unwrap(model.build(benchmark.classes))
    _check_channels(model, module, benchmark)
    chosen = _choose_weights(model, checkpoint)
    notes = chosen.notes
    if chosen.weights.read is not None:
        notes += load_weights(module, chosen.weights.read(), model.renames, chosen.source)
    sha256 = hash_network(module)
    transform, prepared_by = _choose_transform(model, benchmark, chosen, weights_transform)
    freeze(module).to(device)
    unwrap_children(module)
    network = Network(
        model, module, sha256, transform, device, find_place(module)[1], source=_source(model), notes=notes,
        prepared_by=prepared_by,
    )  # fmt: skip
    return _try(network, benchmark)


def blank_network(
    model: Model, benchmark: Benchmark, checkpoint: Path | None, weights_transform: str | None = None
) -> Network:
    """Return the network's shapes alone: nothing is downloaded or computed, and no checkpoint loaded.

    A network that is not in the table is built and tried as it is, on the CPU: its code may not be made for less.

    Raises:
        CheckpointError: a checkpoint was given that is not there.
        InputError: the network does not fit the benchmark.
    """
    device = torch.device("meta" if model.known else "cpu")
    with device:
        module = freeze(unwrap(model.build(benchmark.classes)))
    unwrap_children(module)
    _check_channels(model, module, benchmark)
    unknown = checkpoint is None and model.unasked is None
    chosen = _Chosen("", Weights(None)) if unknown else _choose_weights(model, checkpoint)
    transform, prepared_by = _choose_transform(model, benchmark, chosen, weights_transform)
    network = Network(
        model, module, "", transform, device, find_place(module)[1], source=_source(model), notes=chosen.notes,
        prepared_by=prepared_by,
    )  # fmt: skip
    return network if model.known else _try(network, benchmark)


def adopt_module(module: nn.Module, images: Tensor) -> Network:
    """Take a network in hand as one that is not in the table; images come prepared by whoever calls it.

    Call it, and what looks at the network then, with the network `frozen`.

    Args:
        module: the network, unwrapped, on whatever device.
        images: (n, channels, side, side) of the kind to come.

    Raises:
        InputError: images are no squares, or the network does not give logits for them, the same each time.
    """
    if images.dim() != 4 or images.shape[2] != images.shape[3]:
        raise InputError(f"images are {tuple(images.shape)}; wanted: (n, channels, side, side)")
    side, name = images.shape[3], type(module).__name__
    channels = images.shape[1]
    transform = Transform(resize=side, crop=side, mean=(0.0,) * channels, std=(1.0,) * channels)
    model = Model(name=name, family="custom", build=lambda _: module, known=False)
    dtype = find_place(module)[1] if images.is_floating_point() else images.dtype
    network = Network(model, module, hash_network(module), transform, images.device, dtype)
    return _with_trial(network, run_trial(name, module, images))


def classifier_weights(network: Network) -> tuple[Tensor, Tensor] | None:
    """Return the last linear layer's weight (classes, features) and bias (classes,), float32, if there is one."""
    if network.model.classifier is None:
        return None
    linear = network.module.get_submodule(network.model.classifier)
    assert isinstance(linear, nn.Linear)
    bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
    return linear.weight.detach().float().cpu(), bias.detach().float().cpu()


class _Chosen(NamedTuple):
    """Weights that are to be loaded."""

    source: str
    """What to call them in messages."""
    weights: Weights
    published: str = ""
    """Their name, where they are published ones."""
    notes: tuple[str, ...] = ()


def _choose_weights(model: Model, checkpoint: Path | None) -> _Chosen:
    """Return the weights asked for, or those of the model."""
    names = ", ".join(model.weights)
    if checkpoint is None:
        if model.unasked is None:
            more = f", or one of these names: {names}" if names else ""
            raise InputError(f"{model.name} has no packaged weights; give them with --checkpoint FILE{more}")
        return _Chosen(model.unasked, model.weights[model.unasked], model.unasked)
    if checkpoint.is_dir():
        checkpoint = find_checkpoint(checkpoint)
    if checkpoint.is_file():
        return _recognise(model, checkpoint)
    if str(checkpoint) in model.weights:
        return _Chosen(str(checkpoint), model.weights[str(checkpoint)], str(checkpoint))
    more = f", and {model.name} has no weights of that name; it has {names}" if names else ""
    raise CheckpointError(f"checkpoint {checkpoint} is not there{more}{hint(str(checkpoint), model.weights)}")


def _recognise(model: Model, file: Path) -> _Chosen:
    """Return a file's weights, with the transform of the published ones if it holds those."""
    read = partial(read_checkpoint, file)
    if (name := recognise_weights(file, model.weights)) is not None:
        return _Chosen(str(file), Weights(read, model.weights[name].transform), name)
    named = published_sha256(file.name)
    claimed = [name for name, weights in model.weights.items() if named and weights.sha256 == named]
    notes = [
        f"{file} is called like {name}'s file, but its content is another; if it holds those weights, give"
        f" --weights-transform {shlex.quote(name)}"
        for name in claimed
    ]
    return _Chosen(str(file), Weights(read), notes=tuple(notes))


def _choose_transform(model: Model, benchmark: Benchmark, chosen: _Chosen, wanted: str | None) -> tuple[Transform, str]:
    """Return the preparation of images, and whose it is: as wanted, the weights', the model's or the benchmark's."""
    if wanted == "benchmark":
        return benchmark.transform, f"the benchmark {benchmark.name}"
    if wanted is not None:
        own = {name: one.transform for name, one in model.weights.items() if one.transform is not None}
        if (transform := own.get(wanted)) is None:
            known = [*own, "benchmark"]
            raise InputError(
                f"weights-transform is {wanted!r}; known for {model.name}: {', '.join(known)}{hint(wanted, known)}"
            )
        return transform(), f"the weights {wanted}"
    if chosen.weights.transform is not None:
        return chosen.weights.transform(), f"the weights {chosen.published}"
    if model.transform is not None:
        return model.transform, f"the network {model.name}"
    return benchmark.transform, f"the benchmark {benchmark.name}"


def _source(model: Model) -> str:
    """Once it is built: modules may be imported by its function."""
    return hash_source(model.file) if model.file is not None else ""


def _check_channels(model: Model, module: nn.Module, benchmark: Benchmark) -> None:
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    expected = len((model.transform or benchmark.transform).mean)
    if first is not None and first.in_channels != expected:
        raise InputError(
            f"{model.name} takes images of {first.in_channels} channels, benchmark {benchmark.name} has {expected}"
        )


def _try(network: Network, benchmark: Benchmark) -> Network:
    """Run a network on a few images, to see whether it fits, what its outputs are and where its classifier is."""
    model, embeds = network.model, network.model.outputs == "features"
    trial = run_trial(
        model.name, network.module, network.blank(1), None if embeds else benchmark.classes, embeds=embeds
    )
    return _with_trial(network, trial)


def _with_trial(network: Network, trial: Trial) -> Network:
    outputs = network.model.outputs if network.model.outputs == "features" else trial.outputs
    model = replace(network.model, classifier=trial.classifier, outputs=outputs)
    notes = list(network.notes)
    if outputs in ("probabilities", "log-probabilities"):
        notes.append(f"{model.name} gives {outputs}, not logits: what needs logits (Energy, MaxLogit, …) is left empty")
    elif outputs == "logits" and trial.classifier is None:
        notes.append(f"no classifier and features are written: {trial.no_classifier}")
    return replace(network, model=model, no_classifier=trial.no_classifier, notes=tuple(notes))
