"""From a network of any kind to a verdict, in Python: each step killed and resumed, each value stated again plainly."""

from __future__ import annotations

import copy
import pickle
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import default_collate

import nacpipe
from nacpipe.detector.adapters.openood import NACPostprocessor
from nacpipe.errors import CacheError
from nacpipe.extraction.samples import split_label
from nacpipe.networks.call import map_tensors
from tests import oracle
from tests.killed_steps import EXTRACT, TUNE
from tests.networks_of_any_kind import KINDS, NAMES, Kind
from tests.prefork import python_words

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows"),
]


def batch_of(kind: Kind, split: str, rows: range) -> Any:
    data = kind.splits[split]
    return split_label(default_collate([data[row] for row in rows]))[0]


def killed(step: str, name: str, folder: Path) -> None:
    command = [*python_words(), "-m", "tests.killed_steps", step, name, str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def restated(cache: nacpipe.Cache, params: nacpipe.NacParams, split: str) -> NDArray[np.float64]:
    """A split's scores, from the states in the cache and the definitions."""
    scores, weights = [], []
    for name, layer in params.layers.items():
        products = []
        for part in ("id/train", split):
            states = cache[part][name]
            assert states.gradient is not None
            products.append(states.activation[:] * states.gradient[:])
        assert layer.source == "product"
        options = {"bins": layer.bins, "saturation": layer.saturation, "alpha": layer.alpha, "edges": layer.edges}
        scores.append(oracle.score_layer(*products, **options))
        weights.append(layer.weight)
    return oracle.weighted_score(scores, weights)


@pytest.mark.repeats(1)
@pytest.mark.parametrize("name", NAMES)
def test_from_a_network_to_a_verdict(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]()
    torch.save(kind.network.state_dict(), tmp_path / "network.pt")
    (tmp_path / "whole").mkdir()
    whole = nacpipe.extract(kind.network, kind.splits, tmp_path / "whole/x.zarr", **{**EXTRACT, **kind.options})
    undisturbed = nacpipe.tune(whole, **TUNE)

    killed("extract", name, tmp_path)
    with pytest.raises(CacheError, match=r"finish it with: nacpipe\.extract"):
        nacpipe.open_cache(tmp_path / "x.zarr")["id/train"]
    rows: list[int] = []
    options = {**EXTRACT, **kind.options, "progress": lambda _split, count: rows.append(count)}
    cache = nacpipe.extract(kind.network, kind.splits, tmp_path / "x.zarr", **options)
    missing = sum(len(data) for data in kind.splits.values()) - sum(rows)
    assert missing > 0 and missing % EXTRACT["block_rows"] == 0  # blocks that are not computed again
    assert {split: cache[split].attributes["digest"] for split in cache} == {
        split: whole[split].attributes["digest"] for split in whole
    }

    killed("tune", name, tmp_path)
    lines = (tmp_path / "x.study.log").read_bytes()
    result = nacpipe.tune(cache, **TUNE)
    assert (tmp_path / "x.study.log").read_bytes().startswith(lines)  # no trial is repeated
    assert result.params == undisturbed.params
    assert result.study is not None and undisturbed.study is not None
    assert [t.values for t in result.study.trials] == [t.values for t in undisturbed.study.trials]

    params = result.params.used()
    scores = nacpipe.score_splits(cache, result.params, list(cache))
    for split in ("id/test", "ood/val"):
        np.testing.assert_allclose(scores[split], restated(cache, params, split), rtol=1e-9)
    table = nacpipe.evaluate(cache, result.params).set_index(["method", "dataset"])
    (other,) = [split for split in cache if split.startswith("ood/far/")]
    for (method, dataset), row in table.iterrows():
        if method == "NAC" and dataset != "mean":
            assert row.auroc == pytest.approx(oracle.auroc(scores["id/test"], scores[other]))
            assert row.fpr95 == pytest.approx(oracle.fpr95(scores["id/test"], scores[other]))
    assert result.checks.val_auroc == pytest.approx(oracle.auroc(scores["id/val"], scores["ood/val"]))

    call = {key: kind.options[key] for key in ("prepare", "mask") if key in kind.options}
    detector = nacpipe.Detector.from_cache(cache, result.params, kind.network, **call)
    for split in ("id/val", "ood/val"):
        logits, score, percentile, is_ood = detector(batch_of(kind, split, range(16)))
        assert logits.shape == (16, 3)
        np.testing.assert_allclose(logits, cache[split].read("logits")[:16], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(score, scores[split][:16], atol=0.02)
        below = [100 * float(np.mean(scores["id/val"] < float(one))) for one in score]
        np.testing.assert_allclose(percentile, below)
        assert is_ood.tolist() == (score < detector.threshold).tolist()
    detector.save(tmp_path / "d.safetensors")
    again = nacpipe.Detector.load(tmp_path / "d.safetensors", kind.network, **call)
    batch = batch_of(kind, "id/test", range(8))
    for one, other_one in zip(detector(batch), again(batch), strict=True):
        np.testing.assert_array_equal(one, other_one)
    check_copies(again, batch)
    check_adapters(kind, result.params, tmp_path / "d.safetensors", again, call)


def check_copies(detector: nacpipe.Detector, batch: Any) -> None:
    """Copies, and a detector inside torch's wrappers, give its scores; so do inputs made under inference mode."""
    score, state = detector(batch).score, detector.state_dict()
    empty = copy.deepcopy(detector)
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.zero_()
    empty.load_state_dict(state)
    for other in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector)), empty, nn.DataParallel(detector)):
        assert torch.equal(other(batch).score, score)
    with torch.inference_mode():
        inside = map_tensors(torch.clone, batch)
        assert torch.equal(detector(inside).score, score)
    assert torch.equal(detector(inside).score, score)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masked", "text"])
