"""The arithmetic that a network runs in.

    fp32   in the type of its weights; float32 products are exact            contiguous
    tf32   float32 products are rounded to TF32: CUDA, from Ampere on        channels last
    bf16   torch.autocast to bfloat16                                        channels last on CUDA
    fp16   torch.autocast to float16; gradients times 1024, divided again    channels last on CUDA

Tensor cores take half types and TF32 channel by channel, which is why these are laid out so on CUDA.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor, nn

from nacpipe.errors import InputError, first_line
from nacpipe.text import spell_option

FP32, TF32, BF16, FP16 = "fp32", "tf32", "bf16", "fp16"
AUTOCAST: Mapping[str, torch.dtype | None] = {FP32: None, TF32: None, BF16: torch.bfloat16, FP16: torch.float16}
"""Precision → the type of torch.autocast."""
GRADIENT_SCALE = 1024.0
"""Of float16's gradients, whose smallest number is 6e-8: a power of two, so that dividing it out rounds nothing."""
FORMATS = CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
_AMPERE = (8, 0)
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_NO_DETERMINISTIC = re.compile(
    r"(\S+) does not have a deterministic implementation|^(.+?) defaults to a non-deterministic algorithm"
)
_CUBLAS = re.compile(r"Deterministic behavior was enabled .*CuBLAS", re.DOTALL)


def check_precision(name: str, *, python: bool = False) -> None:
    """Refuse a name that is no precision's.

    Raises:
        InputError: naming it and those that there are.
    """
    if name not in AUTOCAST:
        shown = "precision" if python else "--precision"
        raise InputError(f"{shown} is {name!r}; known: {', '.join(AUTOCAST)}")


def check_support(name: str, device: torch.device, *, python: bool = False) -> None:
    """Refuse a precision that a device does not compute in; of half types a convolution and a product are tried.

    Raises:
        InputError: naming precision, device and what to take.
    """
    if name == TF32 and device.type != "cuda":
        why = f"{device.type} has no TF32"
    elif name == TF32 and torch.cuda.get_device_capability(device) < _AMPERE:
        why = f"{torch.cuda.get_device_name(device)} is older than Ampere and has no TF32"
    elif (dtype := AUTOCAST[name]) is not None:
        why = _try(dtype, device)
    else:
        why = ""
    if why:
        asked, instead = (spell_option("precision", value, python=python) for value in (name, FP32))
        raise InputError(f"{asked} cannot be used on {device}: {why}; take {instead}")


def _try(dtype: torch.dtype, device: torch.device) -> str:
    """Return why a device does not compute in a half type, forward and backward, or ""."""
    image = torch.ones((1, 2, 4, 4), device=device)
    kernel, weight = torch.ones((2, 2, 3, 3), device=device), torch.ones((3, 8), device=device)
    try:
        with warnings.catch_warnings(), torch.enable_grad(), torch.autocast(device.type, dtype=dtype):
            warnings.simplefilter("ignore")  # as of a GPU's first product
            warnings.filterwarnings("error", "(?s).*autocast", UserWarning)  # where torch leaves autocast out, it warns
            image.requires_grad_()
            found = nn.functional.linear(torch.conv2d(image, kernel).flatten(1), weight)
            torch.autograd.grad(found.sum(), image)
    except (RuntimeError, TypeError, UserWarning) as error:
        return first_line(error)
    return "" if found.dtype is dtype else f"torch.autocast gives {found.dtype} there"


def choose_format(precision: str, device: torch.device) -> str:
    """Return the memory format of a precision on a device."""
    return CHANNELS_LAST if device.type == "cuda" and precision != FP32 else CONTIGUOUS


