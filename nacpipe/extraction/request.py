"""The options of an extraction, and the header of its cache."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torchvision

from nacpipe.benchmarks.toml import choose_root, open_benchmark
from nacpipe.cache import Header
from nacpipe.cache.layout import ALL_BITS, BLOCK_ROWS
from nacpipe.cache.options import ExtractOptions
from nacpipe.cache.store import REMOTE_SHARD
from nacpipe.errors import InputError, first_line
from nacpipe.extraction.decoder import PILLOW
from nacpipe.files import is_url
from nacpipe.networks.build import Network
from nacpipe.networks.layers import MeasuredLayers
from nacpipe.networks.precision import AUTOCAST, FP32, TF32, check_precision, choose_format
from nacpipe.version import __version__

BLOCK_SECONDS = 10.0  # of work, which a kill loses


class _Running:
    """What both kinds of requests tell of a run."""

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def cache(self) -> str | Path:
            """A folder, or a URL."""

        @property
        def batch_size(self) -> int:
            """Samples at once."""

        @property
        def mantissa_bits(self) -> int:
            """Bits of mantissa to keep."""

        @property
        def block_rows(self) -> int | None:
            """Rows of a block of a new cache."""

        @property
        def shard_blocks(self) -> int | None:
            """Blocks in one stored object."""

        @property
        def precision(self) -> str:
            """What the network computes in."""

    @property
    def from_python(self) -> bool:
        """Whether the options were given in Python: messages name them as they are there."""
        return isinstance(self, DataRequest)

    @property
    def blocks_per_object(self) -> int:
        """Blocks in one stored object of a new cache."""
        return self.shard_blocks if self.shard_blocks is not None else REMOTE_SHARD if is_url(self.cache) else 1

    def check(self) -> None:
        """Refuse numbers outside their limits, and an unknown precision.

        Raises:
            InputError: naming the option, the value and the limits.
        """
        limits = {"batch-size": (self.batch_size, 1, 1 << 20), "mantissa-bits": (self.mantissa_bits, 1, ALL_BITS)}
        limits |= {"shard-blocks": (self.blocks_per_object, 1, 1 << 16)}
        if self.block_rows is not None:
            limits |= {"block-rows": (self.block_rows, 1, 1 << 20)}
        for name, (value, low, high) in limits.items():
            if not low <= value <= high:
                shown = name.replace("-", "_") if self.from_python else name
                raise InputError(f"{shown} is {value}; it must lie between {low} and {high}")
        check_precision(self.precision, python=self.from_python)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractRequest(ExtractOptions, _Running):
    """The options of an extraction, its address, and the splits that this run writes."""

    cache: str | Path
    """A folder, or a URL."""
    splits: tuple[str, ...] = ()
    """Names; empty: every split whose list exists."""
    redo: tuple[str, ...] = ()
    """Finished splits to drop and extract again."""
    workers: int | None = None
    """Processes that decode images; 0: a thread; None: as loader.py chooses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRequest(_Running):
    """The options of an extraction from data sets, and its address; of the same names as the command line's."""

    cache: str | Path
    """A folder, or a URL."""
    batch_size: int
    redo: tuple[str, ...] = ()
    """Finished splits to drop and extract again."""
    precision: str = FP32
    """fp32, tf32, bf16 or fp16: what the network computes in."""
    mantissa_bits: int = ALL_BITS
    """Bits of mantissa to keep of activations, gradients and features."""
    block_rows: int | None = None
    """Rows of a block of a new cache, a multiple of `batch_size`; None: about ten seconds of work, at most 512."""
    shard_blocks: int | None = None
    """Blocks in one stored object; None: one, and of a remote cache several."""
    gradient: bool = True
    """Whether gradients are computed and written; False: forward passes alone."""


AnyRequest = ExtractRequest | DataRequest


