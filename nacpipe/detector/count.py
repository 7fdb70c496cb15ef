"""Coverage counted from batches of samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from nacpipe.cache.layout import ALL_BITS
from nacpipe.detector.file import Exported
from nacpipe.detector.values import select_values
from nacpipe.errors import InputError, ValuesError
from nacpipe.extraction.samples import EXAMPLES
from nacpipe.method.class_groups import ClassGroups, choose_groups
from nacpipe.method.feature_scores import FittedFusion, fit_feature_score
from nacpipe.method.fitted_term import FittedTerm, fit_term
from nacpipe.method.params import NacParams, term_of
from nacpipe.method.term import LOGITS, layer_of
from nacpipe.networks.buffers import kept_buffers
from nacpipe.networks.build import adopt_module
from nacpipe.networks.call import PLAIN_CALL, Call, describe_input, map_tensors, move, take_rows
from nacpipe.networks.functions import describe_call
from nacpipe.networks.layers import measure_layers
from nacpipe.networks.taps import Tapped, Taps, isolated
from nacpipe.networks.wrappers import find_device_and_dtype, unwrap
from nacpipe.version import __version__


def count_coverage(
    network: nn.Module,
    params: NacParams,
    batches: Iterable[Any],  # the network's inputs
    poolings: Mapping[str, str],
    layers: Mapping[str, str] | None = None,
    call: Call = PLAIN_CALL,
) -> tuple[Exported, Any]:
    """Count the coverage of training images; return the detector without its network, and examples of its input.

    Of plain terms memory does not grow with the number of images; of other views, and of a fused score, the values of
    all are kept.

    Args:
        network: on whatever device; images are taken there. It may be wrapped (torch.compile, DataParallel).
        params: for the network's modules, by their paths, or the logits.
        batches: training images.
        poolings: layer → pooling, where the guess is wrong.
        layers: layer → module path, where the parameters call it otherwise.
        call: how the network is called.

    Raises:
        InputError: there are no images, a layer is not in the network, a pooling does not fit it, or a fused score
            needs a last linear layer that the network does not have.
        ValuesError: states are not finite.
    """
    params = params.used()
    network = unwrap(network)
    device = find_device_and_dtype(network)[0]
    coming = (call.arguments(batch) for batch in batches)
    first = next(coming, None)
    if first is None:
        raise InputError("there are no training samples to count")
    examples, rows = move(take_rows(first, 0, EXAMPLES), device), 0
    with isolated(network, device), kept_buffers(network):
        wrapped = adopt_module(network, examples, call)
        named = [name for name in dict.fromkeys(map(layer_of, params.layers)) if name != LOGITS]
        paths = {name: (layers or {}).get(name, name) for name in named}
        gradients = any(term_of(name, layer).needs_gradient for name, layer in params.layers.items())
        specs = measure_layers(wrapped, paths, list(poolings.items()), gradients=gradients).layers if named else ()
    model, overwritten = wrapped.model, None
    plain: dict[str, FittedTerm] = {}
    kept: dict[str, list[NDArray[np.float32]]] = {}  # of other views: they need all images at once
    logits: list[NDArray[np.float32]] = []
    features: list[NDArray[np.float32]] = []
    for images in chain([first], coming):
        with (
            isolated(network, device),
            kept_buffers(network),
            Taps(
                network, specs, model.classifier, overwritten=overwritten, outputs=model.outputs, gradients=gradients,
                call=call,
            ) as taps,
        ):  # fmt: skip
            tapped = taps(move(map_tensors(Tensor.detach, images), device))
            overwritten = taps.overwritten
        rows += len(tapped.logits)
        for name, layer in params.layers.items():
            term = term_of(name, layer)
            values = select_values(tapped, term).cpu().numpy()
            if not np.isfinite(values).all():
                raise ValuesError(f"layer {name!r}: a training image's {layer.source} is not finite")
            if term.view == "plain":
                fitted = fit_term(name, layer, values)
                plain[name] = plain[name].add(fitted) if name in plain else fitted
            else:
                kept.setdefault(name, []).append(values)
        if params.fused is not None:
            features.append(_features_of(tapped, params.fused.method))
        if kept or features:
            logits.append(tapped.logits.float().cpu().numpy())
    groups = train_groups = None
    if any(term_of(name, params.layers[name]).view == "by_class" for name in kept):
        if model.outputs == "features":
            raise InputError("terms by_class need predicted classes, and the network gives features; leave them out")
        linear = network.get_submodule(model.classifier).weight if model.classifier is not None else None
        weight = linear.detach().float().cpu().numpy() if isinstance(linear, Tensor) else None
        groups, train_groups = group_images(np.concatenate(logits), weight)
    fused = None
    if params.fused is not None:
        last = network.get_submodule(str(model.classifier))
        weight, bias = (_to_array(getattr(last, what)) for what in ("weight", "bias"))
        bias = np.zeros(len(weight), np.float32) if bias.size == 0 else bias
        fused = FittedFusion(
            params=params.fused,
            feature_score=fit_feature_score(
                params.fused.method, np.concatenate(features), np.concatenate(logits), weight, bias
            ),
        )
    counted = [
        plain[name]
        if name in plain
        else fit_term(name, layer, np.concatenate(kept.pop(name)), groups=groups, train_groups=train_groups)
        for name, layer in params.layers.items()
    ]
    exported = Exported(
        terms=tuple(counted),
        fused=fused,
        taps=tuple(specs),
        cache_layers=tuple(spec.path for spec in specs),
        threshold=-np.inf,
        keep=1.0,
        classes=tapped.logits.shape[1],
        outputs=tapped.logits.shape[1],
        train_rows=rows,
        mantissa_bits=ALL_BITS,
        identity={
            "benchmark": "own",
            "architecture": model.name,
            "family": model.family,
            "weights": wrapped.weights_sha256,
            "input": describe_input(examples, call.mask_of(examples)),
            "call": describe_call(call)[0],
            "dtype": "float32",
            **({} if model.outputs == "logits" else {"outputs": model.outputs}),
        },
        information={"nacpipe": __version__},
    )
    return exported, examples


def _features_of(tapped: Tapped, method: str) -> NDArray[np.float32]:
    """The last linear layer's inputs, (images, features)."""
    if tapped.features is None:
        raise InputError(
            f"the score holds {method}, which needs the input of a last linear layer; this network has none"
        )
    values: NDArray[np.float32] = tapped.features.float().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValuesError("a training image's features are not finite")
    return values


def _to_array(parameter: Tensor | None) -> NDArray[np.float32]:
    """A layer's parameter; of one that is not there, nothing."""
    if parameter is None:
        return np.empty(0, np.float32)
    values: NDArray[np.float32] = parameter.detach().float().cpu().numpy()
    return values


def group_images(
    logits: NDArray[np.float32],  # (images, classes)
    classifier: NDArray[np.float32] | None,  # (classes, features)
) -> tuple[ClassGroups, NDArray[np.int32]]:
    """Return the groups of classes that a cache of these training images would have, and each image's."""
    groups = choose_groups([logits], classifier)
    return groups, groups.assign(logits)
