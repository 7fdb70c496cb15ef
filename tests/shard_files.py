"""Shards of generated images: tar files as WebDataset writes them, and Parquet files."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from nacpipe.detector.shards import Shard, find_shards
from nacpipe.extraction.image_content import Unscored


def png(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(values).save(content, "png")
    return content.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], time: int = 1_700_000_000) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), time
            archive.addfile(member, io.BytesIO(content))
    return path


def write_parquet(path: Path, images: Iterable[tuple[str, bytes | None]], *, struct: bool = True) -> Path:
    import pyarrow
    import pyarrow.parquet

    rows = list(images)
    if struct:
        column = pyarrow.array([{"bytes": content, "path": name} for name, content in rows])
    else:
        column = pyarrow.array([content for _, content in rows], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"label": [0] * len(rows), "image": column}), path, row_group_size=50)
    return path


DOT = png(np.zeros((2, 2), np.uint8))


def names(shard: Shard) -> list[str]:
    return [f"{image.name}!" if isinstance(image, Unscored) else image.name for image in shard.images()]


def read(path: Path) -> Shard:
    (shard,) = find_shards([path])
    return shard
