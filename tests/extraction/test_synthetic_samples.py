"""ood/val made of id/val's samples, from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import nacpipe
from nacpipe.benchmarks.synthetic import make_synthetic
from nacpipe.errors import IdentityError, InputError
from nacpipe.extraction.synthetic_samples import SyntheticSamples

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = np.arange(12) % 3


def test_rows_of_numbers_are_make_synthetics() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 5)
    made = SyntheticSamples(TensorDataset(x, torch.from_numpy(LABELS)), LABELS)
    expected = make_synthetic(x.numpy(), LABELS)
    assert len(made) == 12
    np.testing.assert_array_equal(np.stack([made[row].numpy() for row in range(12)]), expected)


def test_images_of_8_bits_have_their_channels_first() -> None:
    images = torch.randint(0, 256, (16, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = np.arange(16) % 2
    made = SyntheticSamples([(image, 0) for image in images], labels)
    expected = make_synthetic(images.permute(0, 2, 3, 1).numpy(), labels)
    found = np.stack([made[row].permute(1, 2, 0).numpy() for row in range(16)])
    np.testing.assert_array_equal(found, expected)


def test_bfloat16_which_numpy_lacks() -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    made, wide = (SyntheticSamples([(row, 0) for row in rows], LABELS[:6]) for rows in (x, x.float()))
    assert [made[row].dtype for row in range(6)] == [torch.bfloat16] * 6
    assert all(torch.equal(made[row], wide[row].bfloat16()) for row in range(6))


def test_a_sample_of_several_tensors_is_read_once() -> None:
    class Noting(list[Any]):
        def __getitem__(self, row: Any) -> Any:
            read.append(row)
            return super().__getitem__(row)

    read: list[int] = []
    generator = torch.Generator().manual_seed(0)
    pairs = Noting(((torch.randn(4, generator=generator), torch.randn(3, generator=generator)), 0) for _ in range(6))
    made = SyntheticSamples(pairs, LABELS[:6])
    kinds = {made.synthesis.kind(row): row for row in range(6)}
    for kind, count in (("mix", 2), ("noise", 1)):
        read.clear()
        _ = made[kinds[kind]]
        assert len(read) == len(set(read)) == count
        assert kinds[kind] in read


def test_every_tensor_of_an_input_is_changed_and_keeps_its_form() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [
        {
            "tokens": torch.randint(0, 9, (7,), generator=generator),
            "more": (torch.randn(4, generator=generator),),
            "label": row % 2,
        }
        for row in range(6)
    ]
    made = SyntheticSamples(samples, np.arange(6) % 2)
    for row in range(6):
        sample = made[row]
        assert list(sample) == ["tokens", "more"]
        assert sample["tokens"].dtype == torch.int64
        assert sample["tokens"].shape == (7,)
        assert not torch.equal(sample["tokens"], samples[row]["tokens"]) or made.synthesis.kind(row) == "mix"
        assert not torch.equal(sample["more"][0], samples[row]["more"][0])
        assert torch.equal(sample["more"][0], made[row]["more"][0])


@pytest.mark.parametrize(
    ("samples", "labels", "message"),
    [
        ([("a text", 0), ("another", 1)], [0, 1], "an input holds str, which is no tensor"),
        ([(torch.zeros(3), 0)] * 4, [0] * 4, "mixed from two classes; these ID samples are of one"),
    ],
)
def test_what_nothing_can_be_made_of(samples: Any, labels: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SyntheticSamples(samples, np.array(labels))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def test_a_call_without_ood_data_has_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 5) + y[:, None]
    splits = {"id/train": TensorDataset(x, y), "id/val": TensorDataset(x[:30] + 0.1, y[:30])}
    cache = nacpipe.extract(network(), splits, tmp_path / "c.zarr", batch_size=16)
    note = (
        "there is no ood/val; it is made of id/val's samples (mix, shuffle, noise); synthetic_val=False leaves it out"
    )
    assert note in capsys.readouterr().err
    assert list(cache) == ["id/train", "id/val", "ood/val"]
    expected = network()(torch.from_numpy(make_synthetic((x[:30] + 0.1).numpy(), y[:30].numpy())))
    np.testing.assert_allclose(cache["ood/val"].logits[:], expected.detach(), rtol=1e-5, atol=1e-6)
    assert set(cache["ood/val"].label.tolist()) == {-1}
    assert nacpipe.tune(cache, trials=4, space="paper", progress=False).params.layers
    done: list[str] = []
    nacpipe.extract(network(), splits, tmp_path / "c.zarr", progress=lambda split, rows: done.append(split))
    assert done == []  # the same is found again
    real = {**splits, "ood/val": TensorDataset(3 * x[:20])}
    with pytest.raises(IdentityError, match="ood/val"):
        nacpipe.extract(network(), real, tmp_path / "c.zarr", progress=False)
    replaced = nacpipe.extract(network(), real, tmp_path / "c.zarr", redo=["ood/val"], progress=False)
    assert replaced["ood/val"].rows == 20
    again = nacpipe.extract(network(), splits, tmp_path / "c.zarr", progress=False)
    assert again["ood/val"].rows == 20  # a real one is kept
    left = nacpipe.extract(network(), splits, tmp_path / "l.zarr", synthetic_val=False, progress=False)
    assert list(left) == ["id/train", "id/val"]


def test_where_none_can_be_made_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = torch.randn(20, 5), torch.arange(20) % 3
    splits = {"id/train": TensorDataset(x, y), "id/val": [(row, 1) for row in x]}
    cache = nacpipe.extract(network(), splits, tmp_path / "c.zarr")
    assert list(cache) == ["id/train", "id/val"]
    assert "there is no ood/val, which a search needs, and none can be made of id/val: " in capsys.readouterr().err


class Named(list[Any]):
    """A data set whose `labels` are not its samples'."""

    labels = torch.arange(3)


def test_labels_are_one_for_each_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    samples = [(row, int(label)) for row, label in zip(x, LABELS, strict=True)]
    splits = {"id/train": samples, "id/val": Named(samples)}
    network = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    assert nacpipe.extract(network, splits, tmp_path / "x.zarr")["ood/val"].rows == 12
    with pytest.raises(InputError, match=r"^id/val: samples have no label; give \(input, label\)"):
        nacpipe.extract(network, {**splits, "id/val": list(x)}, tmp_path / "y.zarr")
    assert "none can be made of id/val: sample 0 has no whole number as its label; give one" in capsys.readouterr().err
