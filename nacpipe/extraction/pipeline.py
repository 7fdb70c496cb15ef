"""Extraction: runs the batches of a plan and writes their blocks.

    loader      decode ── decode ── decode ──▶    a few batches ahead, in processes or on a thread
    network              forward, backward ── forward, backward ──▶
    writers                                   block k ──────▶ block k + 2 ──▶
                                                 block k + 1 ──────▶ block k + 3 ──▶

After a batch that exceeds the memory, all are smaller; the cache keeps the size, with which the next run begins.

Memory holds a few blocks of pooled numbers and a few batches of images, for any number of images.

A block of a new cache has 1, 2, 4, 8, … batches: about ten seconds of work, which a kill loses, and at most 512 rows.
The number is chosen once, from the time of a trial batch, and later read from the cache.
"""

from __future__ import annotations

import secrets
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nacpipe.cache import CacheWriter, Header, open_cache
from nacpipe.cache.layout import count_blocks
from nacpipe.cache.lock import CacheLock
from nacpipe.errors import CacheError, InputError, ValuesError
from nacpipe.extraction.dataset import ImageSet, Normalise
from nacpipe.extraction.decoder import NVJPEG
from nacpipe.extraction.distributed import Ranks, WrittenUnits
from nacpipe.extraction.loader import choose_workers, load_batches
from nacpipe.extraction.plan import Plan, SplitPlan
from nacpipe.extraction.profile import COPY, DECODE, NETWORK, WAIT, WRITE, WRITERS, Profile
from nacpipe.extraction.request import BLOCK_SECONDS, ExtractRequest, choose_block_rows
from nacpipe.extraction.samples import MapSamples, StreamSamples
from nacpipe.networks.batch_runner import BatchRunner, Clock, name_hardware, no_clock
from nacpipe.networks.build import classifier_weights
from nacpipe.networks.call import name_sample
from nacpipe.networks.checkpoints import read_stated_accuracy
from nacpipe.networks.copies import Copies, choose_copies, copy_ahead
from nacpipe.networks.precision import BF16, FP16
from nacpipe.networks.taps import Tapped, named_failures
from nacpipe.text import spell_option

ACCURACY_ROWS = 8192  # rows that are read at once
BLOCKS_IN_FLIGHT = 2  # that are written while the network runs the next one
FITS = "batch_that_fits"  # of the cache's information, after one that did not: {device, images}
NONDETERMINISTIC = "nondeterministic"  # likewise, after operations without a deterministic algorithm: their names
Arrays = dict[str, NDArray[Any]]


Progress = Callable[[str, int], None]
"""Called with a split's name and the number of rows of the batch just run."""
Note = Callable[[str], None]


def extract(
    plan: Plan,
    progress: Progress = lambda split, rows: None,
    ranks: Ranks = Ranks(),  # noqa: B008 (a frozen record)
    note: Note = lambda text: None,
    profile: Profile | None = None,
) -> None:
    """Extract as planned. After a kill, the same call continues; marked blocks are never computed again.

    Args:
        plan: from `plan_extraction`; `choose_blocks` is called if needed.
        progress: called after every batch.
        ranks: this process among those that write the cache.
        note: called with notes: the accuracy on id/train when it is written; the size of batches if it is reduced.
        profile: adds up where the time goes.

    Raises:
        ImageError: an image cannot be read, naming file, list and line.
        InputError: a single image does not fit the device's memory.
        CacheError: another extraction writes this cache, it cannot be written, or another rank is gone.
    """
    plan = choose_blocks(plan, ranks, note)
    with CacheLock(plan.request.cache) as lock:
        _extract(plan, progress, ranks, note, lock, profile)


