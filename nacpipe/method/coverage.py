"""Neuron activation coverage: states, bin edges, counts, tables and scores (Liu et al., ICLR 2024, section 3).

For one neuron i and one sample x:

    state     ẑ = sigmoid(alpha · z · ∂D_KL(u ‖ p)/∂z)            "neuron activation state", section 3.1
    counts    κ(ẑ) = training samples in the bin that holds ẑ     the histogram
    table     Φ(ẑ) = min(κ(ẑ) / saturation, 1)                    the coverage function
    score     S(x) = Σ_layers weight · mean_i Φ_i(ẑ_i(x))         NAC-UE, section 3.2; larger = more like training data

How it is computed here. The sigmoid is monotonic, so a bin of states is an interval of *products* x = z · ∂D_KL/∂z:

    state   0 ────┬───────┬──────┬──────┬───── 1        sigmoid(alpha · x) ≥ e   ⟺   x ≥ logit(e) / alpha
                 e1      e2     e3     e4
    product −∞ ──┬───────┬──────┬──────┬───── +∞        edges ≤ 0 become −∞, edges ≥ 1 become +∞
                 b1      b2     b3     b4

Columns of products are sorted once; a trial then only needs where its borders fall in them. And because a table entry
is min(count, saturation) / saturation, the sum over neurons is a sum of *integers*, divided once: a score does not
depend on the order of summation, the number of threads or the batch size.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nacpipe.errors import ParamsError
from nacpipe.method.term import Source

Edges = Literal["log", "linear"]
PIECE = 2**20  # logits that are widened to float64 at once
LOG_BASE = 1000.0  # b of design §3; the authors' `logspace(1e3, M)`


@lru_cache(4096)
def bin_edges(bins: int, kind: Edges = "log") -> NDArray[np.float64]:
    """Return the edges of M − 1 bins, (bins,) ascending float64; state s is in bin k when edges[k] ≤ s < edges[k+1].

    Made once for every M, and not to be written to.

    `log` is fine near ½, where small products crowd, and coarse near 0 and 1; symmetric about ½, itself an edge:

        bins=10   0  .312 .404 .460  .5 .540 .596 .688 1.01  1.2   u = linspace(1, √b, h), l = log_b(u), r = 1 − l back
                  └─ l without last ─┘  └ r, last + 0.01 ┘

    For odd M, which the authors' code cannot do, the lower half gets the extra edge: l has one point more than r, ½
    stays an edge, and the zero products of a ReLU keep falling into the first bin of the upper half
    (docs/decisions/odd-bins.md).

    `linear` is linspace(0, 1, M) with the last edge above 1, so that the state 1 has a bin (the authors' loses it).

    Raises:
        ParamsError: fewer than 4 bins or an unknown kind.
    """
    if bins < 4:
        raise ParamsError(f"bins is {bins}; at least 4 edges are needed")
    if kind == "linear":
        edges = np.linspace(0.0, 1.0, bins)
        edges[-1] = np.nextafter(1.0, 2.0)
    elif kind == "log":
        lower = _log_half((bins + 1) // 2)  # = h for even M
        upper = (1.0 - _log_half(bins // 2))[::-1]
        upper[-1] += 0.01
        edges = np.concatenate([lower[:-1], upper, [1.2]])
    else:
        raise ParamsError(f"edges is {kind!r}; known: log, linear")
    edges.flags.writeable = False
    return edges


def _log_half(points: int) -> NDArray[np.float64]:
    """log_b of `points` numbers evenly spaced in [1, √b]: 0 … ½."""
    u = np.linspace(1.0, np.sqrt(LOG_BASE), points)
    return np.asarray(np.log(u) / np.log(LOG_BASE), dtype=np.float64)


def product_borders(edges: NDArray[np.float64], alpha: float) -> NDArray[np.float32]:
    """Return the borders (bins,) of the product: sigmoid(alpha · x) ≥ edges[k] ⟺ x ≥ borders[k], for float32 x.

    logit(e) / alpha is computed in float64 and then rounded *up* to the next float32: x ≥ b holds for a float32 x
    exactly when it holds for the smallest float32 that is ≥ b, so nothing is lost and comparisons run in float32.
    """
    if not (np.isfinite(alpha) and alpha > 0):
        raise ParamsError(f"alpha is {alpha}; it must be a positive finite number")
    inner = (edges > 0.0) & (edges < 1.0)
    e = edges[inner]
    borders = np.where(edges <= 0.0, -np.inf, np.inf)
    with np.errstate(over="ignore"):
        borders[inner] = (np.log(e) - np.log1p(-e)) / alpha
        borders[edges == 0.5] = 0.0  # logit(½), exactly
        rounded = borders.astype(np.float32)
    return np.where(rounded < borders, np.nextafter(rounded, np.float32(np.inf)), rounded)


def select_source(
    activation: NDArray[np.float32],  # (samples, neurons)
    gradient: NDArray[np.float32],  # (samples, neurons)
    source: Source = "product",
) -> NDArray[np.float32]:
    """Return what goes under the sigmoid, (samples, neurons): z · ∂D_KL/∂z by default, in float32 as the authors do."""
    if source == "product":
        return activation * gradient
    if source not in ("activation", "gradient"):
        raise ParamsError(f"source is {source!r}; known: product, activation, gradient")
    return activation if source == "activation" else gradient


def logits_gradient(logits: NDArray[np.float32]) -> NDArray[np.float32]:  # (samples, classes)
    """Return ∂D_KL(u ‖ p)/∂logits = softmax(logits) − 1/classes, (samples, classes): the logits as a layer."""
    gradient = np.empty(logits.shape, np.float32)
    parts = 1 + logits.size // PIECE
    for part, rows in zip(np.array_split(logits, parts), np.array_split(gradient, parts), strict=True):
        wide = part.astype(np.float64)
        exp = np.exp(wide - wide.max(axis=1, keepdims=True))
        rows[:] = exp / exp.sum(axis=1, keepdims=True) - 1.0 / logits.shape[1]
    return gradient


def coverage_table(
    counts: NDArray[np.int32],  # (neurons, bins - 1)
    saturation: int,
) -> NDArray[np.float64]:
    """Return Φ = min(counts / saturation, 1), (neurons, bins − 1)."""
    return np.minimum(counts, saturation) / saturation


def covered_area(
    counts: NDArray[np.int32],  # (neurons, bins - 1)
    saturation: int,
) -> float:
    """Return NAC-ME's covered area, mean_i Σ_k min(κ_ik / r, 1) / M.

    The sum over M − 1 bins is divided by M, the number of edges, as the authors do: full coverage is (M − 1) / M.
    """
    neurons, bins = counts.shape[0], counts.shape[1] + 1
    entry_sum = int(np.minimum(counts, saturation).sum(dtype=np.int64))
    return entry_sum / float(saturation * neurons * bins)


def layer_score(
    entry_sum: NDArray[np.int64]
    | NDArray[np.uint32],  # (samples,): Σ over neurons of min(count, saturation) at the sample's bins
    neurons: int,
    saturation: int,
) -> NDArray[np.float64]:
    """Return the mean over neurons of the table at each sample's bins: Σ_i min(κ_i, r) / (r · neurons)."""
    return entry_sum / float(neurons * saturation)


def combine_layers(
    layer_scores: NDArray[np.float64],  # (layers, samples)
    weights: NDArray[np.float64],  # (layers,), any positive sum
) -> NDArray[np.float64]:
    """Return S = Σ_layers weight · layer score, weights normalised to sum 1, (samples,)."""
    total = float(weights.sum())
    if not (np.isfinite(total) and total > 0 and bool((weights >= 0).all())):
        raise ParamsError(f"weights are {weights.tolist()}; they must be ≥ 0, finite and not all 0")
    scores = np.zeros(layer_scores.shape[1])
    for share, layer in zip(weights / total, layer_scores, strict=True):
        scores += share * layer  # not a matrix product: BLAS rounds a sample by its place among the others
    return scores
