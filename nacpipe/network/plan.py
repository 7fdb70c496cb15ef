"""What extraction will do, as a value: what is there, what is missing, rows and bytes, where it goes on.

`--dry-run` prints it; `extract` obeys it.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray

import nacpipe
from nacpipe.cache import Header, open_cache
from nacpipe.cache.append import check_identity
from nacpipe.cache.layout import BLOCK_ROWS, check_layer_names, count_blocks
from nacpipe.core.benchmarks import Split, find_benchmark
from nacpipe.core.provenance import diff
from nacpipe.errors import IdentityError, ImageError, InputError
from nacpipe.network.images import ImageSet, open_images
from nacpipe.network.models import Network, find_model, load_network, measure_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractRequest:
    """What someone asks for."""

    benchmark: str
    model: str
    cache: Path
    checkpoint: Path | None = None
    layers: tuple[str, ...] = ()
    """Aliases; none means the model's default four."""
    data_root: Path = Path("data")
    train_images: int = 1000
    train_seed: int = 1
    batch_size: int = 128
    device: str = "auto"
    splits: tuple[str, ...] = ()
    """Names; none means every split whose list is there."""
    force: tuple[str, ...] = ()
    """Splits to drop and extract again."""
    allow_truncated: bool = False
    workers: int = 2
    """Threads that decode images."""
    command: str = ""
    """The command line, remembered so that errors can name it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """What is to be done for one split."""

    images: ImageSet
    todo: tuple[int, ...]
    """Blocks to write, ascending."""
    blocks: int
    sealed: bool
    drop: bool
    """Removed first: asked for with --force."""

    @property
    def rows(self) -> int:
        """Samples of the split."""
        return int(self.images.index.size)

    @property
    def state(self) -> str:
        """In a word or two, for people."""
        if self.sealed:
            return "done"
        if self.drop:
            return "again"
        return "new" if len(self.todo) == self.blocks else f"from block {self.todo[0]}" if self.todo else "to seal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything extraction will do."""

    request: ExtractRequest
    header: Header
    network: Network = field(repr=False)
    exists: bool
    """Whether the cache is there already."""
    splits: tuple[SplitPlan, ...]
    notes: tuple[str, ...]
    """What to say aloud: sets left out, lists that stand in for others."""

    def rows_of_block(self, split: SplitPlan, block: int) -> range:
        """Return a block's rows."""
        start = block * self.header.block_rows
        return range(start, min(start + self.header.block_rows, split.rows))

    def batches(self, split: SplitPlan, block: int) -> list[range]:
        """Return a block's batches; none crosses a block, so resuming keeps every boundary."""
        rows = self.rows_of_block(split, block)
        size = self.request.batch_size
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    @property
    def todo_rows(self) -> int:
        """Samples still to be run through the network."""
        return sum(len(self.rows_of_block(s, b)) for s in self.splits for b in s.todo)


def plan_extraction(request: ExtractRequest) -> Plan:
    """Decide what to do; reads lists, weights and the cache's marks, changes nothing.

    Raises:
        InputError: an unknown benchmark, model, layer or split, or a file that is not there.
        IdentityError: the cache was made from something else.
    """
    _pin_arithmetic()
    benchmark = find_benchmark(request.benchmark)
    model = find_model(request.model)
    if request.batch_size < 1:
        raise InputError(f"batch-size is {request.batch_size}; it must be at least 1")
    for name in (*request.splits, *request.force):
        benchmark.split(name)
    check_layer_names(list(model.choose_layers(request.layers)))
    sets, notes = _open_sets(request)
    network = load_network(model, benchmark, request.checkpoint, find_device(request.device))
    header = _header(request, network)
    exists = (request.cache / "zarr.json").exists()
    done: dict[str, tuple[bool, NDArray[np.bool_]]] = {}
    if exists:
        cache = open_cache(request.cache)
        check_identity(cache.path, cache.header, header)
        header = replace(header, block_rows=cache.header.block_rows)
        for images in sets:
            if images.name in cache and images.name not in request.force:
                split = cache.peek(images.name)
                _check_images(cache.path, images, split.images)
                done[images.name] = (split.sealed, split.marks())
        forced = [name for name in request.force if name in cache]
    else:
        forced = []
    plans = []
    for images in sets:
        blocks = count_blocks(int(images.index.size), header.block_rows)
        sealed, marks = done.get(images.name, (False, np.zeros(blocks, bool)))
        todo = () if sealed else tuple(int(b) for b in np.flatnonzero(~marks))
        plans.append(SplitPlan(images=images, todo=todo, blocks=blocks, sealed=sealed, drop=images.name in forced))
    for plan in plans:
        if plan.todo:
            plan.images.check(plan.images.index)
    return Plan(request=request, header=header, network=network, exists=exists, splits=tuple(plans), notes=tuple(notes))


