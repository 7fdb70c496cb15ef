"""The plan of an extraction: existing and missing blocks, rows and bytes.

`--dry-run` prints it; `extract` executes it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nacpipe.benchmarks.lists import list_path
from nacpipe.benchmarks.standard import Split
from nacpipe.benchmarks.toml import choose_root, open_benchmark
from nacpipe.cache import Header, open_cache
from nacpipe.cache.address import holds_cache, open_store
from nacpipe.cache.identity import diff
from nacpipe.cache.layout import check_layer_names, count_blocks
from nacpipe.cache.split import SplitView
from nacpipe.cache.writer import check_identity
from nacpipe.errors import IdentityError, ImageError, InputError
from nacpipe.extraction.dataset import ImageSet, open_images
from nacpipe.extraction.decoder import Decoder, check_decoder, check_gpu
from nacpipe.extraction.distributed import Ranks
from nacpipe.extraction.request import (
    AnyRequest,
    ExtractRequest,
    choose_block_rows,
    find_device,
    make_header,
    name_device,
    pin_arithmetic,
)
from nacpipe.extraction.samples import MapSamples, StreamSamples
from nacpipe.files import is_url
from nacpipe.networks.batch_runner import Clock, no_clock
from nacpipe.networks.build import Network, blank_network, load_network
from nacpipe.networks.layers import measure_layers, name_layers
from nacpipe.networks.models import find_model
from nacpipe.networks.precision import CHANNELS_LAST, FORMATS, FP32, TF32, arithmetic, check_support, computing
from nacpipe.networks.taps import Taps, find_penultimate
from nacpipe.text import spell_option

Samples = ImageSet | MapSamples | StreamSamples


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """The work for one split."""

    images: Samples
    todo: tuple[int, ...]
    """Blocks to write, ascending."""
    blocks: int
    sealed: bool
    drop: bool
    """Whether the split is removed first (--redo)."""

    @property
    def rows(self) -> int:
        """Samples of the split."""
        return int(self.images.index.size)

    @property
    def state(self) -> str:
        """The state in a few words."""
        if self.sealed:
            return "done"
        if self.drop:
            return "again"
        return "new" if len(self.todo) == self.blocks else f"from block {self.todo[0]}" if self.todo else "to seal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The plan of an extraction."""

    request: AnyRequest
    header: Header
    network: Network = field(repr=False)
    penultimate: Set[str]
    """Layers whose pooled output is the classifier's input."""
    overwritten: Set[str]
    """Layers whose output a later module changes in place."""
    exists: bool
    """Whether the cache exists."""
    blocks_are_open: bool
    """Whether `choose_blocks` (pipeline.py) sets the rows of a block; until then the header has the largest number."""
    splits: tuple[SplitPlan, ...]
    notes: tuple[str, ...]
    """Notes to print: sets that are left out, lists that replace others."""

    @property
    def device(self) -> str:
        """The device, as it was asked for."""
        return self.request.device if isinstance(self.request, ExtractRequest) else str(self.network.device)

    def with_block_rows(self, block_rows: int) -> Plan:
        """Return the plan of a new cache with this number of rows per block."""
        splits = []
        for split in self.splits:
            blocks = count_blocks(split.rows, block_rows)
            splits.append(replace(split, blocks=blocks, todo=tuple(range(blocks))))
        header = replace(self.header, block_rows=block_rows)
        return replace(self, header=header, splits=tuple(splits), blocks_are_open=False)

    def units(self, split: SplitPlan) -> list[int]:
        """Return the first blocks of the units of writing: unmarked blocks, or shards that contain one."""
        shard = self.header.shard_blocks
        return sorted({block - block % shard for block in split.todo})

    def rows_of_unit(self, split: SplitPlan, unit: int) -> range:
        """Return a unit's rows."""
        start, size = unit * self.header.block_rows, self.header.block_rows * self.header.shard_blocks
        return range(start, min(start + size, split.rows))

    def batches(self, split: SplitPlan, unit: int) -> list[range]:
        """Return a unit's batches; none crosses a block, so resuming and sharing keep every boundary.

        With another batch size than the cache's, the last batch of a block has the remaining rows.
        """
        rows, block, size = self.rows_of_unit(split, unit), self.header.block_rows, self.request.batch_size
        blocks = [rows[i : i + block] for i in range(0, len(rows), block)]
        return [b[i : i + size] for b in blocks for i in range(0, len(b), size)]

    def work(self, ranks: Ranks) -> Sequence[tuple[SplitPlan, int]]:
        """Return the units of all splits that this rank writes, in order: (split, first block)."""
        units = [(split, unit) for split in self.splits for unit in self.units(split)]
        return ranks.share(units, [len(self.rows_of_unit(split, unit)) for split, unit in units])

    def units_of(self, ranks: Ranks) -> Mapping[str, Sequence[int]]:
        """Return this rank's `work` by splits: every split's name → the first blocks of its units, in order."""
        units: dict[str, list[int]] = {split.images.name: [] for split in self.splits}
        for split, unit in self.work(ranks):
            units[split.images.name].append(unit)
        return units

    def todo(self, ranks: Ranks) -> Mapping[str, int]:
        """Return split's name → the samples that this rank still has to run through the network."""
        units = self.units_of(ranks)
        return {split.images.name: self.count_rows(split, units[split.images.name]) for split in self.splits}

    def count_rows(self, split: SplitPlan, units: Sequence[int]) -> int:
        """Return the number of rows of some of a split's units."""
        return sum(len(self.rows_of_unit(split, unit)) for unit in units)

    def todo_rows(self, ranks: Ranks) -> int:
        """Return the samples that this rank still has to run through the network."""
        return sum(self.todo(ranks).values())

    def computing(self, found: Callable[[str], None] = lambda name: None) -> AbstractContextManager[None]:
        """Return the context in which the network runs: precision, memory format, deterministic algorithms.

        Args:
            found: called with the name of an operation that has no deterministic algorithm.
        """
        memory_format = self.header.identity["arithmetic"]["memory_format"]
        return computing(self.network.module, self.request.precision, memory_format, found)

    def taps(self, clock: Clock = no_clock) -> Taps:
        """Return hooks on the network's layers, with the request's options."""
        request, network = self.request, self.network
        return Taps(
            network.module,
            self.header.layers,
            network.model.classifier,
            penultimate=self.penultimate,
            overwritten=self.overwritten,
            outputs=network.model.outputs,
            precision=request.precision,
            gradients=request.gradient,
            call=network.call,
            clock=clock,
        )


