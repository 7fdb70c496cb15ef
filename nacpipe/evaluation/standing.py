"""How NAC stands among all methods of a table, in one line, and which methods are below chance."""

from __future__ import annotations

import pandas as pd

from nacpipe.evaluation.tables import measured_rows, ordinal

CHANCE = 0.5  # AUROC of scores that know nothing of the images
BELOW_CHANCE = "†"


def describe_standing(
    frame: pd.DataFrame,  # as `tables.tabulate` gives it
    method: str = "NAC",
) -> str:
    """Return how a method's mean AUROCs rank among all that have one: NAC is second of 28 near (best: GEN 91.39), ….

    Empty where the method has no mean.
    """
    tasks = []
    for task in frame["task"].unique():
        parts = []
        for group in ("near", "far"):
            means = _means(frame, str(task), group)
            if method not in means:
                continue
            rank = 1 + int((means > means[method]).sum())
            alike = int((means == means[method]).sum()) - 1
            text = f"{'equal ' if alike else ''}{ordinal(rank)} of {len(means)} {group}"
            parts.append(text + (f" (best: {means.idxmax()} {100 * means.max():.2f})" if rank > 1 else ""))
        if parts:
            tasks.append((f"{method} is " if task == "ood" else "full spectrum: ") + ", ".join(parts))
    return "; ".join(tasks)


def describe_below_chance(frame: pd.DataFrame) -> list[str]:
    """Return what the mark beside an AUROC means, and the methods whose mean is marked; empty where no AUROC is."""
    if not (frame["auroc"] < CHANCE).any():
        return []
    lines = [
        f"{BELOW_CHANCE} below chance (AUROC under {100 * CHANCE:g} %): it scores OOD images higher than ID images more"
        " often than not"
    ]
    for task in frame["task"].unique():
        for group in ("near", "far"):
            means = _means(frame, str(task), group)
            if names := list(means.index[means < CHANCE]):
                where = f"{group} mean" if task == "ood" else f"{group} mean, full spectrum"
                lines.append(f"{BELOW_CHANCE} {where}: {', '.join(names)}")
    return lines


def _means(frame: pd.DataFrame, task: str, group: str) -> pd.Series[float]:
    """Method → mean AUROC over a group's sets, of the methods measured here that have one."""
    rows = measured_rows(frame)
    rows = rows[(rows["task"] == task) & (rows["group"] == group) & (rows["dataset"] == "mean")]
    return rows.set_index("method")["auroc"].dropna()
