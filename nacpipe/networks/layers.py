"""Choosing the tapped layers and the pooling of each, by the table's aliases or by module paths.

For a module that is not in the table, two blank images run through the network, and its output's shape decides:

    (2, units)                  none
    (2, tokens, units)          sum-tokens
    (2, c, h, w)                sum-nchw, or sum-nhwc if the last dimension is the width of its Linear or LayerNorm
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
from nacpipe.networks.models import suggest_name
from nacpipe.networks.taps import NO_GRADIENT, POOLINGS, Taps, clone_in_graph, start_graph, why_no_gradient
from nacpipe.networks.wrappers import is_scripted, run_eagerly
from nacpipe.text import command_line

Layers = Sequence[str] | Mapping[str, str]  # aliases or module paths, NAME=PATH among them; or name → path
Poolings = Sequence[tuple[str, str]]  # (layer's name, pooling), as requested


class MeasuredLayers(NamedTuple):
    """The chosen layers, and the widths of the cache's other arrays."""

    layers: tuple[LayerSpec, ...]
    classes: int
    features: int
    """0 if the network has no classifier."""
    notes: tuple[str, ...]
    """Notes on guessed poolings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tappable:
    """A module whose output can be tapped."""

    name: str
    """Its alias, or its path if it has none."""
    path: str
    shape: tuple[int, ...]
    """The shape of its output for one image."""
    pooling: str
    neurons: int
    guessed: bool
    """Whether the pooling is a guess."""
    runs: int
    """How often it runs in a forward pass; the last run is tapped."""


@dataclass(slots=True)
class _ModuleOutput:
    """The output of a module in a forward pass."""

    output: object
    runs: int
    identity: bool
    """Whether the module returned its input object unchanged."""
    kept: Tensor | None = field(repr=False)
    """The output in the graph; None if it cannot be in one."""
    used: bool = False
    """Whether the logits have a gradient with respect to it."""


def name_layers(layers: Layers) -> dict[str, str]:
    """Return name in the cache → alias or module path; `NAME=PATH` gives a layer another name.

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


def measure_layers(
    network: Network, layers: Layers, poolings: Poolings = (), *, gradients: bool = True
) -> MeasuredLayers:
    """Choose the layers, then run a blank image and count their neurons.

    Args:
        network: the network.
        layers: aliases or module paths, or `NAME=PATH`, or a mapping; empty: the model's default layers.
        poolings: (layer's name, pooling) in place of the table's or the guessed ones.
        gradients: whether they need a gradient.

    Raises:
        InputError: a layer or pooling is not known, they do not fit each other, or a layer has no gradient.
    """
    draft, notes = _choose_layers(network, layers, poolings, gradients)
    model = network.model
    try:
        with Taps(network.module, draft, model.classifier, outputs=model.outputs, gradients=gradients) as taps:
            tapped = taps(network.blank(1))
    except InputError:
        raise
    except Exception as error:  # user code may raise any error
        raise _forward_error(network, error) from error
    measured = tuple(
        LayerSpec(name=s.name, path=s.path, pooling=s.pooling, neurons=tapped.activation[s.name].shape[1])
        for s in draft
    )
    return MeasuredLayers(
        layers=measured,
        classes=tapped.logits.shape[1],
        features=0 if tapped.features is None else tapped.features.shape[1],
        notes=notes,
    )


