"""The paper and design §3 once more, in slow and plain lines, for the package to be compared with.

Nothing is taken from nacpipe. Everything is float64 and written from the definitions: states by a sigmoid, bins by
comparing a state with every edge, AUROC by comparing every pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.integer[Any]]


# --- neuron activation coverage ---------------------------------------------------------------------------------------


def log_half(points: int) -> list[float]:
    """log_1000 of evenly spaced numbers from 1 to √1000."""
    return [math.log(u) / math.log(1000.0) for u in np.linspace(1.0, math.sqrt(1000.0), points)]


def bin_edges(bins: int, kind: str = "log") -> Floats:
    """The M edges of design §3; for odd M the lower half has one edge more than the upper."""
    if kind == "linear":
        edges = [i / (bins - 1) for i in range(bins)]
        edges[-1] = math.nextafter(1.0, 2.0)
        return np.array(edges)
    low = log_half(bins // 2 + bins % 2)
    high = [1.0 - value for value in reversed(log_half(bins // 2))]
    high[-1] += 0.01
    return np.array([*low[:-1], *high, 1.2])


def states(products: NDArray[np.float32], alpha: float) -> Floats:
    """sigmoid(alpha · x), float64."""
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-alpha * products.astype(np.float64)))


def bins_of(states: Floats, edges: Floats) -> Ints:
    """The k with edges[k] ≤ s < edges[k + 1], for every state."""
    inside = (edges[:-1] <= states[..., None]) & (states[..., None] < edges[1:])
    assert (inside.sum(axis=-1) == 1).all(), "a state in no bin or in two"
    return np.asarray(inside.argmax(axis=-1))


def count(bins: Ints, n_bins: int) -> Ints:  # (samples, neurons) → (neurons, n_bins)
    """κ: how many samples fell in each bin of each neuron."""
    counts = np.zeros((bins.shape[1], n_bins), np.int64)
    for sample in bins:
        for neuron, k in enumerate(sample):
            counts[neuron, k] += 1
    return counts


def table(counts: Ints, saturation: int) -> Floats:
    """Φ = min(κ / r, 1)."""
    return np.array([[min(c / saturation, 1.0) for c in row] for row in counts])


def layer_score(table: Floats, bins: Ints) -> Floats:  # (neurons, n_bins), (samples, neurons) → (samples,)
    """The mean over neurons of the table at the sample's bin."""
    return np.array([math.fsum(table[i, k] for i, k in enumerate(sample)) / len(sample) for sample in bins])


def score_layer(
    train: NDArray[np.float32],  # (n_train, neurons), products
    products: NDArray[np.float32],  # (samples, neurons)
    *,
    bins: int,
    saturation: int,
    alpha: float,
    edges: str = "log",
) -> Floats:
    """A layer's score of every sample, from beginning to end."""
    borders = bin_edges(bins, edges)
    counts = count(bins_of(states(train, alpha), borders), bins - 1)
    return layer_score(table(counts, saturation), bins_of(states(products, alpha), borders))


def score_by_class(
    train: NDArray[np.float32],  # (n_train, neurons)
    train_groups: Sequence[int],  # (n_train,)
    products: NDArray[np.float32],  # (samples, neurons)
    groups: Sequence[int],  # (samples,)
    **params: Any,
) -> Floats:
    """Every sample scored among the training samples of its own group alone; 0 where there are none."""
    scores = []
    for sample, group in zip(products, groups, strict=True):
        own = np.array([x for x, g in zip(train, train_groups, strict=True) if g == group]).reshape(-1, train.shape[1])
        scores.append(score_layer(own, sample[None], **params)[0])
    return np.array(scores)


