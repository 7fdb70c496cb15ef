"""Which layers are tapped and how each is pooled: the table's aliases, or modules by their paths.

A module that is not in the table is looked at in one pass of two blank images, and its pooling guessed:

    (2, units)                  none
    (2, tokens, units)          sum-tokens
    (2, c, h, w)                sum-nchw, unless its last dimension is as wide as what made it (a Linear or LayerNorm)
    (2, h, w, c)                sum-nhwc
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nacpipe.cache import LayerSpec
from nacpipe.errors import InputError
from nacpipe.networks.batch_runner import is_out_of_memory
from nacpipe.networks.build import Network
from nacpipe.networks.checkpoints import first_line
from nacpipe.networks.models import hint
from nacpipe.networks.taps import NO_GRADIENT, POOLINGS, Taps, clone_in_graph, start_graph, why_no_gradient
from nacpipe.networks.wrappers import is_scripted, run_eagerly
from nacpipe.text import command_line

Layers = Sequence[str] | Mapping[str, str]  # aliases or module paths, NAME=PATH among them; or name → path
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
    runs: int
    identity: bool
    """Whether it returned its input itself, unchanged."""
    kept: Tensor | None = field(repr=False)
    """Its output in the graph; None where it can be in none."""
    used: bool = False
    """Whether a gradient flows back to it."""


def name_layers(layers: Layers) -> dict[str, str]:
    """Return layers as name in the cache → alias or module path; `NAME=PATH` gives a layer another name.

    Raises:
        InputError: a name has no path, or is given twice.
    """
    if isinstance(layers, Mapping):
        pairs = list(layers.items())
    else:
        pairs = []
        for layer in layers:
            name, equals, path = layer.partition("=")
            if equals and not (name and path):
                raise InputError(f"layer {layer!r} is not NAME=PATH, such as maps=features")
            pairs.append((name, path if equals else name))
    for name, _ in pairs:
        if [other for other, _ in pairs].count(name) > 1:
            raise InputError(f"layer {name!r} is given twice")
    return dict(pairs)


def measure_layers(network: Network, layers: Layers, poolings: Pools = ()) -> Measured:
    """Choose the layers, then run one blank image and count their neurons.

    Args:
        network: the network.
        layers: aliases or module paths, or `NAME=PATH`, or a mapping; none means the model's default layers.
        pools: poolings that somebody chose.

    Raises:
        InputError: a layer or pooling is not known, does not fit the other, or has no gradient.
    """
    draft, notes = _choose_layers(network, layers, poolings)
    model = network.model
    try:
        with Taps(network.module, draft, model.classifier, outputs=model.outputs) as taps:
            tapped = taps(network.blank(1))
    except InputError:
        raise
    except Exception as error:  # it is anyone's code
        raise _does_not_run(network, error) from error
    measured = tuple(
        LayerSpec(name=s.name, path=s.path, pooling=s.pooling, neurons=tapped.activation[s.name].shape[1])
        for s in draft
    )
    return Measured(
        layers=measured,
        classes=tapped.logits.shape[1],
        features=0 if tapped.features is None else tapped.features.shape[1],
        notes=notes,
    )


def list_layers(network: Network) -> list[Tappable]:
    """Return every module that can be tapped, in the order in which they run last."""
    aliases = {path: alias for alias, (path, _) in network.model.layers.items()}
    found = []
    for path, seen in _watch(network).items():
        if not (path and isinstance(seen.output, Tensor) and _why_not(seen) is None and seen.used):
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


def _choose_layers(network: Network, layers: Layers, poolings: Pools) -> tuple[list[LayerSpec], tuple[str, ...]]:
    """Return the layers, their neurons not counted yet, and what to say aloud."""
    model = network.model
    wanted = name_layers(layers or model.default)
    where = command_line("layers", model.asked or model.name)
    if not wanted:
        raise InputError(f"{model.name} has no default layers; choose some with --layers A,B from: {where}")
    modules = dict(network.module.named_modules())
    for place in wanted.values():
        if not place or place not in {**model.layers, **modules}:
            raise InputError(
                f"layer {place!r} is not known for {model.name}; known: "
                + (f"{', '.join(model.layers)}, and the modules" if model.layers else "the modules")
                + f" that this lists: {where}{hint(place, [*model.layers, *modules])}"
            )
    chosen = _check_pools(list(wanted), poolings)
    table = {**{path: (path, pooling) for path, pooling in model.layers.values()}, **model.layers}
    seen = _watch(network) if any(place not in table for place in wanted.values()) else {}
    specs, notes = [], []
    for name, place in wanted.items():
        path, pooling = table.get(place, (place, ""))
        if place not in table:
            shape = _check_tappable(name, path, modules[path], seen)
            pooling = guess_pooling(modules[path], shape)
            if name not in chosen:
                notes.append(
                    f"layer {name}: its output {_by(shape[1:])} is pooled by {pooling}, which is a guess;"
                    f" another with --pooling {shlex.quote(f'{name}=KIND')}"
                )
        specs.append(LayerSpec(name=name, path=path, pooling=chosen.get(name, pooling), neurons=0))
    return specs, tuple(notes)


def _check_pools(names: Sequence[str], poolings: Pools) -> dict[str, str]:
    for name, pooling in poolings:
        if name not in names:
            raise InputError(f"pool {name}={pooling}: the layers are {', '.join(names)}")
        if pooling not in POOLINGS:
            raise InputError(f"pool {name}={pooling}: known poolings are {', '.join(POOLINGS)}")
    return dict(poolings)


def _check_tappable(name: str, path: str, module: nn.Module, seen: dict[str, _Seen]) -> tuple[int, ...]:
    """Return the shape of a module's output for two images."""
    if path not in seen:
        why = " (it is part of a scripted module, which takes no hooks)" if is_scripted(module) else ""
        raise InputError(f"layer {name!r} did not run in a forward pass{why}")
    if (reason := _why_not(seen[path])) is not None:
        raise InputError(f"layer {name!r} cannot be tapped: {reason}")
    if not seen[path].used:
        raise InputError(f"layer {name!r} {NO_GRADIENT}")
    output = seen[path].output
    assert isinstance(output, Tensor)
    return tuple(output.shape)


