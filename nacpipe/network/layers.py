"""Which layers are tapped and how each is pooled: the table's aliases, or modules by their paths.

A module that is not in the table is looked at in one pass of two blank images, and its pooling guessed:

    (2, units)                  none
    (2, tokens, units)          sum-tokens
    (2, c, h, w)                sum-nchw, unless its last dimension is as wide as what made it (a Linear or LayerNorm)
    (2, h, w, c)                sum-nhwc
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nacpipe.cache import LayerSpec
from nacpipe.core.text import command_line
from nacpipe.errors import InputError
from nacpipe.network.load import Network
from nacpipe.network.taps import POOLINGS, Taps
from nacpipe.network.weights import first_line

Pools = Sequence[tuple[str, str]]  # (layer's name, pooling), as somebody wants it


class Measured(NamedTuple):
    """The chosen layers, and the widths of what goes to the cache beside them."""

    layers: tuple[LayerSpec, ...]
    classes: int
    features: int
    """0 where the network has no classifier."""
    notes: tuple[str, ...]
    """What was guessed, to be said aloud."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tappable:
    """A module whose output can be tapped."""

    name: str
    """Its alias, or its path where it has none."""
    path: str
    shape: tuple[int, ...]
    """Of its output for one image."""
    pooling: str
    neurons: int
    guessed: bool
    """Whether the pooling is a guess."""
    runs: int
    """How often it runs in a forward pass; the last is tapped."""


@dataclass(slots=True)
class _Seen:
    """What a module did in a forward pass."""

    output: object
    version: int
    """torch's count of changes in place, when the module returned."""
    runs: int
    identity: bool
    """Whether it returned its input itself."""
    used: bool = False
    """Whether the network's output depends on it."""


def measure_layers(network: Network, names: Sequence[str], pools: Pools = ()) -> Measured:
    """Choose the layers, then run one blank image and count their neurons.

    Args:
        network: the network.
        names: aliases or module paths; none means the model's default layers.
        pools: poolings that somebody chose.

    Raises:
        InputError: a layer or pooling is not known, or does not fit the other.
    """
    draft, notes = _choose_layers(network, names, pools)
    try:
        with Taps(network.module, draft, network.model.classifier) as taps:
            tapped = taps(network.blank(1))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _does_not_run(network, error) from error
    layers = tuple(
        LayerSpec(name=s.name, path=s.path, pooling=s.pooling, neurons=tapped.activation[s.name].shape[1])
        for s in draft
    )
    return Measured(
        layers=layers,
        classes=tapped.logits.shape[1],
        features=0 if tapped.features is None else tapped.features.shape[1],
        notes=notes,
    )


def list_layers(network: Network) -> list[Tappable]:
    """Return every module that can be tapped, in the order in which they run last."""
    aliases = {path: alias for alias, (path, _) in network.model.layers.items()}
    found = []
    for path, seen in _watch(network).items():
        if not (path and isinstance(seen.output, Tensor) and _why_not(seen) is None):
            continue
        shape = tuple(seen.output.shape)
        alias = aliases.get(path)
        pooling = network.model.layers[alias][1] if alias else guess_pooling(network.module.get_submodule(path), shape)
        found.append(
            Tappable(
                name=alias or path,
                path=path,
                shape=shape[1:],
                pooling=pooling,
                neurons=shape[1] if pooling == "sum-nchw" else shape[-1],
                guessed=alias is None,
                runs=seen.runs,
            )
        )
    return found


def guess_pooling(module: nn.Module, shape: Sequence[int]) -> str:
    """Guess how a module's output, of 2 to 4 dimensions, becomes one number per neuron.

    Between (n, c, h, w) and (n, h, w, c) decides the width of the module or of the last linear layer or layer norm in
    it; failing that, which two dimensions are equal, since images are square.
    """
    if len(shape) < 4:
        return "none" if len(shape) == 2 else "sum-tokens"
    _, first, middle, last = shape
    width = _width(module)
    if width in (first, last) and first != last:
        return "sum-nhwc" if width == last else "sum-nchw"
    return "sum-nhwc" if first == middle != last else "sum-nchw"


def _width(module: nn.Module) -> int | None:
    for part in reversed(list(module.modules())):
        if isinstance(part, nn.Linear):
            return part.out_features
        if isinstance(part, nn.LayerNorm):
            return int(part.normalized_shape[-1])
    return None


