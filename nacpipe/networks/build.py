"""Building a network from its row in the table of models, with its weights, frozen and tested on a trial batch."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nacpipe.benchmarks.standard import Benchmark, Transform
from nacpipe.errors import CheckpointError, InputError
from nacpipe.networks.call import PLAIN_CALL, Call, cast_floats, device_of, repeat_samples
from nacpipe.networks.checkpoint_folders import find_checkpoint
from nacpipe.networks.checkpoints import (
    Weights,
    check_weights,
    hash_network,
    load_weights,
    published_sha256,
    read_checkpoint,
    recognise_weights,
)
from nacpipe.networks.models import MODELS, Model, suggest_name
from nacpipe.networks.source import hash_source
from nacpipe.networks.state_dicts import StateDict, find_problems, fit_keys
from nacpipe.networks.taps import check_values, freeze
from nacpipe.networks.trial import TWO_CLASSES, TrialBatch, run_trial_batch
from nacpipe.networks.wrappers import find_device_and_dtype, unwrap, unwrap_children


@dataclass(frozen=True, slots=True)
class Network:
    """A network with its weights, frozen and on its device, ready for hooks."""

    model: Model
    module: nn.Module
    weights_sha256: str
    """Digest of names, types, shapes and values of the state dict: equal for equal weights in any file."""
    transform: Transform | None
    """How images are prepared; None: the caller prepares the input (`examples`)."""
    device: torch.device
    dtype: torch.dtype = torch.float32
    """The type of its input images."""
    source: str = ""
    """sha256 of its source if it is from a Python file (source.py), else empty."""
    no_classifier: str = ""
    """The reason why it has no last linear layer; empty if it has one, or no trial batch ran."""
    notes: tuple[str, ...] = ()
    """Notes to print about its weights and outputs."""
    prepared_by: str = ""
    """The origin of `transform`, in words."""
    call: Call = PLAIN_CALL
    examples: Any = field(default=None, repr=False)
    """The network's arguments for a few samples, on its device; None: images of the transform's size."""

    @property
    def image_transform(self) -> Transform:
        """The transform of a network of images."""
        assert self.transform is not None
        return self.transform

    @property
    def from_python(self) -> bool:
        """Whether it was handed over in Python, with its input prepared: messages name options as they are there."""
        return self.examples is not None

    def blank(self, n: int) -> Any:
        """Return the arguments for n samples: blank images, (n, channels, crop, crop), or examples."""
        if self.examples is not None:
            return repeat_samples(self.examples, n)
        side = self.image_transform.crop
        return torch.zeros(n, len(self.image_transform.mean), side, side, device=self.device, dtype=self.dtype)


def load_network(
    model: Model,
    benchmark: Benchmark,
    checkpoint: Path | None,
    device: torch.device,
    weights_transform: str | None = None,
) -> Network:
    """Build a network, load its weights and run a trial batch.

    Args:
        model: the row in the table of models.
        benchmark: gives the number of classes and the images' transform.
        checkpoint: a file, a folder with one, or a name of the model's weights; None loads the model's default ones.
        device: the device of the network.
        weights_transform: the name of published weights, or `benchmark`, whose transform is used; None chooses by the
            weights.

    Raises:
        CheckpointError: the file does not exist, is not a checkpoint, or does not fit, naming the keys.
        InputError: the model has no default weights and `checkpoint` is None; the network does not fit the benchmark,
            or is random in evaluation mode.
    """
    module = unwrap(model.build(benchmark.classes))
    check_values(module)
    _check_channels(model, module, benchmark)
    chosen = _choose_weights(model, checkpoint)
    notes = chosen.notes
    if chosen.weights.read is not None:
        notes += _use_weights(load_weights, model, module, benchmark, chosen)
    sha256 = hash_network(module)
    transform, prepared_by = _choose_transform(model, benchmark, chosen, weights_transform)
    freeze(module).to(device)
    unwrap_children(module)
    network = Network(
        model, module, sha256, transform, device, find_device_and_dtype(module)[1],
        source=_hash_model_source(model), notes=notes, prepared_by=prepared_by,
    )  # fmt: skip
    return _run_trial_batch(network, benchmark)


def _use_weights(
    use: Callable[..., tuple[str, ...]], model: Model, module: nn.Module, benchmark: Benchmark, chosen: _ChosenWeights
) -> tuple[str, ...]:
    """Read the weights and load or check them; return notes. An error names another network that they fit."""
    assert chosen.weights.read is not None
    states = chosen.weights.read()
    try:
        return use(module, states, model.renames, chosen.source)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_name_fitting(model, states, benchmark.classes)}") from error


def _name_fitting(model: Model, states: Mapping[str, StateDict], classes: int) -> str:
    """Return `; it fits resnet32: --model resnet32` for another network of the family that fits; empty for none."""
    for other in MODELS.values():
        if other.family != model.family or other.name == model.name:
            continue
        with torch.device("meta"):  # names and shapes alone
            wanted = other.build(classes).state_dict()
        for state in states.values():
            if not find_problems(fit_keys(state, wanted, other.renames), wanted):
                return f"; it fits {other.name}: --model {other.name}"
    return ""


def blank_network(
    model: Model, benchmark: Benchmark, checkpoint: Path | None, weights_transform: str | None = None
) -> Network:
    """Return a network with shapes alone: nothing is downloaded or computed; a file of weights is checked, not loaded.

    A network that is not in the table is built and tested on the CPU, because its code may not run on the meta device.

    Raises:
        CheckpointError: `checkpoint` does not exist, is not a checkpoint, or does not fit, naming the keys.
        InputError: the network does not fit the benchmark.
    """
    device = torch.device("meta" if model.known else "cpu")
    with device:
        module = unwrap(model.build(benchmark.classes))
    if not model.known:
        check_values(module)
    unwrap_children(freeze(module))
    _check_channels(model, module, benchmark)
    unknown = checkpoint is None and model.default_weights is None
    chosen = _ChosenWeights("", Weights(None)) if unknown else _choose_weights(model, checkpoint)
    notes = chosen.notes
    if chosen.from_file:
        notes += _use_weights(check_weights, model, module, benchmark, chosen)
    transform, prepared_by = _choose_transform(model, benchmark, chosen, weights_transform)
    network = Network(
        model, module, "", transform, device, find_device_and_dtype(module)[1],
        source=_hash_model_source(model), notes=notes, prepared_by=prepared_by,
    )  # fmt: skip
    return network if model.known else _run_trial_batch(network, benchmark)


def adopt_module(module: nn.Module, examples: Any, call: Call = PLAIN_CALL) -> Network:
    """Return a caller's module as a `Network` that is not in the table; the caller prepares the input.

    The module must be `frozen` during this call and while the result is used.

    Args:
        module: the network, unwrapped, on any device.
        examples: its arguments (`Call.arguments`) for a few samples, on its device.
        call: how it is called.

    Raises:
        InputError: the network gives no logits for them, or different ones each time.
    """
    name = type(module).__name__
    model = Model(name=name, family="custom", build=lambda _: module, known=False)
    dtype = find_device_and_dtype(module)[1]
    examples = cast_floats(examples, dtype)
    trial = run_trial_batch(name, module, examples, call=call, examples=True)
    if trial.classes == 1:
        raise InputError(
            f"model {name!r} gives one number for each sample, (n, 1): the softmax of one class is 1 for every input."
            f" {TWO_CLASSES.format('cat')}"
        )
    network = Network(
        model, module, hash_network(module), None, device_of(examples), dtype, call=call, examples=examples
    )
    return _add_trial_batch(network, trial)


def square_transform(examples: Any) -> Transform | None:
    """Return the transform of square images (n, 1 or 3 channels, side, side) in 0 … 1; None for other inputs."""
    if not isinstance(examples, Tensor) or examples.dim() != 4 or examples.shape[2] != examples.shape[3]:
        return None
    channels, side = examples.shape[1], examples.shape[3]
    return Transform(resize=side, crop=side, mean=(0.0,) * channels, std=(1.0,) * channels)


def classifier_weights(network: Network) -> tuple[Tensor, Tensor] | None:
    """Return the last linear layer's weight (classes, features) and bias (classes,), float32, or None."""
    if network.model.classifier is None:
        return None
    linear = network.module.get_submodule(network.model.classifier)
    assert isinstance(linear, nn.Linear)
    bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
    return linear.weight.detach().float().cpu(), bias.detach().float().cpu()


