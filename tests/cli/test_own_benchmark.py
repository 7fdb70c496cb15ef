"""docs/own-benchmark.md, as it stands: its file and its commands on small made-up pictures and a random ResNet-20."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms

from nacpipe.benchmarks.synthetic import make_synthetic
from nacpipe.cache import open_cache
from nacpipe.cache.options import read_options
from nacpipe.cli import main
from nacpipe.method.metrics import detect
from nacpipe.networks.models import find_model
from nacpipe.reporting.image_lookup import find_benchmark
from nacpipe.scoring.coverage import score_splits
from nacpipe.scoring.params_file import read_params

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (Path(__file__).resolve().parents[2] / "docs/own-benchmark.md").read_text("utf-8")
CLASSES = ("circle", "square", "triangle")
ROWS = {
    "id/train": 30,
    "id/val": 21,
    "id/test": 15,
    "csid/blurred": 8,
    "ood/val": 18,
    "ood/near/crosses": 9,
    "ood/far/noise": 40,
}


def block(kind: str) -> str:
    (found,) = re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


def shortest() -> str:
    """The file at the page's start."""
    lines = PAGE.partition("\n    ")[2].splitlines()
    end = next(i for i, line in enumerate(lines) if i and line and not line.startswith("    "))
    return "\n".join(line.removeprefix("    ") for line in lines[:end])


def nacpipe(*args: str) -> Result:
    printed = CliRunner().invoke(main, list(args), prog_name="nacpipe")
    assert printed.exit_code == 0, printed.stderr
    return printed


def draw(path: Path, rng: np.random.RandomState) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.randint(0, 256, (32, 32, 3), np.uint8)).save(path)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder with the page's file, pictures and weights."""
    monkeypatch.chdir(tmp_path)
    Path("shapes.toml").write_text(block("toml"))
    rng, root = np.random.RandomState(0), Path("pictures")
    for i in range(ROWS["id/train"]):
        draw(root / "train" / CLASSES[i % 3] / f"{i}.png", rng)
    for i in range(ROWS["csid/blurred"]):  # has no squares
        draw(root / "blurred" / ("circle", "triangle")[i % 2] / f"{i}.png", rng)
    for i in range(ROWS["ood/val"]):
        draw(root / "stars" / f"{i}.png", rng)
    (root / "lists").mkdir()
    for name, split in {"val": "id/val", "test": "id/test", "crosses": "ood/near/crosses"}.items():
        for i in range(ROWS[split]):
            draw(root / "photos" / name / f"{i}.png", rng)
        label = (lambda i: -1) if name == "crosses" else (lambda i: i % 3)
        (root / f"lists/{name}.txt").write_text("".join(f"{name}/{i}.png {label(i)}\n" for i in range(ROWS[split])))
    torch.manual_seed(0)
    torch.save(find_model("resnet20").build(3).state_dict(), "shapes.pth")
    return tmp_path


@pytest.mark.slow
def test_the_page_runs_as_it_stands(place: Path) -> None:
    lines = block("sh").splitlines()
    assert [line.split()[1] for line in lines] == ["data", "extract", "extract", "search", "evaluate"]
    printed = []
    for line in lines:
        command = shlex.split(line)[1:]
        printed.append(nacpipe(*command, *(["--trials", "3"] if command[0] == "search" else [])).stdout)
    assert re.search(r"^ood/near/crosses +lists/crosses\.txt +complete +9$", printed[0], re.MULTILINE)
    assert re.search(r"^ood/far/noise +FakeData +torchvision's", printed[0], re.MULTILINE)
    assert re.search(r"^ood/far/noise +FakeData +40 +1 +1 ", printed[1], re.MULTILINE)
    assert "near crosses" in printed[4]
    assert "FS-OOD: ID is id/test and csid together (23 images" in printed[4]
    cache = open_cache("cache/shapes-resnet20.zarr")
    assert {name: cache[name].rows for name in cache} == ROWS
    assert cache.header.identity["benchmark"] == "shapes"
    assert cache.header.information["data_root"] == "pictures"
    options = read_options(cache.header.information)
    assert options is not None
    assert (options.benchmark, options.model, options.checkpoint) == ("shapes.toml", "resnet20", Path("shapes.pth"))
    benchmark, root = find_benchmark(cache, None, None)
    assert (benchmark.name, root) == ("shapes", Path("pictures"))
    assert sorted(np.asarray(cache["csid/blurred"].label).tolist()) == [0] * 4 + [2] * 4
    assert cache["id/test"].label.tolist() == [i % 3 for i in range(15)]
    assert set(cache["ood/far/noise"].label.tolist()) == {-1}


