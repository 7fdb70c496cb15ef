"""`nacpipe data`, a plan for a folder that holds only lists, and one cache for each training run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from nacpipe.benchmarks import download
from nacpipe.benchmarks.standard import find_benchmark
from nacpipe.cache import open_cache
from nacpipe.cli import main
from nacpipe.networks.models import find_model

pytestmark = pytest.mark.usefixtures("one_thread")


def nacpipe(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), prog_name="nacpipe")


def write_lists(root: Path, benchmark: str, rows: int = 20, images: bool = False) -> None:
    """Lists of every set of a benchmark but id/subtrain's; of id/train the whole one."""
    known = find_benchmark(benchmark)
    lists = root / "benchmark_imglist" / benchmark
    lists.mkdir(parents=True)
    for split in known.splits:
        if split.name == "id/subtrain":
            continue
        stem = (split.fallback or split.source).removesuffix(".txt")
        count = max(rows, known.classes if split.name.startswith("id/") else 0)
        label = (lambda i: -1) if split.name.startswith("ood/") else (lambda i: i % known.classes)
        lines = [f"{stem}/{i}.png {label(i)}" for i in range(count)]
        (lists / f"{stem}.txt").write_text("\n".join(lines))
        if images:
            (root / split.folder / stem).mkdir(parents=True)
            for i in range(rows):
                pixels = np.random.RandomState(i).randint(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(root / split.folder / stem / f"{i}.png")


@pytest.mark.parametrize("command", ["status", "download", "split-train"])
def test_every_command_shows_itself_at_work(command: str) -> None:
    printed = nacpipe("data", command, "--help")
    assert printed.exit_code == 0
    assert re.search(rf"^ +nacpipe data {command} cifar10 ", printed.stdout, re.MULTILINE)
    assert re.search(rf"^ +nacpipe data {command} cifar10", nacpipe("data", "--help").stdout, re.MULTILINE)


def test_status_says_what_is_there_and_what_to_do(tmp_path: Path) -> None:
    write_lists(tmp_path, "cifar100", images=True)
    root = str(tmp_path)
    (tmp_path / "images_classic/test_mnist/3.png").unlink()
    printed = nacpipe("data", "status", "cifar100", "--data-root", root)
    assert printed.exit_code == 0
    lines = {line.split()[0]: line.split() for line in printed.stdout.splitlines()}
    assert lines["ood/far/svhn"] == ["ood/far/svhn", "test_svhn.txt", "complete", "20"]
    assert lines["ood/far/mnist"] == ["ood/far/mnist", "test_mnist.txt", "incomplete", "20", "1"]
    assert lines["id/subtrain"][2:] == ["no", "list"]
    assert "ood/far/mnist: 1 of 20 images are not there, the first " in printed.stderr
    assert f"get what is missing: nacpipe data download cifar100 --data-root {root}" in printed.stderr
    found = json.loads(nacpipe("data", "status", "cifar100", "--data-root", root, "--json").stdout)
    row = next(row for row in found if row["split"] == "ood/far/mnist")
    assert row == {
        "split": "ood/far/mnist", "list": "test_mnist.txt", "images": 20, "missing": 1, "wrong_labels": 0,
        "state": "incomplete",
    }  # fmt: skip
    assert "in Python packages" in nacpipe("data", "status", "digits").stdout


def test_status_names_labels_that_are_no_classes(tmp_path: Path) -> None:
    write_lists(tmp_path, "cifar10", images=True)
    file = tmp_path / "benchmark_imglist/cifar10/test_cifar10.txt"
    file.write_text(file.read_text().replace("3.png 3", "3.png 12").replace("7.png 7", "7.png -1"))
    args = ("data", "status", "cifar10", "--data-root", str(tmp_path))
    printed = nacpipe(*args)
    assert printed.exit_code == 1
    assert re.search(r"^id/test +test_cifar10\.txt +wrong labels +20$", printed.stdout, re.MULTILINE)
    assert printed.stderr.splitlines()[0] == (
        f"id/test: 4 of 20 labels are outside 0 … 9; the first is 12, of {tmp_path}/images_classic/test_cifar10/3.png"
        f" (line 4 of {file}); correct the labels, or the benchmark's number of classes"
    )
    printed = nacpipe(*args, "--json")
    assert printed.exit_code == 1
    rows = json.loads(printed.stdout)
    assert {row["split"]: row["wrong_labels"] for row in rows if row["wrong_labels"]} == {"id/test": 4}


def test_status_of_the_authors_lists_asks_for_no_more(tmp_path: Path) -> None:
    """OpenOOD's have imagenet_es: without the authors' mark it is what is missing."""
    write_lists(tmp_path, "imagenet", images=True)
    (tmp_path / "benchmark_imglist/imagenet/test_imagenet_es.txt").unlink()
    for name in ("train_imagenet", "val_imagenet", "test_imagenet"):  # 1,000 lines for 20 images
        (tmp_path / f"benchmark_imglist/imagenet/{name}.txt").write_text(f"{name}/0.png 0\n")
    command = ("data", "status", "imagenet", "--data-root", str(tmp_path))
    printed = nacpipe(*command)
    assert re.search(r"^csid/imagenet_es +test_imagenet_es\.txt +no list", printed.stdout, re.MULTILINE)
    assert "get what is missing" in printed.stderr
    (tmp_path / ".download").mkdir()
    (tmp_path / ".download/benchmark_imglist_authors.done").touch()
    assert "get what is missing" not in nacpipe(*command).stderr
    plan = nacpipe("data", "download", "imagenet", "--data-root", str(tmp_path), "--dry-run").stdout
    assert not re.search(r"^(imagenet_es|benchmark_imglist) ", plan, re.MULTILINE)
    assert re.search(r"^benchmark_imglist_authors +unpacked before ", plan, re.MULTILINE)


def test_split_train_writes_two_lists(tmp_path: Path) -> None:
    write_lists(tmp_path, "cifar10", rows=50)
    args = ("data", "split-train", "cifar10", "--data-root", str(tmp_path), "--count", "20")
    printed = nacpipe(*args)
    assert printed.exit_code == 0
    assert re.search(r"main_train_cifar10\.txt +30$", printed.stdout, re.MULTILINE)
    assert re.search(r"sub_train_cifar10\.txt +20$", printed.stdout, re.MULTILINE)
    again = nacpipe(*args)
    assert (again.exit_code, "--redo replaces both lists" in again.stderr) == (1, True)
    assert nacpipe(*args, "--redo").exit_code == 0


def test_download_prints_its_plan(tmp_path: Path) -> None:
    printed = nacpipe("data", "download", "cifar10", "--data-root", str(tmp_path), "--dry-run", "--only", "mnist")
    assert printed.stdout.splitlines()[1].split() == [
        *("mnist", "to", "fetch", f"{tmp_path}/images_classic/mnist"),
        "https://drive.google.com/uc?id=1CCHAGWqA1KJTFFswuF9cbhmB-j98Y1Sb",
    ]
    assert not list(tmp_path.iterdir())
    refused = nacpipe("data", "download", "digits")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)


