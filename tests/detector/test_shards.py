"""Where images come from: which shards are named, and which files."""

from __future__ import annotations

from pathlib import Path

import pytest

from nacpipe.detector.shards import check_stems, expand_braces, find_shards
from nacpipe.errors import ImageError, InputError
from tests.shard_files import DOT, names, read, write_tar


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("a.tar", ["a.tar"]),
        ("s3://b/{008..011}.tar", [f"s3://b/{n}.tar" for n in ("008", "009", "010", "011")]),
        ("{0..1}/{3..4}.tar", ["0/3.tar", "0/4.tar", "1/3.tar", "1/4.tar"]),
        ("{train,val}-{08..10}.tar", [f"{name}-{n}.tar" for name in ("train", "val") for n in ("08", "09", "10")]),
        ("a{,b}.tar.gz", ["a.tar.gz", "ab.tar.gz"]),
        ("{a}{}.tar", ["{a}{}.tar"]),
    ],
)
def test_braces(address: str, found: list[str]) -> None:
    assert expand_braces(address) == found


def test_a_file_whose_name_has_braces(tmp_path: Path) -> None:
    write_tar(tmp_path / "{0..1}.tar", [("1.png", DOT)])
    assert [shard.address for shard in find_shards([tmp_path / "{0..1}.tar"])] == [f"{tmp_path}/{{0..1}}.tar"]


def test_a_range_that_ends_before_it_begins() -> None:
    with pytest.raises(InputError, match=r"the range \{3\.\.1\} ends before it begins"):
        expand_braces("{3..1}.tar")


@pytest.mark.parametrize("name", ["a.tar.zst", "a.zip", "A.Tar.LZ4"])
def test_other_archives_are_refused_in_words(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        InputError, match=rf"{name}: archives .* are not read; pack it anew, as one of \.tar, \.tar\.gz"
    ):
        find_shards([tmp_path / name])


def test_a_folder_of_shards_says_how_they_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "000.tar", [("1.png", DOT)])
    with pytest.raises(ImageError, match=r"shards are named one by one, such as .*/000\.tar$"):
        names(read(tmp_path))


def test_a_part_of_a_hidden_folder_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / ".incoming").mkdir()
    assert read(tmp_path / ".incoming").stem == "incoming"
    assert read(tmp_path / ".a.tar").stem == "a"


def test_lists_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "photos/b").mkdir(parents=True)
    for name in ("photos/2.png", "photos/b/1.png", "3.png"):
        (tmp_path / name).write_bytes(DOT)
    (tmp_path / "nightly.txt").write_text("photos/2.png\n\n3.png\n")
    shards = find_shards([tmp_path / "photos", tmp_path / "3.png", tmp_path / "nightly.txt", tmp_path / "nosuch.png"])
    assert [(shard.kind, shard.stem) for shard in shards] == [
        ("folder", "photos"), ("list", "nightly"), ("files", "images"),
    ]  # fmt: skip
    assert [[Path(name).relative_to(tmp_path).as_posix() for name in names(shard)] for shard in shards] == [
        ["photos/2.png", "photos/b/1.png"], ["photos/2.png", "3.png"], ["3.png", "nosuch.png"],
    ]  # fmt: skip


def test_two_shards_of_one_name_are_refused(tmp_path: Path) -> None:
    shards = find_shards([tmp_path / "a/000.tar", tmp_path / "b/000.tar"])
    with pytest.raises(InputError, match=r"a/000\.tar and .*b/000\.tar would both be written as 000"):
        check_stems(shards)
