"""What is asked of a search and what it found, as records."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import optuna

from nacpipe.errors import ParamsError
from nacpipe.files import beside_cache
from nacpipe.method.feature_scores import FeatureScoreName
from nacpipe.method.params import NacParams
from nacpipe.text import html_table
from nacpipe.tuning.validation import CrossValidation, ObjectiveName, ValidationMetrics

FuseChoice = Literal["auto", "none"] | FeatureScoreName
SamplerName = Literal["terms", "layers", "tpe", "random", "grid", "nsga2", "cmaes"]
DEFAULT_TRIALS = 2000

GAP = 0.015  # fitted minus cross-validated AUROC from which a result is warned of
OVERFIT_POINTS = (
    0.03  # below the best plain score's id/val-against-id/subtrain AUROC: NAC knows its training data too well
)


def describe_overfitting(subtrain: float | None, guide: tuple[str, float] | None) -> str:
    """Return the overfitting check in words: whether NAC prefers training images more than the network itself does.

    Args:
        subtrain: NAC's AUROC of id/val against id/subtrain, a fraction; None where there is none. Below ½ training
            images score higher than others.
        guide: the best plain score and its AUROC; None where there is none.
    """
    if subtrain is None:
        return "overfitting check: not made, it needs a finished id/subtrain: training images that are not in id/train"
    measured = f"AUROC of id/val against id/subtrain {100 * subtrain:.2f} %"
    if guide is None:
        return f"overfitting check: {measured}; the more it is below 50 %, the more NAC prefers training images"
    name, own = guide
    points = f"{100 * OVERFIT_POINTS:g} points"
    if subtrain < own - OVERFIT_POINTS:
        verdict = f"the coverage may be overfitted; NAC prefers training images over {points} more than {name} does"
    else:
        much = "no more" if subtrain >= own else f"less than {points} more"
        verdict = f"no sign of overfitting; NAC prefers training images {much} than {name} does"
    return f"overfitting check: {verdict} ({measured}, {name}'s {100 * own:.2f} %; lower: training images score higher)"


def without_password(where: str) -> str:
    """Return a storage's URL with *** for its password."""
    return re.sub(r"([?&]password=)[^&]*", r"\1***", re.sub(r"(://[^:/@]*):[^/]*@", r"\1:***@", where))


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """What someone asks for."""

    cache: str | Path
    """A folder, or a URL; then `storage` and `output` must be given."""
    trials: int | None = None
    """Completed trials that the study shall have, whatever was done before; None: 2,000, or a whole grid."""
    timeout: float | None = None
    """Seconds for this command."""
    patience: int | None = None
    """Stop after this many trials without improvement, not counted before the default sampler's first round."""
    space: str = "auto"
    """`auto`, `paper`, `wide`, `terms`, `published`, or a TOML file (space_file.py)."""
    sampler: SamplerName | None = None
    """None: term by term in the space `auto`, the grid in the published one, else layer by layer."""
    objective: ObjectiveName | None = None
    """None: `guided` in the space `auto`, else `auroc`."""
    val: str = "ood/val"
    """The split that plays OOD."""
    seed: int = 1
    layers: tuple[str, ...] = ()
    """Names; none means all that the cache holds."""
    threads: int | None = None
    fuse: FuseChoice = "auto"
    """A feature score that is one more member of the sum: `NCI`, `fDBD`, `ViM`, `none`, or `auto`: with the sampler
    `terms` the one that is best in cross-validation, or none. It changes the result of a study, not its trials."""
    storage: str | None = None
    """A journal file or a database URL; none means X.study.log beside the cache."""
    study: str = "nac"
    """The study's name in its storage; the seed is added to it."""
    output: Path | None = None
    """Where the result goes; None means X.params.json beside the cache."""

    @property
    def how(self) -> SamplerName:
        """The sampler that is meant."""
        usual: dict[str, SamplerName] = {"auto": "terms", "published": "grid"}
        return self.sampler or usual.get(self.space, "layers")

    @property
    def aim(self) -> ObjectiveName:
        """The objective that is meant."""
        return self.objective or ("guided" if self.space == "auto" else "auroc")

    @property
    def study_name(self) -> str:
        """A study per way to search and seed, so that several live in the same storage."""
        parts = [Path(self.space).stem] if self.space != "auto" else []
        parts += [self.sampler] if self.sampler else []
        parts += [self.objective] if self.objective is not None else []
        parts += [self.val.replace("/", "-")] if self.val != "ood/val" else []
        return "-".join([self.study, *parts, f"seed{self.seed}"])

    def to_json(self) -> dict[str, Any]:
        """Return what defines the study, for its attributes and for `made_by`: `from_json` reads it again."""
        return {
            "space": self.space,
            "sampler": self.sampler,
            "objective": self.objective,
            "val": self.val,
            "seed": self.seed,
            "layers": list(self.layers),
            "storage": None if self.storage is None else self.shown,
            "study": self.study,
            "fuse": self.fuse,
        }

    @classmethod
    def from_json(cls, options: Mapping[str, Any], cache: str | Path) -> SearchRequest:
        """Return the request of a study on a cache, which may have moved.

        Raises:
            ParamsError: the record is not one of `to_json`.
        """
        try:
            request = cls(cache=cache, **{"fuse": "none", **options, "layers": tuple(options["layers"])})
        except (KeyError, TypeError) as error:
            raise ParamsError(f"the record of the search's options is damaged ({error})") from None
        if request.storage is not None and "://" not in request.storage and not Path(request.storage).exists():
            return replace(request, storage=None)  # it has moved with its cache
        return request

    @property
    def target(self) -> Path:
        """The parameter file."""
        return self.output or beside_cache(str(self.cache), ".params.json", "--storage and --output")

    @property
    def where(self) -> str:
        """The storage."""
        return self.storage or str(beside_cache(str(self.cache), ".study.log", "--storage and --output"))

    @property
    def shown(self) -> str:
        """The storage as it may be printed and written to files."""
        return without_password(self.where)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a study has found so far."""

    params: NacParams
    checks: ValidationMetrics
    guide: str | None
    """The plain score with the highest AUROC on the validation pair; None where the network gives no logits."""
    guide_val: float | None
    """Its AUROC of id/val against the split that plays OOD."""
    guide_subtrain: float | None
    """Its id/val-against-id/subtrain AUROC: how well the network itself knows its training data."""
    alone: Mapping[str, float]
    """Layer → the best validation AUROC that it reached alone, where it was tried."""
    trials: int
    seconds: float
    """Wall time of all sessions of the study."""
    seed: int
    ended: str
    """trials, timeout, patience or interrupted."""
    cross_validated: CrossValidation | None = None
    """On samples that it was not chosen by; None where it was not measured."""
    without_fusion: CrossValidation | None = None
    """The same without the fused score; None where there is none, or where it was not measured."""
    front: int | None = None
    """Trials on the Pareto front, where two objectives were searched for."""
    advice: str = ""
    """The one thing to try next (advice.py); empty where nothing stands out."""
    study: optuna.Study | None = field(default=None, repr=False, compare=False)
    """The study, with every trial."""

    @property
    def best_plain(self) -> tuple[str, float] | None:
        """The best plain score on the validation pair and its AUROC; None where the network gives no logits."""
        return None if self.guide is None or self.guide_val is None else (self.guide, self.guide_val)

    @property
    def overestimates(self) -> bool:
        """True where the fitted AUROC is more than 1.5 points above the cross-validated one."""
        crossed = self.cross_validated
        return crossed is not None and self.checks.val_auroc - min(crossed.images, crossed.clusters) > GAP

    @property
    def overfits(self) -> bool:
        """True where NAC tells training images from others markedly better than the best plain score does."""
        subtrain, own = self.checks.subtrain_auroc, self.guide_subtrain
        return subtrain is not None and own is not None and subtrain < own - OVERFIT_POINTS

    def overfitting(self) -> str:
        """Return the overfitting check in words."""
        guide = None if self.guide is None or self.guide_subtrain is None else (self.guide, self.guide_subtrain)
        return describe_overfitting(self.checks.subtrain_auroc, guide)

    def _shown_checks(self) -> list[tuple[str, float]]:
        checks = [("AUROC", self.checks.val_auroc), ("FPR@95", self.checks.val_fpr95)]
        if (crossed := self.cross_validated) is not None:
            checks += [("AUROC cross-validated", crossed.images)]
        if (plain := self.best_plain) is not None:
            checks += [(f"AUROC of {plain[0]}", plain[1])]
        return checks

    def __str__(self) -> str:
        """Return the checks in percent, and how many terms have a weight after how many trials."""
        checks = ", ".join(f"{name} {100 * value:.2f} %" for name, value in self._shown_checks())
        terms = sum(layer.weight > 0 for layer in self.params.layers.values()) + (self.params.fused is not None)
        return f"id/val: {checks}; {terms} term{'s' * (terms != 1)}, {self.trials} trials"

    def _repr_html_(self) -> str:
        """Return the result as a notebook shows it: the terms, and the checks in percent."""
        columns = ("bins", "saturation", "alpha", "weight", "source")
        rows = [
            (name, *(f"{getattr(layer, column):.4g}" if column in ("alpha", "weight") else str(getattr(layer, column))
                     for column in columns))
            for name, layer in self.params.layers.items()
        ]  # fmt: skip
        if (fused := self.params.fused) is not None:
            rows.append((fused.method, "", "", "", f"{fused.weight:.4g}", ""))
        checks_shown = [(name, f"{100 * value:.2f}") for name, value in self._shown_checks()]
        return html_table(("term", *columns), rows) + html_table(("id/val", "%"), checks_shown)

    def to_json(self) -> dict[str, Any]:
        """Return the `result` section of params.json."""
        return {
            "val_auroc": self.checks.val_auroc,
            "val_fpr95": self.checks.val_fpr95,
            "subtrain_auroc": self.checks.subtrain_auroc,
            "guide": self.guide,
            "guide_val_auroc": self.guide_val,
            "guide_subtrain_auroc": self.guide_subtrain,
            "overfits": self.overfits,
            "alone": dict(self.alone),
            "trials": self.trials,
            "seconds": round(self.seconds, 3),
            "seed": self.seed,
            "ended": self.ended,
            **({"cross_validated": self.cross_validated.to_json()} if self.cross_validated is not None else {}),
            **({"without_fusion": self.without_fusion.to_json()} if self.without_fusion is not None else {}),
            **({"front": self.front} if self.front is not None else {}),
            **({"val_correlation": self.checks.val_correlation} if self.checks.val_correlation is not None else {}),
        }
