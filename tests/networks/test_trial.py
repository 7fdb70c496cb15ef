"""What a trial batch shows of a network: its classifier by values, what its outputs are, and whether it is random."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from nacpipe.cache import open_cache
from nacpipe.detector.fit import fit_detector
from nacpipe.detector.module import Detector
from nacpipe.errors import IdentityError, InputError
from nacpipe.evaluation.baselines import NO_CLASSIFIER, score_baselines
from nacpipe.extraction.callback import Snapshots
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.plain_scores import gen
from nacpipe.networks.taps import Taps, freeze
from nacpipe.networks.trial import TrialBatch, run_trial_batch
from tests.networks.test_taps import by_definition, spec

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """A convolution, a pool, and a classifier of whatever kind."""

    def __init__(self, head: nn.Module | None = None, after: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.conv, self.pool = nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1)
        self.fc = head or nn.Linear(6, 4)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.fc(torch.flatten(self.pool(F.relu(self.conv(x))), 1)))


class Cosine(nn.Linear):
    """A linear layer by type, and none by what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return 9 * F.linear(F.normalize(x), F.normalize(self.weight))


class Scaled(nn.Linear):
    """As the last: a temperature inside."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0.5


def weight_norm_by_hook() -> nn.Module:
    with pytest.warns(FutureWarning):
        norm: nn.Module = torch.nn.utils.weight_norm(nn.Linear(6, 4))  # type: ignore[no-untyped-call]
    norm.weight_g.data *= 3  # so that the direction alone is not the weight
    return norm


def try_out(network: nn.Module, **more: Any) -> TrialBatch:
    return run_trial_batch("net", freeze(network), IMAGES, **more)


# --- the classifier ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        nn.Linear(6, 4),
        nn.Linear(6, 4, bias=False),
        parametrizations.weight_norm(nn.Linear(6, 4)),
        parametrizations.spectral_norm(nn.Linear(6, 4)),
        nn.Sequential(nn.Identity(), nn.Linear(6, 4), nn.Dropout()),
    ],
    ids=["plain", "no bias", "weight norm", "spectral norm", "dropout after it"],
)
def test_a_layer_that_gives_the_logits_is_the_classifier(head: nn.Module) -> None:
    trial = try_out(Net(head))
    assert (trial.classes, trial.outputs, trial.no_classifier) == (4, "logits", "")
    assert trial.classifier == ("fc.1" if isinstance(head, nn.Sequential) else "fc")


def test_weight_norm_of_the_older_kind_counts_too() -> None:
    network = Net(weight_norm_by_hook())
    assert try_out(network).classifier == "fc"
    with Taps(network, [spec("pool")], "fc", penultimate={"pool"}) as taps:
        closed = taps(torch.ones(2, 3, 8, 8)).gradient["pool"]
    with Taps(network, [spec("pool")], "fc") as taps:
        torch.testing.assert_close(closed, taps(torch.ones(2, 3, 8, 8)).gradient["pool"])


@pytest.mark.parametrize(
    ("network", "layer"),
    [
        (Net(Cosine(6, 4)), "fc"),
        (Net(Scaled(6, 4)), "fc"),
        (Net(after=lambda x: x / 2.5), "fc"),
        (Net(after=lambda x: x + torch.arange(4.0)), "fc"),
        (Net(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU())), "fc.2"),
    ],
    ids=["cosine", "subclass", "temperature", "logit adjustment", "relu"],
)
def test_a_layer_that_does_not_give_the_logits_is_none_and_says_by_how_much(network: nn.Module, layer: str) -> None:
    trial = try_out(network)
    assert trial.classifier is None
    linear = network.get_submodule(layer)
    assert isinstance(linear, nn.Linear)
    inputs: list[Tensor] = []
    linear.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    generator = torch.Generator().manual_seed(0)
    logits = network(torch.randn(6, 3, 8, 8, generator=generator)[:4])
    bias = 0 if linear.bias is None else linear.bias
    difference = float((inputs[0] @ linear.weight.T + bias - logits).abs().max())
    assert difference > 0.1
    assert trial.no_classifier == (
        f"its last linear layer `{layer}` does not give the logits: W·f + b differs by {difference:.2g}"
    )


@pytest.mark.parametrize("head", [nn.LSTM(6, 4), nn.Conv1d(6, 4, 1)])
def test_a_network_without_a_linear_layer_says_so(head: nn.Module) -> None:
    def after(x: Any) -> Tensor:
        return x[0] if isinstance(x, tuple) else x

    if isinstance(head, nn.Conv1d):
        head = nn.Sequential(nn.Unflatten(1, (6, 1)), head, nn.Flatten())
    trial = try_out(Net(head, after))
    assert trial.classifier is None
    assert trial.no_classifier == "no linear layer in its forward pass has an input (n, d) and 4 outputs"


def test_a_layer_that_sees_several_rows_of_an_image_is_none() -> None:
    """As where crops or patches are classified and their logits averaged."""

    class Patches(Net):
        def forward(self, x: Tensor) -> Tensor:
            patches = F.relu(self.conv(x)).flatten(2).transpose(1, 2)  # (n, places, 6)
            logits: Tensor = self.fc(patches.reshape(-1, 6)).reshape(len(x), -1, 4).mean(dim=1)
            return logits

    trial = try_out(Patches())
    assert (trial.classifier, trial.no_classifier[:27]) == (None, "no linear layer in its forw")


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_other_types_have_their_own_rounding(kind: torch.dtype) -> None:
    assert run_trial_batch("net", freeze(Net().to(kind)), IMAGES.to(kind)).classifier == "fc"
    off = Net(after=lambda x: x * 1.1)
    assert run_trial_batch("net", freeze(off.to(kind)), IMAGES.to(kind)).classifier is None


def test_a_bias_that_is_large_beside_the_spread_is_only_rounding() -> None:
    network = Net()
    with torch.no_grad():
        network.fc.bias += 3000  # type: ignore[operator]
    assert try_out(network).classifier == "fc"


def test_keyword_inputs_reach_the_classifier() -> None:
    """`self.fc(input=x)`, and a subclass with a name of its own for it."""

    class Named(nn.Linear):
        def forward(self, features: Tensor) -> Tensor:
            return super().forward(features)

    class Net1(Net):
        word = "input"

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(**{self.word: torch.flatten(self.pool(F.relu(self.conv(x))), 1)})

    class Net2(Net1):
        word = "features"

    for network in (Net1(), Net2(Named(6, 4))):
        assert try_out(network).classifier == "fc"
        images = torch.randn(3, 3, 8, 8)
        with Taps(network, [spec("conv")], "fc") as taps:
            tapped = taps(images)
        assert tapped.features is not None
        torch.testing.assert_close(tapped.features, torch.flatten(network.pool(F.relu(network.conv(images))), 1))


def test_features_are_those_before_what_follows_changes_them() -> None:
    class Changing(Net):
        def forward(self, x: Tensor) -> Tensor:
            features = torch.flatten(self.pool(F.relu(self.conv(x))), 1)
            logits: Tensor = self.fc(features)
            features += 5
            return logits

    network = Changing()
    assert try_out(network).classifier == "fc"
    with Taps(network, [], "fc") as taps:
        tapped = taps(torch.randn(3, 3, 8, 8))
    assert tapped.features is not None
    torch.testing.assert_close(network.fc(tapped.features), tapped.logits)


FILE = """
import torch, torch.nn.functional as F
from torch import nn

