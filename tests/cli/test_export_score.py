"""`export` and `score`: from a cache to a line per image; a broken one is named and fails the command at its end."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from nacpipe.benchmarks.digits import load_set
from nacpipe.cache import Header, open_cache
from nacpipe.cache.options import ExtractOptions
from nacpipe.cli import main
from nacpipe.cli.export import score_command
from nacpipe.detector.file import Exported, read_detector, write_detector
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.networks.architectures import digits_cnn
from nacpipe.scoring.coverage import score_splits
from nacpipe.scoring.params_file import write_params

pytestmark = pytest.mark.usefixtures("one_thread")

PARAMS = NacParams(
    layers={
        "avgpool": LayerParams(bins=24, saturation=5, alpha=0.4, weight=2.0),
        "layer3": LayerParams(bins=50, saturation=100, alpha=0.03),
        "layer1": LayerParams(bins=50, saturation=100, alpha=0.03, weight=0.0),
    }
)


def nacpipe(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], prog_name="nacpipe")


@pytest.fixture(scope="module")
def place(digits_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of digits, its detector, and id/val's images as files, one of them broken."""
    place = tmp_path_factory.mktemp("score")
    shutil.copytree(digits_cache, place / "c.zarr")
    write_params(place / "c.params.json", PARAMS)
    done = nacpipe("export", place / "c.zarr")
    assert done.exit_code == 0, done.stderr
    assert f"wrote {place / 'c.detector.safetensors'}" in done.stderr
    images, _ = load_set("val")
    (place / "pictures/deep").mkdir(parents=True)
    for row in range(20):
        folder = place / ("pictures/deep" if row % 2 else "pictures")
        Image.fromarray(images[row]).save(folder / f"{row:02}.png")
    (place / "pictures/05.png").write_bytes(b"no picture")
    (place / "pictures/notes.txt").write_text("not an image")
    return place


@pytest.fixture
def detector(place: Path) -> Path:
    return place / "c.detector.safetensors"


def expected(place: Path) -> dict[str, float]:
    """Image file → the cache's score."""
    scores = score_splits(open_cache(place / "c.zarr"), PARAMS, ["id/val"])["id/val"]
    return {
        str(place / ("pictures/deep" if row % 2 else "pictures") / f"{row:02}.png"): scores[row] for row in range(20)
    }


# --- export -----------------------------------------------------------------------------------------------------------


def test_export_prints_what_it_wrote(place: Path, tmp_path: Path) -> None:
    done = nacpipe("export", place / "c.zarr", "--keep", "0.9", "--output", tmp_path / "d", "--json")
    assert done.exit_code == 0, done.stderr
    told, written = json.loads(done.stdout), read_detector(tmp_path / "d")
    scores = score_splits(open_cache(place / "c.zarr"), PARAMS, ["id/val"])["id/val"]
    assert told["threshold"] == written.threshold == np.sort(scores)[50]
    assert [(layer["layer"], layer["neurons"], layer["bins"]) for layer in told["layers"]] == [
        ("avgpool", 64, 24),
        ("layer3", 64, 50),
    ]
    assert written.keep == told["keep"] == 0.9


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--keep", "2"), "keep is 2.0; it must be above 0 and at most 1"),
        (("--params", "nosuch.json"), "there is no parameter file nosuch.json"),
        (("--output", "no/such/d"), "no/such is not a folder"),
    ],
)
def test_export_refuses_in_one_line(place: Path, tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    done = nacpipe("export", place / "c.zarr", "--output", tmp_path / "d", *args)
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "d").exists()


# --- score ------------------------------------------------------------------------------------------------------------


def test_a_broken_image_is_named_and_the_others_are_scored(place: Path, detector: Path) -> None:
    done = nacpipe("score", detector, place / "pictures", "--json", "--batch-size", "4")
    assert done.exit_code == 1
    broken = str(place / "pictures/05.png")
    said = f"image cannot be read: {broken}: cannot identify image file"
    rows = json.loads(done.stdout)
    threshold = read_detector(detector).threshold
    flagged = sum(row["is_ood"] is True for row in rows)
    counted = (
        f"{flagged} of 20 images flagged ({5 * flagged:.1f} %): they score below the threshold {threshold:.6g}, as at"
    )
    counted += " most 5 % do of the in-distribution images that it was chosen on"
    assert done.stderr.splitlines() == [
        said,
        counted,
        f"nacpipe: 1 of 21 images could not be scored; the first: {said}",
    ]
    assert [row["image"] for row in rows] == sorted([*expected(place), broken])
    labels = load_set("val")[1]
    for row in rows:
        if row["image"] == broken:
            assert row == {"image": broken, "score": None, "percentile": None, "is_ood": None,
                           "predicted": None, "error": said}  # fmt: skip
            continue
        number = int(Path(row["image"]).stem)
        assert row["score"] == pytest.approx(expected(place)[row["image"]], abs=1e-5)
        assert row["is_ood"] == (row["score"] < threshold)
        assert row["predicted"] == labels[number]
        assert row["error"] is None


