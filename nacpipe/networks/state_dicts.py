"""State dicts: finding them in checkpoints, fitting their keys to a network, hashing their values."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nacpipe.errors import CheckpointError, InputError, first_line

StateDict = dict[str, Any]  # tensors, and the values of `get_extra_state` and of quantised modules

_DEPTH = 4  # largest nesting of dictionaries
_NON_TENSOR_KEYS = ("_extra_state", "_packed_params", "dtype")  # last parts of keys whose values are not tensors
_AVERAGED = re.compile(r"(^|[._-])(ema|swa|averaged?|shadow)|ema$", re.IGNORECASE)
_EXACT = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.layout)


# --- finding ----------------------------------------------------------------------------------------------------------


def find_state_dicts(content: object, name: str = "", depth: int = 0) -> dict[str, StateDict]:
    """Return every state dict in a checkpoint by its name: `""` for the whole, `model.state_dict` for one inside.

    The states of optimizers are skipped.
    """
    if not isinstance(content, Mapping) or depth > _DEPTH:
        return {}
    if _is_state_dict(content):
        return {name: dict(content)}
    states: dict[str, StateDict] = {}
    for key, value in content.items():
        if isinstance(key, str) and "optim" not in key.lower():
            states |= find_state_dicts(value, f"{name}.{key}" if name else key, depth + 1)
    return states


def _is_state_dict(content: Mapping[Any, Any]) -> bool:
    non_tensors = {key for key in content if isinstance(key, str) and key.rpartition(".")[2] in _NON_TENSOR_KEYS}
    return any(isinstance(value, Tensor) for value in content.values()) and all(
        isinstance(key, str) and (isinstance(value, Tensor) or key in non_tensors) for key, value in content.items()
    )


# --- fitting ----------------------------------------------------------------------------------------------------------


def choose_state_dict(
    states: Mapping[str, StateDict], network: nn.Module, renames: Mapping[str, str], source: str
) -> tuple[StateDict, tuple[str, ...]]:
    """Return the state dict that fits a network, its keys as the network has them, and notes.

    If several fit, one that is not a moving average is chosen (`model`, not `model_ema`).

    Args:
        states: from `find_state_dicts`, at least one.
        network: the network to fit.
        renames: prefixes of keys → prefixes of the network's.
        source: the checkpoint's name, for messages.

    Raises:
        CheckpointError: none fits, naming the keys; or several with different weights fit.
    """
    wanted = network.state_dict()
    fitted = {name: fit_keys(state, wanted, renames) for name, state in states.items()}
    problems = {name: find_problems(state, wanted) for name, state in fitted.items()}
    fits = [name for name in states if not problems[name]]
    held = ", ".join(name or "its own entries" for name in states)
    if not fits:
        closest = min(states, key=lambda name: sum(map(len, problems[name].values())))
        problem_text = "; ".join(f"{what} {_shorten(keys)}" for what, keys in problems[closest].items())
        alternatives = f"; it holds {held}, of which {closest or 'the first'} comes nearest" if len(states) > 1 else ""
        raise CheckpointError(f"checkpoint {source} does not fit the network: {problem_text}{alternatives}")
    not_averaged = [name for name in fits if not _AVERAGED.search(name)] or fits
    if len({hash_weights(fitted[name]) for name in not_averaged}) > 1:
        first, second = not_averaged[:2]
        raise CheckpointError(
            f"checkpoint {source} holds {first} and {second}, which both fit the network; save the one that is meant in"
            f" a file of its own, such as torch.save(checkpoint[{second!r}], FILE)"
        )
    notes = (f"checkpoint {source} holds {held}: {not_averaged[0]} is loaded",) if len(states) > 1 else ()
    return fitted[not_averaged[0]], notes


def fit_keys(state: StateDict, wanted: Mapping[str, Any], renames: Mapping[str, str]) -> StateDict:
    """Return a state dict with the keys that fit best: unchanged, or without the names of wrappers.

    First `module` and `_orig_mod` (DataParallel, torch.compile) are removed anywhere, then prefixes that all keys share
    (`model.`, `net.`, `backbone.`, …), one after the other.
    """
    return min(_variants(state, renames), key=lambda variant: sum(map(len, find_problems(variant, wanted).values())))


def _variants(state: StateDict, renames: Mapping[str, str]) -> Iterator[StateDict]:
    bare = {".".join(p for p in key.split(".") if p not in ("module", "_orig_mod")): v for key, v in state.items()}
    for keys in (state, bare):
        yield _rename(keys, renames)
        while all("." in key for key in keys) and len({key.partition(".")[0] for key in keys}) == 1:
            keys = {key.partition(".")[2]: value for key, value in keys.items()}
            yield _rename(keys, renames)


def _rename(state: StateDict, renames: Mapping[str, str]) -> StateDict:
    renamed: StateDict = {}
    for key, value in state.items():
        for old, new in renames.items():
            key = new + key.removeprefix(old) if key.startswith(old) else key
        renamed[key] = value
    return renamed


def find_problems(state: StateDict, wanted: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the differences between a state dict and the wanted one, by kind; empty if it fits.

    `num_batches_tracked` may be missing, as in checkpoints of old torch versions.
    """
    problems = {
        "it lacks": [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")],
        "it has left over": [k for k in state if k not in wanted],
        "of another shape": [
            f"{k} ({_shape(state[k])} for {_shape(wanted[k])})"
            for k in wanted
            if k in state and _shape(state[k]) != _shape(wanted[k])
        ],
    }
    return {what: keys for what, keys in problems.items() if keys}


def _shorten(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _shape(value: object) -> str:
    if not isinstance(value, Tensor):
        return "no tensor"
    return "×".join(str(n) for n in value.shape) or "scalar"


# --- hashing ----------------------------------------------------------------------------------------------------------


def hash_weights(state: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of a state dict's names, types, shapes and values, without `num_batches_tracked`.

    Raises:
        InputError: the bytes of an entry's type are not defined, naming the entry.
    """
    digest = hashlib.sha256()
    for key in sorted(state):
        if key.endswith("num_batches_tracked"):
            continue
        for part in _parts(key, state[key]):
            digest.update(part)
    return digest.hexdigest()


def _parts(key: str, value: object) -> Iterator[bytes]:
    """Yield what an entry adds to the hash: a line with its name, type and shape, then its bytes."""
    if isinstance(value, Tensor):
        yield from _tensor_parts(key, value)
    elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        yield f"{key} {value.dtype} {value.shape}\n".encode() + value.tobytes()
    elif isinstance(value, io.BytesIO):
        yield from _parts(key, value.getvalue())
    elif isinstance(value, (*_EXACT, bytearray)):
        yield f"{key} {type(value).__name__} {value!r}\n".encode()
    elif isinstance(value, list | tuple | set | frozenset):
        entries = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        yield f"{key} {len(entries)} entries\n".encode()
        for number, entry in enumerate(entries):
            yield from _parts(f"{key}[{number}]", entry)
    elif isinstance(value, Mapping):
        yield f"{key} {len(value)} entries\n".encode()
        for name in sorted(value, key=repr):
            yield from _parts(f"{key}[{name!r}]", value[name])
    else:
        raise InputError(
            f"the network's state dict holds {key!r}, a {type(value).__name__}, which cannot be hashed; let"
            " get_extra_state return tensors, numbers, texts, and lists or dictionaries of them"
        )


def _tensor_parts(key: str, tensor: Tensor) -> Iterator[bytes]:
    if tensor.is_meta:
        raise InputError(f"the network's weights {key!r} have no values (they are on the meta device); load them first")
    kind = str(tensor.dtype).removeprefix("torch.")
    try:
        tensor = tensor.detach()
        if tensor.is_quantized:
            yield f"{key} {kind} {tensor.qscheme()} {tuple(tensor.shape)}\n".encode()
            if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
                yield from _parts(f"{key}.scale", [tensor.q_scale(), tensor.q_zero_point()])
            else:
                scales = [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
                yield from _parts(f"{key}.scale", [*scales, tensor.q_per_channel_axis()])
            yield from _tensor_parts(f"{key}.values", tensor.int_repr())
            return
        if tensor.layout is torch.sparse_coo:
            yield f"{key} {tensor.layout} {tuple(tensor.shape)}\n".encode()
            merged = tensor.coalesce()
            yield from _parts(key, [merged.indices(), merged.values()])
            return
        if tensor.layout is not torch.strided:  # compressed rows or columns: hashed as dense values
            yield f"{key} {tensor.layout}\n".encode()
            tensor = tensor.to_dense()
        tensor = tensor.cpu().contiguous().resolve_conj().resolve_neg()
        try:
            array = tensor.numpy()
        except TypeError:  # a type that numpy lacks: bfloat16, float8
            yield f"{key} {kind} {tuple(tensor.shape)}\n".encode()
            yield tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            return
        yield f"{key} {array.dtype} {array.shape}\n".encode()
        yield array.tobytes()
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"the network's weights {key!r} are {kind} in a form that cannot be hashed: {first_line(error, 100)}"
        ) from error