class Cosine(nn.Linear):
    def forward(self, x):
        return 9 * F.linear(F.normalize(x), F.normalize(self.weight))

class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(7)
        self.kind = kind
        self.conv, self.pool = nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1)
        self.fc = Cosine(6, 10) if kind == "cosine" else nn.Linear(6, 10)

    def forward(self, x):
        x = torch.flatten(self.pool(F.relu(self.conv(x))), 1)
        if self.kind == "dropout":
            x = F.dropout(x)
        x = self.fc(x)
        return {"softmax": F.softmax, "log_softmax": F.log_softmax}.get(self.kind, lambda x, dim: x)(4 * x, dim=1)

def cosine(): return Net("cosine")
def temperature(): return Net("temperature")
def softmax(): return Net("softmax")
def log_softmax(): return Net("log_softmax")
def dropout(): return Net("dropout")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(FILE)
    return tmp_path / "net.py"


def custom(request: ExtractRequest, file: Path, function: str) -> ExtractRequest:
    return replace(
        request,
        model=f"{file}:{function}",
        checkpoint=None,
        layers=("conv", "pool"),
        cache=request.cache.with_name(f"{function}.zarr"),
        splits=("id/train", "id/val", "ood/val"),
    )


@pytest.mark.parametrize("function", ["cosine", "temperature"])
def test_a_cache_without_a_classifier_says_why_and_so_do_baselines(
    request_: ExtractRequest, file: Path, function: str
) -> None:
    plan = plan_extraction(custom(request_, file, function))
    why = plan.header.information["no_classifier"]
    assert why.startswith("its last linear layer `fc` does not give the logits: W·f + b differs by ")
    assert f"no classifier and features are written: {why}" in plan.notes
    extract(plan)
    cache = open_cache(plan.request.cache)
    assert (cache.header.features, cache.classifier()) == (0, None)
    assert "features" not in cache.header.arrays()
    found = score_baselines(cache, ["ReAct", "SCALE@65", "ASH-S@65", "DICE", "ViM", "Entropy"], ["id/val"])
    for name in ("ReAct", "SCALE@65", "ASH-S@65", "DICE", "ViM"):
        assert found[name].reasons == {"id/val": f"{NO_CLASSIFIER}: {why}"}
    assert found["Entropy"].scores["id/val"].shape == (40,)