def stored_format(identity: Mapping[str, Any], device: torch.device) -> str:
    """Return the memory format of a cache's states, for a device of the type that they were made on."""
    made = identity.get("arithmetic")
    same = isinstance(made, Mapping) and (made.get("device"), made.get("memory_format")) == (device.type, CHANNELS_LAST)
    return CHANNELS_LAST if same else CONTIGUOUS


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Round float32 products as a precision says, whatever the caller or a network's file chose; restored afterwards.

    Both of torch's ways to say it are set: reading one that contradicts the other is an error.
    """
    backends: Any = torch.backends
    of_gpu = [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul]
    of_cpu = [backends.mkldnn.conv, backends.mkldnn.rnn, backends.mkldnn.matmul]
    kinds = [*of_gpu, *of_cpu]
    before = [kind.fp32_precision for kind in kinds]
    try:
        whole = torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller's two ways contradict each other
        whole = None
    try:
        backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = precision == TF32
        for kind in of_gpu:  # allow_tf32 = False leaves cuDNN's to what was chosen for all of torch
            kind.fp32_precision = "tf32" if precision == TF32 else "ieee"
        for kind in of_cpu:
            kind.fp32_precision = "ieee"
        yield
    finally:
        if whole is not None:
            torch.set_float32_matmul_precision(whole)
        backends.cudnn.allow_tf32 = before[0] == "tf32"
        for kind, value in zip(kinds, before, strict=True):
            kind.fp32_precision = value


def lay_out(network: nn.Module) -> None:
    """Lay out the weights of convolutions channels last."""
    for kernel in _kernels(network):
        kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)


def _kernels(network: nn.Module) -> list[Tensor]:
    return [module.weight for module in network.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]


@contextmanager
def laid_out(network: nn.Module, memory_format: str) -> Iterator[None]:
    """Lay out the weights of convolutions, which their outputs follow; afterwards they are the former tensors."""
    if memory_format == CONTIGUOUS:
        yield
        return
    before = [(kernel, kernel.data) for kernel in _kernels(network)]
    try:
        lay_out(network)
        yield
    finally:
        for kernel, data in before:
            kernel.data = data


@contextmanager
def deterministic(found: Callable[[str], None] = lambda name: None) -> Iterator[None]:
    """Let torch choose algorithms that give the same bits every time; restored afterwards.

    Args:
        found: called with the name of an operation that has none, each time it runs.
    """
    environment = os.environ.get(_WORKSPACE)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills, cudnn = memory.fill_uninitialized_memory, torch.backends.cudnn
    with ExitStack() as undo:
        undo.callback(torch.use_deterministic_algorithms, before[0], warn_only=before[1])
        undo.callback(setattr, memory, "fill_uninitialized_memory", fills)
        undo.callback(setattr, cudnn, "deterministic", cudnn.deterministic)
        undo.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
        undo.callback(_set_environment, _WORKSPACE, environment)
        _set_environment(_WORKSPACE, environment or ":4096:8")  # cuBLAS reads it when it starts
        memory.fill_uninitialized_memory = False  # which costs a pass over all new memory
        cudnn.deterministic, cudnn.benchmark = True, False  # which takes what was fastest on that day
        torch.use_deterministic_algorithms(True, warn_only=True)
        undo.enter_context(warnings.catch_warnings())
        for pattern in (_NO_DETERMINISTIC, _CUBLAS):
            warnings.filterwarnings("always", f".*{pattern.pattern}", UserWarning)
        show = warnings.showwarning

        def note(message: Warning | str, *place: Any, **more: Any) -> None:
            if match := _NO_DETERMINISTIC.search(str(message)):
                found(match[1] or match[2])
            elif _CUBLAS.search(str(message)):
                found("cuBLAS")
            else:
                show(message, *place, **more)

        warnings.showwarning = note
        yield


def only_warns() -> bool:
    """Return whether torch runs what has no deterministic algorithm with a warning, as in `deterministic`."""
    return torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()


@contextmanager
def strictly_deterministic() -> Iterator[None]:
    """Within `deterministic`, raise an error in place of its warnings; restored afterwards.

    Attention on CUDA has a deterministic backward pass, which torch takes only so: where it warns, it takes another.
    """
    if not only_warns():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextmanager
def arithmetic(precision: str, found: Callable[[str], None] = lambda name: None) -> Iterator[None]:
    """Round products as a precision says, by deterministic algorithms; all is restored afterwards.

    It is in force from a network's first run on, because cuBLAS reads its setting once.

    Args:
        precision: of `AUTOCAST`; the half type itself is for `Taps`.
        found: called with the name of an operation that has no deterministic algorithm.
    """
    with products(precision), deterministic(found):
        yield


@contextmanager
def computing(
    network: nn.Module, precision: str, memory_format: str, found: Callable[[str], None] = lambda name: None
) -> Iterator[None]:
    """`arithmetic`, and a network's convolutions in a memory format of `choose_format`; all is restored afterwards."""
    with laid_out(network, memory_format), arithmetic(precision, found):
        yield
