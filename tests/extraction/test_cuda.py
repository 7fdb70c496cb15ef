"""Extraction and a detector on a GPU: skipped where torch finds none."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import nacpipe
from nacpipe.cache import Cache, LayerSpec, open_cache
from nacpipe.extraction.decoder import Decoder
from nacpipe.extraction.image_file import decode_image
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.networks.batch_runner import BatchRunner
from nacpipe.networks.copies import CudaCopies
from nacpipe.networks.models import find_model
from nacpipe.networks.precision import choose_format, computing
from nacpipe.networks.taps import Taps, freeze
from tests.extraction.test_distributed import same

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
]


@pytest.fixture
def device() -> torch.device:
    """The first GPU."""
    return torch.device("cuda", 0)


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
    """Half types and TF32 change states in the third or second digit; what is pooled is float32 all the same."""
    taps, images = resnet20(device)
    batch, states = images[:64].to(device), dict[str, np.ndarray]()
    with taps:
        for precision in ("fp32", "tf32", "fp16", "bf16"):
            taps.precision = precision
            with computing(taps.network, precision, choose_format(precision, device)):
                tapped = taps(batch)
            assert {value.dtype for value in tapped.gradient.values()} == {torch.float32}
            states[precision] = tapped.gradient["layer1"].cpu().numpy()
    assert 0 <= difference(states["tf32"], states["fp32"]) < 0.05
    assert 1e-5 < difference(states["fp16"], states["fp32"]) < 0.2
    assert 1e-4 < difference(states["bf16"], states["fp32"]) < 0.5


class Attends(nn.Module):
    """One layer of attention over 256 tokens, whose backward pass adds in an order that torch may leave to chance."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.fc = nn.Linear(8, 256), nn.Linear(256, 3 * 256), nn.Linear(256, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        n, length, _ = tokens.shape
        parts = self.qkv(self.embed(tokens)).view(n, length, 3, 4, 64).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(*parts)
        return self.fc(found.transpose(1, 2).reshape(n, length, 256).mean(dim=1))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_attention_gives_the_same_bytes_every_time(device: torch.device, precision: str) -> None:
    torch.manual_seed(0)
    network, tokens = freeze(Attends()).to(device), torch.randn(64, 256, 8, device=device)
    layers = [LayerSpec(name="embed", path="embed", pooling="sum-tokens", neurons=256)]
    with computing(network, precision, "contiguous"), Taps(network, layers, "fc", precision=precision) as taps:
        first = taps(tokens).gradient["embed"].cpu()
        assert taps.strict
        for _ in range(5):
            assert torch.equal(taps(tokens).gradient["embed"].cpu(), first)
    assert first.isfinite().all()
    assert first.abs().max() > 0


def test_a_batch_is_copied_on_a_stream_of_its_own(device: torch.device) -> None:
    """While the current stream is busy; what is computed afterwards waits for it, and gets the right numbers."""
    copies, pixels = CudaCopies(device), torch.arange(1 << 24, dtype=torch.int32).pin_memory()
    torch.cuda.synchronize(device)
    torch.cuda._sleep(1 << 28)  # about 0.1 s
    copied, done = copies.start((pixels,))
    assert done is not None
    done.synchronize()
    assert not torch.cuda.current_stream(device).query()
    (found,) = copies.finish((copied, done))
    assert found.device == device
    assert torch.equal((found + 1).cpu(), pixels + 1)


def test_nvjpeg_is_near_pillow(device: torch.device) -> None:
    colours = np.random.RandomState(0).randint(0, 256, (6, 8, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(colours).resize((64, 48), Image.Resampling.BICUBIC).save(content, "JPEG", subsampling=0)
    decoder = Decoder(name="nvjpeg", device=str(device))
    found, expected = decoder.decode(content.getvalue()), decode_image(content.getvalue(), "x")
    assert found is not None
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 4
