"""Who tries which trial: numbers are handed out once, and every completed trial is recorded once.

Desk         one process has the study to itself (a journal or SQLite, held by a lock on a file)
SharedDesk   several machines share a study on a database server (shared.py)
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import optuna
from optuna.trial import FrozenTrial, TrialState

from nacpipe.tuning.trials import number_of


def completed_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the study's completed trials in our order; of a number that is there twice the first, others' left out."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    found: dict[int, FrozenTrial] = {}
    for trial in trials:
        if "number" in trial.user_attrs:
            found.setdefault(number_of(trial), trial)
    return [found[number] for number in sorted(found)]


class Desk:
    """Hands out the numbers below a target, for a process that has the study to itself."""

    def __init__(self, study: optuna.Study, target: int, done: Iterable[int]) -> None:
        """Hand out what is not among these, which are done already."""
        self.study = study
        self.target = target
        self.done = set(done)
        self._trying: set[int] = set()
        self._low = 0  # every number below is done

    @property
    def finished(self) -> bool:
        """True where every number below the target is done."""
        return self._free(()) is None

    def claim(self) -> tuple[int | None, list[FrozenTrial]]:
        """Return a number to try, None where there is none now, and the trials that others completed meanwhile."""
        number = self._free(self._trying)
        if number is not None:
            self._trying.add(number)
        return number, []

    def record(self, number: int, trial: FrozenTrial) -> bool:
        """Add a completed trial to the study; False where the number was somebody else's by now."""
        self.study.add_trial(trial)
        self._trying.discard(number)
        self.done.add(number)
        return True

    def close(self) -> None:
        """Give back what is being tried."""
        self._trying.clear()

    def _free(self, trying: Container[int]) -> int | None:
        while self._low in self.done:
            self._low += 1
        number = self._low
        while number in self.done or number in trying:
            number += 1
        return number if number < self.target else None
