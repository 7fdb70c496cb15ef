"""Which methods stand beside NAC in a table, and what any of them has to say for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nacpipe.errors import InputError
from nacpipe.method.plain_scores import PLAIN_SCORES, Floats, Logits

BLOCK_BYTES = 32 * 2**20  # of one array that is held at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodScores:
    """One method's scores of some splits: every split is among `scores` or among `reasons`."""

    scores: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """Split → (rows,), all finite."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Split → why it has no scores."""
    fitted_on: str = ""
    """The split that the method learns from; empty where it learns from none."""
    n_fitted: int = 0
    """Images of that split that it learned from; 0 also where it could not."""


LOGIT_BASELINES: Mapping[str, Callable[[Logits], Floats]] = {
    name: PLAIN_SCORES[name] for name in ("MSP", "MaxLogit", "Energy")
}
"""Those of every table."""

MORE_BASELINES = (  # fitted and scored by search/baselines.py
    *("Temperature", "Entropy", "GEN", "KL-Matching", "OpenMax", "Mahalanobis", "RMD", "KNN", "ViM", "SHE", "ReAct"),
    *("ASH", "SCALE", "DICE", "fDBD", "NCI", "NNGuide"),
)
OUT_OF_REACH = ("ODIN", "GradNorm", "Gram", "RankFeat")  # they run the network again, or need its feature maps

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


def choose_baselines(names: Iterable[str]) -> list[str]:
    """Return the baselines beyond the plain ones that are meant, as they are written; `all` is every one.

    Raises:
        InputError: a name is not known, or needs the network itself.
    """
    known = {name.lower(): name for name in MORE_BASELINES}
    chosen: dict[str, None] = {}
    for name in names:
        if name.lower() == "all":
            chosen.update(dict.fromkeys(MORE_BASELINES))
        elif name.lower() in known:
            chosen[known[name.lower()]] = None
        elif name.lower() in (other.lower() for other in OUT_OF_REACH):
            raise InputError(f"baseline {name} runs the network itself; a cache does not hold what it needs")
        elif name.lower() not in (other.lower() for other in LOGIT_BASELINES):
            raise InputError(
                f"baseline {name!r} is not known; known: all, {', '.join([*LOGIT_BASELINES, *MORE_BASELINES])}"
            )
    return list(chosen)


def row_slices(rows: int, *, width: int, block_rows: int) -> Iterator[slice]:
    """Cut rows into whole blocks of a cache, as many at a time as `BLOCK_BYTES` of float32 (rows, width) hold.

    A cache's chunk is then read once, and what is held does not grow with the number of rows.
    """
    step = block_rows * max(1, BLOCK_BYTES // (4 * width * block_rows))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
