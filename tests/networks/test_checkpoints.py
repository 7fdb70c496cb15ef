"""Checkpoints as training scripts save them: the one state dict that fits is found, its prefix taken away."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from nacpipe.benchmarks.standard import find_benchmark
from nacpipe.cli import main
from nacpipe.errors import CheckpointError
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest
from nacpipe.networks.build import Network, blank_network, load_network
from nacpipe.networks.checkpoints import hash_weights, read_stated_accuracy
from nacpipe.networks.models import find_model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CIFAR10 = find_benchmark("cifar10")
State = dict[str, Tensor]


def new_state(seed: int = 0) -> State:
    torch.manual_seed(seed)
    return find_model("resnet20").build(10).state_dict()


STATE = new_state()
OTHER = {key: value + 1 for key, value in STATE.items()}


def optimizer() -> dict[str, Any]:
    weight = torch.zeros(3, requires_grad=True)
    adam = torch.optim.Adam([weight])
    weight.sum().backward()  # type: ignore[no-untyped-call]
    adam.step()
    return adam.state_dict()


def under(prefix: str, state: State = STATE) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def load(content: object, folder: Path) -> Network:
    torch.save(content, folder / "x.pth")
    return load_network(find_model("resnet20"), CIFAR10, folder / "x.pth", CPU)


FORMS: dict[str, Callable[[], object]] = {
    "model": lambda: {"model": STATE},
    "net": lambda: {"net": STATE, "acc": 93.1, "epoch": 7},
    "model_state_dict": lambda: {
        "epoch": 3,
        "model_state_dict": STATE,
        "optimizer_state_dict": optimizer(),
        "loss": 0.1,
    },
    "model.state_dict": lambda: {"model": {"state_dict": STATE, "arch": "resnet20"}, "scheduler": {"last_epoch": 4}},
    "args": lambda: {"model": STATE, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "n": np.int64(3)},
    "a tensor beside it": lambda: {"state_dict": STATE, "best_acc1": torch.tensor(77.5), "optimizer": optimizer()},
    "metrics beside it": lambda: {"model": STATE, "metrics": {"loss": torch.tensor(0.5)}},
    "twice": lambda: {"model": STATE, "state_dict": STATE},
    "compiled": lambda: under("_orig_mod."),
    "parallel": lambda: under("module."),
    "both": lambda: {"model": under("module._orig_mod.")},
    "lightning": lambda: {"state_dict": under("model."), "pytorch-lightning_version": "2.0", "hyper_parameters": {}},
    "deep": lambda: under("net.backbone."),
    "another name": lambda: under("student_network."),
    "repeated": lambda: under("model.model.model."),
    "inside": lambda: {k.replace("layer1.", "layer1.module."): v for k, v in STATE.items()},  # VGG's, of the examples
    "renamed too": lambda: under("module.", {k.replace("fc.", "linear."): v for k, v in STATE.items()}),
    "without counters": lambda: under("model.", {k: v for k, v in STATE.items() if "num_batches" not in k}),
}


@pytest.mark.repeats(6)
@pytest.mark.parametrize("form", FORMS)
def test_the_state_dict_is_found_whatever_is_around_it(tmp_path: Path, form: str) -> None:
    network = load(FORMS[form](), tmp_path)
    assert network.weights_sha256 == hash_weights(STATE)
    chosen = [note for note in network.notes if "checkpoint" in note]
    expected = {
        "metrics beside it": "holds model, metrics: model is loaded",
        "twice": "holds model, state_dict: model is loaded",
    }
    assert [note.partition("x.pth ")[2] for note in chosen] == ([expected[form]] if form in expected else [])


def test_safetensors_with_a_prefix_too(tmp_path: Path) -> None:
    save_file(under("model."), tmp_path / "x.safetensors")
    network = load_network(find_model("resnet20"), CIFAR10, tmp_path / "x.safetensors", CPU)
    assert network.weights_sha256 == hash_weights(STATE)


@pytest.mark.parametrize("average", ["model_ema", "ema", "ema_state_dict", "modelEMA", "swa.model"])
def test_the_model_goes_before_its_moving_average_and_it_is_said(tmp_path: Path, average: str) -> None:
    outer, _, inner = average.partition(".")
    held = {inner: OTHER} if inner else OTHER
    network = load({outer: held, "model": STATE, "epoch": 1}, tmp_path)
    assert network.weights_sha256 == hash_weights(STATE)
    assert network.notes == (f"checkpoint {tmp_path / 'x.pth'} holds {average}, model: model is loaded",)
    alone = load({outer: held, "epoch": 1}, tmp_path)
    assert alone.weights_sha256 == hash_weights(OTHER)


def test_the_one_that_fits_is_taken(tmp_path: Path) -> None:
    """A detector's backbone and its head, a generator and a discriminator: one of them is this network."""
    network = load({"generator": {"a": torch.zeros(3)}, "classifier": under("net.")}, tmp_path)
    assert network.weights_sha256 == hash_weights(STATE)
    assert network.notes[0].endswith("holds generator, classifier: classifier is loaded")
    network = load({"model": {"a": torch.zeros(3)}, "ema": STATE}, tmp_path)
    assert network.notes[0].endswith("holds model, ema: ema is loaded")


