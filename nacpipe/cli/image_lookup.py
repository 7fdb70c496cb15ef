"""From a cache's rows back to the images they came from."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from nacpipe.cli.output import note

if TYPE_CHECKING:
    import pandas as pd

    from nacpipe.benchmarks.standard import Benchmark
    from nacpipe.cache import Cache

TILES = 25  # on either side


def image_names(cache: Cache, split: str, index: list[int], data_root: Path | None) -> list[str]:
    """Return where images are: files, or LIST[POSITION] where they are not in files or their list is not at hand."""
    from nacpipe.benchmarks.lists import read_list
    from nacpipe.errors import InputError

    images = cache[split].images
    listed = None
    try:
        benchmark, root = _benchmark_of(cache, data_root)
        asked = benchmark.split(split)
        if not benchmark.packaged and asked.kind != "torchvision":
            listed = read_list(benchmark, asked, root)
            if listed is None:
                note(f"the list of {split} is not below {root}; say where the data is with --data-root DIR")
    except InputError as error:
        note(error.one_line())
    if listed is not None and listed.sha256 != images.get("sha256"):
        note(f"{listed.path} is not the list that {split} was made from; paths are left out")
        listed = None
    return [f"{images.get('list')}[{row}]" if listed is None else str(listed.file(row)) for row in index]


def write_mosaic(path: Path, cache: Cache, split: str, ranked: pd.DataFrame, data_root: Path | None) -> None:
    """Write a picture of the 25 highest and the 25 lowest scored images of a split.

    Args:
        path: the picture, a PNG.
        cache: the cache.
        split: the split's name.
        ranked: `inspection.rank_rows`'s frame.
        data_root: where lists and images lie; None: where the cache was made from.

    Raises:
        ImageError: the images are not at hand, or are others than those of the cache.
        MissingExtra: images need the extra `extract`.
    """
    from nacpipe.errors import ImageError
    from nacpipe.extraction.dataset import open_images
    from nacpipe.reporting.mosaic import draw_mosaic

    stored = cache[split].images
    benchmark, root = _benchmark_of(cache, data_root)
    count, seed = int(stored.get("images", 1)), int(stored.get("seed", 1))
    images = open_images(benchmark, benchmark.split(split), root, train_images=count, train_seed=seed)
    if images is None:
        raise ImageError(f"the images of {split} are not below {root}; say where they are with --data-root DIR")
    if images.sha256 != stored.get("sha256"):
        raise ImageError(f"{images.source} below {root} is not what {split} of {cache.path} was made from")
    tiles = list(zip(ranked["index"].tolist(), [f"{score:.4f}" for score in ranked["score"]], strict=True))
    blocks = {f"{split}: highest scored": tiles[:TILES], "lowest scored": tiles[: -TILES - 1 : -1]}
    picture = draw_mosaic(images.open, blocks)
    picture.save(path)


def _benchmark_of(cache: Cache, data_root: Path | None) -> tuple[Benchmark, Path]:
    """The benchmark, a file of one's own too, and where its images lie."""
    from nacpipe.benchmarks.toml import choose_root, open_benchmark

    words = shlex.split(cache.command())
    name = words[2] if words[:2] == ["nacpipe", "extract"] and len(words) > 2 else ""
    benchmark = open_benchmark(name if name.endswith(".toml") else str(cache.header.identity.get("benchmark")))
    made_from = cache.header.information.get("data_root")
    return benchmark, choose_root(benchmark, data_root or (Path(str(made_from)) if made_from else None))
