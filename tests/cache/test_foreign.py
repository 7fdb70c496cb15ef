"""Files of somebody else's in a cache's folder: named, left alone, in no digest, in nobody's way."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from nacpipe.cache import Cache, CacheWriter, open_cache
from nacpipe.cache.repair import repair_cache
from nacpipe.cache.verify import foreign_files, verify_cache
from nacpipe.cli import main
from nacpipe.errors import CacheError
from tests.alike import prepare_split

SPLITS = {"id/subtrain": 0}
FILES = {  # where they may lie, and of what kind they are
    "desktop.ini": "of Windows, in the root",
    "id/desktop.ini": "above the splits",
    "id/val/notes.txt": "a person's, in a split",
    "id/val/logits/Thumbs.db": "in an array",
    "id/val/logits/c.x~": "an editor's, among the chunks",
    "id/val/logits/.DS_Store": "hidden, beside a chunk",
    "id/val/logits/c.007.0": "nearly the name of a chunk",
    "id/val/label/c.1~": "a copy of a chunk",
    "id/val/blocks/c.readme": "among the marks",
    "id/val/thesis.partial": "nearly the name of a draft",
    "id/train/layer1/c.0": "a chunk of no array",
    "classifier/weight/notes.txt": "in the classifier",
    "ood/near/._letters": "of a Mac",
}
FOLDERS = {
    "id/val/mine/a.txt": "id/val/mine/",
    "id/val/mine/deep/b.txt": "id/val/mine/",
    "old/id/val/zarr.json": "old/",
}
INSIDE = {"id/train/layer1/c.0": "id/train/layer1/", **FOLDERS}
NAMED = sorted({INSIDE.get(name, name) for name in (*FILES, *FOLDERS)})  # a folder that is foreign as a whole, once


@pytest.fixture(scope="module")
def whole(make_cache: Callable[..., Cache], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("whole") / "c.zarr", rows=SPLITS)


@pytest.fixture
def path(whole: Cache, tmp_path: Path) -> Path:
    """A copy with foreign files in every place, and a link to nowhere, as Emacs leaves it."""
    shutil.copytree(whole.path, tmp_path / "c.zarr")
    return add_foreign(tmp_path / "c.zarr")


def add_foreign(path: Path) -> Path:
    for name in (*FILES, *FOLDERS):
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"foreign: {name}")
    (path / "id/val/.#notes.txt").symlink_to("nowhere")
    return path


def foreign(path: Path) -> dict[str, str]:
    """Those that are there, which must be as they were put there."""
    found = {name: (path / name).read_text() for name in (*FILES, *FOLDERS) if (path / name).exists()}
    assert all(content == f"foreign: {name}" for name, content in found.items())
    return found


def own(path: Path) -> dict[str, bytes]:
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {name: content for name, content in files.items() if name not in (*FILES, *FOLDERS)}


def nacpipe(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def write_missing(path: Path, whole: Cache) -> list[tuple[str, int]]:
    """Write again what is not there, as extraction does; return the blocks."""
    writer, written = CacheWriter(path, whole.header), []
    writer.write_classifier(*(whole.classifier() or ()))
    for name, split in whole.items():
        so_far = open_cache(path)
        if name in so_far and so_far.peek(name).sealed:
            continue
        for block in np.flatnonzero(~prepare_split(writer, split)).tolist():
            rows = slice(16 * block, 16 * block + 16)
            writer.write_block(name, block, {key: split.read(key)[rows] for key in whole.header.arrays()})
            written.append((name, block))
        writer.seal(name)
    return written


# --- reading ----------------------------------------------------------------------------------------------------------


def test_everything_is_read_and_foreign_files_are_named(path: Path, whole: Cache) -> None:
    cache = open_cache(path)
    assert list(cache) == list(whole)
    for name, split in cache.items():  # compared with its digest on the way
        np.testing.assert_array_equal(split.read("logits"), whole[name].read("logits"))
    assert cache.classifier() is not None
    assert verify_cache(cache) == []
    assert foreign_files(cache) == NAMED
    assert foreign_files(whole) == []


def test_verify_names_them_and_exits_with_0(path: Path) -> None:
    for option, word in (((), "whole"), (("--format",), "of the right form")):
        done = nacpipe("verify", path, *option)
        assert (done.exit_code, done.stdout) == (0, f"{path}: 6 splits, {word}\n")
        assert (
            done.stderr
            == f"not part of the cache, and left alone: {', '.join(NAMED[:10])} and {len(NAMED) - 10} more\n"
        )
    assert json.loads(nacpipe("verify", path, "--json").stdout) == {
        "cache": str(path), "splits": 6, "damage": [], "foreign": NAMED,
    }  # fmt: skip
    (path / "id/val/logits/c.0.0").unlink()
    done = nacpipe("verify", path)
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == f"nacpipe: {path}: 1 damaged; repair it with: nacpipe repair {path}"


def test_commands_work_beside_them(path: Path, tmp_path: Path) -> None:
    for command in (
        ("search", path, "--trials", 3),
        ("evaluate", path),
        ("export", path),
        ("inspect", path),
        ("inspect", path, "id/val", "layer1"),
    ):
        done = nacpipe(*command)
        assert done.exit_code == 0, done.output
    assert foreign(path).keys() == {*FILES, *FOLDERS}


@pytest.mark.parametrize(
    "key", ["label/c.99", *(pytest.param(key, marks=pytest.mark.slow) for key in ("logits/c.3.0", "blocks/c.7"))]
)
def test_a_chunk_that_the_format_could_have_written_is_still_damage(path: Path, key: str) -> None:
    (path / "id/val" / key).parent.mkdir(exist_ok=True)
    (path / "id/val" / key).write_bytes(b"12345")
    with pytest.raises(CacheError, match="id/val is not what was sealed"):
        open_cache(path)["id/val"]
    assert repair_cache(path) == [f"id/val/{key} is a chunk beyond the last row: it is removed"]
    assert verify_cache(open_cache(path)) == []
    assert foreign(path).keys() == {*FILES, *FOLDERS}


@pytest.mark.parametrize("array", ["logits", "label"])
def test_a_foreign_file_does_not_stand_for_a_chunk(path: Path, array: str) -> None:
    """There are files of such names in both folders."""
    chunk = path / "id/val" / array / ("c.2.0" if array == "logits" else "c.0")
    chunk.unlink()
    with pytest.raises(CacheError, match=rf"id/val/{array} is damaged \(1 of its chunks are not there\)"):
        open_cache(path)["id/val"]


# --- what an earlier version sealed -----------------------------------------------------------------------------------


@pytest.fixture
def old(make_cache: Callable[..., Cache], tmp_path: Path) -> Cache:
    """Of version 1."""
    return make_cache(tmp_path / "old.zarr", rows=SPLITS, version=1)


def seal_as_before(path: Path, split: str) -> None:
    """The rule of the first caches, of version 1: everything below a split that is not hidden."""
    root = path / split
    lines = []
    for file in sorted(root.rglob("*"), key=lambda file: file.relative_to(root).as_posix()):
        key = file.relative_to(root).as_posix()
        if file.is_file() and key != "zarr.json" and not any(part.startswith(".") for part in key.split("/")):
            content = file.read_bytes()
            counted = content if key.endswith("zarr.json") else content[-4:]
            lines += [f"{key} {hashlib.sha256(counted).hexdigest()}\n"] * (not key.endswith(".partial"))
    metadata = json.loads((root / "zarr.json").read_text())
    attributes = metadata["attributes"]
    head = json.dumps(
        {k: v for k, v in attributes.items() if k not in ("sealed", "digest")}, sort_keys=True, separators=(",", ":")
    )
    attributes["digest"] = hashlib.sha256(f"{head}\n{''.join(lines)}".encode()).hexdigest()
    (root / "zarr.json").write_text(json.dumps(metadata))


@pytest.mark.parametrize("version", [1, 2])
def test_what_was_sealed_without_foreign_files_has_the_same_digest(
    make_cache: Callable[..., Cache], tmp_path: Path, version: int
) -> None:
    whole = make_cache(tmp_path / "c.zarr", rows=SPLITS, version=version)
    digest = whole["id/val"].attributes["digest"]
    seal_as_before(tmp_path / "c.zarr", "id/val")
    assert open_cache(whole.path)["id/val"].attributes["digest"] == digest


def test_what_was_sealed_with_foreign_files_still_matches(old: Cache) -> None:
    path, digest = add_foreign(Path(old.path)), old["id/val"].attributes["digest"]
    seal_as_before(path, "id/val")
    assert open_cache(path)["id/val"].attributes["digest"] != digest
    assert verify_cache(open_cache(path)) == []
    assert repair_cache(path) == []
    (path / "id/val/label/zarr.json").write_bytes(b"")  # metadata is mended, under the old digest too
    assert repair_cache(path) == ["id/val/label: metadata rewritten"]
    assert verify_cache(open_cache(path)) == []
    (path / "id/val/logits/c/1/0").write_bytes((path / "id/val/logits/c/0/0").read_bytes())
    with pytest.raises(CacheError, match="id/val is not what was sealed"):
        open_cache(path)["id/val"]


# --- writing ----------------------------------------------------------------------------------------------------------


def cut_a_chunk(path: Path) -> None:
    (path / "id/val/layers/layer1/gradient/c.1.0").write_bytes(b"123")


def exchange_chunks(path: Path) -> None:
    (path / "id/val/logits/c.1.0").write_bytes((path / "id/val/logits/c.0.0").read_bytes())


def lose_attributes(path: Path) -> None:
    (path / "id/val/zarr.json").write_bytes(b"\0" * 300)


def lose_the_group(path: Path) -> None:
    (path / "id/val/zarr.json").unlink()


def cut_the_classifier(path: Path) -> None:
    (path / "classifier/weight/c.0.0").write_bytes(b"123")


def lose_an_array(path: Path) -> None:
    """Metadata alone of a split that is not sealed: it is mended."""
    content = json.loads((path / "id/val/zarr.json").read_text())
    content["attributes"].update(sealed=False, digest=None)
    (path / "id/val/zarr.json").write_text(json.dumps(content))
    (path / "id/val/logits/zarr.json").unlink()


@pytest.mark.parametrize(
    ("damage", "blocks"),
    [
        (cut_a_chunk, 1),
        (lose_the_group, 3),
        pytest.param(exchange_chunks, 3, marks=pytest.mark.slow),
        pytest.param(lose_attributes, 3, marks=pytest.mark.slow),
        pytest.param(cut_the_classifier, 0, marks=pytest.mark.slow),
        pytest.param(lose_an_array, 0, marks=pytest.mark.slow),
    ],
)
def test_repair_and_a_writer_leave_them_where_they_are(
    path: Path, whole: Cache, damage: Callable[[Path], None], blocks: int
) -> None:
    damage(path)
    repair_cache(path)
    assert foreign(path).keys() == {*FILES, *FOLDERS}
    assert len(write_missing(path, whole)) == blocks
    assert foreign(path).keys() == {*FILES, *FOLDERS}
    assert (path / "id/val/.#notes.txt").is_symlink()
    expected = own(Path(whole.path))
    found = own(path)
    assert {name for name in found if found[name] != expected[name] and not name.endswith("zarr.json")} == set()
    assert open_cache(path)["id/val"].attributes == whole["id/val"].attributes
    assert verify_cache(open_cache(path)) == []


def test_drop_removes_the_splits_own_objects_alone(path: Path, whole: Cache) -> None:
    for name in ("id/val/logits/c.1.0.0a1b.partial", "id/val/zarr.json.partial"):
        (path / name).write_bytes(b"half")
    others = {name: content for name, content in own(path).items() if not name.startswith("id/val/")}
    CacheWriter(path, whole.header, first=False).drop("id/val")
    assert foreign(path).keys() == {*FILES, *FOLDERS}
    found = own(path)
    copy = json.loads(found.pop("zarr.json")), json.loads(others.pop("zarr.json"))
    assert found == others
    metadata = [content.pop("consolidated_metadata")["metadata"] for content in copy]
    assert copy[0] == copy[1]
    assert metadata[0] == {key: value for key, value in metadata[1].items() if not f"{key}/".startswith("id/val/")}
    assert "id/val" not in open_cache(path)
    assert verify_cache(open_cache(path)) == []
    assert write_missing(path, whole) == [("id/val", 0), ("id/val", 1), ("id/val", 2)]
    assert open_cache(path)["id/val"].attributes == whole["id/val"].attributes
    assert foreign(path).keys() == {*FILES, *FOLDERS}


def test_drop_leaves_no_empty_folders(path: Path, whole: Cache) -> None:
    CacheWriter(path, whole.header).drop("id/test")
    assert not (path / "id/test").exists()
    CacheWriter(path, whole.header).drop("id/val")
    assert not (path / "id/val/layers").exists()
    assert sorted(str(p.relative_to(path / "id/val")) for p in (path / "id/val").rglob("*") if p.is_file()) == sorted(
        name.removeprefix("id/val/") for name in (*FILES, *FOLDERS) if name.startswith("id/val/")
    )


def test_a_cache_can_be_made_and_sealed_among_them(tmp_path: Path, whole: Cache) -> None:
    """They come while it is written: the first before the split, the others after its metadata."""
    path = tmp_path / "c.zarr"
    CacheWriter(path, whole.header)
    (path / "id/val").mkdir(parents=True)
    (path / "id/val/notes.txt").write_text("foreign: id/val/notes.txt")
    writer: Any = CacheWriter(path, whole.header)
    prepare_split(writer, whole["id/val"])
    (path / "id/val/logits/Thumbs.db").write_text("foreign: id/val/logits/Thumbs.db")
    (path / "id/val/.#notes.txt").symlink_to("nowhere")
    for block in range(3):
        rows = slice(16 * block, 16 * block + 16)
        writer.write_block("id/val", block, {k: whole["id/val"].read(k)[rows] for k in whole.header.arrays()})
    writer.seal("id/val")
    assert open_cache(path)["id/val"].attributes == whole["id/val"].attributes
    assert foreign(path).keys() == {"id/val/notes.txt", "id/val/logits/Thumbs.db"}
