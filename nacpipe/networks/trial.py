"""The trial batch: a network's outputs for a few random images, checked before anything is written.

images a b c d  ──▶ logits               which linear layer computes them; logits, probabilities or features
images a b c d  ──▶ equal logits         else the network is random
images a b e f  ──▶ equal for a and b    else an image's logits depend on its batch
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nacpipe.errors import InputError, first_line
from nacpipe.networks.batch_runner import BatchRunner, is_out_of_memory
from nacpipe.networks.buffers import kept_buffers
from nacpipe.networks.call import (
    PLAIN_CALL,
    Call,
    cast_floats,
    count_samples,
    describe_input,
    device_of,
    map_tensors,
    name_sample,
    repeat_samples,
    take_rows,
)
from nacpipe.networks.wrappers import find_device_and_dtype, run_eagerly

IMAGES = 4  # in one trial batch
TOLERANCE = 1e-4  # of the logits' spread: the allowed difference of two runs, and of W·f + b and the logits
TWO_CLASSES = "If a sigmoid follows, give logits=lambda z: torch.{}([torch.zeros_like(z), z], 1), which has two classes"
BATCH_DEPENDENCE = 0.1  # of the spread: the difference above which logits depend on the batch


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialBatch:
    """The result of a trial batch."""

    classes: int
    """Width of the output."""
    outputs: str
    """logits, probabilities or log-probabilities."""
    classifier: str | None
    """Path of the last linear layer if W·f + b equals the logits, else None."""
    no_classifier: str
    """The reason why there is none; empty if there is one."""
    changed_buffers: tuple[str, ...] = ()
    """Paths of the buffers that a forward pass changes; they are restored."""
    bounded: bool = False
    """Whether every output lies between 0 and 1 and they are no probabilities, as behind a sigmoid for each class."""


def run_trial_batch(
    name: str,
    network: nn.Module,
    like: Any,  # n samples
    classes: int | None = None,
    *,
    gives_features: bool = False,
    call: Call = PLAIN_CALL,
    examples: bool = False,
) -> TrialBatch:
    """Run a network, in evaluation mode, on random images; the state of random generators is restored.

    Args:
        name: the network's name, for messages.
        network: `frozen`.
        like: a tensor, of which shape, device and type (float or integer) are used, not values; or examples.
        classes: the required width of the output; None accepts any.
        gives_features: the outputs are features, so that neither their kind nor a classifier is determined.
        call: how the network is called.
        examples: whether `like` are samples to run as they are, the first six.

    Raises:
        InputError: the network fails, its output has another shape, it is random in evaluation mode, or an image's
            logits depend on its batch.
    """
    dtype, half = find_device_and_dtype(network)[1], IMAGES // 2
    python = examples or not isinstance(like, Tensor)
    images = cast_floats(repeat_samples(like, IMAGES + half), dtype) if python else _draw_images(like, dtype)
    run = partial(_run, name, network, call, classes, python)
    batch = take_rows(images, 0, IMAGES)
    with _keep_generators(device_of(like)), torch.no_grad(), run_eagerly(), kept_buffers(network) as changed:
        with _record_linear(network) as inputs:
            first = run(batch)
        _check_repeatable(name, network, first, run(batch))
        mixed = run(map_tensors(lambda tensor: torch.cat([tensor[:half], tensor[IMAGES:]]), images))
        without = _name_without_statistics(network)
        allowed = _tolerance(first) if without else BATCH_DEPENDENCE
        if not _alike(first[:half], mixed[:half], allowed * _spread(first)):
            for _ in range(3):  # a random network may have shown it only in this run
                _check_repeatable(name, network, first, run(batch))
            sample = name_sample(images)
            article = "an" if sample == "image" else "a"
            raise InputError(
                f"model {name!r} gives {article} {sample} other logits in another batch: they differ by"
                f" {_distance(first[:half], mixed[:half]):.2g}; look in its forward for batch norms in training"
                f" mode{_name_training(network)}{without}, F.batch_norm with training=True, or statistics of the batch"
            )
        outputs = "logits" if gives_features else name_outputs(torch.cat([first, mixed]))
        if gives_features:
            classifier, reason = None, "its outputs are features"
        elif outputs != "logits":
            classifier, reason = None, f"its outputs are {outputs}, not what a linear layer gives"
        else:
            classifier, reason = find_classifier(network, inputs, first)
    return TrialBatch(
        classes=first.shape[1],
        outputs=outputs,
        classifier=classifier,
        no_classifier=reason,
        changed_buffers=tuple(changed),
        bounded=outputs == "logits" and classifier is None and bool(((first > 0) & (first < 1)).all()),
    )


def find_classifier(
    network: nn.Module,
    inputs: Mapping[str, Tensor],  # path of a linear layer → its input (n, d), in the order in which they ran
    logits: Tensor,  # (n, classes)
) -> tuple[str | None, str]:
    """Return the path of the linear layer whose W·f + b equals the logits and "", or None and the reason.

    The weight is the effective one, after a parametrisation (weight or spectral normalisation).
    """
    reason = f"no linear layer in its forward pass has an input (n, d) and {logits.shape[1]} outputs"
    wanted, epsilon = logits.cpu().double(), torch.finfo(logits.dtype).eps
    for path, features in reversed(list(inputs.items())):
        linear = network.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.detach().cpu().double()
        if features.dim() != 2 or weight.shape != (wanted.shape[1], features.shape[1]) or len(features) > len(wanted):
            continue
        rows = wanted[len(wanted) - len(features) :]  # the last rows, if the batch ran in parts
        bias = torch.zeros(1) if linear.bias is None else linear.bias.detach()
        terms, bias = features.cpu().double(), bias.cpu().double()
        difference = float((terms @ weight.T + bias - rows).abs().max())
        # The largest rounding error of float32 (or TF32) sums and of half types:
        size = float((terms.abs() @ weight.abs().T + bias.abs()).max())
        rounding = (2e-3 if _sums_in_tf32(features.device) else 1e-6) * size
        if epsilon > 1e-5:
            rounding += 2 * epsilon * float(wanted.abs().max())
        if difference <= TOLERANCE * _spread(wanted) + rounding:
            return path, ""
        if reason.startswith("no linear"):
            reason = f"its last linear layer `{path}` does not give the logits: W·f + b differs by {difference:.2g}"
    return None, reason


def name_outputs(outputs: Tensor) -> str:  # (n, classes)
    """Return the kind of outputs: logits, probabilities (rows ≥ 0 that sum to 1) or log-probabilities."""
    values, tolerance = outputs.double(), _tolerance(outputs)
    if outputs.shape[1] < 2 or not bool(values.isfinite().all()):
        return "logits"
    if bool((values >= 0).all() and ((values.sum(dim=1) - 1).abs() <= tolerance).all()):
        return "probabilities"
    if bool((values <= tolerance).all() and (values.logsumexp(dim=1).abs() <= tolerance).all()):
        return "log-probabilities"
    return "logits"


def _run(name: str, network: nn.Module, call: Call, classes: int | None, python: bool, images: Any) -> Tensor:
    """Return the logits of images, (n, classes), on the CPU; in parts if the memory is too small."""
    run = BatchRunner(
        lambda part: _run_once(name, network, call, classes, python, part), device_of(images), python=python
    )
    return torch.cat(list(run(images)))


def _run_once(name: str, network: nn.Module, call: Call, classes: int | None, python: bool, images: Any) -> Tensor:
    count = count_samples(images)
    try:
        output = call.run(network, images)
    except Exception as error:  # user code may raise any error
        if is_out_of_memory(error):
            raise
        what = f"inputs {shorten(describe_input(images)['description'])}"
        if isinstance(images, Tensor) and images.dim() == 4 and images.shape[2] == images.shape[3]:
            what = f"images of {images.shape[-1]} pixels"
        advice = ""
        if python and call.prepare is None and isinstance(error, TypeError) and not isinstance(images, Tensor):
            called = "keywords" if isinstance(images, Mapping) else "arguments of their own"
            advice = (
                f"; its inputs are given as {called}: prepare=lambda batch: (batch,) gives them as one, prepare= of"
                " your own others"
            )
        text = f"model {name!r} fails on {what}: {type(error).__name__}: {first_line(error)}{advice}"
        raise InputError(text) from error
    floats = isinstance(output, Tensor) and output.dim() == 2 and output.is_floating_point()
    if floats and output.shape[0] == count and classes in (None, output.shape[1]):
        logits: Tensor = output.detach().cpu().clone()  # on the CPU, because MPS has no float64
        return logits
    description = type(output).__name__
    if isinstance(output, Tensor):
        description = f"{tuple(output.shape)}" + ("" if output.is_floating_point() else f" of {output.dtype}")
    wanted = f"({count}, {'classes' if classes is None else classes})"
    kind = name_sample(images)
    advice = "; logits= is a function that takes them out of it" if python and call.logits is None else ""
    if isinstance(output, Tensor) and not output.is_floating_point():
        advice = "; these are classes: let it give the numbers before the argmax"
    elif advice and isinstance(output, Tensor) and output.dim() == 1:
        advice = f". {TWO_CLASSES.format('stack')}"
    raise InputError(f"model {name!r} gives {description} for {count} {kind}s; expected are logits, {wanted}{advice}")


def shorten(text: str, most: int = 200) -> str:
    """Cut a description of inputs, which may name many, for a message of one line."""
    return text if len(text) <= most else f"{text[:most]}…"


def _check_repeatable(name: str, network: nn.Module, first: Tensor, again: Tensor) -> None:
    """Refuse logits (n, classes) that differ between two runs."""
    if not _alike(first, again, _tolerance(first) * _spread(first)):
        raise InputError(
            f"model {name!r} is random in evaluation mode: the same images give logits that differ by"
            f" {_distance(first, again):.2g}; look in its forward for F.dropout without training=self.training, modules"
            f" in training mode{_name_training(network)}, random crops or noise"
        )


def _name_training(network: nn.Module) -> str:
    """Return the names of modules that are in training mode after a forward pass, as a part of a message."""
    paths = [path for path, module in network.named_modules() if path and getattr(module, "training", False)]
    return f" (after a forward pass: {', '.join(paths[:3])})" if paths else ""


def _name_without_statistics(network: nn.Module) -> str:
    """Return batch norms that have no running statistics, as a part of a message: they take the batch's always."""
    paths = [
        path
        for path, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
    ]
    return f" or with track_running_stats=False ({', '.join(paths[:3])})" if paths else ""