def test_download_prints_the_status_and_fails_where_files_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lists(tmp_path, "cifar10")
    lists = tmp_path / "benchmark_imglist/cifar10"
    (lists / "test_mnist.txt").write_text("mnist/a.png -1\nmnist/b.png -1\n")

    def fetch(url: str, file: Path) -> None:
        assert url == "http://here/mnist.zip"
        import zipfile

        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.png", b"")

    monkeypatch.setattr(download, "fetch_with_gdown", fetch)
    args = ("data", "download", "cifar10", "--data-root", str(tmp_path), "--only", "mnist", "--mirror", "http://here")
    printed = nacpipe(*args)
    assert printed.exit_code == 1
    assert printed.stderr.startswith("mnist: to fetch from http://here/mnist.zip\n")
    assert printed.stderr.splitlines()[-1].startswith("nacpipe: mnist: 1 of 2 listed files are not there, the first ")
    assert re.search(r"^ood/far/mnist +test_mnist\.txt +incomplete +2 +1$", printed.stdout, re.MULTILINE)


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_imagenet_is_planned_from_its_lists_alone(tmp_path: Path) -> None:
    write_lists(tmp_path, "imagenet")
    args = ("extract", "imagenet", "--model", "resnet50", "--data-root", str(tmp_path), "--dry-run")
    cache = ("--cache", str(tmp_path / "c.zarr"))
    printed = nacpipe(*args, *cache)
    assert printed.exit_code == 0, printed.stderr
    lines = {line.split()[0]: line.split() for line in printed.stdout.splitlines() if line}
    assert lines["id/train"][:4] == ["id/train", "train_imagenet.txt", "1000", "1000"]
    assert lines["csid/imagenet_c"][:4] == ["csid/imagenet_c", "test_imagenet_c.txt", "20", "20"]
    assert lines["ood/far/textures"][:4] == ["ood/far/textures", "test_textures.txt", "20", "20"]
    plan = json.loads(nacpipe(*args, *cache, "--json").stdout)
    assert {split["missing"] for split in plan["splits"]} == {20, 1000}
    assert {split["split"] for split in plan["splits"]} | {"id/subtrain"} == {
        split.name for split in find_benchmark("imagenet").splits
    }


