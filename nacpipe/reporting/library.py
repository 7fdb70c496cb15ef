"""`inspect` and `report` from Python: what the commands print, as frames and figures."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import pandas as pd

from nacpipe.cache import Cache, as_cache
from nacpipe.errors import InputError, MissingExtra, ParamsError
from nacpipe.evaluation.baselines import score_baselines
from nacpipe.evaluation.inspection import (
    LayerInspection,
    compare_splits,
    describe_layers,
    inspect_layer,
    rank_rows,
    summarise_cache,
    summarise_splits,
)
from nacpipe.evaluation.method_scores import evaluated_splits
from nacpipe.evaluation.tables import tabulate
from nacpipe.evaluation.training_runs import check_runs
from nacpipe.files import check_writable, write_whole
from nacpipe.method.params import LayerParams, NacParams
from nacpipe.method.term import layer_of, source_of
from nacpipe.scoring.params_file import find_params
from nacpipe.scoring.states import check_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nacpipe.reporting.galleries import Gallery

Params = NacParams | str | Path
"""Parameters, or a file of them; `published`: the paper's."""
TRIED_BINS = TRIED_SATURATION = 50  # of the coverage that is shown for an alpha alone


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheInspection:
    """What made a cache and what it holds."""

    facts: Mapping[str, Any]
    """Identity and information: benchmark, architecture, weights (sha256), versions, device, date, …"""
    layers: pd.DataFrame
    """name, path, pooling, neurons."""
    splits: pd.DataFrame
    """split, rows, done (rows that are written), sealed, raw_bytes, stored_bytes, list."""

    def _repr_html_(self) -> str:
        facts = pd.DataFrame({"": [str(value) for value in self.facts.values()]}, index=list(self.facts))
        return "".join(str(frame.to_html(index=frame is facts)) for frame in (facts, self.layers, self.splits))


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedLayer(LayerInspection):
    """How the values of a layer are distributed over all samples and neurons of a split."""

    split: str
    layer: str

    def plot(self) -> Figure:
        """Draw the histograms below each other.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        with _Extra():
            from nacpipe.reporting.figures import draw_values
        return draw_values({self.split: self.histograms}, self.layer)

    def _repr_html_(self) -> str:
        return "".join(str(frame.to_html(index=False)) for frame in (self.summary, self.values))


@overload
def inspect(cache: Cache | str | Path) -> CacheInspection: ...


@overload
def inspect(cache: Cache | str | Path, split: str, *, params: Params | None = None) -> pd.DataFrame: ...


@overload
def inspect(
    cache: Cache | str | Path, split: str, layer: str, *, params: Params | None = None, alpha: float | None = None
) -> InspectedLayer: ...


@overload
def inspect(
    cache: Cache | str | Path, split: str, layer: str | None = None, *, compare: Cache | str | Path
) -> pd.DataFrame: ...


@overload
def inspect(
    cache: Cache | str | Path, split: str, layer: str | None = None, *, rows: int, params: Params | None = None
) -> pd.DataFrame: ...


def inspect(
    cache: Cache | str | Path,
    split: str | None = None,
    layer: str | None = None,
    *,
    params: Params | None = None,
    alpha: float | None = None,
    compare: Cache | str | Path | None = None,
    rows: int | None = None,
) -> CacheInspection | InspectedLayer | pd.DataFrame:
    """Return what made a cache and what it holds; of a split its layers, of a layer the distribution of its values.

    Args:
        cache: the cache, or its path or URL.
        split: its name, such as `id/val`.
        layer: a layer, or a layer's source, such as `layer3:gradient`.
        params: show states and coverage too. With `rows`, None takes those beside the cache.
        alpha: show the states sigmoid(alpha · product) of the layer too, and the coverage of 50 bins and saturation 50.
        compare: another cache of the same samples, such as another training run's.
        rows: return the so many most and least typical samples, by their scores; of the layer alone, if there is one.

    Returns:
        Of a cache a `CacheInspection`, of a layer an `InspectedLayer`: frames `summary`, `values`, `histograms` and
        `bins`, and `plot()`. Of a split a frame with a row per layer: layer, neurons, dead (neurons that are 0
        throughout), zeros (share of products), size (median |product| that is not 0), alpha_low and alpha_high (the
        range that a search takes), and with parameters alpha, flat and saturated (shares of states). With `compare` a
        frame with a row per layer: the same of both caches, ratio (of sizes) and alike (correlation of activations).
        With `rows` a frame, the most typical first: score, row, index, label, predicted.

    Raises:
        InputError: the arguments do not go together, or the split is not in the cache.
        ParamsError: the layer is not in the cache or in the parameters, or there are no parameters.
        CacheError: the cache is not there, or the split is not finished.
    """
    opened = as_cache(cache)
    if split is None:
        if any(given is not None for given in (layer, params, alpha, compare, rows)):
            raise InputError("name a split for layer=, params=, alpha=, compare= and rows=")
        return _inspect_cache(opened)
    if sum(given is not None for given in (compare, rows, alpha)) > 1 or (
        params is not None and (alpha is not None or compare is not None)
    ):
        raise InputError("give one of alpha=, compare= and rows=; params= goes with rows= alone")
    if compare is not None:
        return _compare(opened, as_cache(compare), split, layer)
    if rows is not None:
        return _rank(opened, split, layer, params, rows)
    if layer is not None:
        return _inspect_layer(opened, split, layer, params, alpha)
    if alpha is not None:
        raise InputError("alpha= is a layer's: name the layer")
    return describe_layers(opened, split, None if params is None else _find(opened, params))


def _inspect_cache(cache: Cache) -> CacheInspection:
    summary = summarise_cache(cache)
    facts = {"path": summary["path"], **summary["identity"], **summary["information"]}
    return CacheInspection(facts=facts, layers=pd.DataFrame(summary["layers"]), splits=summarise_splits(cache))


def _inspect_layer(cache: Cache, split: str, layer: str, params: Params | None, alpha: float | None) -> InspectedLayer:
    check_layers(cache, [layer])
    term = None
    if params is not None:
        term = _term(_find(cache, params), layer)
    elif alpha is not None:
        term = LayerParams(bins=TRIED_BINS, saturation=TRIED_SATURATION, alpha=alpha, source=source_of(layer))
    found = inspect_layer(cache, split, layer, term)
    values = {entry.name: getattr(found, entry.name) for entry in fields(found)}
    return InspectedLayer(split=split, layer=layer, **values)


def _compare(cache: Cache, other: Cache, split: str, layer: str | None) -> pd.DataFrame:
    for opened in (cache, other):
        if layer is not None:
            check_layers(opened, [layer])
    frame = compare_splits(cache, other, split)
    return frame if layer is None else frame[frame["layer"] == layer_of(layer)]


def _rank(cache: Cache, split: str, layer: str | None, params: Params | None, rows: int) -> pd.DataFrame:
    if rows < 1:
        raise InputError(f"rows is {rows}; it must be at least 1")
    chosen = _find(cache, params)
    if layer is not None:
        chosen = NacParams(layers={layer: _term(chosen, layer)})
    ranked = rank_rows(cache, split, chosen)
    return ranked if 2 * rows >= len(ranked) else ranked.iloc[[*range(rows), *range(-rows, 0)]]


def _find(cache: Cache, params: Params | None, note: Callable[[str], None] = lambda text: None) -> NacParams:
    if isinstance(params, NacParams):
        return params
    return find_params(cache, None if params is None else str(params), note)


def _term(params: NacParams, layer: str) -> LayerParams:
    """Return a layer's parameters with weight 1, so that a layer of weight 0 can be looked at alone."""
    if layer not in params.layers:
        held = [name for name in params.layers if layer_of(name) == layer] or list(params.layers)
        raise ParamsError(f"there are no parameters for layer {layer!r}; they are for {', '.join(held)}")
    return replace(params.layers[layer], weight=1.0)


