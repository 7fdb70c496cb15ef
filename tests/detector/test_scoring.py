"""`score` on shards: a part per shard, whole or absent; the same command goes on, alone or as several processes."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

import nacpipe
from nacpipe.benchmarks.digits import load_set
from nacpipe.cli import main
from nacpipe.detector.parts import COLUMNS, Parts, ScoredImage, find_parts, format_time, read_part
from nacpipe.errors import ImageError, InputError
from nacpipe.extraction import loader
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.scoring.params_file import write_params
from tests.prefork import deadly, find_running, python_words, torchrun_words
from tests.s3 import variables
from tests.shard_files import png, write_parquet, write_tar
from tests.web import Plain, Ranges, serve

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]


def run(*args: str | Path | int, **environment: str | None) -> Result:
    return CliRunner(env=environment).invoke(main, [str(arg) for arg in args], prog_name="nacpipe")


@pytest.fixture(scope="module")
def detector(digits_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("detector")
    layers = {"avgpool:activation": LayerParams(bins=200, saturation=40, alpha=0.4, source="activation")}
    write_params(place / "p.json", NacParams(layers=layers))
    done = run("export", digits_cache, "--params", place / "p.json", "--output", place / "d.safetensors")
    assert done.exit_code == 0, done.stderr
    return place / "d.safetensors"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of 25 digits."""
    place = tmp_path_factory.mktemp("shards")
    images = [png(image) for image in load_set("val")[0][:150]]
    for number in range(6):
        rows = range(25 * number, 25 * number + 25)
        write_tar(place / f"{number:03}.tar", [(f"{row:04}.png", images[row]) for row in rows])
    return place


