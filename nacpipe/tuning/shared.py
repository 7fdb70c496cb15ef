"""A study that several machines share: the book of who tries what, on the database server itself.

The book lies in the study, as `claims`: worker → the numbers it is trying. It is read and written under a lock of the
server (locks.py), and every worker holds a lock of its own for as long as it lives. Both end with the connection, so a
worker that was killed is known to be dead at once, its numbers are free again, and a trial can neither be lost nor be
counted twice. (Optuna's heartbeats would need trials to run inside `optimize`, and a time-out to tell.)
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from nacpipe.tuning.desk import Desk, completed_trials
from nacpipe.tuning.locks import ServerLocks
from nacpipe.tuning.trials import number_of

CLAIMS = "claims"


class SharedDesk(Desk):
    """Hands out numbers among all machines that search the same study."""

    def __init__(self, study: optuna.Study, target: int, done: Iterable[int], url: str) -> None:
        """Connect, and show that this worker lives.

        Raises:
            StudyError: the server cannot be reached or has no such locks.
        """
        super().__init__(study, target, done)
        self._locks = ServerLocks(url, study.study_name)
        self._me = uuid.uuid4().hex
        self._locks.live(self._me)

    def claim(self) -> tuple[int | None, list[FrozenTrial]]:
        """Return a number that nobody who lives is trying, and what others completed since the last look."""
        with self._locks.book():
            news, claims = self._news(), self._claims()
            number = self._free({taken for numbers in claims.values() for taken in numbers})
            if number is not None:
                claims.setdefault(self._me, []).append(number)
                self.study.set_user_attr(CLAIMS, claims)
            return number, news

    def record(self, number: int, trial: FrozenTrial) -> bool:
        """Add a completed trial, unless its number was taken over."""
        with self._locks.book():
            if number not in self.study.user_attrs.get(CLAIMS, {}).get(self._me, []):
                return False  # the connection was lost, and somebody else has it now
            self.study.add_trial(trial)
        self.done.add(number)
        return True

    def close(self) -> None:
        """End the connection, and with it what is being tried."""
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
