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
        direct: Set[str] = frozenset(),
        autocast: torch.dtype | None = None,
    ) -> None:
        """Tap `layers` of `network`.

        Args:
            network: ready to be tapped (`freeze`).
            layers: what to tap; with none, no backward pass runs.
            classifier: path of the last linear layer, where there is one.
            direct: layers that are the classifier's input themselves (`find_direct`). Where all are, gradients come in
                closed form, (softmax − 1/classes) · W, and no backward pass runs.
            autocast: a half type that the network runs in; what is returned is float32 all the same.

        Raises:
            InputError: a path leads to no module, naming layer and path.
        """
        self.network, self.layers, self.autocast = network, layers, autocast
        modules = dict(network.named_modules())
        for spec in layers:
            if spec.path not in modules:
                raise InputError(f"layer {spec.name!r}: the network has no module {spec.path!r}")
        self._linear: nn.Module | None = None
        if classifier is not None:
            if classifier not in modules:
                raise InputError(f"the network has no module {classifier!r} to be its classifier")
            if {spec.name for spec in layers} <= direct:
                self._linear = modules[classifier]
        self._backward = bool(layers) and self._linear is None
        self._outputs: dict[str, Tensor] = {}
        self._features: Tensor | None = None
        self._handles = [modules[s.path].register_forward_hook(self._keep(s)) for s in layers]
        if classifier is not None:
            self._handles.append(modules[classifier].register_forward_pre_hook(self._keep_features))

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def __call__(self, images: Tensor) -> Tapped:
        """Run one batch (n, channels, height, width).

        Raises:
            InputError: a layer has no influence on the logits, or cannot be pooled as told.
        """
        self._outputs.clear()
        self._features = None
        device = images.device.type
        half = nullcontext() if self.autocast is None else torch.autocast(device, dtype=self.autocast)
        with torch.set_grad_enabled(self._backward), half:
            logits = self.network(images)
        if missing := [s.name for s in self.layers if s.name not in self._outputs]:
            raise InputError(f"layer {missing[0]!r} did not run in a forward pass")
        for spec in self.layers:
            if (output := self._outputs[spec.name]).dim() not in _DIMENSIONS[spec.pooling]:
                raise InputError(f"layer {spec.name!r} gives {tuple(output.shape)}, which {spec.pooling} does not pool")
        with torch.no_grad():
            start = _wide(logits).softmax(dim=1) - 1.0 / logits.shape[1]  # d loss / d logits, (n, classes)
        return Tapped(
            activation={s.name: _pool(s, self._outputs[s.name].detach()) for s in self.layers},
            gradient=self._gradients(logits, start),
            logits=_wide(logits.detach()),
            features=None if self._features is None else _wide(torch.flatten(self._features.detach(), 1)),
        )

    def _gradients(self, logits: Tensor, start: Tensor) -> dict[str, Tensor]:
        if self._linear is not None:
            weight = self._linear.weight
            assert isinstance(weight, Tensor)
            closed = start @ _wide(weight)  # (n, classes) · (classes, d)
            return {spec.name: closed for spec in self.layers}
        if not self._backward:
            return {}
        outputs = [self._outputs[s.name] for s in self.layers]
        found = torch.autograd.grad(logits, outputs, grad_outputs=start.to(logits.dtype), allow_unused=True)
        self._outputs.clear()
        pooled: dict[str, Tensor] = {}
        for spec, gradient in zip(self.layers, found, strict=True):
            if gradient is None:
                raise InputError(f"layer {spec.name!r} has no influence on the logits")
            pooled[spec.name] = _pool(spec, gradient)
        return pooled

    def _keep(self, spec: LayerSpec) -> Callable[[nn.Module, object, object], Tensor]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> Tensor:
            if not isinstance(output, Tensor):
                raise InputError(f"layer {spec.name!r} returns {type(output).__name__}, not one tensor")
            # The first tap starts the graph: parameters need no gradient, so nothing below it was recorded.
            kept = output
            if self._backward and not output.requires_grad:
                kept = output.detach().requires_grad_()
            self._outputs[spec.name] = kept
            return kept

        return hook

    def _keep_features(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]


def find_direct(network: nn.Module, layers: Sequence[LayerSpec], classifier: str | None, images: Tensor) -> Set[str]:
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
    closed = (tapped.logits.softmax(dim=1) - 1.0 / tapped.logits.shape[1]) @ weight
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
    """
    network.eval().requires_grad_(False)
    for module in network.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return network


@contextmanager
def apart(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Use somebody's network as extraction uses its own: `frozen`, whatever inference mode or autocast the caller is
    in, and one thread after the other.
    """
    with _ONE_AT_A_TIME, torch.inference_mode(False), frozen(network), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """`freeze` a network for as long as the `with` block lasts; afterwards every flag is as it was."""
    training = [module for module in network.modules() if module.training]
    in_place = [module for module in network.modules() if getattr(module, "inplace", False)]
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        freeze(network)
        yield
    finally:
        for module in training:
            module.training = True
        for module in in_place:
            module.inplace = True  # type: ignore[assignment]
        for parameter in learning:
            parameter.requires_grad_(True)