def _why_not(seen: _Seen) -> str | None:
    """Return why a module's output cannot be tapped, or None if it can."""
    output = seen.output
    if not isinstance(output, Tensor):
        return f"it returns {type(output).__name__}, not one tensor"
    if output.dim() not in (2, 3, 4) or output.shape[0] != 2:
        return f"for two images it gives {_by(output.shape)}, not two times 1 to 3 dimensions"
    if why := why_no_gradient(output):
        return f"it gives {why}"
    if seen.identity:
        return "it returns its input as it is; tap the module before it"
    return None


def _watch(network: Network) -> dict[str, _Seen]:
    """Run two blank images and return what every module gave, in the order in which they ran last.

    A graph begins anew at every output that is in none (the first module's, and what comes after .detach() or runs
    under torch.no_grad), and what follows an output is given a clone, so that it may change it in place.
    """
    seen: dict[str, _Seen] = {}
    versions: dict[str, list[tuple[Tensor, int]]] = {}

    def before(path: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        versions[path] = [(value, -1 if value.is_inference() else value._version) for value in tensors]

    def keep(path: str, output: object) -> object:
        same = any(
            output is value and (version == -1 or value._version == version) for value, version in versions[path]
        )
        kept = None
        if isinstance(output, Tensor) and output.is_floating_point():
            kept = start_graph(output)
        runs = 1 + (seen.pop(path).runs if path in seen else 0)
        seen[path] = _Seen(output, runs, identity=same, kept=kept)
        return output if kept is None else clone_in_graph(kept)

    handles: list[RemovableHandle] = []
    for path, module in network.module.named_modules():
        if path and not is_scripted(module):
            handles += [
                module.register_forward_pre_hook(
                    lambda _module, args, kwargs, path=path: before(path, args, kwargs), with_kwargs=True
                ),
                module.register_forward_hook(lambda _module, _args, output, path=path: keep(path, output)),
            ]
    try:
        with torch.enable_grad(), run_eagerly():
            logits = network.module(network.blank(2))
        _mark_used(logits, list(seen.values()))
    except InputError:
        raise
    except Exception as error:  # it is anyone's code
        raise _does_not_run(network, error) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _mark_used(logits: Tensor, seen: Sequence[_Seen]) -> None:
    """Find out to which outputs a gradient of the logits flows back."""
    kept = [(one, one.kept) for one in seen if one.kept is not None]
    if not (logits.requires_grad and kept):
        return
    total = logits.sum()
    try:
        for (one, _), gradient in zip(
            kept, torch.autograd.grad(total, [k for _, k in kept], allow_unused=True, retain_graph=True), strict=True
        ):
            one.used = gradient is not None
    except RuntimeError:  # something has no derivative; what comes after it has
        for one, output in kept:
            with contextlib.suppress(RuntimeError):
                one.used = torch.autograd.grad(total, output, allow_unused=True, retain_graph=True)[0] is not None


def _does_not_run(network: Network, error: Exception) -> InputError:
    side, name = network.transform.crop, network.model.name
    if is_out_of_memory(error):
        return InputError(f"{name}: two images do not fit the memory of {network.device}; try --device cpu")
    return InputError(f"{name} cannot take images of {side}×{side} pixels: {first_line(error)}")


def _by(shape: Sequence[int]) -> str:
    return "(" + ", ".join(str(n) for n in shape) + ")"
