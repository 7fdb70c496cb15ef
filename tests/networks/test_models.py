"""The table of networks, and checkpoints: what fits, what does not and in which words, and what is never run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from nacpipe.benchmarks.standard import find_benchmark
from nacpipe.errors import CheckpointError, InputError
from nacpipe.extraction.dataset import build_transform
from nacpipe.networks.architectures.resnets import ResNet18For32
from nacpipe.networks.build import blank_network, classifier_weights, load_network
from nacpipe.networks.checkpoints import hash_weights, load_weights, read_checkpoint
from nacpipe.networks.layers import measure_layers
from nacpipe.networks.models import MODELS, find_model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CIFAR10, DIGITS = find_benchmark("cifar10"), find_benchmark("digits")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """A random ResNet-20."""
    torch.manual_seed(0)
    return find_model("resnet20").build(10).state_dict()


def load(checkpoint: Path) -> dict[str, Tensor]:
    """Load it into a fresh ResNet-20 and give back the weights that are in force."""
    return load_network(find_model("resnet20"), CIFAR10, checkpoint, CPU).module.state_dict()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


# --- checkpoints that fit ---------------------------------------------------------------------------------------------


def test_forms_of_checkpoints_that_load(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """Plain, inside `state_dict`, of DataParallel, with other names, safetensors; all of them are the same weights."""
    renamed = {key.replace("fc.", "linear."): value for key, value in state.items()}
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"state_dict": state, "best_prec1": 91.5, "epoch": 3}, tmp_path / "nested.ckpt")
    torch.save({f"module.{key}": value for key, value in renamed.items()}, tmp_path / "parallel.th")
    torch.save(dict(reversed(state.items())), tmp_path / "reversed.pt")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "weights.safetensors")
    hashes = set()
    for file in sorted(tmp_path.iterdir()):
        assert_same(load(file), state)
        hashes.add(load_network(find_model("resnet20"), CIFAR10, file, CPU).weights_sha256)
    assert hashes == {hash_weights(state)}


def test_batch_counters_neither_matter_nor_count(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """Checkpoints from before torch counted batches lack them."""
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    assert_same(load(tmp_path / "old.pth"), state)
    other = {key: value + 7 if key.endswith("num_batches_tracked") else value for key, value in state.items()}
    assert hash_weights(old) == hash_weights(state) == hash_weights(other)
    assert hash_weights(dict(reversed(state.items()))) == hash_weights(state)  # nor does the order


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda s: {**s, "fc.bias": s["fc.bias"] + 1e-6}, id="value"),
        pytest.param(lambda s: {**s, "fc.bias": s["fc.bias"].double()}, id="type"),
        pytest.param(lambda s: {**s, "fc.bias": s["fc.bias"][:, None]}, id="shape"),
        pytest.param(lambda s: {("fc.b" if k == "fc.bias" else k): v for k, v in s.items()}, id="name"),
    ],
)
def test_hash_tells_other_weights(state: dict[str, Tensor], change: object) -> None:
    assert hash_weights(change(state)) != hash_weights(state)  # type: ignore[operator]


def test_network_comes_frozen_with_the_transform_that_belongs_to_it(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "r.pth")
    network = load_network(find_model("resnet20"), CIFAR10, tmp_path / "r.pth", CPU)
    assert not network.module.training
    assert not any(p.requires_grad for p in network.module.parameters())
    assert (network.transform.mean, network.transform.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert find_model("resnet18_32x32").transform is None  # OpenOOD's own: the benchmark's
    classifier = classifier_weights(network)
    assert classifier is not None
    weight, bias = classifier
    assert torch.equal(weight, state["fc.weight"])
    assert torch.equal(bias, state["fc.bias"])


def test_packaged_network_needs_no_checkpoint() -> None:
    network = load_network(find_model("digits_cnn"), DIGITS, None, CPU)
    assert network.transform == DIGITS.transform
    layers, classes, features, notes = measure_layers(network, ())
    assert [(s.name, s.path, s.pooling, s.neurons) for s in layers] == [
        ("avgpool", "avgpool", "sum-nchw", 64),
        ("layer3", "layer3", "sum-nchw", 64),
        ("layer2", "layer2", "sum-nchw", 32),
        ("layer1", "layer1", "sum-nchw", 16),
    ]
    assert (classes, features, notes) == (10, 64, ())
    (fc,) = measure_layers(network, ("fc",)).layers
    assert (fc.path, fc.pooling, fc.neurons) == ("fc", "none", 10)


# --- checkpoints that do not ------------------------------------------------------------------------------------------


def test_checkpoint_of_another_network_is_refused_naming_keys(tmp_path: Path, state: dict[str, Tensor]) -> None:
    odd = {key: value for key, value in state.items() if key not in ("fc.bias", "conv1.weight")}
    torch.save({**odd, "head.bias": state["fc.bias"], "fc.weight": torch.zeros(100, 64)}, tmp_path / "odd.pth")
    message = (
        r"^checkpoint .*odd\.pth does not fit the network: it lacks conv1\.weight, fc\.bias; it has left over"
        r" head\.bias; of another shape fc\.weight \(100×64 for 10×64\)$"
    )
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "odd.pth")


def test_a_checkpoint_of_another_depth_names_the_network_that_it_fits(tmp_path: Path) -> None:
    torch.save({"state_dict": find_model("resnet32").build(10).state_dict()}, tmp_path / "x.pth")
    message = r"x\.pth does not fit the network: it has left over .*; it fits resnet32: --model resnet32$"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "x.pth")


def test_many_keys_are_counted_not_listed(tmp_path: Path) -> None:
    torch.save({f"x{i}": torch.zeros(1) for i in range(12)}, tmp_path / "x.pth")
    message = r"it lacks conv1\.weight(, [\w.]+){4} and \d+ more; it has left over x0, x1, x2, x3, x4 and 7 more$"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "x.pth")


def test_a_network_is_not_touched_by_weights_that_do_not_fit(state: dict[str, Tensor]) -> None:
    module = find_model("resnet20").build(10)
    before = hash_weights(module.state_dict())
    with pytest.raises(CheckpointError, match=r"^checkpoint here does not fit the network: it has left over more$"):
        load_weights(module, {**state, "more": torch.zeros(1)}, {}, "here")
    assert hash_weights(module.state_dict()) == before


def test_weights_without_values_are_refused_by_the_files_name(state: dict[str, Tensor], tmp_path: Path) -> None:
    """It is the file's weights that have none, and no network's that somebody gave."""
    whole = {**state, "conv1.weight": state["conv1.weight"].to("meta")}
    message = "the network's weights 'conv1.weight' have no values"
    for name, content in {"plain": whole, "nested": {"model": whole, "epoch": 3}}.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(CheckpointError, match=rf"^checkpoint \S+/{name}\.pth cannot be loaded: {message}"):
            load(tmp_path / f"{name}.pth")


class Runs:
    """What an attacker would put in a file: unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "hook": Runs(tmp_path / "ran")}, tmp_path / "code.pth")
    message = (
        r"code\.pth is not a checkpoint, or contains more than tensors and is not loaded, since that could run code:"
        r" save its state_dict alone"
    )
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "code.pth")
    assert not (tmp_path / "ran").exists()
    # The file is as dangerous as it looks: plain unpickling would have run it.
    pickle.loads(pickle.dumps(Runs(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_a_whole_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "network.pth")
    with pytest.raises(
        CheckpointError, match=r"network\.pth is not a checkpoint, or contains more than tensors and is not loaded"
    ):
        read_checkpoint(tmp_path / "network.pth")


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ([1, 2], ""),
        ({"state_dict": {"a": 1}}, "; it holds state_dict"),
        ({}, ""),
        ({"a": torch.zeros(1), "b": "text"}, "; it holds a, b"),
        (torch.zeros(3), ""),
        ({f"x{i}": 1 for i in range(7)}, "; it holds x0, x1, x2, x3, x4 and 2 more"),
        ({"optimizer": {"state": {0: {"step": torch.zeros(1)}}, "param_groups": []}}, "; it holds optimizer"),
    ],
)
def test_files_without_a_state_dict_are_refused(tmp_path: Path, content: object, keys: str) -> None:
    torch.save(content, tmp_path / "no.pth")
    with pytest.raises(CheckpointError, match=rf"no\.pth holds no state dict \(a dictionary of tensors\){keys}$"):
        read_checkpoint(tmp_path / "no.pth")


