"""Groups of classes, for terms that count neurons among training images of the same predicted class.

A class of its own needs enough training images: with fewer than 100 per class on average, classes that look alike to
the network share a group.

    training images    classes    groups
    1,000              10         10, the classes themselves
    994                1,000      9, of about 110 images each
    50,000             100        64, the most
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IMAGES_PER_GROUP = 100
MAX_GROUPS = 64
KMEANS_STARTS, KMEANS_STEPS = 4, 100

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassGroups:
    """Which group each class belongs to."""

    group_of: NDArray[np.int32]
    """(classes,), 0 … count − 1."""
    count: int
    """Groups, those that hold no training image too."""

    def assign(self, logits: NDArray[np.floating]) -> NDArray[np.int32]:  # (samples, classes)
        """Return the group of each sample's predicted class, (samples,)."""
        return np.asarray(self.group_of[logits.argmax(axis=1)])


def count_groups_for(train_rows: int, classes: int) -> int:
    """Return how many groups so many training images and classes make; 1 where they are too few for a choice."""
    return max(1, min(train_rows // IMAGES_PER_GROUP, classes, MAX_GROUPS))


def choose_groups(
    train_logits: Iterable[NDArray[np.float32]],  # each (samples, classes): all training images, in parts
    classifier: NDArray[np.float32] | None,  # (classes, features): the last linear layer's weight
) -> ClassGroups:
    """Return the groups of classes that so many training images can fill.

    The classes themselves where they are few enough; else classes with similar rows in the classifier, or, where there
    is no classifier of these classes, with similar mean logits.
    """
    sums, images = np.zeros((1, 1)), np.zeros(1, np.int64)
    for logits in train_logits:
        classes = logits.shape[1]
        if images.size != classes:
            sums, images = np.zeros((classes, classes)), np.zeros(classes, np.int64)
        predicted = logits.argmax(axis=1)
        if classifier is None or len(classifier) != classes:
            np.add.at(sums, predicted, logits)
        images += np.bincount(predicted, minlength=classes)
    count = count_groups_for(int(images.sum()), images.size)
    if count == images.size:
        return ClassGroups(group_of=np.arange(count, dtype=np.int32), count=count)
    if classifier is not None and len(classifier) == images.size:
        return group_by_classifier(classifier, count)
    return group_by_logits(sums, images, count)


def group_by_classifier(
    weight: NDArray[np.float32],  # (classes, features)
    count: int,
) -> ClassGroups:
    """Return groups of classes whose rows in the classifier point in similar directions."""
    return _grouped(cluster(_directions(weight.astype(np.float64)), count))


def group_by_logits(
    logit_sums: Floats,  # (classes, classes): Σ of the logits of the training images predicted as each class
    images: NDArray[np.int64],  # (classes,): how many these are
    count: int,
) -> ClassGroups:
    """Return groups of classes whose training images have similar mean logits.

    A class that no training image was predicted as joins the group whose images have the largest mean logit of it.
    """
    seen = np.flatnonzero(images)
    means = logit_sums[seen] / images[seen, None]
    labels = cluster(_directions(means - means.mean(axis=1, keepdims=True)), count)
    group_means = np.stack(
        [logit_sums[seen[labels == g]].sum(axis=0) / images[seen[labels == g]].sum() for g in range(labels.max() + 1)]
    )
    group_of = group_means.argmax(axis=0)
    group_of[seen] = labels
    return _grouped(group_of)


def cluster(
    points: Floats,  # (points, dimensions)
    count: int,
    seed: int = 0,
) -> NDArray[np.intp]:
    """Return each point's cluster by k-means, (points,): at most `count`, numbered by their first points.

    The best of a few seeded k-means++ starts, so the same points give the same clusters. A cluster that loses its last
    point takes the point that is farthest from its centre.
    """
    count = min(count, len(points))
    best, least = np.zeros(len(points), np.intp), np.inf
    for start in range(KMEANS_STARTS):
        centres = _choose_centres(points, count, np.random.default_rng([seed, start]))
        labels = np.full(len(points), -1)
        for _ in range(KMEANS_STEPS):
            distances = _distances(points, centres)  # (points, count)
            new = distances.argmin(axis=1)
            for empty in np.flatnonzero(np.bincount(new, minlength=count) == 0):
                alone = np.bincount(new, minlength=count)[new] == 1
                own = np.where(alone, -1.0, distances[np.arange(len(points)), new])
                new[own.argmax()] = empty
            if (new == labels).all():
                break
            labels = new
            centres = np.stack([points[labels == g].mean(axis=0) for g in range(count)])
        spread = float(_distances(points, centres)[np.arange(len(points)), labels].sum())
        if spread < least * (1 - 1e-9):
            best, least = labels, spread
    _, first = np.unique(best, return_index=True)
    return np.argsort(np.argsort(first))[best]


def _choose_centres(points: Floats, count: int, random: np.random.Generator) -> Floats:
    """k-means++: each next centre is a point, drawn by its squared distance from the nearest centre so far."""
    chosen = [int(random.integers(len(points)))]
    nearest = np.full(len(points), np.inf)
    while len(chosen) < count:
        nearest = np.minimum(nearest, _distances(points, points[chosen[-1:]])[:, 0])
        nearest[chosen] = 0.0
        total = np.cumsum(nearest)
        if total[-1] > 0:
            chosen.append(min(int(np.searchsorted(total, random.random() * total[-1], "right")), len(points) - 1))
        else:  # fewer distinct points than centres
            chosen.append(next(place for place in range(len(points)) if place not in chosen))
    return points[chosen]


def _distances(points: Floats, centres: Floats) -> Floats:  # (points, centres)
    """Squared distances."""
    cross = points @ centres.T
    return np.asarray(np.maximum((points**2).sum(axis=1)[:, None] - 2 * cross + (centres**2).sum(axis=1), 0.0))


def _directions(vectors: Floats) -> Floats:
    """Rows of length 1; a row of zeros stays one."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-300))


def _grouped(group_of: NDArray[np.intp]) -> ClassGroups:
    return ClassGroups(group_of=group_of.astype(np.int32), count=int(group_of.max()) + 1)
