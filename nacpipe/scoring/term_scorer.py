"""Scores of single terms under ever new parameters, for a search that looks at one term after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nacpipe.cache import Cache
from nacpipe.errors import ParamsError
from nacpipe.method.counting import fill_ranked
from nacpipe.method.coverage import bin_edges, layer_score, product_borders
from nacpipe.method.params import LayerParams
from nacpipe.method.term import Term
from nacpipe.scoring.alpha_range import measure_alpha
from nacpipe.scoring.states import check_layers
from nacpipe.scoring.term_index import TermIndex, TermIndexer
from nacpipe.scoring.trial_scorer import split_rows


class TermScorer:
    """Each term's scores of some splits; a term's values are read and sorted when it is first asked for.

    An index takes about 7 bytes for each row and neuron of its layer, and making it 4 more. `drop` a term that is done,
    and ask for the views of a layer's source one after the other: they share what is read.
    """

    def __init__(self, cache: Cache, terms: Sequence[Term], splits: Sequence[str]) -> None:
        """Score these terms, counted on id/train, of these splits.

        Raises:
            ParamsError: a layer is not in the cache.
        """
        check_layers(cache, [term.layer for term in terms])
        self.terms = tuple(terms)
        self.rows = split_rows(cache, splits)
        """Split → its samples' places in a vector of scores."""
        self._indexer = TermIndexer(cache, splits)
        self._indexes: dict[Term, TermIndex] = {}
        self._alphas: dict[Term, tuple[float, float]] = {}

    def score(self, term: Term, params: LayerParams) -> NDArray[np.float64]:
        """Return the term's scores of all splits, (samples,), as `rows` has them; the weight plays no part.

        Raises:
            ParamsError: the term is none of `terms`, or the parameters are of another source.
            ValuesError: a state is not finite, or the term has no components.
        """
        if params.source != term.source:
            raise ParamsError(f"term {term.name!r} cannot have parameters for the {params.source}")
        index = self._index(term)
        borders = product_borders(bin_edges(params.bins, params.edges), params.alpha)
        (entry_sum,) = fill_ranked([(index, borders, params.saturation)])
        return layer_score(entry_sum, index.neurons, params.saturation)

    def alpha_range(self, term: Term) -> tuple[float, float]:
        """Return the least and the greatest alpha at which the term's training states differ; kept after `drop`.

        Raises:
            ParamsError: the term is none of `terms`.
            ValuesError: all values are 0.
        """
        if term not in self._alphas:
            self._alphas[term] = measure_alpha(term.name, term.source, self._index(term))
        return self._alphas[term]

    def drop(self, term: Term) -> None:
        """Free a term's index; it is made anew when the term is asked for again."""
        self._indexes.pop(term, None)

    def _index(self, term: Term) -> TermIndex:
        if term not in self.terms:
            raise ParamsError(f"term {term.name!r} is not scored here; terms: {', '.join(map(str, self.terms))}")
        if term not in self._indexes:
            self._indexes[term] = self._indexer.index(term)
        return self._indexes[term]
