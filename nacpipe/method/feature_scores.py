"""Scores of the last linear layer's input that can be a member of the sum, beside coverage (`search --fuse`).

With z an image's features, μ the mean of the training images' features, W and b the last linear layer, l the logits and
k the predicted class:

    NCI      w_k · (z − μ) / ‖z − μ‖                                           Liu & Qin, CVPR 2025, without the norm
    fDBD     mean over j ≠ k of (l_k − l_j) / ‖w_k − w_j‖, over ‖z − μ‖        Liu & Qin, ICML 2024
    ViM      log Σ exp l − alpha · ‖z + W⁺ b outside the principal subspace‖   Wang et al., CVPR 2022

In the sum a score is standardised by the mean and standard deviation of id/val's, which are part of the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from nacpipe.errors import ParamsError
from nacpipe.method.plain_scores import energy

Floats = NDArray[np.float64]
FeatureScoreName = Literal["NCI", "fDBD", "ViM"]
FEATURE_SCORES: tuple[FeatureScoreName, ...] = get_args(FeatureScoreName)

STEP = 2.0**-24  # of a standardised score: coarser than what the order of additions in a matrix product changes


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedScore:
    """What the parameters hold of a feature score that is a member of the sum."""

    method: FeatureScoreName
    """NCI, fDBD or ViM."""
    mean: float
    """Of id/val's scores."""
    deviation: float
    """Their standard deviation, > 0."""
    weight: float
    """The share of (score − mean) / deviation in the sum, before normalisation, ≥ 0."""

    def __post_init__(self) -> None:
        if self.method not in FEATURE_SCORES:
            raise ParamsError(f"fused method is {self.method!r}; known: {', '.join(FEATURE_SCORES)}")
        for name in ("mean", "deviation", "weight"):
            value = getattr(self, name)
            if not (_is_number(value) and abs(value) < 1e300):  # nor NaN
                raise ParamsError(f"fused {name} is {value!r}; it must be a finite number")
            object.__setattr__(self, name, float(value))
        if self.deviation <= 0:
            raise ParamsError(f"fused deviation is {self.deviation}; it must be above 0")
        if self.weight < 0:
            raise ParamsError(f"fused weight is {self.weight}; it must be at least 0")

    def describe(self) -> str:
        """Return what it is among terms, in a sentence for output."""
        return (
            f"{self.method} is no coverage but a score of the last layer's input, standardised by its mean and"
            " deviation over id/val"
        )

    def standardise(self, scores: Floats) -> Floats:  # (samples,)
        """Return (score − mean) / deviation, (samples,), rounded to whole `STEP`s.

        A matrix product rounds a sample by its place among the others; rounding to steps makes a score independent of
        the batch it comes in, as coverage is.
        """
        return np.asarray(np.rint((scores - self.mean) / self.deviation / STEP) * STEP)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.floating) and not isinstance(value, bool)


class FeatureScore(Protocol):
    """A feature score with what it learnt from the training images: arrays that are its fields."""

    method: ClassVar[FeatureScoreName]

    def score(
        self,
        features: NDArray[np.float32],  # (samples, features)
        logits: NDArray[np.floating],  # (samples, classes)
    ) -> Floats:
        """Return the scores, (samples,), larger = more like the training data."""
        ...

    def arrays(self) -> dict[str, NDArray[np.floating]]:
        """Return the fields by name: `restore_feature_score` takes them."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Nci:
    """NCI."""

    method: ClassVar[FeatureScoreName] = "NCI"
    weight: NDArray[np.float32]  # (classes, features)
    mean: Floats  # (features,)

    def score(self, features: NDArray[np.float32], logits: NDArray[np.floating]) -> Floats:
        """Return the scores, (samples,); NaN where an image's features are the mean."""
        centred = features - self.mean
        rows = self.weight[logits.argmax(axis=1)]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((centred * rows).sum(axis=1) / np.linalg.norm(centred, axis=1))

    def arrays(self) -> dict[str, NDArray[np.floating]]:
        """Return the fields by name."""
        return {"weight": self.weight, "mean": self.mean}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fdbd:
    """fDBD."""

    method: ClassVar[FeatureScoreName] = "fDBD"
    between: Floats  # (classes, classes)
    """‖w_k − w_j‖; 1 where k = j."""
    mean: Floats  # (features,)

    def score(self, features: NDArray[np.float32], logits: NDArray[np.floating]) -> Floats:
        """Return the scores, (samples,)."""
        wide = logits.astype(np.float64)
        predicted = wide.argmax(axis=1)
        boundaries = ((wide.max(axis=1)[:, None] - wide) / self.between[predicted]).sum(axis=1)
        distance = np.maximum(np.linalg.norm(features - self.mean, axis=1), 1e-8)
        return np.asarray(boundaries / ((logits.shape[1] - 1) * distance))

    def arrays(self) -> dict[str, NDArray[np.floating]]:
        """Return the fields by name."""
        return {"between": self.between, "mean": self.mean}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vim:
    """ViM."""

    method: ClassVar[FeatureScoreName] = "ViM"
    origin: Floats  # (features,)
    """−W⁺ b."""
    principal: Floats  # (features, dimension)
    """Orthonormal columns: the directions of the training features' largest spread around the origin."""
    alpha: Floats  # (1,)
    """Makes the mean length of the training images their mean largest logit."""

    def score(self, features: NDArray[np.float32], logits: NDArray[np.floating]) -> Floats:
        """Return the scores, (samples,)."""
        return energy(logits) - float(self.alpha[0]) * residual_lengths(features - self.origin, self.principal)

    def arrays(self) -> dict[str, NDArray[np.floating]]:
        """Return the fields by name."""
        return {"origin": self.origin, "principal": self.principal, "alpha": self.alpha}