def test_damaged_files_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"^checkpoint .*none\.pth is not there$"):
        read_checkpoint(tmp_path / "none.pth")
    torch.save(state, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:5000])
    for name, content in {"empty.pth": b"", "empty.safetensors": b"", "x.safetensors": b"\xff" * 100}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("cut.pth", "empty.pth", "empty.safetensors", "x.safetensors"):
        with pytest.raises(CheckpointError, match=rf"^checkpoint .*{name} cannot be read: .+"):
            read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("content", [b"\x80\x02.", b"\x80\x02}q\x00(X"], ids=["IndexError", "struct.error"])
def test_every_damaged_file_is_a_checkpoint_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.pth cannot be read"):
        read_checkpoint(tmp_path / "bad.pth")


# --- the table --------------------------------------------------------------------------------------------------------


def test_resnet18_32x32_has_openoods_names() -> None:
    """The keys of OpenOOD's `resnet18_32x32` checkpoints, written out."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = ["conv1.weight", *(f"bn1.{k}" for k in norm), "fc.weight", "fc.bias"]
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            at = f"layer{stage}.{block}"
            for i in (1, 2):
                keys += [f"{at}.conv{i}.weight", *(f"{at}.bn{i}.{k}" for k in norm)]
            if stage > 1 and block == 0:
                keys += [f"{at}.shortcut.0.weight", *(f"{at}.shortcut.1.{k}" for k in norm)]
    network = ResNet18For32(100)
    assert sorted(network.state_dict()) == sorted(keys)
    assert sum(p.numel() for p in network.parameters()) == 11_220_132  # with 100 classes
    modules = dict(network.named_modules())
    assert {"avgpool", "layer1.0.shortcut", "layer4.1"} < set(modules)


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_cifar_resnets_have_the_papers_sizes(depth: int, parameters: int) -> None:
    """He et al. 2016, table 6, gives them in millions: 0.27, 0.46, 0.66, 0.85; shortcuts without parameters."""
    network = find_model(f"resnet{depth}").build(10)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.repeats(3)
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_the_table_can_be_tapped(name: str) -> None:
    model = find_model(name)
    benchmark = find_benchmark(model.benchmark)
    network = blank_network(model, benchmark, None)
    measured = measure_layers(network, tuple(model.layers))
    assert [(s.name, (s.path, s.pooling)) for s in measured.layers] == list(model.layers.items())
    assert len(model.default) == 4
    assert set(model.default) <= set(model.layers)
    assert model.classifier is not None
    assert isinstance(linear := network.module.get_submodule(model.classifier), nn.Linear)
    assert (measured.classes, measured.features) == (benchmark.classes, linear.in_features)
    assert linear.out_features == benchmark.classes


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"^model 'vgg' is not known; known: digits_cnn, .*; see too: nacpipe models$"):
        find_model("vgg")
    network = blank_network(find_model("resnet20"), CIFAR10, None)
    message = (
        r"^layer 'layer9' is not known for resnet20; known: conv1, layer1, layer2, layer3, avgpool, fc, and the modules"
        r" that this lists: nacpipe layers resnet20"
    )
    for name, close in (("layer9", r"; did you mean layer3\?"), ("", "")):
        with pytest.raises(InputError, match=f"{message.replace('layer9', name, 1)}{close}$"):
            measure_layers(network, ("layer1", name))
    with pytest.raises(InputError, match=r"^layer 'fc' is given twice$"):
        measure_layers(network, ("fc", "layer1", "fc"))


def test_networks_that_do_not_fit_the_benchmark_are_refused() -> None:
    with pytest.raises(InputError, match=r"^resnet18 takes images of 3 channels, benchmark digits has 1$"):
        load_network(find_model("resnet18"), DIGITS, None, CPU)
    with pytest.raises(InputError, match=r"^resnet20 has no packaged weights; give them with --checkpoint FILE$"):
        load_network(find_model("resnet20"), CIFAR10, None, CPU)


def test_published_checkpoint_gives_the_reference_logits(shared: Path) -> None:
    """The first 400 images of id/val; logits as the authors' network gave them."""
    file = shared / "checkpoints/resnet_cifar10/resnet20-12fca82f.th"
    network = load_network(find_model("resnet20"), CIFAR10, file, CPU)
    lines = (shared / "openood/benchmark_imglist/cifar10/val_cifar10.txt").read_text().splitlines()[:400]
    transform = build_transform(network.transform)
    paths = [shared / "openood/images_classic" / line.split()[0] for line in lines]
    images = torch.stack([transform(Image.open(path)) for path in paths])
    with torch.no_grad():
        logits = torch.cat([network.module(batch) for batch in images.split(100)]).numpy()
    reference = np.load(shared / "reference/resnet20/id-val.npz")
    np.testing.assert_allclose(logits, reference["logits"][:400], atol=2e-4)
    label = np.array([int(line.split()[1]) for line in lines])
    assert label.tolist() == reference["label"][:400].tolist()
    assert logits.argmax(axis=1).tolist() == reference["logits"][:400].argmax(axis=1).tolist()
