"""Networks that are no image classifiers, each with data made here: small, trained for a moment, seeded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

SPLITS = {"id/train": 60, "id/val": 40, "id/test": 40, "ood/val": 40, "ood/far/other": 30}
CLASSES = 3


@dataclass(kw_only=True)
class Kind:
    """A network, its data, and what extraction makes of them."""

    network: nn.Module
    splits: Mapping[str, Any]
    alone: Callable[[Any], Tensor]
    """A sample → its logits (1, classes), run alone and without padding."""
    pools: Mapping[str, Callable[[Tensor], Tensor]]
    """Layer → its output for one sample → (neurons,)."""
    chosen: list[str]
    """The layers that `auto` chooses."""
    described: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    pooling: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def label(sample: Any) -> int:
        return int(sample["label"] if isinstance(sample, Mapping) else sample[1])


def train(network: nn.Module, loss_of: Callable[[], Tensor], steps: int = 30) -> nn.Module:
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()
    return network.eval()


def tensor_splits(make: Callable[[torch.Generator, Tensor, bool], Tensor]) -> dict[str, TensorDataset]:
    """Split → samples of (generator, labels, whether they are OOD)."""
    splits = {}
    for number, (name, rows) in enumerate(SPLITS.items()):
        labels = torch.arange(rows) % CLASSES
        splits[name] = TensorDataset(
            make(torch.Generator().manual_seed(number), labels, name.startswith("ood/")), labels
        )
    return splits


def plain_kind(
    network: nn.Module,
    make: Callable[[torch.Generator, Tensor, bool], Tensor],
    pools: Mapping[str, Callable[[Tensor], Tensor]],
    chosen: list[str],
    shape: list[int],
    **more: Any,
) -> Kind:
    splits = tensor_splits(make)
    x, y = splits["id/train"].tensors
    train(network, lambda: F.cross_entropy(network(x), y))
    text = ", ".join(map(str, shape))
    return Kind(
        network=network,
        splits=splits,
        alone=lambda sample: network(sample[0][None]),
        pools=pools,
        chosen=chosen,
        described={"shape": shape, "description": f"float32 ({text})"},
        **more,
    )


def sum_over(*axes: int) -> Callable[[Tensor], Tensor]:
    return lambda output: output.sum(dim=axes).flatten()


def wine() -> Kind:
    """A tabular network; OOD: each column shuffled by itself."""
    datasets = pytest_import("sklearn.datasets")
    raw = datasets.load_wine()
    values = torch.tensor(raw.data, dtype=torch.float32)
    values = (values - values.mean(0)) / values.std(0)
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    values, labels = values[order], labels[order]
    mixed = torch.stack([3 * column[torch.randperm(len(column), generator=torch.Generator().manual_seed(i))]
                         for i, column in enumerate(values.T)], dim=1)  # fmt: skip
    cuts = {"id/train": slice(90), "id/val": slice(90, 135), "id/test": slice(135, None)}
    splits: dict[str, Any] = {name: TensorDataset(values[rows], labels[rows]) for name, rows in cuts.items()}
    splits |= {"ood/val": TensorDataset(mixed[:60]), "ood/far/shuffled": TensorDataset(mixed[60:120])}
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))
    x, y = splits["id/train"].tensors
    train(network, lambda: F.cross_entropy(network(x), y))
    return Kind(
        network=network,
        splits=splits,
        alone=lambda sample: network(sample[0][None]),
        pools={"1": torch.flatten, "3": torch.flatten, "0": torch.flatten},
        chosen=["3", "1"],
        described={"shape": [13], "description": "float32 (13)"},
    )


def pytest_import(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is an extra of the tests")


class Padded(Dataset[Any]):
    """Sequences of 4 to 12 values a step, padded to 12 with a mask; the class is the frequency."""

    def __init__(self, rows: int, seed: int, ood: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(rows) % CLASSES
        self.lengths = torch.randint(4, 13, (rows,), generator=generator)
        time = torch.arange(12.0)
        speed = torch.rand(rows, generator=generator) * 3 if ood else 0.4 + 0.7 * self.labels
        waves = torch.stack([torch.sin(speed[:, None] * time), torch.cos(speed[:, None] * time)], dim=1)
        self.signal = waves + 0.1 * torch.randn(waves.shape, generator=generator) * (4 if ood else 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> Any:
        mask = torch.arange(12) < self.lengths[row]
        return {"signal": self.signal[row] * mask, "valid": mask, "label": int(self.labels[row])}


class MaskedConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 8, 3, padding=1)
        self.second = nn.Conv1d(8, 16, 3, padding=1, stride=2)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, signal: Tensor, valid: Tensor) -> Tensor:
        x = torch.tanh(self.first(signal)) * valid[:, None]
        coarse = F.max_pool1d(valid[:, None].float(), 2, ceil_mode=True)
        x = torch.tanh(self.second(x)) * coarse
        return self.head(x.sum(2) / coarse.sum(2))


def masked() -> Kind:
    torch.manual_seed(0)
    network = MaskedConvolutions()
    splits = {name: Padded(rows, seed, name.startswith("ood/")) for seed, (name, rows) in enumerate(SPLITS.items())}
    batch = torch.utils.data.default_collate([splits["id/train"][i] for i in range(60)])
    labels = batch.pop("label")
    train(network, lambda: F.cross_entropy(network(**batch), labels))

    def alone(sample: Any) -> Tensor:
        length = int(sample["valid"].sum())
        return network(signal=sample["signal"][None, :, :length], valid=sample["valid"][None, :length])

    return Kind(
        network=network,
        splits=splits,
        alone=alone,
        pools={"first": sum_over(2), "second": sum_over(2)},
        chosen=["second", "first"],
        described={"shape": [2], "description": "signal float32 (2, length); valid bool (length)"},
        options={"mask": "valid"},
    )


class Words(Dataset[Any]):
    """Sentences of a made-up language, 3 to 9 words of 30; a class prefers ten of them."""

    def __init__(self, rows: int, seed: int, ood: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.texts, self.labels = [], []
        for row in range(rows):
            length = int(torch.randint(3, 10, (1,), generator=generator))
            words = torch.randint(0, 10, (length,), generator=generator) + (10 * (row % CLASSES))
            if ood:
                words = torch.randint(0, 30, (length,), generator=generator)
            self.texts.append(" ".join(f"w{word}" for word in words.tolist()))
            self.labels.append(row % CLASSES)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> Any:
        return self.texts[row], self.labels[row]


class Output(dict[str, Any]):
    """An output with `.logits`, as those of Hugging Face's models."""

    @property
    def logits(self) -> Tensor:
        return self["scores"]


class TextTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Output:
        x = self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        weight = attention_mask[..., None].float()
        return Output(scores=self.head((x * weight).sum(1) / weight.sum(1)))


def tokenize(texts: Any) -> dict[str, Tensor]:
    rows = [[int(word[1:]) + 1 for word in text.split()] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def text() -> Kind:
    torch.manual_seed(0)
    network = TextTransformer()
    splits = {name: Words(rows, seed, name.startswith("ood/")) for seed, (name, rows) in enumerate(SPLITS.items())}
    batch, labels = tokenize(splits["id/train"].texts), torch.tensor(splits["id/train"].labels)
    train(network, lambda: F.cross_entropy(network(**batch).logits, labels), 15)
    return Kind(
        network=network,
        splits=splits,
        alone=lambda sample: network(**tokenize([sample[0]])).logits,
        pools={"embed": sum_over(1), "encoder.layers.0": sum_over(1), "encoder": sum_over(1)},
        chosen=["encoder.layers.1", "encoder.layers.0"],
        described={"shape": [], "description": "input_ids int64 (length); attention_mask int64 (length)"},
        options={"prepare": tokenize},
    )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.GRU(3, 12, batch_first=True)
        self.old = nn.LSTM(12, 10)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.steps(x)
        states, _ = self.old(states.transpose(0, 1))
        return self.head(states[-1])


def recurrent() -> Kind:
    torch.manual_seed(0)

    def make(generator: torch.Generator, labels: Tensor, ood: bool) -> Tensor:
        x = torch.randn(len(labels), 7, 3, generator=generator) * (2.5 if ood else 0.5)
        return x if ood else x + F.one_hot(labels, 3)[:, None]

    pools = {"steps": sum_over(0, 1), "old": sum_over(0, 1)}
    return plain_kind(Recurrent(), make, pools, ["old", "steps"], [7, 3])


def volumes() -> Kind:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 8, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, CLASSES),
    )  # fmt: skip

    def make(generator: torch.Generator, labels: Tensor, ood: bool) -> Tensor:
        x = torch.randn(len(labels), 1, 4, 5, 6, generator=generator) * (2 if ood else 0.3)
        return x if ood else x + (labels - 1.0)[:, None, None, None, None]

    pools = {"1": sum_over(2, 3, 4), "2": sum_over(2, 3, 4), "5": torch.flatten}
    return plain_kind(network, make, pools, ["5", "1"], [1, 4, 5, 6])


def wide_images() -> Kind:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 12, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES),
    )  # fmt: skip

    def make(generator: torch.Generator, labels: Tensor, ood: bool) -> Tensor:
        x = torch.randn(len(labels), 3, 6, 10, generator=generator) * (2 if ood else 0.5)
        return x if ood else x + 2 * F.one_hot(labels, 3)[:, :, None, None]

    pools = {"1": sum_over(2, 3), "3": sum_over(2, 3), "6": torch.flatten}
    return plain_kind(network, make, pools, ["6", "2", "1"], [3, 6, 10])


def hugging_face() -> Kind:
    """A class of the library `transformers`, built from a config: nothing is downloaded."""
    transformers = pytest_import("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    network = transformers.BertForSequenceClassification(config)
    splits = {name: Words(rows, seed, name.startswith("ood/")) for seed, (name, rows) in enumerate(SPLITS.items())}
    batch, labels = tokenize(splits["id/train"].texts), torch.tensor(splits["id/train"].labels)
    train(network, lambda: F.cross_entropy(network(**batch).logits, labels), 15)
    layers = [f"bert.encoder.layer.{number}" for number in (0, 1)]
    return Kind(
        network=network,
        splits=splits,
        alone=lambda sample: network(**tokenize([sample[0]])).logits,
        pools={"bert.embeddings": sum_over(1), **{f"{layer}.output": sum_over(1) for layer in layers}},
        chosen=["bert.pooler", "bert.encoder.layer.1", "bert.encoder.layer.0", "bert.embeddings"],
        described={"shape": [], "description": "input_ids int64 (length); attention_mask int64 (length)"},
        options={"prepare": tokenize},
    )


KINDS: Mapping[str, Callable[[], Kind]] = {
    kind.__name__: functools.cache(kind) for kind in (wine, masked, text, recurrent, volumes, wide_images, hugging_face)
}
_SLOW = ("hugging_face",)  # its library takes seconds to import
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in _SLOW else name for name in KINDS]
