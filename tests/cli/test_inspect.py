"""`nacpipe inspect`: layers, histograms, two caches, and the images behind the rows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from nacpipe.benchmarks.lists import list_path
from nacpipe.benchmarks.toml import open_benchmark
from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.cli import main
from nacpipe.cli.text_plot import squeeze
from nacpipe.evaluation.inspection import compare_splits, describe_layers, rank_rows, value_histograms
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.reporting.mosaic import GAP, SIDE, TEXT
from nacpipe.scoring.params_file import write_params

PARAMS = NacParams(
    layers={
        "avgpool": LayerParams(bins=20, saturation=5, alpha=0.5),
        "layer1": LayerParams(bins=9, saturation=3, alpha=1, weight=0),
    }
)


def nacpipe(*args: str) -> Result:
    return CliRunner().invoke(main, ["inspect", *args], prog_name="nacpipe")


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value).replace("NaN", "null"))


@pytest.fixture(scope="module")
def place(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of cifar10's id/val, its list and its images, one colour each; and another run of the same."""
    folder = tmp_path_factory.mktemp("inspect")
    benchmark = open_benchmark("cifar10")
    split = benchmark.split("id/val")
    path = list_path(benchmark, split, folder / "data")
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"im/{row}.png {row % 3}\n" for row in range(40)))
    (folder / "data" / split.folder / "im").mkdir(parents=True)
    for row in range(40):
        Image.new("RGB", (32, 32), (6 * row, 0, 200)).save(folder / "data" / split.folder / f"im/{row}.png")
    for name, seed in (("c", 0), ("d", 1)):
        cache = make_cache(folder / f"{name}.zarr", seed=seed, identity={"benchmark": "cifar10", "weights": name * 64})
        meta = Path(cache.path) / "id/val/zarr.json"
        content = json.loads(meta.read_text())
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        content["attributes"]["images"] = {"list": path.name, "sha256": sha256}
        meta.write_text(json.dumps(content))
        CacheWriter(cache.path, cache.header).seal("id/val")
    write_params(folder / "c.params.json", PARAMS)
    return folder


@pytest.fixture
def cache(place: Path) -> str:
    return f"{place}/c.zarr"


def test_a_split_s_layers(cache: str, place: Path) -> None:
    given = ["--params", f"{place}/c.params.json"]
    found = json.loads(nacpipe(cache, "id/val", *given, "--json").stdout)
    assert found["states"] == plain(describe_layers(open_cache(cache), "id/val", PARAMS).to_dict("records"))
    printed = nacpipe(cache, "id/val", *given).stdout
    assert re.search(r"^id/val +40 +40 +yes ", printed, re.MULTILINE)
    row = found["states"][0]
    shown = f"{row['alpha_low']:.4g} … {row['alpha_high']:.4g}"
    assert re.search(rf"^avgpool +6 +0 +{100 * row['zeros']:.1f} .* {re.escape(shown)} +0.5 ", printed, re.MULTILINE)


def test_a_layer_s_histograms(cache: str, place: Path) -> None:
    given = ["id/val", "layer1", "--params", f"{place}/c.params.json"]
    found = json.loads(nacpipe(cache, *given, "--json").stdout)
    opened = open_cache(cache)
    expected = value_histograms(opened, "id/val", "layer1", PARAMS.layers["layer1"])
    assert found["histograms"] == plain(expected.to_dict("records"))
    assert found["layer"]["layer"] == "layer1"
    lines = nacpipe(cache, *given).stdout.splitlines()
    for name in ("activation", "gradient", "product", "state"):
        start = next(i for i, line in enumerate(lines) if re.match(rf"{name}(,|$)", line))
        bars = expected[expected["value"] == name]
        assert lines[start + 6] == "  " + "─" * 64
        fullest = int(bars["count"].to_numpy().argmax())
        assert lines[start + 1][2 + fullest] == "█"  # to the top
        filled = [c != " " for c in lines[start + 5][2:].ljust(64)]
        assert filled == [count > 0 for count in bars["count"]]  # the lowest line: whatever holds any
    assert any(line.startswith("coverage from id/train") for line in lines)


