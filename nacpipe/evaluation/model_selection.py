"""NAC-ME: which checkpoint of a training run will do best on domains that nobody has seen (Liu et al., section 3.3).

    checkpoint 1 ── cache ──▶ states of id/train, classified correctly ──▶ covered area 0.31
    checkpoint 2 ── cache ──▶ …                                            covered area 0.35  ◀── chosen
    checkpoint 3 ── cache ──▶ …                                            covered area 0.33

No OOD data are needed. Where accuracies on held-out domains are there, they judge the choice; they never make it.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nacpipe.cache import Cache, SplitView
from nacpipe.cache.identity import comparable_fields, diff
from nacpipe.errors import IdentityError, InputError, ParamsError
from nacpipe.method.counting import count_sorted
from nacpipe.method.coverage import bin_edges, covered_area, product_borders
from nacpipe.method.metrics import accuracy, find_wrong_labels, spearman
from nacpipe.method.params import LayerParams
from nacpipe.method.sorted_index import sort_columns
from nacpipe.method.term import layer_of
from nacpipe.scoring.states import check_layers, has_classes, read_source
from nacpipe.text import escape_bytes

PAPER = LayerParams(bins=50, saturation=500, alpha=0.1, edges="linear")
USUAL = ("avgpool", "layer_11")  # the paper's layers: a ResNet's avgpool, a ViT's blocks.11.norm2
ACCURACIES = ("test_in", "test_out", "train_out")
MAX_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Checkpoints in the order they were given, and what was chosen."""

    layer: str
    """The layer whose area decides."""
    checkpoints: pd.DataFrame
    """checkpoint, images (classified correctly), area_LAYER for every layer, and what is known of test_in, test_out and
    train_out; fractions."""
    chosen: str | None
    """The checkpoint of the largest area, the first of equals, among those that classify an image correctly; None where
    there is none."""
    reason: str
    """Why none is chosen; empty where one is."""
    selections: pd.DataFrame | None
    """selection (oracle, last, training-domain validation, coverage), checkpoint, test_in (its accuracy), correlation
    (Spearman's, of what it goes by with test_in over all checkpoints; NaN where it goes by nothing); None where no
    accuracies are known. A selection that goes by nothing but zeros has no checkpoint (a missing value)."""


def rank_checkpoints(
    caches: Sequence[Cache],
    *,
    layer: str | None = None,
    params: LayerParams = PAPER,
    split: str = "id/train",
    accuracies: Mapping[str, Mapping[str, float]] | None = None,
) -> Ranking:
    """Measure every checkpoint's covered area and choose the largest, of those that classify an image correctly.

    Args:
        caches: one per checkpoint, in the order of training.
        layer: whose area decides; None means the paper's where it is there, else the caches' first.
        params: of every layer; weight plays no part.
        split: the training domains' images (for DomainNet the paper takes their validation part, id/val).
        accuracies: checkpoint → test_in and, where known, test_out and train_out (`read_accuracies`); None takes them
            from the caches: csid sets, csid sets whose name ends in `_out`, and id/val.

    Raises:
        InputError: no caches, accuracies that lack a checkpoint, networks without logits, or labels of a set with an
            accuracy that are no classes.
        IdentityError: the caches are not of one training run, or their accuracies would be of different images.
        ParamsError: the layer is not in them.
    """
    _check_same(caches, split)
    first = caches[0]
    held = [spec.name for spec in first.header.layers]
    chosen_by = layer or next((name for name in USUAL if name in held), held[0])
    if layer_of(chosen_by) != chosen_by:
        raise ParamsError(
            f"layer {chosen_by!r} is one state of a layer; NAC-ME has one per layer: {layer_of(chosen_by)}"
        )
    check_layers(first, [chosen_by])
    names = _name_caches(caches)
    found = _measure(caches, names) if accuracies is None else _match(accuracies, names)
    rows: list[dict[str, Any]] = []
    for name, cache in zip(names, caches, strict=True):
        correct = is_correct(cache[split])
        layers = dict.fromkeys([*held, chosen_by])  # the logits only where they decide
        areas = {f"area_{one}": area(cache[split], one, params, correct) for one in layers}
        rows.append({"checkpoint": name, "images": int(correct.sum()), **areas, **found[name]})
    frame = pd.DataFrame(rows)
    place = _largest(_eligible(frame, f"area_{chosen_by}"))
    return Ranking(
        layer=chosen_by,
        checkpoints=frame,
        chosen=None if place is None else names[place],
        reason=_why_none(frame, chosen_by, first[split]) if place is None else "",
        selections=_select(frame, f"area_{chosen_by}")
        if "test_in" in frame and not frame["test_in"].isna().any()
        else None,
    )