class _Extra:
    """Says how what is missing is installed."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        if isinstance(error, ModuleNotFoundError):
            raise MissingExtra(f"this needs {error.name}; install it with: pip install 'nacpipe[report]'") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One page about a cache or several training runs, and what it is made of."""

    table: pd.DataFrame
    """`nacpipe.evaluate`'s frame; of several caches `nacpipe.evaluate_runs`'."""
    checks: Mapping[str, pd.DataFrame]
    """Cache's path → method, val_auroc, val_fpr95 (id/val against ood/val), subtrain_auroc (`search`'s check)."""
    figures: Mapping[str, Figure] = field(repr=False)
    """Name → figure: `scores-SET`, `roc-SET`, `coverage-LAYER`, `weights`, `importances`, `history`; of several caches
    `run1-scores-SET`, …"""
    html: str = field(repr=False)
    """The page: one file that needs no network and no scripts."""
    galleries: Sequence[Sequence[Gallery] | str] = field(repr=False)
    """Of each cache the images that the page shows, or why there are none."""

    def save(self, output: str | Path, figures: str | Path | None = None) -> None:
        """Write the page to a file, and the figures as SVG and PNG to a folder.

        Raises:
            InputError: the file cannot be written.
        """
        write_whole(output, self.html.encode())
        if figures is not None:
            from nacpipe.reporting.figures import write_figure

            folder = Path(figures)
            folder.mkdir(parents=True, exist_ok=True)
            for name, figure in self.figures.items():
                write_figure(folder, name, figure)

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{html.escape(self.html)}" width="100%" height="640"></iframe>'


