"""Running a study: proposals go out, outcomes come in, until there are enough.

while numbers are free and someone is idle:  desk.claim → asker.ask → pool.submit
whoever is done:                             pool.collect → desk.record → asker.tell
"""

from __future__ import annotations

import datetime
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial

from nacpipe.errors import StudyError
from nacpipe.tuning.desk import Desk
from nacpipe.tuning.objective import Candidate, TrialResult
from nacpipe.tuning.request import SearchResult
from nacpipe.tuning.storage import cause, is_server
from nacpipe.tuning.study import Search, session_seconds
from nacpipe.tuning.trials import distributions, number_of, to_trial, trial_checks, trial_params
from nacpipe.tuning.workers import Here, Pool, Workers

POLL = 0.2  # seconds between looks at what other machines still try

Progress = Callable[[int, float], None]
"""Completed trials, the best value."""


def run(search: Search, progress: Progress = lambda done, best: None) -> SearchResult:
    """Go on until the study has the trials asked for, or time or patience is up; Ctrl-C ends it too.

    Raises:
        StudyError: the storage went away, or a trial kills its workers.
    """
    with _stopping() as stopped:
        sweep = _Sweep(search, progress, stopped)
        ended = _run(sweep, search)
    return search.result(ended)


def _run(sweep: _Sweep, search: Search) -> str:
    try:
        ended = sweep.run()
    except KeyboardInterrupt:
        ended = "interrupted"
    except StorageInternalError as error:
        raise StudyError(f"the study's storage went away: {cause(error)}; go on with: {search.command()}") from error
    finally:
        sweep.close()
    if ended == "interrupted":
        if not sweep.best:
            raise KeyboardInterrupt  # there is nothing to report
        search.reopen()
    return ended


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """A list that Ctrl-C and SIGTERM write to: the trial is finished first; a second one breaks it off.

    An exception out of nowhere would be lost where Python happens to run a destructor.
    """
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        stopped.append(number)
        if len(stopped) > 1:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by no Python code


class _Sweep:
    """What a run holds while it runs."""

    def __init__(self, search: Search, progress: Progress, stopped: Sequence[int]) -> None:
        assert search.study is not None
        request = search.request
        self._search, self._progress, self._objective = search, progress, request.objective
        self._stopped = stopped
        self._record = distributions(search.space, search.published)
        self._asker = search.make_asker()
        self.best: tuple[float, ...] = ()
        self._value, self._stale, self._learnt = 0.0, 0, 0
        self._started = time.monotonic()
        trials = search.completed()
        self._before = session_seconds(trials)
        self._learn(trials)
        done = [number_of(trial) for trial in trials]
        self._desk: Desk = Desk(search.study, search.trials, done)
        if is_server(request.where):
            from nacpipe.tuning.shared import SharedDesk  # brings SQLAlchemy

            self._desk = SharedDesk(search.study, search.trials, done, request.where)
        self._pool: Pool = Here(search.evaluator)
        if search.shared is not None and not self._desk.finished:
            for name, layer in search.space.items():
                for source in layer.source.values:
                    search.shared(name, source)
            rows = search.scorer.rows
            self._pool = Workers(request.workers, search.shared, rows, request.val, request.threads, search.energy)
        self._begun: dict[int, datetime.datetime] = {}

    def run(self) -> str:
        """Return why it ended."""
        while True:
            ended = self._up()
            while not ended and self._pool.idle:
                number, news = self._desk.claim()
                self._hear(news)
                if number is None:
                    break
                self._begun[number] = datetime.datetime.now()
                self._pool.submit(self._asker.ask(number))
            if self._pool.busy:
                for proposal, outcome in self._pool.collect():
                    self._note(proposal, outcome)
            elif ended or self._desk.finished:
                return ended or "trials"
            else:
                time.sleep(POLL)  # the last trials are being tried elsewhere

    def close(self) -> None:
        """Give back what is being tried."""
        self._pool.close()
        self._desk.close()

    def _up(self) -> str:
        """Why it should end now; empty where it should not."""
        request = self._search.request
        if self._stopped:
            return "interrupted"
        if request.timeout is not None and time.monotonic() - self._started >= request.timeout:
            return "timeout"
        return "patience" if request.patience is not None and self._stale >= request.patience else ""

    def _note(self, proposal: Candidate, outcome: TrialResult) -> None:
        trial = to_trial(
            proposal,
            outcome,
            self._begun.pop(proposal.number),
            seconds=self._before + time.monotonic() - self._started,
            objective=self._objective,
            space=self._search.space,
            record=self._record,
        )
        if self._desk.record(proposal.number, trial):
            self._hear([trial])

    def _hear(self, trials: list[FrozenTrial]) -> None:
        for trial in trials:
            self._learn([trial])
            self._progress(self._learnt, self._value)

    def _learn(self, trials: list[FrozenTrial]) -> None:
        """Tell the asker, and see whether it got better."""
        for trial in trials:
            number, checks = number_of(trial), trial_checks(trial)
            self._asker.tell(number, trial_params(trial, self._search.space), checks)
            objective_key = checks.objective_key(self._objective)
            better = objective_key > self.best
            if better:
                self.best, self._value = objective_key, checks.values(self._objective)[0]
            self._stale = 0 if better or number < self._asker.opening else self._stale + 1
            self._learnt += 1
