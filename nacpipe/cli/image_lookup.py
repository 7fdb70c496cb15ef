"""The names of a cache's images, and pictures of them, for a command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nacpipe.cli.output import note

if TYPE_CHECKING:
    import pandas as pd

    from nacpipe.cache import Cache

TILES = 25  # on either side


def image_names(
    cache: Cache, split: str, index: list[int], benchmark: str | None = None, data_root: Path | None = None
) -> list[str]:
    """Return where images are: files, or LIST[POSITION] where they are not in files or their list is not at hand."""
    from nacpipe.benchmarks.lists import read_list
    from nacpipe.errors import InputError
    from nacpipe.reporting.image_lookup import as_extracted, find_benchmark

    images = cache[split].images
    image_list = None
    try:
        opened, root = find_benchmark(cache, benchmark, data_root)
        wanted = as_extracted(opened, split, images)
        if not opened.packaged and wanted.kind != "torchvision":
            image_list = read_list(opened, wanted, root)
            if image_list is None:
                note(f"the list of {split} is not below {root}; say where the data is with --data-root DIR")
    except InputError as error:
        note(error.one_line())
    if image_list is not None and image_list.sha256 != images.get("sha256"):
        note(f"{image_list.path} is not the list that {split} was made from; paths are left out")
        image_list = None
    return [f"{images.get('list')}[{row}]" if image_list is None else str(image_list.file(row)) for row in index]


def write_mosaic(
    path: Path,
    cache: Cache,
    split: str,
    ranked: pd.DataFrame,
    benchmark: str | None = None,
    data_root: Path | None = None,
) -> None:
    """Write a picture of the 25 highest and the 25 lowest scored images of a split.

    Args:
        path: the picture, a PNG.
        cache: the cache.
        split: the split's name.
        ranked: `inspection.rank_rows`'s frame.
        benchmark: as `find_benchmark` takes it.
        data_root: as `find_benchmark` takes it.

    Raises:
        ImageError, InputError, MissingExtra: as `open_split_images`.
    """
    from nacpipe.reporting.image_lookup import open_split_images
    from nacpipe.reporting.mosaic import draw_mosaic

    open_one = open_split_images(cache, split, benchmark, data_root)
    tiles = list(zip(ranked["index"].tolist(), [f"{score:.4f}" for score in ranked["score"]], strict=True))
    blocks = {f"{split}: highest scored": tiles[:TILES], "lowest scored": tiles[: -TILES - 1 : -1]}
    draw_mosaic(open_one, blocks).save(path)
