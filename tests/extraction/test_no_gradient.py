"""Forward passes alone: the same activations, half the arrays, and a detector that needs no backward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from nacpipe.benchmarks.toml import open_benchmark
from nacpipe.cache import LayerSpec, open_cache
from nacpipe.cache.verify import verify_cache
from nacpipe.cli import main
from nacpipe.detector.export import export_detector
from nacpipe.detector.fit import fit_detector
from nacpipe.detector.module import attach
from nacpipe.errors import CacheError, IdentityError, InputError, ParamsError
from nacpipe.evaluation.inspection import compare_splits
from nacpipe.extraction.dataset import Normalise, open_images
from nacpipe.extraction.loader import load_batches
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest
from nacpipe.method.fitted_term import fit_term
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.networks.build import load_network
from nacpipe.networks.models import find_model
from nacpipe.networks.taps import Taps, freeze
from nacpipe.scoring.coverage import score_splits
from nacpipe.tuning.space_file import read_spec

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def forward(request_: ExtractRequest, tmp_path: Path) -> ExtractRequest:
    """A cache without gradients, beside the request's own."""
    forward = replace(request_, cache=tmp_path / "forward.zarr", gradient=False)
    extract(plan_extraction(forward))
    return forward


def no_backward(*_: object, **__: object) -> None:
    raise AssertionError("a backward pass")


def test_activations_are_those_of_an_extraction_with_gradients(
    forward: ExtractRequest, request_: ExtractRequest
) -> None:
    half = open_cache(forward.cache)
    extract(plan_extraction(replace(request_, layers=tuple(spec.path for spec in half.header.layers))))
    whole = open_cache(request_.cache)
    assert (whole.header.gradients, half.header.gradients) == (True, False)
    assert list(half) == list(whole)
    for name, split in half.items():
        assert split["avgpool"].gradient is None
        for path in half.header.arrays():
            np.testing.assert_allclose(split.read(path), whole[name].read(path), rtol=1e-5, atol=1e-6, err_msg=path)
    assert set(whole.header.arrays()) - set(half.header.arrays()) == {
        f"layers/{spec.name}/gradient" for spec in whole.header.layers
    }
    assert not list(Path(forward.cache).rglob("gradient"))
    assert verify_cache(half) == []


def test_one_kind_of_cache_is_not_gone_on_with_as_the_other(forward: ExtractRequest) -> None:
    with pytest.raises(IdentityError, match="gradients: stored false, now nothing"):
        plan_extraction(replace(forward, gradient=True))
    assert "--no-gradient" in open_cache(forward.cache).command()


def test_no_backward_pass_runs(request_: ExtractRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.autograd, "grad", no_backward)
    monkeypatch.setattr(Tensor, "backward", no_backward)
    with pytest.raises(InputError, match="a backward pass"):
        plan_extraction(request_)
    extract(plan_extraction(replace(request_, gradient=False)))


def test_what_counts_gradients_is_refused(forward: ExtractRequest) -> None:
    cache = open_cache(forward.cache)
    assert {
        tuple(given["source"].values) for name, given in read_spec("auto", cache, ()).items() if name[:6] != "logits"
    } == {("activation",)}
    with pytest.raises(
        ParamsError, match=r"without gradients \(extract --no-gradient\), and the space paper counts the product"
    ):
        read_spec("paper", cache, ())
    params = NacParams(layers={"avgpool": LayerParams(bins=20, saturation=5, alpha=0.5)})
    with pytest.raises(CacheError, match="was written without gradients"):
        score_splits(cache, params, ["id/val"])
    for words in (["id/val"], ["id/val", "avgpool"]):
        done = CliRunner().invoke(main, ["inspect", str(forward.cache), *words], prog_name="nacpipe")
        assert done.exit_code == 0, done.output
        assert "activation" in done.output
        assert "gradient" not in done.output


