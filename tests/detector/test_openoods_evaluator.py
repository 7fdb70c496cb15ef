"""OpenOOD's own Evaluator runs our postprocessor and prints our table, where it is installed (from its repository).

Everywhere else its steps are restated in test_adapters.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import nacpipe
from nacpipe.detector.adapters.openood import NACPostprocessor

evaluator = pytest.importorskip("openood.evaluation_api.evaluator", reason="OpenOOD is not installed")
postprocessors = pytest.importorskip("openood.postprocessors", reason="OpenOOD is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")
CENTRES = 2 * torch.randn(4, 10, generator=torch.Generator().manual_seed(0))


class NAC(NACPostprocessor, postprocessors.BasePostprocessor):  # type: ignore[misc,name-defined]
    """As the page tells people to write it."""


class Batches(Dataset[Any]):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Any:
        x, y = self.data[row]
        return {"data": x, "label": y}


def draw(seed: int, rows: int, first: int, last: int, spread: float = 1.0) -> TensorDataset:
    y = torch.arange(rows) % (last - first)
    noise = torch.randn(rows, 10, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(CENTRES[first:last][y] + spread * noise, y)


@pytest.mark.parametrize("exported", [True, False])
def test_its_table_is_ours(exported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3))
    splits = {
        "id/train": draw(1, 300, 0, 3), "id/val": draw(2, 90, 0, 3), "id/test": draw(3, 90, 0, 3),
        "ood/val": draw(4, 90, 0, 3, 2.0), "ood/near/one": draw(5, 90, 3, 4), "ood/far/two": draw(6, 90, 0, 3, 4.0),
    }  # fmt: skip
    cache = nacpipe.extract(network, splits, tmp_path / "x.zarr", progress=False)
    params = nacpipe.NacParams(layers={"1": nacpipe.LayerParams(bins=20, saturation=10, alpha=2.0)})
    nacpipe.Detector.from_cache(cache, params, network).save(tmp_path / "d.safetensors")
    loaders = {name: DataLoader(Batches(data), batch_size=32) for name, data in splits.items()}
    theirs = {
        "id": {name: loaders[f"id/{name}"] for name in ("train", "val", "test")},
        "csid": {},
        "ood": {
            "val": loaders["ood/val"],
            "near": {"one": loaders["ood/near/one"]},
            "far": {"two": loaders["ood/far/two"]},
        },
    }
    monkeypatch.setattr(evaluator, "data_setup", lambda *_: None)
    monkeypatch.setattr(evaluator, "get_id_ood_dataloader", lambda *_, **__: theirs)
    if not torch.cuda.is_available():  # its own passes run on CUDA alone
        monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    run = evaluator.Evaluator(
        network, id_name="cifar10", preprocessor=lambda x: x,
        postprocessor=NAC(tmp_path / "d.safetensors" if exported else params),
    )  # fmt: skip
    table = run.eval_ood(progress=False)
    ours = nacpipe.evaluate(cache, params)
    ours = ours[ours["method"] == "NAC"]
    assert table.index.tolist() == ["one", "nearood", "two", "farood"]
    for theirs_name, name in (("FPR@95", "fpr95"), ("AUROC", "auroc"), ("AUPR_IN", "aupr_in"), ("AUPR_OUT", "aupr_out"),
                              ("ACC", "accuracy")):  # fmt: skip
        assert table[theirs_name].tolist() == pytest.approx((100 * ours[name]).tolist(), abs=0.2)
