"""Detectors of other papers on a cache's logits, features and last linear layer; no torch, and no network is run.

Each has the settings of its paper or of pytorch-ood (docs/evaluate.md), and is told what to learn from:

    nothing      Entropy, GEN, GradNorm, ASH, SCALE
    id/val       Temperature, KL-Matching (what the network was trained on would flatter it), VRA (as OpenOOD's)
    id/train     the others

A number behind @ is a percentile: ASH-B@90 keeps the largest tenth of an image's features.

All of them are fitted first, then every split is read once, in blocks. What cannot be computed is a reason, never a
number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nacpipe.cache import Cache, SplitView
from nacpipe.errors import InputError
from nacpipe.evaluation.method_scores import MethodScores, block_slices
from nacpipe.evaluation.posthoc import distances, neighbourhoods, shaping
from nacpipe.evaluation.posthoc import logits as logit_methods
from nacpipe.evaluation.posthoc.detector import Fit, Linear, Samples, Score, Training
from nacpipe.evaluation.posthoc.gradnorm import fit_gradnorm
from nacpipe.evaluation.posthoc.openmax import fit_openmax
from nacpipe.evaluation.posthoc.weiper import fit_weiper
from nacpipe.method.outputs import as_logits, why_no_logits
from nacpipe.method.plain_scores import LOGIT_BASELINES
from nacpipe.scoring.states import has_classes, has_logits, outputs_of

FIT_ROWS = 50_000  # images that a baseline learns from at most, evenly spaced over the split
HELD = 2**24  # float64 numbers that a detector's intermediate array may have

NO_CLASSIFIER = "the cache holds no last linear layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """How a detector is fitted and what it needs."""

    fit: Fit
    reads: Literal["logits", "features"]
    """`features` are read with the last linear layer."""
    fitted_on: str = ""
    """The split that it learns from."""
    labels: bool = False
    """Whether it learns from labels."""
    images: int = 1
    """Images that it cannot do without."""
    per_class: int = 0
    """Images of every class that it cannot do without."""
    covariance: bool = False
    """Whether it inverts the features' covariance within classes."""
    of_probabilities: bool = False
    """Whether it is a function of the probabilities alone, which a network may give in place of logits."""


def _of_training(fit: Fit, *, images: int = 1) -> Baseline:
    """A detector that learns from the features of id/train."""
    return Baseline(fit=fit, reads="features", fitted_on="id/train", images=images)


def _gaussian(fit: Fit) -> Baseline:
    """A detector that learns a Gaussian for every class."""
    return Baseline(fit=fit, reads="features", fitted_on="id/train", labels=True, per_class=1, covariance=True)


BASELINES: Mapping[str, Baseline] = {
    "Temperature": Baseline(
        fit=logit_methods.fit_tempered_msp, reads="logits", fitted_on="id/val", labels=True, of_probabilities=True
    ),
    "Entropy": Baseline(fit=logit_methods.fit_entropy, reads="logits", of_probabilities=True),
    "GEN": Baseline(fit=logit_methods.fit_gen, reads="logits", of_probabilities=True),
    "KL-Matching": Baseline(
        fit=logit_methods.fit_kl_matching, reads="logits", fitted_on="id/val", of_probabilities=True
    ),
    "OpenMax": Baseline(fit=fit_openmax, reads="logits", fitted_on="id/train", labels=True, per_class=2),
    "Mahalanobis": _gaussian(distances.fit_mahalanobis),
    "MDS++": _gaussian(distances.fit_mds_plus),
    "RMD": _gaussian(distances.fit_rmd),
    "RMDS++": _gaussian(distances.fit_rmds_plus),
    "KNN": _of_training(distances.fit_knn, images=distances.KNN_NEIGHBOURS),
    "Relation": _of_training(neighbourhoods.fit_relation),
    "CFOOD": _of_training(neighbourhoods.fit_cfood, images=2),
    "NNGuide": _of_training(distances.fit_nnguide, images=distances.NNGUIDE_NEIGHBOURS),
    "ViM": _of_training(distances.fit_vim),
    "Residual": _of_training(distances.fit_residual),
    "SHE": Baseline(fit=distances.fit_she, reads="features", fitted_on="id/train", labels=True, per_class=1),
    "GradNorm": Baseline(fit=fit_gradnorm, reads="features"),
    "ReAct": _of_training(shaping.fit_react),
    "VRA": Baseline(fit=shaping.fit_vra, reads="features", fitted_on="id/val"),
    "ASH-S@65": Baseline(fit=partial(shaping.fit_ash_s, percentile=65), reads="features"),
    "ASH-B@90": Baseline(fit=partial(shaping.fit_ash_b, percentile=90), reads="features"),
    "SCALE@65": Baseline(fit=partial(shaping.fit_scale, percentile=65), reads="features"),
    "SCALE@85": Baseline(fit=partial(shaping.fit_scale, percentile=85), reads="features"),
    "DICE": _of_training(shaping.fit_dice),
    "WeiPer": _of_training(fit_weiper),
    "fDBD": _of_training(distances.fit_fdbd),
    "NCI": _of_training(distances.fit_nci),
}


