"""Weights: reading them from files or by name, loading them key by key, and their hash."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from nacpipe.core.benchmarks import INTERPOLATIONS, Transform
from nacpipe.errors import CheckpointError, InputError

StateDict = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights that a network can have, not read yet."""

    read: Callable[[], StateDict] | None
    """None means those that the network was built with."""
    transform: Callable[[], Transform] | None = None
    """The preparation of images that comes with them."""


def read_checkpoint(path: Path) -> StateDict:
    """Read a state dict from a `.safetensors` file or a `torch.save` file, never unpickling code.

    Raises:
        CheckpointError: it cannot be read, or holds no state dict.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} is not there")
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} is no checkpoint, or holds more than tensors and is not loaded, since that could run"
            f" code: save its state_dict alone"
        ) from error
    except Exception as error:  # a damaged file can make torch raise anything
        raise CheckpointError(f"checkpoint {path} cannot be read: {first_line(error)}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not (isinstance(content, dict) and content and all(isinstance(v, Tensor) for v in content.values())):
        raise CheckpointError(f"checkpoint {path} holds no state dict (a dictionary of tensors)")
    return dict(content)


def torchvision_weights(architecture: str) -> dict[str, Weights]:
    """Return the published weights of a torchvision network by their names, IMAGENET1K_V1 and so on."""
    return {
        member.name: Weights(partial(_download, member), partial(_own_transform, member))
        for member in torchvision.models.get_model_weights(architecture)
        # vit_b_16's IMAGENET1K_SWAG_E2E_V1 is for 384 pixels, which is another network: other position embeddings.
        if member.transforms().crop_size == [224]
    }


def _download(member: Any) -> StateDict:
    """Get weights from torchvision's server, or from where an earlier download left them."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch says there what it downloads
            state: StateDict = torch.hub.load_state_dict_from_url(
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
    return state


def _own_transform(member: Any) -> Transform:
    preset = member.transforms()
    return make_transform(
        resize=preset.resize_size[0],
        crop=preset.crop_size[0],
        mean=preset.mean,
        std=preset.std,
        interpolation=preset.interpolation.value,
    )


def make_transform(*, resize: int, crop: int, mean: list[float], std: list[float], interpolation: str) -> Transform:
    """Return a published preparation of images as ours.

    Raises:
        InputError: it resizes in a way that is not known here.
    """
    if interpolation not in INTERPOLATIONS:
        raise InputError(
            f"these weights want images resized by {interpolation} interpolation; known: {', '.join(INTERPOLATIONS)};"
            " give the weights as a file with --checkpoint FILE to use the benchmark's transform"
        )
    return Transform(resize=resize, crop=crop, mean=tuple(mean), std=tuple(std), interpolation=interpolation)


def load_weights(module: nn.Module, state: StateDict, renames: Mapping[str, str], source: str) -> None:
    """Load a state dict into a network, key by key.

    `module.` prefixes (of DataParallel) are dropped; checkpoints from before torch counted batches in batch norms load.

    Raises:
        CheckpointError: keys are missing, left over, or of another shape, naming them.
    """
    ours: StateDict = {}
    for key, value in state.items():
        key = key.removeprefix("module.")
        for old, new in renames.items():
            key = new + key.removeprefix(old) if key.startswith(old) else key
        ours[key] = value
    wanted = module.state_dict()
    problems = {
        "it lacks": [k for k in wanted if k not in ours and not k.endswith("num_batches_tracked")],
        "it has left over": [k for k in ours if k not in wanted],
        "of another shape": [
            f"{k} ({_shape(ours[k])} for {_shape(wanted[k])})"
            for k in wanted
            if k in ours and ours[k].shape != wanted[k].shape
        ],
    }
    if any(problems.values()):
        said = "; ".join(f"{what} {_some(keys)}" for what, keys in problems.items() if keys)
        raise CheckpointError(f"checkpoint {source} does not fit the network: {said}")
    module.load_state_dict(ours, strict=False)


def hash_weights(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 (hex) of a state dict's names, types, shapes and values, without its idle batch counters."""
    digest = hashlib.sha256()
    for key in sorted(state):
        if key.endswith("num_batches_tracked"):
            continue
        array = state[key].detach().cpu().contiguous().numpy()
        digest.update(f"{key} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """Return what an error says, short enough for one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _shape(tensor: Tensor) -> str:
    return "×".join(str(n) for n in tensor.shape) or "scalar"