def plan_extraction(request: ExtractRequest, *, dry: bool = False, ranks: Ranks = Ranks()) -> Plan:  # noqa: B008
    """Plan an extraction; reads lists, weights and the cache's marks, and changes nothing.

    Args:
        request: the options.
        dry: the plan is only printed: a file of weights is read and checked, none are loaded, and missing images are
            counted, not refused.
        ranks: this process among those that write the cache.

    Raises:
        InputError: an unknown benchmark, model, layer or split, a missing file, or a label of an ID or csid split that
            is not a class of the benchmark.
        IdentityError: the cache has another identity.
    """
    pin_arithmetic()
    request.check()
    benchmark = open_benchmark(request.benchmark)
    model = find_model(request.model)
    for name in (*request.splits, *request.redo):
        benchmark.split(name)
    exists = holds_cache(request.cache)
    if not exists:  # one of version 1 can have other names
        check_layer_names(list(name_layers(request.layers)))
    check_decoder(request.decoder, benchmark.packaged)
    decoder = Decoder(name=request.decoder, device=name_device(request.device, ranks.local, ranks.local_world))
    sets, notes = _open_sets(request, decoder)
    if not (dry or request.splits):
        sets = _with_images(request, decoder, sets, notes)
    if dry:
        network = blank_network(model, benchmark, request.checkpoint, request.weights_transform)
    else:
        device = find_device(request.device, ranks.local, ranks.local_world)
        if ranks.local_world > 1 and request.device.startswith(("cuda:", "xpu:")):
            notes.append(
                f"--device {shlex.quote(request.device)} is one GPU; each of the {ranks.local_world} processes here has"
                " its own"
            )
        check_gpu(request.decoder, device)
        check_support(request.precision, device)
        with arithmetic(FP32):  # a network's file may choose otherwise; --precision decides
            network = load_network(model, benchmark, request.checkpoint, device, request.weights_transform)
    notes += [f"images are prepared by {network.prepared_by}: {network.image_transform.describe()}", *network.notes]
    with arithmetic(FP32):
        measured = measure_layers(network, request.layers, request.poolings, gradients=request.gradient)
    header = make_header(request, network, measured)
    return plan_splits(request, header, network, sets, (*notes, *measured.notes), dry=dry)


