"""Files for other runtimes: they give the detector's scores, for any number of samples, or are refused in words."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nacpipe.benchmarks.digits import load_set
from nacpipe.cli import main
from nacpipe.detector.graph import _Bisection, _Rounding
from nacpipe.detector.module import Detected, Detector
from nacpipe.detector.values import round_bits
from nacpipe.errors import DetectorError, InputError
from nacpipe.method.feature_scores import FusedScore
from nacpipe.method.metrics import detect
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.networks.architectures.digits_cnn import DigitsCNN
from nacpipe.networks.models import find_model
from nacpipe.scoring.params_file import write_params

WITHOUT = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
pytestmark = [  # imported where they are used: every worker reads this file
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(WITHOUT), reason=f"the extra onnx lacks {', '.join(WITHOUT)}"),
]


def activation(bins: int, saturation: int, alpha: float, weight: float = 1.0) -> LayerParams:
    return LayerParams(bins=bins, saturation=saturation, alpha=alpha, weight=weight, source="activation")


def digits(name: str, count: int) -> Tensor:
    images = torch.tensor(load_set(name)[0][:count]).float() / 255
    return (images[:, None] - 0.1307) / 0.3081


def batches(images: Tensor) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(images), 100, collate_fn=lambda rows: torch.stack([row[0] for row in rows]))


def run(file: Path, **arguments: Tensor) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file.read_bytes())
    outputs = [output.name for output in session.get_outputs()]
    return dict(zip(outputs, session.run(None, {k: v.numpy() for k, v in arguments.items()}), strict=True))


def assert_alike(found: dict[str, np.ndarray], wanted: Detected, share: float = 0.97) -> None:
    assert list(found) == ["logits", "score", "percentile", "is_ood"]
    assert {name: array.shape[0] for name, array in found.items()} == dict.fromkeys(found, len(wanted.score))
    scores = wanted.score.numpy()
    close = np.abs(found["score"] - scores) <= 1e-5
    assert close.mean() >= share
    np.testing.assert_allclose(found["logits"], wanted.logits.float().numpy(), atol=1e-3)
    np.testing.assert_allclose(found["percentile"][close], wanted.percentile.numpy()[close], atol=1.0)
    assert (found["is_ood"] == wanted.is_ood.numpy())[close].mean() >= 0.99


EVERY_KIND = {
    "avgpool:activation": activation(200, 20, 0.5),
    "layer2:activation:by_class": activation(50, 7, 0.05),
    "layer1:activation:components": activation(30, 11, 0.5),
    "logits": LayerParams(bins=40, saturation=9, alpha=1.0),
    "logits:gradient:by_class": LayerParams(bins=21, saturation=9, alpha=5.0, source="gradient"),
}


@pytest.fixture(scope="module")
def packaged() -> DigitsCNN:
    from safetensors.torch import load_file

    from nacpipe.networks.architectures import digits_cnn

    network = DigitsCNN()
    network.load_state_dict(load_file(digits_cnn.__file__.replace(".py", ".safetensors")))
    return network


@dataclass(frozen=True)
class Exports:
    """What the command wrote: a detector without its network, and one file with both."""

    detector: Detector
    onnx: Path
    printed: Result


@pytest.fixture(scope="module")
def exports(packaged: DigitsCNN, digits_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    place = tmp_path_factory.mktemp("onnx")
    layers = {
        "avgpool:activation": activation(60, 20, 0.5),
        "layer2:activation:by_class": activation(20, 7, 0.05),
    }
    write_params(place / "p.json", NacParams(layers=layers))
    words = ["export", str(digits_cache), "--params", str(place / "p.json"), "--json", "--output"]
    done = CliRunner().invoke(main, [*words, str(place / "d.safetensors")], prog_name="nacpipe")
    assert done.exit_code == 0, done.stderr
    (place / "out").mkdir()
    file = place / "out/forward.detector.onnx"
    done = CliRunner().invoke(main, [*words, str(file), "--format", "onnx"], prog_name="nacpipe")
    assert done.exit_code == 0, done.stderr
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # no second file of weights
    return Exports(Detector.load(place / "d.safetensors", packaged), file, done)


@pytest.mark.parametrize("count", [1, 257])
@pytest.mark.slow
def test_onnxruntime_gives_the_detectors_scores(exports: Exports, count: int) -> None:
    images = digits("letters", count)
    assert_alike(run(exports.onnx, input=images), exports.detector(images))


def test_the_auroc_is_the_same(exports: Exports) -> None:
    images, letters = digits("val", 500), digits("letters", 500)
    ours = detect(exports.detector(images).score.numpy(), exports.detector(letters).score.numpy()).auroc
    theirs = detect(run(exports.onnx, input=images)["score"], run(exports.onnx, input=letters)["score"]).auroc
    assert theirs == pytest.approx(ours, abs=0.0005)
    assert ours > 0.9


def test_the_file_says_what_it_is_of(exports: Exports) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(exports.onnx.read_bytes())
    said = json.loads(session.get_modelmeta().custom_metadata_map["nacpipe_detector"])
    assert said["threshold"] == exports.detector.threshold
    assert said["identity"] == exports.detector.exported.identity
    assert [(one.name, one.shape[0]) for one in session.get_inputs()] == [("input", "batch")]


def test_an_image_that_is_not_finite_has_no_score_and_is_flagged(exports: Exports) -> None:
    images = digits("val", 3)
    images[1, 0, 4, 4] = torch.nan
    found = run(exports.onnx, input=images)
    assert np.isnan(found["score"]).tolist() == np.isnan(found["percentile"]).tolist() == [False, True, False]
    assert found["is_ood"][1]


def test_scores_and_what_is_at_the_threshold_are_the_same_in_every_bit(exports: Exports, tmp_path: Path) -> None:
    """A threshold is one of id/val's scores: in float32 it would flag an image that it shall keep."""
    detector, images = exports.detector, digits("val", 500)
    weights, threshold = detector.weights, detector.threshold
    try:
        detector.weights = np.array([0.3, 0.7])
        scores = detector(images).score.numpy()
        detector.threshold = float(next(score for score in np.sort(scores)[25:] if np.float32(score) > score))
        detector.to_onnx(tmp_path / "d.onnx", images[:64])
        wanted, found = detector(images), run(tmp_path / "d.onnx", input=images)
    finally:
        detector.weights, detector.threshold = weights, threshold
    same = np.abs(found["score"] - scores) <= 1e-5
    assert same.mean() >= 0.97
    assert (found["score"] == scores)[same].all()
    assert (found["is_ood"] == wanted.is_ood.numpy())[same].all()
    assert (scores == float(wanted.score[~wanted.is_ood].min()))[same].any()  # one is at the threshold


