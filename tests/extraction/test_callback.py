"""The training loop's callback writes what extraction would, and disturbs nothing; the page's example as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from nacpipe.benchmarks.digits import load_set
from nacpipe.benchmarks.standard import find_benchmark
from nacpipe.cache import open_cache
from nacpipe.cli import main
from nacpipe.errors import IdentityError, InputError
from nacpipe.evaluation.model_selection import rank_checkpoints
from nacpipe.extraction.callback import Snapshots
from nacpipe.extraction.pipeline import extract
from nacpipe.extraction.plan import plan_extraction
from nacpipe.extraction.request import ExtractRequest
from nacpipe.method.params import LayerParams
from nacpipe.networks.architectures.digits_cnn import DigitsCNN
from nacpipe.scoring.states import read_source
from tests import oracle
from tools.train_digits import to_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]


def batches(name: str, rows: slice = slice(None), size: int = 128) -> list[tuple[Tensor, Tensor]]:
    images, labels = load_set(name)
    return list(zip(to_inputs(images[rows]).split(size), torch.tensor(labels[rows]).split(size), strict=True))


def test_the_cache_holds_what_extraction_writes(tmp_path: Path) -> None:
    from nacpipe.networks.build import load_network
    from nacpipe.networks.models import find_model

    layers = ("avgpool", "layer2")
    request = ExtractRequest(
        benchmark="digits", model="digits_cnn", cache=tmp_path / "c.zarr", device="cpu", layers=layers,
        splits=("id/val", "csid/digits8x8"),
    )  # fmt: skip
    extract(plan_extraction(request))
    benchmark = find_benchmark("digits")
    network = load_network(find_model("digits_cnn"), benchmark, None, torch.device("cpu")).module
    splits = {"id/train": batches("val"), "csid/digits8x8": batches("digits8x8")}
    path = Snapshots(tmp_path, splits, layers, transform=benchmark.transform)(network, 7)
    assert path == tmp_path / "step-000007.zarr"
    ours, theirs = open_cache(path), open_cache(tmp_path / "c.zarr")
    for name, other in (("id/train", "id/val"), ("csid/digits8x8", "csid/digits8x8")):
        for array in theirs.header.arrays():
            np.testing.assert_array_equal(ours[name].read(array), theirs[other].read(array))
    assert ours.header.layers == theirs.header.layers
    for what in ("weights", "transform", "dtype"):
        assert ours.header.identity[what] == theirs.header.identity[what]
    for mine, other in zip(ours.classifier() or (), theirs.classifier() or (), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_two_checkpoints_rank_as_the_oracle_says(tmp_path: Path) -> None:
    snapshots = Snapshots(
        tmp_path, {"id/train": batches("val", slice(300)), "csid/a": batches("digits8x8", slice(200))}, ["avgpool"]
    )
    caches = []
    for step in (0, 1):
        torch.manual_seed(step)
        network = DigitsCNN()
        with torch.no_grad():
            for name in ("layer3.1.weight", "fc.weight"):  # so that states differ from ½
                network.get_parameter(name).mul_(3.0 + step)
        caches.append(open_cache(snapshots(network, step)))
    params = LayerParams(bins=50, saturation=20, alpha=1e3, edges="linear")
    found = rank_checkpoints(caches, params=params)
    expected = []
    for cache in caches:
        view = cache["id/train"]
        correct = [int(np.argmax(row)) == one for row, one in zip(view.logits[:], view.label, strict=True)]
        assert any(correct)
        products = read_source(view, "avgpool")
        expected.append(oracle.covered_area(products, correct, bins=50, saturation=20, alpha=1e3))
    assert expected[0] != expected[1]
    np.testing.assert_allclose(found.checkpoints["area_avgpool"], expected, rtol=1e-12)
    assert found.chosen == f"step-{int(np.argmax(expected)):06}"


def test_training_goes_on_as_if_nobody_had_looked(tmp_path: Path) -> None:
    """With dropout, batch norm and an optimizer's momentum: the same weights to the last bit."""
    ends = []
    for look in (False, True):
        torch.manual_seed(0)
        network = DigitsCNN()
        network.add_module("avgpool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Dropout(0.5)))
        optimizer = torch.optim.Adam(network.parameters())
        snapshots = Snapshots(tmp_path, {"id/train": batches("val", slice(64))}, ["layer2"])
        for step, (x, y) in enumerate(batches("main_train", slice(96), 32)):
            loss = nn.functional.cross_entropy(network(x), y)
            optimizer.zero_grad()
            if look:
                snapshots(network, step)
            loss.backward()
            optimizer.step()
        ends.append({key: value.clone() for key, value in network.state_dict().items()})
        assert all(module.training for module in network.modules())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    good = batches("val", slice(8))
    with pytest.raises(InputError, match="split 'train' is not known here; known: id/train"):
        Snapshots(tmp_path, {"train": good}, ["avgpool"])
    with pytest.raises(InputError, match=r"the splits are id/val; id/train is needed"):
        Snapshots(tmp_path, {"id/val": good}, ["avgpool"])
    with pytest.raises(InputError, match=r"^split csid/mean: the name of its set is reserved, tables name the mean"):
        Snapshots(tmp_path, {"id/train": good, "csid/mean": good}, ["avgpool"])
    with pytest.raises(InputError, match="id/train has no samples"):
        Snapshots(tmp_path, {"id/train": []}, ["avgpool"])(DigitsCNN(), 0)
    with pytest.raises(InputError, match="layer 'layer9' is not known for DigitsCNN"):
        Snapshots(tmp_path, {"id/train": good}, ["layer9"])(DigitsCNN(), 0)
    snapshots = Snapshots(tmp_path, {"id/train": good, "id/val": []}, ["avgpool"])
    with pytest.raises(InputError, match="id/val has no samples"):
        snapshots(DigitsCNN(), 0)
    with pytest.raises(IdentityError, match=r"step-000000\.zarr was made from something else: weights"):
        snapshots(DigitsCNN(), 0)


@pytest.mark.slow
def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains for half a minute. In float64, held to AVX2, so that the numbers are the page's on all x86 machines."""
    page = (ROOT / "docs/model-selection.md").read_text("utf-8")
    (program,) = re.findall(r"```python\n# train\.py\n(.*?)```", page, re.DOTALL)
    (session,) = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    (tmp_path / "train.py").write_text(program)
    held = {"MKL_CBWR": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    environment = {**os.environ, **held, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "train.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    monkeypatch.chdir(tmp_path)
    first, second, *expected = session.splitlines()
    assert (first, second) == ("$ python train.py", "$ nacpipe rank run/*.zarr")
    caches = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("run/*.zarr"))
    found = CliRunner().invoke(main, ["rank", *caches])
    assert found.exit_code == 0, found.stderr
    assert found.stdout.splitlines() == expected
