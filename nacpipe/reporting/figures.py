"""The report's figures: one small panel each, which a phone can show.

Drawn on bare `Figure` objects: no window, no state shared with other users of matplotlib.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nacpipe.method.coverage import bin_edges
from nacpipe.method.fitted_term import FittedTerm
from nacpipe.method.metrics import roc_curve
from nacpipe.reporting.galleries import to_percentiles
from nacpipe.text import escape_bytes
from nacpipe.tuning.explain import Explanation
from nacpipe.tuning.validation import SHOWN

SIZE = (3.6, 2.7)  # inches: a phone's width at CSS's 96 dots an inch
HISTOGRAM_BINS = 40
ROC_POINTS = 200
INSIDE, OUTSIDE = "#0072b2", "#d55e00"  # Okabe and Ito's colours, told apart by everyone
OTHERS = ("#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#666666")
STYLE: Any = {
    "text.parse_math": False,  # a foreign name's $ is no formula
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 7.5,
    "legend.columnspacing": 1.2,
    "legend.handlelength": 1.4,
    "legend.frameon": False,
    "svg.hashsalt": "nacpipe",  # the same figure, the same bytes
    "svg.fonttype": "path",
    "savefig.dpi": 150,
}

Scores = NDArray[np.float64]


def draw_histogram(inside: Scores, outside: Scores, names: tuple[str, str], reference: Scores | None = None) -> Figure:
    """Draw the shares of ID and OOD images over the score: as percentiles of the reference's scores where there is one.

    Args:
        inside: ID scores.
        outside: OOD scores.
        names: of the two sets.
        reference: the scores of id/val.
    """
    figure, axes = _panel(f"{names[0]} against {names[1]}", "score", "images, %")
    if reference is None:
        edges = np.histogram_bin_edges(np.concatenate([inside, outside]), HISTOGRAM_BINS)
    else:
        axes.set_xlabel("score, percentile of id/val")
        inside, outside = to_percentiles(inside, reference), to_percentiles(outside, reference)
        edges = np.linspace(0, 100, HISTOGRAM_BINS + 1)
        axes.axvline(5, color="#888888", linewidth=0.8, linestyle=":")  # the threshold that keeps 95 % of id/val
    for scores, name, colour in ((inside, names[0], INSIDE), (outside, names[1], OUTSIDE)):
        heights = 100 * np.histogram(scores, edges)[0] / scores.size
        axes.stairs(heights, edges, fill=True, alpha=0.45, color=colour, label=name)
        axes.stairs(heights, edges, color=colour, linewidth=0.8)
    axes.locator_params(axis="x", nbins=5)
    return _with_legend(figure, axes, 2)


def draw_roc(methods: Mapping[str, tuple[Scores, Scores]], name: str) -> Figure:
    """Draw the share of OOD images that are flagged over the share of ID images that are, per method (ID, OOD)."""
    figure, axes = _panel(name, "ID flagged, %", "OOD flagged, %")
    axes.plot([0, 100], [0, 100], color="#bbbbbb", linewidth=0.8, linestyle=":")
    for number, (method, scores) in reversed([*enumerate(methods.items())]):  # the first one on top
        flagged = 100 * _thin(roc_curve(*scores))
        colour, width = (INSIDE, 2.0) if number == 0 else (OTHERS[(number - 1) % len(OTHERS)], 1.1)
        dashes = "-" if number <= len(OTHERS) else "--"
        axes.plot(flagged[:, 0], flagged[:, 1], color=colour, linewidth=width, linestyle=dashes, label=method)
    axes.set(xlim=(-2, 102), ylim=(-2, 102))
    return _with_legend(figure, axes, 4, backwards=True)


def draw_coverage(layer: str, fitted: FittedTerm) -> Figure:
    """Draw a layer's coverage over the states: the mean over neurons, and three neurons.

    The three have the least, the middle and the greatest mean coverage of the layer.
    """
    figure, axes = _panel(f"{layer}: {fitted.counted} neurons", "state", "coverage")
    edges = bin_edges(fitted.params.bins, fitted.params.edges)
    table = fitted.coverage  # (neurons, bins - 1)
    mean = table.mean(axis=0)
    order = np.argsort(table.mean(axis=1), kind="stable")
    for number, place in enumerate(("least", "middle", "greatest")):
        neuron = order[(0, order.size // 2, -1)[number]]
        axes.stairs(table[neuron], edges, color=OTHERS[number], linewidth=0.7, label=f"neuron {neuron}, {place}")
    axes.stairs(mean, edges, color=INSIDE, linewidth=1.8, label="mean of all")
    covered = np.flatnonzero(mean >= 0.01 * mean.max())  # with a small alpha few bins about ½ hold all states
    low, high = edges[covered[0]], min(edges[covered[-1] + 1], 1.0)
    axes.set(xlim=(low - 0.05 * (high - low), high + 0.05 * (high - low)), ylim=(0, None))
    axes.locator_params(axis="x", nbins=5)
    return _with_legend(figure, axes, 2)


def draw_values(histograms: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Draw a layer's values below each other, `inspection.value_histograms`' frames by name over each other."""
    names = list(dict.fromkeys(name for frame in histograms.values() for name in frame["value"]))
    with rc_context(STYLE):
        figure = Figure(figsize=(1.6 * SIZE[0], 0.4 + 1.5 * len(names)), layout="constrained")
        figure.suptitle(title, fontsize=STYLE["axes.titlesize"])
        panels = figure.subplots(len(names), squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        for (label, frame), colour in zip(histograms.items(), (INSIDE, OUTSIDE), strict=False):
            bars = frame[frame["value"] == name]
            edges = np.append(bars["from"].to_numpy(), bars["to"].to_numpy()[-1:])
            density = bars["count"].to_numpy() / bars["count"].sum() / np.diff(edges)
            axes.stairs(density, edges, fill=True, alpha=0.45, color=colour, label=escape_bytes(label))
        axes.set(xlabel=name, ylabel="density")
    return _with_legend(figure, panels[0], 1)


def draw_weights(weights: Mapping[str, float]) -> Figure:
    """Draw the layers' shares in the score."""
    return _draw_bars([(name, 100 * weight) for name, weight in weights.items()], "layer weights", "share, %")


def draw_importances(parameters: pd.DataFrame) -> Figure:
    """Draw the importances of `explain`, the twelve greatest, in descending order."""
    known = parameters[parameters["importance"].notna()].sort_values("importance", ascending=False, kind="stable")
    bars = [(f"{row.layer} {row.parameter}", 100 * row.importance) for row in known.head(12).itertuples()]
    return _draw_bars(bars, "importances in the search", "share, %")


def draw_history(explanation: Explanation) -> Figure:
    """Draw every trial's value and the best so far, in percent."""
    figure, axes = _panel("the search", "trial", f"{SHOWN[explanation.objective]}, %")
    values, best = (100 * explanation.history[name].to_numpy(float) for name in ("value", "best"))
    axes.plot(explanation.history["number"], values, ".", color=OTHERS[3], markersize=2, rasterized=True, label="trial")
    axes.plot(
        explanation.history["number"], best, color=INSIDE, linewidth=1.5, drawstyle="steps-post", label="best so far"
    )
    low, high = np.quantile(values, [0.1, 1.0] if explanation.maximize else [0.0, 0.9]).tolist()  # failures lie far off
    margin = 0.05 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)
    return _with_legend(figure, axes, 2)