def make_header(request: ExtractRequest, network: Network, measured: MeasuredLayers) -> Header:
    """Return a new cache's header, with its identity and information."""
    benchmark = open_benchmark(request.benchmark)
    return build_header(
        request,
        network,
        measured,
        benchmark=benchmark.name,
        prepared={
            "transform": network.image_transform.to_json(),
            **({} if request.decoder == PILLOW else {"decoder": request.decoder}),
        },
        information={
            "checkpoint": network.model.default_weights if request.checkpoint is None else request.checkpoint.name,
            "data_root": str(choose_root(benchmark, request.data_root)),
            "options": request.to_json(),
        },
    )


def build_header(
    request: AnyRequest,
    network: Network,
    measured: MeasuredLayers,
    *,
    benchmark: str,
    prepared: Mapping[str, Any],
    information: Mapping[str, Any],
) -> Header:
    """Return a new cache's header.

    Args:
        request: the options.
        network: the network.
        measured: its layers.
        benchmark: the name of the data.
        prepared: the identity's `transform` or `input`.
        information: what the information has besides versions, device and date.
    """
    return Header(
        identity={
            "benchmark": benchmark,
            "architecture": network.model.name,
            "family": network.model.family,
            "weights": network.weights_sha256,
            **prepared,
            "dtype": "float32" if AUTOCAST[request.precision] is None else request.precision,
            "arithmetic": {
                "device": network.device.type,
                "tf32": request.precision == TF32,
                "memory_format": choose_format(request.precision, network.device),
            },
            **({"source": network.source} if network.source else {}),
            **({} if network.model.outputs == "logits" else {"outputs": network.model.outputs}),
        },
        information={
            "nacpipe": __version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "device": str(network.device),
            "batch_size": request.batch_size,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **information,
            **({"no_classifier": network.no_classifier} if network.no_classifier else {}),
        },
        block_rows=request.block_rows or request.batch_size,
        layers=measured.layers,
        classes=measured.classes,
        features=measured.features,
        mantissa_bits=request.mantissa_bits,
        shard_blocks=request.blocks_per_object,
        gradients=request.gradient,
    )


def choose_block_rows(batch_size: int, seconds: float, max_rows: int = BLOCK_ROWS) -> int:
    """Return a new cache's rows of a block: 1, 2, 4, 8, … batches, within `BLOCK_ROWS` and `BLOCK_SECONDS`, or one.

    Args:
        batch_size: images of a batch.
        seconds: of a batch, times the blocks of one write; 0 if not known.
        max_rows: the largest number of rows of a block.
    """
    batches = 1
    while 2 * batches * batch_size <= min(max_rows, BLOCK_ROWS) and 2 * batches * seconds <= BLOCK_SECONDS:
        batches *= 2
    return batches * batch_size


def name_cache(benchmark: str, model: str) -> Path:
    """Return the default path of a cache."""
    return Path("cache") / f"{benchmark}-{model}.zarr"


def find_device(name: str, local: int = 0, local_world: int = 1, *, python: bool = False) -> torch.device:
    """Return the device of that name; `auto` takes CUDA, then MPS, then the CPU.

    Args:
        name: auto, cuda, cuda:1, mps, cpu, …
        local: the rank among the processes on this machine.
        local_world: the number of these processes; each has its own GPU, whichever is named.
        python: whether messages name options as they are in Python.

    Raises:
        InputError: this machine lacks the device.
    """
    name = name_device(name, local, local_world)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # `meta` has no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used here: {first_line(error, 120)}") from None
    ours = local_world > 1 or not python  # a program of the caller's may have chosen another
    if device.type == "cuda" and device.index is not None and ours:
        torch.cuda.set_device(device)  # the thread that pins memory would open the first GPU too
    return device


def name_device(name: str, local: int, local_world: int) -> str:
    """Return the name of this process's device, as `find_device` chooses it."""
    if name == "auto":
        return f"cuda:{local}" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.partition(":")[0]
    return name if local_world == 1 or kind not in ("cuda", "xpu") else f"{kind}:{local}"


def pin_arithmetic() -> None:
    """Limit convolutions on the CPU to AVX2, so that they sum in one order (docs/decisions/same-values.md).

    Otherwise processors with AVX-512 round differently, a ReLU near 0 changes state, and gradients of a resumed cache
    differ by 1e-3. The variable is read at a process's first convolution; a value set by the user is kept.
    """
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