@pytest.mark.slow
def test_a_set_that_comes_later_is_added_and_one_that_changes_is_refused(place: Path) -> None:
    crosses = place / "pictures/lists/crosses.txt"
    crosses.rename(crosses.with_suffix(".later"))
    extract = ["extract", "shapes.toml", "--model", "resnet20", "--checkpoint", "shapes.pth"]
    printed = nacpipe(*extract, "--splits", "id/train,id/val,ood/val")
    assert "ood/near" not in printed.stdout
    printed = nacpipe(*extract)
    assert "ood/near/crosses: left out, its list is not there (lists/crosses.txt)" in printed.stderr
    crosses.with_suffix(".later").rename(crosses)
    cache = open_cache("cache/shapes-resnet20.zarr")
    assert "ood/near/crosses" not in cache
    nacpipe(*extract)
    assert open_cache("cache/shapes-resnet20.zarr")["ood/near/crosses"].rows == 9

    (place / "pictures/stars/0.png").rename(place / "pictures/stars/zero.png")
    refused = CliRunner().invoke(main, extract)
    assert refused.exit_code == 1
    assert "ood/val was made from other images: sha256: stored " in refused.stderr
    (place / "pictures/stars/zero.png").rename(place / "pictures/stars/0.png")
    path = place / "shapes.toml"
    path.write_text(path.read_text().replace("size = 40", "size = 40\nrandom_offset = 1"))
    refused = CliRunner().invoke(main, extract)
    assert "ood/far/noise was made from other images: arguments.random_offset: stored nothing, now 1" in refused.stderr


def test_another_root_and_a_missing_set(place: Path) -> None:
    extract = ["extract", "shapes.toml", "--model", "resnet20", "--checkpoint", "shapes.pth", "--dry-run", "--json"]
    (place / "pictures").rename(place / "elsewhere")
    refused = CliRunner().invoke(main, extract)
    assert refused.exit_code == 1
    assert refused.stderr == (
        "nacpipe: id/train: there is no folder of images pictures/train; say where the data is with --data-root DIR\n"
    )
    plan = json.loads(nacpipe(*extract, "--data-root", "elsewhere").stdout)
    assert {split["split"]: split["rows"] for split in plan["splits"]} == ROWS


