"""`reproduce`: from archives of a server on this machine to the published rows beside ours; what is missing is told."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from nacpipe.benchmarks.standard import find_benchmark
from nacpipe.cache import open_cache
from nacpipe.cli import main
from nacpipe.evaluation.published_results import published_results
from nacpipe.evaluation.reproduction import REPRODUCTIONS, find_reproduction
from nacpipe.evaluation.tables import evaluate
from nacpipe.method.published import PUBLISHED
from nacpipe.networks.models import find_model
from tests.benchmarks.conftest import Server, pack, server  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("one_thread")
CIFAR10 = find_benchmark("cifar10")
ROWS = 12


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, ["reproduce", *map(str, args)], prog_name="nacpipe")


def make_archives(server: Server) -> None:  # noqa: F811
    """Small pictures, the authors' lists, and two runs of random weights, as OpenOOD's archives have them."""
    lists: dict[str, bytes] = {}
    pictures: dict[str, dict[str, bytes]] = {}
    rng = np.random.default_rng(0)
    for split in CIFAR10.splits:
        if split.name == "id/subtrain" or split.name.startswith("csid/"):
            continue
        source = split.fallback or split.source
        archive = {"val_tin.txt": "tin", "val_cifar10.txt": "cifar10", "train_cifar10.txt": "cifar10"}.get(
            source, source.removeprefix("test_").removesuffix(".txt")
        )
        stem = source.removesuffix(".txt")
        count = 20 if split.name == "id/train" else ROWS
        label = (lambda row: -1) if split.name.startswith("ood/") else (lambda row: row % 10)
        lines = [f"{archive}/{stem}/{row}.png {label(row)}" for row in range(count)]
        lists[f"benchmark_imglist/cifar10/{source}"] = "\n".join(lines).encode()
        for row in range(count):
            content = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(content, "png")
            pictures.setdefault(archive, {})[f"{stem}/{row}.png"] = content.getvalue()
    server.files["benchmark_imglist_authors.zip"] = pack(lists)
    for archive, files in pictures.items():
        server.files[f"{archive}.zip"] = pack(files)
    weights = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        content = io.BytesIO()
        torch.save(find_model("resnet18_32x32").build(10).state_dict(), content)
        weights[f"{REPRODUCTIONS['cifar10'].weights}/s{seed}/best.ckpt"] = content.getvalue()
    server.files["cifar10_res18_v1.5.zip"] = pack(weights)


def test_a_dry_run_says_what_is_missing_and_how_to_get_it(tmp_path: Path) -> None:
    root, results = tmp_path / "data", tmp_path / "results"
    words = ("cifar10", "--data-root", root, "--results", results)
    done = run(*words, "--dry-run", "--mirror", "http://mirror")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    wanted = [*find_reproduction("cifar10").splits(CIFAR10)]
    assert [line.split()[0] for line in lines] == ["missing", *wanted, "checkpoints"]
    assert "csid/cifar10c" not in done.stdout
    get = f"nacpipe data download cifar10 --data-root {root}"
    assert done.stderr.splitlines() == [
        f"get it with: {get} --only benchmark_imglist_authors --mirror http://mirror && {get} --only"
        " cifar10,cifar100,tin,mnist,svhn,texture,places365 --mirror http://mirror",
        f"get it with: {get} --only cifar10_res18_v1.5 --results {results} --mirror http://mirror",
    ]
    refused = run(*words)
    assert refused.exit_code == 1
    assert "id/train, id/val, id/test, ood/near/cifar100" in refused.stderr
    assert "not there; get them with --download, or with: nacpipe data download cifar10" in refused.stderr
    rows = json.loads(run(*words, "--dry-run", "--json").stdout)
    table = pd.read_csv(io.StringIO(run(*words, "--dry-run", "--csv").stdout))
    assert table.to_dict("records") == rows
    assert [row["what"] for row in rows] == [*wanted, "checkpoints"]


@pytest.mark.slow
def test_from_a_mirror_to_the_published_rows_beside_ours(server: Server, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("gdown")
    make_archives(server)
    words: list[Any] = ["cifar10", "--data-root", tmp_path / "data", "--results", tmp_path / "results"]
    words += ["--cache", tmp_path / "{run}.zarr", "--batch-size", "16", "--device", "cpu"]
    done = run(*words, "--download", "--mirror", server.url, "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    published = [
        (result.group, result.dataset, metric, getattr(result, metric))
        for result in published_results("cifar10")
        for metric in ("auroc", "fpr95")
        if result.method == "NAC-UE" and getattr(result, metric) is not None
    ]
    assert [(row["group"], row["dataset"], row["metric"], row["published"]) for row in rows] == published
    tables = {
        name: evaluate(open_cache(tmp_path / f"{name}.zarr"), PUBLISHED["cifar10", "resnet"]) for name in ("s0", "s1")
    }
    for row in rows:
        for name, table in tables.items():
            place = (table.task == "ood") & (table.method == "NAC") & (table.group == row["group"])
            (value,) = table[place & (table.dataset == row["dataset"])][row["metric"]]
            assert row[name] == pytest.approx(value, abs=1e-12)
        assert row["ours"] == pytest.approx((row["s0"] + row["s1"]) / 2)
        assert row["ours_std"] == pytest.approx(abs(row["s0"] - row["s1"]) / 2)
        assert row["difference"] == pytest.approx(row["ours"] - row["published"])
    assert len({row["s0"] for row in rows}) > 3
    asked = len(server.asked)
    table = run(*words, "--download", "--mirror", server.url)
    assert table.exit_code == 0, table.output
    assert len(server.asked) == asked  # nothing is fetched twice
    first = rows[0]
    head, line, *_ = table.stdout.splitlines()
    assert head.split() == ["set", "metric", "published", "s0", "s1", "ours", "difference"]
    assert line.split()[:5] == ["far", "mnist", "AUROC", "94.86", f"{100 * first['s0']:.2f}"]
    assert line.split()[-1] == f"{100 * first['difference']:+.2f}"
    assert "ResNet-18 on cifar10; parameters: the paper's" in table.stdout
    assert "nothing is missing" in run(*words, "--dry-run").stderr


def test_every_benchmark_of_the_paper_has_a_reproduction() -> None:
    for name, reproduction in REPRODUCTIONS.items():
        find_model(reproduction.model)
        assert {"id/train", "id/val", "id/test"} <= set(reproduction.splits(find_benchmark(name)))
        assert any(result.method == "NAC-UE" for result in published_results(name))
        assert reproduction.archives()[0] == "benchmark_imglist_authors"
        assert not math.isnan(next(r.auroc for r in published_results(name) if r.method == "NAC-UE"))
    assert [name for name, reproduction in REPRODUCTIONS.items() if reproduction.params is None] == ["imagenet200"]


def test_a_benchmark_without_published_rows() -> None:
    done = run("digits")
    assert done.exit_code == 1
    assert (
        "no published rows can be reproduced for digits; known: cifar10, cifar100, imagenet200, imagenet" in done.stderr
    )