def to_svg(figure: Figure, *, transparent: bool = False) -> bytes:
    """Return a figure as SVG; the same figure, the same bytes."""
    return _save(figure, "svg", metadata={"Date": None}, transparent=transparent)


def to_png(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    return _save(figure, "png", metadata={"Software": None})


def write_figure(folder: Path, name: str, figure: Figure) -> None:
    """Write NAME.svg and NAME.png."""
    (folder / f"{name}.svg").write_bytes(to_svg(figure))
    (folder / f"{name}.png").write_bytes(to_png(figure))


def _panel(title: str, across: str, up: str, height: float = SIZE[1]) -> tuple[Figure, Axes]:
    with rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0], height), layout="constrained")
        axes = figure.add_subplot()
        axes.set(title=title, xlabel=across, ylabel=up)
    return figure, axes


def _with_legend(figure: Figure, axes: Axes, columns: int, *, backwards: bool = False) -> Figure:
    """Add the legend below the panel."""
    handles, labels = axes.get_legend_handles_labels()
    step = -1 if backwards else 1
    with rc_context(STYLE):
        figure.legend(handles[::step], labels[::step], loc="outside lower center", ncols=columns)
    return figure


def _draw_bars(bars: Sequence[tuple[str, float]], title: str, across: str) -> Figure:
    figure, axes = _panel(title, across, "", height=max(1.4, 0.7 + 0.2 * len(bars)))
    places = np.arange(len(bars))
    axes.barh(places, [value for _, value in bars], color=INSIDE, height=0.65)
    for place, (_, value) in enumerate(bars):
        axes.annotate(f"{value:.1f}", (value, place), (3, 0), textcoords="offset points", va="center", fontsize=7.5)
    with rc_context(STYLE):
        axes.set_yticks(places, [name for name, _ in bars])
    axes.set_xlim(0, 1.15 * max([value for _, value in bars if value > 0] or [1.0]))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    return figure


def _thin(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most ROC_POINTS of a curve's points, evenly along it, both ends kept."""
    along = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(points, axis=0)).sum(axis=1))])
    chosen = np.searchsorted(along, np.linspace(0, along[-1], ROC_POINTS))
    kept: NDArray[np.float64] = points[np.unique(np.minimum(chosen, len(points) - 1))]
    return kept


def _save(figure: Figure, kind: str, metadata: dict[str, None], *, transparent: bool = False) -> bytes:
    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format=kind, metadata=metadata, transparent=transparent)
    return buffer.getvalue()
