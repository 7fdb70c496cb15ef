"""Batches that do not fit the memory, which a network plays that fails above so many images; and whose GPU is whose."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nacpipe.cache import Header, LayerSpec, open_cache
from nacpipe.cache.consolidated import copy_is_stale
from nacpipe.cache.reader import open_root
from nacpipe.errors import InputError
from nacpipe.extraction.distributed import Ranks, WrittenUnits, join_ranks
from nacpipe.extraction.pipeline import _known_size, extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest, find_device, name_device
from nacpipe.networks import batch_runner as memory
from nacpipe.networks.batch_runner import BatchRunner, is_out_of_memory
from nacpipe.networks.taps import Taps, freeze

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


class Small(nn.Module):
    """Its memory has room for so many images; it fails in the midst of the forward or of the backward pass."""

    def __init__(self, most: int, error: Callable[[], Exception], backward: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)
        self.most, self.error, self.backward = most, error, backward
        self.sizes: list[int] = []
        self.graphs: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        self.alive.append(sum(ref() is not None for ref in self.graphs))  # of earlier batches
        inner = torch.relu(self.first(x))
        self.graphs.append(weakref.ref(inner))
        outer = self.second(inner)
        if self.backward:
            outer = Failing.apply(outer, self)  # type: ignore[no-untyped-call]
        elif len(x) > self.most:
            self.fail()
        logits: Tensor = self.fc(outer.mean(dim=(2, 3)))
        return logits

    def fail(self) -> None:
        try:
            raise self.error()
        except Exception as error:
            kept = error  # a cycle: the frame holds the error, whose traceback holds the frame
            raise kept from ValueError("what it came of")


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, network: Small) -> Tensor:
        ctx.network = network  # type: ignore[attr-defined]
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        if len(gradient) > ctx.network.most:  # type: ignore[attr-defined]
            ctx.network.fail()  # type: ignore[attr-defined]
        return gradient, None


ERRORS: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried"),
    lambda: RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
    lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    lambda: MemoryError(),
]
LAYERS = [LayerSpec(name=name, path=name, pooling="sum-nchw", neurons=4) for name in ("first", "second")]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("error", ERRORS)
def test_the_graph_is_gone_when_less_is_tried_and_later_batches_start_there(
    error: Callable[[], Exception], backward: bool
) -> None:
    network = Small(3, error, backward)
    freeze(network)
    notes: list[str] = []
    images = torch.randn(12, 3, 8, 8)
    plain = Small(100, error)
    freeze(plain)
    with Taps(plain, LAYERS, "fc") as taps:
        expected = taps(images)
    gc.collect()
    gc.disable()  # what is gone shall be so because it was let go
    try:
        with Taps(network, LAYERS, "fc") as taps:
            run = BatchRunner(taps, CPU, notes.append)
            for batch, sizes in ((images, [12, 6, 3, 3, 3, 3]), (images, [3, 3, 3, 3]), (images[:7], [3, 3, 1])):
                network.sizes.clear()
                found = list(run(batch))
                assert network.sizes == sizes
                for what in ("activation", "gradient"):
                    for layer in ("first", "second"):
                        together = torch.cat([getattr(part, what)[layer] for part in found])
                        torch.testing.assert_close(together, getattr(expected, what)[layer][: len(batch)])
    finally:
        gc.enable()
    assert network.alive == [0] * len(network.alive)
    assert notes == ["12 images at once do not fit the memory of cpu: from here on batches of 3"]


def test_memory_is_freed_after_the_graph_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Small(1, ERRORS[0])
    freeze(network)
    alive: list[int] = []
    real = memory._free_memory

    def free(device: torch.device) -> None:
        real(device)
        alive.append(sum(ref() is not None for ref in network.graphs))

    monkeypatch.setattr(memory, "_free_memory", free)
    with Taps(network, LAYERS, "fc") as taps:
        list(BatchRunner(taps, CPU)(torch.randn(4, 3, 8, 8)))
    assert alive == [0, 0]


def test_other_errors_are_not_taken_for_it() -> None:
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory")):
        assert not is_out_of_memory(error)

        def run(images: Tensor, error: Exception = error) -> Tensor:
            raise error

        with pytest.raises(type(error)):
            list(BatchRunner(run, CPU)(torch.zeros(4, 3)))


FILE = """
import torch
from tests.networks.test_batch_runner import Small