def choose_blocks(plan: Plan, ranks: Ranks = Ranks(), note: Note = lambda text: None) -> Plan:  # noqa: B008
    """Return the plan of a new cache with blocks of about ten seconds of work; any other plan unchanged.

    The network runs two batches of noise, of which the second is timed. All ranks use the choice of rank 0.

    Raises:
        InputError: a single image does not fit the device's memory.
    """
    if not plan.blocks_are_open:
        return plan
    rows, size = 0, plan.request.batch_size
    if ranks.first:
        seconds = _time_batch(plan) * plan.header.shard_blocks  # one write is a shard
        rows = choose_block_rows(size, seconds, plan.header.most_block_rows)
        if seconds > BLOCK_SECONDS:
            unit = "a batch" if plan.header.shard_blocks == 1 else f"a shard of {plan.header.shard_blocks} batches"
            note(
                f"{unit} takes {seconds:.0f} s, which is what an interruption costs; a smaller"
                f" {spell_option('batch-size', python=plan.network.from_python)} costs less"
            )
    return plan.with_block_rows(ranks.agree(rows))


def _time_batch(plan: Plan) -> float:
    """Return the seconds that the network needs for a batch, after a first batch that is not timed."""
    network, seconds, size = plan.network, 0.0, _largest_batch(plan)
    if not network.from_python:
        noise = torch.randn(network.blank(1).shape[1:], generator=torch.Generator().manual_seed(0)).to(network.dtype)
        images = noise.expand(size, *noise.shape).contiguous()
    else:
        images = network.blank(size)
    with plan.computing(), plan.taps() as taps:
        run = BatchRunner(
            lambda images: to_arrays(taps(images), plan.header), network.device, python=network.from_python
        )
        for _ in range(2):
            started = time.perf_counter()
            list(run(images))
            seconds = time.perf_counter() - started
    return seconds


def _largest_batch(plan: Plan) -> int:
    """Return the samples of the largest batch that this run has; an iterable may have any."""
    if any(isinstance(split.images, StreamSamples) and not split.sealed for split in plan.splits):
        return plan.request.batch_size
    return min(plan.request.batch_size, max((split.rows for split in plan.splits), default=1))


def _extract(
    plan: Plan, progress: Progress, ranks: Ranks, note: Note, lock: CacheLock, profile: Profile | None
) -> None:
    ranks.wait()  # until all have planned: nothing changes before
    if ranks.first:
        lock.take()
        writer = _open_writer(plan, ranks)
        if (weights := classifier_weights(plan.network)) is not None:
            writer.write_classifier(*(w.numpy() for w in weights))
        _prepare_splits(plan, writer, note)
        if ranks.world > 1:
            lock.share()
    ranks.wait()
    if not ranks.first:
        lock.share()
        writer = _open_writer(plan, ranks)
    # A number and not the path, which may differ between machines, and which a run that failed has counted under.
    written = WrittenUnits(ranks, ranks.agree(secrets.randbits(62)))
    sealing = threading.RLock()  # a stream is sealed while it runs
    clock: Clock = no_clock
    device_name = name_hardware(plan.network.device)
    if profile is not None:
        clock, profile.writers = profile.time, BLOCKS_IN_FLIGHT

    def write(split: SplitPlan, unit: int, arrays: Arrays) -> None:
        name = split.images.name
        with clock(WRITE):
            writer.write_block(name, unit, arrays)
            if written.add(name) == len(plan.units(split)):
                with sealing:
                    writer.seal(name)
                    _note_accuracy(plan, name, note)

    units = plan.units_of(ranks)
    nondeterministic: set[str] = set()
    told: dict[str, Any] = {}  # of the cache's information

    def tell(key: str, value: Any) -> None:
        if ranks.first:
            told[key] = value
            with sealing:
                writer.add_information({key: value})

    with (
        nullcontext() if profile is None else profile.run(),
        plan.computing(nondeterministic.add),
        closing(_load_images(plan, units, ranks.local_world, profile)) as images,
        plan.taps(clock) as taps,
        ThreadPoolExecutor(BLOCKS_IN_FLIGHT) as pool,
    ):
        prepare, noted = _preparation(plan), set[str]()

        def run_network(arguments: Any) -> Arrays:
            with clock(NETWORK), named_failures(arguments):
                tapped = taps(prepare(arguments))
            if new := nondeterministic - noted:
                noted.update(new)
                note(_random_order(new, plan.network.device))
                tell(NONDETERMINISTIC, sorted(noted | _known_names(writer.header)))
            if profile is not None:
                profile.samples += len(tapped.logits)
            with clock(COPY):
                arrays = to_arrays(tapped, plan.header)
            if plan.request.precision == FP16:
                _check_range(arrays, plan)
            return arrays

        def note_size(text: str) -> None:
            note(text)
            if run.size is not None:
                tell(FITS, {"device": device_name, "images": run.size})

        run = BatchRunner(
            run_network,
            plan.network.device,
            note_size,
            python=plan.network.from_python,
            size=_known_size(writer.header, device_name),
            clock=clock,
        )
        copies = choose_copies(plan.network.device)
        writing: deque[Future[None]] = deque()
        for split in plan.splits:
            if isinstance(split.images, StreamSamples):
                if ranks.first and not split.sealed:  # it is read from its beginning, by one
                    with sealing:
                        _run_stream(plan, split.images, run, copies, progress, writer, clock)
                        _note_accuracy(plan, split.images.name, note)
                continue
            own = units[split.images.name]
            for unit, arrays in _run_blocks(plan, split, own, images, run, copies, progress, clock):
                if len(writing) == BLOCKS_IN_FLIGHT:
                    with clock(WRITERS):
                        writing.popleft().result()
                writing.append(pool.submit(write, split, unit, arrays))
        with clock(WRITERS):
            for done in writing:
                done.result()
    ranks.wait()
    if ranks.first and not ranks.alone:
        if told:  # another rank that sealed a split meanwhile may have written the root without it
            writer.add_information(told)
        writer.renew_copy()


