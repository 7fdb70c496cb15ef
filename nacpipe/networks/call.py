"""How a network is called: what a batch becomes, what its output is read as, and where it is padded.

    batch ──▶ prepare ──▶ arguments ──▶ network(x), network(*xs) or network(**xs) ──▶ output ──▶ logits (n, classes)

Arguments are a tensor, a tuple or a mapping, in which tensors of one dimension or more have one row per sample.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nacpipe.errors import InputError

Mask = str | Callable[[Any], Tensor]

ATTENTION_MASK = "attention_mask"  # the argument of this name is the mask, where none is named


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """How a network is called; by default with a tensor, with a tuple's entries, or with a mapping's as keywords."""

    prepare: Callable[[Any], Any] | None = None
    """A batch's input → the network's arguments."""
    logits: Callable[[Any], Tensor] | None = None
    """The network's output → logits (n, classes); None: the output itself, its `.logits` or its entry "logits"."""
    mask: Mask | None = None
    """An argument's name, or arguments → (n, length): which positions count; None: `attention_mask`, where it is."""

    def arguments(self, batch: Any) -> Any:
        """Return the network's arguments for a batch's input.

        Raises:
            InputError: they hold no tensor, or tensors of different numbers of samples.
        """
        arguments = batch if self.prepare is None else self.prepare(batch)
        if isinstance(arguments, Mapping):
            arguments = dict(arguments)
        elif isinstance(arguments, list):
            arguments = tuple(arguments)
        count_samples(arguments)
        return arguments

    def run(self, network: nn.Module, arguments: Any) -> Any:
        """Return the network's logits, or what it gives where that is none."""
        if isinstance(arguments, Mapping):
            output = network(**arguments)
        elif isinstance(arguments, tuple):
            output = network(*arguments)
        else:
            output = network(arguments)
        if self.logits is not None:
            return self.logits(output)
        if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
            return output["logits"]
        found = None if isinstance(output, Tensor) else getattr(output, "logits", None)
        return found if isinstance(found, Tensor) else output

    def mask_of(self, arguments: Any) -> Tensor | None:
        """Return which positions of padded samples count, (n, length) bool, or None.

        Raises:
            InputError: the mask is not (n, length), or there is no argument of its name.
        """
        if callable(self.mask):
            mask: Any = self.mask(arguments)
        else:
            named = arguments if isinstance(arguments, Mapping) else {}
            if self.mask is not None and self.mask not in named:
                names = ", ".join(map(str, named)) or "no names"
                raise InputError(f"mask is {self.mask!r}; the network's arguments have {names}")
            mask = named.get(self.mask or ATTENTION_MASK)
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != count_samples(arguments):
            if self.mask is None:
                return None
            what = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(f"the mask is {what}; wanted: (samples, length)")
        return mask != 0


PLAIN_CALL = Call()


def tensors_of(arguments: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """Return (name, tensor) of every tensor that has rows, in order; the name of a lone tensor is empty."""
    if isinstance(arguments, Tensor):
        return [(name, arguments)] if arguments.dim() else []
    entries: Sequence[tuple[Any, Any]] = ()
    if isinstance(arguments, Mapping):
        entries = list(arguments.items())
    elif isinstance(arguments, tuple | list):
        entries = list(enumerate(arguments))
    return [pair for key, entry in entries for pair in tensors_of(entry, f"{name}.{key}" if name else str(key))]


def map_tensors(change: Callable[[Tensor], Tensor], arguments: Any) -> Any:
    """Return the arguments with every tensor that has rows changed."""
    if isinstance(arguments, Tensor):
        return change(arguments) if arguments.dim() else arguments
    if isinstance(arguments, Mapping):
        return {key: map_tensors(change, entry) for key, entry in arguments.items()}
    if isinstance(arguments, tuple | list):
        return tuple(map_tensors(change, entry) for entry in arguments)
    return arguments


def count_samples(arguments: Any) -> int:
    """Return the number of samples of arguments.

    Raises:
        InputError: there is no tensor, or tensors have different numbers of rows.
    """
    if isinstance(arguments, Tensor) and arguments.dim():
        return len(arguments)
    tensors = tensors_of(arguments)
    if not tensors:
        raise InputError(
            f"a batch's input is {type(arguments).__name__} without a tensor of samples; prepare= turns it into the"
            " network's arguments"
        )
    if len({len(tensor) for _, tensor in tensors}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors)
        raise InputError(f"the arguments of a batch have different numbers of rows: {shapes}")
    return len(tensors[0][1])


def name_sample(arguments: Any) -> str:
    """Return what messages call a sample: an image, where the network's argument is a tensor (n, c, h, w)."""
    return "image" if isinstance(arguments, Tensor) and arguments.dim() == 4 else "sample"


def take_rows(arguments: Any, start: int, stop: int) -> Any:
    """Return the samples from `start` to before `stop`."""
    return map_tensors(lambda tensor: tensor[start:stop], arguments)


def select_samples(batch: Any, kept: Tensor) -> Any:  # kept: (n,) bool
    """Return the samples of a batch's input, not yet prepared, that are kept: of tensors, or of a list of anything."""
    if isinstance(batch, Tensor):
        return batch[kept.to(batch.device)] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {key: select_samples(entry, kept) for key, entry in batch.items()}
    if not isinstance(batch, tuple | list):
        return batch
    if any(isinstance(entry, Tensor | Mapping) for entry in batch):  # columns
        return tuple(select_samples(entry, kept) for entry in batch)
    return [entry for entry, one in zip(batch, kept.tolist(), strict=True) if one]


def repeat_samples(arguments: Any, count: int) -> Any:
    """Return `count` samples: the first ones, again and again where there are fewer."""
    rows = torch.arange(count) % count_samples(arguments)
    return map_tensors(lambda tensor: tensor[rows.to(tensor.device)], arguments)


def move(arguments: Any, device: torch.device) -> Any:
    """Return the arguments on a device."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), arguments)


def cast_floats(arguments: Any, dtype: torch.dtype) -> Any:
    """Return the arguments with floating-point tensors of this type; others are unchanged."""
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, arguments)


def device_of(arguments: Any) -> torch.device:
    """Return the device of the first tensor."""
    return tensors_of(arguments)[0][1].device


def describe_input(arguments: Any, mask: Tensor | None = None) -> dict[str, Any]:
    """Return what a cache's identity says of inputs that are no images: `shape` and `description`.

    Args:
        arguments: a batch.
        mask: (n, length); sizes equal to its length are those of padded samples, and not part of the shape.
    """
    length = None if mask is None else mask.shape[1]
    parts = []
    tensors = tensors_of(arguments)
    for name, tensor in tensors:
        sizes = ["length" if size == length else str(size) for size in tensor.shape[1:]]
        parts.append(f"{name} {str(tensor.dtype).removeprefix('torch.')} ({', '.join(sizes)})".strip())
    shape = [size for size in tensors[0][1].shape[1:] if size != length]
    return {"shape": shape, "description": "; ".join(parts)}


def first_output(output: object) -> Tensor | None:
    """Return a module's output, or the first entry of a tuple or mapping that it returns, where that is a tensor."""
    if isinstance(output, Mapping):
        output = next(iter(output.values()), None)
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def replace_first(output: Any, tensor: Tensor) -> Any:
    """Return a module's output with another first tensor, as `first_output` has it."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        changed[next(iter(output))] = tensor
        return changed
    if hasattr(output, "_fields"):  # a named tuple
        return type(output)(tensor, *output[1:])
    return type(output)((tensor, *output[1:]))