def test_two_that_fit_are_refused_by_name(tmp_path: Path) -> None:
    message = (
        r"x\.pth holds student and teacher, which both fit the network; save the one that is meant in a file of its"
        r" own, such as torch\.save\(checkpoint\['teacher'\], FILE\)$"
    )
    with pytest.raises(CheckpointError, match=message):
        load({"student": STATE, "teacher": OTHER}, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"model": {k: v for k, v in STATE.items() if k != "fc.bias"}},
            r"x\.pth does not fit the network: it lacks fc\.bias$",
        ),
        (
            under("model.") | {"head.weight": torch.zeros(3)},
            r"does not fit the network: it lacks conv1\.weight, .* and \d+ more; it has left over model\.conv1\.",
        ),
        (
            {"state_dict": under("model.", {**STATE, "fc.bias": torch.zeros(7)})},
            r"does not fit the network: of another shape fc\.bias \(7 for 10\)$",
        ),
        (
            {"state_dict": under("model.", {**STATE, "conv9.weight": torch.zeros(7)})},
            r"does not fit the network: it has left over conv9\.weight$",
        ),
        (
            {"ema": {"a": torch.zeros(3)}, "model": {k: v for k, v in STATE.items() if k != "fc.bias"}},
            r"does not fit the network: it lacks fc\.bias; it holds ema, model, of which model comes nearest$",
        ),
    ],
)
def test_where_nothing_fits_the_keys_are_named(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(content, tmp_path)


def test_what_optimizers_keep_is_no_state_dict(tmp_path: Path) -> None:
    named = {"state": {"fc.weight": {"exp_avg": torch.zeros(3)}}}  # of optimizers that know names
    network = load({"model": STATE, "optimizer": named, "optim_g": optimizer()}, tmp_path)
    assert network.notes == ()
    with pytest.raises(CheckpointError, match=r"holds no state dict \(a dictionary of tensors\); it holds optimizer"):
        load({"optimizer": optimizer(), "epoch": 3}, tmp_path)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.repeats(1)
@pytest.mark.parametrize(
    "name",
    [
        "ckpt.pth",
        "weights.safetensors",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("best.ckpt", "resnet20.th")),
    ],
)
def test_a_folder_with_one_checkpoint_is_that_checkpoint(request_: ExtractRequest, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "cifar10_resnet20_augmix_default"
    folder.mkdir()
    if name.endswith("safetensors"):
        save_file(STATE, folder / name)
    else:
        torch.save({"state_dict": under("module.")}, folder / name)
    (folder / "log.txt").touch()
    (folder / "._ckpt.pth").touch()  # a Mac's
    for checkpoint in (folder, folder / name):
        network = load_network(find_model("resnet20"), CIFAR10, checkpoint, CPU)
        assert network.weights_sha256 == hash_weights(STATE)
    blank_network(find_model("resnet20"), CIFAR10, folder)
    command = [
        *("extract", "cifar10", "--model", "resnet20+augmix", "--checkpoint", str(folder), "--data-root"),
        *(str(request_.data_root), "--cache", str(tmp_path / "c.zarr"), "--splits", "ood/val", "--device", "cpu"),
    ]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    plan = plan_extraction(replace(request_, checkpoint=folder, cache=tmp_path / "c.zarr", splits=("ood/val",)))
    assert (plan.splits[0].state, plan.header.information["checkpoint"]) == ("done", folder.name)
    assert f"--checkpoint {folder}" in open_command(tmp_path / "c.zarr")


def open_command(cache: Path) -> str:
    from nacpipe.cache import open_cache

    return open_cache(cache).command()


def test_folders_that_do_not_say_which_are_refused(tmp_path: Path) -> None:
    model = find_model("resnet20")
    for name in ("a.pth", "b.pth"):
        torch.save(STATE, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"but 2: a\.pth, b\.pth; name one of them: --checkpoint .*/a\.pth; of s"):
        load_network(model, CIFAR10, tmp_path, CPU)
    for run in ("s0", "s1"):
        (tmp_path / run).mkdir()
        torch.save(STATE, tmp_path / run / "best.ckpt")
    message = rf"^checkpoint {tmp_path} is a folder of 2 runs, s0, s1; name one of them: --checkpoint {tmp_path}/s0$"
    with pytest.raises(CheckpointError, match=message):
        load_network(model, CIFAR10, tmp_path, CPU)
    assert load_network(model, CIFAR10, tmp_path / "s1", CPU).weights_sha256 == hash_weights(STATE)


# --- drawn ------------------------------------------------------------------------------------------------------------

LEAVES = st.sampled_from(
    [0, 1.5, "text", None, b"x", torch.zeros(2), torch.tensor(1), argparse.Namespace(a=1), np.float32(2), STATE, OTHER]
)
CONTENTS = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["model", "state_dict", "ema", "optimizer", "fc.bias", "a\nb", "", "x.dtype"])
            | st.integers(0, 2),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(content=CONTENTS)
