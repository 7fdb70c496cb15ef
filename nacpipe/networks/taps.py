"""Two numbers per neuron and image, for all tapped layers, from one forward and one backward pass.

    images ──▶ … ──▶ first tap ──▶ … ──▶ tap ──▶ … ──▶ logits        forward: each tap's output is kept
    nothing is recorded ▏◀──────── gradient ────────── softmax(logits) − 1/classes

The gradient is of the cross-entropy from the uniform distribution to softmax(logits), summed over the batch; in the
logits themselves it is softmax − uniform, so that is what the backward pass starts from (design §3). Activation and
gradient are pooled separately. No model's or layer's name is known here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nacpipe.cache import LayerSpec
from nacpipe.errors import InputError
from nacpipe.networks.batch_runner import is_out_of_memory
from nacpipe.networks.checkpoints import first_line
from nacpipe.networks.trial import first_tensor
from nacpipe.networks.wrappers import find_place, is_scripted, run_eagerly, unwrapped_children

POOLINGS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum-nchw": lambda x: x.sum(dim=(2, 3)) if x.dim() == 4 else x,  # (n, c, h, w) → (n, c)
    "sum-nhwc": lambda x: x.sum(dim=(1, 2)) if x.dim() == 4 else x,  # (n, h, w, c) → (n, c)
    "sum-tokens": lambda x: x.sum(dim=1),  # (n, tokens, units) → (n, units)
    "class-token": lambda x: x[:, 0],  # (n, tokens, units) → (n, units)
    "none": lambda x: x,  # (n, units)
}

# Hooks stand on somebody's network while it runs, and its flags are changed: another thread's call must not see either.
_ONE_AT_A_TIME = threading.RLock()

_DIMENSIONS = {"sum-nchw": (2, 4), "sum-nhwc": (2, 4), "sum-tokens": (3,), "class-token": (3,), "none": (2,)}


@dataclass(frozen=True, slots=True)
class Tapped:
    """What one batch of n images gave."""

    activation: Mapping[str, Tensor]
    """Layer name → (n, neurons)."""
    gradient: Mapping[str, Tensor]
    """Layer name → (n, neurons)."""
    logits: Tensor
    """(n, classes)"""
    features: Tensor | None
    """(n, d), the classifier's input; None where there is no classifier."""


