"""Networks of training schemes: the keys of OpenOOD's checkpoints, what runs, and what needs logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nacpipe.benchmarks.standard import find_benchmark
from nacpipe.cache import open_cache
from nacpipe.errors import CheckpointError
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest
from nacpipe.networks.architectures.resnets import ResNet18For32
from nacpipe.networks.architectures.training_schemes import WRAPPERS
from nacpipe.networks.build import blank_network, classifier_weights, load_network
from nacpipe.networks.layers import measure_layers
from nacpipe.networks.models import find_model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CIFAR10 = find_benchmark("cifar10")

# What OpenOOD v1.5 saves beside the backbone, for 10 classes on 512 features: key → shape.
KEYS: dict[str, dict[str, tuple[int, ...]]] = {
    "cider": {
        "head.0.weight": (512, 512),
        "head.0.bias": (512,),
        "head.2.weight": (128, 512),
        "head.2.bias": (128,),
    },
    "npos": {
        "prototypes": (10, 128),
        "mlp.0.weight": (128, 512),
        "mlp.0.bias": (128,),
        "mlp.2.weight": (1, 128),
        "mlp.2.bias": (1,),
        "head.0.weight": (512, 512),
        "head.0.bias": (512,),
        "head.2.weight": (128, 512),
        "head.2.bias": (128,),
    },
    "rotpred": {"fc.weight": (10, 512), "fc.bias": (10,), "rot_fc.weight": (4, 512), "rot_fc.bias": (4,)},
    "godin": {
        "h.h.weight": (10, 512),
        "g.0.weight": (1, 512),
        "g.0.bias": (1,),
        "g.1.weight": (1,),
        "g.1.bias": (1,),
        "g.1.running_mean": (1,),
        "g.1.running_var": (1,),
        "g.1.num_batches_tracked": (),
    },
    "confbranch": {"fc.weight": (10, 512), "fc.bias": (10,), "confidence.weight": (1, 512), "confidence.bias": (1,)},
    "csi": {
        "linear.weight": (10, 512),
        "linear.bias": (10,),
        "simclr_layer.0.weight": (512, 512),
        "simclr_layer.0.bias": (512,),
        "simclr_layer.2.weight": (128, 512),
        "simclr_layer.2.bias": (128,),
        "joint_distribution_layer.weight": (40, 512),
        "joint_distribution_layer.bias": (40,),
        "shift_cls_layer.weight": (4, 512),
        "shift_cls_layer.bias": (4,),
    },
    "udg": {"fc.weight": (10, 512), "fc.bias": (10,), "fc_aux.weight": (1000, 512), "fc_aux.bias": (1000,)},
}


def draw_state(scheme: str) -> dict[str, Tensor]:
    """A checkpoint of random numbers, made from the keys alone."""
    backbone = {f"backbone.{k}": v for k, v in ResNet18For32(10).state_dict().items() if not k.startswith("fc.")}
    generator = torch.Generator().manual_seed(3)
    own = {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in KEYS[scheme].items()}
    own = {key: value.abs() + 0.5 if key.endswith("running_var") else value for key, value in own.items()}
    return {**backbone, **own}


@pytest.mark.repeats(1)
@pytest.mark.parametrize("scheme", WRAPPERS)
def test_openoods_checkpoints_load(tmp_path: Path, scheme: str) -> None:
    state = draw_state(scheme)
    torch.save(state, tmp_path / "best.ckpt")
    network = load_network(find_model(f"resnet18_32x32+{scheme}"), CIFAR10, tmp_path / "best.ckpt", CPU)
    ours = network.module.state_dict()
    assert set(ours) == set(state)
    assert {key: tuple(ours[key].shape) for key in KEYS[scheme]} == KEYS[scheme]
    assert all(torch.equal(ours[key], value.to(ours[key].dtype)) for key, value in state.items())
    torch.save({**state, "backbone.fc.weight": torch.zeros(10, 512)}, tmp_path / "more.ckpt")
    with pytest.raises(CheckpointError, match=r"it has left over backbone\.fc\.weight$"):
        load_network(find_model(f"resnet18_32x32+{scheme}"), CIFAR10, tmp_path / "more.ckpt", CPU)


def test_every_scheme_has_its_keys_here() -> None:
    assert set(KEYS) == set(WRAPPERS)


@pytest.mark.repeats(1)
@pytest.mark.parametrize("scheme", WRAPPERS)
def test_outputs_written_out(tmp_path: Path, scheme: str) -> None:
    """From the features and the checkpoint's numbers alone."""
    state = draw_state(scheme)
    torch.save(state, tmp_path / "best.ckpt")
    network = load_network(find_model(f"resnet18_32x32+{scheme}"), CIFAR10, tmp_path / "best.ckpt", CPU)
    plain = ResNet18For32(10).eval()
    plain.fc = nn.Identity()  # type: ignore[assignment]
    plain.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")})
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        found, x = network.module(images), plain(images)
    if scheme in ("cider", "npos"):
        hidden = (x @ state["head.0.weight"].T + state["head.0.bias"]).clamp(min=0)
        expected = hidden @ state["head.2.weight"].T + state["head.2.bias"]
        expected = expected / (expected**2).sum(dim=1, keepdim=True).sqrt()
        torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    elif scheme == "godin":
        cosine = (x / (x.norm(dim=1, keepdim=True) + 1e-4)) @ (
            state["h.h.weight"] / (state["h.h.weight"].norm(dim=1, keepdim=True) + 1e-4)
        ).T
        g = x @ state["g.0.weight"].T + state["g.0.bias"]
        g = (g - state["g.1.running_mean"]) / (state["g.1.running_var"] + 1e-5).sqrt()
        expected = cosine / (g * state["g.1.weight"] + state["g.1.bias"]).sigmoid()
    else:
        name = "linear" if scheme == "csi" else "fc"
        expected = x @ state[f"{name}.weight"].T + state[f"{name}.bias"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", WRAPPERS)
def test_rows_of_wrapped_networks(scheme: str) -> None:
    model = find_model(f"resnet18_32x32+{scheme}")
    network = blank_network(model, CIFAR10, None)
    layers, outputs, features, _ = measure_layers(network, ())
    assert [(s.name, s.path, s.neurons) for s in layers] == [
        ("avgpool", "backbone.avgpool", 512),
        ("layer3", "backbone.layer3", 256),
        ("layer2", "backbone.layer2", 128),
        ("layer1", "backbone.layer1", 64),
    ]
    embeds = scheme in ("cider", "npos")
    assert (model.outputs, outputs) == (("features", 128) if embeds else ("logits", 10))
    assert features == (0 if embeds or scheme == "godin" else 512)
    assert ("fc" in model.layers) == (features > 0)
    if features == 0:
        assert classifier_weights(network) is None
    else:
        assert model.classifier == ("linear" if scheme == "csi" else "fc")


@pytest.mark.repeats(1)
@pytest.mark.parametrize("scheme", ["cider", "godin"])
def test_cache_of_a_network_without_a_classifier(request_: ExtractRequest, tmp_path: Path, scheme: str) -> None:
    torch.save(draw_state(scheme), tmp_path / "best.ckpt")
    request = replace(
        request_,
        model=f"resnet18_32x32+{scheme}",
        checkpoint=tmp_path / "best.ckpt",
        splits=("ood/far/mnist",),
    )
    extract(plan_extraction(request))
    cache = open_cache(request.cache)
    assert (cache.header.classes, cache.header.features) == ((128, 0) if scheme == "cider" else (10, 0))
    assert cache.classifier() is None
    logits = np.asarray(cache["ood/far/mnist"].logits[:])
    if scheme == "cider":
        np.testing.assert_allclose(np.linalg.norm(logits, axis=1), 1, rtol=1e-5)
