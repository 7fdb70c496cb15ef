"""Batches of pixels, in order, decoded ahead: by one set of processes for a whole run, or on a thread.

Extraction's are of all splits, whose images are counted; `score`'s are of streams, whose length nobody knows.

    process 1   decode ────────▶ decode ────────▶     (n, channels, height, width) uint8 through shared memory
    process 2        decode ────────▶ decode ────────▶
    this one           batch 1 ── batch 2 ── batch 3 ──▶ the network

A process takes a second or more to start, and small images take this process longer to receive than to decode.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from multiprocessing import resource_tracker
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nacpipe.benchmarks.standard import Transform
from nacpipe.errors import ImageError, NacError
from nacpipe.extraction.dataset import ImageSet, Pixels

KEPT_CORES = 2  # for the network and the writers
WORTH_PROCESSES = 2000 * 224 * 224  # pixels that are decoded while a process starts, about
AHEAD = 2  # batches, of each worker

Batch = tuple[int, range]
"""A split's place, and positions in its `index`."""
Decoded = tuple[Tensor | NacError, float]
"""The pixels of a batch, or the error that says why there are none; and the seconds that it took."""


class PixelBatches(Dataset[Any]):
    """(split's place, rows) → the pixels of a batch."""

    def __init__(self, sets: Sequence[ImageSet], transform: Transform) -> None:
        """Store the splits' images and how they are prepared."""
        self._sets = list(sets)
        self._pixels = [Pixels(transform, images.pre_resized) for images in sets]

    def __getitem__(self, batch: Batch) -> Decoded:
        started = time.perf_counter()
        found = self._decode(*batch)
        return found, time.perf_counter() - started

    def _decode(self, place: int, rows: range) -> Tensor | NacError:  # a raised error would arrive as another text
        images, pixels = self._sets[place], self._pixels[place]
        try:
            decoded = [pixels(images.open(int(images.index[row]))) for row in rows]
        except NacError as error:
            return error
        if len({image.shape for image in decoded}) > 1:  # pre-resized sets alone
            sizes = sorted({"×".join(str(side) for side in image.shape[:0:-1]) for image in decoded})
            return ImageError(f"{images.name} is pre_resized, but its images differ in size: {', '.join(sizes)}")
        return torch.stack(decoded)