@pytest.mark.slow
def test_a_program_of_torch_export(exports: Exports, tmp_path: Path) -> None:
    counted = exports.detector
    check = counted.to_torch_export(tmp_path / "d.pt2")
    assert check.close >= 0.97
    loaded = torch.export.load(tmp_path / "d.pt2").module()
    for count in (1, 257):
        images = digits("letters", count)
        with torch.no_grad():
            found = dict(zip(("logits", "score", "percentile", "is_ood"), loaded(images), strict=True))
        assert_alike({name: tensor.numpy() for name, tensor in found.items()}, counted(images))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_term_with_a_backward_pass_is_refused(packaged: DigitsCNN, tmp_path: Path) -> None:
    layers = {**EVERY_KIND, "layer2": LayerParams(bins=20, saturation=5, alpha=0.5)}
    detector = Detector.fit(packaged, batches(digits("main_train", 200)), NacParams(layers=layers))
    with pytest.raises(DetectorError, match=r"term 'layer2' needs a backward pass.* extract with --no-gradient"):
        detector.to_onnx(tmp_path / "d.onnx", digits("val", 8))
    assert not list(tmp_path.iterdir())


def test_inputs_that_are_no_images_need_an_example(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(InputError, match="give a batch with example="):
        fit_rows(TwoInputs(), {"left": torch.randn(9, 4), "right": torch.randn(9, 2)}).to_onnx(tmp_path / "d.onnx")


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if float(hidden.detach()[0, 0]) > 1e9:
            hidden = -hidden
        return torch.as_tensor(self.fc(hidden))


def fit_rows(network: nn.Module, rows: Any, **options: Any) -> Detector:
    params = NacParams(
        layers={"first:activation": activation(20, 5, 0.5), "logits": LayerParams(bins=20, saturation=5, alpha=1.0)}
    )
    detector = Detector.fit(network, [rows], params, **options)
    detector.calibrate([rows])
    return detector


def test_a_network_that_looks_at_values_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = torch.randn(90, 6)
    with pytest.raises(DetectorError, match=r"torch.export cannot follow the network: .*; its forward must not look"):
        fit_rows(LooksAtValues(), rows).to_torch_export(tmp_path / "d.pt2", rows)
    assert not list(tmp_path.iterdir())


# --- other inputs, other numbers --------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"logits": self.fc(torch.relu(self.first(torch.cat([left, right], dim=1))))}


@pytest.mark.slow
def test_keyword_arguments_are_the_files_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = {"left": torch.randn(90, 4), "right": torch.randn(90, 2)}
    detector = fit_rows(TwoInputs(), rows)
    detector.to_onnx(tmp_path / "d.onnx", rows)
    few = {name: tensor[:7] for name, tensor in rows.items()}
    assert_alike(run(tmp_path / "d.onnx", **few), detector(few))


class FakeQuantised(nn.Module):
    """Weights and activations in steps of eight bits, as a network is deployed that was trained for them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(in_steps(x, 0.05)))
        return nn.functional.linear(in_steps(hidden, 0.05), in_steps(self.fc.weight, 0.01), self.fc.bias)


def in_steps(values: Tensor, step: float) -> Tensor:
    return torch.round(values / step).clamp(-128, 127) * step


@pytest.mark.slow
def test_a_quantised_network_is_counted_and_written_as_it_is_deployed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = torch.randn(90, 6)
    detector = fit_rows(FakeQuantised(), rows)
    detector.to_onnx(tmp_path / "d.onnx", rows)
    assert_alike(run(tmp_path / "d.onnx", input=rows[:9]), detector(rows[:9]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_network_is_counted_and_written_as_it_is_deployed(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, network = torch.randn(90, 6).to(dtype), nn.Sequential()
    network.first, network.relu, network.fc = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)  # type: ignore[assignment]
    detector = fit_rows(network.to(dtype), rows)
    detector.to_torch_export(tmp_path / "d.pt2", rows)
    with torch.no_grad():
        found = torch.export.load(tmp_path / "d.pt2").module()(rows[:9])
    names = ("logits", "score", "percentile", "is_ood")
    assert_alike(dict(zip(names, [t.numpy() for t in found], strict=True)), detector(rows[:9]))
    if dtype == torch.bfloat16:
        with pytest.raises(DetectorError, match="onnxruntime cannot run the network on this processor: "):
            detector.to_onnx(tmp_path / "d.onnx", rows)
        assert not (tmp_path / "d.onnx").exists()
        return
    detector.to_onnx(tmp_path / "d.onnx", rows)
    assert_alike(run(tmp_path / "d.onnx", input=rows[:9]), detector(rows[:9]))


@pytest.mark.filterwarnings("ignore")  # of torch's older quantisation, which is in use
def test_packed_quantised_modules_are_refused_in_words(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows, network = torch.randn(90, 6), nn.Sequential()
    network.first, network.relu, network.fc = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)  # type: ignore[assignment]
    packed = torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(
        DetectorError, match=r"it has torch\.ao's packed modules: quantise .* give torch\.export\.unflatten"
    ):
        fit_rows(packed, rows).to_torch_export(tmp_path / "d.pt2", rows)


@pytest.mark.slow
def test_a_program_of_torch_export_is_a_network_where_it_has_its_layers_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows, network = torch.randn(90, 6), nn.Sequential()
    network.first, network.relu, network.fc = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)  # type: ignore[assignment]
    free = {"input": {0: torch.export.Dim("batch")}}
    program = torch.export.export(network.eval(), (rows,), dynamic_shapes=free)
    with pytest.raises(InputError, match=r"a program of torch\.export as torch\.export\.unflatten\(program\)$"):
        fit_rows(program.module(), rows)
    detector = fit_rows(torch.export.unflatten(program), rows)
    detector.to_onnx(tmp_path / "d.onnx", rows)
    assert_alike(run(tmp_path / "d.onnx", input=rows[:9]), detector(rows[:9]))
    np.testing.assert_allclose(detector(rows).score, fit_rows(network, rows)(rows).score, atol=1e-6)


@pytest.mark.slow
def test_every_kind_of_term(packaged: DigitsCNN, tmp_path: Path) -> None:
    detector = Detector.fit(packaged, batches(digits("main_train", 600)), NacParams(layers=EVERY_KIND))
    detector.calibrate(batches(digits("val", 300)))
    detector.to_onnx(tmp_path / "d.onnx", digits("val", 64))
    images = digits("letters", 257)
    assert_alike(run(tmp_path / "d.onnx", input=images), detector(images))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["NCI", "fDBD", "ViM"])
def test_feature_scores(packaged: DigitsCNN, tmp_path: Path, method: Any) -> None:
    params = NacParams(
        layers={"avgpool:activation": activation(20, 5, 0.5)},
        fused=FusedScore(method=method, mean=1.0, deviation=0.7, weight=0.4),
    )
    detector = Detector.fit(packaged, batches(digits("main_train", 300)), params)
    detector.calibrate(batches(digits("val", 100)))
    detector.to_onnx(tmp_path / "d.onnx", digits("val", 64))
    images = digits("letters", 100)
    assert_alike(run(tmp_path / "d.onnx", input=images), detector(images))


@pytest.mark.slow
def test_gradients_in_closed_form_need_no_backward_pass(packaged: DigitsCNN, tmp_path: Path) -> None:
    """Where the only layer is the classifier's input."""
    params = NacParams(layers={"avgpool": LayerParams(bins=50, saturation=5, alpha=5.0)})
    detector = Detector.fit(packaged, batches(digits("main_train", 300)), params)
    detector.calibrate(batches(digits("val", 100)))
    assert detector._direct == {"avgpool"}
    detector.to_onnx(tmp_path / "d.onnx", digits("val", 64))
    images = digits("letters", 100)
    assert_alike(run(tmp_path / "d.onnx", input=images), detector(images))


@pytest.mark.slow
def test_resnet20(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = find_model("resnet20").build(10)
    layers = {name: activation(50, 10, 0.05) for name in ("avgpool:activation", "layer3:activation:by_class")}
    detector = Detector.fit(network, [torch.randn(200, 3, 32, 32)], NacParams(layers=layers))
    detector.calibrate([torch.randn(64, 3, 32, 32)])
    detector.to_onnx(tmp_path / "d.onnx", torch.randn(64, 3, 32, 32))
    for count in (1, 257):
        images = torch.randn(count, 3, 32, 32)
        assert_alike(run(tmp_path / "d.onnx", input=images), detector(images))


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 1000])
def test_bisection_is_searchsorted(size: int) -> None:
    rng = np.random.default_rng(size)
    ascending = np.sort(rng.integers(0, size, size)).astype(np.float32)
    values = torch.from_numpy(np.concatenate([ascending, rng.normal(size / 2, size, 50)]).astype(np.float32))
    for or_equal, side in ((True, "right"), (False, "left")):
        found = _Bisection(ascending)(values, or_equal=or_equal)
        np.testing.assert_array_equal(found, np.searchsorted(ascending, values.numpy(), side=side))  # type: ignore[call-overload]