def components(
    train: NDArray[np.float32],  # (n_train, neurons)
    values: NDArray[np.float32],  # (samples, neurons)
) -> Floats:  # (samples, components)
    """(x − mean) V / spread from the singular value decomposition; directions of no spread left out.

    The largest entry of each direction is positive.
    """
    mean = train.astype(np.float64).mean(axis=0)
    _, sizes, directions = np.linalg.svd(train.astype(np.float64) - mean, full_matrices=False)
    columns = []
    for size, direction in zip(sizes, directions, strict=True):
        if size > 1e-5 * sizes[0]:
            sign = 1.0 if direction[np.abs(direction).argmax()] > 0 else -1.0
            columns.append((values.astype(np.float64) - mean) @ (sign * direction) / (size / math.sqrt(len(train) - 1)))
    return np.stack(columns, axis=1)


def weighted_score(layer_scores: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """Σ_layers weight · layer score, weights normalised to sum 1."""
    total = math.fsum(weights)
    return np.array(
        [
            math.fsum(w / total * s for w, s in zip(weights, sample, strict=True))
            for sample in zip(*layer_scores, strict=True)
        ]
    )


def in_doubt(products: NDArray[np.float32], alpha: float, edges: Floats) -> NDArray[np.bool_]:
    """Where rounding may decide the bin: products within 1e-6 of a border, relatively, or ±tiny around the border 0."""
    inner = edges[(edges > 0) & (edges < 1)]
    borders = np.log(inner / (1 - inner)) / alpha
    x = products.astype(np.float64)
    near = (np.abs(x[..., None] - borders) <= 1e-6 * np.abs(borders)).any(axis=-1)
    return np.asarray((near | (np.abs(alpha * x) < 1e-12)) & (x != 0))  # a product of exactly 0 has the state ½ exactly


# --- metrics ----------------------------------------------------------------------------------------------------------


def auroc(id_scores: Floats, ood_scores: Floats) -> float:
    """The share of pairs where the ID sample scores higher, ties half."""
    won = 0.0
    for a in id_scores:
        for b in ood_scores:
            won += 1.0 if a > b else 0.5 if a == b else 0.0
    return won / (len(id_scores) * len(ood_scores))


def fpr95(id_scores: Floats, ood_scores: Floats) -> float:
    """Walk the thresholds upwards; stop at the first that flags at least 95 % of OOD; the share of ID it flags."""
    for threshold in sorted({*id_scores, *ood_scores}):
        flagged = sum(score <= threshold for score in ood_scores)
        if 100 * flagged >= 95 * len(ood_scores):
            return float(sum(score <= threshold for score in id_scores) / len(id_scores))
    raise AssertionError("the highest threshold flags everything")


def aupr(positive: Floats, negative: Floats) -> float:
    """Walk the thresholds downwards from (recall 0, precision 1); the trapezoid under precision over recall."""
    area, recall, precision = 0.0, 0.0, 1.0
    for threshold in sorted({*positive, *negative}, reverse=True):
        true = sum(score >= threshold for score in positive)
        false = sum(score >= threshold for score in negative)
        now_recall, now_precision = true / len(positive), true / (true + false)
        area += (now_recall - recall) * (now_precision + precision) / 2
        recall, precision = now_recall, now_precision
    return float(area)


# --- the training subset ----------------------------------------------------------------------------------------------


def choose_balanced(labels: Sequence[int], classes: int, count: int, seed: int) -> list[int]:
    """Design §5: per class, in order of first appearance, its rows shuffled with the seed, the first ones kept."""
    if count < classes:
        rows = list(range(len(labels)))
        np.random.RandomState(seed).shuffle(rows)
        return rows[:count]
    by_class: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        by_class.setdefault(label, []).append(row)
    keep = min(count // classes, *(len(rows) for rows in by_class.values()))
    chosen = []
    for rows in by_class.values():
        np.random.RandomState(seed).shuffle(rows)
        chosen += rows[:keep]
    return chosen


# --- NAC-ME -----------------------------------------------------------------------------------------------------------


def covered_area(
    products: NDArray[np.float32],  # (samples, neurons)
    correct: Sequence[bool],
    *,
    bins: int,
    saturation: int,
    alpha: float,
) -> float:
    """The mean over neurons of Σ over linear bins of min(count / r, 1), divided by M; correct samples alone."""
    kept = np.array([x for x, good in zip(products, correct, strict=True) if good]).reshape(-1, products.shape[1])
    counts = count(bins_of(states(kept, alpha), bin_edges(bins, "linear")), bins - 1)
    return math.fsum(math.fsum(row) / bins for row in table(counts, saturation)) / len(counts)


def ranks(values: Sequence[float]) -> list[float]:
    """1 for the smallest; equal values share the mean of the places they take."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's correlation of the ranks."""
    x, y = ranks(a), ranks(b)
    mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
    covariance = math.fsum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    return covariance / math.sqrt(math.fsum((p - mx) ** 2 for p in x) * math.fsum((q - my) ** 2 for q in y))


# --- plain scores -----------------------------------------------------------------------------------------------------


def plain_scores(logits: Sequence[float], *, gamma: str = "0.1", largest: int = 100) -> dict[str, float]:
    """One image's scores from their definitions, with 80 digits, so that no probability is rounded to 0 or 1."""
    with localcontext() as context:
        context.prec = 80
        masses = [Decimal(value).exp() for value in logits]  # exp(-inf) is 0
        total = sum(masses)
        p = sorted((mass / total for mass in masses), reverse=True)
        return {
            "MSP": float(p[0]),
            "MaxLogit": max(logits),
            "Energy": float(total.ln()),
            "Entropy": float(sum(q * q.ln() for q in p if q > 0)),
            "GEN": -float(sum((q * (1 - q)) ** Decimal(gamma) for q in p[:largest] if 0 < q < 1)),
        }


def temperature(logits: Sequence[Sequence[float]], label: Sequence[int]) -> float:
    """Where the mean negative log likelihood of softmax(logits / T) is smallest: its derivative's sign, halved."""

    def rises(slope: float) -> bool:  # the derivative of log Σ exp(slope l) − slope l at the label
        total = 0.0
        for row, k in zip(logits, label, strict=True):
            masses = [math.exp(slope * (value - max(row))) for value in row]
            total += math.fsum(m * v for m, v in zip(masses, row, strict=True)) / math.fsum(masses) - row[k]
        return total > 0

    low, high = 1e-6, 1e6
    while high / low > 1 + 1e-14:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if rises(middle) else (middle, high)
    return 1 / low


# --- feature scores ---------------------------------------------------------------------------------------------------


def feature_score(
    method: str,
    features: Floats,  # (features,), of one image
    logits: Floats,  # (classes,)
    train: Floats,  # (images, features)
    train_logits: Floats,  # (images, classes)
    weight: Floats,  # (classes, features)
    bias: Floats,  # (classes,)
) -> float:
    """NCI, fDBD or ViM of one image, from their papers."""
    k = max(range(len(logits)), key=lambda j: logits[j])
    if method != "ViM":
        centred = [z - math.fsum(column) / len(train) for z, column in zip(features, train.T, strict=True)]
        length = math.sqrt(math.fsum(z * z for z in centred))
        if method == "NCI":
            return math.fsum(w * z for w, z in zip(weight[k], centred, strict=True)) / length
        others = [j for j in range(len(logits)) if j != k]
        distances = [(logits[k] - logits[j]) / math.dist(weight[k], weight[j]) for j in others]
        return math.fsum(distances) / len(others) / length
    origin = -np.linalg.pinv(weight) @ bias
    dimension = 1000 if len(features) > 1500 else 512 if len(features) >= 768 else len(features) // 2
    _, _, directions = np.linalg.svd(train - origin, full_matrices=True)  # the largest spread first
    null = directions[dimension:]
    lengths = [float(np.linalg.norm(null @ (row - origin))) for row in train]
    alpha = math.fsum(row.max() for row in train_logits) / math.fsum(lengths)
    top = max(logits)
    energy = top + math.log(math.fsum(math.exp(value - top) for value in logits))
    return energy - alpha * float(np.linalg.norm(null @ (features - origin)))
