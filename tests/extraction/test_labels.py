"""Labels of ID and csid sets that are no classes are refused before anything runs, by list and line, or by number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

from nacpipe.benchmarks.standard import Benchmark, Split, Transform
from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.cli import main
from nacpipe.errors import InputError
from nacpipe.evaluation.baselines import BASELINES, score_baselines
from nacpipe.evaluation.method_scores import evaluated_splits
from nacpipe.extraction.callback import Snapshots
from nacpipe.extraction.dataset import open_images
from nacpipe.method.metrics import find_wrong_labels

pytestmark = pytest.mark.usefixtures("one_thread")

SETS = ("id.train", "id.subtrain", "id.val", "id.test", "csid.shifted")
HEAD = 'name = "own"\nclasses = 3\ntransform = {resize = 8, crop = 8, mean = [0.5, 0.5, 0.5], std = [1, 1, 1]}\n'
NET = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
"""


def test_which_labels_are_no_classes() -> None:
    assert find_wrong_labels(np.array([0, 3, 2, -1, 1, 2**40]), 3).tolist() == [1, 3, 5]
    assert find_wrong_labels(np.array([0, 2]), 3).tolist() == []


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A benchmark of one image, listed six times for every set; OOD labels are no classes."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    Path("net.py").write_text(NET)
    for name in SETS:
        Path(f"{name}.txt").write_text("".join(f"a.png {i % 3}\n" for i in range(6)))
    Path("ood.txt").write_text("a.png -1\na.png 7\n")
    tables = [f'[{name}]\nlist = "{name}.txt"\n' for name in SETS]
    Path("b.toml").write_text(HEAD + "".join(tables) + '[ood.val]\nlist = "ood.txt"\n[ood.far.x]\nlist = "ood.txt"\n')
    return tmp_path


def extract(*args: str) -> Result:
    command = ["extract", "b.toml", "--model", "net.py:net", "--layers", "2", "--cache", "c.zarr", "--device", "cpu"]
    return CliRunner().invoke(main, [*command, *args], prog_name="nacpipe")


@pytest.mark.parametrize("more", [("--dry-run",), ()])
@pytest.mark.parametrize("label", ["3", "-1", "{'label': 12}", "{'x': 1}"])
@pytest.mark.parametrize("name", SETS)
def test_lists_are_refused_by_file_and_line(place: Path, name: str, label: str, more: tuple[str, ...]) -> None:
    lines = Path(f"{name}.txt").read_text().splitlines()
    lines[4] = f"a.png {label}"
    Path(f"{name}.txt").write_text("\n".join(lines))
    value = {"{'label': 12}": "12", "{'x': 1}": "-1"}.get(label, label)
    done = extract(*more)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == (
        f"nacpipe: {name.replace('.', '/')}: 1 of 6 labels are outside 0 … 2; the first is {value}, of a.png (line 5 of"
        f" {name}.txt); correct the labels, or the benchmark's number of classes\n"
    )
    assert not Path("c.zarr").exists()


@pytest.mark.parametrize("more", [("--dry-run",), ()])
@pytest.mark.parametrize("name", SETS)
def test_torchvisions_sets_are_refused_by_number(place: Path, name: str, more: tuple[str, ...]) -> None:
    text = Path("b.toml").read_text()
    fake = 'torchvision = "FakeData"\nsize = 9\nimage_size = [3, 8, 8]\nnum_classes = 5'
    Path("b.toml").write_text(text.replace(f'list = "{name}.txt"', fake))
    split = Split(name="id/val", source="FakeData", kind="torchvision",
                  arguments={"size": 9, "image_size": [3, 8, 8], "num_classes": 5})  # fmt: skip
    transform = Transform(resize=8, crop=8, mean=(0.5,), std=(1.0,))
    benchmark = Benchmark(name="own", classes=5, transform=transform, splits=(split,))
    images = open_images(benchmark, split, place, train_images=1, train_seed=1)
    assert images is not None
    wrong = np.flatnonzero(images.labels > 2)
    done = extract(*more)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == (
        f"nacpipe: {name.replace('.', '/')}: {wrong.size} of 9 labels are outside 0 … 2; the first is"
        f" {images.labels[wrong[0]]}, of number {wrong[0]} of FakeData; correct the labels, or the benchmark's number"
        " of classes\n"
    )
    assert not Path("c.zarr").exists()


def test_labels_of_ood_sets_and_of_sets_that_are_not_asked_for_are_not_looked_at(place: Path) -> None:
    Path("csid.shifted.txt").write_text("a.png 99\n")
    done = extract("--splits", "id/train,id/val,ood/val,ood/far/x", "--train-images", "6")
    assert done.exit_code == 0, done.stderr
    assert open_cache("c.zarr")["ood/far/x"].label.tolist() == [-1, 7]
    refused = extract("--train-images", "6")  # the others are asked for
    assert (refused.exit_code, "csid/shifted: 1 of 1 labels are outside 0 … 2" in refused.stderr) == (1, True)


