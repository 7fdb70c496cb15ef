"""Bar plots in text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import click

WIDTH, HEIGHT = 64, 5  # of a plot, in characters
EIGHTHS = " ▁▂▃▄▅▆▇█"


def print_bars(heights: Sequence[float], low: float, high: float, top: float | None = None) -> None:
    """Print bars side by side over the range from low to high, at most 64: of more, neighbours are averaged.

    A height above 0 is at least an eighth of a line. `top` is the value of a full bar; None: the greatest height.
    """
    bars = squeeze(heights, WIDTH)
    peak = max(bars) if top is None else top
    eighths = [max(round(8 * HEIGHT * bar / peak), 1) if bar > 0 else 0 for bar in bars]
    lines = [
        "  " + "".join(EIGHTHS[min(max(e - 8 * line, 0), 8)] for e in eighths).rstrip()
        for line in range(HEIGHT - 1, -1, -1)
    ]
    ends = f"{low:.4g}", f"{high:.4g}"
    lines += [f"  {'─' * len(bars)}", f"  {ends[0]} {ends[1].rjust(max(len(bars) - len(ends[0]) - 1, 1))}"]
    click.echo("\n".join(lines))  # in one piece: where the terminal lacks block characters, the whole plot is ASCII


def squeeze(heights: Sequence[float], width: int) -> list[float]:
    """Return at most `width` heights: neighbours are averaged."""
    count = min(width, len(heights))
    cuts = [round(i * len(heights) / count) for i in range(count + 1)]
    return [sum(heights[a:b]) / (b - a) for a, b in pairwise(cuts)]
