"""Scores that are functions of the logits alone, in float64; larger = more like the training data.

With logits l, p = softmax(l) and p₁ ≥ p₂ ≥ … the same in descending order:

    MSP          p₁                                         Hendrycks & Gimpel, ICLR 2017
    MaxLogit     the largest l                              Hendrycks et al., ICML 2022
    Energy       log Σ exp(l)                               Liu et al., NeurIPS 2020
    Entropy      Σ p log p                                  the negative Shannon entropy
    GEN          −Σ (pₖ (1 − pₖ))^γ, k ≤ 100, γ = 0.1       Liu, Lochman & Zach, CVPR 2023
    Temperature  the largest of softmax(l / T)              Guo et al., ICML 2017; T is fitted, the others are not

An image of which the network is sure has p₁ = 1 in float64 up to rounding, and 1 − p₁ would be 0 or noise. Entropy and
GEN take 1 − p₁ as the sum of the other probabilities, which keeps all its digits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from nacpipe.errors import InputError

Logits = NDArray[np.floating]  # (samples, classes); −∞ is a class that is ruled out
Floats = NDArray[np.float64]

GEN_GAMMA, GEN_LARGEST = 0.1, 100  # the paper's, and OpenOOD's
PIECE = 2**20  # logits that are widened to float64 at once
SMALLEST_SLOPE = 2.0**-40  # 1 / T below which labels tell nothing


def msp(logits: Logits) -> Floats:
    """Maximum softmax probability, (samples,)."""
    return np.exp(max_logit(logits) - energy(logits))


def max_logit(logits: Logits) -> Floats:
    """The largest logit, (samples,)."""
    return np.asarray(logits.max(axis=1), dtype=np.float64)


def energy(logits: Logits) -> Floats:
    """log Σ exp(logits), the negative free energy at temperature 1, (samples,)."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    return np.asarray(top + np.log(np.exp(wide - top[:, None]).sum(axis=1)))


def entropy(logits: Logits) -> Floats:
    """The negative entropy of the softmax, (samples,).

    With differences d = l − max l and rest = Σ exp(d) over the other classes, −Σ p log p is
    log(1 + rest) − Σ exp(d) d / (1 + rest): two terms that are never negative, so nothing cancels.
    """
    differences, rest = _split_top(logits)
    masses = np.exp(differences)
    weighted = np.multiply(masses, differences, out=np.zeros_like(masses), where=masses > 0).sum(axis=1)
    return np.asarray(weighted / (1 + rest) - np.log1p(rest))


def gen(logits: Logits, *, gamma: float = GEN_GAMMA, largest: int = GEN_LARGEST) -> Floats:
    """The negative generalised entropy of the largest probabilities, (samples,).

    OpenOOD's formula, a sum. (pytorch-ood takes its mean and clamps probabilities to 10⁻⁷ … 1 − 10⁻⁷, which makes
    equals of the images of which the network is surest.)
    """
    differences, rest = _split_top(logits)
    log_total = np.log1p(rest)  # −log p₁
    others = min(largest, logits.shape[1]) - 1
    if 0 < others < differences.shape[1] - 1:
        differences = np.partition(differences, -others, axis=1)[:, -others:]
    log_p = differences - log_total[:, None]  # −∞ in place of p₁
    scores = np.exp(gamma * (log_p + np.log1p(-np.exp(log_p)))).sum(axis=1) if others else np.zeros(len(rest))
    with np.errstate(divide="ignore"):  # rest is 0 where all others are below float64
        return np.asarray(-scores - np.exp(gamma * (np.log(rest) - 2 * log_total)))


def tempered_msp(logits: Logits, temperature: float) -> Floats:
    """The largest of softmax(logits / temperature), (samples,)."""
    return msp(logits.astype(np.float64) / temperature)


PLAIN_SCORES: Mapping[str, Callable[[Logits], Floats]] = {
    "MSP": msp,
    "MaxLogit": max_logit,
    "Energy": energy,
    "Entropy": entropy,
    "GEN": gen,
}
"""The scores without a fit."""


def score_in_parts(name: str, logits: Logits) -> Floats:  # (samples, classes)
    """Return a score of `PLAIN_SCORES`, (samples,): of some samples at a time, for less memory."""
    parts = np.array_split(logits, 1 + logits.size // PIECE)
    return np.concatenate([PLAIN_SCORES[name](part) for part in parts])


def fit_temperature(
    logits: Logits,  # (samples, classes)
    label: NDArray[np.int64],  # (samples,)
) -> float:
    """Return the temperature that minimises the negative log likelihood of the labels, to 10⁻⁹ of itself.

    It is convex in the slope s = 1 / T, so its derivative mean(E[l] − l at the label) has one root. Newton's steps find
    it; where a step leaves the bracket, the bracket is halved.

    Raises:
        InputError: no temperature is the best: all labels have the largest logit (the smaller the temperature the
            better), or logits tell nothing of the labels (the larger the better).
    """
    at_label = logits[np.arange(len(label)), label].astype(np.float64) - logits.max(axis=1)
    if not np.isfinite(at_label).all():
        raise InputError(
            f"the labels of {int((~np.isfinite(at_label)).sum())} images have a logit of −inf: no temperature fits them"
        )
    if not (at_label < 0).any():
        raise InputError(
            "all images are classified correctly: the smaller the temperature the better, none is the best"
        )
    low, high, slope = 0.0, np.inf, 1.0
    while True:
        first, second = _derivatives(logits, at_label, slope)
        low, high = (slope, high) if first < 0 else (low, slope)
        if high < SMALLEST_SLOPE:
            raise InputError(
                "logits tell nothing of the labels: the larger the temperature the better, none is the best"
            )
        new = slope - first / second if second > 0 else np.inf
        if first == 0 or abs(new - slope) <= 1e-9 * slope:
            return float(1 / slope)
        slope = new if low < new < high else 2 * slope if high == np.inf else (low + high) / 2


def _derivatives(logits: Logits, at_label: Floats, slope: float) -> tuple[float, float]:
    """First and second derivative by the slope of the mean negative log likelihood: E[d] − d at the label, Var[d]."""
    first = second = 0.0
    step = max(1, PIECE // logits.shape[1])
    for start in range(0, len(logits), step):
        differences = logits[start : start + step].astype(np.float64)
        differences -= differences.max(axis=1, keepdims=True)
        masses = np.exp(slope * differences)
        probabilities = masses / masses.sum(axis=1, keepdims=True)
        differences[masses == 0] = 0.0  # 0 · −∞
        mean = (probabilities * differences).sum(axis=1)
        first += float((mean - at_label[start : start + step]).sum())
        second += float((probabilities * (differences - mean[:, None]) ** 2).sum())
    return first / len(logits), second / len(logits)


def _split_top(logits: Logits) -> tuple[Floats, Floats]:
    """Differences from the largest logit, −∞ in its own place, (samples, classes), and their Σ exp, (samples,)."""
    differences = logits.astype(np.float64)
    rows, top = np.arange(len(differences)), logits.argmax(axis=1)
    differences -= differences[rows, top][:, None]
    differences[rows, top] = -np.inf
    return differences, np.exp(differences).sum(axis=1)


LOGIT_BASELINES: Mapping[str, Callable[[Logits], Floats]] = {
    name: PLAIN_SCORES[name] for name in ("MSP", "MaxLogit", "Energy")
}
"""Those of every table."""
