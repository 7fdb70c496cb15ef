"""Runs batches; after one that exceeds the device's memory, all later batches are smaller.

128 images: out of memory ──▶ 64: out of memory ──▶ 32 32 32 32 │ 32 32 32 32 │ …
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch

from nacpipe.errors import InputError
from nacpipe.networks.call import count_samples, move, name_sample, take_rows
from nacpipe.text import spell_option

_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "_alloc_failed")  # CUDA, MPS, CPU, cuDNN

Result = TypeVar("Result")
Clock = Callable[[str], AbstractContextManager[None]]
"""Counts the time of a `with` block to a stage: copy, network, pool, …"""


def no_clock(_stage: str) -> AbstractContextManager[None]:
    """Count nothing."""
    return nullcontext()


class BatchRunner(Generic[Result]):
    """Runs batches; after one that exceeds the memory, at most as many images at once as fit."""

    def __init__(
        self,
        run: Callable[[Any], Result],
        device: torch.device,
        note: Callable[[str], None] = lambda text: None,
        *,
        python: bool = False,
        size: int | None = None,
        clock: Clock = no_clock,
    ) -> None:
        """Store the arguments; nothing runs yet.

        Args:
            run: one batch on the device → its result; it keeps no graph of a batch that failed.
            device: the device that batches are moved to.
            note: called with a sentence when the size becomes smaller.
            python: whether messages name options as they are in Python.
            size: the largest number of images at once, where an earlier run found it.
            clock: called with `copy` around what moves a batch to the device.
        """
        self.run, self.device, self.note, self._python, self._clock = run, device, note, python, clock
        self.size = size
        """The largest number of images at once; None: no batch failed yet."""

    def __call__(self, images: Any) -> Iterator[Result]:  # n samples, on any device
        """Yield the results of a batch, in order: one, or one for each part of it.

        Raises:
            InputError: a single image does not fit.
        """
        start, size, count = 0, self.size, count_samples(images)
        while start < count:
            stop = min(start + (self.size or count), count)
            part = take_rows(images, start, stop)
            if (result := self._try(part)) is not None:
                yield result
                start = stop
            elif stop - start == 1:
                cpu = spell_option("device", "cpu", python=self._python)
                raise InputError(f"one {name_sample(images)} does not fit the memory of {self.device}; try {cpu}")
            else:
                self.size = -(-(stop - start) // 2)
                _free_memory(self.device)
        if self.size != size:
            self.note(
                f"{size or count} {name_sample(images)}s at once do not fit the memory of {self.device}: from here on"
                f" batches of {self.size}"
            )

    def _try(self, images: Any) -> Result | None:
        try:
            with self._clock("copy"):
                moved = move(images, self.device)
            return self.run(moved)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            clear_tracebacks(error)
        return None


def name_hardware(device: torch.device) -> str:
    """Return the name of a GPU, whose memory its model determines; of another device its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports that memory is exhausted, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _MESSAGES)


def clear_tracebacks(error: BaseException | None) -> None:
    """Clear the frames in the tracebacks of an error and of its causes, because they hold tensors."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _free_memory(device: torch.device) -> None:
    gc.collect()  # collects the cycle of an error and the frame that caught it
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
