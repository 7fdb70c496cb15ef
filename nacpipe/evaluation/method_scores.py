"""One cache's images scored by every method, in bounded memory: 8 bytes per image and method are kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from nacpipe.cache import Cache, SplitView
from nacpipe.errors import InputError
from nacpipe.method.metrics import find_wrong_labels
from nacpipe.method.outputs import OF_PROBABILITIES, as_logits, why_no_logits
from nacpipe.method.params import NacParams
from nacpipe.method.plain_scores import LOGIT_BASELINES
from nacpipe.scoring.coverage import Coverage, fit_coverage
from nacpipe.scoring.params_summary import ParamsSummary, summarise_params
from nacpipe.scoring.states import has_classes, has_logits, outputs_of
from nacpipe.text import label_set, why_reserved

ID_VAL = "id/val"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredCache:
    """All that a table needs of one cache."""

    path: str
    methods: Mapping[str, MethodScores]
    """NAC first where there are parameters, then the plain baselines, then others."""
    rows: Mapping[str, int]
    """Split → images: id/test, csid, near and far sets, in this order; those that are not finished too."""
    correct: Mapping[str, int]
    """Finished ID split → images whose largest logit is their label's; none where the network gives no logits."""
    unfinished: Sequence[str] = ()
    """The splits among `rows` that are not finished: no method has scores of them."""
    note: str
    """What a reader must know of the table; empty where there is nothing."""
    validation: MethodScores = field(default_factory=lambda: MethodScores())
    """NAC's scores of id/val, or why there are none; empty where NAC is not among `methods`."""
    parameters: Mapping[str, ParamsSummary] = field(default_factory=dict)
    """Method → what its parameters are, of those that have some: NAC and other parameters that it is compared with."""
    benchmark: str = ""
    """The benchmark's name; empty where it is not known."""

    def tasks(self) -> dict[str, list[str]]:
        """Return task → the splits that are ID in it: `ood`, and `fsood` where there are csid sets."""
        csid = [name for name in self.rows if name.startswith("csid/")]
        return {"ood": ["id/test"]} | ({"fsood": ["id/test", *csid]} if csid else {})

    def ood_sets(self) -> list[str]:
        """Return the near sets, then the far sets."""
        return [name for name in self.rows if name.startswith("ood/")]

    def finished(self) -> list[str]:
        """Return the splits of which there are scores."""
        return [name for name in self.rows if name not in self.unfinished]


def table_splits(cache: Cache) -> list[str]:
    """Return what a table names: id/test and every csid, near and far set, finished or not."""
    return ["id/test", *(name for name in cache if name.startswith(("csid/", "ood/near/", "ood/far/")))]


def evaluated_splits(cache: Cache) -> list[str]:
    """Return what of a table can be scored: id/test and every finished csid, near and far set.

    Raises:
        InputError: there is no finished near or far set.
    """
    found = [name for name in table_splits(cache) if name == "id/test" or cache.peek(name).sealed]
    if not any(name.startswith("ood/") for name in found):
        raise InputError(f"{cache.path} holds no finished near or far set; add them with: {cache.command()}")
    return found


def score_cache(
    cache: Cache,
    params: NacParams | Coverage | Mapping[str, NacParams] | None,
    *,
    more: Mapping[str, MethodScores] | None = None,
    parameters: Mapping[str, ParamsSummary] | None = None,
) -> ScoredCache:
    """Score id/test and every finished csid, near and far set; one that is not finished is a reason, not a number.

    Args:
        cache: a cache with id/test and at least one finished near or far set.
        params: NAC's parameters, or the coverage that was fitted under them; several sets of parameters by name,
            `{"NAC": …, "NAC (published)": …}`; None for none.
        more: further methods that have scored `evaluated_splits(cache)`, as nacpipe.evaluation.baselines gives them.
        parameters: what is known of each set of parameters, by the same names; None: what they say by themselves.

    Raises:
        InputError: there is nothing to evaluate.
        ParamsError: a layer is not in the cache.
    """
    splits = evaluated_splits(cache)
    named = {"NAC": params} if isinstance(params, NacParams | Coverage) else (params or {})
    coverages: dict[str, MethodScores] = {}
    known = dict(parameters or {})
    validation = MethodScores()
    for name, chosen in named.items():
        coverage = chosen if isinstance(chosen, Coverage) else fit_coverage(cache, chosen)
        if name == "NAC":
            validation = _score_validation(cache, coverage)
        coverages[name] = MethodScores(
            scores={split: coverage.score(cache[split]) for split in splits},
            fitted_on="id/train",
            n_fitted=cache["id/train"].rows,
        )
        if name not in known and isinstance(chosen, NacParams):
            known[name] = replace(summarise_params(chosen), gradients=cache.header.gradients)
    plain, correct = score_logits(cache, splits)
    notes = []
    if not has_logits(cache):
        empty = [*([] if has_classes(cache) else ["accuracy"]), *(name for name in plain if not plain[name].scores)]
        notes.append(f"{', '.join(empty)} are left empty: {why_no_logits(outputs_of(cache))}")
    if has_classes(cache):
        notes += _note_wrong_labels(cache, [split for split in splits if not split.startswith("ood/")])
    if unfinished := [name for name in cache if not cache.peek(name).sealed]:
        notes.append(
            f"not finished: {', '.join(unfinished)}; what needs them is left empty; finish with: {cache.command()}"
        )
    for split in table_splits(cache):
        if split.startswith("ood/") and label_set(split) == split:
            name = split.rpartition("/")[2]
            notes.append(f"{split} is listed by its whole name: {name!r} is reserved, {why_reserved(name)}")
    rows = {split: cache.peek(split).rows for split in table_splits(cache)}
    reasons = {split: f"{split} is not finished" for split in rows if split not in splits}
    methods = {**coverages, **plain, **(more or {})}
    return ScoredCache(
        path=cache.path,
        methods={name: replace(found, reasons={**found.reasons, **reasons}) for name, found in methods.items()},
        rows=rows,
        correct={split: count for split, count in correct.items() if not split.startswith("ood/")},
        unfinished=list(reasons),
        note=". ".join(notes),
        validation=validation,
        parameters={name: known[name] for name in named if name in known},
        benchmark=str(cache.header.identity.get("benchmark", "")),
    )


