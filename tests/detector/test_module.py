"""The detector's scores are the cache's, in whatever batches and whatever mode its caller is; it changes nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import nacpipe
from nacpipe.benchmarks.toml import choose_root, open_benchmark
from nacpipe.cache import Cache, open_cache
from nacpipe.cache.writer import round_mantissa
from nacpipe.detector.export import export_detector
from nacpipe.detector.file import Exported, write_detector
from nacpipe.detector.module import Detected, Detector, Lookup, attach, load_detector
from nacpipe.detector.values import round_bits
from nacpipe.errors import DetectorError, InputError
from nacpipe.extraction.dataset import Normalise, open_images
from nacpipe.extraction.loader import load_batches
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest
from nacpipe.method.fitted_term import fit_term
from nacpipe.method.metrics import auroc
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.term import parse_term
from nacpipe.networks.build import load_network
from nacpipe.networks.models import find_model
from nacpipe.networks.taps import Taps
from nacpipe.scoring.alpha_range import measure_alpha
from nacpipe.scoring.trial_scorer import TermIndexes
from tests import oracle

pytestmark = pytest.mark.usefixtures("one_thread")

SPLITS = ("id/train", "id/val", "ood/val")

VIT = """
import torch
from torchvision.models import VisionTransformer

def vit():
    torch.manual_seed(3)
    network = VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=24, mlp_dim=48, num_classes=10
    )
    torch.nn.init.normal_(network.heads.head.weight)
    return network
