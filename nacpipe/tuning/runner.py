"""Running a search by `study.optimize`, until there are enough trials.

in a file       the study runs in memory; a callback appends every finished trial, whole, to the study in the file
on a server     the study is the server's, which all machines share: Optuna's heartbeat finds the trials of a machine
                that is gone, and another repeats them (storage.py)
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import numpy as np
import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.study import MaxTrialsCallback
from optuna.trial import FrozenTrial, TrialState

from nacpipe.errors import StudyError
from nacpipe.tuning.request import SearchResult
from nacpipe.tuning.samplers import GridSampler
from nacpipe.tuning.storage import cause, is_server, sync_study
from nacpipe.tuning.study import Search, session_seconds
from nacpipe.tuning.trials import NewTrials, trial_metrics

Progress = Callable[[int, float], None]
"""Completed trials, the best value."""


def run(search: Search, progress: Progress = lambda done, best: None) -> SearchResult:
    """Go on until the study has the trials asked for, or time or patience is up; Ctrl-C ends it too.

    Raises:
        StudyError: the storage went away.
    """
    with _stopping() as signals, _silent_heartbeat():
        session = _Session(search, progress, signals)
        try:
            ended = session.run()
        except KeyboardInterrupt:
            ended = "interrupted"
        except (StorageInternalError, UnboundLocalError) as error:
            # Optuna's `_run_trial` names a variable that it has not set where a trial cannot be read back.
            reason = error if isinstance(error, StorageInternalError) else error.__context__
            if not isinstance(reason, StorageInternalError):
                raise
            raise StudyError(
                f"the study's storage went away: {cause(reason)}; go on with: {search.command()}"
            ) from error
        finally:
            sync_study(search.request.where)
    if ended == "interrupted" and not session.best:
        raise KeyboardInterrupt  # there is nothing to report
    if ended != "interrupted":
        search.cross_validate()
    return search.result(ended)


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """A list that Ctrl-C and SIGTERM write to: the trial is finished first; a second one breaks it off.

    An exception out of nowhere would be lost where Python happens to run a destructor.
    """
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        signals.append(number)
        if len(signals) > 1:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by no Python code


@contextmanager
def _silent_heartbeat() -> Iterator[None]:
    """Let the thread of Optuna's heartbeat print nothing when a server goes away: the trial itself fails too."""
    previous = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not issubclass(args.exc_type, StorageInternalError):
            previous(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = previous


class _Session:
    """One command's part in a study."""

    def __init__(self, search: Search, progress: Progress, signals: Sequence[int]) -> None:
        assert search.study is not None
        self._search, self._progress, self._signals = search, progress, signals
        self._stored = search.study
        trials = search.study.get_trials(deepcopy=False)
        finished = sum(trial.state.is_finished() for trial in trials)
        if is_server(search.request.where):  # commands that begin at once must not draw the same
            finished = int(np.random.SeedSequence().generate_state(1)[0])
        self._sampler = search.make_sampler(finished)
        self._started, self._before = time.monotonic(), session_seconds(search.completed())
        self._trials = NewTrials()
        self.best: tuple[float, ...] = ()
        self._value, self._stale = 0.0, 0
        self._tried = False
        if is_server(search.request.where):
            self._study = search.study
            self._study.sampler = self._sampler
        else:
            self._study = optuna.create_study(
                study_name=search.study.study_name,
                directions=search.study.directions,
                sampler=self._sampler,
            )
            self._study.add_trials([trial for trial in trials if trial.state.is_finished()])
        self._learn()

    def run(self) -> str:
        """Return why it ended."""
        if ended := self._why():
            return ended
        timeout = self._search.request.timeout
        if timeout is not None:
            timeout = max(timeout - (time.monotonic() - self._started), 0.0)
        callbacks: list[Callable[[optuna.Study, FrozenTrial], None]] = [self._finish]
        if self._study is self._stored and not isinstance(self._sampler, GridSampler):
            callbacks.append(MaxTrialsCallback(self._search.trials, states=(TrialState.COMPLETE,)))
        while True:
            try:
                self._study.optimize(self._try, timeout=timeout, callbacks=callbacks)
                return self._why() or "timeout"
            except (ValueError, AssertionError):  # Optuna's, of a trial that another machine has ended
                if self._study is not self._stored or not self._tried:
                    raise
                self._learn()
                if ended := self._why():
                    return ended

    def _try(self, trial: optuna.Trial) -> float | tuple[float, ...]:
        """Score a trial; nothing comes of it where this machine was silent so long that another repeats it."""
        self._tried = False
        try:
            value = self._search.objective(trial)
            trial.set_user_attr("seconds", self._before + time.monotonic() - self._started)
        except UpdateFinishedTrialError:
            self._tried = True
            raise
        self._tried = True
        return value

    def _finish(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Keep a finished trial, and stop where it was the last."""
        self._tried = False
        if self._study is not self._stored:
            self._stored.add_trial(trial)
        self._learn()
        self._progress(len(self._trials), self._value)
        if self._why():
            study.stop()

    def _learn(self) -> None:
        """See how many trials are complete, the best, and since when there is none better."""
        objective, opening = self._search.request.aim, getattr(self._sampler, "opening", 0)
        for trial in self._trials.read(self._study):
            metrics = trial_metrics(trial)
            key = metrics.objective_key(objective)
            better = key > self.best
            if better:
                self.best, self._value = key, metrics.values(objective)[0]
            early = trial.user_attrs.get("position", trial.number) < opening
            self._stale = 0 if better or early else self._stale + 1

    def _why(self) -> str:
        """Return why it should end now; empty where it should not."""
        request = self._search.request
        if self._signals:
            return "interrupted"
        if self._is_complete():
            return "trials"
        if request.timeout is not None and time.monotonic() - self._started >= request.timeout:
            return "timeout"
        return "patience" if request.patience is not None and self._stale >= request.patience else ""

    def _is_complete(self) -> bool:
        """Return whether the study has the trials asked for; of a grid, so many combinations."""
        if len(self._trials) < self._search.trials:
            return False
        if isinstance(self._sampler, GridSampler):  # on a server two machines may have tried the same
            return len(self._sampler.complete(self._study)) >= self._search.trials
        return True
