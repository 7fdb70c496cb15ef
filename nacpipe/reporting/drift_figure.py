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
        low, high = 100 * frame["flagged_low"], 100 * frame["flagged_high"]
        upper.fill_between(places, low, high, step="mid", color=INSIDE, alpha=0.15, label="chance")
        upper.scatter(places, 100 * frame["flagged"], c=colours, s=14, zorder=3)
        upper.set(ylabel="flagged, %", ylim=(0, None))
        upper.legend(loc="upper left")
        lower.fill_between(
            places, frame["percentile_10"], frame["percentile_90"], step="mid", color=INSIDE, alpha=0.15,
            label="10 % to 90 % of the images",
        )  # fmt: skip
        lower.axhline(50, color="#bbbbbb", linewidth=0.8, linestyle=":")
        lower.scatter(places, frame["percentile_50"], c=colours, s=14, zorder=3)
        lower.set(ylabel="percentile of id/val", ylim=(0, 100))
        lower.legend(loc="lower left")
        shown = places[:: max(1, -(-len(places) // MAX_NAMES))]
        names = [escape_bytes(str(frame["group"].iloc[place])).rpartition("/")[2] for place in shown]
        lower.set_xticks(shown, names, rotation=30, ha="right")
    return figure