def _open_writer(plan: Plan, ranks: Ranks) -> CacheWriter:
    writer = CacheWriter(plan.request.cache, plan.header, first=ranks.first)
    if writer.header.block_rows != plan.header.block_rows:
        raise CacheError(f"{plan.request.cache} was made by another extract meanwhile; the same command goes on")
    return writer


def _known_size(header: Header, device_name: str) -> int | None:
    """Return the largest batch that an earlier run on such a device had memory for, or None."""
    found = header.information.get(FITS)
    if not isinstance(found, Mapping) or found.get("device") != device_name:
        return None
    images = found.get("images")
    return images if isinstance(images, int) and images > 0 else None


def _known_names(header: Header) -> set[str]:
    """Return the operations without a deterministic algorithm that earlier runs met."""
    names = header.information.get(NONDETERMINISTIC)
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _random_order(names: Set[str], device: torch.device) -> str:
    listed = ", ".join(sorted(names))
    return f"no deterministic algorithm on {device} for {listed}: extracted anew, states may differ in the last digits"


def _check_range(arrays: Arrays, plan: Plan) -> None:
    """Refuse numbers that float16 did not hold.

    Raises:
        InputError: naming the array and what to take.
    """
    for path, values in arrays.items():
        if not np.isfinite(values).all():
            bf16 = spell_option("precision", BF16, python=plan.network.from_python)
            raise InputError(f"{path} exceeds float16's range, 65504, in fp16; take {bf16}")


def _prepare_splits(plan: Plan, writer: CacheWriter, note: Note) -> None:
    """Drop what is to be dropped, create what is missing, and seal splits of which the seal alone is missing.

    An iterable's split is created when its length is known.
    """
    for split in plan.splits:
        if split.sealed:
            continue
        name = split.images.name
        if split.drop:
            writer.drop(name)
        if isinstance(split.images, StreamSamples):
            continue
        label, index = _known(split.images)
        writer.prepare(name, split.rows, split.images.identity(), label=label, index=index)
        if not split.todo:
            writer.seal(name)
            _note_accuracy(plan, name, note)


def _note_accuracy(plan: Plan, split: str, note: Note) -> None:
    """Say the accuracy on id/train when that is finished; a network that gives features has none."""
    if split != "id/train" or plan.network.model.outputs == "features":
        return
    examples = plan.network.examples
    samples = "images" if examples is None else f"{name_sample(examples)}s"
    checkpoint = plan.request.checkpoint if isinstance(plan.request, ExtractRequest) else None
    stated = None if checkpoint is None else read_stated_accuracy(checkpoint)
    note(_accuracy(plan.request.cache, plan.header.classes, samples, stated))