class _ChosenWeights(NamedTuple):
    """The weights to load."""

    source: str
    """Their name in messages."""
    weights: Weights
    published: str = ""
    """Their name if they are published weights, else empty."""
    notes: tuple[str, ...] = ()
    from_file: bool = False
    """Whether they are a file here, which is read without a download."""


def _choose_weights(model: Model, checkpoint: Path | None) -> _ChosenWeights:
    """Return the requested weights, or the model's default ones."""
    names = ", ".join(model.weights)
    if checkpoint is None:
        if model.default_weights is None:
            choices = f", or one of these names: {names}" if names else ""
            raise InputError(f"{model.name} has no packaged weights; give them with --checkpoint FILE{choices}")
        return _ChosenWeights(model.default_weights, model.weights[model.default_weights], model.default_weights)
    if checkpoint.is_dir():
        checkpoint = find_checkpoint(checkpoint)
    if checkpoint.is_file():
        return _recognise(model, checkpoint)
    if str(checkpoint) in model.weights:
        return _ChosenWeights(str(checkpoint), model.weights[str(checkpoint)], str(checkpoint))
    choices = f", and {model.name} has no weights of that name; it has {names}" if names else ""
    raise CheckpointError(
        f"checkpoint {checkpoint} is not there{choices}{suggest_name(str(checkpoint), model.weights)}"
    )


