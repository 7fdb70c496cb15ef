"""Weights: reading them from files or by name, loading them key by key, hashing them."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torchvision
from torch import nn

from nacpipe.benchmarks.standard import INTERPOLATIONS, Transform
from nacpipe.errors import CheckpointError, InputError, first_line
from nacpipe.networks.state_dicts import StateDict, choose_state_dict, find_state_dicts, hash_weights
from nacpipe.networks.wrappers import is_frozen, is_scripted, named_state

# Types that training scripts save beside weights; unpickling them cannot run code.
_SAFE_TYPES: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float16", "float32", "float64", "int32", "int64", "bool")),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
]

# Under what names training scripts save an accuracy beside the weights: the ResNets for CIFAR, PyTorch's examples, ….
ACCURACY_NAMES = ("best_prec1", "best_acc1", "best_acc", "best_accuracy", "acc", "accuracy", "test_acc", "val_acc")


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights for a network, not read yet."""

    read: Callable[[], Mapping[str, StateDict]] | None
    """Returns state dicts by name, as `read_checkpoint` does; None: the weights that the network was built with."""
    transform: Callable[[], Transform] | None = None
    """Returns the transform that belongs to them."""
    sha256: str = ""
    """The first digits of the published file's sha256, which are in its name; empty if not known."""


def read_checkpoint(path: Path) -> dict[str, StateDict]:
    """Read the state dicts of a `.safetensors` file or a `torch.save` file, never unpickling code.

    Returns:
        Name in the file → state dict: `""` if the file is a state dict, `model`, `state_dict`, … if it contains one.

    Raises:
        CheckpointError: the file cannot be read, or contains no state dict.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} is not there")
    try:
        if path.suffix == ".safetensors":
            return {"": dict(safetensors.torch.load_file(path))}
        with torch.serialization.safe_globals(_SAFE_TYPES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} is not a checkpoint, or contains more than tensors and is not loaded, since that could"
            " run code: save its state_dict alone"
        ) from error
    except Exception as error:  # torch raises errors of any kind for a damaged file
        raise CheckpointError(f"checkpoint {path} cannot be read: {first_line(error)}") from error
    if not (states := find_state_dicts(content)):
        keys = [str(key)[:40] for key in content] if isinstance(content, Mapping) else []
        held = f"; it holds {', '.join(keys[:5])}" + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
        raise CheckpointError(
            f"checkpoint {path} holds no state dict (a dictionary of tensors)" + (held if keys else "")
        )
    return states


def read_stated_accuracy(path: Path) -> float | None:
    """Return the accuracy, 0 … 1, that a training script saved beside the weights, or None.

    Percent and fractions are told apart by their size: a value above 1 is percent.
    """
    if path.suffix == ".safetensors" or not path.is_file():
        return None
    try:
        with torch.serialization.safe_globals(_SAFE_TYPES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # the weights were read; what more is in the file is not needed
        return None
    for name in ACCURACY_NAMES if isinstance(content, Mapping) else ():
        value = content.get(name)
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, int | float) and 0 < value <= 100:
            return value / 100 if value > 1 else float(value)
    return None


def torchvision_weights(architecture: str) -> dict[str, Weights]:
    """Return the published weights of a torchvision network by their names, such as IMAGENET1K_V1."""
    return {
        member.name: Weights(
            partial(_download, member), partial(_torchvision_transform, member), published_sha256(member.url)
        )
        for member in torchvision.models.get_model_weights(architecture)
        # vit_b_16's IMAGENET1K_SWAG_E2E_V1 is for 384 pixels, which is another network: other position embeddings.
        if member.transforms().crop_size == [224]
    }


def published_sha256(url: str) -> str:
    """Return the first digits of a published file's sha256 from its name; empty if the name has none."""
    match = re.search(r"-([0-9a-f]{8,})\.\w+$", url)
    return match[1] if match else ""


