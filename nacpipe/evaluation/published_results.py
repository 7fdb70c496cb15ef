"""Results that papers and OpenOOD's leaderboard (July 2025) have printed, beside which ours can be shown.

They belong to OpenOOD's own networks and images. `published_results.csv` holds them as printed, in percent, with
id/test as ID; an empty cell was not printed.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from nacpipe.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedResult:
    """One method on one OOD set, or on a group's mean, as fractions; None is what was not printed."""

    method: str
    group: str
    """near or far."""
    dataset: str
    """A set's name or "mean"."""
    auroc: float
    auroc_std: float | None = None
    """Over three training runs, where printed."""
    fpr95: float | None = None
    fpr95_std: float | None = None


def _fraction(percent: str) -> float | None:
    """90.93 → 0.9093, the float nearest to it."""
    return float(Decimal(percent).scaleb(-2)) if percent else None


def _result(row: dict[str, str]) -> PublishedResult:
    values: dict[str, Any] = {key: _fraction(row[key]) for key in ("auroc", "auroc_std", "fpr95", "fpr95_std")}
    return PublishedResult(method=row["method"], group=row["group"], dataset=row["dataset"], **values)


_ROWS = list(csv.DictReader(Path(__file__).with_suffix(".csv").read_text("utf-8").splitlines()))

NETWORKS = {row["benchmark"]: row["network"] for row in _ROWS}
RESULTS = {name: [_result(row) for row in _ROWS if row["benchmark"] == name] for name in NETWORKS}


def published_results(benchmark: str) -> list[PublishedResult]:
    """Return what is known of a benchmark: sets, then means.

    Raises:
        InputError: nothing is.
    """
    if benchmark not in RESULTS:
        raise InputError(f"no published results are known for {benchmark}; they are for {', '.join(RESULTS)}")
    return RESULTS[benchmark]
