"""Choosing the tapped layers and the pooling of each, by the table's aliases or by module paths.

For a module that is not in the table, two samples run through the network, and its output's shape and the modules in it
decide (poolings.py).
"""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nacpipe.cache import LayerSpec
from nacpipe.cache.layout import free_name, layer_name_problem
from nacpipe.errors import InputError, first_line
from nacpipe.networks.batch_runner import is_out_of_memory
from nacpipe.networks.build import Network
from nacpipe.networks.call import first_output, replace_first, tensors_of
from nacpipe.networks.models import suggest_name
from nacpipe.networks.poolings import POOLINGS, guess_pooling, known_layout
from nacpipe.networks.taps import NO_GRADIENT, Taps, clone_in_graph, fast_path, start_graph, why_no_gradient
from nacpipe.networks.wrappers import is_scripted, run_eagerly
from nacpipe.text import command_line, spell_option

Layers = Sequence[str] | Mapping[str, str]  # aliases or module paths, NAME=PATH among them; or name → path
SHOWN = 8  # paths of modules in a message
AUTO = "auto"
ENDS = 4  # layers that are tapped by default, as in the paper
FORWARD_ONLY = 4  # as many more without gradients: a layer then costs half the space, and no backward pass
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
    first: Tensor | None = field(repr=False)
    """The output, or the first tensor of a tuple or mapping."""
    samples: int
    """Of the input."""
    time_first: bool
    """Whether (length, samples, units) is an output too: a module of the network is not batch_first."""
    runs: int
    identity: bool
    """Whether the module returned its input object unchanged."""
    kept: Tensor | None = field(repr=False)
    """The output in the graph; None if it cannot be in one."""
    used: bool = False
    """Whether the logits have a gradient with respect to it."""
    gives_logits: bool = False
    """Whether it is the logits but for a factor, or a term of them: a head's output."""


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
        layers: aliases or module paths, or `NAME=PATH`, or a mapping; empty or `auto`: the model's default layers, or
            those of `choose_layers`.
        poolings: (layer's name, pooling) in place of the table's or the guessed ones.
        gradients: whether they need a gradient.

    Raises:
        InputError: a layer or pooling is not known, they do not fit each other, or a layer has no gradient.
    """
    automatic = is_automatic(network, layers)
    chosen = automatic and not (gradients and network.model.default)
    if chosen:
        layers = choose_layers(network, more=0 if gradients else FORWARD_ONLY, gradients=gradients)
    elif automatic:
        layers = network.model.default
    draft, notes = _choose_layers(network, layers, poolings, gradients, notes_guesses=not chosen)
    model = network.model
    try:
        with Taps(
            network.module, draft, model.classifier, outputs=model.outputs, gradients=gradients, call=network.call
        ) as taps:
            tapped = taps(network.blank(1))
    except InputError:
        raise
    except Exception as error:  # user code may raise any error
        raise _forward_error(network, error) from error
    measured = tuple(
        LayerSpec(name=s.name, path=s.path, pooling=s.pooling, neurons=tapped.activation[s.name].shape[1])
        for s in draft
    )
    if chosen:
        widths = ", ".join(f"{s.name} ({s.neurons} neurons, {s.pooling})" for s in measured)
        where = command_line("layers", network.model.model_argument) if network.model.model_argument else ""
        notes = (f"layers chosen: {widths}" + (f"; others: {where}" if where else ""), *notes)
    return MeasuredLayers(
        layers=measured,
        classes=tapped.logits.shape[1],
        features=0 if tapped.features is None else tapped.features.shape[1],
        notes=notes,
    )


def is_automatic(network: Network, layers: Layers) -> bool:
    """Return whether layers are to be chosen: none are named, or `auto`, which is no module's name."""
    if not layers:
        return True
    return not isinstance(layers, Mapping) and list(layers) == [AUTO] and AUTO not in network.model.layers


def choose_layers(network: Network, *, more: int = 0, gradients: bool = True) -> dict[str, str]:
    """Choose the classifier's input and the ends of stages: name in the cache → module path, `ENDS` and `more`.

    A stage is a run of modules with outputs of one shape. The modules are the network's own children; a child that
    holds most of the parameters is taken apart, and a chain of modules too, while there are fewer ends than wanted.
    The end of a stage that is the classifier's input but for a factor (before an average over positions, say) is left
    out. What is wanted beyond the ends comes from inside the stages: two blocks of the last, two of the one before, …;
    of layers as wide as each other, which are one stage, the last ones, each with its activation; then from the stem,
    which is what comes before the first block.

        conv1 bn1 relu │ maxpool layer1 │ layer2 │ layer3 │ layer4 │ avgpool │ fc
                                      ▲        ▲        ▲                  ▲
    Args:
        network: the network; of one with default layers, these are the ends.
        more: layers beside the `ENDS`.
        gradients: False: outputs need no gradient, and no backward pass runs.

    Raises:
        InputError: no module can be tapped.
    """
    outputs, model = _record_outputs(network, gradients), network.model
    tappable = {layer.path: layer for layer in _list_tappable(network, outputs, gradients)}
    layers = _keep_steady(network, tappable)
    default = {model.layers[name][0]: name for name in model.default}
    trunk, whole = _children("", layers), {}
    while True:
        logits = {path for path in trunk if _gives_logits(outputs[path], outputs, model.classifier)}
        before = [path for path in trunk if path not in logits]
        stem, stages = _list_stages(before, layers, network.module)
        ends = list(default)[::-1] or _distinct(network, [stage[-1] for stage in stages], layers)[-ENDS:]
        blocks = [[path for path in stage if _holds_modules(network.module, path)] for stage in stages]
        chain = _next_chain(trunk, logits, network.module, layers, of_blocks=len(ends) >= ENDS)
        if chain is None or (len(ends) >= ENDS and not more):
            break
        parts = _children(chain, layers)
        if type(network.module.get_submodule(chain)) is nn.Sequential and len({layers[p].shape for p in parts}) == 1:
            whole[parts[-1]] = chain  # the same output, under the stage's name
        trunk = sorted([path for path in trunk if path != chain] + parts, key=list(layers).index)
    if not before:
        raise InputError(
            f"{model.name} has no module that can be tapped: {_why_none(network, outputs, tappable, gradients)}"
        )
    inner = _share_out(blocks, {stage[-1] for stage in stages}, max(ENDS + more - len(ends), 0))
    if not default and (missing := ENDS - len(ends) - len(inner)) > 0:
        inner += [path for stage in stages for path in _unit_ends(stage, network.module)][-missing:]
    if not default and (missing := ENDS - len(ends) - len(inner)) > 0:
        inner += [stage[-1] for stage in stem[-missing:]]
    order = {path: place for place, path in enumerate(layers)}
    chosen = _distinct(network, sorted({*ends, *inner}, key=lambda path: order.get(path, 0)), layers, keep=ends)
    added = [_outermost(path, whole) for path in reversed(chosen) if path not in default]
    return {**{name: path for path, name in default.items()}, **{_layer_name(path): path for path in added}}


def _list_stages(
    trunk: Sequence[str], layers: Mapping[str, Tappable], network: nn.Module
) -> tuple[list[list[str]], list[list[str]]]:
    """Divide the trunk where the shape changes; return what comes before the first blocks, and the rest."""
    stages: list[list[str]] = []
    for path in trunk:
        if stages and layers[stages[-1][-1]].shape == layers[path].shape:
            stages[-1].append(path)
        else:
            stages.append([path])
    has_blocks = [any(_holds_modules(network, path) for path in stage) for stage in stages]
    first = has_blocks.index(True) if any(has_blocks) else 0
    return stages[:first], stages[first:]


def _holds_modules(network: nn.Module, path: str) -> bool:
    return any(network.get_submodule(path).children())


def _unit_ends(stage: Sequence[str], network: nn.Module) -> list[str]:
    """Return where the units of a stage without blocks end, but for the last: linear relu │ linear norm relu │ …"""
    if any(_holds_modules(network, path) for path in stage):
        return []

    def begins(path: str) -> bool:
        module = network.get_submodule(path)
        return any(True for _ in module.parameters()) and "Norm" not in type(module).__name__

    return [path for path, following in pairwise(stage) if begins(following)]


def _outermost(path: str, whole: Mapping[str, str]) -> str:
    """Return the largest chain that ends with this module."""
    while path in whole:
        path = whole[path]
    return path


def _share_out(blocks: Sequence[list[str]], ends: Collection[str], count: int) -> list[str]:
    """Choose `count` blocks, two of each stage from the last to the first and again; of a stage's, evenly spaced."""
    room = [len([path for path in stage if path not in ends]) for stage in blocks]
    shares = [0] * len(blocks)
    while sum(shares) < min(count, sum(room)):
        for place in reversed(range(len(blocks))):
            shares[place] = min(shares[place] + 2, room[place], shares[place] + count - sum(shares))
    chosen = []
    for stage, share in zip(blocks, shares, strict=True):
        parts = share + any(path in ends for path in stage)  # an end that is a block is the last of the parts
        chosen += [stage[round(len(stage) * (part + 1) / parts) - 1] for part in range(share)]
    return chosen


def _next_chain(
    trunk: Sequence[str],
    logits: Collection[str],
    network: nn.Module,
    layers: Mapping[str, Tappable],
    *,
    of_blocks: bool,
) -> str | None:
    """Return the module to take apart next: the largest that holds most of the parameters, else the largest chain.

    One of `logits` gives the logits, as a head or what wraps a whole network does: it is no layer itself, so that it is
    taken apart for a single module too. With `of_blocks`, only what holds blocks.
    """
    sizes = {path: sum(p.numel() for p in network.get_submodule(path).parameters()) for path in trunk}
    parts = [path for path in trunk if len(_children(path, layers)) > (path not in logits)]
    half = sum(p.numel() for p in network.parameters()) / 2
    whole = [path for path in parts if sizes[path] > half or (path in logits and not of_blocks)]
    chains = [path for path in parts if type(network.get_submodule(path)) is nn.Sequential]
    if of_blocks:
        whole, chains = (
            [path for path in found if any(_holds_modules(network, part) for part in _children(path, layers))]
            for found in (whole, chains)
        )
    return max(whole or chains, key=sizes.__getitem__, default=None)


def _layer_name(path: str) -> str:
    return free_name(path) if layer_name_problem(path) else path


def _children(path: str, layers: Mapping[str, Tappable]) -> list[str]:
    """Return the nearest modules below a path that can be tapped; a list of modules is not run itself."""
    inside = [other for other in layers if other.startswith(f"{path}." if path else "")]
    inside = [other for other in inside if other != path]
    return [other for other in inside if not any(other.startswith(f"{between}.") for between in inside)]


def _gives_logits(seen: _ModuleOutput, outputs: Mapping[str, _ModuleOutput], classifier: str | None) -> bool:
    """Return whether a module's output is that of the classifier: the classifier itself, or what holds it last.

    Of a head that is no linear layer, of several heads, or of one whose output is scaled, the gradient says so.
    """
    if seen.gives_logits:
        return True
    last = None if classifier is None else outputs[classifier].first
    same = last is not None and seen.first is not None and seen.first.shape == last.shape
    return bool(same and seen.first is not None and last is not None and torch.equal(seen.first, last))


def _keep_steady(network: Network, layers: dict[str, Tappable]) -> dict[str, Tappable]:
    """Leave out modules without a state of each sample's own.

    These run for some samples alone (routed experts), give the same for all (position encodings), or give the
    network's input in another shape (a first `Flatten`).
    """
    if network.device.type == "meta":
        return layers
    rows, steady = 4, dict[str, bool]()
    inputs = _varied(network, rows)
    given = {tensor.untyped_storage().data_ptr() for _, tensor in tensors_of(inputs)}
    differ = any(not torch.equal(tensor[:1].expand_as(tensor), tensor) for _, tensor in tensors_of(inputs))

    def look(layer: Tappable, whole: object) -> None:
        output, samples = first_output(whole), POOLINGS[layer.pooling].samples
        shape = (*layer.shape[:samples], rows, *layer.shape[samples:])
        steady[layer.path] = output is not None and tuple(output.shape) == shape
        if output is not None and output.untyped_storage().data_ptr() in given:
            steady[layer.path] = False
        if output is not None and steady[layer.path] and differ and not output.is_quantized:
            values = output.movedim(samples, 0)
            steady[layer.path] = not torch.equal(values[:1].expand_as(values), values)

    modules = dict(network.module.named_modules())
    handles = [
        modules[path].register_forward_hook(lambda _module, _args, output, layer=layer: look(layer, output))
        for path, layer in layers.items()
    ]
    try:
        with torch.no_grad(), run_eagerly(), fast_path(False):
            network.call.run(network.module, inputs)
    except Exception as error:  # user code may raise any error
        raise _forward_error(network, error) from error
    finally:
        for handle in handles:
            handle.remove()
    return {path: layer for path, layer in layers.items() if steady.get(path, False)}


def _why_none(
    network: Network, outputs: Mapping[str, _ModuleOutput], tappable: Collection[str], gradients: bool
) -> str:
    """Return why a network has no layer to tap, and what to do."""
    if is_scripted(network.module):
        return (
            "it is scripted (torch.jit), inside which nothing can be tapped; give the network as it was before it was"
            " scripted"
        )
    advice = (
        "let forward pass what its last layer reads through a module of its own, such as"
        " self.features = torch.nn.Identity(), which is then a layer"
    )
    inside = {path: seen for path, seen in outputs.items() if path and not seen.gives_logits}
    if not outputs:
        return f"its forward runs no module inside it; {advice}"
    if not inside:
        return f"all that it runs give the logits; {advice}"
    if any(path in tappable for path in inside):
        return (
            "those inside it run for some samples alone, give the same for all, or give the network's input in another"
            f" shape; {advice}"
        )
    option = "gradient=False" if network.from_python else "--no-gradient"
    if why := next((why for seen in reversed(inside.values()) if (why := _why_untappable(seen, gradients))), None):
        alone = f", or take activations alone: {option}" if gradients else ""
        return f"of the last one, {why}; {advice}{alone}"
    return (
        "no output of theirs has a gradient, because forward runs them under torch.no_grad, torch.inference_mode or"
        " .detach(), or the logits depend on another of their outputs than the first (as on the last state of an"
        f" LSTM); {advice}, or take activations alone: {option}"
    )


def _distinct(
    network: Network, paths: Sequence[str], layers: Mapping[str, Tappable], keep: Collection[str] = ()
) -> list[str]:
    """Leave out layers whose pooled values are a later one's, or one of `keep`'s, but for a factor."""
    specs = [LayerSpec(name=p, path=p, pooling=layers[p].pooling, neurons=layers[p].neurons) for p in paths]
    if network.device.type == "meta":
        return list(paths)
    with Taps(network.module, specs, None, gradients=False, call=network.call) as taps:
        values = taps(_varied(network)).activation
    kept = [path for path in paths if path in keep]
    for path in reversed([path for path in paths if path not in keep]):
        own = values[path].double()
        others = [values[other].double() for other in kept if values[other].shape == own.shape]
        if not any(_is_multiple(own, other) for other in others):
            kept.append(path)
    return [path for path in paths if path in kept]


def _varied(network: Network, count: int = 4) -> Any:
    """Return examples, or noise where there are none: blank images have the same state everywhere."""
    blank = network.blank(count)
    if network.from_python:
        return blank
    noise = torch.randn(blank.shape, generator=torch.Generator().manual_seed(0))
    return noise.to(network.device, network.dtype)


def _is_multiple(values: Tensor, of: Tensor) -> bool:
    factor = float((values * of).sum() / of.square().sum().clamp(min=1e-30))
    return math.isfinite(factor) and bool(
        torch.allclose(values, factor * of, rtol=1e-3, atol=1e-4 * float(of.abs().max()) * abs(factor))
    )


def list_layers(network: Network) -> list[Tappable]:
    """Return every module that can be tapped, in the order of their last runs."""
    return _list_tappable(network, _record_outputs(network))


def _list_tappable(network: Network, outputs: Mapping[str, _ModuleOutput], gradients: bool = True) -> list[Tappable]:
    aliases = {path: alias for alias, (path, _) in network.model.layers.items()}
    guessed = _guess_poolings(network.module, outputs)
    tappables = []
    for path, seen in outputs.items():
        if not path or _why_untappable(seen, gradients) is not None or not (seen.used or not gradients):
            continue
        assert seen.first is not None
        shape = tuple(seen.first.shape)
        alias = aliases.get(path)
        pooling = network.model.layers[alias][1] if alias else guessed[path]
        kind = POOLINGS[pooling]
        tappables.append(
            Tappable(
                name=alias or path,
                path=path,
                shape=tuple(size for axis, size in enumerate(shape) if axis != kind.samples),
                pooling=pooling,
                neurons=shape[kind.neurons],
                guessed=alias is None,
                runs=seen.runs,
            )
        )
    return tappables


def _guess_poolings(network: nn.Module, outputs: Mapping[str, _ModuleOutput]) -> dict[str, str]:
    """Guess every module's pooling; one without a width of its own has that of the last known before it, if as wide."""
    guessed: dict[str, str] = {}
    last: dict[int, tuple[str, int]] = {}  # dimensions → the layout that was known last, and its neurons
    for path, seen in outputs.items():
        if seen.first is None or seen.first.dim() not in (2, 3, 4, 5):
            continue
        shape, module = tuple(seen.first.shape), network.get_submodule(path)
        before, width = last.get(len(shape), ("", 0))
        fits = before != "" and shape[POOLINGS[before].neurons] == width
        guessed[path] = guess_pooling(module, shape, before if fits else "", seen.samples)
        if len(shape) in (3, 4) and shape[0] == seen.samples and (layout := known_layout(module, shape)):
            last[len(shape)] = layout, shape[POOLINGS[layout].neurons]
    return guessed


def _choose_layers(
    network: Network, layers: Layers, poolings: Poolings, gradients: bool, *, notes_guesses: bool
) -> tuple[list[LayerSpec], tuple[str, ...]]:
    """Return the layers, with 0 neurons until they are counted, and notes, of guessed poolings if asked for."""
    model = network.model
    wanted = name_layers(layers or model.default)
    modules = dict(network.module.named_modules())
    if network.from_python:
        paths = [path for path in modules if path]
        known = f"the paths of network.named_modules(): {', '.join(paths[:SHOWN])}{', …' * (len(paths) > SHOWN)}"
        choose = f"layers=[…] from {known}"
    else:
        where = command_line("layers", model.model_argument or model.name)
        known = f"{', '.join(model.layers)}, and the modules" if model.layers else "the modules"
        known, choose = f"{known} that this lists: {where}", f"--layers A,B from: {where}"
    if not wanted:
        raise InputError(f"{model.name} has no default layers; choose some with {choose}")
    for target in wanted.values():
        if not target or target not in {**model.layers, **modules}:
            suggested = suggest_name(target, [*model.layers, *modules])
            raise InputError(f"layer {target!r} is not known for {model.name}; known: {known}{suggested}")
    chosen = _check_pools(list(wanted), poolings)
    table = {**{path: (path, pooling) for path, pooling in model.layers.values()}, **model.layers}
    seen = _record_outputs(network, gradients) if any(target not in table for target in wanted.values()) else {}
    guessed = _guess_poolings(network.module, seen)
    specs, notes = [], []
    for name, target in wanted.items():
        path, pooling = table.get(target, (target, ""))
        if target not in table:
            shape = _check_tappable(name, path, modules[path], seen, gradients)
            pooling = guessed[path]
            samples = POOLINGS[pooling].samples
            own = [size for axis, size in enumerate(shape) if axis != samples]
            if notes_guesses and name not in chosen:
                option = f"{name}=KIND"
                pooling_option = (
                    f"pooling={{{name!r}: …}}" if network.from_python else f"--pooling {shlex.quote(option)}"
                )
                notes.append(
                    f"layer {name}: its output {_format_shape(own)} is pooled by {pooling}, which is a guess;"
                    f" another with {pooling_option}"
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
    """Return the shape of a module's output for a few samples."""
    if path not in seen:
        why = " (it is part of a scripted module, which takes no hooks)" if is_scripted(module) else ""
        raise InputError(f"layer {name!r} did not run in a forward pass{why}")
    if (reason := _why_untappable(seen[path], gradients)) is not None:
        raise InputError(f"layer {name!r} cannot be tapped: {reason}")
    if gradients and not seen[path].used:
        raise InputError(f"layer {name!r} {NO_GRADIENT}")
    output = seen[path].first
    assert output is not None
    return tuple(output.shape)


def _why_untappable(seen: _ModuleOutput, gradients: bool = True) -> str | None:
    """Return why a module's output cannot be tapped, or None if it can."""
    output = seen.first
    if output is None:
        return f"it returns {type(seen.output).__name__}, which does not begin with a tensor"
    time_first = seen.time_first and output.dim() == 3 and output.shape[1] == seen.samples
    if output.dim() not in (2, 3, 4, 5) or not (output.shape[0] == seen.samples or time_first):
        count = {2: "two", 3: "three"}.get(seen.samples, str(seen.samples))
        return f"for {count} samples it gives {_format_shape(output.shape)}, not {count} times 1 to 4 dimensions"
    if gradients and (why := why_no_gradient(output)):
        return f"it gives {why}"
    if seen.identity:
        return "it returns its input unchanged; tap the module before it"
    return None


def _record_outputs(network: Network, gradients: bool = True) -> dict[str, _ModuleOutput]:
    """Run two blank images, or a few, and return every module's output, in the order of their last runs.

    Every output outside a graph starts a new one: the first module's, and those after .detach() or under torch.no_grad.
    The next module gets a clone of the output, because it may change its input in place.
    """
    seen: dict[str, _ModuleOutput] = {}
    versions: dict[str, list[tuple[Tensor, int]]] = {}
    time_first = any(getattr(module, "batch_first", True) is False for module in network.module.modules())
    count = _count_samples(network) if time_first else 2
    inputs = network.blank(count)
    given = [tensor for _, tensor in tensors_of(inputs)]  # the network's input, and what modules gave
    places = {place for tensor in given for place in _places(tensor)}

    def before(path: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        versions[path] = [(value, -1 if value.is_inference() else value._version) for value in tensors]

    def keep(path: str, whole: object) -> object:
        output = first_output(whole)
        same = any(
            output is value and (version == -1 or value._version == version) for value, version in versions[path]
        )
        # What forward computed itself no module before can be tapped for; a view of all of an output is that output.
        same = same and output is not None and not places.isdisjoint(_places(output))
        kept = None
        if output is not None and output.is_floating_point():
            kept = start_graph(output)
        runs = 1 + (seen.pop(path).runs if path in seen else 0)
        seen[path] = _ModuleOutput(whole, output, count, time_first, runs, identity=same, kept=kept)
        passed_on = output if kept is None else clone_in_graph(kept)
        if passed_on is not None:
            given.append(passed_on)  # kept, so that no other tensor is at its place
            places.update(_places(passed_on))
        return whole if kept is None or passed_on is None else replace_first(whole, passed_on)

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
            logits = network.call.run(network.module, inputs)
        if gradients:
            _mark_used(logits, list(seen.values()))
        if network.device.type != "meta":
            _mark_logits(logits, list(seen.values()), network.model.outputs, gradients)
    except InputError:
        raise
    except Exception as error:  # user code may raise any error
        raise _forward_error(network, error) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _places(tensor: Tensor) -> list[tuple[int, int]]:
    """Return by what a tensor, and a view of all of it, is known: itself, and its memory with its number of values."""
    dense = tensor.layout is torch.strided and not tensor.is_nested
    memory = tensor.untyped_storage().data_ptr() if dense else 0  # 0 on the meta device too
    return [(id(tensor), -1)] + ([(memory, tensor.numel())] if memory else [])


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


def _mark_logits(logits: Tensor, seen: Sequence[_ModuleOutput], outputs: str, gradients: bool) -> None:
    """Set `gives_logits` of the outputs that are the logits but for a factor of each sample, or a term of them.

    With respect to such an output, summed over positions, a gradient of the logits is itself but for the factor. It is
    one whose rows sum to 0, as those of the loss do: so it passes a log-softmax unchanged. Where there is no gradient,
    the values decide.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        return
    if gradients and logits.requires_grad and outputs == "probabilities":
        logits = logits.clamp(min=torch.finfo(logits.dtype).tiny).log()
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probe = (probe - probe.mean(dim=1, keepdim=True)).to(logits.device, logits.dtype)
    for module_output in seen:
        output, kept = module_output.first, module_output.kept
        if output is None or output.dim() < 2 or len(output) != len(logits):
            continue
        if not {output.shape[1], output.shape[-1]} & ({1, 2} if logits.shape[1] == 2 else {logits.shape[1]}):
            continue
        gradient = None
        if gradients and logits.requires_grad and kept is not None:
            with contextlib.suppress(RuntimeError):  # an operation has no derivative
                (gradient,) = torch.autograd.grad(logits, kept, probe, allow_unused=True, retain_graph=True)
        values, wanted = (output.detach(), logits.detach()) if gradient is None else (gradient, probe)
        module_output.gives_logits = _is_rowwise_multiple(values, wanted)


def _is_rowwise_multiple(values: Tensor, of: Tensor) -> bool:  # (n, classes, …) or (n, …, classes); (n, classes)
    """Return whether values, summed over positions, are a factor of each row times `of`; of two classes one will do."""
    values = values.dequantize() if values.is_quantized else values
    of = of.double()
    for axis in {1, values.dim() - 1}:
        others = [one for one in range(1, values.dim()) if one != axis]
        summed = values.double().sum(dim=others) if others else values.double()
        if values[0].numel() == 1 and of.shape[1] == 2:  # the input of a sigmoid: one factor for all samples
            summed, wanted = summed.T, of[:, 1:].T
        else:
            wanted = of
        if summed.shape != wanted.shape:
            continue
        factor = (summed * wanted).sum(1, keepdim=True) / wanted.square().sum(1, keepdim=True).clamp(min=1e-30)
        error = (summed - factor * wanted).abs().amax(1)
        if bool((factor != 0).all() and (error <= 1e-3 * (factor.abs() * wanted.abs()).amax(1)).all()):
            return True
    return False


def _count_samples(network: Network) -> int:
    """Return a number of samples, at least 2, that is no size of the input: so that the samples' axis is known."""
    sizes = {size for _, tensor in tensors_of(network.blank(1)) for size in tensor.shape[1:]}
    return next(count for count in (2, 3, 5, 7, 11, 13, 17) if count not in sizes or count == 17)


def _forward_error(network: Network, error: Exception) -> InputError:
    name = network.model.name
    if is_out_of_memory(error):
        samples = "images" if network.transform is not None else "samples"
        cpu = spell_option("device", "cpu", python=network.from_python)
        return InputError(f"{name}: two {samples} do not fit the memory of {network.device}; try {cpu}")
    if network.transform is None:
        return InputError(f"{name} cannot take its input: {first_line(error)}")
    side = network.transform.crop
    return InputError(f"{name} cannot take images of {side}×{side} pixels: {first_line(error)}")


def _format_shape(shape: Sequence[int]) -> str:
    return "(" + ", ".join(str(n) for n in shape) + ")"
