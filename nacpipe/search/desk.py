"""Who tries which trial: numbers are handed out once, and every completed trial is recorded once.

    Desk         one process has the study to itself (a journal or SQLite, held by a lock on a file)
    SharedDesk   several machines share a study on a database server

On a server the book lies in the study itself: `claims`, worker → the numbers it is trying. It is read and written under
a lock of the server (locks.py), and every worker holds a lock of its own for as long as it lives. Both end with the
connection, so a worker that was killed is known to be dead at once, its numbers are free again, and a trial can neither
be lost nor be counted twice. (Optuna's heartbeats would need trials to run inside `optimize`, and a time-out to tell.)
"""

from __future__ import annotations

import uuid
from collections.abc import Container
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from nacpipe.search.locks import ServerLocks
from nacpipe.search.trials import number_of

CLAIMS = "claims"


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

    def __init__(self, study: optuna.Study, target: int) -> None:
        """Look at what is done already."""
        self.study = study
        self.target = target
        self.done = {number_of(trial) for trial in completed_trials(study)}
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


class SharedDesk(Desk):
    """Hands out numbers among all machines that search the same study."""

    def __init__(self, study: optuna.Study, target: int, url: str) -> None:
        """Connect, and show that this worker lives.

        Raises:
            StudyError: the server cannot be reached or has no such locks.
        """
        super().__init__(study, target)
        self._locks = ServerLocks(url, study.study_name)
        self._me = uuid.uuid4().hex
        self._locks.live(self._me)

    def claim(self) -> tuple[int | None, list[FrozenTrial]]:
        with self._locks.book():
            news, claims = self._news(), self._claims()
            number = self._free({taken for numbers in claims.values() for taken in numbers})
            if number is not None:
                claims.setdefault(self._me, []).append(number)
                self.study.set_user_attr(CLAIMS, claims)
            return number, news

    def record(self, number: int, trial: FrozenTrial) -> bool:
        with self._locks.book():
            if number not in self.study.user_attrs.get(CLAIMS, {}).get(self._me, []):
                return False  # the connection was lost, and somebody else has it now
            self.study.add_trial(trial)
        self.done.add(number)
        return True

    def close(self) -> None:
        self._locks.close()

    def _news(self) -> list[FrozenTrial]:
        """What others completed since the last look."""
        found = [trial for trial in completed_trials(self.study) if number_of(trial) not in self.done]
        self.done.update(number_of(trial) for trial in found)
        return found

    def _claims(self) -> dict[str, list[int]]:
        """Worker → the numbers it is trying and has not completed, of the living."""
        claims: dict[str, Any] = self.study.user_attrs.get(CLAIMS, {})
        return {
            worker: open_numbers
            for worker, numbers in claims.items()
            if (open_numbers := [n for n in numbers if n not in self.done])
            and (worker == self._me or self._locks.lives(worker))
        }