@pytest.mark.parametrize("bits", [1, 7, 10, 22])
def test_rounding_is_that_of_the_bits(bits: int) -> None:
    rng = np.random.default_rng(bits)
    numbers = rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)  # of all exponents
    ties = ((2.0 + np.arange(64) / 2**bits / 2) * 2.0**3).astype(np.float32)
    edges = np.array([0, -0.0, 1, 2, 0.5, 2.0**-126, 2.0**127, np.nextafter(np.float32(2), np.float32(0))], np.float32)
    values = torch.from_numpy(np.concatenate([numbers[np.isfinite(numbers)], ties, edges]))
    values = values[(values == 0) | (values.abs() >= 2.0**-126)]  # below, the bits' rounding has a spacing of its own
    values = values[round_bits(values, bits).isfinite()]
    np.testing.assert_array_equal(_Rounding(bits)(values).numpy(), round_bits(values, bits).numpy())


# --- the command ------------------------------------------------------------------------------------------------------


def test_export_says_how_far_it_is_from_torch_and_the_pages_program_runs_the_file(
    exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = json.loads(exports.printed.stdout)
    assert said["format"] == "onnx"
    assert said["compared"]["samples"] == 64
    assert said["compared"]["close"] >= 0.97
    assert "compared with torch on 64 random images" in exports.printed.stderr
    page = (Path(__file__).resolve().parents[2] / "docs/detector.md").read_text("utf-8")
    program = page.split("## Other runtimes")[1].split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"images": digits("val", 5).numpy()}
    monkeypatch.chdir(exports.onnx.parent)
    exec(program, names)
    assert names["logits"].shape == (5, 10)
    np.testing.assert_array_equal(names["is_ood"], names["score"] < said["threshold"])


def test_export_refuses_a_network_without_onnx(digits_cache: Path) -> None:
    done = CliRunner().invoke(main, ["export", str(digits_cache), "--model", "resnet20"], prog_name="nacpipe")
    assert done.exit_code == 2
    assert "--model and --checkpoint belong to --format onnx and torch-export" in done.stderr