def _accuracy(path: str | Path, classes: int, samples: str = "images", stated: float | None = None) -> str:
    """Return a note on the accuracy on id/train, from the cache; a low one shows wrong weights or samples.

    Low is below half of what the checkpoint states or, from six classes on, below three times chance where it states
    more; where it states none, below one half (from six classes on three times chance or more) or 1.5 times chance.
    """
    split, correct = open_cache(path)["id/train"], 0
    try:
        for rows in split.row_slices(ACCURACY_ROWS):
            correct += int((split.read("logits", rows).argmax(axis=1) == split.label[rows]).sum())
    except ValuesError as error:  # every use of the logits refuses them
        return str(error)
    share = correct / split.rows
    text = f"id/train: accuracy {100 * share:.2f} % of {split.rows} {samples}"
    three_times_chance = 3 / classes if classes >= 6 else 0.0
    if stated is not None and (share < stated / 2 or share < three_times_chance <= stated):
        text += (
            f", while the checkpoint states {100 * stated:.2f} %: check the normalisation, the order of the classes,"
            " the images"
        )
    elif stated is None and share < max(0.5, 1.5 / classes):
        text += (
            f"; a trained network classifies most {samples} correctly: check the weights, the normalisation, the order"
            " of the classes"
        )
    return text


def _run_blocks(
    plan: Plan,
    split: SplitPlan,
    units: Sequence[int],
    images: Iterator[Tensor],
    run: BatchRunner[Arrays],
    copies: Copies | None,
    progress: Progress,
    clock: Clock,
) -> Iterator[tuple[int, Arrays]]:
    """Yield (first block, arrays) for these units of a split: a block, or a shard's blocks."""
    samples = split.images
    assert not isinstance(samples, StreamSamples)
    batches = [batch for unit in units for batch in plan.batches(split, unit)]
    loaded = copy_ahead(_waited(_load(plan, samples, images, batches), clock), copies, clock)
    for unit in units:
        parts: list[Arrays] = []
        labels: list[NDArray[np.int64]] = []
        for batch in plan.batches(split, unit):
            arguments, label = next(loaded)
            with _named(f"{split.images.name}, samples {batch.start} to {batch.stop - 1}"):
                parts += run(arguments)
            labels.append(label)
            progress(split.images.name, len(batch))
        rows = plan.rows_of_unit(split, unit)
        index = split.images.index[rows.start : rows.stop]
        arrays: Arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        yield unit, {**arrays, "label": np.concatenate(labels), "index": index}


@contextmanager
def _named(samples: str) -> Iterator[None]:
    """Say which samples an error is of."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{samples}: {error}") from error


def _known(samples: ImageSet | MapSamples) -> tuple[NDArray[np.int64] | None, NDArray[np.int64]]:
    """Return the labels and the positions of a split's samples, (rows,) each, before it is run; None: not known."""
    return (samples.labels[samples.index] if isinstance(samples, ImageSet) else None), samples.index


def _preparation(plan: Plan) -> Callable[[Any], Any]:
    """Return what is done on the device to the arguments that were loaded: images come as pixels."""
    if isinstance(plan.request, ExtractRequest):
        return Normalise(plan.network.image_transform, plan.network.device)
    return lambda arguments: arguments


def _load_images(
    plan: Plan, units: Mapping[str, Sequence[int]], local_world: int, profile: Profile | None
) -> Generator[Tensor, None, None]:
    """Yield the pixels of the units' batches of all splits of images, in order; nothing starts before the first."""
    splits = [split for split in plan.splits if isinstance(split.images, ImageSet)]
    sets = [split.images for split in splits if isinstance(split.images, ImageSet)]
    batches = [
        (place, batch)
        for place, split in enumerate(splits)
        for unit in units[split.images.name]
        for batch in plan.batches(split, unit)
    ]
    if not (batches and isinstance(plan.request, ExtractRequest)):
        return
    rows = [plan.count_rows(split, units[split.images.name]) for split in splits]
    transform = plan.network.image_transform
    asked = 0 if plan.request.decoder == NVJPEG else plan.request.workers  # one process has the GPU
    workers = choose_workers(asked, sets, rows, transform.crop, local_world)
    pin, decoded = plan.network.device.type == "cuda", (lambda seconds: None)
    if profile is not None:
        profile.decoders, decoded = max(workers, 1), partial(profile.add, DECODE)
    yield from load_batches(sets, batches, transform, workers, pin, decoded)


