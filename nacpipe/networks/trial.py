"""What a network does with a few random images, tried before anything is written.

images a b c d  ──▶ logits           which linear layer gives them; are they logits at all
images a b c d  ──▶ the same logits  or the network is random
images a b e f  ──▶ a and b the same or an image's logits depend on its batch
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nacpipe.errors import InputError
from nacpipe.networks.batch_runner import BatchRunner, is_out_of_memory
from nacpipe.networks.checkpoints import first_line
from nacpipe.networks.wrappers import find_place, run_eagerly

IMAGES = 4  # of one trial batch
SAME = 1e-4  # of the logits' spread: what two runs, or W·f + b and the logits, may differ by
COMPANY = (
    0.1  # of the spread: by so much, an image's logits depend on its batch. Dynamic quantisation has a few hundredths
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a trial showed."""

    classes: int
    """Width of the output."""
    outputs: str
    """logits, probabilities or log-probabilities."""
    classifier: str | None
    """Path of the last linear layer, where W·f + b equals the logits."""
    no_classifier: str
    """Why there is none; empty where there is one."""


def run_trial(
    name: str,
    network: nn.Module,
    like: Tensor,  # (n, …) images of the kind to come, of any content
    classes: int | None = None,
    *,
    embeds: bool = False,
) -> Trial:
    """Run a network, in evaluation mode, on random images like these; random generators are left as they were.

    Args:
        name: the network's, for messages.
        network: `frozen`.
        like: their shape and device count, and whether they are whole numbers.
        classes: how many the output must have; None takes any number.
        embeds: the output is known to be features: neither logits nor their classifier are looked for.

    Raises:
        InputError: it fails, gives something else than logits for that many classes, is random in evaluation mode, or
            gives an image other logits beside other images.
    """
    images, half = _draw_images(like, find_place(network)[1]), IMAGES // 2
    with _keep_generators(like.device), torch.no_grad(), run_eagerly():
        with _record_linear(network) as inputs:
            first = _run(name, network, images[:IMAGES], classes)
        _check_repeatable(name, network, first, _run(name, network, images[:IMAGES], classes))
        mixed = _run(name, network, torch.cat([images[:half], images[IMAGES:]]), classes)
        if not _alike(first[:half], mixed[:half], COMPANY * _spread(first)):
            for _ in range(3):  # it may be random, and have shown it only now
                _check_repeatable(name, network, first, _run(name, network, images[:IMAGES], classes))
            raise InputError(
                f"model {name!r} gives an image other logits beside other images: they differ by"
                f" {_distance(first[:half], mixed[:half]):.2g}; look in its forward for batch norms in training"
                f" mode{_name_training(network)}, F.batch_norm with training=True, or statistics of the batch"
            )
        outputs = "logits" if embeds else name_outputs(torch.cat([first, mixed]))
        if embeds:
            classifier, reason = None, "its outputs are features"
        elif outputs != "logits":
            classifier, reason = None, f"its outputs are {outputs}, not what a linear layer gives"
        else:
            classifier, reason = find_classifier(network, inputs, first)
    return Trial(classes=first.shape[1], outputs=outputs, classifier=classifier, no_classifier=reason)


def find_classifier(
    network: nn.Module,
    inputs: Mapping[str, Tensor],  # path of a linear layer → its input (n, d), in the order in which they ran
    logits: Tensor,  # (n, classes)
) -> tuple[str | None, str]:
    """Return the path of the linear layer whose W·f + b equals the logits, and, where none does, why.

    The weight is the effective one: that of a parametrised layer (weight or spectral normalisation) is computed.
    """
    reason = f"no linear layer in its forward pass has an input (n, d) and {logits.shape[1]} outputs"
    wanted, narrow = logits.cpu().double(), torch.finfo(logits.dtype).eps
    for path, features in reversed(list(inputs.items())):
        linear = network.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.detach().cpu().double()
        if features.dim() != 2 or weight.shape != (wanted.shape[1], features.shape[1]) or len(features) > len(wanted):
            continue
        rows = wanted[len(wanted) - len(features) :]  # the last of them, where the memory is short
        bias = torch.zeros(1) if linear.bias is None else linear.bias.detach()
        terms, bias = features.cpu().double(), bias.cpu().double()
        difference = float((terms @ weight.T + bias - rows).abs().max())
        # What float32 (or TF32) sums and the rounding of half types may make of it:
        size = float((terms.abs() @ weight.abs().T + bias.abs()).max())
        rounding = (2e-3 if _sums_in_tf32(features.device) else 1e-6) * size
        if narrow > 1e-5:
            rounding += 2 * narrow * float(wanted.abs().max())
        if difference <= SAME * _spread(wanted) + rounding:
            return path, ""
        if reason.startswith("no linear"):
            reason = f"its last linear layer `{path}` does not give the logits: W·f + b differs by {difference:.2g}"
    return None, reason


