"""What the detector that `nacpipe export` writes flags of each set: the share that NAC scores below its threshold.

FPR@95 does not say it: its threshold is chosen by the OOD images, another one for every set. An exported detector knows
none; its threshold keeps 95 % of id/val, unless `--keep` says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from nacpipe.evaluation.method_scores import ID_VAL, ScoredCache
from nacpipe.method.metrics import KEEP, choose_threshold, share_flagged
from nacpipe.text import label_set


def find_flagged(runs: Sequence[ScoredCache]) -> dict[str, Any]:
    """Return what is flagged, as a table's `attrs` hold it; nothing where a run is not scored by NAC.

    Each run has the threshold of its own id/val.

    Returns:
        `flagged`: finished split → share of its images, the mean over runs; `flagged_id`: task → share of all its ID
        images; of several runs also `flagged_std` (ddof 0). Or, where a run has no scores of id/val, `flagged_reason`.
    """
    if not all(run.validation.scores or run.validation.reasons for run in runs):
        return {}
    for run in runs:
        if reason := run.validation.reasons.get(ID_VAL):
            return {"flagged_reason": reason if len(runs) == 1 else f"{run.path}: {reason}"}
    shares = [_shares(run) for run in runs]
    finished = [split for split in shares[0] if all(split in one for one in shares)]
    found: dict[str, Any] = {"flagged": {split: _mean(shares, split) for split in finished}}
    if len(runs) > 1:
        found["flagged_std"] = {split: float(np.std([one[split] for one in shares])) for split in finished}
    tasks = {task: splits for task, splits in runs[0].tasks().items() if set(splits) <= set(finished)}
    rows = runs[0].rows  # the same of every run
    found["flagged_id"] = {
        task: sum(rows[split] * found["flagged"][split] for split in splits) / sum(rows[split] for split in splits)
        for task, splits in tasks.items()
    }
    return found


def _shares(run: ScoredCache) -> dict[str, float]:
    """Split → the share that NAC scores below the threshold."""
    threshold = choose_threshold(run.validation.scores[ID_VAL], KEEP)
    return {split: share_flagged(scores, threshold) for split, scores in run.methods["NAC"].scores.items()}


def _mean(shares: Sequence[Mapping[str, float]], split: str) -> float:
    return sum(one[split] for one in shares) / len(shares)


def add_flagged(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table (`tables.tabulate`'s) with `flagged` and `flagged_id` in NAC's rows: shares of OOD and ID images.

    `flagged` of a group's mean is the mean over its sets; NaN where there is no share.
    """
    shares: Mapping[str, float] = frame.attrs.get("flagged", {})
    inside: Mapping[str, float] = frame.attrs.get("flagged_id", {})
    by_set = {
        (split.split("/")[1], label_set(split)): share for split, share in shares.items() if split.startswith("ood/")
    }
    own = (frame["method"] == "NAC") & (frame["source"] == "measured" if "source" in frame else True)
    sets = frame[own & (frame["dataset"] != "mean")].groupby("group")["dataset"].unique()
    for group, names in sets.items():
        values = [by_set.get((str(group), name), math.nan) for name in names]
        by_set[str(group), "mean"] = sum(values) / len(values)
    cells = zip(own, frame["group"], frame["dataset"], frame["task"], strict=True)
    columns = [
        (by_set.get((group, dataset), math.nan), inside.get(task, math.nan)) if named else (math.nan, math.nan)
        for named, group, dataset, task in cells
    ]
    whole = frame.assign(flagged=[ood for ood, _ in columns], flagged_id=[known for _, known in columns])
    whole.attrs = dict(frame.attrs)
    return whole


def describe_flagged(frame: pd.DataFrame) -> list[str]:
    """Return, in one line, what a table says of the images that are flagged; none where NAC is not in it."""
    what = f"flagged by NAC at the threshold of nacpipe export, which keeps {100 * KEEP:g} % of id/val"
    if reason := frame.attrs.get("flagged_reason"):
        return [f"{what}: left out, {reason}"]
    if "flagged" not in frame.attrs:
        return []
    return [f"{what}: {', '.join(f'{name} {share} %' for name, share in shown_flagged(frame).items())}"]


def shown_flagged(frame: pd.DataFrame) -> dict[str, str]:
    """Return set → the share that is flagged, in percent, with its deviation over runs: `near letters` → `41.20`."""
    spread: Mapping[str, float] = frame.attrs.get("flagged_std", {})
    return {
        _name(split): f"{100 * share:.2f}" + (f" ± {100 * spread[split]:.2f}" if split in spread else "")
        for split, share in frame.attrs.get("flagged", {}).items()
    }


def _name(split: str) -> str:
    """`id/test` → id/test, `ood/near/letters` → near letters, as the table has it."""
    return f"{split.split('/')[1]} {label_set(split)}" if split.startswith("ood/") else split
