"""Extraction: batches → append → seal, obeying a plan.

    threads     decode ── decode ── decode ──▶ a few batches ahead
    network              forward, backward ── forward, backward ──▶
    writer                                    block k ──────▶ block k + 1

Memory is two blocks of pooled numbers and a few batches of images, whatever the number of images.

A new cache's blocks have 1, 2, 4, 8, … batches: as many as are about ten seconds of work, which is what a kill costs,
and at most 512 rows. That is chosen once, by the time of a trial batch, and then read from the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nacpipe.cache import CacheWriter, open_cache
from nacpipe.cache.lock import CacheLock
from nacpipe.errors import CacheError, ValuesError
from nacpipe.extraction.dataset import build_transform, load_batches
from nacpipe.extraction.distributed import Ranks
from nacpipe.extraction.plan import Plan, SplitPlan
from nacpipe.extraction.request import BLOCK_SECONDS, choose_block_rows
from nacpipe.networks.batch_runner import BatchRunner
from nacpipe.networks.build import classifier_weights
from nacpipe.networks.taps import Tapped

ACCURACY_ROWS = 8192  # that are read at once
Arrays = dict[str, NDArray[Any]]


Progress = Callable[[str, int], None]
"""A split's name, and the rows that just went through the network."""
Say = Callable[[str], None]


def extract(
    plan: Plan,
    progress: Progress = lambda split, rows: None,
    ranks: Ranks = Ranks(),  # noqa: B008 (a frozen record)
    say: Say = lambda text: None,
) -> None:
    """Do what the plan says. Killed at any moment, the same command goes on; blocks that are marked are never redone.

    Args:
        plan: from `plan_extraction`; `choose_blocks` is done where it was not.
        progress: called after every batch.
        ranks: this process among those that share the cache.
        say: told what a person should know: the accuracy on id/train, once that is done; that batches are smaller than
            asked for.

    Raises:
        ImageError: an image cannot be read, naming file, list and line.
        InputError: not even one image fits the device's memory.
        CacheError: another extraction writes this cache, or it cannot be written.
    """
    plan = choose_blocks(plan, ranks, say)
    with CacheLock(plan.request.cache) as lock:
        _extract(plan, progress, ranks, say, lock)


def choose_blocks(plan: Plan, ranks: Ranks = Ranks(), say: Say = lambda text: None) -> Plan:  # noqa: B008
    """Return the plan of a new cache with blocks of about ten seconds of work; any other plan as it is.

    The network runs two batches of noise, of which the second is timed. The first rank's choice is everybody's.

    Raises:
        InputError: not even one image fits the device's memory.
    """
    if not plan.blocks_are_open:
        return plan
    rows, size = 0, plan.request.batch_size
    if ranks.first:
        seconds = _time_batch(plan) * plan.header.shard_blocks  # a shard is written at once
        rows = choose_block_rows(size, seconds, plan.header.most_block_rows)
        if seconds > BLOCK_SECONDS:
            unit = "a batch" if plan.header.shard_blocks == 1 else f"a shard of {plan.header.shard_blocks} batches"
            say(f"{unit} takes {seconds:.0f} s, which is what an interruption costs; a smaller --batch-size costs less")
    return plan.with_block_rows(ranks.agree(rows))


def _time_batch(plan: Plan) -> float:
    """Seconds that a batch takes through the network, after one that warms up."""
    network, seconds = plan.network, 0.0
    noise = torch.randn(network.blank(1).shape[1:], generator=torch.Generator().manual_seed(0)).to(network.dtype)
    images = noise.expand(plan.request.batch_size, *noise.shape).contiguous()
    with plan.taps() as taps:
        run = BatchRunner(lambda images: _arrays_of(taps(images)), network.device)
        for _ in range(2):
            started = time.perf_counter()
            list(run(images))
            seconds = time.perf_counter() - started
    return seconds


def _extract(plan: Plan, progress: Progress, ranks: Ranks, say: Say, lock: CacheLock) -> None:
    ranks.wait()  # all have planned before anything changes
    if ranks.first:
        lock.take()
        writer = CacheWriter(plan.request.cache, plan.header)
        if (weights := classifier_weights(plan.network)) is not None:
            writer.write_classifier(*(w.numpy() for w in weights))
        if ranks.world > 1:
            lock.share()
    ranks.wait()
    if not ranks.first:
        lock.share()
        writer = CacheWriter(plan.request.cache, plan.header, first=False)
    if writer.header.block_rows != plan.header.block_rows:
        raise CacheError(f"{plan.request.cache} was made by another extract meanwhile; the same command goes on")
    with plan.taps() as taps, ThreadPoolExecutor(1) as pool:
        run = BatchRunner(lambda images: _arrays_of(taps(images)), plan.network.device, say)
        for split in plan.splits:
            if split.sealed:
                continue
            name = split.images.name
            if ranks.first:
                if split.drop:
                    writer.drop(name)
                writer.prepare(name, split.rows, split.images.identity())
            ranks.wait()
            writing: Future[None] | None = None
            for block, arrays in _run_blocks(plan, split, ranks, run, progress):
                if writing is not None:
                    writing.result()
                writing = pool.submit(writer.write_block, name, block, arrays)
            if writing is not None:
                writing.result()
            ranks.wait()
            if ranks.first:
                writer.seal(name)
                if name == "id/train" and plan.network.model.outputs != "features":
                    say(_accuracy(plan.request.cache, plan.header.classes))


def _accuracy(cache: str | Path, classes: int) -> str:
    """What the network gets right of id/train, from the cache: where it is little, the network or images are amiss."""
    split, correct = open_cache(cache)["id/train"], 0
    try:
        for start in range(0, split.rows, ACCURACY_ROWS):
            rows = slice(start, min(start + ACCURACY_ROWS, split.rows))
            correct += int((split.read("logits", rows).argmax(axis=1) == split.label[rows]).sum())
    except ValuesError as error:  # whatever needs the logits will refuse them
        return str(error)
    share = correct / split.rows
    text = f"id/train: accuracy {100 * share:.2f} % of {split.rows} images"
    if share < max(0.5, 1.5 / classes):
        text += "; a trained network gets most right: look at the weights, the normalisation, the order of the classes"
    return text


def _run_blocks(
    plan: Plan, split: SplitPlan, ranks: Ranks, run: BatchRunner[Arrays], progress: Progress
) -> Iterator[tuple[int, Arrays]]:
    """Yield (first block, arrays) for every unit of this rank: a block, or a shard's blocks."""
    units = ranks.share(plan.units(split))
    batches = [batch for unit in units for batch in plan.batches(split, unit)]
    transform = build_transform(plan.network.transform, split.images.pre_resized)
    loaded = load_batches(
        split.images, batches, transform, plan.request.workers, pin=plan.network.device.type == "cuda"
    )
    for unit in units:
        parts: list[Arrays] = []
        for batch in plan.batches(split, unit):
            parts += run(next(loaded))
            progress(split.images.name, len(batch))
        rows = plan.rows_of_unit(split, unit)
        index = split.images.index[rows.start : rows.stop]
        arrays: Arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        yield unit, {**arrays, "label": split.images.labels[index], "index": index}


def _arrays_of(tapped: Tapped) -> Arrays:
    """Array path → (n, width) float32 on the CPU."""
    found = {f"{name}/activation": value for name, value in tapped.activation.items()}
    found |= {f"{name}/gradient": value for name, value in tapped.gradient.items()}
    found["logits"] = tapped.logits
    if tapped.features is not None:
        found["features"] = tapped.features
    return {path: value.float().cpu().numpy() for path, value in found.items()}