def test_a_compiled_detector_is_the_same(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]()
    options = {**EXTRACT, **kind.options}
    cache = nacpipe.extract(kind.network, kind.splits, tmp_path / "x.zarr", **options)
    layer = nacpipe.LayerParams(bins=9, saturation=3, alpha=1.0)
    params = nacpipe.NacParams(layers={spec.name: layer for spec in cache.header.layers})
    call = {key: kind.options[key] for key in ("prepare", "mask") if key in kind.options}
    detector, batch = (
        nacpipe.Detector.from_cache(cache, params, kind.network, **call),
        batch_of(kind, "id/val", range(6)),
    )
    expected = detector(batch)
    for one, other in zip(torch.compile(detector)(batch), expected, strict=True):
        assert torch.equal(one, other)
    wrapped = nacpipe.Detector.from_cache(cache, params, torch.compile(kind.network), **call)
    assert torch.equal(wrapped(batch).score, expected.score)


def check_adapters(kind: Kind, params: nacpipe.NacParams, file: Path, detector: nacpipe.Detector, call: Any) -> None:
    """Other tools' interfaces give the detector's scores, whether it was exported or is counted by them."""
    batch, expected = batch_of(kind, "ood/val", range(10)), detector(batch_of(kind, "ood/val", range(10)))
    labels = torch.tensor([kind.label(kind.splits["id/train"][row]) for row in range(40)])
    inputs = [batch_of(kind, "id/train", rows) for rows in (range(25), range(25, 40))]
    loader = [{"data": x, "label": y} for x, y in zip(inputs, labels.split([25, 15]), strict=True)]
    openood = NACPostprocessor(file, **call)
    openood.setup(kind.network, {}, {})
    predicted, confidence, truth = openood.inference(kind.network, [{"data": batch, "label": [-1] * 10}])
    np.testing.assert_array_equal(confidence, expected.score)
    np.testing.assert_array_equal(predicted, expected.logits.argmax(dim=1))
    assert truth.tolist() == [-1] * 10
    counted = NACPostprocessor(params, train_images=30, **call)
    counted.setup(kind.network, {"train": loader}, {})
    _, confidence, _ = counted.inference(kind.network, [{"data": batch, "label": [-1] * 10}])
    fitted = nacpipe.Detector.fit(kind.network, [batch_of(kind, "id/train", range(30))], params, **call)
    np.testing.assert_allclose(confidence, fitted(batch).score, atol=0.02)
    if find_spec("pytorch_ood") is None:
        return
    from nacpipe.detector.adapters.pytorch_ood import NAC

    np.testing.assert_array_equal(-NAC(kind.network, file, **call)(batch), expected.score)
    outliers = torch.cat([labels[:30], torch.full((10,), -1)]).split([25, 15])  # they are left out
    theirs = NAC(kind.network, params, **call).fit(list(zip(inputs, outliers, strict=True)))
    np.testing.assert_allclose(-theirs(batch), fitted(batch).score, atol=0.02)