def test_csv_and_table(place: Path, detector: Path) -> None:
    files = [place / "pictures/deep/03.png", place / "pictures/00.png"]
    done = nacpipe("score", detector, *files, "--csv")
    assert done.exit_code == 0
    assert re.fullmatch(r"0 of 2 images flagged \(0\.0 %\): they score below .*\n", done.stderr)
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert list(rows[0]) == ["image", "score", "percentile", "is_ood", "predicted", "error"]
    assert [row["image"] for row in rows] == [str(file) for file in files]  # as they were given
    assert [float(row["score"]) for row in rows] == pytest.approx([expected(place)[str(f)] for f in files], abs=1e-5)
    table = nacpipe("score", detector, *files).stdout.splitlines()
    assert table[0].split() == ["image", "score", "percentile", "is_ood", "predicted"]
    assert table[1].split() == [str(files[0]), f"{float(rows[0]['score']):.6g}",
                                f"{float(rows[0]['percentile']):.1f}", rows[0]["is_ood"], "3"]  # fmt: skip


@pytest.mark.parametrize("charset", ["utf-8", "cp1252", "ascii"])
def test_file_names_that_are_no_utf8_are_escaped(place: Path, detector: Path, tmp_path: Path, charset: str) -> None:
    """In Latin-1, say; pandas and every JSON parser read what is printed, whatever the terminal's encoding."""
    names = [os.fsdecode(b"caf\xe9.png"), os.fsdecode(b"a\xffb\xfe.png"), "é 測.png"]
    for name in names:
        shutil.copy(place / "pictures/00.png", tmp_path / name)
    (tmp_path / os.fsdecode(b"broken\xe9.png")).write_bytes(b"no picture")
    escaped = [str(tmp_path / name) for name in ("a\\xffb\\xfe.png", "broken\\xe9.png", "caf\\xe9.png", "é 測.png")]
    printed = CliRunner(charset=charset).invoke(main, ["score", str(detector), str(tmp_path), "--csv"])
    assert printed.exit_code == 1
    frame = pd.read_csv(io.BytesIO(printed.stdout_bytes))
    assert sorted(frame["image"]) == escaped
    assert frame["error"].dropna().str.contains(r"broken\\xe9\.png").tolist() == [True]
    assert printed.stderr_bytes.decode(charset).count("broken\\xe9.png") == 2
    printed = CliRunner(charset=charset).invoke(main, ["score", str(detector), str(tmp_path), "--json"])
    rows = json.loads(printed.stdout_bytes.decode("ascii"))
    assert sorted(row["image"] for row in rows) == escaped
    assert all(not re.search("[\ud800-\udfff]", str(value)) for row in rows for value in row.values())
    table = CliRunner(charset=charset).invoke(main, ["score", str(detector), str(tmp_path)])
    assert isinstance(table.exception, SystemExit)
    assert f"{tmp_path}/caf\\xe9.png" in table.stdout_bytes.decode(charset)


OWN = """
from nacpipe.networks.architectures.digits_cnn import DigitsCNN
from safetensors.torch import load_file
import nacpipe.networks.architectures.digits_cnn as packaged

def net():
    network = DigitsCNN()
    network.load_state_dict(load_file(packaged.__file__.replace(".py", ".safetensors")))
    return network
"""


