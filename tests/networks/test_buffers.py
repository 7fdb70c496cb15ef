"""Buffers that forward changes are restored, and so a network stays the one that a cache was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import nacpipe
from nacpipe.networks.buffers import kept_buffers
from nacpipe.networks.checkpoints import hash_network

pytestmark = pytest.mark.usefixtures("one_thread")


class Counting(nn.Module):
    """Counts its calls in place, and replaces the mean of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("still", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.head(self.hidden(x).relu())


def test_buffers_are_restored_and_named() -> None:
    network = Counting()
    calls, mean = network.calls, network.mean
    with pytest.raises(ValueError, match="stop"), kept_buffers(network) as changed:
        network(torch.ones(2, 5))
        assert (int(network.calls), float(network.mean[0])) == (1, pytest.approx(0.1))
        raise ValueError("stop")
    assert changed == ["calls", "mean"]
    assert network.calls is calls and network.mean is mean
    assert int(calls) == 0 and torch.equal(mean, torch.zeros(5))


def test_a_network_that_counts_its_calls_is_the_same_after_extraction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    network, data = Counting(), TensorDataset(torch.randn(30, 5), torch.arange(30) % 3)
    before = hash_network(network)
    cache = nacpipe.extract(network, {"id/train": data, "id/val": data}, tmp_path / "x.zarr", synthetic_val=False)
    assert hash_network(network) == before == cache.header.identity["weights"]
    assert "a forward pass of Counting changes its buffers (calls, mean): caches and detect" in capsys.readouterr().err
    (layer,) = (spec.name for spec in cache.header.layers)
    params = nacpipe.NacParams(layers={layer: nacpipe.LayerParams(bins=8, saturation=3, alpha=1.0)})
    detector = nacpipe.Detector.from_cache(cache, params, network)
    expected = nacpipe.score_splits(cache, params, ["id/val"])["id/val"]
    assert detector(data.tensors[0]).score.tolist() == pytest.approx(expected.tolist())
    assert hash_network(network) == before  # so that it can be given to another detector
    fitted = nacpipe.Detector.fit(network, [data.tensors[0]], params)
    assert hash_network(network) == before
    assert fitted(data.tensors[0]).score.tolist() == pytest.approx(expected.tolist())


class Growing(nn.Module):
    """Makes its table of positions anew for longer inputs, and notes the size in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self._grow(2)

    def _grow(self, length: int) -> None:
        self.length = length
        self.register_buffer("positions", torch.arange(length)[:, None] / length, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.length:
            self._grow(x.shape[1])
        return self.head((self.hidden(x) + self.positions[: x.shape[1]]).relu().sum(1))


def test_a_table_that_is_in_no_state_dict_stays_as_long_as_it_grew(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, data = Growing(), TensorDataset(torch.randn(30, 4, 5), torch.arange(30) % 3)
    with kept_buffers(network) as changed:
        expected = network(data.tensors[0])
    assert changed == []
    assert torch.equal(network.positions[:, 0], torch.arange(4) / 4)
    assert torch.equal(network(data.tensors[0]), expected)
    network = Growing()
    cache = nacpipe.extract(network, {"id/train": data}, tmp_path / "x.zarr", synthetic_val=False, progress=False)
    assert cache["id/train"].rows == 30
    assert network.positions.shape == (4, 1)


def test_buffers_that_share_memory_are_restored() -> None:
    network = nn.Module()
    network.register_buffer("count", torch.zeros(1))
    network.register_buffer("counts", network.count.expand(3))
    with kept_buffers(network) as changed:
        network.count.add_(2)
        assert network.counts.tolist() == [2, 2, 2]
    assert changed == ["count", "counts"]
    assert (network.count.tolist(), network.counts.tolist()) == ([0], [0, 0, 0])
