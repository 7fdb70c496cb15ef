"""Write the golden caches: python tests/data/caches/make.py FOLDER. Those in the repository are never made anew.

    v1/first-*.tar.xz   by commit ce5f439, whose root attributes had no digest and whose classifier had no checksums
    v1/*.tar.xz         by the commit that added this file, when 1 was the newest version
    v2/*.tar.xz         by the commit that added the folder

A new version of the format gets a folder of its own beside these, which stay. Values are `value_of`'s. The scores of
v2's caches are v1's: the values are the same.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nacpipe.cache import CacheWriter, Header, LayerSpec

ROWS = {"id/train": 20, "id/val": 9, "csid/blur": 3, "ood/val": 10, "ood/near/letters": 8, "ood/far/textures": 5}
FORMS: dict[str, dict[str, int]] = {
    "plain": {},
    "sharded": {"shard_blocks": 2},
    "mantissa_bits": {"mantissa_bits": 7},
    "ranks": {},
    "forward": {"gradients": False},
    "labels_by_block": {},
}


def value_of(array: str, split: str, row: NDArray[Any], column: NDArray[Any]) -> NDArray[np.float32]:
    """A float32 with few bits, other for every place; `array` (its name in version 1) and `split` by their length."""
    spread = ((len(array) * 5 + len(split) * 3 + row * 7 + column * 11) % 61 - 30) / 16
    return np.asarray(spread * (1 + 2.0**-12), np.float32)


def draw(header: Header, split: str, rows: int) -> dict[str, NDArray[Any]]:
    row = np.arange(rows)
    floats = {
        path: value_of(path.removeprefix("layers/"), split, row[:, None], np.arange(width))
        for path, (width, _) in header.arrays().items()
        if width
    }
    return {**floats, "label": row % 3 if not split.startswith("ood/") else np.full(rows, -1), "index": 2 * row}


def write(path: Path, **form: int) -> None:
    header = Header(
        identity={
            "benchmark": "digits",
            "architecture": "golden",
            "family": "golden",
            "weights": "0123456789abcdef" * 4,
            "transform": {"resize": 28, "crop": 28, "mean": [0.5], "std": [0.25]},
            "dtype": "float32",
        },
        information={"nacpipe": "golden", "command": "nacpipe extract digits --cache golden.zarr"},
        block_rows=4,
        layers=(
            LayerSpec(name="avgpool", path="avgpool", pooling="sum-nchw", neurons=3),
            LayerSpec(name="layer1", path="body.layer1", pooling="sum-nchw", neurons=2),
        ),
        classes=3,
        features=3,
        **form,
    )
    writers = [CacheWriter(path, header)]
    if path.name == "ranks.zarr":
        writers.append(CacheWriter(path, header, first=False))
    writers[0].write_classifier(np.eye(3, dtype=np.float32), np.array([0.5, 0, -0.5], np.float32))
    unit = header.block_rows * header.shard_blocks
    for split, rows in ROWS.items():
        arrays = draw(header, split, rows)
        known = {} if path.name == "labels_by_block.zarr" else {key: arrays[key] for key in ("label", "index")}
        images = {"list": f"{split.replace('/', '_')}.txt", "sha256": "fedcba9876543210" * 4}
        writers[0].prepare(split, rows, images, **known)
        units = range(0, rows, unit)
        for number, start in enumerate(units):
            writer = writers[number * len(writers) // len(units)]
            writer.write_block(split, start // 4, {key: array[start : start + unit] for key, array in arrays.items()})
        writers[0].seal(split)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, form in FORMS.items():
        write(folder / f"{name}.zarr", **form)
        shutil.make_archive(str(folder / name), "xztar", folder, f"{name}.zarr")
        shutil.rmtree(folder / f"{name}.zarr")
