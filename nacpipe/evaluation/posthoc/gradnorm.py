"""GradNorm: how large would the gradient of the last linear layer be, if the network were taught to be unsure?"""

from __future__ import annotations

import numpy as np

from nacpipe.evaluation.posthoc.detector import Samples, Score, Training, softmax
from nacpipe.method.plain_scores import Floats


def fit_gradnorm(_training: Training) -> Score:
    """GradNorm (Huang et al., NeurIPS 2021) as OpenOOD has it: ‖∂ Σ over classes of −log softmax(W z + b) / ∂W‖₁.

    The gradient is the outer product of (classes · p − 1) and z, so its norm is the product of theirs. It learns
    nothing.
    """

    def score(samples: Samples) -> Floats:
        p = softmax(samples.linear_logits.astype(np.float64))
        to_logits = np.abs(p.shape[1] * p - 1).sum(axis=1)
        return np.asarray(to_logits * np.abs(samples.features).sum(axis=1, dtype=np.float64))

    return score
