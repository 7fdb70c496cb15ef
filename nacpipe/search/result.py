"""What is asked of a search and what it found, as records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nacpipe.artifact import beside_cache
from nacpipe.core.params import NacParams

OVERFIT_POINTS = 0.03  # below Energy's id/val-against-id/subtrain AUROC: NAC knows its training data too well


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """What someone asks for."""

    cache: Path
    trials: int = 2000
    """Completed trials that the study shall have, whatever was done before."""
    timeout: float | None = None
    """Seconds for this command."""
    seed: int = 1
    layers: tuple[str, ...] = ()
    """Names; none means all that the cache holds."""
    threads: int | None = None
    storage: str | None = None
    """A journal file or a database URL; none means X.study.log beside the cache."""
    study: str = "nac"
    """The study's name in its storage; the seed is added to it."""
    output: Path | None = None
    """Where the result goes; None means X.params.json beside the cache."""

    @property
    def study_name(self) -> str:
        """A study per seed: another seed is another search in the same storage."""
        return f"{self.study}-seed{self.seed}"

    @property
    def target(self) -> Path:
        """The parameter file."""
        return self.output or beside_cache(str(self.cache), ".params.json")

    @property
    def where(self) -> str:
        """The storage."""
        return self.storage or str(beside_cache(str(self.cache), ".study.log"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What is measured of every trial, fractions."""

    val_auroc: float
    val_fpr95: float
    subtrain_auroc: float | None
    """id/val as ID against id/subtrain as if it were OOD; None where the cache has no id/subtrain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a study has found so far."""

    params: NacParams
    checks: Checks
    energy_subtrain: float | None
    """Energy's id/val-against-id/subtrain AUROC: how well the network itself knows its training data."""
    energy_val: float | None
    """Energy's AUROC of id/val against ood/val."""
    alone: Mapping[str, float]
    """Layer → the best validation AUROC that it reached alone, where it was tried."""
    trials: int
    seconds: float
    """Wall time of all sessions of the study."""
    seed: int
    ended: str
    """trials, timeout or interrupted."""

    @property
    def overfits(self) -> bool:
        """True where NAC tells training images from others markedly better than the network's own Energy does."""
        subtrain, own = self.checks.subtrain_auroc, self.energy_subtrain
        return subtrain is not None and own is not None and subtrain < own - OVERFIT_POINTS

    def to_json(self) -> dict[str, Any]:
        """Return the `result` section of params.json."""
        return {
            "val_auroc": self.checks.val_auroc,
            "val_fpr95": self.checks.val_fpr95,
            "subtrain_auroc": self.checks.subtrain_auroc,
            "energy_val_auroc": self.energy_val,
            "energy_subtrain_auroc": self.energy_subtrain,
            "overfits": self.overfits,
            "alone": dict(self.alone),
            "trials": self.trials,
            "seconds": round(self.seconds, 3),
            "seed": self.seed,
            "ended": self.ended,
        }
