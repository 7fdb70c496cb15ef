"""Extraction and a detector on a GPU: skipped where torch finds none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import nacpipe
from nacpipe.cache import Cache, LayerSpec, open_cache
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest, uses_tf32
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.networks.batch_runner import BatchRunner
from nacpipe.networks.models import find_model
from nacpipe.networks.taps import Tapped, Taps, freeze
from tests.extraction.test_distributed import same

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
]


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The first GPU, with the arithmetic that extraction pins left as it was."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield torch.device("cuda", 0)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@pytest.fixture
def cuda_request(request_: ExtractRequest, device: torch.device) -> ExtractRequest:
    return replace(request_, device=str(device))


def run(request: ExtractRequest) -> Cache:
    extract(plan_extraction(request))
    return open_cache(request.cache)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


def test_states_are_the_cpus_within_a_thousandth(cuda_request: ExtractRequest, finished: Cache) -> None:
    cache = run(cuda_request)
    assert cache.header.identity["arithmetic"]["device"] == "cuda"
    assert list(cache) == list(finished)
    for split in finished:
        for path in finished.header.arrays():
            found, expected = cache[split].read(path), finished[split].read(path)
            if expected.dtype.kind == "i":
                assert np.array_equal(found, expected), (split, path)
            else:
                assert difference(found, expected) < 1e-3, (split, path)


def test_an_extraction_gives_the_same_bytes_twice(cuda_request: ExtractRequest, tmp_path: Path) -> None:
    assert same(run(cuda_request), run(replace(cuda_request, cache=tmp_path / "again.zarr")))


def test_a_detector_gives_the_scores_of_its_cache(device: torch.device, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, images = find_model("resnet20").build(10).eval().to(device), torch.randn(96, 3, 32, 32)
    splits = {
        "id/train": TensorDataset(images[:64], torch.arange(64) % 10),
        "id/val": TensorDataset(images[64:], torch.arange(32) % 10),
    }
    cache = nacpipe.extract(network, splits, tmp_path / "x.zarr", layers=["layer3", "layer2"], batch_size=16)
    assert cache.header.identity["arithmetic"]["device"] == device.type
    layer = LayerParams(bins=50, saturation=5, alpha=100.0)
    params = NacParams(layers=dict.fromkeys(("layer3", "layer2"), layer))
    detector = nacpipe.Detector.from_cache(cache, params, network)
    found = [detector(batch) for batch in images[64:].to(device).split(16)]  # as extraction's batches
    assert {one.score.device for one in found} == {device}
    scores = torch.cat([one.score for one in found]).cpu().numpy()
    assert np.array_equal(scores, nacpipe.score_splits(cache, params, ["id/val"])["id/val"])


def resnet20(device: torch.device) -> tuple[Taps, Tensor]:
    """Hooks on the default layers of a network of random weights, and 512 images on the CPU."""
    torch.manual_seed(0)
    row = find_model("resnet20")
    network = freeze(row.build(10).eval()).to(device)
    layers = [LayerSpec(name=n, path=row.layers[n][0], pooling=row.layers[n][1], neurons=0) for n in row.default]
    return Taps(network, layers, row.classifier), torch.randn(512, 3, 32, 32)


def test_a_batch_that_does_not_fit_runs_in_smaller_ones(device: torch.device) -> None:
    taps, images = resnet20(device)
    notes: list[str] = []
    with taps:
        expected = torch.cat([taps(part.to(device)).logits.cpu() for part in images.split(64)])
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        taps(images[:128].to(device))
        needed = torch.cuda.max_memory_reserved(device)
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(1.5 * needed / total, device)
        try:
            found = torch.cat(list(BatchRunner(lambda part: taps(part).logits.cpu(), device, notes.append)(images)))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert len(notes) == 1
    assert notes[0].startswith("512 images at once do not fit the memory of cuda:0: from here on batches of ")
    assert difference(found.numpy(), expected.numpy()) < 1e-3


def test_precisions_differ_as_they_should(device: torch.device) -> None:
    """TF32 and bfloat16 change states in the third or second digit; what is pooled is float32 all the same."""
    taps, images = resnet20(device)

    def states(tapped: Tapped) -> np.ndarray:
        assert {value.dtype for value in tapped.gradient.values()} == {torch.float32}
        return tapped.gradient["layer1"].cpu().numpy()

    batch = images[:64].to(device)
    with taps:
        exact = states(taps(batch))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        assert uses_tf32(device)
        tf32 = states(taps(batch))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        assert not uses_tf32(device)
        taps.autocast = torch.bfloat16
        bf16 = states(taps(batch))
    assert 0 <= difference(tf32, exact) < 0.05
    assert 1e-4 < difference(bf16, exact) < 0.5
