"""Two numbers per neuron and image, for all tapped layers, from one forward and one backward pass.

    images ──▶ … ──▶ first tap ──▶ … ──▶ tap ──▶ … ──▶ logits        forward: each tap's output is kept
    no graph is built   ▏◀──────── gradient ────────── softmax(logits) − 1/classes

The gradient is of the cross-entropy from the uniform distribution to softmax(logits), summed over the batch. With
respect to the logits it is softmax − 1/classes, from which the backward pass starts. Activation and gradient are pooled
separately.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nacpipe.cache import LayerSpec
from nacpipe.errors import InputError, NacError, first_line
from nacpipe.networks.batch_runner import Clock, clear_tracebacks, is_out_of_memory, no_clock
from nacpipe.networks.call import (
    PLAIN_CALL,
    Call,
    cast_floats,
    describe_input,
    device_of,
    first_output,
    map_tensors,
    replace_first,
)
from nacpipe.networks.poolings import POOLINGS, pool
from nacpipe.networks.precision import AUTOCAST, FP16, FP32, GRADIENT_SCALE, only_warns, strictly_deterministic
from nacpipe.networks.trial import first_tensor, shorten
from nacpipe.networks.wrappers import find_device_and_dtype, is_scripted, run_eagerly, unwrapped_children

# A network in use has hooks and changed flags, which calls from other threads must not see.
_NETWORK_LOCK = threading.RLock()


@dataclass(frozen=True, slots=True)
class Tapped:
    """The arrays of one batch of n images."""

    activation: Mapping[str, Tensor]
    """Layer name → (n, neurons)."""
    gradient: Mapping[str, Tensor]
    """Layer name → (n, neurons)."""
    logits: Tensor
    """(n, classes)"""
    features: Tensor | None
    """(n, d), the classifier's input; None if there is no classifier."""


