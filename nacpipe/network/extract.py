"""Extraction: batches → append → seal, obeying a plan.

    threads     decode ── decode ── decode ──▶ a few batches ahead
    network              forward, backward ── forward, backward ──▶
    writer                                    block k ──────▶ block k + 1

Memory is two blocks of pooled numbers and a few batches of images, whatever the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nacpipe.cache import CacheWriter
from nacpipe.cache.lock import CacheLock
from nacpipe.network.images import build_transform, load_batches
from nacpipe.network.load import classifier_weights
from nacpipe.network.memory import BatchRunner
from nacpipe.network.plan import Plan, SplitPlan
from nacpipe.network.ranks import Ranks
from nacpipe.network.taps import Tapped

Arrays = dict[str, NDArray[Any]]


def extract(
    plan: Plan,
    progress: Callable[[str, int], None] = lambda split, rows: None,
    ranks: Ranks = Ranks(),  # noqa: B008 (a frozen record)
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Do what the plan says. Killed at any moment, the same command goes on; blocks that are marked are never redone.

    Args:
        plan: from `plan_extraction`.
        progress: called with a split's name and the rows just written.
        ranks: this process among those that share the cache.
        note: called with what to say aloud meanwhile: that batches are smaller than asked for.

    Raises:
        ImageError: an image cannot be read, naming file, list and line.
        InputError: not even one image fits the device's memory.
        CacheError: another extraction writes this cache, or it cannot be written.
    """
    with CacheLock(plan.request.cache) as lock:
        _extract(plan, progress, ranks, lock, note)


def _extract(
    plan: Plan,
    progress: Callable[[str, int], None],
    ranks: Ranks,
    lock: CacheLock,
    note: Callable[[str], None],
) -> None:
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
    with plan.taps() as taps, ThreadPoolExecutor(1) as pool:
        run = BatchRunner(lambda images: _arrays_of(taps(images)), plan.network.device, note)
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
            for block, arrays in _run_blocks(plan, split, ranks, run):
                if writing is not None:
                    writing.result()
                writing = pool.submit(writer.write_block, name, block, arrays)
                progress(name, arrays["index"].size)
            if writing is not None:
                writing.result()
            ranks.wait()
            if ranks.first:
                writer.seal(name)


def _run_blocks(plan: Plan, split: SplitPlan, ranks: Ranks, run: BatchRunner[Arrays]) -> Iterator[tuple[int, Arrays]]:
    """Yield (first block, arrays) for every unit of this rank: a block, or a shard's blocks."""
    units = ranks.share(plan.units(split))
    batches = [batch for unit in units for batch in plan.batches(split, unit)]
    transform = build_transform(plan.network.transform, split.images.untouched)
    loaded = load_batches(
        split.images, batches, transform, plan.request.workers, pin=plan.network.device.type == "cuda"
    )
    for unit in units:
        parts = [part for _ in plan.batches(split, unit) for part in run(next(loaded))]
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