def _recognise(model: Model, file: Path) -> _ChosenWeights:
    """Return a file's weights, with the transform of published weights if the file contains these."""
    read = partial(read_checkpoint, file)
    if (name := recognise_weights(file, model.weights)) is not None:
        return _ChosenWeights(str(file), Weights(read, model.weights[name].transform), name, from_file=True)
    named = published_sha256(file.name)
    claimed = [name for name, weights in model.weights.items() if named and weights.sha256 == named]
    notes = [
        f"{file} has the name of {name}'s file, but other content; if it holds those weights, give"
        f" --weights-transform {shlex.quote(name)}"
        for name in claimed
    ]
    return _ChosenWeights(str(file), Weights(read), notes=tuple(notes), from_file=True)


def _choose_transform(
    model: Model, benchmark: Benchmark, chosen: _ChosenWeights, wanted: str | None
) -> tuple[Transform, str]:
    """Return the transform and its origin: the wanted one, else the weights', the model's or the benchmark's."""
    if wanted == "benchmark":
        return benchmark.transform, f"the benchmark {benchmark.name}"
    if wanted is not None:
        transforms = {
            name: weights.transform for name, weights in model.weights.items() if weights.transform is not None
        }
        if (transform := transforms.get(wanted)) is None:
            known = [*transforms, "benchmark"]
            raise InputError(
                f"weights-transform is {wanted!r}; known for {model.name}: {', '.join(known)}"
                + suggest_name(wanted, known)
            )
        return transform(), f"the weights {wanted}"
    if chosen.weights.transform is not None:
        return chosen.weights.transform(), f"the weights {chosen.published}"
    if model.transform is not None:
        return model.transform, f"the network {model.name}"
    return benchmark.transform, f"the benchmark {benchmark.name}"


def _hash_model_source(model: Model) -> str:
    """Return the hash of a model's source. Call it after `build`, which may import modules."""
    return hash_source(model.file) if model.file is not None else ""


def _check_channels(model: Model, module: nn.Module, benchmark: Benchmark) -> None:
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    expected = len((model.transform or benchmark.transform).mean)
    if first is not None and first.in_channels != expected:
        raise InputError(
            f"{model.name} takes images of {first.in_channels} channels, benchmark {benchmark.name} has {expected}"
        )


def _run_trial_batch(network: Network, benchmark: Benchmark) -> Network:
    """Run a trial batch and return the network with its kind of outputs and its classifier."""
    model, gives_features = network.model, network.model.outputs == "features"
    trial = run_trial_batch(
        model.name,
        network.module,
        network.blank(1),
        None if gives_features else benchmark.classes,
        gives_features=gives_features,
    )
    return _add_trial_batch(network, trial)


def _add_trial_batch(network: Network, trial: TrialBatch) -> Network:
    outputs = network.model.outputs if network.model.outputs == "features" else trial.outputs
    model = replace(network.model, classifier=trial.classifier, outputs=outputs)
    notes = list(network.notes)
    if outputs in ("probabilities", "log-probabilities"):
        notes.append(f"{model.name} gives {outputs}, not logits: what needs logits (Energy, MaxLogit, …) is left empty")
    elif outputs == "logits" and trial.classifier is None:
        notes.append(f"no classifier and features are written: {trial.no_classifier}")
    if outputs == "logits" and trial.bounded:
        notes.append(
            f"every output of {model.name} lies between 0 and 1: they are taken as logits; if a sigmoid gives them, as"
            " for several labels of one sample, let it give what the sigmoid reads"
        )
    if trial.changed_buffers:
        named = ", ".join(trial.changed_buffers[:3]) + ", …" * (len(trial.changed_buffers) > 3)
        notes.append(
            f"a forward pass of {model.name} changes its buffers ({named}): caches and detectors know it by their"
            " values before; extract restores them"
        )
    return replace(network, model=model, no_classifier=trial.no_classifier, notes=tuple(notes))
