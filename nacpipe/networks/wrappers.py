"""Networks inside wrappers: torch.compile's, DataParallel's, scripted ones; and a network's device and dtype.

torch.compile(net)._orig_mod ──┐
DataParallel(net).module ──────┼──▶ net        module paths and keys without prefixes; hooks run
a wrapped child of net ────────┘
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

_INNER_NETWORK = {  # a wrapper's class name → its attribute with the inner network
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DataParallel": "module",
    "DistributedDataParallel": "module",  # of torch and of apex
    "AveragedModel": "module",  # torch.optim.swa_utils
}


class HookedScript(nn.Module):
    """Runs a scripted module, which takes no hooks, so that hooks on this module get its output."""

    def __init__(self, scripted: nn.Module) -> None:
        super().__init__()
        self._scripted = (scripted,)  # in a tuple, so that torch does not register it as a child

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._scripted[0](*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the scripted module's state dict."""
        return self._scripted[0].state_dict(*args, **kwargs)


def unwrap(network: nn.Module) -> nn.Module:
    """Return the network inside torch.compile's, DataParallel's and similar wrappers, or the network itself."""
    while (attribute := _attribute(network)) is not None:
        network = getattr(network, attribute)
    return network


def unwrap_children(network: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Replace every wrapped or scripted module inside a network by one that takes hooks.

    Returns:
        (parent, name, replaced module) of each, for `restore_children`.
    """
    replaced = []
    for parent in list(network.modules()):
        if is_scripted(parent):
            continue
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            inner = unwrap(child)
            if is_scripted(inner):
                inner = HookedScript(inner)
            if inner is not child:
                parent._modules[name] = inner
                replaced.append((parent, name, child))
    return replaced


def restore_children(replaced: list[tuple[nn.Module, str, nn.Module]]) -> None:
    """Undo `unwrap_children`."""
    for parent, name, child in reversed(replaced):
        parent._modules[name] = child


def named_state(network: nn.Module) -> dict[str, Any]:
    """Return the state dict of a network without the names of wrappers, around it or inside it."""
    network = unwrap(network)
    wrappers = [
        (f"{path}.{attribute}.", f"{path}.")
        for path, module in network.named_modules()
        if (attribute := _attribute(module)) is not None
    ]
    state = {}
    for key, value in network.state_dict().items():
        for inside, outside in reversed(wrappers):  # the innermost first
            key = outside + key.removeprefix(inside) if key.startswith(inside) else key
        state[key] = value
    return state


def find_device_and_dtype(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device of a network's weights, and the type of its first floating-point one."""
    tensors = [*network.parameters(), *network.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    return device, next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def run_eagerly() -> AbstractContextManager[Any]:
    """Run compiled code eagerly, because code of torch.compile does not call hooks that are registered later."""
    if torch.compiler.is_compiling() or "torch._dynamo" not in sys.modules:  # torch.compile(detector); nothing compiled
        return nullcontext()
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


@contextmanager
def unwrapped_children(network: nn.Module) -> Iterator[None]:
    """Apply `unwrap_children` during the `with` block."""
    replaced = unwrap_children(network)
    try:
        yield
    finally:
        restore_children(replaced)


def is_scripted(module: nn.Module) -> bool:
    """Return whether a module is scripted or traced by torch.jit."""
    return isinstance(module, torch.jit.ScriptModule)


def is_frozen(scripted: nn.Module) -> bool:
    """Return whether torch.jit.freeze has made a scripted module's weights constants of its code."""
    compiled: Any = scripted._c
    return not compiled.hasattr("training")  # torch.jit.freeze removes it, with the weights


def _attribute(module: nn.Module) -> str | None:
    return next(
        (_INNER_NETWORK[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in _INNER_NETWORK), None
    )
