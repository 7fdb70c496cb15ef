"""The picture of `nacpipe watch`: the share of flagged images, with chance's band, and the percentiles, by group."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from nacpipe.reporting.figures import INSIDE, OUTSIDE, STYLE
from nacpipe.text import escape_bytes

MAX_NAMES = 12  # below the axis


def draw_drift(frame: pd.DataFrame) -> Figure:
    """Draw what `watch` returns: a point per group, those of drift in another colour."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.8), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        places = np.arange(len(frame))
        colours = [OUTSIDE if drift else INSIDE for drift in frame["drift"]]
        for axes, low, middle, high, label in (
            (upper, 100 * frame["flagged_low"], 100 * frame["flagged"], 100 * frame["flagged_high"], "by chance"),
            (
                lower, frame["percentile_10"], frame["percentile_50"], frame["percentile_90"],
                "10 % to 90 % of the images; a point is their median",
            ),
        ):  # fmt: skip
            axes.bar(places, high - low, 0.8, low, color=INSIDE, alpha=0.15, label=label)
            axes.scatter(places, middle, c=colours, s=14, zorder=3)
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        upper.set(ylabel="flagged, %", ylim=(0, None))
        lower.axhline(50, color="#bbbbbb", linewidth=0.8, linestyle=":")
        lower.set(ylabel="percentile of id/val", ylim=(0, 100), xlim=(-0.6, len(frame) - 0.4))
        shown = places[:: max(1, -(-len(places) // MAX_NAMES))]
        names = [escape_bytes(str(frame["group"].iloc[place])).rpartition("/")[2] for place in shown]
        lower.set_xticks(shown, names, rotation=30, ha="right")
    return figure