def test_pre_resized_images_keep_their_size(place: Path) -> None:
    path = place / "shapes.toml"
    path.write_text(path.read_text().replace('folders = "blurred"', 'folders = "blurred"\npre_resized = true'))
    rng = np.random.RandomState(1)
    pixels = rng.randint(0, 256, (8, 40, 48, 3), np.uint8)
    for image, file in zip(pixels, sorted((place / "pictures/blurred").rglob("*.png")), strict=True):
        Image.fromarray(image).save(file)
    extract = ["extract", "shapes.toml", "--model", "resnet20", "--checkpoint", "shapes.pth", "--device", "cpu"]
    nacpipe(*extract, "--splits", "csid/blurred")
    network = find_model("resnet20").build(3).eval()
    network.load_state_dict(torch.load("shapes.pth", weights_only=True))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # the network's own
    images = torch.from_numpy(((pixels / 255 - mean) / std).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = network(images).numpy()
    split = open_cache("cache/shapes-resnet20.zarr")["csid/blurred"]
    np.testing.assert_allclose(np.asarray(split.logits), expected, rtol=1e-4, atol=1e-5)
    path.write_text(path.read_text().replace("pre_resized = true", ""))
    refused = CliRunner().invoke(main, [*extract, "--splits", "csid/blurred"])
    assert "csid/blurred was made from other images: untouched: stored true, now nothing" in refused.stderr


def test_your_own_network_on_your_own_benchmark(place: Path) -> None:
    """Extract, search and evaluate, layers by module path, one pooling guessed and said, one given."""
    (place / "mine.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef network():\n    torch.manual_seed(0)\n"
        "    start = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]\n"
        "    return nn.Sequential(*start, nn.Linear(6, 3))\n"
    )
    options = ["--model", "mine.py:network", "--layers", "0,2", "--pooling", "2=sum-nchw", "--cache", "mine.zarr"]
    options += ["--device", "cpu"]
    extracted = nacpipe("extract", "shapes.toml", *options)
    assert "sum-nchw" in extracted.stderr
    cache = open_cache("mine.zarr")
    assert [(s.name, s.path, s.pooling, s.neurons) for s in cache.header.layers] == [
        ("0", "0", "sum-nchw", 6),
        ("2", "2", "sum-nchw", 6),
    ]
    assert "5 trials in" in nacpipe("search", "mine.zarr", "--trials", "5").stdout
    rows = json.loads(nacpipe("evaluate", "mine.zarr", "--json").stdout)
    scores = score_splits(cache, read_params("mine.params.json"), ["id/test", "ood/near/crosses"])
    expected = detect(scores["id/test"], scores["ood/near/crosses"]).auroc
    cells = [r for r in rows if (r["task"], r["dataset"], r["method"]) == ("ood", "crosses", "NAC")]
    assert [cell["auroc"] for cell in cells] == [expected]


# --- without OOD data -------------------------------------------------------------------------------------------------


@pytest.fixture
def least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder with the page's shortest file, 24 pictures of 48 × 40 for each ID set, and weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "least.toml").write_text(shortest())
    rng = np.random.RandomState(3)
    for name in ("train", "val", "test"):
        for i in range(24):
            path = tmp_path / "pictures" / name / CLASSES[i % 3] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.randint(0, 256, (48, 40, 3), np.uint8)).save(path)
    torch.manual_seed(0)
    torch.save(find_model("resnet20").build(3).state_dict(), "least.pth")
    return tmp_path


LEAST = ["extract", "least.toml", "--model", "resnet20", "--checkpoint", "least.pth", "--device", "cpu"]
KINDS = ["shuffle", "mix", "phases", "noise", "blur", "negative", "patches", "turn"]
MADE = f"ood/val: made from the images of id/val (synthetic, version 1, seed 1): {', '.join(KINDS)}\n"


def test_no_ood_data_is_needed(least: Path) -> None:
    """From the page's shortest file to parameters: what every command says of the set that was made."""
    status = nacpipe("data", "status", "least.toml").stdout
    assert re.search(r"^ood/val +synthetic, from pictures/val +complete +24$", status, re.MULTILINE)
    planned = nacpipe(*LEAST, "--dry-run")
    assert re.search(r"^ood/val +synthetic, from pictures/val +24 +1 +1 ", planned.stdout, re.MULTILINE)
    assert MADE in planned.stderr
    assert MADE in nacpipe(*LEAST).stderr
    cache = open_cache("cache/least-resnet20.zarr")
    assert list(cache) == ["id/train", "id/val", "id/test", "ood/val"]
    assert dict(cache["ood/val"].images) == {
        "list": "synthetic, from pictures/val",
        "sha256": cache["id/val"].images["sha256"],
        "synthetic": {"version": 1, "seed": 1, "kinds": KINDS, "side": 32},
    }
    assert set(cache["ood/val"].label.tolist()) == {-1}
    assert nacpipe("verify", cache.path).stdout == f"{cache.path}: 4 splits, whole\n"
    assert "3 trials in" in nacpipe("search", cache.path, "--trials", "3").stdout
    refused = CliRunner().invoke(main, ["evaluate", cache.path])
    assert "holds no finished near or far set" in refused.stderr