@pytest.fixture(scope="module")
def alone(detector: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every part that one process writes, in one go."""
    out = tmp_path_factory.mktemp("alone") / "scores"
    done = run("score", detector, *words(shards), "--output", out)
    assert done.exit_code == 0, done.stderr
    return contents(out)


def words(shards: Path) -> list[str]:
    return [f"{shards}/{{000..005}}.tar", "--batch-size", "8"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_part_per_shard_with_every_image_once(
    alone: dict[str, bytes], detector: Path, shards: Path, tmp_path: Path
) -> None:
    assert list(alone) == [f"{number:03}.csv" for number in range(6)] + ["_detector.json"]
    for name, content in alone.items():
        (tmp_path / name).write_bytes(content)
    frame = pd.concat(map(read_part, find_parts([tmp_path])), ignore_index=True)
    assert list(frame.columns) == list(COLUMNS)
    assert frame.image.tolist() == [f"{row:04}.png" for row in range(150)]
    assert frame.time.unique().tolist() == ["2023-11-14T22:13:20Z"]
    assert frame.score.nunique() > 100
    assert (frame.predicted == load_set("val")[1][:150]).mean() > 0.95
    printed = run("score", detector, *words(shards)[:1], "--json")
    assert printed.exit_code == 0, printed.stderr
    rows = json.loads(printed.stdout)
    assert [row["image"] for row in rows] == [f"{shards}/{row // 25:03}.tar/{row:04}.png" for row in range(150)]
    assert frame.score.tolist() == pytest.approx([row["score"] for row in rows], abs=1e-6)


def test_the_same_command_goes_on(alone: dict[str, bytes], detector: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    assert run("score", detector, shards / "001.tar", *words(shards)[1:], "--output", out).exit_code == 0
    (out / ".002.csv.1234abcd").write_bytes(b"half a part")  # of a process that was killed
    before = (out / "001.csv").stat().st_mtime_ns
    planned = run("score", detector, *words(shards), "--output", out, "--dry-run", "--json")
    assert [row["done"] for row in json.loads(planned.stdout)] == [False, True, False, False, False, False]
    done = run("score", detector, *words(shards), "--output", out, "--json")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert [(Path(row["shard"]).name, row["images"], row["errors"], row["done_before"]) for row in said] == [
        (f"00{number}.tar", 25, 0, number == 1) for number in range(6)
    ]
    assert contents(out) == alone
    assert (out / "001.csv").stat().st_mtime_ns == before


@pytest.mark.slow
def test_decoding_processes_give_the_same_parts(
    alone: dict[str, bytes], detector: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One set for all shards: a damaged one, one of broken images and files follow each other."""
    shutil.copytree(shards, tmp_path / "in")
    (tmp_path / "in/002.tar").write_bytes((shards / "002.tar").read_bytes()[:9000])
    write_tar(tmp_path / "in/odd.tar", [("a.png", b"no"), ("b.pdf", b"%PDF"), ("c.png", png(load_set("val")[0][0]))])
    write_tar(tmp_path / "in/none.tar", [])
    (tmp_path / "photos").mkdir()
    for row, image in enumerate(load_set("val")[0][:30]):
        (tmp_path / f"photos/{row:02}.png").write_bytes(png(image))
    (tmp_path / "photos/99.png").write_bytes(b"")
    sources = [
        f"{tmp_path}/in/{{000..005}}.tar",
        tmp_path / "in/odd.tar",
        tmp_path / "in/none.tar",
        tmp_path / "photos",
    ]
    started = []
    for name, workers in (("thread", 0), ("processes", 2), ("both", "auto")):
        monkeypatch.setattr(loader, "WORTH_PROCESSES", 60 * 28 * 28)
        monkeypatch.setattr(loader, "count_cores", lambda: loader.KEPT_CORES + 1)
        with monkeypatch.context() as patch:
            patch.setattr(loader, "_decode_apart", noted := Noted(loader._decode_apart))
            out = tmp_path / name
            done = run("score", detector, *sources, "--batch-size", "8", "--output", out, "--workers", str(workers))
        assert (done.exit_code, "3 of 159 images and 1 of 9 shards could not be scored" in done.stderr) == (1, True)
        started.append(noted.workers)
    assert started == [[], [2], [1]]
    assert contents(tmp_path / "thread") == contents(tmp_path / "processes") == contents(tmp_path / "both")
    for name in ("000.csv", "001.csv", "003.csv"):
        assert (tmp_path / "both" / name).read_bytes() == alone[name]


class Noted:
    """Notes how many processes decode."""

    def __init__(self, decode: Callable[..., Iterator[Any]]) -> None:
        self.decode, self.workers = decode, list[int]()

    def __call__(self, dataset: Any, batches: Any, workers: int, pin: bool) -> Iterator[Any]:
        self.workers.append(workers)
        return self.decode(dataset, batches, workers, pin)


def test_a_decoding_process_that_is_gone_ends_the_run(
    detector: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no shard's fault: the other shards would have none either."""

    def gone(dataset: Any, batches: Any, *_: Any) -> Iterator[Any]:
        for number, batch in enumerate(batches):
            if number == 5:
                raise ImageError("a process that decodes images is gone")
            yield dataset[batch]

    monkeypatch.setattr(loader, "_decode_apart", gone)
    done = run("score", detector, *words(shards), "--output", tmp_path / "scores", "--workers", 2)
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (1, "nacpipe: a process that decodes images is gone")
    assert Parts(tmp_path / "scores").written() == {"000"}


def test_two_processes_share_the_shards(alone: dict[str, bytes], detector: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    for rank in ("1", "0"):
        done = run("score", detector, *words(shards), "--output", out, "--json", WORLD_SIZE="2", RANK=rank)
        assert done.exit_code == 0, done.stderr
        assert [Path(row["shard"]).stem for row in json.loads(done.stdout)] == [
            f"00{n}" for n in range(int(rank), 6, 2)
        ]
    assert contents(out) == alone


def test_broken_sixteen_bit_empty_and_foreign_members(detector: Path, tmp_path: Path) -> None:
    digits = load_set("val")[0]
    members = [
        ("a.png", png(digits[0])),
        ("broken.png", b"no picture"),
        ("deep.png", png(digits[1].astype(np.uint16) * 257)),
        ("empty.png", b""),
        ("foreign.pdf", b"%PDF-1.7"),
        ("script.png", b"%!PS-Adobe-3.0"),
        ("z.png", png(digits[1])),
    ]
    write_tar(tmp_path / "odd.tar", members)
    done = run("score", detector, tmp_path / "odd.tar", "--output", tmp_path / "scores", "--json")
    assert done.exit_code == 1
    frame = read_part(str(tmp_path / "scores/odd.csv")).set_index("image")
    assert frame.index.tolist() == [name for name, _ in members]
    assert frame.error.notna().tolist() == [False, True, False, True, True, True, False]
    assert frame.score.isna().tolist() == frame.error.notna().tolist()
    for name, error in frame.error.dropna().items():
        assert f"{tmp_path}/odd.tar: {name}" in error
    assert frame.score["deep.png"] == frame.score["z.png"]  # 16 bits are scaled, as extraction does
    said = done.stderr.splitlines()[-1]
    assert said == (
        "nacpipe: 4 of 7 images could not be scored; score the shard again with --redo odd; the first: image cannot be"
        f" read: {tmp_path}/odd.tar: broken.png: cannot identify image file"
    )
    again = run("score", detector, tmp_path / "odd.tar", "--output", tmp_path / "scores")
    assert (again.exit_code, again.stderr.splitlines()[-1]) == (1, said)  # there is nothing to do, and it is not whole
    assert "1 of 1 shards were done before" in again.stderr
    flagged = int(frame.is_ood.eq(True).sum())
    row = [f"{tmp_path}/odd.tar", "7", str(flagged), "4", f"{tmp_path}/scores/odd.csv", "before"]
    assert again.stdout.splitlines()[1].split() == row


def test_a_part_is_replaced_where_it_is_named_again(detector: Path, tmp_path: Path) -> None:
    digits, out = load_set("val")[0], tmp_path / "scores"
    for name in ("a,b", "c", "d"):
        write_tar(tmp_path / f"{name}.tar", [("0.png", png(digits[0])), ("1.png", b"no picture")])
    sources = [tmp_path / f"{name}.tar" for name in ("a,b", "c", "d")]
    done = run("score", detector, *sources, "--output", out)
    assert "3 of 6 images could not be scored; score the shards again with --redo a,b --redo c --redo d; the f" in (
        done.stderr.replace("'", "")
    )
    for name in ("a,b", "c"):
        write_tar(tmp_path / f"{name}.tar", [("0.png", png(digits[0])), ("1.png", png(digits[1]))])
    (tmp_path / "d.tar").write_bytes(b"damaged")
    kept = (out / "d.csv").read_bytes()
    planned = run("score", detector, *sources, "--output", out, "--redo", "a,b", "--redo", "c", "--dry-run")
    assert [line.split()[-2:] for line in planned.stdout.splitlines()[1:]] == [
        *[["score", "again"]] * 2,
        [f"{out}/d.csv", "done"],
    ]
    done = run("score", detector, *sources, "--output", out, "--redo", "a,b", "--redo", "c, d", "--json")
    assert [(row["images"], row["errors"], row["done_before"]) for row in json.loads(done.stdout)] == [
        (2, 0, False), (2, 0, False), (0, 0, False)
    ]  # fmt: skip
    assert "1 of 3 shards could not be scored; the same command tries these shards again; the first: " in done.stderr
    assert (out / "d.csv").read_bytes() == kept  # whole or not at all
    assert read_part(str(out / "c.csv")).error.isna().all()
    unknown = run("score", detector, *sources, "--output", out, "--redo", "c,e")
    assert (unknown.exit_code, unknown.stderr) == (1, "nacpipe: redo names 'e'; the shards are a,b, c, d\n")


def test_images_that_came_later_are_named_and_not_scored(
    detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, however the folder was named then."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos/deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.png"):
        (tmp_path / "photos" / name).write_bytes(png(load_set("val")[0][0]))
    (tmp_path / "l.txt").write_text("photos/a.png\n")
    command = ["score", detector, "photos", "l.txt", "--output", "scores"]
    first, again = run(*command), run(*command)
    assert (first.exit_code, again.exit_code, again.stderr.count("\n")) == (0, 0, 1), again.stderr
    (tmp_path / "photos/deep/new.png").write_bytes(png(load_set("val")[0][1]))
    (tmp_path / "l.txt").write_text("photos/a.png\nphotos/deep/new.png\nphotos/deep/b.png\n")
    told = [
        "photos: 1 image is not in its part scores/photos.csv (deep/new.png); score it again with --redo photos",
        "l.txt: 2 images are not in its part scores/l.csv (the first: photos/deep/new.png); score it again with"
        " --redo l",
    ]
    for more in ((), ("--dry-run",)):
        done = run(*command, *more)
        assert (done.exit_code, done.stderr.splitlines()[:2]) == (0, told)
    moved = run("score", detector, tmp_path / "photos", "--output", "scores")
    assert moved.stderr.splitlines()[0] == told[0].replace("photos:", f"{tmp_path}/photos:")
    done = run(*command, "--redo", "photos,l", "--json")
    assert [row["images"] for row in json.loads(done.stdout)] == [3, 3]
    assert run(*command).stderr.count("\n") == 1
    for name in ("a.png", "deep/b.png"):
        os.utime(tmp_path / "photos" / name, (1_700_000_000, 1_700_000_000))
    done = run(*command)
    assert (done.exit_code, done.stderr.splitlines()[0]) == (
        0,
        "photos: 2 images have another time than in its part scores/photos.csv (the first: a.png); score it again with"
        " --redo photos",
    )


def test_nothing_to_do_loads_no_network(
    alone: dict[str, bytes], detector: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor torch: what imports it is not imported."""
    out = tmp_path / "scores"
    out.mkdir()
    for name, content in alone.items():
        (out / name).write_bytes(content)
    for name in ("nacpipe.detector.predict", "nacpipe.extraction.distributed", "nacpipe.detector.module"):
        monkeypatch.setitem(sys.modules, name, None)
    command = ["score", detector, *words(shards), "--output", out]
    done = run(*command, "--json")
    assert done.exit_code == 0, done.output
    assert [(row["images"], row["errors"], row["done_before"]) for row in json.loads(done.stdout)] == [
        (25, 0, True)
    ] * 6
    (out / "003.csv").write_text("no scores")
    done = run(*command)
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith(
        "nacpipe: 1 of 6 parts cannot be read; score the shard again with --redo 003; the first: "
        f"{out}/003.csv cannot be read as scores: "
    )
    (out / "_detector.json").write_text(json.dumps({"sha256": "0" * 64}))
    for more in ((), ("--dry-run",)):
        assert f"{out} holds parts of another detector" in run(*command, *more).stderr


def test_a_damaged_shard_has_no_part_and_is_tried_again(detector: Path, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "in")
    whole = (tmp_path / "in/001.tar").read_bytes()
    (tmp_path / "in/001.tar").write_bytes(whole[:20_000])
    out = tmp_path / "scores"
    done = run("score", detector, *words(tmp_path / "in"), "--output", out)
    assert done.exit_code == 1
    assert "1 of 6 shards could not be scored; the same command tries these shards again; the first: " in done.stderr
    assert sorted(path.name for path in out.iterdir()) == [f"00{n}.csv" for n in (0, 2, 3, 4, 5)] + ["_detector.json"]
    (tmp_path / "in/001.tar").write_bytes(whole)
    assert run("score", detector, *words(tmp_path / "in"), "--output", out).exit_code == 0
    assert len(read_part(str(out / "001.csv"))) == 25


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_formats_hold_the_same_rows(tmp_path: Path, kind: str) -> None:
    rows = [
        ScoredImage(image="a,\n\udcff.png", score=0.1 + 0.2, percentile=40.0, is_ood=False, predicted=3, error=None,
                    time="2026-11-27T00:00:00Z"),
        ScoredImage(image="b.png", score=None, percentile=None, is_ood=None, predicted=None, error='it is "broken"'),
        ScoredImage(image="NA", score=float("nan"), percentile=None, is_ood=True, predicted=0, error=None),
        ScoredImage(image="c\rd.png", score=0.5, percentile=None, is_ood=False, predicted=1, error=None),
    ]  # fmt: skip
    parts = Parts(tmp_path, kind)
    with parts.writing("x") as writer:
        for row in rows:
            writer.add(row)
    assert parts.written() == {"x"}
    frame = read_part(parts.address("x"))
    assert frame.image.tolist() == ["a,\n\\xff.png", "b.png", "NA", "c\rd.png"]
    assert frame.score[0] == 0.1 + 0.2
    assert frame.score.isna().tolist() == [False, True, True, False]
    assert frame.is_ood.tolist()[::2] == [False, True]
    assert frame.is_ood.isna().tolist() == [False, True, False, False]
    assert frame.predicted.tolist()[::2] == [3, 0]
    assert frame.error[1] == 'it is "broken"'
    assert frame.time[0] == "2026-11-27T00:00:00Z"
    with parts.writing("none"):
        pass
    assert len(read_part(parts.address("none"))) == 0


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_a_part_appears_whole_or_not_at_all(tmp_path: Path, kind: str) -> None:
    """And its writer ends before its file: pyarrow's would print a traceback when it is collected."""
    parts = Parts(tmp_path / "scores", kind)
    (tmp_path / "scores").mkdir()
    with pytest.raises(ZeroDivisionError), parts.writing("x") as writer:
        writer.add(ScoredImage(image="a", score=1.0, percentile=None, is_ood=False, predicted=None, error=None))
        raise ZeroDivisionError
    del writer
    gc.collect()
    assert list((tmp_path / "scores").iterdir()) == []


def test_two_processes_that_write_one_part_both_end(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    row = ScoredImage(image="a", score=1.0, percentile=None, is_ood=False, predicted=None, error=None)
    with parts.writing("x") as ours:
        with parts.writing("x") as theirs:
            theirs.add(row)
        ours.add(row)
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]
    assert read_part(parts.address("x")).image.tolist() == ["a"]


def test_parts_in_another_format_are_refused(tmp_path: Path) -> None:
    for _ in range(2):
        Parts(tmp_path, "csv").claim({"sha256": "0" * 64})
    with pytest.raises(InputError, match="holds parts in the format csv; go on with --format csv, or name another"):
        Parts(tmp_path, "json").claim({"sha256": "0" * 64})


def test_no_part_is_written_over_the_description(detector: Path, tmp_path: Path) -> None:
    folder = tmp_path / "_detector"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(load_set("val")[0][0]))
    done = run("score", detector, folder, "--output", tmp_path / "scores", "--format", "json")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"nacpipe: {folder} would be written as _detector.json, which says what the parts")
    assert run("score", detector, folder, "--output", tmp_path / "scores").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == ["_detector.csv", "_detector.json"]


def test_the_part_of_single_files_is_not_taken_for_that_of_others(detector: Path, tmp_path: Path) -> None:
    for name, image in zip("ab", load_set("val")[0], strict=False):
        (tmp_path / f"{name}.png").write_bytes(png(image))
    out = tmp_path / "scores"
    for _ in range(2):
        assert run("score", detector, tmp_path / "a.png", "--output", out).exit_code == 0
    done = run("score", detector, tmp_path / "b.png", "--output", out)
    assert done.exit_code == 1
    assert done.stderr == (
        f"nacpipe: {out}/images.csv is of other files, without {tmp_path}/b.png; name another folder with --output,"
        " name the files in a list (.txt), whose part has its name, or replace this part with --redo images\n"
    )
    (out / "images.csv").write_text("no scores")
    damaged = run("score", detector, tmp_path / "b.png", "--output", out)
    assert "1 of 1 parts cannot be read; score the shard again with --redo images; the first: " in damaged.stderr
    assert run("score", detector, tmp_path / "b.png", "--output", out, "--redo", "images").exit_code == 0
    assert read_part(f"{out}/images.csv").image.tolist() == [f"{tmp_path}/b.png"]


def test_parts_are_found_once_and_their_description_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(tmp_path, "json")
    parts.claim({"sha256": "0" * 64})
    with pytest.raises(InputError, match=r"there is no part in .* yet; make some with: nacpipe score"):
        find_parts([tmp_path])
    with parts.writing("x"):
        pass
    here = str(tmp_path / "x.json")
    assert find_parts([tmp_path, here, tmp_path / "_detector.json"]) == [here]
    monkeypatch.chdir(tmp_path)
    assert find_parts(["."]) == ["x.json"]
    with pytest.raises(InputError, match=r"there are no scores at no/x\.csv; make some with: nacpipe score"):
        find_parts(["no/x.csv"])


def test_ranges_and_lists_are_printed_too(detector: Path, tmp_path: Path) -> None:
    for number, image in zip(range(3), load_set("val")[0], strict=False):
        (tmp_path / f"{number}.png").write_bytes(png(image))
    (tmp_path / "L.TXT").write_text("2.png\n")
    done = run("score", detector, tmp_path / "L.TXT", f"{tmp_path}/{{0..1}}.png", "--json")
    assert [Path(row["image"]).name for row in json.loads(done.stdout)] == ["2.png", "0.png", "1.png"]


def test_parts_of_another_detector_are_refused(detector: Path, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "_detector.json").write_text(json.dumps({"sha256": "0" * 64}))
    done = run("score", detector, shards / "000.tar", "--output", tmp_path)
    assert done.exit_code == 1
    assert f"{tmp_path} holds parts of another detector" in done.stderr


def test_what_is_not_there_is_no_part(detector: Path, tmp_path: Path) -> None:
    for name in ("nosuch", "nosuch.tar", "nosuch.txt", "nosuch.png"):
        done = run("score", detector, tmp_path / name, "--output", tmp_path / "scores")
        assert (done.exit_code, f"there is no {tmp_path / name}" in done.stderr) == (1, True), done.stderr
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(
    ("args", "environment", "message"),
    [
        (("--format", "csv"), {}, "--format belongs to --output FOLDER."),
        (("--redo", "a"), {}, "--redo belongs to --output FOLDER."),
        (("--dry-run",), {}, "--dry-run belongs to --output FOLDER."),
        ((), {"WORLD_SIZE": "2", "RANK": "0"}, "several processes write parts; name their folder with --output."),
        (("--output", "x", "--csv"), {}, "--csv prints rows; with --output it is --format csv."),
    ],
)
def test_usage(detector: Path, shards: Path, args: Any, environment: dict[str, str], message: str) -> None:
    done = run("score", detector, shards / "000.tar", *args, **environment)
    assert (done.exit_code, message in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(("world", "rank"), [("2", "2"), ("two", "0"), ("2", "")])
def test_ranks_that_cannot_be(detector: Path, shards: Path, tmp_path: Path, world: str, rank: str) -> None:
    for output in (("--output", tmp_path / "scores"), ()):
        done = run("score", detector, shards / "000.tar", *output, WORLD_SIZE=world, RANK=rank)
        assert done.exit_code == 1
        assert f"WORLD_SIZE is {world!r} and RANK is {rank!r}: give each of several processes" in done.stderr
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(("world", "local"), [("0", "0"), ("", "0"), ("2", "x"), ("2", "2"), ("2", ""), (None, "-1")])
def test_places_on_a_machine_that_cannot_be(
    detector: Path, shards: Path, tmp_path: Path, world: str | None, local: str
) -> None:
    environment = {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": world}
    done = run("score", detector, shards / "000.tar", "--output", tmp_path / "scores", **environment)
    assert done.exit_code == 1
    assert f"LOCAL_RANK is {local!r} and LOCAL_WORLD_SIZE is {world!r}: give each process of a machine" in done.stderr


@pytest.mark.parametrize("device", ["meta", "nosuch", "cuda:99"])
def test_a_device_that_computes_nothing(detector: Path, shards: Path, device: str) -> None:
    done = run("score", detector, shards / "000.tar", "--device", device)
    assert (done.exit_code, f"device {device!r} cannot be used here: " in done.stderr) == (1, True), done.stderr


def test_lines_of_a_list_that_name_no_image_are_rows(detector: Path, tmp_path: Path) -> None:
    """Printed and written: neither ends at one, nor takes a folder for its images."""
    (tmp_path / "photos").mkdir()
    names = ["a\rb.png", "a\x0cb.png", "a\x85b.png", "a\u2028b.png"]
    for name in [*names, "photos/1.png"]:
        (tmp_path / name).write_bytes(png(load_set("val")[0][0]))
    lines = [*names, "nul\0.png", "x" * 5000 + ".png", "photos"]
    (tmp_path / "l.txt").write_bytes("\r\n".join(lines).encode())
    printed = run("score", detector, tmp_path / "l.txt", "--json")
    run("score", detector, tmp_path / "l.txt", "--output", tmp_path / "scores", "--format", "json")
    for rows in (json.loads(printed.stdout), json.loads((tmp_path / "scores/l.json").read_bytes())):
        assert [row["image"] for row in rows] == [str(tmp_path / line) for line in lines]
        assert [row["error"] is None for row in rows] == [True] * 4 + [False] * 3
    assert "3 of 7 images could not be scored; the first: image cannot be read: " in printed.stderr


@pytest.mark.parametrize("output", ["https://host/scores", "ftp://host/scores"])
def test_parts_go_where_something_can_be_written(detector: Path, shards: Path, output: str) -> None:
    done = run("score", detector, shards / "000.tar", "--output", output)
    assert done.exit_code == 1
    assert f"{output} cannot be written; write to a folder or to s3://BUCKET/FOLDER" in done.stderr


def test_a_name_that_is_too_long(detector: Path, tmp_path: Path) -> None:
    done = run("score", detector, tmp_path / ("x" * 5000))
    assert (done.exit_code, "1 of 1 images could not be scored; the first: image cannot be read: " in done.stderr) == (
        1, True
    ), done.stderr  # fmt: skip
    done = run("score", detector, tmp_path / ("x" * 5000), "--output", tmp_path / "scores")
    assert (done.exit_code, "there is no " in done.stderr) == (1, True), done.stderr


def test_from_python(detector: Path, shards: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from nacpipe.networks.architectures import digits_cnn

    network = digits_cnn.DigitsCNN()
    network.load_state_dict(load_file(digits_cnn.__file__.replace(".py", ".safetensors")))
    loaded = nacpipe.load_detector(detector, network)
    rows = nacpipe.score(loaded, shards / "002.tar", batch_size=8)
    assert rows.image.tolist() == [f"{row:04}.png" for row in range(50, 75)]
    done = nacpipe.score(loaded, [shards / "002.tar", shards / "003.tar"], tmp_path / "scores", batch_size=8)
    assert done[["images", "errors"]].to_numpy().tolist() == [[25, 0], [25, 0]]
    assert contents(tmp_path / "scores") == {name: alone[name] for name in ("002.csv", "003.csv", "_detector.json")}
    write_tar(tmp_path / "003.tar", [("0.png", b"no picture")])
    sources = [shards / "002.tar", tmp_path / "003.tar"]
    for redo in (("003",), "003"):
        done = nacpipe.score(loaded, sources, tmp_path / "scores", batch_size=8, redo=redo)
    assert done[["images", "errors", "done_before"]].to_numpy().tolist() == [[25, 0, True], [1, 1, False]]
    with pytest.raises(InputError, match=r"redo names '9'; the shards are 002, 003"):
        nacpipe.score(loaded, sources, tmp_path / "scores", redo=["9"])
    empty = nacpipe.score(loaded, write_tar(tmp_path / "none.tar", []))
    assert (len(empty), list(empty.columns)) == (0, list(rows.columns))
    write_parquet(tmp_path / "p.parquet", [(f"{n}.png", png(load_set("val")[0][50 + n])) for n in range(25)])
    assert nacpipe.score(loaded, tmp_path / "p.parquet", batch_size=8).score.tolist() == rows.score.tolist()


def test_times() -> None:
    assert format_time(0) == "1970-01-01T00:00:00Z"
    assert [format_time(value) for value in (None, float("nan"), 1e30, -1e30)] == [None] * 4


def test_reading_what_are_no_scores(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(InputError, match=r"a\.csv cannot be read as scores: it has no column 'score', and is not from"):
        read_part(str(tmp_path / "a.csv"))
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match=r"a\.json cannot be read as scores: "):
        read_part(str(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(InputError, match=r"b\.json cannot be read as scores: it is no list of rows"):
        read_part(str(tmp_path / "b.json"))
    head = "image,score,percentile,is_ood,predicted,error,time\n"
    (tmp_path / "c.csv").write_text(f"{head}a,1,2,TRUE,,,\nb,1,2,FALSE,,,\n")  # as a spreadsheet writes it
    assert read_part(str(tmp_path / "c.csv")).is_ood.tolist() == [True, False]
    (tmp_path / "c.csv").write_text(f"{head}a,1,2,nein,,,\n")
    with pytest.raises(InputError, match="is_ood is 'nein'; known: True, False"):
        read_part(str(tmp_path / "c.csv"))
    (tmp_path / "c.csv").write_text(f"{head}a,1,2,,,,\n")
    with pytest.raises(InputError, match="image 'a' has neither is_ood nor an error"):
        read_part(str(tmp_path / "c.csv"))
    for name, value in (("score", "x"), ("percentile", "1,5"), ("is_ood", 7)):
        row = {"image": "a", "score": 1.0, "percentile": 2.0, "is_ood": True, name: value}
        (tmp_path / "d.json").write_text(json.dumps([row]))
        pd.DataFrame([row]).to_csv(tmp_path / "d.csv", index=False)
        pd.DataFrame([row]).to_parquet(tmp_path / "d.parquet")
        for kind in ("json", "csv", "parquet"):
            with pytest.raises(InputError, match=rf"d\.{kind} cannot be read as scores: {name} is '?{value}"):
                read_part(str(tmp_path / f"d.{kind}"))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [5])
def test_kills_leave_whole_parts_and_the_end_is_equal(
    alone: dict[str, bytes], detector: Path, shards: Path, tmp_path: Path, kills: int
) -> None:
    out = tmp_path / "scores"
    command = [*python_words(), "-m", "nacpipe", "score", str(detector), *words(shards), "--output", str(out)]
    for number in range(kills):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:  # until it writes
            if out.is_dir() and len([name for name in os.listdir(out) if not name.startswith(".")]) > number:
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.1)
        for path in out.iterdir() if out.is_dir() else ():
            if not path.name.startswith("."):
                assert path.read_bytes() == alone[path.name]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0
    assert contents(out) == alone


@pytest.mark.slow
def test_torchrun_ends_when_all_are_done_though_one_has_a_broken_image(
    detector: Path, shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(shards, tmp_path / "in")
    write_tar(tmp_path / "in/000.tar", [("broken.png", b"no picture")])
    score = ["-m", "nacpipe", "score", str(detector), *words(tmp_path / "in"), "--output", str(tmp_path / "scores")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = torchrun_words(["--standalone", "--nproc-per-node", "2"], score, environment)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "1 of 51 images could not be scored; score the shard again with --redo 000; the first: image" in done.stderr
    assert Parts(tmp_path / "scores").written() == {f"00{number}" for number in range(6)}


@pytest.mark.parametrize("kind", [Ranges, Plain])
def test_shards_on_a_web_server(
    kind: type[Plain],
    detector: Path,
    shards: Path,
    alone: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("obstore")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    write_parquet(shards / "p.parquet", [(f"{n}.png", png(load_set("val")[0][n])) for n in range(60)])
    with serve(shards, kind) as url:
        out = tmp_path / "scores"
        sources = [f"{url}/{{001..002}}.tar", f"{url}/p.parquet"]
        done = run("score", detector, *sources, "--batch-size", "8", "--output", out)
        assert done.exit_code == 0, done.stderr
        assert {name: (out / name).read_bytes() for name in ("001.csv", "002.csv")} == {
            name: alone[name] for name in ("001.csv", "002.csv")
        }
        assert len(read_part(str(out / "p.csv"))) == 60
        missing = run("score", detector, f"{url}/nosuch.tar", "--output", out)
        assert (missing.exit_code, f"there is no {url}/nosuch.tar" in missing.stderr) == (1, True), missing.stderr
        behind = run("score", detector, f"{url}/{{nosuch,001}}.tar", "--batch-size", 8, "--output", tmp_path / "behind")
        assert (tmp_path / "behind/001.csv").read_bytes() == alone["001.csv"], behind.stderr
        listing = run("score", detector, f"{url}/", "--output", out)
        assert "a web server has no listing; name its files, such as" in listing.stderr
        signed = run("score", detector, f"{url}/001.tar?X-Amz-Signature=1", "--output", out)
        assert "addresses with a query are not read; give s3://… and AWS_…, or a local copy" in signed.stderr
    (shards / "p.parquet").unlink()


def test_shards_and_parts_at_an_object_store(
    detector: Path,
    shards: Path,
    alone: dict[str, bytes],
    tmp_path: Path,
    s3_endpoint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nacpipe.cache.objects import read_object, write_object

    for name, value in variables(s3_endpoint).items():
        monkeypatch.setenv(name, value)

    base = f"s3://caches/{tmp_path.name}"
    for path in sorted(shards.glob("*.tar"))[:3]:
        write_object(f"{base}/in/{path.name}", path.read_bytes())
    command = ["score", detector, f"{base}/in/", "--batch-size", "8", "--output", f"{base}/scores", "--json"]
    done = run(*command)
    assert done.exit_code == 0, done.stderr
    assert [row["images"] for row in json.loads(done.stdout)] == [25, 25, 25]
    assert read_object(f"{base}/scores/001.csv") == alone["001.csv"]
    assert [(row["images"], row["done_before"]) for row in json.loads(run(*command).stdout)] == [(25, True)] * 3
    write_object(f"{base}/in/001.tar", (shards / "004.tar").read_bytes())
    assert run(*command, "--redo", "001").exit_code == 0
    assert read_object(f"{base}/scores/001.csv") == alone["004.csv"]
    assert len(pd.concat(map(read_part, find_parts([f"{base}/scores"])))) == 75
    missing = run("score", detector, f"{base}/nosuch.tar", "--output", tmp_path / "scores")
    assert f"there is no {base}/nosuch.tar" in missing.stderr


@pytest.mark.slow
def test_two_ranks_one_killed_and_started_again(load_bench: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """What bench/shards.py does with 100,000 images: every image once, and the parts of one process."""
    module = load_bench("shards")
    bench = module.make_bench(tmp_path / "bench", images=2000, shards=20)
    bench.python = python_words()
    bench.finish(bench.start(tmp_path / "one"))
    alone = module.read_parts(tmp_path / "one")
    assert len(alone) == 21
    assert pd.concat(map(read_part, find_parts([tmp_path / "one"]))).score.nunique() > 200
    assert module.check_two_ranks(bench, alone) == []


@pytest.mark.slow
def test_torchrun_starts_all_again_where_one_has_died(load_bench: Callable[[str], ModuleType], tmp_path: Path) -> None:
    module = load_bench("shards")
    bench = module.make_bench(tmp_path / "bench", images=1500, shards=30)
    bench.python = python_words()
    bench.finish(bench.start(tmp_path / "one"))
    out = tmp_path / "scores"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = torchrun_words(launch, bench.words(out), environment)
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and len(list(out.glob("*.csv"))) < 4:
        time.sleep(0.01)
    os.kill(find_running(bench.words(out))[-1], deadly(command))
    assert process.wait() == 0
    assert module.read_parts(out) == module.read_parts(tmp_path / "one")