def build():
    return Small(5, lambda: torch.OutOfMemoryError("too much"))
def narrow():
    return Small(2, lambda: torch.OutOfMemoryError("too much"))
def tiny():
    return Small(0, lambda: torch.OutOfMemoryError("too much"))
"""


def test_an_extraction_goes_on_with_smaller_batches_and_says_so_once(request_: ExtractRequest, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FILE)
    request = replace(
        request_, model=f"{tmp_path / 'net.py'}:build", checkpoint=None, layers=("first", "second"),
        splits=("id/val", "ood/val"),
    )  # fmt: skip
    plan = plan_extraction(request)
    notes: list[str] = []
    network = plan.network.module
    assert isinstance(network, nn.Module)
    network.sizes.clear()
    extract(plan, note=notes.append)
    assert notes == ["8 images at once do not fit the memory of cpu: from here on batches of 4"]
    assert network.sizes[:4] == [8, 4, 4, 4]
    assert max(network.sizes[1:]) == 4
    whole = replace(request, cache=tmp_path / "whole.zarr", batch_size=4)
    extract(plan_extraction(whole))
    ours, theirs = open_cache(request.cache), open_cache(whole.cache)
    for path in theirs.header.arrays():
        np.testing.assert_array_equal(ours["ood/val"].read(path), theirs["ood/val"].read(path))
    narrow = plan_extraction(replace(request, model=f"{tmp_path / 'net.py'}:narrow", cache=tmp_path / "narrow.zarr"))
    assert narrow.network.model.classifier == "fc"  # tried on two images at once
    tiny = replace(request, model=f"{tmp_path / 'net.py'}:tiny", cache=tmp_path / "tiny.zarr")
    with pytest.raises(InputError, match=r"^one image does not fit the memory of cpu; try --device cpu$"):
        plan_extraction(tiny)


def test_the_batch_that_fits_is_recorded_and_the_next_run_begins_with_it(
    request_: ExtractRequest, tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(FILE)
    request = replace(
        request_, model=f"{tmp_path / 'net.py'}:build", checkpoint=None, layers=("first", "second"),
        splits=("id/val", "ood/val"),
    )  # fmt: skip

    def stop(split: str, rows: int) -> None:
        if split == "ood/val":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(plan_extraction(request), stop)
    before = open_cache(request.cache)
    assert before.header.information["batch_that_fits"] == {"device": "cpu", "images": 4}
    assert before["id/val"].rows == 40
    assert not copy_is_stale(*open_root(str(request.cache), mode="r"))
    plan, notes = plan_extraction(request), list[str]()
    network = plan.network.module
    assert isinstance(network, nn.Module)
    network.sizes.clear()
    extract(plan, note=notes.append)
    assert (network.sizes, notes) == ([4] * 5 + [1], [])
    assert open_cache(request.cache).header.information["batch_that_fits"] == {"device": "cpu", "images": 4}
    whole = replace(request, cache=tmp_path / "whole.zarr", batch_size=4)
    extract(plan_extraction(whole))
    for path in before.header.arrays():
        np.testing.assert_array_equal(
            open_cache(request.cache)["ood/val"].read(path), open_cache(whole.cache)["ood/val"].read(path)
        )


@pytest.mark.parametrize(
    ("recorded", "size"),
    [
        ({"device": "cpu", "images": 4}, 4),
        ({"device": "NVIDIA H100", "images": 4}, None),
        ({"device": "cpu", "images": 0}, None),
        ({"device": "cpu"}, None),
        ("4", None),
        (None, None),
    ],
)
def test_only_a_size_of_this_kind_of_device_is_used(recorded: object, size: int | None) -> None:
    header = Header(
        identity={}, information={"batch_that_fits": recorded}, block_rows=8, layers=(), classes=3, features=0
    )
    assert _known_size(header, "cpu") == size


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "local", "local_world", "expected"),
    [
        ("cuda", 0, 1, "cuda"),
        ("cuda", 0, 4, "cuda:0"),
        ("cuda", 3, 4, "cuda:3"),
        ("xpu", 1, 2, "xpu:1"),
        ("cuda:1", 0, 1, "cuda:1"),  # one process, or one on each of several machines
        ("cuda:1", 0, 3, "cuda:0"),
        ("xpu:0", 2, 3, "xpu:2"),
        ("cpu", 3, 4, "cpu"),
        ("mps", 1, 2, "mps"),
    ],
)
def test_each_rank_has_a_gpu_of_its_own(name: str, local: int, local_world: int, expected: str) -> None:
    assert name_device(name, local, local_world) == expected


def test_auto_gives_each_rank_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [name_device("auto", local, 2) for local in (0, 1)] == ["cuda:0", "cuda:1"]


def test_ranks_know_how_many_are_on_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    store = torch.distributed.HashStore()
    monkeypatch.setattr("nacpipe.extraction.distributed.rendezvous", lambda url, timeout: iter([(store, 3, 4)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda kind, **given: asked.update(given, kind=kind))
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    ranks = join_ranks()
    assert (ranks.rank, ranks.world, ranks.local, ranks.local_world) == (3, 4, 1, 2)
    assert (asked["kind"], asked["rank"], asked["world_size"]) == ("gloo", 3, 4)
    units = [WrittenUnits(Ranks(rank, 4, 1, 2, ranks.store), "c.zarr") for rank in (0, 3)]
    assert [units[0].add("id/val"), units[1].add("id/val"), units[1].add("ood/val")] == [1, 2, 1]
    assert [WrittenUnits(ranks, "d.zarr").add("id/val"), WrittenUnits(Ranks(), "c.zarr").add("id/val")] == [1, 1]


def test_the_plan_gives_the_rank_to_the_device(request_: ExtractRequest) -> None:
    for name in ("cuda", "cuda:0"):
        with pytest.raises(InputError, match=r"^device 'cuda:7' cannot be used here: "):
            plan_extraction(replace(request_, device=name), ranks=Ranks(7, 8, 7, 8))


def test_another_gpu_than_the_named_one_is_told(monkeypatch: pytest.MonkeyPatch, request_: ExtractRequest) -> None:
    monkeypatch.setattr("nacpipe.extraction.plan.find_device", lambda *_: torch.device("cpu"))
    text = "--device cuda:1 is one GPU; each of the 2 processes here has its own"
    named = replace(request_, device="cuda:1")
    assert text in plan_extraction(named, ranks=Ranks(0, 2, 0, 2)).notes
    assert text not in plan_extraction(named).notes
    assert not any("its own" in note for note in plan_extraction(request_, ranks=Ranks(0, 2, 0, 2)).notes)


def test_the_gpu_is_the_processs_current_one_unless_a_program_of_the_callers_named_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch, "zeros", lambda size, device: torch.empty(size))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert find_device("cuda:0", 1, 2) == torch.device("cuda:1")
    assert find_device("cuda:2", 0, 1) == torch.device("cuda:2")
    assert find_device("cuda:3", 0, 1, python=True) == torch.device("cuda:3")
    assert find_device("cuda:0", 1, 2, python=True) == torch.device("cuda:1")
    assert find_device("cuda") == torch.device("cuda")
    assert current == [torch.device(f"cuda:{index}") for index in (1, 2, 1)]