def _load(
    plan: Plan, samples: ImageSet | MapSamples, images: Iterator[Tensor], batches: Sequence[range]
) -> Iterator[tuple[Any, NDArray[np.int64]]]:
    """Yield the network's arguments and the labels (n,) of every batch; of images the pixels."""
    if isinstance(samples, MapSamples):
        yield from samples.load(batches, plan.header.classes, plan.network.device.type == "cuda")
        return
    for batch in batches:
        yield next(images), samples.labels[samples.index[batch.start : batch.stop]]


def _run_stream(
    plan: Plan,
    samples: StreamSamples,
    run: BatchRunner[Arrays],
    copies: Copies | None,
    progress: Progress,
    writer: CacheWriter,
    clock: Clock,
) -> None:
    """Run an iterable's batches, and write the split when its length is known; meanwhile its numbers are in a file."""
    size, blocks = plan.header.block_rows * plan.header.shard_blocks, 0
    with tempfile.TemporaryDirectory(prefix="nacpipe-") as folder:
        waiting: Arrays = {}
        loaded = _waited(samples.load(plan.header.classes), clock)
        for arguments, label in copy_ahead(loaded, copies, clock):
            with _named(samples.name):
                parts = list(run(arguments))
            batch: Arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            batch["label"] = label
            waiting = {key: np.concatenate([waiting[key], batch[key]]) if waiting else batch[key] for key in batch}
            progress(samples.name, len(label))
            with clock(WRITERS):
                while len(waiting["label"]) >= size:
                    _save(Path(folder) / str(blocks), waiting, size)
                    waiting, blocks = {key: array[size:] for key, array in waiting.items()}, blocks + 1
        _save(Path(folder) / str(blocks), waiting, size)
        rows = blocks * size + len(waiting["label"])
        index = np.arange(rows)
        with clock(WRITERS):
            writer.prepare(samples.name, rows, samples.identity(), index=index)
            for block in range(count_blocks(rows, size)):
                arrays = {key: np.load(_file(Path(folder) / str(block), place)) for place, key in enumerate(waiting)}
                here = index[block * size : (block + 1) * size]
                writer.write_block(samples.name, block * plan.header.shard_blocks, {**arrays, "index": here})
            writer.seal(samples.name)


def _waited(loaded: Iterator[tuple[Any, NDArray[np.int64]]], clock: Clock) -> Iterator[tuple[Any, NDArray[np.int64]]]:
    """Yield what is loaded, and count the time until it is there."""
    while True:
        with clock(WAIT):
            found = next(loaded, None)
        if found is None:
            return
        yield found


def _save(block: Path, arrays: Arrays, rows: int) -> None:
    """Save the first rows of arrays, whose names can be no files' names."""
    for place, array in enumerate(arrays.values()):
        np.save(_file(block, place), array[:rows])


def _file(block: Path, place: int) -> Path:
    return block.with_name(f"{block.name}-{place}.npy")


def to_arrays(tapped: Tapped, header: Header) -> Arrays:
    """Return array path → (n, width) float32 on the CPU; from another device they come in one copy."""
    tensors = {header.layer_array(name, "activation"): value for name, value in tapped.activation.items()}
    tensors |= {header.layer_array(name, "gradient"): value for name, value in tapped.gradient.items()}
    tensors["logits"] = tapped.logits
    if tapped.features is not None:
        tensors["features"] = tapped.features
    if tapped.logits.device.type == "cpu":
        return {path: value.float().numpy() for path, value in tensors.items()}
    return copy_together(tensors)


def copy_together(tensors: Mapping[str, Tensor]) -> Arrays:
    """Return tensors of any device, (n, width) each, as float32 arrays: the device is waited for once, not for each."""
    widths = [value.shape[1] for value in tensors.values()]
    together = torch.cat([value.float() for value in tensors.values()], dim=1)
    host = torch.empty(together.shape, dtype=torch.float32, pin_memory=together.device.type == "cuda")
    columns = host.copy_(together).numpy()
    return dict(zip(tensors, np.split(columns, np.cumsum(widths)[:-1], axis=1), strict=True))