def _eligible(frame: pd.DataFrame, area_column: str) -> pd.Series[float]:
    """The areas of the checkpoints that classify an image correctly; NaN for the others."""
    return frame[area_column].where(frame["images"] > 0)


def _largest(values: pd.Series[float]) -> int | None:
    """The place of the largest value above 0, the first of equals; None where there is none."""
    numbers = values.to_numpy(float, na_value=math.nan)
    return int(np.nanargmax(numbers)) if np.nanmax(numbers, initial=0.0) > 0 else None


def _why_none(frame: pd.DataFrame, layer: str, split: SplitView) -> str:
    if (split.label < 0).all():
        return f"{split.name} has no labels, all {split.rows} are −1; name a split that has, with --split"
    if (frame["images"] > 0).any():
        return f"no checkpoint that classifies an image of {split.name} correctly has an area of {layer}"
    subject = f"none of {len(frame)} checkpoints classifies an" if len(frame) > 1 else "the checkpoint classifies no"
    return f"{subject} image of {split.name} correctly; are its labels in the order of the network's classes?"


def is_correct(split: SplitView) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return which samples are classified correctly, (rows,)."""
    return np.asarray(split.read("logits").argmax(axis=1) == split.label)


def area(split: SplitView, layer: str, params: LayerParams, rows: np.ndarray[Any, np.dtype[np.bool_]]) -> float:
    """Return a layer's covered area over the marked samples (rows,) of a split."""
    products = read_source(split, layer, params.source)[rows]
    borders = product_borders(bin_edges(params.bins, params.edges), params.alpha)
    return covered_area(count_sorted(sort_columns(products), borders), params.saturation)


def read_accuracies(path: str | Path) -> dict[str, dict[str, float]]:
    """Read a CSV of fractions: `checkpoint,test_in` and, if you have them, `test_out` and `train_out`.

    `checkpoint` is a cache's file name, with or without `.zarr`; `test_in` the accuracy on held-out domains that every
    choice is judged by; `test_out` on the part of them that the oracle chooses on; `train_out` on the training domains'
    validation part.

    Raises:
        InputError: the file is not there or malformed, naming line and value.
    """
    try:
        if Path(path).stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MiB")
        lines = list(csv.reader(Path(path).read_text("utf-8-sig").splitlines(), strict=True))
    except FileNotFoundError:
        raise InputError(f"there is no file {path} of accuracies") from None
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}") from None
    header = lines[0] if lines else []
    known = {"checkpoint", *ACCURACIES}
    if not {"checkpoint", "test_in"} <= set(header) or not set(header) <= known or len(set(header)) < len(header):
        raise InputError(
            f"{path}: the first line is {','.join(header)[:80]!r}; wanted: checkpoint,test_in[,test_out][,train_out]"
        )
    found: dict[str, dict[str, float]] = {}
    for number, cells in enumerate(lines[1:], start=2):
        if not cells:
            continue
        row = dict(zip(header, cells, strict=False))
        name = row.pop("checkpoint", "").strip().removesuffix(".zarr")
        if len(cells) != len(header) or name in found:
            what = f"has {name} again" if name in found else f"has {len(cells)} values, not {len(header)}"
            raise InputError(f"{path}: line {number} {what}")
        found[name] = {key: _fraction(value, f"{path}: line {number}, {key}") for key, value in row.items()}
    return found


