"""Post-hoc detectors that compare an image's features with the training images' or with the last linear layer's rows.

z is an image's features, l = W z + b the last linear layer's logits, k their largest's place. In each docstring: the
paper, then the score. They are computed in float64 from float32 features, NNGuide's similarities in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nacpipe.errors import InputError
from nacpipe.evaluation.posthoc.detector import Samples, Score, Training, class_means
from nacpipe.method.feature_scores import (
    FeatureScore,
    FeatureScoreName,
    find_origin,
    find_principal,
    fit_feature_score,
    residual_lengths,
    vim_dimension,
)
from nacpipe.method.plain_scores import Floats, energy

RIDGE = 1e-6  # added to the diagonal of a scatter matrix, as pytorch-ood does
KNN_NEIGHBOURS, NNGUIDE_NEIGHBOURS = 50, 10


def fit_mahalanobis(training: Training) -> Score:
    """Mahalanobis (Lee et al., NeurIPS 2018): −½ min over classes of (z − μ)ᵀ Σ⁻¹ (z − μ), one Σ for all classes.

    Σ is the scatter, a sum over images and not a mean, which changes no order.
    """
    classes = training.linear.weight.shape[0]
    features = training.samples.features.astype(np.float64)
    centre, means, precision = _gaussians(features, training.label, classes)
    return lambda samples: -0.5 * _squared_distances(samples.features - centre, means, precision).min(axis=1)


def fit_rmd(training: Training) -> Score:
    """RMD (Ren et al., 2021): Mahalanobis without the ½, less the same of one Gaussian of all images."""
    classes = training.linear.weight.shape[0]
    features = training.samples.features.astype(np.float64)
    centre, means, precision = _gaussians(features, training.label, classes)
    _, background, background_precision = _gaussians(features, np.zeros(len(features), np.int64), 1)

    def score(samples: Samples) -> Floats:
        centred = samples.features - centre
        to_all = _squared_distances(centred, background, background_precision)[:, 0]
        return np.asarray(to_all - _squared_distances(centred, means, precision).min(axis=1))

    return score


def fit_mds_plus(training: Training) -> Score:
    """MDS++ (Müller & Hein, ICML 2025): −min over classes of (z − μ)ᵀ Σ⁺ (z − μ) of features at unit length.

    Σ is the mean over images, and directions in which no training image differs count nothing, as in the authors' code.
    """
    classes = training.linear.weight.shape[0]
    centre, means, precision = _gaussians(
        _unit(training.samples.features), training.label, classes, _covariance_inverse
    )
    return lambda samples: -_squared_distances(_unit(samples.features) - centre, means, precision).min(axis=1)


def fit_rmds_plus(training: Training) -> Score:
    """RMDS++ (Müller & Hein, ICML 2025): MDS++ less the same of one Gaussian of all images."""
    classes = training.linear.weight.shape[0]
    unit, one = _unit(training.samples.features), np.zeros(len(training.label), np.int64)
    centre, means, precision = _gaussians(unit, training.label, classes, _covariance_inverse)
    _, background, background_precision = _gaussians(unit, one, 1, _covariance_inverse)

    def score(samples: Samples) -> Floats:
        centred = _unit(samples.features) - centre
        to_all = _squared_distances(centred, background, background_precision)[:, 0]
        return np.asarray(to_all - _squared_distances(centred, means, precision).min(axis=1))

    return score


def fit_knn(training: Training) -> Score:
    """KNN (Sun et al., ICML 2022): the negative distance to the 50th nearest training image, at unit length."""
    bank = _unit(training.samples.features)

    def score(samples: Samples) -> Floats:
        unit = _unit(samples.features)
        squared = (unit**2).sum(axis=1)[:, None] + (bank**2).sum(axis=1) - 2 * unit @ bank.T
        nearest = np.partition(squared, KNN_NEIGHBOURS - 1, axis=1)[:, KNN_NEIGHBOURS - 1]
        return -np.sqrt(np.maximum(nearest, 0))

    return score


def fit_nnguide(training: Training) -> Score:
    """NNGuide (Park et al., ICCV 2023): Energy times the mean similarity to the ten most similar training images.

    A training image's similarity is the cosine times its own Energy.
    """
    energies = energy(training.samples.linear_logits)[:, None]
    bank = (_unit(training.samples.features) * energies).astype(np.float32)

    def score(samples: Samples) -> Floats:
        similarity = _unit(samples.features).astype(np.float32) @ bank.T
        nearest = np.partition(similarity, -NNGUIDE_NEIGHBOURS, axis=1)[:, -NNGUIDE_NEIGHBOURS:]
        return np.asarray(nearest.mean(axis=1, dtype=np.float64) * energy(samples.linear_logits))

    return score


def fit_vim(training: Training) -> Score:
    """ViM (Wang et al., CVPR 2022): Energy less alpha times the length of z + W⁺ b outside the principal subspace.

    Alpha makes the mean length of the training images their mean largest logit.
    """
    fitted = _fit(training, "ViM")
    return lambda samples: fitted.score(samples.features, samples.linear_logits)


def fit_residual(training: Training) -> Score:
    """Residual (Wang et al., CVPR 2022): the negative length of z + W⁺ b outside the principal subspace, ViM's."""
    origin = find_origin(training.linear.weight, training.linear.bias)
    principal = find_principal(training.samples.features - origin, vim_dimension(training.linear.weight.shape[1]))
    return lambda samples: -residual_lengths(samples.features - origin, principal)


