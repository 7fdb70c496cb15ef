"""Principal components of a layer's training values, which take the place of its neurons.

    x ↦ (x − mean) V / spread      V: directions of id/train's covariance, spread: the standard deviation along each

Neurons of a layer go together; its components do not, so that a state which no training image had shows up in one of
them. Directions are estimated from the training images: this is useful only where these are many times the neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IMAGES_PER_NEURON = 10  # at fewer, components gained nothing or cost points
LEAST_SPREAD = 1e-5  # of the largest; below it is the rounding of float32 values
BLOCK = 8192  # rows that are widened to float64 at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """A linear map from a layer's values to its components."""

    mean: NDArray[np.float32]
    """(neurons,), of the training values."""
    matrix: NDArray[np.float32]
    """(neurons, components), each column a direction divided by the spread along it; the largest spread first."""

    def project(self, values: NDArray[np.float32]) -> NDArray[np.float32]:  # (samples, neurons)
        """Return each sample's components, (samples, components).

        Sums are in float64 and rounded once: another batch or processor may change a last bit, and that seldom.
        """
        projected = np.empty((len(values), self.matrix.shape[1]), np.float32)
        matrix = self.matrix.astype(np.float64)
        for start in range(0, len(values), BLOCK):
            rows = slice(start, start + BLOCK)
            projected[rows] = (values[rows].astype(np.float64) - self.mean) @ matrix
        return projected


def fit_components(train: NDArray[np.float32]) -> Components | None:  # (samples, neurons)
    """Return the components of the training values, None where these are all the same.

    Directions with less than `LEAST_SPREAD` of the largest spread are left out. Each direction's sign is such that its
    largest entry (the first of equals) is positive.
    """
    mean = train.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((train.shape[1],) * 2)
    for start in range(0, len(train), BLOCK):
        centred = train[start : start + BLOCK] - mean
        covariance += centred.T @ centred
    variances, directions = np.linalg.eigh(covariance / max(len(train) - 1, 1))
    variances, directions = variances[::-1], directions[:, ::-1]
    kept = variances > LEAST_SPREAD**2 * variances[0]
    if not (kept.any() and variances[0] > 0):
        return None
    directions = directions[:, kept]
    largest = np.abs(directions).argmax(axis=0)
    directions = directions * np.where(directions[largest, np.arange(largest.size)] < 0, -1.0, 1.0)
    matrix = directions / np.sqrt(variances[kept])
    return Components(mean=mean.astype(np.float32), matrix=np.ascontiguousarray(matrix, np.float32))


def has_enough_images(train_rows: int, neurons: int) -> bool:
    """Return whether there are training images enough for this many neurons' components."""
    return train_rows >= IMAGES_PER_NEURON * neurons
