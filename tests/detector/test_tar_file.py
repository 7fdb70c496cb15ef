"""Tar shards: every member once and in order, with what is no image named; a damaged shard is told."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from nacpipe.detector.shards import find_shards
from nacpipe.errors import ImageError
from nacpipe.extraction.image_content import EncodedImage, Unscored
from tests.shard_files import DOT, names, png, read, write_tar


def test_members_that_belong_to_an_image_are_left_out_and_others_named(tmp_path: Path) -> None:
    shard = read(
        write_tar(
            tmp_path / "a.tar",
            [
                ("x/1.cls", b"3"), ("x/1.png", DOT), ("x/1.json", b"{}"),
                ("x/2.seg.png", DOT), ("x/2.jpg", DOT),
                ("3.pdf", b"%PDF"), ("4", b""), (".hidden.png", DOT), ("5.png", b""),
            ],
        )
    )  # fmt: skip
    assert shard.kind == "tar"
    assert names(shard) == ["x/1.png", "x/2.seg.png", "x/2.jpg", "3.pdf!", "4!", "5.png"]
    first, *_ = shard.images()
    assert isinstance(first, EncodedImage)
    assert (first.read(), first.time, first.where) == (DOT, 1_700_000_000.0, f"{tmp_path}/a.tar: x/1.png")
    (unscored,) = [image for image in shard.images() if isinstance(image, Unscored) and image.name == "3.pdf"]
    assert "a.tar: 3.pdf is no image; known endings: .bmp" in str(unscored)


def test_links_and_folders_in_a_tar_file(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("folder", tarfile.DIRTYPE), ("1.png", tarfile.SYMTYPE), ("2.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert names(read(tmp_path / "a.tar")) == ["1.png!", "2.png!"]


@pytest.mark.parametrize("cut", [100, 512, 700, 1024, 1500, 2048, 2600])
def test_a_tar_file_that_ends_early_is_not_taken_for_whole(tmp_path: Path, cut: int) -> None:
    """Wherever it was cut, between two members too: tarfile would take that for its end."""
    whole = write_tar(tmp_path / "a.tar", [(f"{n}.png", DOT) for n in range(9)]).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:cut])
    with pytest.raises(ImageError, match=r"a\.tar (ends|cannot be read|is damaged)"):
        names(read(tmp_path / "a.tar"))


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar file's header with a valid checksum."""
    member = tarfile.TarInfo(name)
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


HUGE = b"\x80" + b"\x7f" * 11  # in base 256


@pytest.mark.parametrize(
    "content",
    [
        header("a.txt", HUGE) + bytes(2048),
        header("a", HUGE, b"x") + bytes(2048),
        header("a.png", b"-0000002000\0") * 3 + bytes(2048),
        header("a.png", b"00000000000\0") + header("b.png", b"-0000002000\0") + bytes(2048),
        (header("a", b"00000000002\0", b"L") + b"b\0".ljust(512, b"\0")) * 2000 + bytes(2048),
    ],
    ids=["size", "size of a pax header", "negative size", "negative size behind another", "chain of long names"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_headers_that_tarfile_follows(tmp_path: Path, content: bytes, packed: bool) -> None:
    path = tmp_path / ("a.tar.gz" if packed else "a.tar")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ImageError, match=r"a\.tar(\.gz)? (cannot be read as a tar file: |is damaged|ends)"):
        names(read(path))


def test_webdataset_takes_a_torn_archive_for_its_end(tmp_path: Path) -> None:
    """Why it does not read the shards: docs/decisions/reading-shards.md."""
    tariterators = pytest.importorskip("webdataset.tariterators")
    whole = write_tar(tmp_path / "a.tar", [(f"{n}.png", DOT) for n in range(9)]).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: 4 * 1024])  # a header and a block of data each
    found = list(tariterators.tar_file_iterator(io.BytesIO(whole[: 4 * 1024])))
    assert [member["fname"] for member in found] == ["0.png", "1.png", "2.png", "3.png"]
    with pytest.raises(ImageError, match=r"a\.tar ends at byte 4096, before the end of its archive; copy it anew"):
        names(read(tmp_path / "a.tar"))


def test_shards_that_webdataset_wrote(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    for name in ("000.tar", "001.tar.gz"):
        with webdataset.TarWriter(str(tmp_path / name)) as writer:
            for row in range(3):
                writer.write({"__key__": f"a/{row:03}", "png": DOT, "cls": row, "json": {"row": row}})
    for shard in find_shards([tmp_path / "{000.tar,001.tar.gz}"]):
        assert names(shard) == ["a/000.png", "a/001.png", "a/002.png"]


PACKED = {"a.tar.gz": "gz", "A.TGZ": "gz", "a.tar.bz2": "bz2", "a.tbz2": "bz2", "a.tar.xz": "xz", "a.txz": "xz"}


@pytest.mark.parametrize("name", PACKED)
def test_packed_tar_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    noise = [png(np.random.default_rng(row).integers(0, 256, (20, 20), np.uint8)) for row in range(200)]
    with tarfile.open(path, f"w:{PACKED[name]}") as archive:  # type: ignore[call-overload]
        for row, content in enumerate(noise):
            member = tarfile.TarInfo(f"{row}.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    shard = read(path)
    assert (shard.kind, shard.stem.lower()) == ("tar", "a")
    assert [image.read() for image in shard.images() if isinstance(image, EncodedImage)] == noise
    whole = path.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 4):  # the last within the checksum, or the index
        path.write_bytes(whole[:cut])
        with pytest.raises(ImageError, match=r"(?i)a\.t.* cannot be read as a tar file: "):
            names(read(path))
    path.write_bytes(whole[:1000] + bytes(10) + whole[1010:])
    with pytest.raises(ImageError, match=r"(?i)a\.t.* (cannot be read as a tar file|is damaged)"):
        names(read(path))


def test_a_damaged_header_is_not_the_end(tmp_path: Path) -> None:
    content = bytearray(write_tar(tmp_path / "a.tar", [(f"{n}.png", DOT) for n in range(9)]).read_bytes())
    content[2 * 1024 + 148 : 2 * 1024 + 156] = b"12345678"  # the third member's checksum
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.tar is damaged at byte 2048"):
        names(read(tmp_path / "a.tar"))
