"""Parquet shards: every row once and in order, of whatever type of bytes, and a few in memory."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from nacpipe.errors import ImageError
from nacpipe.extraction.image_content import EncodedImage
from tests.shard_files import DOT, names, read, write_parquet


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

    monkeypatch.setattr("nacpipe.detector.parquet_file.open_file", Counted)
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
