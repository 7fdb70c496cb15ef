"""Batches on their way to a GPU: the next one is copied while one is computed.

copies     1 ── 2 ─────── 3 ─────── 4 ───▶     a stream of its own, from pinned memory
network         1 ─────── 2 ─────── 3 ───▶     waits for the event of its batch alone
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import torch

from nacpipe.networks.batch_runner import Clock, clear_tracebacks, is_out_of_memory, no_clock
from nacpipe.networks.call import map_tensors, tensors_of

Beside = TypeVar("Beside")


class Copies(Protocol):
    """Copies batches to a device without waiting."""

    def start(self, batch: Any) -> Any:
        """Begin to copy a batch's tensors."""

    def finish(self, started: Any) -> Any:
        """Return the batch on the device, for what is computed from now on."""


class CudaCopies:
    """Copies batches to a GPU on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        """Make the stream."""
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, batch: Any) -> tuple[Any, torch.cuda.Event | None]:
        """Begin to copy a batch's tensors; one that does not fit the memory stays where it is."""
        try:
            with torch.cuda.stream(self._stream):
                copied = map_tensors(lambda tensor: tensor.to(self._device, non_blocking=True), batch)
                return copied, self._stream.record_event()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            clear_tracebacks(error)
        return batch, None  # `BatchRunner` copies it, in parts if need be

    def finish(self, started: tuple[Any, torch.cuda.Event | None]) -> Any:
        """Let the current stream wait for the copy, and keep its memory until that stream has used it."""
        batch, copied = started
        if copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            for _, tensor in tensors_of(batch):
                tensor.record_stream(current)
        return batch


def choose_copies(device: torch.device) -> Copies | None:
    """Return how batches are copied ahead to a device; None: `BatchRunner` moves each when it is run."""
    return CudaCopies(device) if device.type == "cuda" else None


def copy_ahead(
    batches: Iterator[tuple[Any, Beside]], copies: Copies | None, clock: Clock = no_clock
) -> Iterator[tuple[Any, Beside]]:
    """Yield batches in order, on the device; the copy of the next one has begun when one is yielded.

    An error of the next one is raised after that.

    Args:
        batches: (the network's arguments, what belongs to them).
        copies: None: batches are yielded as they are.
        clock: called with `copy` around the beginning of a copy.
    """
    if copies is None:
        yield from batches
        return
    ahead: tuple[Any, Beside] | None = None
    while True:
        failed: Exception | None = None
        coming: tuple[Any, Beside] | None = None
        try:
            if (loaded := next(batches, None)) is not None:
                with clock("copy"):
                    coming = copies.start(loaded[0]), loaded[1]
                del loaded
        except Exception as error:
            failed = error
        if ahead is not None:
            yield copies.finish(ahead[0]), ahead[1]
        if failed is not None:
            raise failed
        if coming is None:
            return
        ahead = coming