def test_neighbouring_bars_are_averaged() -> None:
    assert squeeze([1, 2, 3], 64) == [1, 2, 3]
    assert squeeze([1, 3, 5, 5, 0, 1], 3) == [2, 5, 0.5]
    assert sum(squeeze([1.0] * 1000, 64)) == 64


@pytest.mark.repeats(1)
@pytest.mark.parametrize("name", ["x.svg", "x.png"])
def test_a_plot(cache: str, place: Path, tmp_path: Path, name: str) -> None:
    for more in (["--alpha", "2"], ["--compare", f"{place}/d.zarr"]):
        done = nacpipe(cache, "id/val", "avgpool", *more, "--plot", str(tmp_path / name))
        assert done.exit_code == 0, done.stderr
        assert f"wrote {tmp_path / name}\n" in done.stderr
        if name.endswith("svg"):
            assert (tmp_path / name).read_bytes().startswith(b"<?xml")
        else:
            with Image.open(tmp_path / name) as image:
                assert len(image.convert("RGB").getcolors(2**20) or []) > 20


def test_two_caches(cache: str, place: Path) -> None:
    other = f"{place}/d.zarr"
    found = json.loads(nacpipe(cache, "id/val", "--compare", other, "--json").stdout)
    expected = compare_splits(open_cache(cache), open_cache(other), "id/val")
    assert found == {"agree": expected.attrs["agree"], "layers": plain(expected.to_dict("records"))}
    assert [row["layer"] for row in found["layers"]] == ["avgpool", "layer1"]
    printed = nacpipe(cache, "id/val", "layer1", "--compare", other).stdout
    assert re.search(rf"^layer1 .* {found['layers'][1]['alike']:.4g}$", printed, re.MULTILINE)
    assert "avgpool" not in printed
    assert f"same class for {100 * found['agree']:.1f} % of the images" in printed


def test_rows_with_their_images(cache: str, place: Path) -> None:
    root = place / "data"
    found = json.loads(nacpipe(cache, "id/val", "--rows", "3", "--data-root", str(root), "--json").stdout)
    ranked = rank_rows(open_cache(cache), "id/val", PARAMS)
    expected = [*ranked["row"][:3], *ranked["row"][-3:]]
    assert [row["row"] for row in found] == expected
    folder = open_benchmark("cifar10").split("id/val").folder
    assert [row["image"] for row in found] == [f"{root / folder}/im/{row}.png" for row in expected]
    assert all(Path(row["image"]).exists() for row in found)
    printed = nacpipe(cache, "id/val", "--rows", "3", "--data-root", str(root)).stdout.splitlines()
    assert [line.split()[0] for line in printed[1:] if line] == [row["image"] for row in found]
    assert printed[4] == ""
    whole = json.loads(nacpipe(cache, "id/val", "--rows", "99", "--data-root", str(root), "--json").stdout)
    assert [row["row"] for row in whole] == ranked["row"].tolist()


def test_rows_by_one_layer(cache: str, place: Path) -> None:
    """Also one whose weight is 0."""
    found = json.loads(nacpipe(cache, "id/val", "layer1", "--rows", "20", "--data-root", str(place), "--json").stdout)
    alone = NacParams(layers={"layer1": LayerParams(bins=9, saturation=3, alpha=1)})
    assert [row["score"] for row in found] == rank_rows(open_cache(cache), "id/val", alone)["score"].tolist()


def test_images_that_are_not_at_hand(cache: str, place: Path, tmp_path: Path) -> None:
    done = nacpipe(cache, "id/val", "--rows", "1", "--data-root", str(tmp_path), "--json")
    assert re.fullmatch(r"val_cifar10.txt\[\d+\]", json.loads(done.stdout)[0]["image"])
    assert done.stderr == f"the list of id/val is not below {tmp_path}; say where the data is with --data-root DIR\n"
    benchmark = open_benchmark("cifar10")
    other = list_path(benchmark, benchmark.split("id/val"), tmp_path)
    other.parent.mkdir(parents=True)
    other.write_text("im/1.png 0\n")
    done = nacpipe(cache, "id/val", "--rows", "1", "--data-root", str(tmp_path), "--json")
    assert done.stderr == f"{other} is not the list that id/val was made from; paths are left out\n"
    done = nacpipe(cache, "id/val", "--mosaic", str(tmp_path / "m.png"), "--data-root", str(tmp_path))
    assert done.exit_code == 1
    assert f"is not what id/val of {cache} was made from" in done.stderr
    assert not (tmp_path / "m.png").exists()