def find_device(name: str) -> torch.device:
    """Return the device of that name; `auto` takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        InputError: this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used here: {str(error).splitlines()[0][:120]}") from None
    return device


def _pin_arithmetic() -> None:
    """Let convolutions on the CPU sum in the same order on every x86 machine (docs/decisions/same-values.md).

    Otherwise processors with AVX-512 round differently, a ReLU near 0 flips, and a resumed cache differs in its
    gradients by 1e-3. The variable is read at a process's first convolution; someone who set it has chosen.
    """
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")


def _open_sets(request: ExtractRequest) -> tuple[list[ImageSet], list[str]]:
    """Open the lists of the wanted splits; leave out, and say so, what nobody asked for by name and is not there."""
    benchmark = find_benchmark(request.benchmark)
    sets: list[ImageSet] = []
    notes: list[str] = []
    wanted = [s for s in benchmark.splits if not request.splits or s.name in request.splits or s.name in request.force]
    for split in wanted:
        images = open_images(
            benchmark,
            split,
            request.data_root,
            train_images=request.train_images,
            train_seed=request.train_seed,
            allow_truncated=request.allow_truncated,
        )
        if images is not None:
            sets.append(images)
            notes += images.notes
        elif split.optional and not request.splits:
            notes.append(f"{split.name}: left out, its list is not there ({split.source})")
        else:
            raise _missing_list(request, split)
    return sets, notes


def _missing_list(request: ExtractRequest, split: Split) -> ImageError:
    path = request.data_root / "benchmark_imglist" / request.benchmark / split.source
    return ImageError(f"{split.name}: there is no image list {path}; say where the data is with --data-root DIR")


def _check_images(path: str, images: ImageSet, stored: Any) -> None:
    if differences := diff(dict(stored), images.identity()):
        raise IdentityError(
            f"{path}: {images.name} was made from other images: {'; '.join(differences)}. Give the same options, or"
            f" extract it again with --force {images.name}"
        )


def _header(request: ExtractRequest, network: Network) -> Header:
    layers, classes, features = measure_layers(network, request.layers)
    transform = network.transform
    return Header(
        identity={
            "benchmark": request.benchmark,
            "architecture": network.model.name,
            "family": network.model.family,
            "weights": network.weights_sha256,
            "transform": {
                "resize": transform.resize,
                "crop": transform.crop,
                "mean": list(transform.mean),
                "std": list(transform.std),
            },
            "dtype": "float32",
        },
        information={
            "nacpipe": nacpipe.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "device": str(network.device),
            "batch_size": request.batch_size,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "checkpoint": "packaged" if request.checkpoint is None else request.checkpoint.name,
            "data_root": str(request.data_root),
            "command": request.command,
        },
        block_rows=_block_rows(request.batch_size),
        layers=layers,
        classes=classes,
        features=features,
    )


def _block_rows(batch_size: int) -> int:
    """The largest whole number of batches within the usual block, or one batch where that is larger."""
    return max(BLOCK_ROWS // batch_size, 1) * batch_size


def name_cache(benchmark: str, model: str) -> Path:
    """Return where a cache goes when nobody says."""
    return Path("cache") / f"{benchmark}-{model}.zarr"


def total_bytes(plan: Plan, splits: Sequence[SplitPlan]) -> int:
    """Return the raw bytes of these splits."""
    return sum(split.rows for split in splits) * plan.header.row_bytes()