def fit_she(training: Training) -> Score:
    """SHE (Zhang et al., ICLR 2023): z · the mean features of the training images rightly classified as k."""
    classes = training.linear.weight.shape[0]
    correct = training.samples.linear_logits.argmax(axis=1) == training.label
    missing = np.flatnonzero(np.bincount(training.label[correct], minlength=classes) == 0)
    if missing.size:
        raise InputError(f"no image of class {missing[0]} is classified correctly ({missing.size} such classes)")
    patterns = class_means(training.samples.features[correct], training.label[correct], classes)
    return lambda samples: (samples.features * patterns[samples.linear_logits.argmax(axis=1)]).sum(axis=1)


def fit_fdbd(training: Training) -> Score:
    """fDBD (Liu & Qin, ICML 2024): mean distance to the other classes' boundaries, over that to the mean features.

    The boundary between k and j is |l_k − l_j| / ‖w_k − w_j‖ away.
    """
    fitted = _fit(training, "fDBD")
    return lambda samples: fitted.score(samples.features, samples.linear_logits)


def fit_nci(training: Training) -> Score:
    """NCI (Liu & Qin, CVPR 2025): w_k · (z − mean features) / ‖z − mean features‖, without the norm of z."""
    fitted = _fit(training, "NCI")
    return lambda samples: fitted.score(samples.features, samples.linear_logits)


def _fit(training: Training, method: FeatureScoreName) -> FeatureScore:
    """Fit a score that can also be a member of NAC's sum."""
    samples, linear = training.samples, training.linear
    return fit_feature_score(method, samples.features, samples.linear_logits, linear.weight, linear.bias)


def _gaussians(
    features: Floats,  # (samples, features)
    label: NDArray[np.int64],
    classes: int,
    invert: Callable[[Floats, int], Floats] | None = None,
) -> tuple[Floats, Floats, Floats]:
    """The mean of all features, each class's mean less it, (classes, features), and the inverse of the scatter."""
    centre = features.mean(axis=0)
    means = class_means(features - centre, label, classes)
    spread = features - centre - means[label]
    scatter = spread.T @ spread
    if invert is not None:
        return centre, means, invert(scatter, len(features))
    return centre, means, np.linalg.inv(scatter + RIDGE * np.eye(features.shape[1]))


def _covariance_inverse(scatter: Floats, samples: int) -> Floats:
    """The pseudo-inverse of scatter / samples; eigenvalues below float64's rounding of the largest count as 0."""
    values, vectors = np.linalg.eigh(scatter / samples)
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return np.asarray((vectors[:, kept] / values[kept]) @ vectors[:, kept].T)


def _squared_distances(values: Floats, means: Floats, precision: Floats) -> Floats:
    """(v − μ)ᵀ P (v − μ) of every pair, (samples, classes), without an array of (samples, classes, features)."""
    turned = values @ precision
    own = (turned * values).sum(axis=1)[:, None]
    return np.asarray(own - 2 * turned @ means.T + ((means @ precision) * means).sum(axis=1))


def _unit(features: NDArray[np.float32]) -> Floats:
    wide = features.astype(np.float64)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12))