def plan_splits(
    request: AnyRequest,
    header: Header,
    network: Network,
    sets: Sequence[Samples],
    notes: Sequence[str] = (),
    *,
    dry: bool = False,
) -> Plan:
    """Plan what is missing of these sets in a cache, which may exist; both the command line and Python come here.

    Args:
        request: the options.
        header: a new cache's; of one that exists blocks and version are kept.
        network: the network.
        sets: what the splits are made from.
        notes: what to print.
        dry: weights and device are not known and not compared, and nothing is run.

    Raises:
        IdentityError: the cache has another identity, or a split was made from something else.
        InputError: blocks are no multiple of the batch, or a listed image is missing.
    """
    notes, exists = list(notes), holds_cache(request.cache)
    if not exists:
        _check_block(request, header)
        if request.block_rows is None:
            max_rows = choose_block_rows(request.batch_size, 0.0, header.most_block_rows)
            header = replace(header, block_rows=max_rows)
    if is_url(request.cache):
        open_store(request.cache, write=True)  # refuses addresses that cannot be written
        notes.append(
            f"{request.cache}: two extractions into it at once are not refused, as they are in a folder; run one"
        )
    done: dict[str, tuple[bool, NDArray[np.bool_]]] = {}
    redone: list[str] = []
    if exists:
        cache = open_cache(request.cache)
        if dry:  # weights and device are not known, and not compared
            stored_fields = {k: v for k, v in cache.header.identity.items() if k in ("weights", "arithmetic")}
            if isinstance(before := stored_fields.get("arithmetic"), Mapping):
                stored_fields["arithmetic"] = {**before, "tf32": request.precision == TF32}
            header = replace(header, identity={**header.identity, **stored_fields})
        header = _keep_format(cache.header, header)
        check_identity(cache.path, cache.header, header)
        if not dry:
            _check_features(cache.path, cache.header, header, network)
        if request.block_rows not in (None, cache.header.block_rows):
            rows = spell_option("block-rows", request.block_rows, python=request.from_python)
            notes.append(
                f"{cache.path} has blocks of {cache.header.block_rows} rows since it was made;"
                f" {rows} is for a new cache"
            )
        kept = {name: getattr(cache.header, name) for name in ("version", "block_rows", "shard_blocks")}
        header = replace(header, **kept)
        for images in sets:
            if images.name not in cache:
                continue
            split = cache.peek(images.name)
            if isinstance(images, StreamSamples):
                done[images.name] = (_check_stream(cache.path, images, split, request.redo), split.marks())
                redone += [] if done[images.name][0] else [images.name]  # it starts anew
                continue
            if images.name in request.redo and (split.sealed or diff(split.images, images.identity())):
                redone.append(images.name)  # an unfinished split was dropped before and continues
                continue
            if other_number := _wants_other_number(images, split.images):
                redone.append(images.name)
                notes.append(other_number)
                continue
            _check_images(cache.path, images, split.images)
            done[images.name] = (split.sealed, split.marks())
    plans = []
    for images in sets:
        blocks = count_blocks(int(images.index.size), header.block_rows)
        sealed, marks = done.get(images.name, (False, np.zeros(blocks, bool)))
        todo = () if sealed or isinstance(images, StreamSamples) else tuple(int(b) for b in np.flatnonzero(~marks))
        plans.append(SplitPlan(images=images, todo=todo, blocks=blocks, sealed=sealed, drop=images.name in redone))
    penultimate: Set[str] = frozenset()
    overwritten: Set[str] = frozenset()
    if not dry:
        for plan in plans:
            if plan.todo and isinstance(plan.images, ImageSet):
                plan.images.check(plan.images.index)
        penultimate, overwritten = _prepare(request, network, header)
    return Plan(
        request=request,
        header=header,
        network=network,
        penultimate=penultimate,
        overwritten=overwritten,
        exists=exists,
        blocks_are_open=not exists and request.block_rows is None,
        splits=tuple(plans),
        notes=tuple(notes),
    )


