"""Tiles stand in order, each with its own image."""

from __future__ import annotations

import numpy as np
from PIL import Image

from nacpipe.reporting.mosaic import ACROSS, GAP, SIDE, TEXT, draw_mosaic


def test_every_tile_in_its_place() -> None:
    colours = [(5 * n, 255 - 5 * n, 100) for n in range(14)]
    sizes = [(10, 10), (300, 300)]
    picture = draw_mosaic(
        lambda n: Image.new("RGB", sizes[n % 2], colours[n]),
        {"high": [(n, "") for n in range(7)], "low": [(n, "") for n in range(13, 6, -1)]},
    )
    pixels = np.asarray(picture)
    wide = ACROSS * (SIDE + GAP) + 2 * GAP
    assert picture.width == 2 * wide
    for block, numbers in enumerate((range(7), range(13, 6, -1))):
        for place, number in enumerate(numbers):
            x = block * wide + GAP + place % 5 * (SIDE + GAP)
            y = 2 * GAP + TEXT + place // 5 * (SIDE + GAP + TEXT)
            tile = pixels[y : y + SIDE, x : x + SIDE].reshape(-1, 3)
            assert {tuple(pixel) for pixel in tile.tolist()} == {colours[number]}
            assert (pixels[y + SIDE // 2, x + SIDE] == 255).all()  # a gap between them


def test_oblong_and_grey_images_keep_their_shape() -> None:
    picture = draw_mosaic(lambda _: Image.new("L", (40, 10), 0), {"": [(0, "")]})
    tile = np.asarray(picture)[2 * GAP + TEXT :][:SIDE, GAP : GAP + SIDE]
    black = np.argwhere((tile == 0).all(axis=2))
    assert black.min(axis=0).tolist() == [36, 0]  # 24 of 96 rows, in the middle
    assert black.max(axis=0).tolist() == [59, 95]


def test_captions_are_drawn() -> None:
    plain, told = (
        np.asarray(draw_mosaic(lambda _: Image.new("L", (9, 9)), {title: [(0, text)]}))
        for title, text in (("", ""), ("high", "0.97"))
    )
    differ = np.argwhere((plain != told).any(axis=2))[:, 0]
    assert (differ < GAP + TEXT + GAP).any()
    assert (differ > 2 * GAP + TEXT + SIDE).any()
