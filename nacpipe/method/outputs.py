"""What a network's outputs are, where they are not logits."""

from __future__ import annotations

import numpy as np

from nacpipe.method.plain_scores import Logits

OUTPUTS = ("logits", "features", "probabilities", "log-probabilities")  # what a network can give


NO_LOGITS = "what this network gives are features, not logits"


OF_PROBABILITIES = ("MSP",)  # plain baselines that are functions of the probabilities alone


def why_no_logits(outputs: str) -> str:
    """Return why what needs logits is empty, for a network that gives one of `OUTPUTS` other than logits."""
    return NO_LOGITS.replace("features", outputs)


def as_logits(values: Logits, outputs: str) -> Logits:
    """Return logits up to a constant in each row: logits and log-probabilities as they are, the log of probabilities.

    Enough for functions of softmax, which do not change when a constant is added to a row: MSP, entropy, …
    """
    if outputs != "probabilities":
        return values
    return np.log(np.maximum(values.astype(np.float64), np.finfo(np.float64).tiny))
