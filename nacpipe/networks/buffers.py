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
    """Restore the buffers of a network after the `with` block; the list then names those that it had changed."""
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
            if replaced:
                module._buffers[name] = buffer
            if _version(buffer) != version:
                with torch.no_grad():
                    buffer.copy_(value)
            elif not replaced:
                continue
            changed.append(path)


def _version(tensor: Tensor) -> int:
    """Return torch's count of in-place changes of a tensor, which one made under inference mode has not."""
    return -1 if tensor.is_inference() else tensor._version
