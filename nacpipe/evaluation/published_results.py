"""Results that papers and OpenOOD's leaderboard (July 2025) have printed, beside which ours can be shown.

They belong to OpenOOD's own networks and images. Fractions; None is what was not printed.
"""

from __future__ import annotations

from dataclasses import dataclass

from nacpipe.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedResult:
    """One method on one OOD set, or on a group's mean, with id/test as ID."""

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


NETWORKS = {"cifar10": "ResNet-18", "cifar100": "ResNet-18", "imagenet200": "ResNet-18", "imagenet": "ResNet-50"}


def _row(
    method: str, where: str, auroc: float, spread: float | None = None, fpr: float | None = None,
    fpr_spread: float | None = None,
) -> PublishedResult:  # fmt: skip
    """One result as printed, in percent; where is "near", "far" (means) or "far SET"."""
    group, _, dataset = where.partition(" ")
    return PublishedResult(
        method=method,
        group=group,
        dataset=dataset or "mean",
        auroc=_share(auroc),
        auroc_std=None if spread is None else _share(spread),
        fpr95=None if fpr is None else _share(fpr),
        fpr95_std=None if fpr_spread is None else _share(fpr_spread),
    )


def _share(percent: float) -> float:
    """90.93 → 0.9093, the float nearest to it."""
    return float(f"{percent / 100:.6g}")


def _means(**methods: tuple[float, float]) -> list[PublishedResult]:
    """Near and far means of several methods, AUROC in percent."""
    return [
        _row(method, *cell) for method, cells in methods.items() for cell in zip(("near", "far"), cells, strict=True)
    ]


RESULTS = {
    "cifar10": [
        _row("NAC-UE", "far mnist", 94.86, fpr=15.14),
        _row("NAC-UE", "far svhn", 96.05, fpr=14.33),
        _row("NAC-UE", "far texture", 95.64, fpr=17.03),
        _row("NAC-UE", "far places365", 91.85, fpr=26.73),
        _row("NAC-UE", "near", 90.93, 0.23),
        _row("NAC-UE", "far", 94.60, 0.49, 18.31, 0.92),
        *_means(CombOOD=(91.13, 94.65), KNN=(90.64, 92.96), WeiPer=(90.54, 93.12), fDBD=(90.42, 93.16)),
    ],
    "cifar100": [
        _row("NAC-UE", "near", 75.90, 0.42),
        _row("NAC-UE", "far", 86.98, 0.37, 40.14),
        *_means(WeiPer=(81.37, 79.01), GEN=(81.31, 79.68), fDBD=(81.26, 79.85), RMDS=(80.15, 82.92)),
    ],
    "imagenet200": [
        _row("NAC-UE", "near", 78.52, 0.20),
        _row("NAC-UE", "far", 91.02, 0.29),
        *_means(AdaSCALE=(85.73, 94.86), SCALE=(84.84, 93.98)),
    ],
    "imagenet": [
        *_means(
            **{"NAC-UE": (74.43, 95.29)},
            AdaSCALE=(84.42, 97.27),
            SCALE=(81.36, 96.53),
            ASH=(78.17, 95.74),
            KNN=(71.10, 90.18),
        ),
    ],
}


def published_results(benchmark: str) -> list[PublishedResult]:
    """Return what is known of a benchmark: sets, then means.

    Raises:
        InputError: nothing is.
    """
    if benchmark not in RESULTS:
        raise InputError(f"no published results are known for {benchmark}; they are for {', '.join(RESULTS)}")
    return RESULTS[benchmark]