def _score_validation(cache: Cache, coverage: Coverage) -> MethodScores:
    """Score id/val, on which a detector's threshold is chosen; or say why not."""
    if ID_VAL not in cache:
        return MethodScores(reasons={ID_VAL: f"the cache holds no {ID_VAL}"})
    if not cache.peek(ID_VAL).sealed:
        return MethodScores(reasons={ID_VAL: f"{ID_VAL} is not finished"})
    return MethodScores(scores={ID_VAL: coverage.score(cache[ID_VAL])})


def _note_wrong_labels(cache: Cache, splits: Iterable[str]) -> list[str]:
    """Say of ID splits how many labels are no classes; today's `extract` refuses them."""
    classes, notes = cache.header.classes, []
    for split in splits:
        label = cache[split].label
        if wrong := find_wrong_labels(label, classes).size:
            notes.append(
                f"{wrong} of {label.size} labels of {split} are outside 0 … {classes - 1}; accuracy counts them as"
                " wrong"
            )
    return notes


def score_logits(cache: Cache, splits: Iterable[str]) -> tuple[dict[str, MethodScores], dict[str, int]]:
    """Return the plain baselines' scores, and split → images whose largest logit is their label's.

    The logits are read once, in blocks. Of a network that gives probabilities or their logarithms, only what is a
    function of probabilities is scored; of one that gives features, nothing.
    """
    names, outputs = list(splits), outputs_of(cache)
    possible = LOGIT_BASELINES if has_logits(cache) else OF_PROBABILITIES if has_classes(cache) else ()
    reasons = {
        method: MethodScores(reasons=dict.fromkeys(names, why_no_logits(outputs)))
        for method in LOGIT_BASELINES
        if method not in possible
    }
    if not possible:
        return reasons, {}
    scores = {method: {name: np.empty(cache[name].rows) for name in names} for method in possible}
    correct = dict.fromkeys(names, 0)
    for name in names:
        split = cache[name]
        for rows in block_slices(split, width=cache.header.classes, block_rows=cache.header.block_rows):
            logits = as_logits(split.read("logits", rows), outputs)
            for method in possible:
                scores[method][name][rows] = LOGIT_BASELINES[method](logits)
            correct[name] += int((logits.argmax(axis=1) == split.label[rows]).sum())
    found = {method: MethodScores(scores=values) for method, values in scores.items()} | reasons
    return {method: found[method] for method in LOGIT_BASELINES}, correct


BLOCK_BYTES = 32 * 2**20  # of one array that is held at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodScores:
    """One method's scores of some splits: every split is among `scores` or among `reasons`."""

    scores: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """Split → (rows,), all finite."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Split → why it has no scores."""
    fitted_on: str = ""
    """The split that the method learns from; empty where it learns from none."""
    n_fitted: int = 0
    """Images of that split that it learned from; 0 also where it could not."""


def block_slices(split: SplitView, *, width: int, block_rows: int) -> Iterator[slice]:
    """Cut a split's rows into whole blocks, as many at a time as `BLOCK_BYTES` of float32 (rows, width) hold.

    A chunk is then read once, and what is held does not grow with the number of rows.
    """
    return split.row_slices(block_rows * max(1, BLOCK_BYTES // (4 * width * block_rows)))
