"""Post-hoc detectors that ask how an image lies among all training images, and not only near the closest ones.

z is an image's features, p its probabilities. Both are OpenOOD's, of features at unit length.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nacpipe.evaluation.posthoc.detector import Samples, Score, Training, softmax
from nacpipe.method.plain_scores import Floats

RELATION_THRESHOLD = 0.03  # relations that are smaller count nothing
CFOOD_IMAGES = 5_000  # at most: OpenOOD takes a tenth of the training images, of CIFAR's 50,000
CFOOD_SEED = 1  # of np.random.RandomState, which draws them where there are more
CFOOD_SHARE = 100  # one training image in so many must count the image among its neighbours


def fit_relation(training: Training) -> Score:
    """Relation (Kim et al., NeurIPS 2023): the sum over training images i of max(cos(z, zᵢ), 0) · (p · pᵢ).

    Of these relations, those of at most 0.03 count nothing.
    """
    bank = _directions(training.samples.features).astype(np.float32)
    bank_p = softmax(training.samples.linear_logits.astype(np.float64)).astype(np.float32)

    def score(samples: Samples) -> Floats:
        relation = np.maximum(_directions(samples.features).astype(np.float32) @ bank.T, 0)
        relation *= softmax(samples.linear_logits.astype(np.float64)).astype(np.float32) @ bank_p.T
        relation[relation <= RELATION_THRESHOLD] = 0
        return np.asarray(relation.sum(axis=1, dtype=np.float64))

    return score


def fit_cfood(training: Training) -> Score:
    """CFOOD, as OpenOOD has it: −κ, the smallest share with which 1 % of the training images have the image in reach.

    A training image's reach at κ is its distance to the (κ · images)th nearest other; κ runs through 230 values from
    0.001 to 0.99, and is 1 where none is enough:

        κ          0.001  0.002  …  0.1  0.105  …  0.5  0.51  …  0.99   1
        in reach    0.1    0.3   …  1.2 %
                                     ▲ −κ is the score
    """
    features = training.samples.features
    if len(features) > CFOOD_IMAGES:
        features = features[np.random.RandomState(CFOOD_SEED).permutation(len(features))[:CFOOD_IMAGES]]
    bank = _directions(features)
    shares, places = cfood_grid(len(bank))
    reach = np.empty((len(bank), len(places)))
    step = max(1, 2**22 // len(bank))
    for start in range(0, len(bank), step):
        among = _squared_distances(bank[start : start + step], bank)
        among[np.arange(len(among)), np.arange(start, start + len(among))] = 0.0  # itself, the first
        reach[start : start + step] = np.sort(among, axis=1)[:, places + 1]
    enough = -(-len(bank) // CFOOD_SHARE)

    def score(samples: Samples) -> Floats:
        distances = _squared_distances(bank, _directions(samples.features))  # (images, samples)
        first = np.empty(distances.shape, np.int16)  # the place in `shares` from which on a sample is in reach
        for image, own in enumerate(reach):
            first[image] = np.searchsorted(own, distances[image])
        return np.asarray(-shares[np.partition(first, enough - 1, axis=0)[enough - 1]])

    return score


def cfood_grid(images: int) -> tuple[Floats, NDArray[np.int64]]:
    """The shares that are tried, ascending, then 1; and which neighbour each means, without repeats."""
    shares = np.concatenate([np.linspace(0.001, 0.1, 100), np.linspace(0.105, 0.5, 81), np.linspace(0.51, 0.99, 49)])
    places = (shares * images - 1).astype(np.int64)
    kept = np.append(True, places[:-1] < places[1:])
    return np.append(shares[kept], 1.0), places[kept]


def _directions(features: NDArray[np.float32]) -> Floats:
    """Features at unit length; OpenOOD's 10⁻¹⁰ keeps features of length 0 what they are."""
    wide = features.astype(np.float64)
    return np.asarray(wide / (np.linalg.norm(wide, axis=1, keepdims=True) + 1e-10))


def _squared_distances(first: Floats, second: Floats) -> Floats:
    """‖a − b‖² of every pair, (first, second)."""
    return np.asarray((first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1) - 2 * first @ second.T)