def choose_workers(
    asked: int | None, sets: Sequence[ImageSet], rows: Sequence[int], side: int, local_world: int = 1
) -> int:
    """Return the number of processes that decode images; 0: a thread of this process does.

    Args:
        asked: by the user; None: this machine's cores less two, shared by its ranks, where that many pixels are worth
            the start of a process.
        sets: the splits' images.
        rows: of each, the images to decode.
        side: of the images that the network gets, in pixels.
        local_world: the ranks on this machine.
    """
    files = sum(count for images, count in zip(sets, rows, strict=True) if _by_processes(images))
    if not files:
        return 0
    if asked is not None:
        return asked
    if files * side * side < WORTH_PROCESSES:
        return 0
    return max(count_cores() // local_world - KEPT_CORES, 0)


def choose_stream_workers(asked: int | None, side: int, local_world: int = 1) -> tuple[int, int]:
    """Return the number of processes that decode a stream of images, and how many images a thread decodes before.

    How long a stream is nobody knows. A thread has as many images as it decodes while a process starts, so that a short
    stream waits for no process, and a long one loses no more than that time.

    Args:
        asked: by the user: that many from the first image on; None: this machine's cores less two, shared by its ranks.
        side: of the images that the network gets, in pixels.
        local_world: the ranks on this machine.
    """
    if asked is not None:
        return asked, 0
    return max(count_cores() // local_world - KEPT_CORES, 0), WORTH_PROCESSES // side**2


def count_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _by_processes(images: ImageSet) -> bool:
    """Whether images are in files: packaged ones are in memory, and a torchvision set may keep state between images."""
    return images.listed is not None and not images.one_thread


def load_batches(
    sets: Sequence[ImageSet],
    batches: Sequence[Batch],
    transform: Transform,
    workers: int,
    pin: bool = False,
    decoded: Callable[[float], None] = lambda seconds: None,
) -> Generator[Tensor, None, None]:
    """Yield the pixels of batches, (n, channels, height, width) uint8, in order.

    Args:
        sets: the splits' images.
        batches: of all splits, in order.
        transform: how images are prepared; `Normalise` does the rest.
        workers: processes; 0: none, and a thread of this one.
        pin: into page-locked memory, so that batches are copied to a GPU while it computes.
        decoded: called with the seconds that a process or the thread needed for a batch.

    Raises:
        ImageError: an image cannot be read, naming file, list and line; or a process is gone.
    """
    dataset = PixelBatches(sets, transform)
    apart = [workers > 0 and _by_processes(images) for images in sets]
    here = _decode_here(dataset, [batch for batch in batches if not apart[batch[0]]], pin)
    there = _decode_apart(dataset, [batch for batch in batches if apart[batch[0]]], workers, pin)
    with closing(here), closing(there):
        for place, _ in batches:
            found, seconds = next(there if apart[place] else here)
            decoded(seconds)
            if isinstance(found, NacError):
                raise found
            yield found


def load_stream(
    dataset: Dataset[Any], batches: Iterable[Sequence[Any]], workers: int, few: int = 0, pin: bool = False
) -> Generator[Any, None, None]:
    """Yield what a data set gives for each batch, in order; how many there are need not be known.

    Args:
        dataset: a batch → its pixels, in a process of its own too.
        batches: of images; taken two ahead of each worker.
        workers: processes; 0: none, and a thread of this one.
        few: as many images, about, a thread decodes before the processes start, which they do only if there are more.
        pin: as for `load_batches`.

    Raises:
        ImageError: a process is gone.
    """
    coming = iter(batches)

    def first_few() -> Iterator[Sequence[Any]]:
        images = 0
        while images < few and (batch := next(coming, None)) is not None:
            images += len(batch)
            yield batch

    yield from _decode_here(dataset, first_few() if workers else coming, pin)
    if workers and (batch := next(coming, None)) is not None:
        yield from _decode_apart(dataset, itertools.chain([batch], coming), workers, pin)


def _decode_here(dataset: Dataset[Any], batches: Iterable[Any], pin: bool) -> Generator[Any, None, None]:
    """Decode on one thread, in order: a data set may keep state between images."""

    def decode(batch: Any) -> Any:
        found = dataset[batch]
        return _pin(found) if pin else found

    waiting: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(decode, batch))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _pin(found: Any) -> Any:
    """Return the same with tensors in page-locked memory."""
    if isinstance(found, tuple):
        return tuple(_pin(part) for part in found)
    return found.pin_memory() if hasattr(found, "pin_memory") else found


def _decode_apart(dataset: Dataset[Any], batches: Iterable[Any], workers: int, pin: bool) -> Generator[Any, None, None]:
    """Decode in processes, which torch ends with this one."""
    with warnings.catch_warnings(), _interrupts_later() as started:
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than cores, as asked
        loaded = iter(
            DataLoader(
                dataset,
                sampler=_after(started, batches),  # keys of the data set
                batch_size=None,
                collate_fn=_as_it_is,
                num_workers=workers,
                pin_memory=pin,
                prefetch_factor=AHEAD,
                worker_init_fn=_end_quietly,
                multiprocessing_context=_context(),
                generator=torch.Generator().manual_seed(0),  # a seed is drawn even where nothing is
            )
        )
    try:
        yield from loaded
    except (RuntimeError, OSError, EOFError) as error:  # the last two: a batch was on its way from the process
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ImageError(
            f"a process that decodes images is gone ({reason}), mostly because memory or /dev/shm"
            f" is full; the same command goes on; --workers {workers // 2} takes less"
        ) from None
    finally:
        del loaded  # ends the processes


def _after(started: Callable[[], None], batches: Iterable[Any]) -> Iterator[Any]:
    """Draw batches, the first of which is drawn when all processes have started; a stream's may take long to read."""
    started()
    yield from batches


def _as_it_is(batch: Any) -> Any:
    return batch


def _end_quietly(_worker: int) -> None:
    """Let this decoding process end with the one that started it, and say nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    sys.excepthook = lambda *_: None  # of the thread that hands memory over to a process that is gone
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the parent's end. Torch watches the process that forked this one, which lives as long as its forks."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _context() -> Any:
    """Return how processes start: torch is imported once, and all share its memory; never a fork of this process."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nacpipe.extraction.forkserver"])
    return context


@contextmanager
def _interrupts_later() -> Iterator[Callable[[], None]]:
    """Hold interrupts back, and start processes with them blocked: no traceback of theirs on the terminal.

    They are let through at the end of the `with` block, or when what it gives is called.
    """
    if sys.platform == "win32":
        yield lambda: None
        return
    resource_tracker.ensure_running()  # would let them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def end() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield end
    finally:
        end()
