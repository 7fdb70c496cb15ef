"""Detectors of other papers on a cache's logits, features and classifier, through pytorch-ood; no network is run.

Each has the settings of its paper or of pytorch-ood, and is told what to learn from:

    nothing      Entropy, GEN, ASH, SCALE
    id/val       Temperature, KL-Matching (what the network was trained on would flatter it)
    id/train     the others

pytorch-ood's scores grow with strangeness; here they are negated. What cannot be computed is a reason, never a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_ood import detector as ood

from nacpipe.cache import Cache, SplitView
from nacpipe.core.baselines import MethodScores, choose_baselines, row_slices, why_no_logits
from nacpipe.core.metrics import find_wrong_labels

FIT_ROWS = 50_000  # images that a baseline learns from at most, evenly spaced over the split
HELD = 2**24  # float32 numbers that a detector's intermediate array may have

NO_CLASSIFIER = "the cache holds no last linear layer"


class _CannotError(Exception):
    """Why a baseline has no scores."""


@dataclass(frozen=True, slots=True)
class Head:
    """A network's last linear layer and how wide things are."""

    linear: torch.nn.Linear
    classes: int
    features: int

    @property
    def pooled(self) -> torch.nn.Module:
        """The layer behind pooled feature maps (n, features, 1, 1)."""
        return torch.nn.Sequential(torch.nn.Flatten(), self.linear)


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """How a detector is made and fed."""

    make: Callable[[Head], Any]
    reads: Literal["logits", "features", "maps"]
    """`maps` are the pooled features as feature maps of one pixel."""
    fitted_on: str = ""
    """The split that it learns from."""
    per_class: int = 0
    """Images of every class that it cannot do without."""
    covariance: bool = False
    """Whether it inverts the features' covariance within classes."""
    held: Callable[[Head, int], int] = lambda head, fitted: head.classes + head.features
    """Numbers per image that it holds while it scores, of the head and the images it learned from."""


class _SlimFDBD(ood.fDBD):  # type: ignore[misc]
    """fDBD without pytorch-ood's array of (classes, classes, features): 8 GB for 1,000 classes of 2,048 features."""

    def _precompute_denom_matrix(self) -> None:
        weight = self.head.weight.data
        denominators = torch.stack([(weight - row).norm(dim=1) for row in weight])
        self._denom_matrix = denominators.fill_diagonal_(1.0)


def _vim_dimension(features: int) -> int:
    """The paper's 1,000 for wide features, 512 for those of a ViT, half of what is narrower."""
    return 1000 if features > 1500 else 512 if features >= 768 else features // 2


BASELINES: Mapping[str, Baseline] = {
    "Temperature": Baseline(make=lambda head: ood.TemperatureScaling(None), reads="logits", fitted_on="id/val"),
    "Entropy": Baseline(make=lambda head: ood.Entropy(None), reads="logits"),
    "GEN": Baseline(make=lambda head: ood.GEN(None, M=100), reads="logits"),
    "KL-Matching": Baseline(make=lambda head: ood.KLMatching(None), reads="logits", fitted_on="id/val"),
    "OpenMax": Baseline(make=lambda head: ood.OpenMax(None), reads="logits", fitted_on="id/train", per_class=2),
    "Mahalanobis": Baseline(
        make=lambda head: ood.Mahalanobis(None), reads="features", fitted_on="id/train", per_class=1, covariance=True
    ),
    "RMD": Baseline(
        make=lambda head: ood.RMD(None), reads="features", fitted_on="id/train", per_class=1, covariance=True
    ),
    "KNN": Baseline(
        make=lambda head: ood.KNN(None, k=50), reads="features", fitted_on="id/train", held=lambda head, fitted: fitted
    ),
    "ViM": Baseline(
        make=lambda head: ood.ViM(None, _vim_dimension(head.features), head.linear.weight, head.linear.bias),
        reads="features",
        fitted_on="id/train",
    ),
    "SHE": Baseline(make=lambda head: ood.SHE(None, head.linear), reads="features", fitted_on="id/train", per_class=1),
    "ReAct": Baseline(make=lambda head: ood.ReAct(None, head.pooled), reads="maps", fitted_on="id/train"),
    "ASH": Baseline(make=lambda head: ood.ASH(None, head.pooled), reads="maps"),
    "SCALE": Baseline(make=lambda head: ood.SCALE(None, head.pooled), reads="maps"),
    "DICE": Baseline(
        make=lambda head: ood.DICE(None, head.linear.weight, head.linear.bias, p=0.9),
        reads="features",
        fitted_on="id/train",
        held=lambda head, fitted: head.classes * head.features,
    ),
    "fDBD": Baseline(make=lambda head: _SlimFDBD(None, head.linear), reads="features", fitted_on="id/train"),
    "NCI": Baseline(make=lambda head: ood.NCI(None, head.linear), reads="features", fitted_on="id/train"),
    "NNGuide": Baseline(
        make=lambda head: ood.NNGuide(None, head.linear),
        reads="features",
        fitted_on="id/train",
        held=lambda head, fitted: fitted,
    ),
}