def _check_block(request: AnyRequest, header: Header) -> None:
    """Refuse blocks that are not a multiple of the batch, or that cannot be stored."""
    rows, batch = ("block_rows", "batch_size") if request.from_python else ("block-rows", "batch-size")
    if header.block_rows % request.batch_size:
        raise InputError(f"{rows} is {header.block_rows}; it must be a multiple of {batch}, {request.batch_size}")
    if problem := header.block_problem():
        option = batch if request.block_rows is None else rows
        raise InputError(f"{option} is {header.block_rows}: {problem}; make it smaller")


def _with_images(
    request: ExtractRequest, decoder: Decoder, sets: Sequence[ImageSet], notes: list[str]
) -> list[ImageSet]:
    """Leave out optional sets without any image, with a note: lists come in one archive, images in many.

    A set that can be made from id/val is made from it.
    """
    benchmark, kept = open_benchmark(request.benchmark), []
    for images in sets:
        split = benchmark.split(images.name)
        if len(images.missing()) < images.index.size:
            kept.append(images)
        elif split.optional:
            notes.append(f"{images.name}: left out, none of its {images.index.size} images is there")
        elif split.synthetic_if_missing and (made := _open(request, decoder, benchmark.make_synthetic(split.name))):
            notes += [f"{images.name}: none of the {images.index.size} images of {images.source} is there", *made.notes]
            kept.append(made)
        else:
            kept.append(images)  # refused, by its first image
    return kept


def _keep_format(stored: Header, wanted: Header) -> Header:
    """Return the wanted header with the memory format that the cache was begun with, if all else is computed alike."""
    before, now = stored.identity.get("arithmetic"), wanted.identity["arithmetic"]
    if not isinstance(before, Mapping) or stored.identity.get("dtype") != wanted.identity["dtype"]:
        return wanted
    kept = {**now, "memory_format": before.get("memory_format")}
    if kept != before or kept["memory_format"] not in FORMATS:
        return wanted
    return replace(wanted, identity={**wanted.identity, "arithmetic": kept})


def _prepare(request: AnyRequest, network: Network, header: Header) -> tuple[Set[str], Set[str]]:
    """Return the layers that are the classifier's input, and those that are overwritten."""
    if not request.gradient:
        return frozenset(), frozenset()
    inputs, classifier, layers = network.examples, network.model.classifier, header.layers
    if inputs is None:
        shape = network.blank(2).shape
        inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(network.device)
    memory_format = header.identity["arithmetic"]["memory_format"]
    with computing(network.module, FP32, memory_format):  # what a layer is does not depend on rounding
        try:
            with Taps(network.module, layers, classifier, outputs=network.model.outputs, call=network.call) as taps:
                taps(inputs)
        except RuntimeError as error:
            if memory_format != CHANNELS_LAST or "view size is not compatible" not in str(error):
                raise
            fp32 = spell_option("precision", FP32, python=request.from_python)
            raise InputError(
                f"{network.model.name}: its forward calls .view on what a convolution gives, which is in another order"
                f" in memory here (channels last, {network.device}, {request.precision}); call .reshape or .flatten, or"
                f" take {fp32}"
            ) from error
        penultimate = find_penultimate(network.module, layers, classifier, inputs, network.call)
    return penultimate, taps.overwritten or frozenset()


