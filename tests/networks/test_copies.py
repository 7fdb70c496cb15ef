"""The order in which batches are copied and run, with copies that note what they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nacpipe.cache import Cache, open_cache
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest
from nacpipe.networks import copies as copies_module
from nacpipe.networks.call import map_tensors
from nacpipe.networks.copies import CudaCopies, choose_copies, copy_ahead

pytestmark = pytest.mark.usefixtures("one_thread")


class Noting:
    """Copies that take no time."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def start(self, batch: Any) -> Any:
        self.steps.append(f"start {batch}")
        return f"{batch} on its way"

    def finish(self, started: Any) -> Any:
        self.steps.append(f"finish {started.split()[0]}")
        return started.replace("on its way", "there")


def load(names: str, fails: bool = False) -> Iterator[tuple[str, int]]:
    for number, name in enumerate(names):
        yield name, number
    if fails:
        raise ValueError("the next batch cannot be read")


def test_the_next_copy_begins_before_a_batch_is_run() -> None:
    copies = Noting()
    for batch, _ in copy_ahead(load("abc"), copies):
        copies.steps.append(f"run {batch}")
    assert copies.steps == [
        "start a", "start b", "finish a", "run a there", "start c", "finish b", "run b there", "finish c", "run c there"
    ]  # fmt: skip


def test_what_belongs_to_a_batch_stays_with_it() -> None:
    assert list(copy_ahead(load("abc"), Noting())) == [("a there", 0), ("b there", 1), ("c there", 2)]
    assert list(copy_ahead(load(""), Noting())) == []


def test_an_error_of_the_next_batch_comes_after_this_one() -> None:
    found = []
    with pytest.raises(ValueError, match="cannot be read"):
        for batch, _ in copy_ahead(load("ab", fails=True), Noting()):
            found.append(batch)
    assert found == ["a there", "b there"]


def test_one_batch_is_ahead_and_no_more() -> None:
    taken: list[str] = []

    def noted() -> Iterator[tuple[str, int]]:
        for batch in load("abcd"):
            taken.append(batch[0])
            yield batch

    batches = copy_ahead(noted(), Noting())
    next(batches)
    assert taken == ["a", "b"]
    next(batches)
    assert taken == ["a", "b", "c"]


def test_without_copies_nothing_is_ahead() -> None:
    assert choose_copies(torch.device("cpu")) is None
    batches = load("abc")
    same = copy_ahead(batches, None)
    assert next(same) == ("a", 0)
    assert next(batches) == ("b", 1)


class Stream:
    """A stream that notes what waits for it, and the tensors that it uses."""

    def __init__(self, *_: object) -> None:
        self.waited_for: list[object] = []

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def record_event(self) -> tuple[str, Stream]:
        return "event", self

    def wait_event(self, event: object) -> None:
        self.waited_for.append(event)


def test_the_current_stream_waits_for_the_copy_and_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    current, kept = Stream(), list[tuple[Tensor, object]]()
    monkeypatch.setattr(copies_module.torch.cuda, "Stream", Stream)
    monkeypatch.setattr(copies_module.torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(copies_module.torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: kept.append((tensor, stream)))
    copies = CudaCopies(torch.device("cpu"))
    batch = {"pixels": torch.ones(2, 3), "mask": torch.zeros(2)}
    started = copies.start(batch)
    assert current.waited_for == []
    found = copies.finish(started)
    assert [event[0] for event in current.waited_for] == ["event"]  # type: ignore[index]
    assert [(tensor is found[name], stream is current) for name, (tensor, stream) in zip(batch, kept, strict=True)] == [
        (True, True), (True, True)
    ]  # fmt: skip


def test_a_batch_that_does_not_fit_is_left_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(copies_module.torch.cuda, "Stream", Stream)
    monkeypatch.setattr(copies_module.torch.cuda, "stream", lambda stream: stream)
    copies, batch = CudaCopies(torch.device("cpu")), torch.ones(2, 3)
    monkeypatch.setattr(Tensor, "to", no_room)
    assert copies.finish(copies.start(batch)) is batch


class Cloning(Noting):
    """Copies in the CPU's memory."""

    def start(self, batch: Any) -> Any:
        self.steps.append(f"start {len(batch)}")
        return map_tensors(Tensor.clone, batch)

    def finish(self, started: Any) -> Any:
        self.steps.append(f"finish {len(started)}")
        return started


def test_an_extraction_of_batches_that_were_copied_ahead(
    request_: ExtractRequest, finished: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies, made = Cloning(), list[torch.device]()
    monkeypatch.setattr("nacpipe.extraction.pipeline.choose_copies", lambda device: made.append(device) or copies)
    extract(plan_extraction(replace(request_, splits=("ood/val", "id/val"))))
    assert made == [torch.device("cpu")]  # one stream for all splits: memory belongs to a stream
    cache = open_cache(request_.cache)
    for split in ("id/val", "ood/val"):
        for path in finished.header.arrays():
            np.testing.assert_array_equal(cache[split].read(path), finished[split].read(path))
    started = [step.split()[1] for step in copies.steps if step.startswith("start")]
    assert sum(map(int, started)) == finished["id/val"].rows + 21
    assert copies.steps[:3] == [f"start {started[0]}", f"start {started[1]}", f"finish {started[0]}"]
