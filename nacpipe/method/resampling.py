"""Metrics of images drawn again with replacement: scores are ranked once, a draw is a count per image.

    scores  ID   .9 .4 .7      ranks  ID   3 1 2      a draw of ID   0 2 1  → per rank  0 2 1 0
            OOD  .4 .1                OOD  1 0              of OOD   1 1    → per rank  1 1 0 0

AUROC and FPR@95 of the draw follow from the two rows of counts, exactly as `metrics.detect` would give them for the
drawn scores: ties share a rank, and sums of whole numbers are exact in float64.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]  # (samples,)
Counts = NDArray[np.float64]  # whole numbers


def rank_scores(id_scores: Scores, ood_scores: Scores) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return both sides' ranks among all distinct scores, (n_id,) and (n_ood,), lowest score 0."""
    _, ranks = np.unique(np.concatenate([id_scores, ood_scores]), return_inverse=True)
    narrow = np.asarray(ranks, dtype=np.int32)
    return narrow[: id_scores.size], narrow[id_scores.size :]


def draw_counts(size: int, name: str, number: int, seed: int) -> Counts:
    """Return how often each of `size` images is drawn in draw `number` of the set `name`, (size,), sum `size`."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
    return np.bincount(rng.integers(size, size=size), minlength=size).astype(np.float64)


def redetect(
    id_ranks: NDArray[np.int32],  # (n_id,)
    ood_ranks: NDArray[np.int32],  # (n_ood,)
    id_counts: Counts,  # (n_id,)
    ood_counts: Counts,  # (n_ood,)
) -> tuple[float, float]:
    """Return FPR@95 and AUROC of a draw."""
    ranks = int(max(id_ranks.max(), ood_ranks.max())) + 1
    inside = np.bincount(id_ranks, id_counts, ranks)
    outside = np.bincount(ood_ranks, ood_counts, ranks)
    flagged = np.cumsum(outside)  # OOD images at or below each rank
    n_id, n_ood = inside.sum(), flagged[-1]
    auroc = float(inside @ (flagged - outside / 2)) / (n_id * n_ood)
    needed = -(-19 * int(n_ood) // 20)  # the smallest k with k / n ≥ 0.95
    threshold = int(np.searchsorted(flagged, needed))
    return float(inside[: threshold + 1].sum() / n_id), float(auroc)
