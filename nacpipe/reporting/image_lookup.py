"""From a cache's rows back to the images they came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nacpipe.benchmarks.standard import Benchmark, Split
from nacpipe.benchmarks.toml import choose_root, open_benchmark
from nacpipe.cache import Cache
from nacpipe.cache.options import read_options
from nacpipe.errors import ImageError, InputError

if TYPE_CHECKING:
    from PIL import Image


def find_benchmark(cache: Cache, benchmark: str | None, data_root: Path | None) -> tuple[Benchmark, Path]:
    """Return the benchmark that a cache was made from, and the folder where its images lie.

    Args:
        cache: the cache.
        benchmark: a name or a TOML file; None: the one that the cache records.
        data_root: None: the folder that the cache records.

    Raises:
        InputError: the cache does not say which benchmark it was made from, or that one is not there.
    """
    options, recorded_root = read_options(cache.header.information), cache.header.information.get("data_root")
    name = benchmark or (str(cache.header.identity.get("benchmark")) if options is None else options.benchmark)
    try:
        opened = open_benchmark(name)
    except InputError as error:
        if benchmark is None:
            error.add_note("say which benchmark it is with --benchmark NAME or --benchmark FILE.toml")
        raise
    return opened, choose_root(opened, data_root or (Path(str(recorded_root)) if recorded_root else None))


def as_extracted(benchmark: Benchmark, name: str, stored: Mapping[str, Any]) -> Split:
    """Return the split as it was extracted: where its list was missing it may have been made from id/val."""
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
    from nacpipe.extraction.dataset import open_images  # imports torch

    stored = cache[split].images
    opened, root = find_benchmark(cache, benchmark, data_root)
    count, seed = int(stored.get("images", 1)), int(stored.get("seed", 1))
    images = open_images(opened, as_extracted(opened, split, stored), root, train_images=count, train_seed=seed)
    if images is None:
        raise ImageError(f"the images of {split} are not below {root}; say where they are with --data-root DIR")
    if images.sha256 != stored.get("sha256"):
        raise ImageError(f"{images.source} below {root} is not what {split} of {cache.path} was made from")
    return images.open