def score_baselines(cache: Cache, names: Iterable[str], splits: Iterable[str]) -> dict[str, MethodScores]:
    """Fit baselines and score splits, block by block: method → its scores, larger = more like the training data.

    Args:
        cache: a cache whose network gives logits; features and classifier where the network has a last linear layer.
        names: among `BASELINES`, or `all`; one that needs the network itself has no scores, and a reason.
        splits: what to score.

    Raises:
        InputError: a name is not known, or all need the network itself.
    """
    asked = choose_baselines(names)
    chosen = {name: BASELINES[name] for name in asked if name in BASELINES}
    wanted = list(splits)
    reader = _Reader.of(cache)
    fitted: dict[str, _Fitted] = {}
    for split in dict.fromkeys(baseline.fitted_on for baseline in chosen.values()):
        group = {name: baseline for name, baseline in chosen.items() if baseline.fitted_on == split}
        fitted |= _fit_group(reader, group, split)
    scores = _score_splits(reader, chosen, fitted, wanted)
    found = {name: _collect(baseline, fitted[name], scores.get(name), wanted) for name, baseline in chosen.items()}
    empty = {name: MethodScores(reasons=dict.fromkeys(wanted, RUNS_NETWORK)) for name in asked if name not in chosen}
    return {name: (found | empty)[name] for name in asked}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fitted:
    """A detector, or why there is none."""

    score: Score | None = None
    images: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """Reads of a cache what detectors need."""

    cache: Cache
    linear: Linear | None

    @classmethod
    def of(cls, cache: Cache) -> _Reader:
        found = cache.classifier()
        return cls(cache=cache, linear=None if found is None else Linear(weight=found[0], bias=found[1]))

    def read(self, split: SplitView, rows: slice, reads: Set[str]) -> Samples:
        """Return these rows; an array that nobody reads has no columns."""
        none = np.empty((len(range(*rows.indices(split.rows))), 0), np.float32)
        features = split.read("features", rows) if "features" in reads else none
        return Samples(
            logits=as_logits(split.read("logits", rows), outputs_of(self.cache)) if "logits" in reads else none,
            features=features,
            linear_logits=self.linear(features) if "features" in reads and self.linear is not None else none,
        )

    def blocks(self, split: SplitView, reads: Set[str]) -> Iterator[slice]:
        """Cut a split's rows so that about 32 MiB are read at a time."""
        header = self.cache.header
        width = {"logits": header.classes, "features": header.features + header.classes}
        return block_slices(split, width=sum(width[kind] for kind in reads), block_rows=header.block_rows)

    def training(self, name: str, reads: Set[str]) -> Training:
        """Return at most FIT_ROWS images of a split, evenly spaced; none of the split with an empty name."""
        linear = self.linear or Linear(
            weight=np.empty((self.cache.header.classes, 0), np.float32), bias=np.empty(0, np.float32)
        )
        if not name:
            none = np.empty((0, 0), np.float32)
            samples = Samples(logits=none, features=none, linear_logits=none)
            return Training(samples=samples, label=np.empty(0, np.int64), linear=linear)
        split = self.cache[name]
        chosen = np.unique(np.linspace(0, split.rows - 1, min(split.rows, FIT_ROWS)).round().astype(np.int64))
        parts = []
        for rows in self.blocks(split, reads):
            inside = chosen[(chosen >= rows.start) & (chosen < rows.stop)] - rows.start
            parts.append(_take(self.read(split, rows, reads), inside))
        samples = Samples(
            logits=np.concatenate([part.logits for part in parts]),
            features=np.concatenate([part.features for part in parts]),
            linear_logits=np.concatenate([part.linear_logits for part in parts]),
        )
        return Training(samples=samples, label=split.label[chosen], linear=linear)


def _fit_group(reader: _Reader, group: Mapping[str, Baseline], split: str) -> dict[str, _Fitted]:
    """Fit the baselines that learn from one split, which is read once."""
    reasons = {name: _lacks(reader, baseline) for name, baseline in group.items()}
    reads = {baseline.reads for name, baseline in group.items() if not reasons[name]}
    if not reads:
        return {name: _Fitted(reason=reason) for name, reason in reasons.items()}
    training = reader.training(split, reads)
    fitted = {}
    for name, baseline in group.items():
        reason = reasons[name] or _too_few(baseline, training, split)
        fitted[name] = _Fitted(reason=reason) if reason else _fit(baseline, training, split)
    return fitted


def _fit(baseline: Baseline, training: Training, split: str) -> _Fitted:
    try:
        with np.errstate(all="ignore"):
            return _Fitted(score=baseline.fit(training), images=len(training.label))
    except (InputError, np.linalg.LinAlgError) as error:
        return _Fitted(reason=f"{split}: {error}")


def _lacks(reader: _Reader, baseline: Baseline) -> str:
    """What the cache does not hold; empty where it holds everything."""
    cache, split = reader.cache, baseline.fitted_on
    if not (has_logits(cache) or (baseline.of_probabilities and has_classes(cache))):
        return why_no_logits(outputs_of(cache))
    if baseline.reads == "features" and reader.linear is None:
        why = cache.header.information.get("no_classifier")
        return NO_CLASSIFIER + (f": {why}" if why else "")
    if split and split not in cache:
        return f"the cache has no {split}"
    if split and not cache.peek(split).sealed:
        return f"{split} is not finished"
    return ""