class Taps:
    """Hooks on a network's layers, which exist during the `with` block."""

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[LayerSpec],
        classifier: str | None,
        *,
        penultimate: Set[str] = frozenset(),
        overwritten: Set[str] | None = None,
        outputs: str = "logits",
        precision: str = FP32,
        gradients: bool = True,
        call: Call = PLAIN_CALL,
        cache_layers: Sequence[str] | None = None,
        strict: bool = True,
        clock: Clock = no_clock,
    ) -> None:
        """Register hooks on `layers` of `network`.

        Args:
            network: frozen (`freeze`), its inner modules unwrapped (`unwrap_children`).
            layers: the layers to tap; without layers, no backward pass runs.
            classifier: path of the last linear layer, or None.
            penultimate: layers whose pooled output is the classifier's input (`find_penultimate`). If all are,
                gradients have the closed form (softmax − 1/classes) · W, and no backward pass runs.
            overwritten: layers whose output a later module changes in place; that module gets a clone. None: the first
                batch finds them and sets `overwritten`.
            outputs: the kind of the network's outputs; for probabilities, the loss is that of their logarithms.
            precision: of `AUTOCAST`: its half type is what the network runs in; the results are float32.
            gradients: False: a forward pass alone; outputs are pooled when their layer runs, so that nothing that later
                modules do to them matters.
            call: how the network is called, and which positions of padded samples count.
            cache_layers: paths of all layers of the cache whose values are wanted to the last bit, of which a detector
                taps some (`fast_path`); None: those of `layers`.
            strict: whether batches with a backward pass run `strictly_deterministic` where torch only warns; where one
                fails so, it runs again with warnings, and `strict` is False from then on.
            clock: called with `pool` around what pools; the extraction's profile.

        Raises:
            InputError: a path names no module, or a module that takes no hooks, naming layer and path.
        """
        self.network, self.layers, self.precision = network, layers, precision
        self.overwritten = overwritten
        self._call, self._clock = call, clock
        self._mask: Tensor | None = None
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in network.modules())
        self._probabilities = outputs == "probabilities"
        self._dtype = find_device_and_dtype(network)[1]
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
            if gradients and {spec.name for spec in layers} <= penultimate:
                self._linear = modules[classifier]
        self._pools_at_once = not gradients
        self._backward = gradients and bool(layers) and self._linear is None
        self.strict = strict and self._backward
        self._outputs: dict[str, Tensor] = {}
        # (layer, the tensor passed on to the next module, torch's count of in-place changes of that tensor)
        self._passed_on: list[tuple[str, Tensor, int]] = []
        self._features: Tensor | None = None
        self._handles = [modules[s.path].register_forward_hook(self._output_hook(s), with_kwargs=True) for s in layers]
        paths = [s.path for s in layers] if cache_layers is None else cache_layers
        attends = any(isinstance(module, nn.MultiheadAttention) for module in modules.values())
        # An encoder's fast path passes nested tensors from layer to layer, which no pooling takes.
        nests = any(isinstance(module, nn.TransformerEncoder) for module in modules.values())
        known = attends and not nests and all(path in modules for path in paths)
        self._attends, self._starts_fast = attends, known and bool(paths)
        if self._starts_fast:
            self._handles += [modules[path].register_forward_hook(_end_fast_path) for path in paths]
        if classifier is not None:
            hook = modules[classifier].register_forward_pre_hook(self._features_hook, with_kwargs=True)
            self._handles.append(hook)

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def __call__(self, images: Any) -> Tapped:
        """Run one batch: the network's arguments (`Call.arguments`) for n samples, such as (n, channels, h, w).

        Raises:
            InputError: a layer has no gradient, or its pooling or the mask does not fit its output.
        """
        try:
            self._mask = self._call.mask_of(images)
            arguments = map_tensors(_leave_inference, cast_floats(images, self._dtype))
            if self.strict and only_warns() and (tapped := self._run_strictly(arguments)) is not None:
                return tapped
            return self._run(arguments)
        finally:
            self._forget()
            self._mask = None

    def _forget(self) -> None:
        """Drop what a batch left, also after an error, so that the graph's memory is freed."""
        self._outputs.clear()
        self._passed_on.clear()
        self._features = None

    def _run_strictly(self, images: Any) -> Tapped | None:
        """Run one batch without any operation that torch knows no deterministic algorithm of; None where it fails.

        A copy of it runs, since it may have been overwritten by the time it fails.
        """
        try:
            with strictly_deterministic():
                return self._run(map_tensors(torch.clone, images))
        except (RuntimeError, InputError) as error:  # the latter of the backward pass
            if is_out_of_memory(error):
                raise
            clear_tracebacks(error)
        self.strict = False
        self._forget()
        return None

    def _run(self, images: Any) -> Tapped:
        device = device_of(images).type
        half = AUTOCAST[self.precision]
        with (
            torch.set_grad_enabled(self._backward),
            nullcontext() if half is None else torch.autocast(device, dtype=half),
            run_eagerly(),
            fast_path(self._starts_fast) if self._attends else nullcontext(),
            _without_cudnn(self._recurrent and self._backward and device == "cuda"),
        ):
            logits = self._call.run(self.network, images)
        if missing := [s.name for s in self.layers if s.name not in self._outputs]:
            raise InputError(f"layer {missing[0]!r} did not run in a forward pass")
        if self._pools_at_once:
            return self._to_tapped(logits, self._outputs, {})
        changed = {name for name, passed_on, version in self._passed_on if passed_on._version != version}
        if self.overwritten is None:
            self.overwritten = frozenset(changed)
        elif newly_overwritten := changed - self.overwritten:  # it depends on the images: run again with clones
            self.overwritten |= newly_overwritten
            self._passed_on.clear()
            return self._run(images)
        for spec in self.layers:
            _check_pooling(spec, self._outputs[spec.name])
        with torch.no_grad():
            logits_gradient = self._loss_gradient(_widen(logits))
        pooled = {s.name: self._pool(s, self._outputs[s.name].detach()) for s in self.layers}
        return self._to_tapped(logits.detach(), pooled, self._gradients(logits, logits_gradient))

    def _to_tapped(self, logits: Tensor, activation: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> Tapped:
        return Tapped(
            activation={spec.name: activation[spec.name] for spec in self.layers},
            gradient=gradient,
            logits=_widen(logits),
            features=None if self._features is None else _widen(torch.flatten(self._features, 1)),
        )

    def _loss_gradient(self, outputs: Tensor) -> Tensor:
        """Return d loss / d outputs, (n, classes): softmax − 1/classes for logits and for log-probabilities."""
        if not self._probabilities:
            return outputs.softmax(dim=1) - 1.0 / outputs.shape[1]
        positive = outputs.clamp(min=torch.finfo(outputs.dtype).tiny)
        return (positive.log().softmax(dim=1) - 1.0 / outputs.shape[1]) / positive  # by the chain rule, through log

    def _gradients(self, logits: Tensor, logits_gradient: Tensor) -> dict[str, Tensor]:
        if self._linear is not None:
            weight = self._linear.weight
            assert isinstance(weight, Tensor)
            closed_form = logits_gradient @ _widen(weight)  # (n, classes) · (classes, d)
            return {spec.name: closed_form for spec in self.layers}
        if not self._backward:
            return {}
        outputs = [self._outputs[s.name] for s in self.layers]
        scale = GRADIENT_SCALE if self.precision == FP16 else 1.0
        gradients: Sequence[Tensor | None] = [None] * len(outputs)
        if logits.requires_grad:
            try:
                gradients = torch.autograd.grad(
                    logits, outputs, grad_outputs=(logits_gradient * scale).to(logits.dtype), allow_unused=True
                )
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                raise InputError(
                    f"no gradient of the logits can be computed in layer {self.layers[0].name!r} or another that is"
                    f" tapped: {first_line(error)}; tap layers behind what has no derivative"
                ) from error
        pooled: dict[str, Tensor] = {}
        for spec, gradient in zip(self.layers, gradients, strict=True):
            if gradient is None:
                raise InputError(f"layer {spec.name!r} {NO_GRADIENT}")
            pooled[spec.name] = self._pool(spec, gradient) / scale
        return pooled

    def _pool(self, spec: LayerSpec, values: Tensor) -> Tensor:
        with self._clock("pool"):
            return pool(spec.name, spec.pooling, _widen(values), self._mask)

    def _output_hook(self, spec: LayerSpec) -> Callable[..., object]:
        def hook(_module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], whole: object) -> object:
            output = first_output(whole)
            if output is None:
                raise InputError(
                    f"layer {spec.name!r} returns {type(whole).__name__}, which does not begin with a tensor"
                )
            if self._pools_at_once:
                _check_pooling(spec, output)
                self._outputs[spec.name] = self._pool(spec, output).clone()  # of `none` it is the output itself
                return whole
            if self._backward and (why := why_no_gradient(output, scaled=self.precision == FP16)):
                raise InputError(f"layer {spec.name!r} gives {why}")
            inputs = (*args, *kwargs.values())
            if self._backward and output.requires_grad and any(output is value for value in inputs):
                output = output.view_as(output)  # torch.nn.Identity: what else reads its input is not its gradient
            # The first tap starts the graph: parameters need no gradient, so no graph exists below it.
            kept = start_graph(output) if self._backward else output
            passed_on = kept
            if self.overwritten is None or spec.name in self.overwritten or kept.is_inference():
                passed_on = clone_in_graph(kept)
            if not passed_on.is_inference():
                self._passed_on.append((spec.name, passed_on, passed_on._version))
            self._outputs[spec.name] = kept
            return replace_first(whole, passed_on)

        return hook

    def _features_hook(self, _module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        features = first_tensor(args, kwargs)
        self._features = None if features is None else features.detach().clone()


NO_GRADIENT = (
    "has no gradient: the logits do not depend on its output, or forward runs what follows it under torch.no_grad,"
    " torch.inference_mode or .detach(); tap a layer behind that, or change forward"
)


def why_no_gradient(output: Tensor, *, scaled: bool = False) -> str | None:
    """Return why a module's output has no usable gradient, or None; a scaled one can be float16."""
    if not output.is_floating_point():
        return f"{output.dtype}, which has no gradient; tap a layer that gives floating-point numbers"
    if output.dtype is torch.float16 and not scaled:
        return "float16, in which most gradients would be 0; run the network in float32 or bfloat16"
    return None


def start_graph(output: Tensor) -> Tensor:
    """Return a module's output unchanged if it is in a graph, else as the leaf of a new one.

    This also works where forward runs under torch.no_grad or torch.inference_mode.
    """
    unrecorded = (
        output.grad_fn is None and output._is_view()
    )  # a view made under no_grad has requires_grad and no grad_fn
    if output.requires_grad and not unrecorded:
        return output
    with torch.inference_mode(False):
        return (output.clone() if output.is_inference() else output.detach()).requires_grad_()


def _leave_inference(tensor: Tensor) -> Tensor:
    """Return a tensor that a graph may keep: made under torch.inference_mode, none may."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def clone_in_graph(kept: Tensor) -> Tensor:
    """Return a clone that later modules may change; its gradient is that of `kept`."""
    with torch.inference_mode(False), torch.enable_grad():
        return kept.clone()


def find_penultimate(
    network: nn.Module,
    layers: Sequence[LayerSpec],
    classifier: str | None,
    images: Any,
    call: Call = PLAIN_CALL,
) -> Set[str]:
    """Return the names of the layers whose pooled output is the classifier's input.

    For these, the pooled activation equals the input, and the closed form equals the gradient of a backward pass.
    """
    if classifier is None:
        return frozenset()
    with Taps(network, layers, classifier, call=call) as taps:
        tapped = taps(images)
    weight = network.get_submodule(classifier).weight
    if not isinstance(weight, Tensor) or tapped.features is None or weight.shape[0] != tapped.logits.shape[1]:
        return frozenset()
    weight = _widen(weight).to(tapped.logits.dtype)
    closed_form = (tapped.logits.softmax(dim=1) - 1.0 / tapped.logits.shape[1]) @ weight
    return frozenset(
        spec.name
        for spec in layers
        if tapped.activation[spec.name].shape == tapped.features.shape == closed_form.shape
        and torch.equal(tapped.activation[spec.name], tapped.features)
        and torch.allclose(tapped.gradient[spec.name].double(), closed_form.double(), rtol=1e-3, atol=1e-6)
    )


@contextmanager
def named_failures(arguments: Any) -> Iterator[None]:
    """Say in one line that a network fails on these arguments; memory that is exhausted is for `BatchRunner`."""
    try:
        yield
    except Exception as error:  # user code may raise any error
        if isinstance(error, NacError) or is_out_of_memory(error):
            raise
        given = shorten(describe_input(arguments)["description"])
        raise InputError(f"the network fails on inputs {given}: {type(error).__name__}: {first_line(error)}") from error


@contextmanager
def fast_path(enabled: bool) -> Iterator[None]:
    """Run attention with torch's fast path, which rounds otherwise, up to the cache's first tapped layer alone.

    Torch takes it wherever no gradient is recorded: in an extraction before the first tapped layer, and later in a
    detector that taps fewer layers or in forward passes alone. `_end_fast_path` ends it at the same place in all.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _end_fast_path(_module: nn.Module, _inputs: object, _output: object) -> None:
    torch.backends.mha.set_fastpath_enabled(False)


@contextmanager
def _without_cudnn(enabled: bool) -> Iterator[None]:
    """Run recurrent modules without cuDNN, whose backward pass exists in training mode alone.

    `torch.backends.cudnn.flags` would set what rounds products too.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.enabled
    cudnn.enabled = before and not enabled
    try:
        yield
    finally:
        cudnn.enabled = before


def _check_pooling(spec: LayerSpec, output: Tensor) -> None:
    if output.dim() not in POOLINGS[spec.pooling].dimensions:
        raise InputError(f"layer {spec.name!r} gives {tuple(output.shape)}, which {spec.pooling} does not pool")


def _widen(values: Tensor) -> Tensor:
    """Convert half types to float32, so that sums and softmax do not lose digits; float32 and float64 are unchanged.

    Quantised and whole numbers become float32 too.
    """
    if values.is_quantized:
        return values.dequantize()
    if not values.is_floating_point():
        return values.float()
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def freeze(network: nn.Module) -> nn.Module:
    """Put a network in evaluation mode, without parameter gradients and in-place activations.

    An in-place activation after a tapped layer would overwrite the tapped value.

    Raises:
        InputError: the network has no evaluation mode.
    """
    try:
        network.eval()
    except (NotImplementedError, RuntimeError, AttributeError) as error:  # of an exported program
        raise InputError(
            f"{type(network).__name__} cannot be put in evaluation mode: {first_line(error)}; give the network as a"
            " torch.nn.Module, a program of torch.export as torch.export.unflatten(program)"
        ) from error
    for parameter in network.parameters():  # a scripted module has no requires_grad_
        parameter.requires_grad_(False)
    for module in network.modules():
        if getattr(module, "inplace", False) and not is_scripted(module):
            module.inplace = False  # type: ignore[assignment]
    return network


@contextmanager
def isolated(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Hold a caller's network `frozen`, outside the caller's inference mode and autocast, for one thread at a time."""
    with _NETWORK_LOCK, torch.inference_mode(False), frozen(network), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """`freeze` a network during the `with` block; afterwards every flag has its former value.

    Wrapped modules inside it (torch.compile's, DataParallel's, scripted ones) are unwrapped during the block.

    Raises:
        InputError: a weight has no values yet.
    """
    check_values(network)
    training = [module for module in network.modules() if getattr(module, "training", False)]
    in_place = [module for module in network.modules() if getattr(module, "inplace", False) and not is_scripted(module)]
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        freeze(network)
        with unwrapped_children(network):
            yield
    finally:
        for module in training:
            module.training = True
        for module in in_place:
            module.inplace = True  # type: ignore[assignment]
        for parameter in trainable:
            parameter.requires_grad_(True)


def check_values(network: nn.Module) -> None:
    """Refuse weights without values: of lazy modules, and on the meta device.

    Raises:
        InputError: naming the first.
    """
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if is_lazy(tensor):
            raise InputError(f"the network's weights {name!r} have no shape yet (of a lazy module); run a batch first")
        if tensor.is_meta:
            raise InputError(
                f"the network's weights {name!r} have no values (they are on the meta device); load them first"
            )
