"""What to try next, term by term: every term's parameters for itself, then all terms together.

    term NAME   per term, alone: SPREAD points over its ranges, REFINE steps around the best of them; in later passes
                AGAIN steps around the best so far
    all terms   the best of every term, with weights in closed form; after every pass

Terms add up in the score and their weights come in closed form, so dozens of terms are searched in three dimensions
each, and the number of trials grows with the terms and not with their combinations. A term is judged by its own
correlation with the objective's target: what is chosen by the AUROC of all terms together holds less well on other data
(docs/decisions/default-search.md).

The rule is a function of the seed and of the completed trials, as layerwise.py's.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np

from nacpipe.method.params import LayerParams, NacParams
from nacpipe.tuning.layerwise import Candidate, Key
from nacpipe.tuning.space import Space
from nacpipe.tuning.trials import lone_term

SPREAD, REFINE, AGAIN = 36, 24, 24
STEP, SHRINK = 0.25, 0.93  # of a unit range, and from one refining step to the next
MOVED = 0.7  # share of the coordinates that a step moves


@dataclass
class TermwiseRule:
    """What `TermwiseSampler` (samplers.py) samples by: it learns from completed trials and proposes the next."""

    space: Space
    seed: int
    _best: dict[str, tuple[Key, int, LayerParams]] = field(default_factory=dict)
    """Term → its best trial's key, minus its position, and parameters."""

    @property
    def first_pass(self) -> int:
        """Positions of the first pass, all terms together included."""
        return len(self.space) * (SPREAD + REFINE) + 1

    def place(self, position: int) -> tuple[str, int]:
        """Return the term and the step of a position; an empty name stands for all terms together."""
        names = list(self.space)
        if position < self.first_pass:
            term, step = divmod(position, SPREAD + REFINE)
            return (names[term], step) if term < len(names) else ("", 0)
        length = len(names) * AGAIN + 1
        turn, position = divmod(position - self.first_pass, length)
        term, step = divmod(position, AGAIN)
        return (names[term], SPREAD + REFINE + turn * AGAIN + step) if term < len(names) else ("", turn + 1)

    def propose(self, position: int) -> Candidate:
        """Return what to try at a position."""
        name, step = self.place(position)
        if not name:
            return Candidate(position=position, phase="all terms", params=self.together(), fit=True)
        params = NacParams(layers={name: self._look_for(name, step)})
        return Candidate(position=position, phase=f"term {name}", params=params)

    def learn(self, position: int | None, params: NacParams, key: Key) -> None:
        """Learn from a completed trial of one term."""
        name = lone_term({term: layer.weight for term, layer in params.layers.items()})
        entry = (key, -(position or 0))  # of equals the first
        if name is not None and name in self.space and (name not in self._best or entry > self._best[name][:2]):
            self._best[name] = (*entry, params.layers[name])

    def together(self) -> NacParams:
        """Return the best of every term that was tried; where none was, the middle of all ranges."""
        layers = {name: self._best[name][2] for name in self.space if name in self._best}
        middle = {name: space.params(np.full(len(space.free), 0.5)) for name, space in self.space.items()}
        return NacParams(layers=layers or middle)

    def _look_for(self, name: str, step: int) -> LayerParams:
        space = self.space[name]
        free, stream = len(space.free), zlib.crc32(name.encode())
        random = np.random.default_rng([self.seed, stream, step])
        if step < SPREAD or name not in self._best:
            # A Latin hypercube: every part of every range is visited once.
            order = np.random.default_rng([self.seed, stream]).permuted(np.tile(np.arange(SPREAD), (free, 1)), axis=1)
            return space.params((order[:, step % SPREAD] + random.random(free)) / SPREAD)
        size = STEP * SHRINK ** ((step - SPREAD) % (REFINE + AGAIN))
        moves = random.normal(0.0, size, free) * (random.random(free) < MOVED)
        return space.params(np.clip(space.unit(self._best[name][2]) + moves, 0.0, 1.0))