"""


@dataclass(frozen=True)
class Case:
    """A network with a cache of three splits, parameters, and the detector that was exported."""

    request: ExtractRequest
    cache: Cache
    params: NacParams
    exported: Exported
    file: Path

    def network(self) -> nn.Module:
        benchmark = open_benchmark(self.request.benchmark)
        row = find_model(self.request.model)
        return load_network(row, benchmark, self.request.checkpoint, torch.device("cpu")).module

    def images(self, split: str) -> Tensor:
        benchmark = open_benchmark(self.request.benchmark)
        root = choose_root(benchmark, self.request.data_root)
        found = open_images(
            benchmark, benchmark.split(split), root, train_images=self.request.train_images, train_seed=1
        )
        assert found is not None
        transform = self.exported.transform
        return torch.cat(
            [*map(Normalise(transform), load_batches([found], [(0, range(found.index.size))], transform, 0))]
        )

    def cached(self, split: str) -> NDArray[np.float64]:
        return nacpipe.score_splits(self.cache, self.params, [split])[split]


def make_case(request: ExtractRequest, file: Path, layers: Sequence[str] = ()) -> Case:
    if not request.cache.exists():
        extract(plan_extraction(request))
    cache = open_cache(request.cache)
    params = NacParams(
        layers={
            name: LayerParams(bins=20 + 15 * i, saturation=30 + i, alpha=_alpha(cache, name), weight=1.0 + i)
            for i, name in enumerate(layers or [spec.name for spec in cache.header.layers])
        }
    )
    exported = export_detector(cache, params)
    write_detector(file, exported)
    return Case(request, cache, params, exported, file)


def _alpha(cache: Cache, layer: str) -> float:
    """Steep enough that states spread over the bins."""
    view = cache["id/train"][layer]
    return float(1 / np.abs(view.activation[:] * view.gradient[:]).mean())  # type: ignore[operator]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("detectors")


@pytest.fixture(scope="module")
def digits(digits_cache: Path, place: Path) -> Case:
    request = ExtractRequest(benchmark="digits", model="digits_cnn", cache=digits_cache, device="cpu", splits=SPLITS)
    return make_case(request, place / "digits.safetensors")


@pytest.fixture(scope="module")
def resnet(shared: Path, place: Path) -> Case:
    request = ExtractRequest(
        benchmark="cifar10",
        model="resnet20",
        cache=place / "resnet20.zarr",
        checkpoint=shared / "checkpoints/resnet_cifar10/resnet20-12fca82f.th",
        data_root=shared / "openood",
        device="cpu",
        splits=SPLITS,
    )
    return make_case(request, place / "resnet20.safetensors")


@pytest.fixture(scope="module")
def vit(root: Path, place: Path) -> Case:
    (place / "net.py").write_text(VIT)
    layers = ("encoder.ln", "encoder.layers.encoder_layer_2.ln_2", "encoder.layers.encoder_layer_1.ln_2", "conv_proj")
    request = ExtractRequest(
        benchmark="cifar10",
        model=f"{place / 'net.py'}:vit",
        cache=place / "vit.zarr",
        data_root=root,
        layers=layers,
        poolings=(("encoder.ln", "class-token"),),
        train_images=40,
        device="cpu",
        splits=SPLITS,
    )
    return make_case(request, place / "vit.safetensors")


@pytest.fixture(params=["digits", pytest.param("resnet", marks=pytest.mark.reference), "vit"])
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.getfixturevalue(request.param)
    return found


def run(detector: Detector, images: Tensor, size: int) -> NDArray[np.float64]:
    return np.concatenate([detector(part).score.numpy() for part in images.split(size)])


# --- the cache's scores -----------------------------------------------------------------------------------------------


@pytest.mark.repeats(1)
def test_the_same_batches_give_the_caches_scores(case: Case) -> None:
    detector = load_detector(case.file, case.network())
    for split in ("id/val", "ood/val"):
        images, expected = case.images(split), case.cached(split)
        assert np.unique(expected).size > expected.size / 4  # they could differ
        np.testing.assert_array_equal(run(detector, images, 128), expected)


@pytest.mark.repeats(1)
@pytest.mark.parametrize("how", ["1", pytest.param("257", marks=pytest.mark.slow), "channels-last"])
def test_other_batches_and_formats_give_nearly_the_same(case: Case, how: str) -> None:
    detector = load_detector(case.file, case.network())
    scores = []
    for split in ("id/val", "ood/val"):
        images, expected = case.images(split)[:300], case.cached(split)[:300]
        if how == "channels-last":
            detector.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            images = images.to(memory_format=torch.channels_last)
        found = run(detector, images, 128 if how == "channels-last" else int(how))
        assert (np.abs(found - expected) <= 1e-5).mean() >= 0.97
        scores += [found, expected]
    assert auroc(scores[0], scores[2]) == pytest.approx(auroc(scores[1], scores[3]), abs=0.0005)


def test_the_threshold_flags_as_many_as_it_was_chosen_for(case: Case) -> None:
    detector = load_detector(case.file, case.network())
    images, cached = case.images("id/val"), case.cached("id/val")
    found = detector(images[:128])
    assert found.is_ood.tolist() == (cached[:128] < case.exported.threshold).tolist()
    assert (cached >= case.exported.threshold).mean() >= 0.95
    assert found.is_ood.dtype == torch.bool
    assert found.score.dtype == torch.float64
    network = case.network()
    with torch.no_grad():
        torch.testing.assert_close(found.logits, network(images[:128]))


IN_ANOTHER_PROCESS = """
import json, sys
import torch
torch.set_num_threads(1)
from nacpipe import load_detector
from nacpipe.benchmarks.digits import load_set
from tools.train_digits import to_inputs
from nacpipe.networks.build import load_network
from nacpipe.networks.models import find_model
from nacpipe.benchmarks.toml import open_benchmark
network = load_network(find_model("digits_cnn"), open_benchmark("digits"), None, torch.device("cpu")).module
scores = [load_detector(sys.argv[1], network)(part).score for part in to_inputs(load_set("val")[0]).split(128)]
print(json.dumps(torch.cat(scores).tolist()))
"""


@pytest.mark.slow
def test_another_process_gives_identical_scores(digits: Case) -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IN_ANOTHER_PROCESS, str(digits.file)],
        env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == digits.cached("id/val").tolist()


# --- by the definition ------------------------------------------------------------------------------------------------


def test_scores_are_the_oracles(digits: Case) -> None:
    """From the network's own arithmetic to the score in plain lines, one layer after the other."""
    images, network = digits.images("id/val")[:40], digits.network()
    train = digits.images("id/train")
    specs = digits.cache.header.layers
    with Taps(network, specs, "fc") as taps:
        tapped_train, tapped = [taps(part) for part in train.split(128)], taps(images)
    layer_scores, weights = [], []
    for name, params in digits.params.layers.items():
        parts = [(t.activation[name] * t.gradient[name]).numpy() for t in tapped_train]
        products = (tapped.activation[name] * tapped.gradient[name]).numpy()
        layer_scores.append(
            oracle.score_layer(
                np.concatenate(parts), products, bins=params.bins, saturation=params.saturation, alpha=params.alpha
            )
        )
        weights.append(params.weight)
    expected = oracle.weighted_score(layer_scores, weights)
    found = load_detector(digits.file, network)(images).score.numpy()
    assert (np.abs(found - expected) < 1e-12).mean() >= 0.95  # a state may lie on an edge


