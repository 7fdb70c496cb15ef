"""From a cache's rows back to the images they came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nacpipe.cli.output import note

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

    from nacpipe.benchmarks.standard import Benchmark, Split
    from nacpipe.cache import Cache

TILES = 25  # on either side


def find_benchmark(cache: Cache, benchmark: str | None, data_root: Path | None) -> tuple[Benchmark, Path]:
    """Return the benchmark that a cache was made from, and the folder where its images lie.

    Args:
        cache: the cache.
        benchmark: a name or a TOML file; None: the one that the cache records.
        data_root: None: the folder that the cache records.

    Raises:
        InputError: the cache does not say which benchmark it was made from, or that one is not there.
    """
    from nacpipe.benchmarks.toml import choose_root, open_benchmark
    from nacpipe.cache.options import read_options
    from nacpipe.errors import InputError

    options, recorded_root = read_options(cache.header.information), cache.header.information.get("data_root")
    name = benchmark or (str(cache.header.identity.get("benchmark")) if options is None else options.benchmark)
    try:
        opened = open_benchmark(name)
    except InputError as error:
        if benchmark is None:
            error.add_note("say which benchmark it is with --benchmark NAME or --benchmark FILE.toml")
        raise
    return opened, choose_root(opened, data_root or (Path(str(recorded_root)) if recorded_root else None))


def image_names(
    cache: Cache, split: str, index: list[int], benchmark: str | None = None, data_root: Path | None = None
) -> list[str]:
    """Return where images are: files, or LIST[POSITION] where they are not in files or their list is not at hand."""
    from nacpipe.benchmarks.lists import read_list
    from nacpipe.errors import InputError

    images = cache[split].images
    image_list = None
    try:
        opened, root = find_benchmark(cache, benchmark, data_root)
        wanted = _as_extracted(opened, split, images)
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


def _as_extracted(benchmark: Benchmark, name: str, stored: Mapping[str, Any]) -> Split:
    """The split as it was when it was extracted: where its list was missing it may have been made from id/val."""
    synthetic = stored.get("synthetic")
    if not isinstance(synthetic, Mapping):
        return benchmark.split(name)
    return benchmark.make_synthetic(name, tuple(synthetic.get("kinds", ())))


def open_split_images(
    cache: Cache, split: str, benchmark: str | None = None, data_root: Path | None = None
) -> Callable[[int], Image.Image]:
    """Return the function that opens a split's images by their position in its list.

    Args:
        cache: the cache.
        split: the split's name.
        benchmark: as `find_benchmark` takes it.
        data_root: as `find_benchmark` takes it.

    Raises:
        ImageError: the images are not at hand, or are others than those of the cache.
        InputError: the cache does not say which benchmark it was made from, or that one is not there.
        MissingExtra: images need the extra `extract`.
    """
    from nacpipe.errors import ImageError
    from nacpipe.extraction.dataset import open_images

    stored = cache[split].images
    opened, root = find_benchmark(cache, benchmark, data_root)
    count, seed = int(stored.get("images", 1)), int(stored.get("seed", 1))
    images = open_images(opened, _as_extracted(opened, split, stored), root, train_images=count, train_seed=seed)
    if images is None:
        raise ImageError(f"the images of {split} are not below {root}; say where they are with --data-root DIR")
    if images.sha256 != stored.get("sha256"):
        raise ImageError(f"{images.source} below {root} is not what {split} of {cache.path} was made from")
    return images.open


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
    from nacpipe.reporting.mosaic import draw_mosaic

    open_one = open_split_images(cache, split, benchmark, data_root)
    tiles = list(zip(ranked["index"].tolist(), [f"{score:.4f}" for score in ranked["score"]], strict=True))
    blocks = {f"{split}: highest scored": tiles[:TILES], "lowest scored": tiles[: -TILES - 1 : -1]}
    draw_mosaic(open_one, blocks).save(path)