def score_baselines(cache: Cache, names: Iterable[str], splits: Iterable[str]) -> dict[str, MethodScores]:
    """Fit baselines and score splits, block by block: method → its scores, larger = more like the training data.

    Args:
        cache: a cache whose network gives logits; features and classifier where the network has a last linear layer.
        names: among `BASELINES`, or `all`.
        splits: what to score.

    Raises:
        InputError: a name is not known.
    """
    wanted, head = list(splits), _head(cache)
    return {name: _score(cache, BASELINES[name], head, wanted) for name in choose_baselines(names)}


def _score(cache: Cache, baseline: Baseline, head: Head | None, splits: list[str]) -> MethodScores:
    fitted_on, fitted = baseline.fitted_on, 0
    try:
        if (outputs := str(cache.header.identity.get("outputs", "logits"))) != "logits":
            raise _CannotError(why_no_logits(outputs))
        if head is None:
            if baseline.reads != "logits":
                why = cache.header.information.get("no_classifier")
                raise _CannotError(NO_CLASSIFIER + (f": {why}" if why else ""))
            head = Head(torch.nn.Linear(1, 1), cache.header.classes, 0)
        detector, fitted = _fit(cache, baseline, head)
    except _CannotError as error:
        return MethodScores(reasons=dict.fromkeys(splits, str(error)), fitted_on=fitted_on, n_fitted=fitted)
    scores: dict[str, NDArray[np.float64]] = {}
    reasons: dict[str, str] = {}
    step = max(1, HELD // max(1, baseline.held(head, fitted)))
    for split in splits:
        found = _score_split(cache, cache[split], baseline, detector, step)
        if bad := int((~np.isfinite(found)).sum()):
            reasons[split] = f"{bad} of {found.size} scores of {split} are not finite"
        else:
            scores[split] = found
    return MethodScores(scores=scores, reasons=reasons, fitted_on=fitted_on, n_fitted=fitted)


def _fit(cache: Cache, baseline: Baseline, head: Head) -> tuple[Any, int]:
    """Return the fitted detector and the number of images that it learned from."""
    try:
        detector = baseline.make(head)
        if not baseline.fitted_on:
            return detector, 0
        if baseline.fitted_on not in cache:
            raise _CannotError(f"the cache has no {baseline.fitted_on}")
        if not cache.peek(baseline.fitted_on).sealed:
            raise _CannotError(f"{baseline.fitted_on} is not finished")
        values, label = _fitting_set(cache, cache[baseline.fitted_on], baseline.reads)
        _check_enough(baseline, head, label)
        fit = {"logits": "fit_logits", "features": "fit_features", "maps": "fit_feature_maps"}[baseline.reads]
        getattr(detector, fit)(values, torch.from_numpy(label))
    except (ValueError, RuntimeError, ImportError) as error:  # what pytorch-ood says of data that it cannot use
        raise _CannotError(f"pytorch-ood: {str(error).splitlines()[0]}") from error
    return detector, len(label)


def _check_enough(baseline: Baseline, head: Head, label: NDArray[np.int64]) -> None:
    if (wrong := find_wrong_labels(label, head.classes)).size:
        raise _CannotError(
            f"{wrong.size} of {len(label)} labels of {baseline.fitted_on} are outside 0 … {head.classes - 1}"
        )
    fewest = int(np.bincount(label, minlength=head.classes).min())
    if fewest < baseline.per_class:
        raise _CannotError(
            f"it needs {baseline.per_class} images of every class; {baseline.fitted_on} has a class with {fewest}"
        )
    needed = head.features + head.classes
    if baseline.covariance and len(label) < needed:
        raise _CannotError(
            f"the covariance of {head.features} features in {head.classes} classes needs {needed} images;"
            f" {baseline.fitted_on} has {len(label)}"
        )


@torch.no_grad()
def _score_split(cache: Cache, split: SplitView, baseline: Baseline, detector: Any, step: int) -> NDArray[np.float64]:
    predict = getattr(detector, {"maps": "predict_feature_maps"}.get(baseline.reads, f"predict_{baseline.reads}"))
    found = np.empty(split.rows)
    for rows in row_slices(split.rows, width=_width(cache, baseline.reads), block_rows=cache.header.block_rows):
        values = _tensor(split, baseline.reads, rows)
        found[rows] = -torch.cat([predict(part) for part in torch.split(values, step)]).double().numpy()
    return found


def _fitting_set(cache: Cache, split: SplitView, reads: str) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """The values (n, …) and labels (n,) of at most FIT_ROWS images, evenly spaced."""
    chosen = np.unique(np.linspace(0, split.rows - 1, min(split.rows, FIT_ROWS)).round().astype(np.int64))
    parts = []
    for rows in row_slices(split.rows, width=_width(cache, reads), block_rows=cache.header.block_rows):
        inside = chosen[(chosen >= rows.start) & (chosen < rows.stop)] - rows.start
        parts.append(_tensor(split, reads, rows)[inside])
    return torch.cat(parts), split.label[chosen]


def _tensor(split: SplitView, reads: str, rows: slice) -> torch.Tensor:
    values = torch.from_numpy(split.read("logits" if reads == "logits" else "features", rows))
    return values[:, :, None, None] if reads == "maps" else values


def _width(cache: Cache, reads: str) -> int:
    return cache.header.classes if reads == "logits" else cache.header.features


def _head(cache: Cache) -> Head | None:
    found = cache.classifier()
    if found is None:
        return None
    weight, bias = found
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    return Head(linear.requires_grad_(False), *weight.shape)