@pytest.mark.parametrize("source", ["product", "activation", "gradient"])
def test_logits_need_no_tap_and_no_backward_pass(digits: Case, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = digits.network(), digits.images("id/val")[:50]
    with torch.no_grad():
        logits = network(images).numpy().astype(np.float64)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    gradient = (softmax - 0.1).astype(np.float32)
    states = {
        "activation": logits.astype(np.float32),
        "gradient": gradient,
        "product": logits.astype(np.float32) * gradient,
    }[source]
    params = LayerParams(bins=20, saturation=5, alpha=1.0, source=source)
    forbid_backward(monkeypatch)
    detector = Detector(network, [fit_term("logits", params, states)], [], images[:2])
    expected = oracle.score_layer(states, states, bins=20, saturation=5, alpha=1.0)
    assert (np.abs(detector(images).score.numpy() - expected) < 1e-12).mean() >= 0.95


def test_exported_logits_score_as_the_cache_does(digits: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    params = NacParams(
        layers={
            "logits": LayerParams(bins=40, saturation=20, alpha=0.5, weight=2.0),
            "avgpool": LayerParams(bins=20, saturation=30, alpha=1.0),
        }
    )
    expected = nacpipe.score_splits(digits.cache, params, ["id/val"])["id/val"]
    network, images = digits.network(), digits.images("id/val")
    write_detector(digits.file.with_name("logits.safetensors"), export_detector(digits.cache, params))
    detector = load_detector(digits.file.with_name("logits.safetensors"), network)
    forbid_backward(monkeypatch)
    np.testing.assert_array_equal(run(detector, images, 128), expected)


def test_a_layer_once_per_source_scores_as_the_cache_does(digits: Case) -> None:
    layers = ("avgpool", "logits")
    params = NacParams(
        layers={
            f"{layer}:{source}": LayerParams(bins=20, saturation=9, alpha=1.0, source=source, weight=weight)
            for layer in layers
            for source, weight in (("product", 1.0), ("gradient", 2.0))
        }
    )
    expected = nacpipe.score_splits(digits.cache, params, ["id/val"])["id/val"]
    write_detector(digits.file.with_name("terms.safetensors"), export_detector(digits.cache, params))
    detector = load_detector(digits.file.with_name("terms.safetensors"), digits.network())
    np.testing.assert_array_equal(run(detector, digits.images("id/val"), 128), expected)


VIEWS = (
    "avgpool:by_class",
    "avgpool:activation:by_class",
    "logits:by_class",
    "avgpool:components",
    "logits:components",
)


def view_params(cache: Cache, name: str) -> LayerParams:
    """Steep enough that scores differ."""
    term = parse_term(name)
    alpha = measure_alpha(term.name, term.source, TermIndexes(cache, ["id/val"])(term.name, term.source))[1] / 10
    return LayerParams(bins=60, saturation=40, alpha=alpha, source=term.source)


@pytest.mark.repeats(1)
@pytest.mark.parametrize("term", VIEWS)
def test_every_view_scores_as_the_cache_does(digits: Case, term: str, tmp_path: Path) -> None:
    params = NacParams(layers={term: view_params(digits.cache, term)})
    write_detector(tmp_path / "d", export_detector(digits.cache, params))
    detector = load_detector(tmp_path / "d", digits.network())
    for split in ("id/val", "ood/val"):
        expected = nacpipe.score_splits(digits.cache, params, [split])[split]
        assert np.unique(expected).size > 40  # they could differ
        np.testing.assert_array_equal(run(detector, digits.images(split), 128), expected)


@pytest.mark.slow
def test_views_together_score_as_the_cache_does_in_groups_of_classes(place: Path) -> None:
    """800 training images of 10 classes make 8 groups."""
    request = ExtractRequest(
        benchmark="digits", model="digits_cnn", cache=place / "g.zarr", device="cpu", splits=SPLITS, train_images=800
    )
    extract(plan_extraction(request))
    cache = open_cache(request.cache)
    params = NacParams(
        layers={"layer3": LayerParams(bins=9, saturation=4, alpha=0.1)} | {t: view_params(cache, t) for t in VIEWS}
    )
    exported = export_detector(cache, params)
    groups = next(fitted.groups for fitted in exported.terms if fitted.groups is not None)
    assert (groups.count, len(set(groups.group_of.tolist()))) == (8, 8)
    write_detector(place / "g.safetensors", exported)
    case = Case(request, cache, params, exported, place / "g.safetensors")
    detector = load_detector(case.file, case.network())
    for split in ("id/val", "ood/val"):
        np.testing.assert_array_equal(run(detector, case.images(split), 128), case.cached(split))
    broken = case.images("id/val")[:8].clone()
    broken[3, 0, 5, 5] = float("nan")
    found = detector(broken)
    assert torch.isnan(found.score).tolist() == [i == 3 for i in range(8)]
    assert found.is_ood[3]


def forbid_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a backward pass ran")

    monkeypatch.setattr(torch.autograd, "grad", fail)


def test_layers_that_feed_the_classifier_need_no_backward_pass(digits: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = digits.network(), digits.images("id/val")[:128]
    params = LayerParams(bins=20, saturation=5, alpha=1.0)
    only = NacParams(layers={"avgpool": params})
    detector = attach(export_detector(digits.cache, only), network)
    expected = nacpipe.score_splits(digits.cache, only, ["id/val"])["id/val"][:128]
    forbid_backward(monkeypatch)
    np.testing.assert_array_equal(detector(images).score.numpy(), expected)
    with pytest.raises(AssertionError, match="a backward pass ran"):
        load_detector(digits.file, network)


@pytest.mark.slow
def test_rounded_caches_are_scored_with_rounded_states(place: Path) -> None:
    request = ExtractRequest(
        benchmark="digits", model="digits_cnn", cache=place / "k.zarr", device="cpu", splits=SPLITS, mantissa_bits=6
    )
    case = make_case(request, place / "k.safetensors")
    images, expected = case.images("id/val"), case.cached("id/val")
    np.testing.assert_array_equal(run(load_detector(case.file, case.network()), images, 128), expected)
    unrounded = attach(replace(case.exported, mantissa_bits=23), case.network())
    assert (run(unrounded, images, 128) != expected).any()


@pytest.mark.parametrize("keep", [1, 5, 10, 22, 23])
def test_bits_are_rounded_as_the_cache_rounds(keep: int) -> None:
    rng = np.random.RandomState(keep)
    values = np.concatenate([rng.randn(500), -rng.rand(500) * 1e-30, [0.0, 1.0, -1.5]]).astype(np.float32)
    np.testing.assert_array_equal(round_bits(torch.from_numpy(values), keep).numpy(), round_mantissa(values, keep))


@pytest.mark.parametrize("edges", ["log", "linear"])
@pytest.mark.parametrize("alpha", [1e-3, 1.0, 1e30, 1e-39])  # borders apart, borders that coincide, infinite borders
def test_plain_torch_looks_up_what_the_compiled_kernel_does(edges: Any, alpha: float) -> None:
    rng = np.random.RandomState(0)
    train, products = rng.randn(200, 7).astype(np.float32), rng.randn(90, 7).astype(np.float32) * 3
    params = LayerParams(bins=31, saturation=9, alpha=alpha, edges=edges)
    fitted = fit_term("a", params, train)
    products[:31, 0] = np.nan_to_num(fitted.borders, posinf=1e30, neginf=-1e30)  # on every border
    lookup, values = Lookup(fitted), torch.from_numpy(products)
    np.testing.assert_array_equal(lookup.on_device(values), lookup(values, np.zeros((90, 2), np.float32)))


# --- it changes nothing -----------------------------------------------------------------------------------------------


def flags(network: nn.Module) -> dict[str, Any]:
    return {
        "training": {name: m.training for name, m in network.named_modules()},
        "inplace": {name: getattr(m, "inplace", None) for name, m in network.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in network.named_parameters()},
        "grad": {name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()},
        "state": {name: value.clone() for name, value in network.state_dict().items()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in network.named_modules()},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for what in ("training", "inplace", "requires_grad", "hooks"):
        assert before[what] == after[what]
    for what in ("grad", "state"):
        for name, value in before[what].items():
            assert (value is None and after[what][name] is None) or torch.equal(value, after[what][name])


def in_training(network: nn.Module) -> nn.Module:
    """In the midst of training: mixed modes and flags, gradients at hand, in-place activations."""
    network.train()
    network.get_submodule("layer2").eval()
    network.requires_grad_(True)
    network.get_submodule("layer1").requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    return network


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode"])
@pytest.mark.repeats(1)
def test_a_network_in_training_gives_the_same_scores_and_is_left_alone(digits: Case, mode: str) -> None:
    network = in_training(digits.network())
    before = flags(network)
    detector = load_detector(digits.file, network)
    assert_same(before, flags(network))
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]
    with context():
        images = digits.images("id/val")[:128].clone()  # made in there
        found = detector(images)
        assert torch.is_grad_enabled() == (mode == "grad")
        assert torch.is_inference_mode_enabled() == (mode == "inference_mode")
    assert_same(before, flags(network))
    np.testing.assert_array_equal(found.score.numpy(), digits.cached("id/val")[:128])
    assert not any(value.requires_grad for value in found)


def test_a_graph_of_the_callers_survives(digits: Case) -> None:
    """Between a training step's forward and backward pass, the detector looks at images."""
    network = digits.network().requires_grad_(True)
    images = digits.images("id/val")[:16]
    detector = load_detector(digits.file, network)
    gradients = []
    for look in (False, True):
        network.zero_grad()
        loss = network(images).square().sum()
        if look:
            detector(images.clone().requires_grad_())
        loss.backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(network.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_flags_come_back_after_a_failure(digits: Case) -> None:
    network = in_training(digits.network())
    detector = load_detector(digits.file, network)
    before = flags(network)
    with pytest.raises(InputError, match=r"^the network fails on inputs int64 \(1, 28, 28\): RuntimeError: .* type"):
        detector(torch.zeros(2, 1, 28, 28, dtype=torch.long))
    assert_same(before, flags(network))


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 56, 56)])
def test_samples_of_another_size_are_refused(shape: tuple[int, ...], digits: Case) -> None:
    detector = load_detector(digits.file, digits.network())
    with pytest.raises(InputError, match=rf"^samples are {re.escape(str(shape))}, .*were counted on \(1, 28, 28\): "):
        detector(torch.zeros(2, *shape))


def test_a_callers_autocast_does_not_reach_it(digits: Case) -> None:
    detector = load_detector(digits.file, digits.network())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = detector(digits.images("id/val")[:128])
    np.testing.assert_array_equal(found.score.numpy(), digits.cached("id/val")[:128])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_half_type_is_used_where_the_states_were_counted_in_it(place: Path, precision: str) -> None:
    request = ExtractRequest(
        benchmark="digits", model="digits_cnn", cache=place / f"{precision}.zarr", device="cpu", splits=SPLITS[:2],
        train_images=100, precision=precision,
    )  # fmt: skip
    case = make_case(request, place / f"{precision}.safetensors")
    found = load_detector(case.file, case.network())(case.images("id/val")[:128])
    np.testing.assert_array_equal(found.score.numpy(), case.cached("id/val")[:128])


@pytest.mark.parametrize(("device", "expected"), [("cpu", True), ("cuda", False)])
def test_kernels_are_laid_out_as_the_states_were_made(digits: Case, device: str, expected: bool) -> None:
    """During a call alone, and on a device of that type."""
    made = {"device": device, "tf32": False, "memory_format": "channels_last"}
    network, images, seen = digits.network(), digits.images("id/val")[:4], list[bool]()
    exported = replace(digits.exported, identity={**digits.exported.identity, "arithmetic": made})
    detector = attach(exported, network)
    kernels = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    kernel = next(kernel for kernel in kernels if kernel.shape[1] > 1)  # of one channel both are the same
    network.register_forward_pre_hook(lambda *_: seen.append(kernel.stride()[1] == 1))
    scores = detector(images).score.numpy()
    assert seen == [expected]
    assert kernel.is_contiguous()
    np.testing.assert_allclose(scores, digits.cached("id/val")[:4], atol=1e-3)


@pytest.mark.slow
def test_threads_do_not_mix_their_images(digits: Case) -> None:
    detector = load_detector(digits.file, digits.network())
    parts = list(digits.images("id/val").split(50))
    expected = [detector(part).score.tolist() for part in parts]
    found: dict[int, list[float]] = {}

    def work(number: int) -> None:
        for _ in range(3):
            found[number] = detector(parts[number]).score.tolist()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(parts))] == expected


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_states_that_are_not_finite_are_flagged(digits: Case) -> None:
    detector = load_detector(digits.file, digits.network())
    images = digits.images("id/val")[:8].clone()
    clean = detector(images)
    images[3, 0, 5, 5] = float("nan")
    found: Detected = detector(images)
    assert found.is_ood[3]
    assert torch.isnan(found.score).tolist() == [i == 3 for i in range(8)]
    rest = [i for i in range(8) if i != 3]
    assert found.score[rest].tolist() == clean.score[rest].tolist()


