"""The paper's rows beside ours: which network and weights they are of, what is needed for them, and the difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nacpipe.benchmarks.archives import AUTHORS_LISTS, find_archives
from nacpipe.benchmarks.standard import Benchmark
from nacpipe.benchmarks.status import read_status
from nacpipe.errors import CheckpointError, InputError
from nacpipe.evaluation.method_scores import ScoredCache
from nacpipe.evaluation.published_results import NETWORKS, published_results
from nacpipe.evaluation.tables import tabulate
from nacpipe.method.params import NacParams
from nacpipe.method.published import PUBLISHED
from nacpipe.networks.checkpoint_folders import find_runs
from nacpipe.text import command_line

METHOD = "NAC-UE"  # the published rows' name of what is NAC here
METRICS = ("auroc", "fpr95")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """How a benchmark's published rows come about."""

    benchmark: str
    model: str
    weights: str
    """A folder of runs s0, s1, … in the folder of results, as OpenOOD's archive has it; or the name of published
    weights, which torchvision fetches."""
    runs: bool = True
    """Whether `weights` is such a folder."""

    @property
    def params(self) -> NacParams | None:
        """The paper's; None where it has printed none for this benchmark: they are searched in the paper's space."""
        return PUBLISHED.get((self.benchmark, "resnet"))

    def checkpoint(self, results: Path) -> Path:
        """Return what `extract --checkpoint` takes."""
        return results / self.weights if self.runs else Path(self.weights)

    def splits(self, benchmark: Benchmark) -> tuple[str, ...]:
        """Return the splits that the rows need."""
        needed = {"id/train", "id/val", "id/test", *(("ood/val",) if self.params is None else ())}
        return tuple(
            split.name
            for split in benchmark.splits
            if split.name in needed or split.name.startswith(("ood/near/", "ood/far/"))
        )

    def archives(self) -> tuple[str, ...]:
        """Return the archives that hold them: the authors' lists, the images, and the weights if `runs`."""
        known = find_archives(self.benchmark)
        covariate = ("cifar10c", "imagenet_v2", "imagenet_c", "imagenet_r", "imagenet_es")
        return tuple(
            archive.name
            for archive in known
            if archive.name == AUTHORS_LISTS
            or not (archive.lists or archive.name in covariate or (archive.checkpoints and not self.runs))
        )


REPRODUCTIONS = {
    reproduction.benchmark: reproduction
    for reproduction in (
        Reproduction(
            benchmark="cifar10", model="resnet18_32x32", weights="cifar10_resnet18_32x32_base_e100_lr0.1_default"
        ),
        Reproduction(
            benchmark="cifar100", model="resnet18_32x32", weights="cifar100_resnet18_32x32_base_e100_lr0.1_default"
        ),
        Reproduction(
            benchmark="imagenet200", model="resnet18", weights="imagenet200_resnet18_224x224_base_e90_lr0.1_default"
        ),
        Reproduction(benchmark="imagenet", model="resnet50", weights="IMAGENET1K_V1", runs=False),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """One thing that is needed and not there."""

    what: str
    """A split, or `checkpoints`."""
    state: str
    command: str
    """How to get it."""


def find_reproduction(benchmark: str) -> Reproduction:
    """Return how a benchmark's published rows come about.

    Raises:
        InputError: none are known for it.
    """
    if benchmark not in REPRODUCTIONS:
        raise InputError(f"no published rows can be reproduced for {benchmark}; known: {', '.join(REPRODUCTIONS)}")
    return REPRODUCTIONS[benchmark]


def find_missing(
    reproduction: Reproduction, benchmark: Benchmark, root: Path, results: Path, mirror: str | None = None
) -> list[Missing]:
    """Return what is not there; looks for every file and opens none.

    Raises:
        ImageError: a list is malformed.
    """
    common: list[str | Path] = ["data", "download", reproduction.benchmark, "--data-root", root]
    more: list[str | Path] = [] if mirror is None else ["--mirror", mirror]
    wanted = reproduction.splits(benchmark)
    missing: list[Missing] = []
    sets = [one for one in read_status(benchmark, root) if one.split in wanted and not one.complete]
    trained = [archive.name for archive in find_archives(reproduction.benchmark) if archive.checkpoints]
    images = [name for name in reproduction.archives() if name not in (AUTHORS_LISTS, *trained)]
    get = command_line(*common, "--only", ",".join(images), *more)
    if any(not one.images for one in sets):
        get = f"{command_line(*common, '--only', AUTHORS_LISTS, *more)} && {get}"
    missing += [Missing(what=one.split, state=one.state, command=get) for one in sets]
    if reproduction.runs:
        try:
            find_runs(reproduction.checkpoint(results))
        except (CheckpointError, OSError):
            command = command_line(*common, "--only", trained[0], "--results", results, *more)
            state = f"no runs in {reproduction.checkpoint(results)}"
            missing.append(Missing(what="checkpoints", state=state, command=command))
    return missing


def compare_with_published(runs: Sequence[ScoredCache], names: Sequence[str], benchmark: str) -> pd.DataFrame:
    """Return the published rows of NAC-UE beside ours, run by run, as fractions.

    Columns: network (of the published row), group, dataset, metric (auroc or fpr95), published, published_std, one per
    run by its name, ours (their mean), ours_std (ddof 0, as OpenOOD has it), difference (ours − published). A set that
    the runs do not have is NaN.

    Raises:
        InputError: nothing is published for the benchmark.
    """
    tables = []
    for run in runs:
        table = tabulate([run])
        table = table[(table["task"] == "ood") & (table["method"] == "NAC")]
        tables.append(table.set_index(["group", "dataset"]))
    rows: list[dict[str, Any]] = []
    for result in published_results(benchmark):
        if result.method != METHOD:
            continue
        for metric in METRICS:
            published = getattr(result, metric)
            if published is None:
                continue
            place = (result.group, result.dataset)
            values = [float(table[metric].get(place, math.nan)) for table in tables]
            ours = float(np.mean(values))
            spread = getattr(result, f"{metric}_std")
            rows.append(
                {
                    "network": NETWORKS[benchmark],
                    "group": result.group,
                    "dataset": result.dataset,
                    "metric": metric,
                    "published": published,
                    "published_std": math.nan if spread is None else spread,
                    **dict(zip(names, values, strict=True)),
                    "ours": ours,
                    "ours_std": float(np.std(values)),
                    "difference": ours - published,
                }
            )
    return pd.DataFrame(rows)