# --- training runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "results/cifar10_resnet20_default"
    for run in range(2):
        (folder / f"s{run}").mkdir(parents=True)
        torch.manual_seed(run)
        torch.save(find_model("resnet20").build(10).state_dict(), folder / f"s{run}/best.ckpt")
    return folder


@pytest.mark.slow
def test_every_run_makes_a_cache(tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_lists(tmp_path / "data", "cifar10", images=True)
    args = ("extract", "cifar10", "--model", "resnet20", "--checkpoint", str(runs))
    args = (*args, "--splits", "id/val,ood/val", "--layers", "avgpool")
    planned = json.loads(nacpipe(*args, "--dry-run", "--json").stdout)
    assert [plan["cache"] for plan in planned] == ["cache/cifar10-resnet20-s0.zarr", "cache/cifar10-resnet20-s1.zarr"]
    printed = nacpipe(*args)
    assert printed.exit_code == 0, printed.stderr
    caches = [open_cache(plan["cache"]) for plan in planned]
    assert all(cache["id/val"].rows == 20 for cache in caches)
    assert caches[0].header.identity["weights"] != caches[1].header.identity["weights"]
    assert printed.stderr.splitlines()[-2:] == [
        "a search needs id/train too",
        f"next: {caches[1].command()}",
    ]
    assert [line for line in printed.stdout.splitlines() if line.startswith("cache/")] == [c.path for c in caches]
    assert nacpipe(*args, "--cache", "{run}/mine.zarr", "--dry-run", "--json").stdout.count("s1/mine.zarr") == 1
    made = json.loads(nacpipe(*args, "--json").stdout)
    assert [entry["cache"] for entry in made] == [c.path for c in caches]


def test_run_takes_one_run_alone(tmp_path: Path, runs: Path) -> None:
    refused = nacpipe("run", "cifar10", "--model", "resnet20", "--checkpoint", str(runs))
    assert refused.exit_code == 1
    assert refused.stderr == (
        f"nacpipe: checkpoint {runs} is a folder of 2 runs; name one of them, or make a cache of each with: nacpipe"
        " extract\n"
    )
    refused = nacpipe("extract", "cifar10", "--model", "resnet20", "--checkpoint", str(tmp_path))
    assert refused.stderr == (
        f"nacpipe: checkpoint {tmp_path} is a folder without a checkpoint or run folders s0, s1, …; name a file\n"
    )