def _fraction(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise InputError(f"{where} is {text.strip()[:40]!r}; it must be a fraction from 0 to 1")
    return value


def _check_same(caches: Sequence[Cache], split: str) -> None:
    """Refuse caches that are not of one training run: everything but the weights must be the same."""
    if not caches:
        raise InputError("there are no checkpoints to rank; give their caches")

    def identity(cache: Cache) -> dict[str, Any]:
        whole = {k: v for k, v in cache.header.whole_identity().items() if k not in ("weights", "arithmetic")}
        return {**whole, split: dict(cache[split].images)}

    for cache in caches:
        if not has_classes(cache):
            raise InputError(f"{cache.path}: this network gives features, so that no image is classified correctly")
        first, this = identity(caches[0]), identity(cache)
        if said := _differ(comparable_fields(this, first), comparable_fields(first, this)):
            raise IdentityError(f"{cache.path} is not of the same training run as {caches[0].path}: {said}")


def _check_judges(first: Cache, second: Cache) -> None:
    """Refuse accuracies of different images: the sets that judge must be the same in both caches."""
    ours, theirs = ({name for names in _judges(cache).values() for name in names} for cache in (first, second))
    if unlike := sorted(ours ^ theirs):
        has, lacks = (first, second) if unlike[0] in ours else (second, first)
        raise IdentityError(
            f"{unlike[0]} is finished in {has.path} and not in {lacks.path}, so that accuracies would be of different"
            f" images; finish it with: {lacks.command()}, or give --accuracies FILE"
        )
    for name in sorted(ours):
        if said := _differ(first[name].images, second[name].images):
            raise IdentityError(
                f"{name} of {second.path} is not of the same images as that of {first.path}: {said}; extract it in both"
                " from one list, or give --accuracies FILE"
            )


def _differ(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    return "; ".join(diff(there, here)).replace("stored", "there").replace("now", "here")


def _name_caches(caches: Sequence[Cache]) -> list[str]:
    """Return file names without `.zarr`, or paths where two are alike."""
    paths = [escape_bytes(cache.path).removesuffix(".zarr") for cache in caches]
    names = [Path(path).name for path in paths]
    if len(set(names)) < len(names):
        names = paths
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"checkpoint {twice[0]} is given twice")
    return names


def _judges(cache: Cache) -> dict[str, list[str]]:
    """Kind of accuracy → the finished sets that it is the mean of."""
    sealed = [name for name in cache if cache.peek(name).sealed]
    held_out = [name for name in sealed if name.startswith("csid/")]
    kinds = {
        "test_in": [name for name in held_out if not name.endswith("_out")],
        "test_out": [name for name in held_out if name.endswith("_out")],
        "train_out": [name for name in sealed if name == "id/val"],
    }
    return {kind: names for kind, names in kinds.items() if names}


def _measure(caches: Sequence[Cache], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """What the caches' own labels tell; sets of one kind count the same, as DomainBed's domains do."""
    if not any("test_in" in _judges(cache) for cache in caches):
        return {name: {} for name in names}
    for cache in caches[1:]:
        _check_judges(caches[0], cache)
    kinds = _judges(caches[0])
    for name in (name for sets in kinds.values() for name in sets):
        label, classes = caches[0][name].label, caches[0].header.classes
        if wrong := find_wrong_labels(label, classes).size:
            raise InputError(
                f"{wrong} of {label.size} labels of {name} in {caches[0].path} are outside 0 … {classes - 1}, so that"
                " its accuracy would be wrong; give --accuracies FILE"
            )
    return {
        name: {
            kind: float(np.mean([accuracy(cache[one].read("logits"), cache[one].label) for one in sets]))
            for kind, sets in kinds.items()
        }
        for name, cache in zip(names, caches, strict=True)
    }


def _match(accuracies: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    if missing := [name for name in names if name not in accuracies]:
        raise InputError(
            f"the accuracies lack {len(missing)} of {len(names)} checkpoints: {', '.join(missing[:5])};"
            f" they have {', '.join([*accuracies][:5]) or 'none'}"
        )
    return {name: dict(accuracies[name]) for name in names}


def _select(frame: pd.DataFrame, area_column: str) -> pd.DataFrame:
    """The authors' table: what each way of choosing would have chosen, judged by the accuracy on held-out domains.

    A way that goes by zeros alone has nothing to choose by.
    """
    oracle = "test_out" if "test_out" in frame else "test_in"
    ways = {"oracle": oracle, "last": None, "training-domain validation": "train_out", "coverage": area_column}
    rows = []
    for selection, column in ways.items():
        if column is not None and (column not in frame or frame[column].isna().any()):
            continue
        if column is None:
            place: int | None = len(frame) - 1
        else:
            place = _largest(_eligible(frame, column) if column == area_column else frame[column])
        rows.append(
            {
                "selection": selection,
                "checkpoint": None if place is None else frame["checkpoint"].iloc[place],
                "test_in": math.nan if place is None else float(frame["test_in"].iloc[place]),
                "correlation": math.nan
                if column is None
                else spearman(frame[column].to_numpy(float), frame["test_in"].to_numpy(float)),
            }
        )
    return pd.DataFrame(rows)