def fit_feature_score(
    method: FeatureScoreName,
    features: NDArray[np.float32],  # (samples, features), of training images
    logits: NDArray[np.floating],  # (samples, classes)
    weight: NDArray[np.float32],  # (classes, features)
    bias: NDArray[np.float32],  # (classes,)
) -> FeatureScore:
    """Learn a feature score from the training images."""
    if method == "ViM":
        return _fit_vim(features, logits, weight, bias)
    mean = features.mean(axis=0, dtype=np.float64)
    if method == "NCI":
        return Nci(weight=weight, mean=mean)
    wide = weight.astype(np.float64)
    squared = (wide**2).sum(axis=1)
    between = np.sqrt(np.maximum(squared[:, None] + squared - 2 * wide @ wide.T, 0))
    np.fill_diagonal(between, 1.0)
    return Fdbd(between=between, mean=mean)


def _fit_vim(
    features: NDArray[np.float32],
    logits: NDArray[np.floating],
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
) -> Vim:
    origin = find_origin(weight, bias)
    centred = features - origin
    principal = find_principal(centred, vim_dimension(centred.shape[1]))
    parts = np.array_split(centred, 1 + len(centred) // 4096)  # residual_lengths holds three times what it is given
    mean_length = np.concatenate([residual_lengths(part, principal) for part in parts]).mean()
    alpha = logits.max(axis=1).mean(dtype=np.float64) / mean_length
    return Vim(origin=origin, principal=principal, alpha=np.array([alpha]))


SCORES: Mapping[str, type[Nci] | type[Fdbd] | type[Vim]] = {"NCI": Nci, "fDBD": Fdbd, "ViM": Vim}


def restore_feature_score(method: FeatureScoreName, arrays: Mapping[str, NDArray[np.floating]]) -> FeatureScore:
    """Return the feature score of which `arrays` are the fields."""
    return SCORES[method](**arrays)  # type: ignore[arg-type]  # whoever reads a file has checked them


def field_names(method: FeatureScoreName) -> tuple[str, ...]:
    """Return the names of a feature score's arrays."""
    return tuple(field.name for field in fields(SCORES[method]))


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedFusion:
    """A fused score ready to be computed: its parameters, and what the score learnt."""

    params: FusedScore
    feature_score: FeatureScore

    def score(self, features: NDArray[np.float32], logits: NDArray[np.floating]) -> Floats:
        """Return the standardised scores, (samples,)."""
        return self.params.standardise(self.feature_score.score(features, logits))


def vim_dimension(features: int) -> int:
    """The paper's 1,000 for wide features, 512 for those of a ViT, half of what is narrower."""
    return 1000 if features > 1500 else 512 if features >= 768 else features // 2


def residual_lengths(values: Floats, principal: Floats) -> Floats:  # (samples, features), (features, dimension)
    """Return the length of each row outside the principal subspace, (samples,)."""
    return np.asarray(np.linalg.norm(values - (values @ principal) @ principal.T, axis=1))


def find_origin(
    weight: NDArray[np.float32],  # (classes, features)
    bias: NDArray[np.float32],  # (classes,)
) -> Floats:
    """Return −W⁺ b, (features,): the shortest z with W z + b = 0, from the smaller of W Wᵀ and Wᵀ W.

    Singular values of W below float32's rounding count as 0.
    """
    rows, right = weight.astype(np.float64), bias.astype(np.float64)
    wide = rows.shape[0] <= rows.shape[1]
    values, vectors = np.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    rounding = max(rows.shape) * float(np.finfo(np.float32).eps)
    kept = values > rounding**2 * values[-1]
    right = right if wide else rows.T @ right
    solved = vectors[:, kept] @ ((vectors[:, kept].T @ right) / values[kept])
    return np.asarray(-(rows.T @ solved if wide else solved))


def find_principal(values: Floats, dimension: int) -> Floats:  # (samples, features)
    """Return the directions of the largest spread around 0, (features, at most dimension).

    Of fewer samples than features, from the samples' inner products: a matrix of (samples, samples).
    """
    samples, features = values.shape
    if samples >= features:
        return np.asarray(np.linalg.eigh(values.T @ values)[1][:, -dimension:])  # eigenvalues ascend
    squares, vectors = np.linalg.eigh(values @ values.T)
    squares, vectors = squares[-dimension:], vectors[:, -dimension:]
    kept = squares > samples * np.finfo(np.float64).eps * squares[-1]
    return np.asarray(values.T @ (vectors[:, kept] / np.sqrt(squares[kept])))