def report(
    cache: Cache | str | Path | Sequence[Cache | str | Path],
    output: str | Path | None = None,
    *,
    params: Params | Sequence[Params] | None = None,
    baselines: Sequence[str] = (),
    figures: str | Path | None = None,
) -> Report:
    """Make one page about a cache: tables, scores, ROC curves, coverage, the search, and what made it.

    Args:
        cache: the cache, or its path or URL; or several, which are training runs of one network.
        output: the page's file, HTML; None writes nothing.
        params: of all caches, or one for each; None: those beside each cache.
        baselines: further methods, by name; `all` for all of them.
        figures: a folder for every figure as SVG and PNG.

    Raises:
        InputError: there is nothing to evaluate, a baseline is not known, or the file cannot be written.
        ParamsError: there are no parameters, or they do not fit.
        IdentityError: several caches differ in more than their weights.
        MissingExtra: matplotlib or jinja2 is not installed.
    """
    caches = [cache] if isinstance(cache, Cache | str | Path) else list(cache)
    opened = [as_cache(one) for one in caches]
    chosen = [params] * len(opened) if params is None or isinstance(params, Params) else list(params)
    if len(chosen) != len(opened):
        raise InputError(f"there are {len(chosen)} params for {len(opened)} caches; give one for each")
    paths = ", ".join(repr(one.path) for one in opened)
    command = f"nacpipe.report({paths if len(opened) == 1 else f'[{paths}]'}, {str(output or 'report.html')!r})"
    if output is not None:
        check_writable(output)
    made = build_report(opened, chosen, baselines, command)
    if output is not None:
        made.save(output, figures)
    return made


def build_report(
    caches: Sequence[Cache],
    params: Sequence[Params | None],  # one for each
    baselines: Sequence[str],
    command: str,
    note: Callable[[str], None] = lambda text: None,
    images: tuple[str | None, Path | None] = (None, None),
) -> Report:
    """Make the page of the command and of `report`; nothing is written.

    Args:
        caches: training runs of one network.
        params: of each.
        baselines: further methods.
        command: what makes this page.
        note: told where a parameter file was found on other states.
        images: where they are, `image_lookup.find_benchmark`'s benchmark and data_root.
    """
    with _Extra():
        from nacpipe.reporting.galleries import find_galleries
        from nacpipe.reporting.params_origin import ParamsOrigin
        from nacpipe.reporting.report import draw_cache_report, read_cache_report, render_report
    check_runs(caches)
    reports = []
    for cache, choice in zip(caches, params, strict=True):
        origin = None
        if isinstance(choice, NacParams):
            origin = ParamsOrigin(source="given", reason="The parameters were given; no study is known for them.")
        more = score_baselines(cache, baselines, evaluated_splits(cache)) if baselines else {}
        path = None if choice is None or isinstance(choice, NacParams) else str(choice)
        reports.append(read_cache_report(cache, _find(cache, choice, note), more=more, choice=path, study=origin))
    frame = tabulate([one.run for one in reports])
    drawn = [draw_cache_report(one) for one in reports]
    galleries = [find_galleries(one.cache, one.run.methods["NAC"].scores, one.val_scores, *images) for one in reports]
    return Report(
        table=frame,
        checks={one.cache.path: one.overfitting for one in reports},
        figures={
            name if len(drawn) == 1 else f"run{number}-{name}": figure
            for number, groups in enumerate(drawn, 1)
            for group in groups.values()
            for name, figure in group.items()
        },
        html=render_report(reports, frame, command, drawn, galleries),
        galleries=galleries,
    )
