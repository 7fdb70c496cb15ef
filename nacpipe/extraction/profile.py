"""Where the time of an extraction goes.

    this process    wait ─ copy ─ network ─ pool ─ network ─ pool ─ copy ─ wait ─ …     one after the other
    at once         decode (processes or a thread), write (threads)

The stages of this process and `other` add up to the run. What is done at once is compared with the time that its
processes or threads had.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

WAIT, COPY, NETWORK, POOL, WRITERS, OTHER = "wait for samples", "copy", "network", "pool", "wait for writers", "other"
DECODE, WRITE = "decode", "write"
HERE = (WAIT, COPY, NETWORK, POOL, WRITERS)
ON_DEVICE = (COPY, NETWORK, POOL)
BINDING = {
    WAIT: "reading samples binds: more cores, more workers or smaller files make it faster",
    COPY: "copying to and from the device binds: larger batches make it faster",
    NETWORK: "the network binds: a faster device makes it faster",
    POOL: "pooling binds: fewer layers make it faster",
    WRITERS: "writing binds: a faster disk makes it faster",
    OTHER: "this process binds: larger batches make it faster",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The time of one stage."""

    name: str
    where: str
    """this process, or what runs at once with it."""
    seconds: float
    """Of several processes or threads, their sum."""
    share: float
    """Of the run; of several processes or threads, of the time that they had."""


class Profile:
    """Adds up the seconds of stages: of nested ones each its own, in any thread."""

    def __init__(self, device: torch.device) -> None:
        """Start with nothing; a GPU is waited for at the ends of stages, which costs a little of the overlap."""
        self.decoders = self.writers = 1
        """Processes or threads that decode, and threads that write; the pipeline sets them."""
        self.samples = 0
        """That were run."""
        self.seconds = 0.0
        """Of the run."""
        self._cuda = device if device.type == "cuda" else None
        self._seconds: Counter[str] = Counter()  # a Counter of floats
        self._lock = threading.Lock()
        self._inner = threading.local()

    @contextmanager
    def run(self) -> Iterator[None]:
        """Count a `with` block as the run."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Count a `with` block to a stage, without the blocks inside it."""
        outer = getattr(self._inner, "seconds", 0.0)
        started = self._now(stage)
        self._inner.seconds = 0.0
        try:
            yield
        finally:
            whole = self._now(stage) - started
            self.add(stage, whole - self._inner.seconds)
            self._inner.seconds = outer + whole

    def add(self, stage: str, seconds: float) -> None:
        """Count seconds to a stage."""
        with self._lock:
            self._seconds[stage] += seconds  # type: ignore[assignment]

    def _now(self, stage: str) -> float:
        if self._cuda is not None and stage in ON_DEVICE:
            torch.cuda.synchronize(self._cuda)
        return time.perf_counter()

    def stages(self) -> list[Stage]:
        """Return the stages of this process, which add up to the run, and those that run at once with it."""
        here = {name: float(self._seconds[name]) for name in HERE}
        here[OTHER] = max(self.seconds - sum(here.values()), 0.0)
        beside = ((DECODE, "decoding at once", self.decoders), (WRITE, "writing at once", self.writers))
        return [
            Stage(name=name, where="this process", seconds=seconds, share=_share(seconds, self.seconds))
            for name, seconds in here.items()
        ] + [
            Stage(
                name=name,
                where=f"{count} {verb}",
                seconds=float(self._seconds[name]),
                share=_share(float(self._seconds[name]), count * self.seconds),
            )
            for name, verb, count in beside
            if self._seconds[name]
        ]

    @property
    def rate(self) -> float:
        """Samples a second."""
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def binds(self) -> str:
        """What takes the largest share of this process's time, and what would make it less."""
        stages = [stage for stage in self.stages() if stage.name in BINDING]
        return BINDING[max(stages, key=lambda stage: stage.seconds).name]

    def to_text(self) -> str:
        """Return samples, seconds and what binds in a line, and a line for every stage."""
        lines = [
            f"{stage.name:16}  {stage.seconds:8.2f} s  {stage.share:6.1%}  {stage.where}" for stage in self.stages()
        ]
        return "\n".join([self.summary("samples"), *lines])

    def summary(self, noun: str) -> str:
        """Return samples, seconds and what binds in a line."""
        return f"{self.samples} {noun} in {self.seconds:.2f} s, {self.rate:.1f} a second; {self.binds}"

    def to_json(self) -> dict[str, Any]:
        """Return samples, seconds, stages and what binds."""
        stages = [asdict(stage) for stage in self.stages()]
        return {"samples": self.samples, "seconds": self.seconds, "stages": stages, "binds": self.binds}


def _share(seconds: float, whole: float) -> float:
    return seconds / whole if whole else 0.0
