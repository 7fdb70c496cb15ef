"""Extraction from Python: any network, any data; values against a plain restatement, one sample at a time."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import nacpipe
from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.errors import CacheError, IdentityError, InputError
from tests.networks_of_any_kind import KINDS, NAMES, Kind

pytestmark = pytest.mark.usefixtures("one_thread")


def extract(kind: Kind, path: Path, **more: Any) -> Cache:
    options = {"batch_size": 8, "block_rows": 16, "progress": False, **kind.options, **more}
    return nacpipe.extract(kind.network, kind.splits, path, **options)


def restate(kind: Kind, layer: str, sample: Any) -> tuple[Tensor, Tensor]:
    """Activation and gradient of one sample, pooled by their definition: the input alone, without its padding."""
    kept: dict[str, Tensor] = {}

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        kept["output"] = output if isinstance(output, Tensor) else output[0]

    handle = kind.network.get_submodule(layer).register_forward_hook(keep)
    try:
        logits = kind.alone(sample)
        loss = F.cross_entropy(logits, torch.full_like(logits, 1 / logits.shape[1]))
        (gradient,) = torch.autograd.grad(loss, kept["output"])
    finally:
        handle.remove()
    pool: Callable[[Tensor], Tensor] = kind.pools[layer]
    return pool(kept["output"].detach()), pool(gradient)


@pytest.mark.repeats(1)
@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_a_plain_restatement(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]()
    cache = extract(kind, tmp_path / "x.zarr", layers=list(kind.pools), pooling=kind.pooling)
    for split, data in kind.splits.items():
        assert cache[split].rows == len(data)
        for row in (0, len(data) - 1):
            for layer in kind.pools:
                activation, gradient = restate(kind, layer, data[row])
                view = cache[split][layer]
                assert view.gradient is not None
                np.testing.assert_allclose(view.activation[row], activation, rtol=2e-4, atol=2e-5)
                np.testing.assert_allclose(view.gradient[row], gradient, rtol=2e-3, atol=2e-6)
    assert cache["id/val"].label.tolist() == [
        kind.label(kind.splits["id/val"][i]) for i in range(len(kind.splits["id/val"]))
    ]
    assert set(cache["ood/val"].label.tolist()) == {-1}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.repeats(2)
def test_layers_are_chosen(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]()
    cache = extract(kind, tmp_path / "x.zarr")
    assert [spec.name for spec in cache.header.layers] == kind.chosen
    assert cache.header.identity["input"] == kind.described


class Crash(Exception):
    pass


@pytest.mark.parametrize("name", ["wine", "recurrent"])  # all kinds, by SIGKILL: test_any_network.py
@pytest.mark.repeats(1)
def test_a_broken_extraction_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = KINDS[name]()
    whole = extract(kind, tmp_path / "whole.zarr")
    done: list[int] = []
    lock, write_block = threading.Lock(), CacheWriter.write_block

    def crash(writer: CacheWriter, split: str, block: int, arrays: Mapping[str, Any]) -> None:
        with lock:  # two blocks are written at once
            if len(done) == 3:
                raise Crash
            write_block(writer, split, block, arrays)
            done.append(arrays["index"].size)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(CacheWriter, "write_block", crash)
        extract(kind, tmp_path / "x.zarr")
    with pytest.raises(CacheError, match=r"finish it with: nacpipe\.extract\(network, splits, "):
        open_cache(tmp_path / "x.zarr")["id/train"]
    rows: list[int] = []
    cache = extract(kind, tmp_path / "x.zarr", progress=lambda _split, count: rows.append(count))
    assert sum(rows) == sum(len(data) for data in kind.splits.values()) - sum(done)
    for split in whole:
        assert cache[split].attributes["digest"] == whole[split].attributes["digest"]
    rows.clear()
    extract(kind, tmp_path / "x.zarr", progress=lambda _split, count: rows.append(count))
    assert rows == []


class Stream(IterableDataset[Any]):
    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels, self.reads = inputs, labels, 0

    def __iter__(self) -> Iterator[Any]:
        self.reads += 1
        yield from zip(self.inputs, self.labels, strict=True)


def small() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    return network, torch.randn(50, 5), torch.arange(50) % 3


def test_a_data_set_a_loader_and_an_iterable_give_the_same_values(tmp_path: Path) -> None:
    network, x, y = small()
    data = TensorDataset(x, y)
    stream = Stream(x, y)
    forms = [
        data,
        DataLoader(data, batch_size=7),
        DataLoader(stream, batch_size=7),
        list(zip(x, y, strict=True)),
        ((x[i : i + 9], y[i : i + 9]) for i in range(0, 50, 9)),
        iter([(x, y)]),
    ]
    caches = []
    for number, form in enumerate(forms):
        path = tmp_path / f"{number}.zarr"
        caches.append(
            nacpipe.extract(
                network, {"id/train": form}, path, layers=["1"], batch_size=8, block_rows=16, progress=False
            )
        )
    for cache in caches:
        assert cache["id/train"].label.tolist() == y.tolist()
        assert cache["id/train"].index.tolist() == list(range(50))
        for path in ("layers/1/activation", "layers/1/gradient", "logits"):
            np.testing.assert_allclose(
                cache["id/train"].read(path), caches[0]["id/train"].read(path), rtol=1e-5, atol=1e-7
            )
    expected = torch.relu(x @ network[0].weight.T + network[0].bias).detach()
    np.testing.assert_allclose(caches[0]["id/train"]["1"].activation[:], expected, rtol=1e-5, atol=1e-6)


def test_an_iterable_begins_anew_and_a_finished_one_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x, y = small()
    options: Any = {"layers": ["1"], "batch_size": 8, "block_rows": 16, "progress": False}
    write_block, blocks = CacheWriter.write_block, []

    def crash(writer: CacheWriter, split: str, block: int, arrays: Mapping[str, Any]) -> None:
        write_block(writer, split, block, arrays)
        blocks.append(block)
        if len(blocks) == 2:
            raise Crash

    batches = DataLoader(Stream(x, y), batch_size=8)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(CacheWriter, "write_block", crash)
        nacpipe.extract(network, {"id/train": batches}, tmp_path / "x.zarr", **options)
    cache = nacpipe.extract(network, {"id/train": batches}, tmp_path / "x.zarr", **options)
    assert cache["id/train"].rows == 50
    nacpipe.extract(network, {"id/train": batches}, tmp_path / "x.zarr", **options)
    other = DataLoader(Stream(x + 1, y), batch_size=8)
    with pytest.raises(IdentityError, match=r"id/train was made from other data: sha256.*redo=\['id/train'\]"):
        nacpipe.extract(network, {"id/train": other}, tmp_path / "x.zarr", **options)
    cache = nacpipe.extract(network, {"id/train": other}, tmp_path / "x.zarr", redo=["id/train"], **options)
    expected = torch.relu((x + 1) @ network[0].weight.T + network[0].bias).detach()
    np.testing.assert_allclose(cache["id/train"]["1"].activation[:], expected, rtol=1e-5, atol=1e-6)


def test_identity_is_class_length_labels_and_content_or_a_fingerprint(tmp_path: Path) -> None:
    network, x, y = small()
    options: Any = {"layers": ["1"], "progress": False}
    nacpipe.extract(network, {"id/train": TensorDataset(x, y)}, tmp_path / "x.zarr", **options)
    for changed in (TensorDataset(x, (y + 1) % 3), TensorDataset(x * 2, y), TensorDataset(x[:49], y[:49])):
        with pytest.raises(IdentityError, match="id/train was made from other data"):
            nacpipe.extract(network, {"id/train": changed}, tmp_path / "x.zarr", **options)
    path, named = tmp_path / "named.zarr", {"fingerprint": "v1", **options}
    nacpipe.extract(network, {"id/train": TensorDataset(x, y)}, path, **named)
    nacpipe.extract(network, {"id/train": TensorDataset(x * 2, y)}, path, **named)
    with pytest.raises(IdentityError, match="sha256: stored"):
        nacpipe.extract(network, {"id/train": TensorDataset(x, y)}, path, **{**named, "fingerprint": "v2"})


class Noisy(Dataset[Any]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, row: int) -> Any:
        return torch.randn(5), row % 3


class Broken(Noisy):
    def __getitem__(self, row: int) -> Any:
        if row == 7:
            raise OSError("gone")
        return torch.ones(5), row % 3


class Ragged(Dataset[Any]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, row: int) -> Any:
        return torch.ones(3 + row % 4, 5), row % 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: DataLoader(d, shuffle=True), "takes samples by RandomSampler, which shuffles"),
        (lambda d: DataLoader(d, batch_size=8, drop_last=True), "drops the last batch; make it with drop_last=False"),
        (lambda d: Noisy(), "sample 0 of Noisy is another each time it is read"),
        (lambda d: Ragged(), r"samples differ in shape \(\(3, 5\); .*give mask="),
        (lambda d: [], "id/train has no samples"),
        (lambda d: DataLoader(d, batch_size=None), r"has batch_size=None and makes no batches; give it a batch_size"),
        (
            lambda d: Stream(*d.tensors),
            r"labels are int64 \(\) .*of single samples give DataLoader\(data, batch_size=…\)",
        ),
        (lambda d: TensorDataset(d.tensors[0], F.one_hot(d.tensors[1])), r"of one-hot rows give row\.argmax\(\)"),
        (lambda d: [(x, str(int(y))) for x, y in d], "whole numbers; number the classes as the network does"),
        (lambda d: [(x, int(y), "path") for x, y in d], "a sample has 3 parts; .*DataLoader's collate_fn"),
        (lambda d: Broken(), "id/train: sample 7 of Broken cannot be read: OSError: gone"),
        (lambda d: [(object(), 0)], "id/train: no batch can be made of samples of list: TypeError: .*give prepare="),
        (lambda d: [(d.tensors[0][:9], d.tensors[1][:9])], r"of batches give iter\(batches\)"),
        (lambda d: d.tensors, r"id/train is a tuple; give a data set, such as TensorDataset\(x, y\) or a list of"),
        (lambda d: {"x": d.tensors[0]}, "id/train is a dict; give a data set"),
        (lambda d: 3, "id/train is int; give a map-style data set, a DataLoader, or an iterable of batches"),
        (lambda d: TensorDataset(d.tensors[0]), r"id/train: samples have no label; give \(input, label\)"),
        (lambda d: TensorDataset(d.tensors[0], d.tensors[1] + 1), r"id/train: .* labels are outside 0 … 2"),
        (lambda d: TensorDataset(d.tensors[0], d.tensors[1].float()), "labels are float32"),
    ],
)
def test_data_that_do_not_fit_are_refused(make: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    network, x, y = small()
    with pytest.raises(InputError, match=message):
        nacpipe.extract(network, {"id/train": make(TensorDataset(x, y))}, tmp_path / "x.zarr", progress=False)


def test_other_requests_are_refused(tmp_path: Path) -> None:
    network, x, y = small()
    data = TensorDataset(x, y)
    with pytest.raises(InputError, match="split 'train' is not known; known: id/train"):
        nacpipe.extract(network, {"train": data}, tmp_path / "x.zarr", progress=False)
    with pytest.raises(InputError, match="redo names 'id/val'; the splits are id/train"):
        nacpipe.extract(network, {"id/train": data}, tmp_path / "x.zarr", redo=["id/val"], progress=False)
    with pytest.raises(InputError, match="batch_size is 0; it must lie between"):
        nacpipe.extract(network, {"id/train": data}, tmp_path / "x.zarr", batch_size=0, progress=False)
    with pytest.raises(InputError, match="pooling 1=sum-ncl: "):
        nacpipe.extract(
            network, {"id/train": data}, tmp_path / "x.zarr", layers=["0"], pooling={"1": "sum-ncl"}, progress=False
        )


def test_the_network_is_as_it_was(tmp_path: Path) -> None:
    network, x, y = small()
    network.train()
    network[0].weight.requires_grad_(False)
    nacpipe.extract(network, {"id/train": TensorDataset(x, y)}, tmp_path / "x.zarr", progress=False)
    assert all(module.training for module in network.modules())
    assert [p.requires_grad for p in network.parameters()] == [False, True, True, True]


def test_notes_and_a_bar_are_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    network, x, y = small()
    nacpipe.extract(network, {"id/train": TensorDataset(x, y)}, tmp_path / "x.zarr")
    out, err = capfd.readouterr()
    assert out == ""
    assert "layers chosen: 1 (8 neurons, none)" in err
    assert "50/50" in err
    assert "id/train: accuracy" in err


@pytest.mark.parametrize(("name", "noted"), [("text", True), ("masked", False), ("wine", False)])
@pytest.mark.repeats(1)
def test_a_mask_that_is_not_named_is_noted(
    name: str, noted: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kind = KINDS[name]()
    extract(kind, tmp_path / "x.zarr", progress=True)
    note = "the argument attention_mask is taken as the mask: positions where it is 0 are padding\n"
    assert (note in capfd.readouterr().err) == noted


class Greedy(nn.Module):
    """Has memory for few samples at once."""

    def __init__(self, fits: int) -> None:
        super().__init__()
        self.hidden, self.head, self.fits = nn.Linear(5, 8), nn.Linear(8, 3), fits

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.fits:
            raise torch.OutOfMemoryError("too many")
        return self.head(torch.relu(self.hidden(x)))


def test_messages_call_other_inputs_samples(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(50, 5), torch.arange(50) % 3)
    nacpipe.extract(Greedy(8), {"id/train": data}, tmp_path / "x.zarr", layers=["hidden"], batch_size=16)
    err = capfd.readouterr().err
    assert "16 samples at once do not fit the memory of cpu: from here on batches of 8\n" in err
    assert "of 50 samples; a trained network classifies most samples correctly" in err
    assert "image" not in err
    with pytest.raises(InputError, match="one sample does not fit the memory of cpu; try device='cpu'"):
        nacpipe.extract(Greedy(0), {"id/train": data}, tmp_path / "y.zarr", progress=False)


def take_first(output: tuple[Tensor, ...]) -> Tensor:
    return output[0]


def take_second(output: tuple[Tensor, ...]) -> Tensor:
    return output[1]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.one, self.other = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states = torch.relu(self.hidden(x))
        return self.one(states), self.other(states)


def test_functions_are_part_of_the_identity(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    network, splits = Two(), {"id/train": TensorDataset(torch.randn(50, 5), torch.arange(50) % 3)}
    options: Any = {"layers": ["hidden"], "progress": False}
    with pytest.raises(InputError, match=r"gives tuple for .*; logits= is a function that takes them out of it"):
        nacpipe.extract(network, splits, tmp_path / "x.zarr", **options)
    nacpipe.extract(network, splits, tmp_path / "x.zarr", logits=take_first, **options)
    nacpipe.extract(network, splits, tmp_path / "x.zarr", logits=take_first, **options)
    with pytest.raises(IdentityError, match=r"call\.logits: stored \w{8}…, now \w{8}….* another path, or the same"):
        nacpipe.extract(network, splits, tmp_path / "x.zarr", logits=take_second, **options)
    with pytest.raises(IdentityError, match=r"call\.prepare: stored nothing, now "):
        nacpipe.extract(network, splits, tmp_path / "x.zarr", logits=take_first, prepare=lambda x: x, **options)
    assert capfd.readouterr().err == ""
    nacpipe.extract(network, splits, tmp_path / "y.zarr", logits=operator.itemgetter(1), layers=["hidden"])
    assert "the source of logits= is not at hand" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            lambda: nn.Linear(5, 3, device="meta"),
            r"weights 'weight' have no values \(they are on the meta device\); load",
        ),
        (
            lambda: nn.Sequential(nn.LazyLinear(3)),
            r"weights '0.weight' have no shape yet \(of a lazy module\); run a batch",
        ),
    ],
)
def test_networks_without_values_are_refused(network: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    samples = TensorDataset(torch.zeros(6, 5), torch.arange(6) % 3)
    with pytest.raises(InputError, match=message):
        nacpipe.extract(network(), {"id/train": samples}, tmp_path / "x.zarr", progress=False)


def test_a_network_that_ends_in_a_sigmoid_is_told_what_to_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body, data = nn.Sequential(nn.Linear(5, 8), nn.ReLU()), TensorDataset(torch.randn(50, 5), torch.arange(50) % 2)
    one, options = nn.Sequential(body, nn.Linear(8, 1)), {"layers": ["0"], "progress": False}
    with pytest.raises(InputError, match=r"one number for each sample, .* give logits=lambda z: torch\.cat\(") as found:
        nacpipe.extract(one, {"id/train": data}, tmp_path / "x.zarr", **options)
    advice = str(found.value).split("logits=")[1].split(", which")[0]
    cache = nacpipe.extract(one, {"id/train": data}, tmp_path / "x.zarr", logits=eval(advice), **options)
    z = one(data.tensors[0]).detach()
    np.testing.assert_allclose(cache["id/train"].read("logits"), torch.cat([0 * z, z], 1), rtol=1e-5, atol=1e-6)
    flat = nn.Sequential(one, nn.Flatten(0))
    with pytest.raises(InputError, match=r"gives \(4,\) for 4 .* give logits=lambda z: torch\.stack\(") as found:
        nacpipe.extract(flat, {"id/train": data}, tmp_path / "y.zarr", layers=["0.0"], progress=False)
    advice = str(found.value).split("logits=")[1].split(", which")[0]
    assert torch.equal(eval(advice)(flat(data.tensors[0])), eval(advice.replace("stack", "cat"))(one(data.tensors[0])))
    wrong = TensorDataset(data.tensors[0], data.tensors[1] + 1)
    with pytest.raises(InputError, match=r"or the network, which has 2 classes$"):
        nacpipe.extract(
            two := nn.Sequential(body, nn.Linear(8, 2)), {"id/train": wrong}, tmp_path / "z.zarr", **options
        )
    known = r"the paths of network\.named_modules\(\): 0, 0\.0, 0\.1, 1$"
    with pytest.raises(InputError, match=rf"layer '9' is not known for Sequential; known: {known}"):
        nacpipe.extract(two, {"id/train": data}, tmp_path / "z.zarr", layers=["9"], progress=False)


def test_more_training_samples_extract_id_train_alone(tmp_path: Path) -> None:
    network, x, y = small()
    splits = {"id/train": TensorDataset(x[:30], y[:30]), "id/val": TensorDataset(x, y)}
    options: Any = {"layers": ["1"], "batch_size": 8}
    before = nacpipe.extract(network, splits, tmp_path / "x.zarr", progress=False, **options)["id/val"].attributes
    more, told = {**splits, "id/train": TensorDataset(x, y)}, list[str]()
    with pytest.raises(IdentityError, match=r"id/train was made from other data: length.*redo=\['id/train'\]"):
        nacpipe.extract(network, more, tmp_path / "x.zarr", progress=False, **options)
    cache = nacpipe.extract(
        network, more, tmp_path / "x.zarr", redo=["id/train"], progress=lambda split, _: told.append(split), **options
    )
    assert set(told) == {"id/train"}
    assert cache["id/train"].rows == 50
    assert cache["id/val"].attributes["digest"] == before["digest"]


# --- other data than the first split's --------------------------------------------------------------------------------


def test_splits_of_other_sizes_are_refused_and_failing_batches_are_named(tmp_path: Path) -> None:
    """A sum over more positions is larger: an OOD set of larger images would be told by its size alone."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    train = TensorDataset(torch.randn(12, 1, 8, 8), torch.arange(12) % 3)
    larger = TensorDataset(torch.randn(12, 1, 9, 9))
    with pytest.raises(
        InputError, match=r"^ood/val: .* from those of id/train \(\(1, 9, 9\); \(1, 8, 8\)\): a layer's"
    ):
        nacpipe.extract(network, {"id/train": train, "ood/val": larger}, tmp_path / "x.zarr", progress=False)
    whole = TensorDataset(torch.ones(12, 1, 8, 8, dtype=torch.long))
    with pytest.raises(
        InputError, match=r"^ood/val, samples 4 to 7: the network fails on inputs int64 \(1, 8, 8\): Runtime"
    ):
        splits = {"id/train": train, "ood/val": [*TensorDataset(torch.randn(4, 1, 8, 8)), *whole]}
        nacpipe.extract(
            network, splits, tmp_path / "y.zarr", batch_size=4, block_rows=4, progress=False, synthetic_val=False
        )