def _choose_layers(network: Network, names: Sequence[str], pools: Pools) -> tuple[list[LayerSpec], tuple[str, ...]]:
    """Return the layers, their neurons not counted yet, and what to say aloud."""
    model = network.model
    names = names or model.default
    where = command_line("layers", model.asked or model.name)
    if not names:
        raise InputError(f"{model.name} has no default layers; choose some with --layers A,B from: {where}")
    modules = dict(network.module.named_modules())
    for name in names:
        if not name or name not in {**model.layers, **modules}:
            raise InputError(
                f"layer {name!r} is not known for {model.name}; known: "
                + (f"{', '.join(model.layers)}, and the modules" if model.layers else "the modules")
                + f" that this lists: {where}"
            )
        if list(names).count(name) > 1:
            raise InputError(f"layer {name!r} is given twice")
    chosen = _check_pools(names, pools)
    table = {**{path: (path, pooling) for path, pooling in model.layers.values()}, **model.layers}
    seen = _watch(network) if any(name not in table for name in names) else {}
    layers, notes = [], []
    for name in names:
        path, pooling = table.get(name, (name, ""))
        if name not in table:
            shape = _check_tappable(name, seen)
            pooling = guess_pooling(modules[path], shape)
            if name not in chosen:
                notes.append(
                    f"layer {name}: its output {_by(shape[1:])} is pooled by {pooling}, which is a guess;"
                    f" another with --pool {shlex.quote(f'{name}=KIND')}"
                )
        layers.append(LayerSpec(name=name, path=path, pooling=chosen.get(name, pooling), neurons=0))
    return layers, tuple(notes)


def _check_pools(names: Sequence[str], pools: Pools) -> dict[str, str]:
    for name, pooling in pools:
        if name not in names:
            raise InputError(f"pool {name}={pooling}: the layers are {', '.join(names)}")
        if pooling not in POOLINGS:
            raise InputError(f"pool {name}={pooling}: known poolings are {', '.join(POOLINGS)}")
    return dict(pools)


def _check_tappable(name: str, seen: dict[str, _Seen]) -> tuple[int, ...]:
    """Return the shape of a module's output for two images."""
    if name not in seen:
        raise InputError(f"layer {name!r} did not run in a forward pass")
    if why := _why_not(seen[name]):
        raise InputError(f"layer {name!r} cannot be tapped: {why}")
    output = seen[name].output
    assert isinstance(output, Tensor)
    return tuple(output.shape)


def _why_not(seen: _Seen) -> str | None:
    """Return why a module cannot be tapped, or None if it can."""
    output = seen.output
    if not isinstance(output, Tensor):
        return f"it returns {type(output).__name__}, not one tensor"
    if output.dim() not in (2, 3, 4) or output.shape[0] != 2:
        return f"for two images it gives {_by(output.shape)}, not two times 1 to 3 dimensions"
    if not (output.requires_grad and seen.used):
        return "nothing leads from the image over it to the logits"
    if seen.identity:
        return "it returns its input as it is; tap the module before it"
    if output._version != seen.version:
        return "what comes after it changes its output in place; tap the module after it"
    return None


def _watch(network: Network) -> dict[str, _Seen]:
    """Run two blank images and return what every module gave, in the order in which they ran last."""
    seen: dict[str, _Seen] = {}

    def keep(path: str, inputs: tuple[object, ...], output: object) -> None:
        before = seen.pop(path, None)
        version = output._version if isinstance(output, Tensor) else 0
        runs = 1 + (before.runs if before else 0)
        seen[path] = _Seen(output, version, runs, identity=any(output is value for value in inputs))

    handles = [
        module.register_forward_hook(lambda _module, inputs, output, path=path: keep(path, inputs, output))
        for path, module in network.module.named_modules()
    ]
    try:
        with torch.enable_grad():
            logits = network.module(network.blank(2).requires_grad_())
        recorded = [one for one in seen.values() if isinstance(one.output, Tensor) and one.output.requires_grad]
        outputs = [one.output for one in recorded if isinstance(one.output, Tensor)]
        for one, gradient in zip(recorded, torch.autograd.grad(logits.sum(), outputs, allow_unused=True), strict=True):
            one.used = gradient is not None
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _does_not_run(network, error) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _does_not_run(network: Network, error: Exception) -> InputError:
    side = network.transform.crop
    return InputError(f"{network.model.name} cannot take images of {side}×{side} pixels: {first_line(error)}")


def _by(shape: Sequence[int]) -> str:
    return "(" + ", ".join(str(n) for n in shape) + ")"