def test_other_weights_are_refused(digits: Case) -> None:
    network = digits.network()
    with torch.no_grad():
        network.get_parameter("fc.bias")[0] += 1
    with pytest.raises(
        DetectorError, match=rf"^{digits.file}: it was exported for another network \(weights: stored \w{{8}}…, now"
    ):
        load_detector(digits.file, network)


def test_what_does_not_fit_the_network_is_refused(digits: Case) -> None:
    exported, network = digits.exported, digits.network()
    first, tap = exported.terms[0], exported.taps[0]

    def spoiled(**changes: Any) -> Exported:
        return replace(exported, terms=(first,), taps=(replace(tap, **changes),))

    with pytest.raises(DetectorError, match="layer 'avgpool' has 64 neurons, 63 were counted"):
        attach(replace(spoiled(), terms=(replace(first, table=first.counts[:-1]),)), network)
    with pytest.raises(DetectorError, match="layer 'avgpool': pooling 'mean' is not known"):
        attach(spoiled(pooling="mean"), network)
    with pytest.raises(InputError, match="layer 'avgpool': the network has no module 'layer9'"):
        attach(spoiled(path="layer9"), network)
    with torch.inference_mode():
        made_inside = digits.network()
    with pytest.raises(InputError, match=r"made under torch\.inference_mode"):
        attach(exported, made_inside)