def _alike(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True)


def _distance(a: Tensor, b: Tensor) -> float:
    return float(torch.nan_to_num((a - b).abs().double()).max())


def _spread(logits: Tensor) -> float:
    finite = logits[logits.isfinite()].double()
    return float(finite.max() - finite.min()) if finite.numel() else 0.0


def _tolerance(outputs: Tensor) -> float:
    """Return the allowed difference of two runs, for outputs of size 1."""
    return max(TOLERANCE, 2 * torch.finfo(outputs.dtype).eps)


def _sums_in_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32


def _draw_images(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return random images of this shape, of the network's type; the last two have three times the deviation."""
    generator = torch.Generator().manual_seed(0)
    shape = (IMAGES + IMAGES // 2, *like.shape[1:])
    if not like.is_floating_point():
        return torch.randint(0, 256, shape, generator=generator).to(like.device, like.dtype)
    images = torch.randn(shape, generator=generator)
    images[IMAGES:] *= 3
    return images.to(like.device, dtype)


@contextmanager
def _keep_generators(device: torch.device) -> Iterator[None]:
    """Restore the states of torch's, numpy's and Python's global random generators afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    mps = torch.mps.get_rng_state() if device.type == "mps" else None
    devices = [device] if device.type in ("cuda", "xpu") else []
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if mps is not None:
            torch.mps.set_rng_state(mps)


@contextmanager
def _record_linear(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the inputs of linear layers, in the order of their last runs."""
    inputs: dict[str, Tensor] = {}

    def keep(path: str, layer_input: Tensor | None) -> None:
        inputs.pop(path, None)
        if layer_input is not None:
            inputs[path] = layer_input.detach().clone()  # a later module may change it in place

    handles = [
        module.register_forward_pre_hook(
            lambda _module, args, kwargs, path=path: keep(path, first_tensor(args, kwargs)), with_kwargs=True
        )
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor | None:
    """Return the first tensor among a module's positional and keyword arguments, or None."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