def test_a_cache_that_does_not_record_its_benchmarks_file(
    make_cache: Callable[..., Cache], place: Path, tmp_path: Path
) -> None:
    """An earlier nacpipe kept a benchmark of one's own by its name, and its file in a command alone."""
    cache = make_cache(tmp_path / "c.zarr", identity={"benchmark": "mine"}).path
    write_params(tmp_path / "c.params.json", PARAMS)
    rows = ["id/val", "--rows", "1", "--json"]
    hint = "; say which benchmark it is with --benchmark NAME or --benchmark FILE.toml\n"
    done = nacpipe(cache, *rows)
    assert re.fullmatch(r"id_val.txt\[\d+\]", json.loads(done.stdout)[0]["image"])
    assert done.stderr.startswith("benchmark 'mine' is not known")
    assert done.stderr.endswith(hint)
    done = nacpipe(cache, "id/val", "--mosaic", str(tmp_path / "m.png"))
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("nacpipe: benchmark 'mine' is not known")
    assert done.stderr.endswith(hint)
    done = nacpipe(cache, *rows, "--benchmark", "cifar10", "--data-root", str(place / "data"))
    assert done.stderr.endswith("val_cifar10.txt is not the list that id/val was made from; paths are left out\n")
    done = nacpipe(cache, *rows, "--benchmark", "nosuch.toml")
    assert done.stderr == "benchmark file nosuch.toml is not there\n"


def test_a_mosaic(cache: str, place: Path, tmp_path: Path) -> None:
    done = nacpipe(cache, "id/val", "--mosaic", str(tmp_path / "m.png"), "--data-root", str(place / "data"))
    assert (done.exit_code, done.stdout) == (0, ""), done.stderr
    order = rank_rows(open_cache(cache), "id/val", PARAMS)["index"].tolist()
    with Image.open(tmp_path / "m.png") as image:
        pixels = np.asarray(image)
    middle = 2 * GAP + TEXT + SIDE // 2
    for block, rows in enumerate((order[:5], order[: -5 - 1 : -1])):
        for place_, row in enumerate(rows):
            x = block * pixels.shape[1] // 2 + GAP + place_ * (SIDE + GAP) + SIDE // 2
            assert pixels[middle, x].tolist() == [6 * row, 0, 200]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--rows", "3"], 2, "Name a SPLIT"),
        (["id/val", "--plot", "x.svg"], 2, "name SPLIT and LAYER"),
        (["id/val", "avgpool", "--plot", "x.pdf"], 1, "x.pdf: a mosaic is written as .png, a plot as .png or .svg"),
        (["id/val", "--mosaic", "x.svg"], 1, "x.svg: a mosaic is written as .png"),
        (["id/val", "--rows", "3", "--alpha", "1"], 2, "--params, not --alpha"),
        (["id/val", "--compare", "d.zarr", "--rows", "3"], 2, "leave out --rows"),
        (["id/val", "--compare", "nosuch.zarr"], 1, "there is no cache at nosuch.zarr"),
        (["id/val", "layer9", "--rows", "3"], 1, "the parameter file has no parameters for layer 'layer9'"),
    ],
)
def test_refusals(cache: str, args: list[str], code: int, said: str) -> None:
    done = nacpipe(cache, *args)
    assert (done.exit_code, done.stdout) == (code, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_networks_output_is_a_layer_too(place: Path) -> None:
    done = nacpipe(f"{place}/c.zarr", "id/val", "logits", "--json")
    assert done.exit_code == 0, done.stderr
    done = nacpipe(f"{place}/c.zarr", "id/val", "logits", "--compare", f"{place}/d.zarr")
    assert (done.exit_code, "leave out LAYER logits" in done.stderr) == (2, True)
