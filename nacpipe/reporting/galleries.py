"""Images of each set that a method scores most wrongly and most rightly, as thumbnails of a page and as one picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nacpipe.cache import Cache
from nacpipe.errors import NacError
from nacpipe.reporting.image_lookup import open_split_images
from nacpipe.reporting.mosaic import draw_strips, fit_tile
from nacpipe.text import label_set

SHOWN = 8  # images of a row
JPEG_FROM = 64  # pixels of the longer side from which a thumbnail is a JPEG: photographs are a tenth of a PNG then

OpenImage = Callable[[int], Image.Image]  # position in a split's list → the image
Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Thumbnail:
    """One image of a gallery."""

    image: Image.Image
    """At most a tile's size, in its own mode."""
    caption: str
    """Its score, as a percentile of id/val where there is one."""

    def uri(self) -> str:
        """Return the image as a `data:` address."""
        buffer, kind = io.BytesIO(), "jpeg" if max(self.image.size) >= JPEG_FROM else "png"
        self.image.convert("RGB" if kind == "jpeg" else self.image.mode).save(buffer, kind)
        return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """What a page shows of one set."""

    split: str
    mistakes: Sequence[Thumbnail]
    """The worst first: of an OOD set the highest scored, of an ID set the lowest."""
    typical: Sequence[Thumbnail]
    """Of an OOD set the lowest scored, of an ID set the highest."""

    def title(self) -> str:
        """Return the set's name in tables, with its group."""
        return self.split if self.split.startswith("id/") else self.split.removeprefix("ood/")

    def headings(self) -> tuple[str, str]:
        """Return what the two rows show."""
        if self.split.startswith("ood/"):
            return "worst mistakes: scored highest", "recognised most clearly: scored lowest"
        return "worst mistakes: scored lowest", "most typical: scored highest"


def build_galleries(
    cache: Cache,
    scores: Mapping[str, Scores],  # split → (rows,); larger = more like the training data
    open_split: Callable[[str], OpenImage],
    reference: Scores | None,  # (rows of id/val,)
) -> list[Gallery]:
    """Return a gallery for each split that was scored.

    Raises:
        ImageError: the images are not at hand, or are others than those of the cache.
    """
    galleries = []
    for split, values in scores.items():
        open_one, index = open_split(split), cache[split].index
        order = np.argsort(values, kind="stable")  # ascending
        if reference is None:
            captions = [f"{value:.4f}" for value in values]
        else:
            captions = [f"{place:.3g} %" for place in to_percentiles(values, reference)]
        low, high = (
            [
                Thumbnail(image=fit_tile(open_one(int(index[row])), enlarge=False), caption=captions[row])
                for row in rows.tolist()
            ]
            for rows in (order[:SHOWN], order[::-1][:SHOWN])
        )
        outside = split.startswith("ood/")
        galleries.append(Gallery(split=split, mistakes=high if outside else low, typical=low if outside else high))
    return galleries


def draw_mistakes(galleries: Sequence[Gallery]) -> Image.Image:
    """Return one picture of the worst mistakes, a row for each set."""
    strips = {
        f"{label_set(g.split)}: {g.headings()[0].partition(': ')[2]}": [(t.image, t.caption) for t in g.mistakes]
        for g in galleries
    }
    return draw_strips(strips)


def to_percentiles(
    scores: Scores,  # (rows,)
    reference: Scores,  # (rows of id/val,)
) -> Scores:  # (rows,), 0 … 100
    """Return the share of id/val, in percent, that scores no higher than each image."""
    return 100 * np.searchsorted(np.sort(reference), scores, side="right") / reference.size


def find_galleries(
    cache: Cache,
    scores: Mapping[str, Scores],  # split → (rows,)
    reference: Scores | None,  # (rows of id/val,)
    benchmark: str | None = None,
    data_root: Path | None = None,
) -> Sequence[Gallery] | str:
    """Return the images of every scored set but csid's, or why there are none: a page is whole without them.

    Args:
        cache: the cache.
        scores: NAC's.
        reference: NAC's scores of id/val.
        benchmark: as `find_benchmark` takes it.
        data_root: as `find_benchmark` takes it.
    """
    asked = {name: values for name, values in scores.items() if not name.startswith("csid/")}
    try:
        return build_galleries(
            cache, asked, lambda split: open_split_images(cache, split, benchmark, data_root), reference
        )
    except NacError as error:
        return error.one_line()
    except ModuleNotFoundError as error:
        return f"images need {error.name}; install it with: pip install 'nacpipe[extract]'"