def _open_sets(request: ExtractRequest, decoder: Decoder) -> tuple[list[ImageSet], list[str]]:
    """Open the lists of the wanted splits; missing ones that were not requested by name are left out, with a note."""
    benchmark = open_benchmark(request.benchmark)
    root = choose_root(benchmark, request.data_root)
    sets: list[ImageSet] = []
    notes: list[str] = []
    wanted = [s for s in benchmark.splits if not request.splits or s.name in request.splits or s.name in request.redo]
    for split in wanted:
        if split.name == "ood/val" and request.synthetic_val and not split.synthetic:
            split = benchmark.make_synthetic(split.name)
        images = _open(request, decoder, split)
        if images is None and split.synthetic_if_missing and not request.splits:
            images = _open(request, decoder, benchmark.make_synthetic(split.name))
            notes += [f"{split.name}: its list is not there ({split.source})"] if images is not None else []
        if images is not None:
            images.check_labels(benchmark.classes)
            sets.append(images)
            notes += images.notes
        elif split.optional and not request.splits:
            notes.append(f"{split.name}: left out, its list is not there ({split.source})")
        else:
            path = list_path(benchmark, split, root)
            what = "folder of images" if split.kind == "folders" else "image list"
            made = ""
            if split.synthetic_if_missing:
                made = ", or leave --splits out to have it made from id/val"
            elif split.name == "ood/val" and not split.synthetic:
                made = ", or have it made from id/val: [ood.val] synthetic = true in the benchmark's file"
            raise ImageError(
                f"{split.name}: there is no {what} {path}; say where the data is with --data-root DIR{made}"
            )
    return sets, notes


def _open(request: ExtractRequest, decoder: Decoder, split: Split) -> ImageSet | None:
    """Return a split's images as the request chooses them, or None if its list does not exist."""
    benchmark = open_benchmark(request.benchmark)
    return open_images(
        benchmark,
        split,
        choose_root(benchmark, request.data_root),
        train_images=request.train_images,
        train_seed=request.train_seed,
        allow_truncated=request.allow_truncated,
        decoder=decoder,
    )


def _check_features(path: str, stored: Header, wanted: Header, network: Network) -> None:
    """Refuse a cache with another classifier: an earlier nacpipe chose it by its position alone."""
    if stored.features != wanted.features:
        why = f" ({network.no_classifier})" if network.no_classifier else ""
        raise IdentityError(
            f"{path} was made with {stored.features} features, now there are {wanted.features}{why};"
            f" give another {'path' if network.from_python else '--cache'}"
        )


def _wants_other_number(images: Samples, stored: Any) -> str:
    """Return the note that id/train is extracted anew because --train-images differs, all else equal; or "".

    The command line takes the number that a cache has where the option is left out: no states are lost unasked.
    """
    wanted, before = images.identity(), dict(stored)
    count, earlier = wanted.pop("images", None), before.pop("images", None)
    if not isinstance(count, int) or not isinstance(earlier, int) or count == earlier or wanted != before:
        return ""
    return (
        f"{images.name} is extracted anew: --train-images is {count}, it was {earlier}; the other splits stay. Searches"
        " are bound to its images: give the next one another --storage FILE"
    )


def _check_images(path: str, images: Samples, stored: Any) -> None:
    if differences := diff(dict(stored), images.identity()):
        if isinstance(images, ImageSet):
            what, how = "images", f"Give the same options, or extract it again with --redo {shlex.quote(images.name)}"
        else:
            what, how = "data", f"Give the same data, or extract it again with redo=[{images.name!r}]"
        raise IdentityError(f"{path}: {images.name} was made from other {what}: {'; '.join(differences)}. {how}")


def _check_stream(path: str, images: StreamSamples, stored: SplitView, redo: Sequence[str]) -> bool:
    """Return whether an iterable's split is finished and stays as it is; any other is begun anew."""
    if not stored.sealed or images.name in redo:
        return False
    images.read_identity()
    _check_images(path, images, stored.images)
    return True


def total_bytes(plan: Plan, splits: Sequence[SplitPlan]) -> int:
    """Return the raw bytes of these splits."""
    return sum(split.rows for split in splits) * plan.header.row_bytes()
