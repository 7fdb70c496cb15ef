"""Where images come from: every member once and in order, with what is none named; a damaged shard is told."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from nacpipe.detector.shards import Shard, Unscored, check_stems, expand_braces, find_shards
from nacpipe.errors import ImageError, InputError
from nacpipe.extraction.encoded_images import EncodedImage
from tests.shard_files import png, write_parquet, write_tar

DOT = png(np.zeros((2, 2), np.uint8))


def names(shard: Shard) -> list[str]:
    return [f"{image.name}!" if isinstance(image, Unscored) else image.name for image in shard.images()]


def read(path: Path) -> Shard:
    (shard,) = find_shards([path])
    return shard


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


PACKED = {"gz": "a.tar.gz", "GZ": "A.TGZ", "bz2": "a.tar.bz2", "xz": "a.tar.xz"}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_tar_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / PACKED[kind]
    noise = [png(np.random.default_rng(row).integers(0, 256, (20, 20), np.uint8)) for row in range(200)]
    members = [(f"{row}.png", content) for row, content in enumerate(noise)]
    with tarfile.open(path, f"w:{kind.lower()}") as archive:  # type: ignore[call-overload]
        for name, content in members:
            member = tarfile.TarInfo(name)
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


def test_a_damaged_header_is_not_the_end(tmp_path: Path) -> None:
    content = bytearray(write_tar(tmp_path / "a.tar", [(f"{n}.png", DOT) for n in range(9)]).read_bytes())
    content[2 * 1024 + 148 : 2 * 1024 + 156] = b"12345678"  # the third member's checksum
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.tar is damaged at byte 2048"):
        names(read(tmp_path / "a.tar"))


@pytest.mark.parametrize("struct", [True, False])
def test_parquet(tmp_path: Path, struct: bool) -> None:
    images = [(f"{n}.png", DOT if n != 3 else None) for n in range(120)]
    shard = read(write_parquet(tmp_path / "a.parquet", images, struct=struct))
    expected = [f"{n}.png" if struct else str(n) for n in range(120)]
    expected[3] += "!"
    assert names(shard) == expected
    first, *_ = shard.images("image")
    assert isinstance(first, EncodedImage)
    assert first.read() == DOT
    with pytest.raises(ImageError, match=r"has not a column 'label' of encoded images .* it has label, image"):
        list(shard.images("label"))


def test_every_type_of_bytes_in_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    kinds = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(len(DOT))]
    columns = [pa.array([DOT, DOT], kind) for kind in kinds]
    columns.append(pa.array([DOT, DOT]).dictionary_encode())
    columns += [pa.StructArray.from_arrays([column], ["bytes"]) for column in columns[:2]]
    for number, column in enumerate(columns):
        pyarrow.parquet.write_table(pa.table({"image": column}), tmp_path / f"{number}.parquet")
        images = [*read(tmp_path / f"{number}.parquet").images()]
        assert [image.read() for image in images if isinstance(image, EncodedImage)] == [DOT, DOT]
    for column in (
        pa.array(["a.png"]),
        pa.array([[DOT]]),
        pa.array([{"bytes": {"bytes": DOT}}]),
        pa.array([{"a": DOT}]),
    ):
        pyarrow.parquet.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
        with pytest.raises(ImageError, match=r"has not a column of encoded images .* it has image$"):
            names(read(tmp_path / "a.parquet"))


def test_a_parquet_file_of_one_row_group_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    images = [np.random.default_rng(row).bytes(1 << 16) for row in range(500)]
    table = pyarrow.table({"image": images})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=False, write_batch_size=16)
    sizes = []

    class Counted(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes | None:
            sizes.append(size or 0)
            return super().read(size)

    monkeypatch.setattr("nacpipe.detector.shards._open", Counted)
    shard = read(tmp_path / "a.parquet")
    assert [image.read() for image in shard.images() if isinstance(image, EncodedImage)] == images
    assert len(sizes) > 4
    assert max(sizes) <= 8 << 20  # of 32 MiB


def test_a_parquet_file_with_a_name_that_is_no_text(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    ends = pyarrow.py_buffer(np.array([0, 2], np.int32))
    path = pyarrow.StringArray.from_buffers(1, ends, pyarrow.py_buffer(b"\xff\xfe"))
    struct = pyarrow.StructArray.from_arrays([pyarrow.array([DOT]), path], ["bytes", "path"])
    pyarrow.parquet.write_table(pyarrow.table({"image": struct}), tmp_path / "a.parquet")
    with pytest.raises(ImageError, match=r"a\.parquet cannot be read as Parquet: 'utf-8' codec"):
        names(read(tmp_path / "a.parquet"))


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