# --- caches that have such labels already -----------------------------------------------------------------------------


@pytest.fixture
def wrong_cache(
    write_cache: Callable[..., Cache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, int]], Cache]:
    """The function that makes a cache in which the first labels of a split are of class 12 and −1."""

    def make(counts: dict[str, int]) -> Cache:
        prepare = CacheWriter.prepare

        def prepare_wrong(self: CacheWriter, name: str, *args: Any, label: NDArray[np.int64], **known: Any) -> Any:
            if name in counts:
                label = label.copy()
                label[: counts[name]] = np.resize([12, -1], counts[name])
            return prepare(self, name, *args, label=label, **known)

        with monkeypatch.context() as patch:
            patch.setattr(CacheWriter, "prepare", prepare_wrong)
            return write_cache(tmp_path / "c.zarr", rows={"csid/shifted": 25})

    return make


@pytest.mark.parametrize("split", ["id/val", "id/train"])
@pytest.mark.parametrize("count", [1, 2])  # class 12 alone, and a −1 beside it
@pytest.mark.slow
def test_baselines_say_why_they_are_empty(
    wrong_cache: Callable[[dict[str, int]], Cache], split: str, count: int
) -> None:
    cache = wrong_cache({split: count})
    rows = {"id/train": 60, "id/val": 40}[split]
    found = score_baselines(cache, ["all"], evaluated_splits(cache))
    fitted = {name for name, method in found.items() if method.fitted_on == split and BASELINES[name].labels}
    assert {"id/val": {"Temperature"}, "id/train": {"OpenMax", "Mahalanobis", "SHE"}}[split] <= fitted
    for name in fitted:
        assert set(found[name].reasons.values()) == {f"{count} of {rows} labels of {split} are outside 0 … 2"}
    assert any(found[name].scores for name in BASELINES if name not in fitted)


def test_evaluate_says_that_accuracy_counts_them_as_wrong(wrong_cache: Callable[[dict[str, int]], Cache]) -> None:
    cache = wrong_cache({"id/val": 3, "id/test": 4, "csid/shifted": 2, "ood/far/textures": 5})
    (Path(cache.path).parent / "c.params.json").write_text(
        '{"layers": {"avgpool": {"bins": 20, "saturation": 5, "alpha": 0.5}}}'
    )
    done = CliRunner().invoke(main, ["evaluate", cache.path, "--baselines", "all"])
    assert done.exit_code == 0, done.stderr
    assert done.stderr.splitlines() == [
        "4 of 50 labels of id/test are outside 0 … 2; accuracy counts them as wrong. 2 of 25 labels of csid/shifted are"
        " outside 0 … 2; accuracy counts them as wrong"
    ]
    assert "3 of 40 labels of id/val are outside 0 … 2" in done.stdout


def test_a_cache_with_right_labels_says_nothing(small_cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"layers": {"avgpool": {"bins": 20, "saturation": 5, "alpha": 0.5}}}')
    done = CliRunner().invoke(main, ["evaluate", small_cache.path, "--params", str(tmp_path / "p.json")])
    assert (done.exit_code, done.stderr) == (0, "")


@pytest.mark.parametrize("split", ["csid/shifted", "id/val"])
@pytest.mark.slow
def test_rank_refuses_accuracies_of_wrong_labels(
    wrong_cache: Callable[[dict[str, int]], Cache], tmp_path: Path, split: str
) -> None:
    cache = wrong_cache({split: 2})
    done = CliRunner().invoke(main, ["rank", cache.path])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == (
        f"nacpipe: 2 of {cache[split].rows} labels of {split} in {cache.path} are outside 0 … 2, so that its accuracy"
        " would be wrong; give --accuracies FILE\n"
    )
    (tmp_path / "a.csv").write_text("checkpoint,test_in\nc,0.5\n")
    done = CliRunner().invoke(main, ["rank", cache.path, "--accuracies", str(tmp_path / "a.csv")])
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize(("split", "label"), [("id/train", 3), ("id/val", -1), ("csid/shifted", 12)])
@pytest.mark.repeats(1)
def test_a_training_loops_labels_are_refused_too(tmp_path: Path, split: str, label: int) -> None:
    images = torch.zeros(5, 3, 8, 8)
    right = [(images, torch.tensor([0, 1, 2, 0, 1]))]
    wrong = [right[0], (images, torch.tensor([0, label, 2, 0, 1]))]
    splits = {"id/train": right, "id/val": right, "csid/shifted": right, split: wrong}
    namespace: dict[str, Callable[[], torch.nn.Module]] = {}
    exec(NET, namespace)
    network = namespace["net"]()
    message = (
        rf"^{split}: 1 of 10 labels are outside 0 … 2; the first is {label}, of image 6 of its batches; correct the"
        " labels, or the benchmark's number of classes$"
    )
    with pytest.raises(InputError, match=message):
        Snapshots(tmp_path, splits, ["2"])(network, 1)
