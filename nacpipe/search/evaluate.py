"""How well scores tell ID from OOD, per set and on the mean: NAC beside baselines from the cached logits.

OpenOOD's two tasks: `ood` has id/test as ID; `fsood` (full spectrum) has id/test and all csid sets together. Near and
far means are unweighted means over their sets. OpenOOD prints AUPR-IN and AUPR-OUT under each other's name (its issue
211); here each stands under its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nacpipe.artifact import beside_cache, read_fingerprint, read_params
from nacpipe.cache import Cache
from nacpipe.core.baselines import LOGIT_BASELINES
from nacpipe.core.metrics import accuracy, detect
from nacpipe.core.params import NacParams
from nacpipe.core.provenance import SEARCH_SPLITS, fingerprint
from nacpipe.core.published import published_params
from nacpipe.errors import InputError, ParamsError
from nacpipe.search.scoring import fit_coverage, has_logits

METRICS = ("fpr95", "auroc", "aupr_in", "aupr_out")
NO_LOGITS = f"accuracy, {', '.join(LOGIT_BASELINES)} are left empty: what this network gives are features, not logits"


def evaluate(cache: Cache, params: NacParams | None) -> pd.DataFrame:
    """Return one row per task, OOD set and method, and one per group's mean.

    Columns: task (ood, fsood), group (near, far), dataset (a set's name or "mean"), method, fpr95, auroc, aupr_in,
    aupr_out, accuracy (of the network on the task's ID samples), n_id, n_ood; all metrics are fractions. Where the
    network gives features and not logits (CIDER, NPOS), what needs logits is NaN, and `frame.attrs["note"]` says why.

    Args:
        cache: a cache with id/test and at least one sealed near or far set.
        params: NAC's parameters; None evaluates the baselines alone.

    Raises:
        InputError: there is nothing to evaluate.
        ParamsError: a layer is not in the cache.
    """
    sets = [name for name in cache if name.startswith(("ood/near/", "ood/far/")) and cache.peek(name).sealed]
    if not sets:
        raise InputError(f"{cache.path} holds no finished near or far set; add them with: {cache.command()}")
    csid = [name for name in cache if name.startswith("csid/") and cache.peek(name).sealed]
    scores = score_methods(cache, params, ["id/test", *csid, *sets])
    rows = []
    for task, id_splits in {"ood": ["id/test"], "fsood": ["id/test", *csid]}.items():
        if task == "fsood" and not csid:
            continue
        correct = _accuracy(cache, id_splits) if has_logits(cache) else math.nan
        for method in dict.fromkeys([*scores, *LOGIT_BASELINES]):
            for name in sets:
                metrics = dict.fromkeys(METRICS, math.nan)
                if method in scores:
                    id_scores = np.concatenate([scores[method][split] for split in id_splits])
                    metrics = asdict(detect(id_scores, scores[method][name]))
                rows.append(
                    {
                        "task": task,
                        "group": name.split("/")[1],
                        "dataset": name.split("/")[2],
                        "method": method,
                        **metrics,
                        "accuracy": correct,
                        "n_id": sum(cache[split].rows for split in id_splits),
                        "n_ood": cache[name].rows,
                    }
                )
    frame = _with_means(pd.DataFrame(rows))
    frame = frame[["task", "group", "dataset", "method", *METRICS, "accuracy", "n_id", "n_ood"]]
    notes = [] if has_logits(cache) else [NO_LOGITS]
    if unfinished := [name for name in cache if not cache.peek(name).sealed]:
        notes.append(f"not finished, left out: {', '.join(unfinished)}; finish with: {cache.command()}")
    if notes:
        frame.attrs["note"] = ". ".join(notes)
    return frame


def score_methods(
    cache: Cache, params: NacParams | None, splits: Iterable[str]
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Return method → split → scores (rows,), NAC first where there are parameters; no baselines without logits."""
    names = list(splits)
    coverage = fit_coverage(cache, params) if params else None
    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    if coverage:
        found["NAC"] = {name: coverage.score(cache[name]) for name in names}
    if not has_logits(cache):
        return found
    logits = {name: cache[name].read("logits") for name in names}
    for method, baseline in LOGIT_BASELINES.items():
        found[method] = {name: baseline(logits[name]) for name in names}
    return found


def find_params(cache: Cache, choice: str | None, warn: Callable[[str], None] = lambda text: None) -> NacParams:
    """Return the parameters to use: a file's, the paper's (`published`), or those that a search left beside the cache.

    Args:
        cache: the cache they are for.
        choice: a file, `published`, or None.
        warn: told where a file that was named was found on other states.

    Raises:
        ParamsError: there are none, or those beside the cache were found on other states, saying what to do.
    """
    if choice == "published":
        identity = cache.header.identity
        layers = [spec.name for spec in cache.header.layers]
        return published_params(str(identity.get("benchmark")), str(identity.get("family")), layers)
    if choice is not None:
        params = read_params(choice)
        if not _found_here(cache, params, choice):
            warn(f"{choice} was found on other states than those of {cache.path}; it may fit them badly")
        return params
    beside = beside_cache(cache.path, ".params.json")
    if not beside.exists():
        raise ParamsError(
            f"there is no {beside}; make it with: nacpipe search {cache.path},"
            " or give --params FILE or --params published"
        )
    params = read_params(beside)
    if not _found_here(cache, params, beside):
        raise ParamsError(
            f"{beside} was found on other states than those of {cache.path} now; search again with:"
            f" nacpipe search {cache.path}, or give --params {beside} to use it all the same"
        )
    return params


def _found_here(cache: Cache, params: NacParams, path: str | Path) -> bool:
    """False where the file says that it was found on other states; a file that says nothing is taken as it is."""
    said = read_fingerprint(path)
    layers = tuple(params.layers)
    if not set(layers) <= {spec.name for spec in cache.header.layers}:
        return True  # fitting refuses them by name
    return said in (None, fingerprint(cache.search_identity(SEARCH_SPLITS, layers)))


def _accuracy(cache: Cache, splits: list[str]) -> float:
    """Over all ID samples of a task together."""
    logits = np.concatenate([cache[name].read("logits") for name in splits])
    return accuracy(logits, np.concatenate([cache[name].label for name in splits]))


def _with_means(frame: pd.DataFrame) -> pd.DataFrame:
    """Add each group's unweighted mean over its sets after its sets; n_ood is then their total."""
    parts = []
    for (task, group), rows in frame.groupby(["task", "group"], sort=False):
        means = rows.groupby("method", sort=False).agg(
            {**dict.fromkeys([*METRICS, "accuracy"], "mean"), "n_id": "first", "n_ood": "sum"}
        )
        parts += [rows, means.reset_index().assign(task=task, group=group, dataset="mean")]
    return pd.concat(parts, ignore_index=True)
