"""What is measured of a trial on the validation pair, and which of it is searched for.

The objective names the metric that is searched for:

    auroc   AUROC of id/val against the OOD validation split; the default
    fpr95   its FPR@95; among equals (it moves in steps of 1/n) the higher AUROC
    pareto  the two as a Pareto front; the default search climbs AUROC − FPR@95 / 4, in which both weigh about as much
    guided  the score's correlation with "ID or OOD" plus half of the best plain score (weights.py): it overfits less
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nacpipe.errors import NoValuesError
from nacpipe.method.feature_scores import FeatureScoreName, FusedScore
from nacpipe.method.metrics import auroc, fpr95
from nacpipe.method.params import NacParams
from nacpipe.method.weights import ridge_weights
from nacpipe.scoring.trial_scorer import Scorer
from nacpipe.tuning.space import with_weights
from nacpipe.tuning.weights import fisher_weights

ObjectiveName = Literal["auroc", "fpr95", "pareto", "guided"]
DIRECTIONS: dict[ObjectiveName, list[Literal["minimize", "maximize"]]] = {
    "auroc": ["maximize"],
    "fpr95": ["minimize"],
    "pareto": ["maximize", "minimize"],
    "guided": ["maximize"],
}
SHOWN: dict[ObjectiveName, str] = {"auroc": "AUROC", "fpr95": "FPR@95", "pareto": "AUROC", "guided": "correlation"}
"""What the first of a trial's values is called where people look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationMetrics:
    """What is measured of every trial, fractions."""

    val_auroc: float
    val_fpr95: float
    subtrain_auroc: float | None
    """id/val as ID against id/subtrain as if it were OOD; None where it is not finished."""
    val_correlation: float | None = None
    """Correlation of the score with the guided target; None where it is not searched for."""

    def values(self, objective: ObjectiveName) -> list[float]:
        """Return the trial's values, in the order of DIRECTIONS."""
        return {
            "auroc": [self.val_auroc],
            "fpr95": [self.val_fpr95],
            "pareto": [self.val_auroc, self.val_fpr95],
            "guided": [self.val_correlation or 0.0],
        }[objective]

    def to_attributes(self) -> dict[str, float | None]:
        """Return the metrics as a trial's user attributes."""
        attributes = {name: getattr(self, name) for name in ("val_auroc", "val_fpr95", "subtrain_auroc")}
        return attributes if self.val_correlation is None else {**attributes, "val_correlation": self.val_correlation}

    def objective_key(self, objective: ObjectiveName) -> tuple[float, ...]:
        """Return what a climb compares; larger is better, and anything is larger than ()."""
        if objective == "auroc":
            return (self.val_auroc,)
        if objective == "guided":
            return (self.val_correlation or 0.0,)
        return (-self.val_fpr95, self.val_auroc) if objective == "fpr95" else (self.val_auroc - self.val_fpr95 / 4,)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossValidation:
    """AUROC of id/val against the OOD validation split where nothing is chosen by the samples that are scored.

    Means over the folds of `method.cross_validation`, fractions.
    """

    images: float
    """NAC's, over folds of images."""
    clusters: float
    """NAC's, over folds of classes that the OOD split is predicted as."""
    guide: float | None
    """The best plain score's, over the folds of images; None where there is none."""

    @property
    def mean(self) -> float:
        """NAC's mean over both kinds of folds: what chooses a fused score."""
        return (self.images + self.clusters) / 2

    def to_json(self) -> dict[str, float | None]:
        """Return the record as params.json holds it."""
        return {"images": self.images, "clusters": self.clusters, "guide": self.guide}


class Evaluator:
    """Parameters → validation metrics, from indexed states."""

    def __init__(self, scorer: Scorer, ood: str = "ood/val", target: NDArray[np.float64] | None = None) -> None:
        """Take id/val as ID and this split as OOD, and fit weights to a target of both, (samples,), if there is one."""
        self.scorer = scorer
        self._ood = ood
        self._target = target

    def weigh(self, params: NacParams) -> NacParams:
        """Return the parameters with weights in closed form from id/val and the OOD split; a fused score is a term."""
        members = self.scorer.layer_scores(params.layers)
        if params.fused is not None:
            members.append(self.standardise_fused(params.fused.method)[1])
        scores = np.stack(members)
        id_scores, ood_scores = scores[:, self.scorer.rows["id/val"]], scores[:, self.scorer.rows[self._ood]]
        if self._target is None:
            weights = fisher_weights(id_scores, ood_scores)
        else:
            weights = ridge_weights(np.concatenate([id_scores, ood_scores], axis=1).T, self._target)
        return with_weights(params.layers, weights, params.fused)

    def standardise_fused(self, method: FeatureScoreName) -> tuple[FusedScore, NDArray[np.float64]]:
        """Return a feature score as a member of the sum, of weight 1, and its standardised scores, (samples,).

        Raises:
            NoValuesError: it is the same for all images of id/val, or not finite.
        """
        assert self.scorer.feature_scores is not None
        scores = self.scorer.feature_scores(method)
        own = scores[self.scorer.rows["id/val"]]
        if not (np.isfinite(scores).all() and own.std() > 0):
            raise NoValuesError(
                f"{method} is the same for all images of id/val, or not finite; leave out --fuse {method}"
            )
        fused = FusedScore(method=method, mean=float(own.mean()), deviation=float(own.std()), weight=1.0)
        return fused, fused.standardise(scores)

    def measure(self, params: NacParams) -> ValidationMetrics:
        """Score the search's splits under these parameters."""
        return self.check(self.scorer.scores(params.used()))

    def check(self, scores: NDArray[np.float64]) -> ValidationMetrics:
        """Return the checks of any score of the search's samples, (samples,) as `scorer.rows` has them."""
        split = {name: scores[rows] for name, rows in self.scorer.rows.items()}
        subtrain = split.get("id/subtrain")
        return ValidationMetrics(
            val_auroc=auroc(split["id/val"], split[self._ood]),
            val_fpr95=fpr95(split["id/val"], split[self._ood]),
            subtrain_auroc=None if subtrain is None else auroc(split["id/val"], subtrain),
            val_correlation=self._correlation(np.concatenate([split["id/val"], split[self._ood]])),
        )

    def _correlation(self, scores: NDArray[np.float64]) -> float | None:
        if self._target is None:
            return None
        return float(np.corrcoef(scores, self._target)[0, 1]) if np.ptp(scores) > 0 else 0.0