def test_a_cache_of_a_classifier_by_place_is_not_gone_on_with(request_: ExtractRequest, file: Path) -> None:
    """As an earlier nacpipe wrote it: features in the header, which the network does not have."""
    from nacpipe.cache import CacheWriter

    plan = plan_extraction(custom(request_, file, "cosine"))
    CacheWriter(plan.request.cache, replace(plan.header, features=6))
    with pytest.raises(
        IdentityError, match=r"cosine\.zarr was made with 6 features, now there are 0 \(its last linear"
    ):
        plan_extraction(plan.request)


# --- outputs that are no logits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "outputs"),
    [
        (lambda x: x, "logits"),
        (lambda x: x - x.mean(dim=1, keepdim=True), "logits"),
        (lambda x: x.softmax(dim=1), "probabilities"),
        (lambda x: F.one_hot(x.argmax(dim=1), 4).float(), "probabilities"),
        (lambda x: x.log_softmax(dim=1), "log-probabilities"),
        (lambda x: (x.softmax(dim=1) + 1e-9).log(), "log-probabilities"),
        (lambda x: x.sigmoid(), "logits"),  # rows do not sum to 1: nothing tells them from logits
    ],
)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_outputs_are_named(after: Callable[[Tensor], Tensor], outputs: str, kind: torch.dtype) -> None:
    trial = run_trial_batch("net", freeze(Net(after=lambda x: after(x).to(kind)).to(kind)), IMAGES.to(kind))
    assert trial.outputs == outputs
    if outputs != "logits":
        assert trial.no_classifier == f"its outputs are {outputs}, not what a linear layer gives"


@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
def test_probabilities_are_said_and_their_gradient_is_the_definitions(
    request_: ExtractRequest, file: Path, function: str
) -> None:
    """The loss is that of the probabilities themselves, so both networks have the states of the logits before them."""
    outputs = {"softmax": "probabilities", "log_softmax": "log-probabilities"}[function]
    plan = plan_extraction(custom(request_, file, function))
    assert plan.header.identity["outputs"] == outputs
    note = f"net.py:{function} gives {outputs}, not logits: what needs logits (Energy, MaxLogit, …) is left empty"
    assert note in plan.notes
    assert plan_extraction(plan.request, dry=True).header.identity["outputs"] == outputs
    network = plan.network.module
    network.kind = "temperature"  # 4 x, the logits
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    expected = by_definition(network, [spec("conv"), spec("pool")], images)
    network.kind = function
    with plan.taps() as taps:
        tapped = taps(images)
    for layer, (activation, gradient) in expected.items():
        torch.testing.assert_close(tapped.activation[layer], activation, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tapped.gradient[layer], gradient, rtol=1e-3, atol=1e-6)
    extract(plan)
    logits = open_cache(plan.request.cache)["id/val"].logits[:]
    rows = np.exp(logits) if function == "log_softmax" else logits
    np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=1e-5)
    found = score_baselines(open_cache(plan.request.cache), ["GEN", "ViM"], ["id/val"])
    assert found["ViM"].reasons["id/val"] == f"what this network gives are {outputs}, not logits"
    np.testing.assert_allclose(found["GEN"].scores["id/val"], gen(np.log(rows)), rtol=1e-6)  # of probabilities alone


def test_a_probability_of_zero_has_a_finite_gradient() -> None:
    network = freeze(Net(after=lambda x: (1e4 * x).softmax(dim=1)))
    with Taps(network, [spec("conv")], None, outputs="probabilities") as taps:
        tapped = taps(torch.randn(8, 3, 8, 8))
    assert (tapped.logits == 0).any()
    assert tapped.gradient["conv"].isfinite().all()


# --- random, or of the batch ------------------------------------------------------------------------------------------


class Forgetful(Net):
    """Its dropout is a module that forward puts in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        self.drop.train()
        return self.drop(super().forward(x))


class Batchwise(Net):
    """Its batch norm is a module that forward puts in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.train()
        return super().forward(self.norm(x))