def test_keywords_may_come_in_another_order(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow, self.head = nn.Linear(5, 8), nn.Linear(2, 8), nn.Linear(8, 3)

        def forward(self, wide: Tensor, narrow: Tensor) -> Tensor:
            return self.head((self.wide(wide) + self.narrow(narrow)).relu())

    torch.manual_seed(0)
    wide, narrow = torch.randn(12, 5), torch.randn(12, 2)
    rows = [{"wide": a, "narrow": b, "label": row % 3} for row, (a, b) in enumerate(zip(wide, narrow, strict=True))]
    turned = [dict(reversed(row.items())) for row in rows]
    network, splits = Two(), {"id/train": rows, "id/val": turned}
    cache = nacpipe.extract(network, splits, tmp_path / "x.zarr", layers=["wide"], progress=False, synthetic_val=False)
    expected = network.wide(wide).detach()
    for split in splits:
        np.testing.assert_allclose(cache[split]["wide"].activation[:], expected, rtol=1e-5, atol=1e-6)
    params = nacpipe.NacParams(layers={"wide": nacpipe.LayerParams(bins=9, saturation=3, alpha=1.0)})
    detector = nacpipe.Detector.from_cache(cache, params, network)
    scores = detector({"wide": wide, "narrow": narrow}).score
    assert torch.equal(detector({"narrow": narrow, "wide": wide}).score, scores)
    with pytest.raises(InputError, match=r"^samples are \(1,\) and \(3,\), .* counted on \(5,\)"):
        detector({"narrow": narrow[:, :1], "wide": wide[:, :3]})


def test_batches_of_no_samples_are_passed_over(tmp_path: Path) -> None:
    network, x, y = small()
    batches = [(x[:8], y[:8]), (x[:0], y[:0]), (x[8:], y[8:])]
    cache = nacpipe.extract(network, {"id/train": iter(batches)}, tmp_path / "x.zarr", layers=["1"], progress=False)
    assert cache["id/train"].label.tolist() == y.tolist()
    with pytest.raises(InputError, match=r"^id/train: its first batch has no samples$"):
        nacpipe.extract(network, {"id/train": iter(batches[1:])}, tmp_path / "y.zarr", progress=False)


def test_prepare_gets_a_list_of_what_no_batch_is_made_of(tmp_path: Path) -> None:
    network, x, y = small()
    images = [Image.fromarray((row[None] * 40 + 128).clamp(0, 255).byte().numpy()) for row in x]

    def prepare(batch: list[Image.Image]) -> Tensor:
        return torch.stack([torch.tensor(np.asarray(image))[0].float() for image in batch])

    cache = nacpipe.extract(
        network, {"id/train": list(zip(images, y.tolist(), strict=True))}, tmp_path / "x.zarr", layers=["1"],
        prepare=prepare, progress=False,
    )  # fmt: skip
    expected = network[:2](prepare(images)).detach()
    np.testing.assert_allclose(cache["id/train"]["1"].activation[:], expected, rtol=1e-5)
    assert cache["id/train"].label.tolist() == y.tolist()


def test_inputs_that_are_keywords_by_mistake_are_told_so(tmp_path: Path) -> None:
    network, x, y = small()
    data = [{"image": row, "label": int(label)} for row, label in zip(x, y, strict=True)]
    with pytest.raises(
        InputError, match=r"keyword argument 'image'; .*prepare=lambda batch: \(batch,\) gives them as one"
    ):
        nacpipe.extract(network, {"id/train": data}, tmp_path / "x.zarr", progress=False)