def test_a_detector_of_activations_scores_as_the_cache_without_a_backward_pass(
    forward: ExtractRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(forward.cache)
    params = NacParams(
        layers={
            "avgpool:activation": LayerParams(bins=20, saturation=5, alpha=0.05, source="activation", weight=0.5),
            "layer2:activation": LayerParams(bins=10, saturation=3, alpha=0.01, source="activation", weight=0.5),
        }
    )
    benchmark = open_benchmark(forward.benchmark)
    network = load_network(find_model(forward.model), benchmark, forward.checkpoint, torch.device("cpu"))
    monkeypatch.setattr(torch.autograd, "grad", no_backward)
    detector = attach(export_detector(cache, params), network.module)
    root = Path(str(forward.data_root))
    images = open_images(benchmark, benchmark.split("id/val"), root, train_images=20, train_seed=1)
    assert images is not None
    loaded = load_batches([images], [(0, range(cache["id/val"].rows))], network.transform, 0)
    batches = map(Normalise(network.transform), loaded)
    found = detector(next(iter(batches))).score.numpy()
    np.testing.assert_allclose(found, score_splits(cache, params, ["id/val"])["id/val"], rtol=1e-6)


class InPlace(nn.Module):
    """A layer whose output the next line overwrites, and a quantised one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.quantised, self.fc = nn.Identity(), Quantised(), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        values = self.first(images * 2)
        values.mul_(0)
        return torch.as_tensor(
            self.fc(self.quantised(images).dequantize().flatten(1)[:, :4] + values.flatten(1)[:, :4])
        )


class Quantised(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.quantize_per_tensor(images, 0.25, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # such networks are in use
def test_networks_that_change_in_place_or_are_quantised_are_tapped() -> None:
    torch.manual_seed(0)
    network, images = freeze(InPlace()), torch.round(torch.randn(3, 2, 2, 2) * 4) / 4
    layers = [LayerSpec(name=name, path=name, pooling="sum-nchw", neurons=2) for name in ("first", "quantised")]
    with Taps(network, layers, "fc", gradients=False) as taps:
        tapped = taps(images)
    torch.testing.assert_close(tapped.activation["first"], 2 * images.sum((2, 3)), rtol=0, atol=1e-6)
    torch.testing.assert_close(tapped.activation["quantised"], images.sum((2, 3)), rtol=0, atol=1e-6)
    assert tapped.gradient == {}


def test_attention_gives_the_same_bits_with_and_without_a_backward_pass() -> None:
    """Torch's fast path of attention, taken where nothing is recorded, rounds otherwise."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    network = freeze(nn.Sequential(nn.Flatten(2), encoder, nn.Flatten(), nn.Linear(5 * 16, 3)))
    images = torch.randn(9, 5, 4, 4)
    layers = [LayerSpec(name=name, path=name, pooling="sum-tokens", neurons=16) for name in ("0", "1")]
    enabled = torch.backends.mha.get_fastpath_enabled()
    with Taps(network, layers, "3") as taps:
        both = taps(images)
    with Taps(network, layers, "3", gradients=False) as taps:
        alone = taps(images)
    for name in ("0", "1"):
        assert torch.equal(alone.activation[name], both.activation[name])
    assert torch.equal(alone.logits, both.logits)
    for gradients in (True, False):  # a detector taps fewer layers than its cache
        with Taps(network, layers[1:], "3", gradients=gradients, cache_layers=["0", "1"]) as taps:
            fewer = taps(images)
        assert torch.equal(fewer.activation["1"], both.activation["1"])
        assert torch.equal(fewer.logits, both.logits)
    assert torch.backends.mha.get_fastpath_enabled() == enabled
    alone.logits.add_(1)  # no inference tensors
    assert not alone.logits.is_inference()


class Probe(nn.Module):
    """Notes whether attention that runs here may take torch's fast path."""

    seen: ClassVar[list[bool]] = []

    def forward(self, values: Tensor) -> Tensor:
        Probe.seen.append(torch.backends.mha.get_fastpath_enabled())
        return values


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(
    ("of_cache", "fast"),
    [
        (None, [True, True, False]),  # the tapped layer is the cache's first
        (["3", "1"], [True, False, False]),
        (["1", "3"], [True, False, False]),
        ([], [False, False, False]),  # a detector's file of an earlier version
    ],
)
@pytest.mark.repeats(4)
def test_attention_is_fast_up_to_the_caches_first_layer(
    gradients: bool, of_cache: list[str] | None, fast: list[bool]
) -> None:
    first, second = (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True) for _ in range(2))
    network = freeze(nn.Sequential(Probe(), first, Probe(), second, Probe(), nn.Flatten(), nn.Linear(12, 3)))
    layers = [LayerSpec(name="second", path="3", pooling="sum-tokens", neurons=4)]
    Probe.seen.clear()
    with Taps(network, layers, "6", gradients=gradients, overwritten=frozenset(), cache_layers=of_cache) as taps:
        taps(torch.randn(2, 3, 4))
    assert Probe.seen == fast
    assert torch.backends.mha.get_fastpath_enabled()


def test_attention_of_an_encoder_is_never_fast() -> None:
    """Its fast path passes nested tensors from layer to layer, which no pooling takes."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1)
    network = freeze(nn.Sequential(Probe(), encoder, Probe(), nn.Flatten(), nn.Linear(12, 3)))
    Probe.seen.clear()
    with Taps(network, [LayerSpec(name="1", path="1", pooling="sum-tokens", neurons=4)], "4") as taps:
        taps(torch.randn(2, 3, 4))
    assert set(Probe.seen) == {False}


def test_what_is_counted_from_images_needs_no_backward_pass_either(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    images = torch.randn(12, 1, 8, 8)
    layer = LayerParams(bins=9, saturation=3, alpha=0.05, source="activation")
    params = NacParams(layers={"1:activation": layer, "0": replace(layer, source="product", weight=0.0)})
    monkeypatch.setattr(torch.autograd, "grad", no_backward)
    detector = fit_detector(network, params, [images[:8], images[8:]], {})
    with Taps(
        freeze(network), [LayerSpec(name="1", path="1", pooling="sum-nchw", neurons=4)], "3", gradients=False
    ) as taps:
        values = taps(images).activation["1"].numpy()
    fitted = fit_term("1:activation", layer, values)
    np.testing.assert_array_equal(detector._lookups[0].fitted.counts, fitted.counts)
    assert len(detector._lookups) == 1  # what has weight 0 is not counted


@pytest.mark.slow
def test_caches_of_both_kinds_are_compared_by_their_activations(
    forward: ExtractRequest, request_: ExtractRequest
) -> None:
    extract(plan_extraction(request_))
    found = compare_splits(open_cache(forward.cache), open_cache(request_.cache), "id/val")
    assert found["alike"].to_numpy() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(found["ratio"], 1, rtol=1e-5)