class Third(Net):
    """Every third time it gives something else."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x).roll(int(self.calls % 3 == 0), dims=1)


@pytest.mark.parametrize(
    ("network", "after"),
    [
        (Net(after=F.dropout), ""),
        (Forgetful(), r" \(after a forward pass: drop\)"),
        (Net(after=lambda x: x + torch.rand(x.shape)), ""),
        (Net(after=lambda x: x + float(np.random.rand())), ""),
        (Net(after=lambda x: x * random.random()), ""),
        (Third(), ""),
    ],
    ids=["functional dropout", "train in forward", "torch", "numpy", "python", "every third time"],
)
def test_a_random_network_is_refused(network: nn.Module, after: str) -> None:
    message = (
        rf"^model 'net' is random in evaluation mode: the same images give logits that differ by [\d.e-]+; look in its"
        rf" forward for F\.dropout without training=self\.training, modules in training mode{after}, random crops or"
        r" noise$"
    )
    with pytest.raises(InputError, match=message):
        try_out(network)


@pytest.mark.parametrize(
    "network",
    [
        Batchwise(),
        Net(after=lambda x: F.batch_norm(x, None, None, training=True)),
        Net(after=lambda x: x - x.mean(dim=0)),
    ],
    ids=["train in forward", "functional", "mean of the batch"],
)
def test_a_network_whose_logits_are_of_the_batch_is_refused(network: nn.Module) -> None:
    message = r"^model 'net' gives an image other logits in another batch: they differ by [\d.e-]+; look in its"
    with pytest.raises(InputError, match=message):
        try_out(network)


class Slightly(Net):
    """A batch norm without running statistics, which takes the batch's in evaluation mode too, changes little."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.01 * self.norm(x))


def test_a_batch_norm_without_running_statistics_is_refused_however_little_it_changes() -> None:
    message = r"they differ by .* or with track_running_stats=False \(norm\), F\.batch_norm"
    with pytest.raises(InputError, match=message):
        try_out(Slightly(nn.BatchNorm2d(3, track_running_stats=False)))
    assert try_out(Slightly(nn.BatchNorm2d(3))).classifier == "fc"


def test_classes_and_sigmoids_are_told_from_logits() -> None:
    with pytest.raises(
        InputError, match=r"\(4,\) of torch\.int64 .*; these are classes: let it give the numbers before"
    ):
        try_out(Net(after=lambda x: x.argmax(1)))
    assert try_out(Net(after=torch.sigmoid)).bounded
    assert not try_out(Net()).bounded


def test_random_generators_are_left_as_they_were() -> None:
    def after(x: Tensor) -> Tensor:
        return x + 0 * (torch.rand(()) + float(np.random.rand()) + random.random())

    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(3)
    expected = (float(torch.rand(())), float(np.random.rand()), random.random())
    for network in (Net(after=after), Net(after=F.dropout)):
        for generator in (torch.manual_seed, np.random.seed, random.seed):
            generator(3)
        try:
            try_out(network)
        except InputError:
            assert network.after is F.dropout
        assert (float(torch.rand(())), float(np.random.rand()), random.random()) == expected


def test_who_takes_a_random_network_in_hand_refuses_it(request_: ExtractRequest, file: Path, tmp_path: Path) -> None:
    random_network = Net(after=F.dropout)
    images = torch.randn(4, 3, 8, 8)
    params = NacParams(layers={"conv": LayerParams(bins=9, saturation=3, alpha=2.0)})
    message = "'Net' is random in evaluation mode"
    with pytest.raises(InputError, match=r"model 'net\.py:dropout' is random in evaluation mode"):
        plan_extraction(custom(request_, file, "dropout"))
    with pytest.raises(InputError, match=message):
        fit_detector(random_network, params, [images], {})
    with pytest.raises(InputError, match=message):
        Snapshots(tmp_path, {"id/train": [(images, torch.zeros(4))]}, ["conv"])(random_network, 0)
    with pytest.raises(InputError, match=message):
        Detector(random_network, [], {}, images[:2])


@pytest.mark.parametrize(("head", "outputs"), [(Cosine(6, 4), "logits"), (None, "probabilities")])
def test_snapshots_and_fit_find_the_classifier_by_values(tmp_path: Path, head: nn.Module | None, outputs: str) -> None:
    network = Net(head, *([lambda x: x.softmax(dim=1)] if outputs == "probabilities" else []))
    images = torch.randn(20, 3, 8, 8)
    path = Snapshots(tmp_path, {"id/train": [(images, torch.zeros(20))]}, ["conv"])(network, 0)
    cache = open_cache(path)
    assert (cache.header.features, cache.classifier()) == (0, None)
    assert cache.header.identity.get("outputs", "logits") == outputs
    assert cache.header.information["no_classifier"].startswith("its last" if head else "its outputs are probabilities")
    params = NacParams(layers={"conv": LayerParams(bins=9, saturation=3, alpha=2.0, source="gradient")})
    detector = fit_detector(network, params, [images], {})
    assert (detector.classifier, detector._outputs) == (None, outputs)
    counts = np.diff(
        np.searchsorted(np.sort(cache["id/train"]["conv"].gradient[:][:, 0]), detector._lookups[0].fitted.borders)
    )
    np.testing.assert_array_equal(counts, detector._lookups[0].fitted.counts[0])
