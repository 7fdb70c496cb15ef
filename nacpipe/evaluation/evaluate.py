"""How well scores tell ID from OOD, per set and on the mean: NAC beside baselines.

    score_cache ──▶ tabulate ──▶ add_confidence        scored.py, tables.py, bootstrap.py
               └──▶ compare_methods, save_scores       bootstrap.py, samples.py

OpenOOD's two tasks: `ood` has id/test as ID; `fsood` (full spectrum) has id/test and all csid sets together. Near and
far means are unweighted means over their sets. AUPR-IN has ID as the positive class, as in OpenOOD since
4a72488 of 2023-12; before, and in the authors' code still, AUPR-IN and AUPR-OUT stand under each other's name.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from nacpipe.artifact import beside_cache, read_params, read_section
from nacpipe.cache import Cache
from nacpipe.cache.identity import VAL, bound_splits, fingerprint
from nacpipe.errors import ParamsError
from nacpipe.evaluation.method_scores import score_cache
from nacpipe.evaluation.methods import MethodScores
from nacpipe.evaluation.runs import check_runs
from nacpipe.evaluation.tables import tabulate
from nacpipe.method.coverage import layer_of
from nacpipe.method.params import NacParams
from nacpipe.method.published import published_params
from nacpipe.scoring.coverage import held_layers
from nacpipe.text import command_line


def evaluate(cache: Cache, params: NacParams | None, *, more: Mapping[str, MethodScores] | None = None) -> pd.DataFrame:
    """Return one row per task, OOD set and method, and one per group's mean; `tables.tabulate` names the columns.

    Where the network gives features and not logits (CIDER, NPOS), what needs logits is NaN, and `reason` says why.

    Args:
        cache: a cache with id/test and at least one finished near or far set.
        params: NAC's parameters; None evaluates the baselines alone.
        more: further methods, as `nacpipe.evaluation.baselines.score_baselines` gives them.

    Raises:
        InputError: there is nothing to evaluate.
        ParamsError: a layer is not in the cache.
    """
    return tabulate([score_cache(cache, params, more=more)])


def evaluate_runs(caches: Sequence[Cache], params: Sequence[NacParams | None]) -> pd.DataFrame:
    """Return the table of several training runs: means, and standard deviations (ddof 0) in columns `*_std`.

    Args:
        caches: the same in everything but the weights.
        params: of each cache.

    Raises:
        IdentityError: the caches differ in more than their weights, naming what.
        InputError: there is nothing to evaluate.
        ParamsError: a layer is not in a cache.
    """
    check_runs(caches)
    return tabulate([score_cache(cache, chosen) for cache, chosen in zip(caches, params, strict=True)])


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
    beside = beside_cache(cache.path, ".params.json", "--params FILE")
    if not beside.exists():
        raise ParamsError(
            f"there is no {beside}; make it with: {command_line('search', cache.path)},"
            " or give --params FILE or --params published"
        )
    params = read_params(beside)
    if not _found_here(cache, params, beside):
        val = str(read_section(beside, "made_by").get("val", VAL))
        again = command_line("search", cache.path, *(["--val", val] if val != VAL else []))
        raise ParamsError(
            f"{beside} was found on other states than those of {cache.path} now; search again with: {again},"
            f" or give --params {shlex.quote(str(beside))} to use it all the same"
        )
    return params


def _found_here(cache: Cache, params: NacParams, path: str | Path) -> bool:
    """False where the file says that it was found on other states; a file that says nothing is taken as it is."""
    made_by = read_section(path, "made_by")
    layers = tuple(map(layer_of, params.layers))
    if not set(layers) <= set(held_layers(cache)):
        return True  # fitting refuses them by name
    splits = bound_splits(str(made_by.get("val", VAL)))
    before = [bound_splits(), (*bound_splits(), "id/subtrain")]  # what an earlier nacpipe bound every file to
    known = {fingerprint(cache.search_identity(some, layers)) for some in (splits, *before)}
    said = made_by.get("fingerprint")
    return not isinstance(said, str) or said in known