def name_outputs(outputs: Tensor) -> str:  # (n, classes)
    """Return what a network's outputs are: logits, probabilities (rows ≥ 0 that sum to 1) or their logarithms."""
    wide, within = outputs.double(), _tolerance(outputs)
    if outputs.shape[1] < 2 or not bool(wide.isfinite().all()):
        return "logits"
    if bool((wide >= 0).all() and ((wide.sum(dim=1) - 1).abs() <= within).all()):
        return "probabilities"
    if bool((wide <= within).all() and (wide.logsumexp(dim=1).abs() <= within).all()):
        return "log-probabilities"
    return "logits"


def _run(name: str, network: nn.Module, images: Tensor, classes: int | None) -> Tensor:
    """Return the logits of images, (n, classes), on the CPU; of fewer at once where the memory is short."""
    run = BatchRunner(lambda part: _run_once(name, network, part, classes), images.device)
    return torch.cat(list(run(images)))


def _run_once(name: str, network: nn.Module, images: Tensor, classes: int | None) -> Tensor:
    try:
        output = network(images)
    except Exception as error:  # it is anyone's code
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"model {name!r} fails on images of {images.shape[-1]} pixels: {type(error).__name__}: {first_line(error)}"
        ) from error
    floats = isinstance(output, Tensor) and output.dim() == 2 and output.is_floating_point()
    if floats and output.shape[0] == len(images) and classes in (None, output.shape[1]):
        found: Tensor = output.detach().cpu().clone()  # where there is float64, which MPS has not
        return found
    what = type(output).__name__
    if isinstance(output, Tensor):
        what = f"{tuple(output.shape)}" + ("" if output.is_floating_point() else f" of {output.dtype}")
    wanted = f"({len(images)}, {'classes' if classes is None else classes})"
    raise InputError(f"model {name!r} gives {what} for {len(images)} images; wanted are logits, {wanted}")


def _check_repeatable(name: str, network: nn.Module, first: Tensor, again: Tensor) -> None:
    """Refuse logits (n, classes) that are others the second time."""
    if not _alike(first, again, _tolerance(first) * _spread(first)):
        raise InputError(
            f"model {name!r} is random in evaluation mode: the same images give logits that differ by"
            f" {_distance(first, again):.2g}; look in its forward for F.dropout without training=self.training, modules"
            f" in training mode{_name_training(network)}, random crops or noise"
        )


def _name_training(network: nn.Module) -> str:
    """Name modules that forward has put in training mode."""
    paths = [path for path, module in network.named_modules() if path and getattr(module, "training", False)]
    return f" (after a forward pass: {', '.join(paths[:3])})" if paths else ""


def _alike(a: Tensor, b: Tensor, within: float) -> bool:
    return torch.allclose(a, b, rtol=0, atol=within, equal_nan=True)


def _distance(a: Tensor, b: Tensor) -> float:
    return float(torch.nan_to_num((a - b).abs().double()).max())


def _spread(logits: Tensor) -> float:
    finite = logits[logits.isfinite()].double()
    return float(finite.max() - finite.min()) if finite.numel() else 0.0


def _tolerance(outputs: Tensor) -> float:
    """What a run may differ by from another, of outputs of size 1."""
    return max(SAME, 2 * torch.finfo(outputs.dtype).eps)


def _sums_in_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32


def _draw_images(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Random images like these, of the network's type; the last two of three times the size, with other statistics."""
    generator = torch.Generator().manual_seed(0)
    shape = (IMAGES + IMAGES // 2, *like.shape[1:])
    if not like.is_floating_point():
        return torch.randint(0, 256, shape, generator=generator).to(like.device, like.dtype)
    images = torch.randn(shape, generator=generator)
    images[IMAGES:] *= 3
    return images.to(like.device, dtype)


@contextmanager
def _keep_generators(device: torch.device) -> Iterator[None]:
    """Leave torch's, numpy's and Python's global random generators as they are found."""
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
    """Record the inputs of linear layers, in the order in which they run last."""
    inputs: dict[str, Tensor] = {}

    def keep(path: str, given: Tensor | None) -> None:
        inputs.pop(path, None)
        if given is not None:
            inputs[path] = given.detach().clone()  # what comes later may change it in place

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
    """Return the input of a module that takes one: by place, or by whatever name."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
