"""A detector from Python: fitted without a cache, calibrated, explained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

import nacpipe
from nacpipe.detector.calibration import beta_quantile
from nacpipe.errors import DetectorError, InputError
from nacpipe.extraction.samples import split_label
from tests.networks_of_any_kind import KINDS, Kind

pytestmark = pytest.mark.usefixtures("one_thread")


def batch_of(kind: Kind, split: str, rows: range) -> Any:
    data = kind.splits[split]
    return split_label(default_collate([data[row] for row in rows]))[0]


@pytest.fixture(scope="module")
def wine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Kind, nacpipe.Cache, nacpipe.NacParams]:
    kind, path = KINDS["wine"](), tmp_path_factory.mktemp("wine") / "x.zarr"
    cache = nacpipe.extract(kind.network, kind.splits, path, progress=False)
    return kind, cache, nacpipe.tune(cache, space="paper", trials=12, progress=False).params


def test_a_detector_is_fitted_without_a_cache(wine: Any, tmp_path: Path) -> None:
    kind, cache, params = wine
    loader = DataLoader(kind.splits["id/train"], batch_size=32)
    fitted = nacpipe.Detector.fit(kind.network, loader, params)
    exported = nacpipe.Detector.from_cache(cache, params, kind.network)
    assert exported._exported is not None
    assert exported._exported.cache_layers == tuple(layer.path for layer in cache.header.layers)
    batch = batch_of(kind, "id/test", range(20))
    np.testing.assert_allclose(fitted(batch).score, exported(batch).score, atol=0.02)
    assert not fitted(batch).is_ood.any()
    assert fitted(batch).percentile.isnan().all()
    with pytest.raises(DetectorError, match=r"no threshold yet; choose one with calibrate\(loader\)"):
        fitted.save(tmp_path / "d.safetensors")
    own = DataLoader(kind.splits["id/val"], batch_size=16)
    found = fitted.calibrate(own, keep=0.9)
    scores = torch.cat([fitted(x).score for x, _ in own])
    assert (scores >= found.threshold).double().mean() >= 0.9
    assert (scores > found.threshold).double().mean() < 0.9
    assert found.samples == len(kind.splits["id/val"])
    assert found.interval[0] < 0.9 < found.interval[1]
    fitted.save(tmp_path / "d.safetensors")
    again = nacpipe.Detector.load(tmp_path / "d.safetensors", kind.network)
    assert again(batch).is_ood.tolist() == fitted(batch).is_ood.tolist()
    with pytest.raises(InputError, match="keep is 0; it must be above 0 and at most 1"):
        fitted.calibrate(own, keep=0)
    with pytest.raises(InputError, match="there are no samples to calibrate with"):
        fitted.calibrate([])


def test_an_interval_is_the_beta_distributions() -> None:
    """Beta(1, 1) is uniform; Beta(n, 1) has the distribution x ** n."""
    assert beta_quantile(0.3, 1, 1) == pytest.approx(0.3)
    assert beta_quantile(0.025, 20, 20) == pytest.approx(0.025 ** (1 / 20))
    assert beta_quantile(0.975, 1, 20) == pytest.approx(1 - 0.025 ** (1 / 20))
    draws = np.random.RandomState(0).beta(19, 2, 200_000)
    assert beta_quantile(0.1, 19, 20) == pytest.approx(np.quantile(draws, 0.1), abs=2e-3)


def test_an_explanation_adds_up(wine: Any) -> None:
    kind, cache, params = wine
    detector = nacpipe.Detector.from_cache(cache, params, kind.network)
    batch = batch_of(kind, "ood/val", range(3))
    detected = detector(batch)
    for row, found in enumerate(detector.explain(batch, neurons=1000)):
        assert found.score == pytest.approx(float(detected.score[row]))
        assert found.percentile == float(detected.percentile[row])
        assert float(found.terms["part"].sum()) == pytest.approx(found.score)
        assert list(found.terms["score"]) == sorted(found.terms["score"])
        assert 1 - float(found.neurons["missing"].sum()) == pytest.approx(found.score)
        for name, own in found.neurons.groupby("term"):
            (score,) = found.terms.loc[found.terms["term"] == name, "score"]
            assert own["coverage"].mean() == pytest.approx(score)
        assert math.isfinite(found.neurons["value"].iloc[0])
        assert "<table" in found._repr_html_()
    assert len(detector.explain(batch)[0].neurons) == 10


def test_another_call_is_refused(tmp_path: Path) -> None:
    kind = KINDS["masked"]()
    options: dict[str, Any] = {"layers": ["first"], "progress": False}
    cache = nacpipe.extract(kind.network, kind.splits, tmp_path / "x.zarr", mask="valid", **options)
    params = nacpipe.NacParams(layers={"first": nacpipe.LayerParams(bins=9, saturation=3, alpha=1.0)})
    for call, message in (
        ({}, "its states were made with mask=; give the same"),
        ({"mask": "signal"}, "its states were made with another mask= than 'signal'; give the same"),
        ({"mask": "valid", "prepare": dict}, "its states were made without prepare=; leave it out"),
    ):
        with pytest.raises(DetectorError, match=message):
            nacpipe.Detector.from_cache(cache, params, kind.network, **call)
    nacpipe.Detector.from_cache(cache, params, kind.network, mask="valid").save(tmp_path / "d.safetensors")
    with pytest.raises(DetectorError, match=r"d\.safetensors: its states were made with mask=; give the same"):
        nacpipe.Detector.load(tmp_path / "d.safetensors", kind.network)


def test_samples_without_padding_need_no_mask(tmp_path: Path) -> None:
    """The states were counted on padded samples: no length is another than theirs."""

    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.first, self.head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            return self.head((self.first(self.embed(input_ids)).relu() * mask[..., None]).sum(1))

    torch.manual_seed(0)
    network, ids = Tokens(), torch.randint(9, (20, 6))
    mask = (torch.arange(6) < torch.arange(20)[:, None] % 4 + 3).long()
    rows = [{"input_ids": a, "attention_mask": b, "label": 0} for a, b in zip(ids, mask, strict=True)]
    cache = nacpipe.extract(
        network, {"id/train": rows, "id/val": rows}, tmp_path / "x.zarr", layers=["first"], progress=False,
        synthetic_val=False,
    )  # fmt: skip
    params = nacpipe.NacParams(layers={"first": nacpipe.LayerParams(bins=9, saturation=3, alpha=1.0)})
    detector = nacpipe.Detector.from_cache(cache, params, network)
    short = ids[:, :5]
    expected = detector({"input_ids": short, "attention_mask": torch.ones_like(short)}).score
    assert torch.equal(detector({"input_ids": short}).score, expected)


def test_another_network_is_refused(wine: Any) -> None:
    _, cache, params = wine
    other = torch.nn.Sequential(torch.nn.Linear(13, 3))
    with pytest.raises(DetectorError, match="exported for another network"):
        nacpipe.Detector.from_cache(cache, params, other)
