"""Post-hoc detectors that read logits alone."""

from __future__ import annotations

import numpy as np

from nacpipe.evaluation.posthoc.detector import Samples, Score, Training, class_means, softmax
from nacpipe.method.plain_scores import Floats, entropy, fit_temperature, gen, tempered_msp


def fit_entropy(_training: Training) -> Score:
    """Entropy (plain_scores.py); it learns nothing."""
    return lambda samples: entropy(samples.logits)


def fit_gen(_training: Training) -> Score:
    """GEN (plain_scores.py); it learns nothing."""
    return lambda samples: gen(samples.logits)


def fit_tempered_msp(training: Training) -> Score:
    """Temperature (plain_scores.py)."""
    temperature = fit_temperature(training.samples.logits, training.label)
    return lambda samples: tempered_msp(samples.logits, temperature)


def fit_kl_matching(training: Training) -> Score:
    """KL-Matching (Hendrycks et al., ICML 2022): −min over k of KL(p ‖ mean p of the images predicted as k).

    Classes that no image is predicted as have no mean and are left out.
    """
    probabilities = softmax(training.samples.logits.astype(np.float64))
    predicted = probabilities.argmax(axis=1)
    seen, place = np.unique(predicted, return_inverse=True)
    means = class_means(probabilities, place, len(seen))
    log_means = np.log(np.maximum(means, np.finfo(np.float64).tiny))  # 0 · log 0 = 0

    def score(samples: Samples) -> Floats:
        p = softmax(samples.logits.astype(np.float64))
        p_log_p = p * np.log(np.maximum(p, np.finfo(np.float64).tiny))
        return np.asarray(-(p_log_p.sum(axis=1)[:, None] - p @ log_means.T).min(axis=1))

    return score