def what_is_made(place: Path) -> NDArray[np.uint8]:
    """The 24 images of ood/val: from id/val's, resized to a short side of 32 and cut to the square in the middle."""
    prepare = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)])
    images = []
    for file in sorted((place / "pictures/val").rglob("*.png")):
        with Image.open(file) as image:
            images.append(np.asarray(prepare(image)))
    return make_synthetic(np.stack(images), np.repeat([0, 1, 2], 8))


def test_what_was_made_goes_through_the_network(least: Path) -> None:
    """Logits are those of make_synthetic's images: id/val's, resized and cut to the square that the transform sees."""
    nacpipe(*LEAST, "--splits", "id/val,ood/val")
    made = what_is_made(least)
    network = find_model("resnet20").build(3).eval()
    network.load_state_dict(torch.load("least.pth", weights_only=True))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # the network's own
    with torch.no_grad():
        inputs = torch.from_numpy(((made / 255 - mean) / std).astype(np.float32)).permute(0, 3, 1, 2)
        expected = network(inputs).numpy()
    found = np.asarray(open_cache("cache/least-resnet20.zarr")["ood/val"].logits)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_rows_are_shown_and_named(least: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the image of id/val that a row was made from; the mosaic has what was made."""
    shown: dict[int, NDArray[np.uint8]] = {}

    def draw(open_image: Callable[[int], Image.Image], blocks: dict[str, list[tuple[int, str]]]) -> Image.Image:
        shown.update({row: np.asarray(open_image(row)) for tiles in blocks.values() for row, _ in tiles})
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr("nacpipe.reporting.mosaic.draw_mosaic", draw)
    nacpipe(*LEAST, "--splits", "id/train,id/val,ood/val")
    nacpipe("search", "cache/least-resnet20.zarr", "--trials", "3")
    printed = nacpipe("inspect", "cache/least-resnet20.zarr", "ood/val", "--rows", "24", "--mosaic", "m.png")
    assert "left out" not in printed.stderr
    assert "pictures/val/circle/00.png" in printed.stdout
    assert (least / "m.png").is_file()
    assert sorted(shown) == list(range(24))
    made = what_is_made(least)
    for row, image in shown.items():
        np.testing.assert_array_equal(image, made[row])


@pytest.mark.slow
def test_kinds_are_chosen_and_others_are_refused(least: Path) -> None:
    path = least / "least.toml"
    nacpipe(*LEAST, "--splits", "id/val,ood/val")
    whole = path.read_text()
    path.write_text(whole + '\n[ood.val]\nsynthetic = ["mix", "noise"]\n')
    refused = CliRunner().invoke(main, LEAST)
    assert refused.exit_code == 1
    assert "ood/val was made from other images: synthetic.kinds: stored " in refused.stderr
    assert "--redo ood/val" in refused.stderr
    printed = nacpipe(*LEAST, "--splits", "id/val,ood/val", "--redo", "ood/val")
    assert "(synthetic, version 1, seed 1): mix, noise\n" in printed.stderr
    stored = open_cache("cache/least-resnet20.zarr")["ood/val"].images
    assert stored["synthetic"]["kinds"] == ["mix", "noise"]
    path.write_text(whole + "\n[ood.val]\nsynthetic = true\n")
    assert "made from other images" in CliRunner().invoke(main, LEAST).stderr


def test_an_image_of_id_val_that_is_damaged_is_named(least: Path) -> None:
    file = least / "pictures/val/circle/00.png"
    file.write_bytes(file.read_bytes()[:200])
    refused = CliRunner().invoke(main, [*LEAST, "--splits", "ood/val"])
    assert refused.exit_code == 1
    assert "pictures/val/circle/00.png" in refused.stderr
    file.unlink()
    (least / "pictures/val").rename(least / "pictures/elsewhere")
    refused = CliRunner().invoke(main, [*LEAST, "--splits", "ood/val"])
    assert refused.stderr == (
        "nacpipe: ood/val: there is no folder of images pictures/val; say where the data is with --data-root DIR\n"
    )