def list_layers(network: Network) -> list[Tappable]:
    """Return every module that can be tapped, in the order of their last runs."""
    aliases = {path: alias for alias, (path, _) in network.model.layers.items()}
    tappables = []
    for path, seen in _record_outputs(network).items():
        if not (path and isinstance(seen.output, Tensor) and _why_untappable(seen) is None and seen.used):
            continue
        shape = tuple(seen.output.shape)
        alias = aliases.get(path)
        pooling = network.model.layers[alias][1] if alias else guess_pooling(network.module.get_submodule(path), shape)
        tappables.append(
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
    return tappables


def guess_pooling(module: nn.Module, shape: Sequence[int]) -> str:
    """Guess the pooling of a module's output, of 2 to 4 dimensions.

    The width of the last linear layer or layer norm in the module decides between (n, c, h, w) and (n, h, w, c).
    Without one, the two equal dimensions are height and width, because images are square.
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


def _choose_layers(
    network: Network, layers: Layers, poolings: Poolings, gradients: bool
) -> tuple[list[LayerSpec], tuple[str, ...]]:
    """Return the layers, with 0 neurons until they are counted, and notes."""
    model = network.model
    wanted = name_layers(layers or model.default)
    where = command_line("layers", model.model_argument or model.name)
    if not wanted:
        raise InputError(f"{model.name} has no default layers; choose some with --layers A,B from: {where}")
    modules = dict(network.module.named_modules())
    for target in wanted.values():
        if not target or target not in {**model.layers, **modules}:
            raise InputError(
                f"layer {target!r} is not known for {model.name}; known: "
                + (f"{', '.join(model.layers)}, and the modules" if model.layers else "the modules")
                + f" that this lists: {where}{suggest_name(target, [*model.layers, *modules])}"
            )
    chosen = _check_pools(list(wanted), poolings)
    table = {**{path: (path, pooling) for path, pooling in model.layers.values()}, **model.layers}
    seen = _record_outputs(network, gradients) if any(target not in table for target in wanted.values()) else {}
    specs, notes = [], []
    for name, target in wanted.items():
        path, pooling = table.get(target, (target, ""))
        if target not in table:
            shape = _check_tappable(name, path, modules[path], seen, gradients)
            pooling = guess_pooling(modules[path], shape)
            if name not in chosen:
                notes.append(
                    f"layer {name}: its output {_format_shape(shape[1:])} is pooled by {pooling}, which is a guess;"
                    f" another with --pooling {shlex.quote(f'{name}=KIND')}"
                )
        specs.append(LayerSpec(name=name, path=path, pooling=chosen.get(name, pooling), neurons=0))
    return specs, tuple(notes)


def _check_pools(names: Sequence[str], poolings: Poolings) -> dict[str, str]:
    for name, pooling in poolings:
        if name not in names:
            raise InputError(f"pooling {name}={pooling}: the layers are {', '.join(names)}")
        if pooling not in POOLINGS:
            raise InputError(f"pooling {name}={pooling}: known poolings are {', '.join(POOLINGS)}")
    return dict(poolings)


def _check_tappable(
    name: str, path: str, module: nn.Module, seen: dict[str, _ModuleOutput], gradients: bool
) -> tuple[int, ...]:
    """Return the shape of a module's output for two images."""
    if path not in seen:
        why = " (it is part of a scripted module, which takes no hooks)" if is_scripted(module) else ""
        raise InputError(f"layer {name!r} did not run in a forward pass{why}")
    if (reason := _why_untappable(seen[path], gradients)) is not None:
        raise InputError(f"layer {name!r} cannot be tapped: {reason}")
    if gradients and not seen[path].used:
        raise InputError(f"layer {name!r} {NO_GRADIENT}")
    output = seen[path].output
    assert isinstance(output, Tensor)
    return tuple(output.shape)


def _why_untappable(seen: _ModuleOutput, gradients: bool = True) -> str | None:
    """Return why a module's output cannot be tapped, or None if it can."""
    output = seen.output
    if not isinstance(output, Tensor):
        return f"it returns {type(output).__name__}, not one tensor"
    if output.dim() not in (2, 3, 4) or output.shape[0] != 2:
        return f"for two images it gives {_format_shape(output.shape)}, not two times 1 to 3 dimensions"
    if gradients and (why := why_no_gradient(output)):
        return f"it gives {why}"
    if seen.identity:
        return "it returns its input unchanged; tap the module before it"
    return None


def _record_outputs(network: Network, gradients: bool = True) -> dict[str, _ModuleOutput]:
    """Run two blank images and return every module's output, in the order of their last runs.

    Every output outside a graph starts a new one: the first module's, and those after .detach() or under torch.no_grad.
    The next module gets a clone of the output, because it may change its input in place.
    """
    seen: dict[str, _ModuleOutput] = {}
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
        seen[path] = _ModuleOutput(output, runs, identity=same, kept=kept)
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
        if gradients:
            _mark_used(logits, list(seen.values()))
    except InputError:
        raise
    except Exception as error:  # user code may raise any error
        raise _forward_error(network, error) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _mark_used(logits: Tensor, seen: Sequence[_ModuleOutput]) -> None:
    """Set `used` of the outputs that the logits have a gradient with respect to."""
    kept = [(module_output, module_output.kept) for module_output in seen if module_output.kept is not None]
    if not (logits.requires_grad and kept):
        return
    total = logits.sum()
    try:
        for (module_output, _), gradient in zip(
            kept, torch.autograd.grad(total, [k for _, k in kept], allow_unused=True, retain_graph=True), strict=True
        ):
            module_output.used = gradient is not None
    except RuntimeError:  # an operation has no derivative; outputs after it still have one
        for module_output, output in kept:
            with contextlib.suppress(RuntimeError):
                module_output.used = (
                    torch.autograd.grad(total, output, allow_unused=True, retain_graph=True)[0] is not None
                )


def _forward_error(network: Network, error: Exception) -> InputError:
    side, name = network.transform.crop, network.model.name
    if is_out_of_memory(error):
        return InputError(f"{name}: two images do not fit the memory of {network.device}; try --device cpu")
    return InputError(f"{name} cannot take images of {side}×{side} pixels: {first_line(error)}")


def _format_shape(shape: Sequence[int]) -> str:
    return "(" + ", ".join(str(n) for n in shape) + ")"