def _too_few(baseline: Baseline, training: Training, split: str) -> str:
    """Why these images are too few, or labelled wrongly; empty where they are enough."""
    if not split:
        return ""
    label, (classes, features) = training.label, training.linear.weight.shape
    if baseline.labels and (wrong := int(((label < 0) | (label >= classes)).sum())):
        return f"{wrong} of {len(label)} labels of {split} are outside 0 … {classes - 1}"
    if len(label) < baseline.images:
        return f"it needs {baseline.images} images; {split} has {len(label)}"
    if baseline.per_class and (fewest := int(np.bincount(label, minlength=classes).min())) < baseline.per_class:
        images = f"{baseline.per_class} images" if baseline.per_class > 1 else "an image"
        return f"it needs {images} of every class; {split} has a class with {fewest}"
    if baseline.covariance and len(label) < (needed := features + classes):
        return (
            f"the covariance of {features} features in {classes} classes needs {needed} images; {split} has"
            f" {len(label)}"
        )
    return ""


def _score_splits(
    reader: _Reader, chosen: Mapping[str, Baseline], fitted: Mapping[str, _Fitted], splits: Iterable[str]
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Read every split once and return method → split → scores (rows,), of the methods that have a detector."""
    detectors = {name: detector.score for name, detector in fitted.items() if detector.score is not None}
    found: dict[str, dict[str, NDArray[np.float64]]] = {name: {} for name in detectors}
    if not detectors:
        return found
    reads = {chosen[name].reads for name in detectors}
    header = reader.cache.header
    step = max(1, HELD // (header.classes + header.features + max(one.images for one in fitted.values())))
    for name in splits:
        split = reader.cache[name]
        for method in found.values():
            method[name] = np.empty(split.rows)
        for rows in reader.blocks(split, reads):
            block = reader.read(split, rows, reads)
            for start in range(0, rows.stop - rows.start, step):
                part = _take(block, slice(start, start + step))
                for method_name, score in detectors.items():
                    with np.errstate(all="ignore"):
                        scores = score(part)
                    first = rows.start + start
                    found[method_name][name][first : first + len(scores)] = scores
    return found


def _take(samples: Samples, rows: slice | NDArray[np.int64]) -> Samples:
    return Samples(
        logits=samples.logits[rows], features=samples.features[rows], linear_logits=samples.linear_logits[rows]
    )


def _collect(
    baseline: Baseline, fitted: _Fitted, found: Mapping[str, NDArray[np.float64]] | None, splits: list[str]
) -> MethodScores:
    """Return the scores of the splits of which all are numbers, and reasons for the others."""
    scores: dict[str, NDArray[np.float64]] = {}
    reasons: dict[str, str] = {}
    for split in splits:
        if found is None:
            reasons[split] = fitted.reason
        elif bad := int((~np.isfinite(found[split])).sum()):
            reasons[split] = f"{bad} of {found[split].size} scores of {split} are not finite"
        else:
            scores[split] = found[split]
    return MethodScores(scores=scores, reasons=reasons, fitted_on=baseline.fitted_on, n_fitted=fitted.images)


MORE_BASELINES = tuple(BASELINES)
EARLIER_NAMES: Mapping[str, str] = {"ash": "ASH-S@65", "scale": "SCALE@65"}
"""Lower-case names of before there were variants → today's."""
OUT_OF_REACH = ("ODIN", "Gram", "RankFeat")  # they run the network again, or need its feature maps
RUNS_NETWORK = "it runs the network itself; a cache does not hold what it needs"


def find_baseline(name: str) -> str | None:
    """Return a baseline's name, plain or further, as it is written; None where there is none of that name."""
    known = {other.lower(): other for other in (*LOGIT_BASELINES, *MORE_BASELINES)}
    return known.get(name.lower()) or EARLIER_NAMES.get(name.lower())


def choose_baselines(names: Iterable[str]) -> list[str]:
    """Return the baselines beyond the plain ones that are meant, as they are written; `all`: of `BASELINES`.

    Raises:
        InputError: a name is not known, or all names are of methods that need the network itself.
    """
    chosen: dict[str, None] = {}
    reached = False
    beyond = {name.lower(): name for name in OUT_OF_REACH}
    for name in names:
        if name.lower() == "all":
            chosen.update(dict.fromkeys(MORE_BASELINES))
        elif name.lower() in beyond:
            chosen[beyond[name.lower()]] = None
            continue
        elif (found := find_baseline(name)) is None:
            raise InputError(
                f"baseline {name!r} is not known; known: all, {', '.join([*LOGIT_BASELINES, *MORE_BASELINES])}"
            )
        elif found in BASELINES:
            chosen[found] = None
        reached = True
    if chosen and not reached:
        raise InputError(f"baseline {', '.join(chosen)}: {RUNS_NETWORK}")
    return list(chosen)