def recognise_weights(file: Path, published: Mapping[str, Weights]) -> str | None:
    """Return the name of the published weights in a file, recognised by its content, or None."""
    if not any(weights.sha256 for weights in published.values()):
        return None
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return next((name for name, w in published.items() if w.sha256 and digest.startswith(w.sha256)), None)


def _download(member: Any) -> dict[str, StateDict]:
    """Return weights from torchvision's server, or from torch's cache of downloads."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch prints its downloads on stdout
            state = torch.hub.load_state_dict_from_url(
                member.url,
                map_location="cpu",
                progress=bool(sys.stderr and sys.stderr.isatty()),
                check_hash=True,
                weights_only=True,
            )
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"weights {member.name} cannot be downloaded: {first_line(error)}; get {member.url} and give the file with"
            " --checkpoint FILE"
        ) from error
    return {"": state}


def _torchvision_transform(member: Any) -> Transform:
    preset = member.transforms()
    return make_transform(
        resize=preset.resize_size[0],
        crop=preset.crop_size[0],
        mean=preset.mean,
        std=preset.std,
        interpolation=preset.interpolation.value,
    )


def make_transform(*, resize: int, crop: int, mean: list[float], std: list[float], interpolation: str) -> Transform:
    """Return a published image transform as a `Transform`.

    Raises:
        InputError: its interpolation is not supported.
    """
    if interpolation not in INTERPOLATIONS:
        raise InputError(
            f"these weights want images resized by {interpolation} interpolation; known: {', '.join(INTERPOLATIONS)};"
            " give the weights as a file with --checkpoint FILE to use the benchmark's transform"
        )
    return Transform(resize=resize, crop=crop, mean=tuple(mean), std=tuple(std), interpolation=interpolation)


def load_weights(
    module: nn.Module, states: StateDict | Mapping[str, StateDict], renames: Mapping[str, str], source: str
) -> tuple[str, ...]:
    """Load a state dict into a network, key by key; return notes on the choice.

    Args:
        module: the network; weights that do not fit leave it unchanged.
        states: the state dict, or those of a checkpoint by their names in it (`read_checkpoint`).
        renames: prefixes of keys → prefixes of the network's.
        source: the checkpoint's name, for messages.

    Raises:
        CheckpointError: keys are missing, left over, or of another shape, naming them; or several state dicts fit.
    """
    with _named_source(source):
        state, notes = _choose_state(module, states, renames, source)
        module.load_state_dict(state, strict=False)
    return notes


def check_weights(
    module: nn.Module, states: StateDict | Mapping[str, StateDict], renames: Mapping[str, str], source: str
) -> tuple[str, ...]:
    """Refuse what `load_weights` refuses, and return its notes, without loading: for a network of shapes alone.

    Raises:
        CheckpointError: as `load_weights`.
    """
    with _named_source(source):
        return _choose_state(module, states, renames, source)[1]


def _choose_state(
    module: nn.Module, states: StateDict | Mapping[str, StateDict], renames: Mapping[str, str], source: str
) -> tuple[StateDict, tuple[str, ...]]:
    named = states if states and all(isinstance(state, dict) for state in states.values()) else {"": dict(states)}
    return choose_state_dict(named, module, renames, source)


@contextlib.contextmanager
def _named_source(source: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # an entry that cannot be hashed, or an error in the network's set_extra_state
        raise CheckpointError(f"checkpoint {source} cannot be loaded: {first_line(error)}") from error


def hash_network(network: nn.Module) -> str:
    """Return `hash_weights` of a network, without wrappers around it or its modules.

    Raises:
        InputError: an entry cannot be hashed, or a scripted module's weights are constants in its code.
    """
    if any(is_scripted(module) and is_frozen(module) for module in network.modules()):
        raise InputError(
            "the network has a module of torch.jit.freeze, whose weights cannot be hashed; give the network before"
            " freezing"
        )
    return hash_weights(named_state(network))