def test_a_network_of_your_own(place: Path, detector: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    image = place / "pictures/00.png"
    ours = nacpipe("score", detector, image, "--json")
    own = nacpipe("score", detector, image, "--json", "--model", f"{tmp_path / 'own.py'}:net")
    assert own.exit_code == 0, own.stderr
    assert own.stdout == ours.stdout


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.slow
def test_the_next_line_runs_as_it_stands(place: Path, tmp_path: Path, checkpoint: bool) -> None:
    """But for the images."""
    (tmp_path / "my nets").mkdir()
    (tmp_path / "my nets/own.py").write_text(OWN)
    shutil.copy(digits_cnn.__file__.replace(".py", ".safetensors"), tmp_path / "w.safetensors")
    cache, options = tmp_path / "c.zarr", ["--model", f"{tmp_path}/my nets/own.py:net"]
    options += ["--checkpoint", f"{tmp_path}/w.safetensors"] if checkpoint else []
    chosen = ["--splits", "id/train,id/val", "--layers", "avgpool,layer3"]
    done = nacpipe("extract", "digits", "--cache", cache, *chosen, *options)
    assert done.exit_code == 0, done.stderr
    write_params(tmp_path / "c.params.json", PARAMS)
    line = nacpipe("export", cache).stderr.splitlines()[-1]
    detector = tmp_path / "c.detector.safetensors"
    assert line == "next: " + shlex.join(["nacpipe", "score", str(detector), "IMAGES", *options])
    words = shlex.split(line.replace("IMAGES", str(place / "pictures/00.png")))
    assert words[1] == "nacpipe"
    scored = nacpipe(*words[2:], "--json")
    assert (scored.exit_code, scored.stderr.count("\n")) == (0, 1)
    assert json.loads(scored.stdout)[0]["score"] == pytest.approx(expected(place)[str(place / "pictures/00.png")])


def test_the_next_line_of_the_packaged_network_is_short(place: Path, tmp_path: Path) -> None:
    done = nacpipe("export", place / "c.zarr", "--output", tmp_path / "d")
    assert done.stderr.splitlines()[-1] == f"next: nacpipe score {tmp_path}/d IMAGES"


def made_with(**options: Any) -> dict[str, Any]:
    return ExtractOptions(benchmark="cifar10", **options).to_json()


@pytest.mark.parametrize(
    ("identity", "information", "more"),
    [
        (  # one of a folder of runs
            {"architecture": "resnet20", "family": "resnet"},
            {"options": made_with(model="resnet20", checkpoint=Path("my results/s0/best.ckpt")),
             "checkpoint": "best.ckpt"},
            "--checkpoint 'my results/s0/best.ckpt'",
        ),
        (
            {"architecture": "resnet18", "family": "resnet"},
            {"options": made_with(model="resnet18", checkpoint=Path("IMAGENET1K_V1")), "checkpoint": "IMAGENET1K_V1"},
            "--checkpoint IMAGENET1K_V1",
        ),
        (
            {"architecture": "timm:resnet10t", "family": "timm"},
            {"options": made_with(model="timm:resnet10t"), "checkpoint": "pretrained"},
            "--model timm:resnet10t",
        ),
        (
            {"architecture": "own.py:net", "family": "custom"},
            {"options": made_with(model="nets/own.py:net"), "checkpoint": "own.py:net"},
            "--model nets/own.py:net",
        ),
        # Made from Python, or by an earlier nacpipe, which kept its options as a command alone.
        ({"architecture": "resnet20", "family": "resnet"},
         {"command": "nacpipe extract cifar10 --model resnet20 --checkpoint results/a.th", "checkpoint": "a.th"},
         "--checkpoint FOLDER/a.th"),
        ({"architecture": "resnet20", "family": "resnet"}, {"command": "", "checkpoint": "a.th"},
         "--checkpoint FOLDER/a.th"),
        ({"architecture": "digits_cnn", "family": "digits"}, {"checkpoint": "packaged"}, "--checkpoint packaged"),
        ({"architecture": "own.py:net", "family": "custom"}, {"checkpoint": "a.pth"},
         "--model FOLDER/own.py:net --checkpoint FOLDER/a.pth"),
        ({"architecture": "DigitsCNN", "family": "custom"}, {}, "--model FILE.py:FUNCTION --checkpoint CHECKPOINT"),
        ({"architecture": "digits_cnn"}, {"command": "an open ' quote", "checkpoint": "packaged"},
         "--checkpoint packaged"),
    ],
)  # fmt: skip
def test_what_the_next_line_knows_of_the_network(
    identity: dict[str, str], information: dict[str, Any], more: str
) -> None:
    header = Header(identity=identity, information=information, block_rows=1, layers=(), classes=2, features=0)
    assert score_command(Path("d"), header) == f"nacpipe score d IMAGES {more}"


def test_code_that_a_file_names_is_not_run(place: Path, detector: Path, tmp_path: Path) -> None:
    write_detector(tmp_path / "d", of_another_network(detector, "evil.py:net"))
    done = nacpipe("score", tmp_path / "d", place / "pictures/00.png")
    assert done.exit_code == 1
    assert done.stderr == (
        f"nacpipe: {tmp_path / 'd'} is for evil.py:net; say where it is with --model FOLDER/evil.py:net\n"
    )


def of_another_network(detector: Path, architecture: str, **options: Any) -> Exported:
    """The detector as if its cache were of that network."""
    exported = read_detector(detector)
    identity = {**exported.identity, "architecture": architecture, "family": "custom"}
    extraction = {**exported.information["extraction"], **({"options": made_with(**options)} if options else {})}
    return replace(exported, identity=identity, information={**exported.information, "extraction": extraction})


def test_a_network_from_a_file_is_asked_for_before_anything_is_loaded(
    place: Path, detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the path that `export` names, where the detector knows it."""
    image = place / "pictures/00.png"
    made = of_another_network(detector, "own.py:net", model="my nets/own.py:net", checkpoint=Path("w.pth"))
    write_detector(tmp_path / "d", made)
    write_detector(tmp_path / "timm", of_another_network(detector, "timm:resnet10t", model="timm:resnet10t"))
    write_detector(tmp_path / "plain", of_another_network(detector, "Net", model="x"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "nacpipe.detector.predict", None)
        for more, said in (
            ((), "--model 'my nets/own.py:net' --checkpoint w.pth"),
            (("--checkpoint", "v.pth"), "--model 'my nets/own.py:net'"),
            (("--output", tmp_path / "scores"), "--model 'my nets/own.py:net' --checkpoint w.pth"),
        ):
            done = nacpipe("score", tmp_path / "d", image, *more)
            assert (done.exit_code, done.stderr) == (
                1, f"nacpipe: {tmp_path}/d is for own.py:net; say where it is with {said}\n"
            )  # fmt: skip
        assert nacpipe("score", tmp_path / "timm", image).stderr == (
            f"nacpipe: {tmp_path}/timm is for timm:resnet10t; say where it is with --model timm:resnet10t\n"
        )
    assert not (tmp_path / "scores").exists()
    assert nacpipe("score", tmp_path / "plain", image).stderr == (
        f"nacpipe: {tmp_path}/plain is for Net; say where it is with --model FILE.py:FUNCTION\n"
    )


def test_other_weights_are_refused(place: Path, detector: Path, tmp_path: Path) -> None:
    torch.save(digits_cnn.DigitsCNN().state_dict(), tmp_path / "w.pth")
    done = nacpipe("score", detector, place / "pictures/00.png", "--checkpoint", tmp_path / "w.pth")
    assert done.exit_code == 1
    assert f"{detector}: it was exported for another network (weights: stored" in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("nosuch.safetensors", "a.png"), 1, "there is no detector nosuch.safetensors; make one with: nacpipe export"),
        (("D",), 2, "Missing argument 'IMAGES...'"),
        (("D", "EMPTY"), 1, "there is no image in"),
        (("D", "a.png", "--model", "nosuch"), 1, "model 'nosuch' is not known"),
        (("D", "a.png", "--device", "nosuch"), 1, "device 'nosuch' cannot be used here"),
        (("D", "a.png", "--model", "resnet20"), 1, "resnet20 has no packaged weights; give them with --checkpoint"),
    ],
)
def test_wrong_input_is_one_line(
    detector: Path, tmp_path: Path, args: tuple[Any, ...], code: int, message: str
) -> None:
    done = nacpipe("score", *({"D": detector, "EMPTY": tmp_path}.get(arg, arg) for arg in args))
    assert (done.exit_code, done.stdout) == (code, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_page_runs_as_it_stands(detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/detector.md").read_text("utf-8")
    program, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)  # the other: tests/detector/test_runtimes.py
    (tmp_path / "cache").mkdir()
    shutil.copy(detector, tmp_path / "cache/digits-digits_cnn.detector.safetensors")
    shutil.copy(digits_cnn.__file__.replace(".py", ".safetensors"), tmp_path)
    (tmp_path / "scans").mkdir()
    Image.fromarray(load_set("letters")[0][0]).save(tmp_path / "scans/a.png")
    monkeypatch.chdir(tmp_path)
    said: dict[str, Any] = {}
    exec(program, said)
    assert said["score"].shape == (128,)
    torch.testing.assert_close(said["scan"], said["images"][0])
    assert said["is_ood"].tolist() == (said["score"] < read_detector(detector).threshold).tolist()
    assert said["is_ood"].float().mean() > 0.5  # letters, most of them