class Taps:
    """Hooks on a network's layers, for as long as the `with` block lasts."""

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[LayerSpec],
        classifier: str | None,
        *,
        penultimate: Set[str] = frozenset(),
        overwritten: Set[str] | None = None,
        outputs: str = "logits",
        autocast: torch.dtype | None = None,
    ) -> None:
        """Tap `layers` of `network`.

        Args:
            network: ready to be tapped (`freeze`), its inner modules unwrapped (`unwrap_children`).
            layers: what to tap; with none, no backward pass runs.
            classifier: path of the last linear layer, where there is one.
            direct: layers that are the classifier's input themselves (`find_direct`). Where all are, gradients come in
                closed form, (softmax − 1/classes) · W, and no backward pass runs.
            overwritten: layers whose output what follows changes in place: it is given a clone. None finds them out in
                the first batch; `overwritten` has them then.
            outputs: what the network gives; of probabilities, the loss is that of their logarithms.
            autocast: a half type that the network runs in; what is returned is float32 all the same.

        Raises:
            InputError: a path leads to no module, or to one that takes no hooks, naming layer and path.
        """
        self.network, self.layers, self.autocast = network, layers, autocast
        self.overwritten = overwritten
        self._probabilities = outputs == "probabilities"
        self._dtype = find_place(network)[1]
        modules = dict(network.named_modules())
        for spec in layers:
            if spec.path not in modules:
                raise InputError(f"layer {spec.name!r}: the network has no module {spec.path!r}")
            if is_scripted(modules[spec.path]):
                raise InputError(
                    f"layer {spec.name!r} is part of a scripted module (torch.jit), inside which nothing can be tapped;"
                    " give the network as it was before it was scripted"
                )
        self._linear: nn.Module | None = None
        if classifier is not None:
            if classifier not in modules:
                raise InputError(f"the network has no module {classifier!r} to be its classifier")
            if {spec.name for spec in layers} <= penultimate:
                self._linear = modules[classifier]
        self._backward = bool(layers) and self._linear is None
        self._outputs: dict[str, Tensor] = {}
        self._given: list[tuple[str, Tensor, int]] = []  # layer, what follows it was given, torch's count of changes
        self._features: Tensor | None = None
        self._handles = [modules[s.path].register_forward_hook(self._keep(s)) for s in layers]
        if classifier is not None:
            hook = modules[classifier].register_forward_pre_hook(self._keep_features, with_kwargs=True)
            self._handles.append(hook)

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def __call__(self, images: Tensor) -> Tapped:
        """Run one batch (n, channels, height, width).

        Raises:
            InputError: a layer has no gradient, or cannot be pooled as told.
        """
        try:
            return self._run(images.to(self._dtype) if images.is_floating_point() else images)
        finally:  # after an error too: a graph that is still held is memory that is not free
            self._outputs.clear()
            self._given.clear()
            self._features = None

    def _run(self, images: Tensor) -> Tapped:
        device = images.device.type
        half = nullcontext() if self.autocast is None else torch.autocast(device, dtype=self.autocast)
        with torch.set_grad_enabled(self._backward), half, run_eagerly():
            logits = self.network(images)
        if missing := [s.name for s in self.layers if s.name not in self._outputs]:
            raise InputError(f"layer {missing[0]!r} did not run in a forward pass")
        changed = {name for name, given, version in self._given if given._version != version}
        if self.overwritten is None:
            self.overwritten = frozenset(changed)
        elif more := changed - self.overwritten:  # it depends on the images: once more, with clones
            self.overwritten |= more
            self._given.clear()
            return self._run(images)
        for spec in self.layers:
            if (output := self._outputs[spec.name]).dim() not in _DIMENSIONS[spec.pooling]:
                raise InputError(f"layer {spec.name!r} gives {tuple(output.shape)}, which {spec.pooling} does not pool")
        with torch.no_grad():
            start = self._loss_gradient(_wide(logits))
        return Tapped(
            activation={s.name: _pool(s, self._outputs[s.name].detach()) for s in self.layers},
            gradient=self._gradients(logits, start),
            logits=_wide(logits.detach()),
            features=None if self._features is None else _wide(torch.flatten(self._features, 1)),
        )

    def _loss_gradient(self, outputs: Tensor) -> Tensor:
        """d loss / d outputs, (n, classes): softmax − 1/classes of logits and of log-probabilities."""
        if not self._probabilities:
            return outputs.softmax(dim=1) - 1.0 / outputs.shape[1]
        positive = outputs.clamp(min=torch.finfo(outputs.dtype).tiny)
        return (positive.log().softmax(dim=1) - 1.0 / outputs.shape[1]) / positive  # by the chain rule, through log

    def _gradients(self, logits: Tensor, start: Tensor) -> dict[str, Tensor]:
        if self._linear is not None:
            weight = self._linear.weight
            assert isinstance(weight, Tensor)
            closed = start @ _wide(weight)  # (n, classes) · (classes, d)
            return {spec.name: closed for spec in self.layers}
        if not self._backward:
            return {}
        outputs = [self._outputs[s.name] for s in self.layers]
        found: Sequence[Tensor | None] = [None] * len(outputs)
        if logits.requires_grad:
            try:
                found = torch.autograd.grad(logits, outputs, grad_outputs=start.to(logits.dtype), allow_unused=True)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                raise InputError(
                    f"no gradient of the logits can be computed in layer {self.layers[0].name!r} or another that is"
                    f" tapped: {first_line(error)}; tap layers behind what has no derivative"
                ) from error
        pooled: dict[str, Tensor] = {}
        for spec, gradient in zip(self.layers, found, strict=True):
            if gradient is None:
                raise InputError(f"layer {spec.name!r} {NO_GRADIENT}")
            pooled[spec.name] = _pool(spec, gradient)
        return pooled

    def _keep(self, spec: LayerSpec) -> Callable[[nn.Module, object, object], Tensor]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> Tensor:
            if not isinstance(output, Tensor):
                raise InputError(f"layer {spec.name!r} returns {type(output).__name__}, not one tensor")
            if self._backward and (why := why_no_gradient(output)):
                raise InputError(f"layer {spec.name!r} gives {why}")
            # The first tap starts the graph: parameters need no gradient, so nothing below it was recorded.
            kept = start_graph(output) if self._backward else output
            given = kept
            if self.overwritten is None or spec.name in self.overwritten or kept.is_inference():
                given = clone_in_graph(kept)
            if not given.is_inference():
                self._given.append((spec.name, given, given._version))
            self._outputs[spec.name] = kept
            return given

        return hook

    def _keep_features(self, _module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        features = first_tensor(args, kwargs)
        self._features = None if features is None else features.detach().clone()


NO_GRADIENT = (
    "has no gradient: the logits do not depend on its output, or forward runs what follows it under torch.no_grad,"
    " torch.inference_mode or .detach(); tap a layer behind that, or change forward"
)


def why_no_gradient(output: Tensor) -> str | None:
    """Return what is wrong with a module's output for a gradient, or None."""
    if not output.is_floating_point():
        return f"{output.dtype}, of which there is no gradient; tap a layer that gives floating-point numbers"
    if output.dtype is torch.float16:
        return "float16, in which most gradients would be 0; run the network in float32 or bfloat16"
    return None


def start_graph(output: Tensor) -> Tensor:
    """Return a module's output as it is where it belongs to a graph, else as the leaf of a new one.

    Whatever mode its forward is in: a graph can begin below torch.no_grad, where nothing before it is recorded.
    """
    unrecorded = output.grad_fn is None and output._is_view()  # a view made under no_grad says that it requires one
    if output.requires_grad and not unrecorded:
        return output
    with torch.inference_mode(False):
        return (output.clone() if output.is_inference() else output.detach()).requires_grad_()


def clone_in_graph(kept: Tensor) -> Tensor:
    """Return a copy for what follows to change, through which gradients flow back to what is kept."""
    with torch.inference_mode(False), torch.enable_grad():
        return kept.clone()


def find_penultimate(
    network: nn.Module, layers: Sequence[LayerSpec], classifier: str | None, images: Tensor
) -> Set[str]:
    """Return the names of the layers that are the classifier's input themselves, as they are pooled.

    Told by trying: the pooled activation equals the input, and the closed form the gradient of a backward pass.
    """
    if classifier is None:
        return frozenset()
    with Taps(network, layers, classifier) as taps:
        tapped = taps(images)
    weight = network.get_submodule(classifier).weight
    if not isinstance(weight, Tensor) or tapped.features is None or weight.shape[0] != tapped.logits.shape[1]:
        return frozenset()
    closed = (tapped.logits.softmax(dim=1) - 1.0 / tapped.logits.shape[1]) @ _wide(weight)
    return frozenset(
        spec.name
        for spec in layers
        if tapped.activation[spec.name].shape == tapped.features.shape == closed.shape
        and torch.equal(tapped.activation[spec.name], tapped.features)
        and torch.allclose(tapped.gradient[spec.name], closed, rtol=1e-3, atol=1e-6)
    )


def _pool(spec: LayerSpec, values: Tensor) -> Tensor:
    return POOLINGS[spec.pooling](_wide(values))


def _wide(values: Tensor) -> Tensor:
    """Half types as float32, so that sums and softmax do not lose digits; float32 and float64 as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def freeze(network: nn.Module) -> nn.Module:
    """Make a network ready to be tapped: evaluation mode, no parameter gradients, no in-place activations.

    An in-place activation after a tapped layer would overwrite the tapped value; out of place it computes the same.

    Raises:
        InputError: it has no evaluation mode.
    """
    try:
        network.eval()
    except (NotImplementedError, RuntimeError, AttributeError) as error:  # an exported program's
        raise InputError(
            f"{type(network).__name__} cannot be put in evaluation mode: {first_line(error)}; give the network as a"
            " torch.nn.Module"
        ) from error
    for parameter in network.parameters():  # one by one, as a scripted module has no requires_grad_
        parameter.requires_grad_(False)
    for module in network.modules():
        if getattr(module, "inplace", False) and not is_scripted(module):
            module.inplace = False  # type: ignore[assignment]
    return network


@contextmanager
def isolated(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Use somebody's network as extraction uses its own: `frozen`, whatever inference mode or autocast the caller is
    in, and one thread after the other.
    """
    with _ONE_AT_A_TIME, torch.inference_mode(False), frozen(network), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """`freeze` a network for as long as the `with` block lasts; afterwards every flag is as it was.

    Modules that wrap others inside it (torch.compile's, DataParallel's, scripted ones) are unwrapped meanwhile.
    """
    training = [module for module in network.modules() if getattr(module, "training", False)]
    in_place = [module for module in network.modules() if getattr(module, "inplace", False) and not is_scripted(module)]
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        freeze(network)
        with unwrapped_children(network):
            yield
    finally:
        for module in training:
            module.training = True
        for module in in_place:
            module.inplace = True  # type: ignore[assignment]
        for parameter in learning:
            parameter.requires_grad_(True)
