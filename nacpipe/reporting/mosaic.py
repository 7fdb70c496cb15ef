"""A picture of many small images, in blocks side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, TEXT = 96, 8, 14  # pixels: of a tile, between tiles, of a line of text
ACROSS = 5  # tiles


def draw_mosaic(open_one: Callable[[int], Image.Image], blocks: Mapping[str, Sequence[tuple[int, str]]]) -> Image.Image:
    """Return a picture of blocks side by side, each under its title, five tiles across, row by row.

        highest scored      lowest scored
        ▣ ▣ ▣ ▣ ▣           ▣ ▣ ▣ ▣ ▣
        .97 .97 .96 …       .61 .62 .62 …

    Args:
        open_one: position → image, of any size and mode; it is scaled to fit its tile.
        blocks: title → (position, caption) of its tiles.

    Raises:
        ImageError: an image cannot be read.
    """
    font = ImageFont.load_default(TEXT - 2)
    step_x, step_y = SIDE + GAP, SIDE + GAP + TEXT
    wide = ACROSS * step_x + 2 * GAP
    deepest = max((len(tiles) + ACROSS - 1) // ACROSS for tiles in blocks.values())
    picture = Image.new("RGB", (wide * len(blocks), deepest * step_y + TEXT + 3 * GAP), "white")
    draw = ImageDraw.Draw(picture)
    for block, (title, tiles) in enumerate(blocks.items()):
        left, top = block * wide + GAP, GAP
        draw.text((left, top), title, "black", font)
        for place, (position, caption) in enumerate(tiles):
            x = left + place % ACROSS * step_x
            y = top + TEXT + GAP + place // ACROSS * step_y
            tile = fit_tile(open_one(position).convert("RGB"))
            picture.paste(tile, (x + (SIDE - tile.width) // 2, y + (SIDE - tile.height) // 2))
            draw.text((x, y + SIDE + 1), caption, "black", font)
    return picture


def draw_strips(strips: Mapping[str, Sequence[tuple[Image.Image, str]]]) -> Image.Image:
    """Return a picture of rows below each other, each under its title.

        letters: taken for known
        ▣    ▣    ▣    ▣    ▣    ▣
        99 % 98 % 98 % 97 % …

    Args:
        strips: title → (image, caption) of its tiles.
    """
    font = ImageFont.load_default(TEXT - 2)
    step_x, step_y = SIDE + GAP, SIDE + GAP + 2 * TEXT + GAP
    longest = max(len(tiles) for tiles in strips.values())
    picture = Image.new("RGB", (longest * step_x + GAP, len(strips) * step_y + GAP), "white")
    draw = ImageDraw.Draw(picture)
    for row, (title, tiles) in enumerate(strips.items()):
        top = row * step_y + GAP
        draw.text((GAP, top), title, "black", font)
        for place, (image, caption) in enumerate(tiles):
            x, y = GAP + place * step_x, top + TEXT + GAP // 2
            tile = fit_tile(image.convert("RGB"))
            picture.paste(tile, (x + (SIDE - tile.width) // 2, y + (SIDE - tile.height) // 2))
            draw.text((x, y + SIDE + 1), caption, "black", font)
    return picture


def fit_tile(image: Image.Image, *, enlarge: bool = True) -> Image.Image:
    """Return an image scaled so that its longer side is a tile's; small images keep their pixels' sharp edges."""
    scale = SIDE / max(image.size)
    if scale >= 1 and not enlarge:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
