"""Buffers that a network's forward changes: counters, moving averages. They are restored after a run.

Buffers belong to the weights by which a cache and a detector know their network: a network that counts its calls would
be another one after each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nacpipe.networks.wrappers import is_scripted


@contextmanager
def kept_buffers(network: nn.Module) -> Iterator[list[str]]:
    """Restore the buffers of a network after the `with` block; the list then names those that it had changed.

    One that is in no state dict and was replaced stays replaced, such as a table of positions that grew with the input:
    the network may have noted its new size.
    """
    before = [
        (f"{path}.{name}" if path else name, module, name, buffer, _version(buffer), buffer.detach().clone())
        for path, module in network.named_modules()
        if not is_scripted(module)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for path, module, name, buffer, version, value in before:
            replaced = module._buffers.get(name) is not buffer
            if replaced and name in module._non_persistent_buffers_set:
                continue
            if replaced:
                module._buffers[name] = buffer
            if _version(buffer) != version:
                with torch.no_grad():
                    once = _once(buffer)
                    buffer[once].copy_(value[once])
            elif not replaced:
                continue
            changed.append(path)


def _once(tensor: Tensor) -> tuple[slice, ...]:
    """Return an index that takes every place in memory once: torch writes to no expanded tensor."""
    if tensor.layout is not torch.strided:
        return ()
    return tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())


def _version(tensor: Tensor) -> int:
    """Return torch's count of in-place changes of a tensor, which one made under inference mode has not."""
    return -1 if tensor.is_inference() else tensor._version
