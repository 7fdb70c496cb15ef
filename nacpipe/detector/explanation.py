"""Which terms and neurons made a sample's score low."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nacpipe.method.feature_scores import FEATURE_SCORES
from nacpipe.method.fitted_term import FittedTerm


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The parts of one sample's score."""

    score: float
    percentile: float
    """Percent of id/val's scores that are lower; NaN where they are not known."""
    terms: pd.DataFrame
    """term, weight (a share), score, part (weight × score; they add up to the score): in ascending order of score. The
    row of a feature score (NCI, fDBD, ViM) is of the last layer's input as a whole, in deviations from id/val's mean;
    below 0 it says OOD, and it has no neurons.
    """
    neurons: pd.DataFrame
    """term, neuron, value (activation, gradient or product; of components none), coverage in 0 … 1, missing: what the
    score would gain if the coverage were 1. In descending order of missing."""

    def _repr_html_(self) -> str:
        head = f"<p>score {self.score:.4f}, percentile {self.percentile:.1f}</p>"
        fused = [name for name in self.terms["term"] if name in FEATURE_SCORES]
        head += "".join(f"<p>{name}: in deviations from its mean over id/val</p>" for name in fused)
        return head + str(self.terms.to_html(index=False)) + str(self.neurons.to_html(index=False))


def explain_sample(
    *,
    score: float,
    percentile: float,
    names: Sequence[str],
    weights: NDArray[np.float64],  # (terms,), of sum 1
    term_scores: NDArray[np.float64],  # (terms,)
    entries: Sequence[tuple[FittedTerm, float, NDArray[np.float32], NDArray[np.float64]]],
    neurons: int,
) -> Explanation:
    """Return the explanation of one sample.

    Args:
        score: of the sample.
        percentile: of the score.
        names: of the terms; the fused score's is the last.
        weights: of the terms.
        term_scores: of the terms.
        entries: term, weight, values (neurons,) and coverage (counted,) of every term but a fused score.
        neurons: how many to list.
    """
    terms = pd.DataFrame({"term": list(names), "weight": weights, "score": term_scores, "part": weights * term_scores})
    frames = []
    for fitted, weight, values, covered in entries:
        frames.append(
            pd.DataFrame(
                {
                    "term": fitted.name,
                    "neuron": np.arange(covered.size),
                    "value": values if fitted.components is None else np.nan,
                    "coverage": covered,
                    "missing": weight * (1 - covered) / covered.size,
                }
            )
        )
    listed = pd.concat(frames, ignore_index=True).sort_values("missing", ascending=False, kind="stable")
    return Explanation(
        score=score,
        percentile=percentile,
        terms=terms.sort_values("score", kind="stable", ignore_index=True),
        neurons=listed.head(neurons).reset_index(drop=True),
    )