def test_any_content_is_loaded_or_refused_in_words(tmp_path: Path, content: object) -> None:
    try:
        network = load(content, tmp_path)
    except CheckpointError as error:
        assert "x.pth" in str(error)
        assert "\n" not in error.one_line()
        return
    assert network.weights_sha256 in (hash_weights(STATE), hash_weights(OTHER))


@pytest.mark.parametrize(
    ("content", "stated"),
    [
        ({"state_dict": {}, "best_prec1": 91.73}, 0.9173),
        ({"model": {}, "acc": torch.tensor(0.5)}, 0.5),
        ({"model": {}, "epoch": 3}, None),
        ({"model": {}, "acc": "good"}, None),
        ({"weight": torch.zeros(2)}, None),
    ],
)
def test_the_accuracy_that_a_training_script_saved(tmp_path: Path, content: Any, stated: float | None) -> None:
    torch.save(content, tmp_path / "x.pt")
    found = read_stated_accuracy(tmp_path / "x.pt")
    assert found is None if stated is None else found == pytest.approx(stated)


def test_a_dry_run_refuses_what_does_not_fit_and_loads_nothing(request_: ExtractRequest, tmp_path: Path) -> None:
    """Of a known network, and before an image is read."""
    torch.save(STATE, tmp_path / "fits.pth")
    torch.save({key: value for key, value in STATE.items() if key != "conv1.weight"}, tmp_path / "lacks.pth")
    (tmp_path / "damaged.pth").write_bytes(b"no checkpoint")
    plan = plan_extraction(replace(request_, model="resnet20", checkpoint=tmp_path / "fits.pth"), dry=True)
    assert plan.network.device.type == "meta"
    for name, message in (
        ("lacks", r"does not fit the network: it lacks conv1\.weight$"),
        ("damaged", "cannot be read|not a"),
    ):
        request = replace(request_, model="resnet20", checkpoint=tmp_path / f"{name}.pth")
        with pytest.raises(CheckpointError, match=message):
            plan_extraction(request, dry=True)
    with pytest.raises(CheckpointError, match="it fits resnet20: --model resnet20"):
        plan_extraction(replace(request_, model="resnet32", checkpoint=tmp_path / "fits.pth"), dry=True)
