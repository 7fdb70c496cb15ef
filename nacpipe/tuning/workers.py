"""Who computes: this process, or several beside it that share one index in memory.

The index of a search (sorted columns) is by far its largest possession. It is written once to an anonymous file, which
every process maps: the pages are in memory once, however many look at them, and they are gone with the last process
whatever way it ends. Workers get proposals and return outcomes through pipes; they never touch cache or study. One that
is killed is replaced and its trial given to the next.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nacpipe.errors import InputError, StudyError
from nacpipe.method.coverage import Source
from nacpipe.method.sorted_index import LayerIndex
from nacpipe.method.threads import set_threads
from nacpipe.scoring.trial_scorer import REMEMBER_BYTES, IndexOf, Scorer
from nacpipe.tuning.objective import Candidate, Evaluator, TrialResult

LIVES = 3  # workers that one trial may cost
PAGE = 4096
# A fresh interpreter that imports nothing of the caller's: `multiprocessing` would run the caller's script again.
_COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # Ctrl-C goes to the whole group: the parent's
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from nacpipe.tuning.workers import serve; serve()"
)

Answer = tuple[Candidate, TrialResult]


class Pool(Protocol):
    """Somewhere to send proposals."""

    @property
    def idle(self) -> int:
        """How many proposals it can take now."""

    @property
    def busy(self) -> int:
        """How many are being tried."""

    def submit(self, proposal: Candidate) -> None:
        """Take a proposal."""

    def collect(self) -> list[Answer]:
        """Return what is done, waiting for at least one."""

    def close(self) -> None:
        """End; what is being tried is dropped."""


class Here:
    """This process."""

    def __init__(self, evaluator: Evaluator) -> None:
        """Compute with this."""
        self._evaluator = evaluator
        self._waiting: list[Candidate] = []

    @property
    def idle(self) -> int:
        """One or none."""
        return 1 - len(self._waiting)

    @property
    def busy(self) -> int:
        """None or one."""
        return len(self._waiting)

    def submit(self, proposal: Candidate) -> None:
        """Take a proposal."""
        self._waiting.append(proposal)

    def collect(self) -> list[Answer]:
        """Try what was taken."""
        answers = [(proposal, self._evaluator.evaluate(proposal)) for proposal in self._waiting]
        self._waiting.clear()
        return answers

    def close(self) -> None:
        """Drop what was taken."""
        self._waiting.clear()


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an array lies in the shared file."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


class SharedIndexes:
    """Layer and source → their index, in an anonymous file that other processes map; made when first asked for."""

    def __init__(self, make: IndexOf) -> None:
        """Take what makes an index."""
        self._make = make
        self._file = tempfile.TemporaryFile(prefix="nacpipe-index-")  # noqa: SIM115  it lives as long as this
        weakref.finalize(self, self._file.close)
        self._made: dict[tuple[str, Source], LayerIndex] = {}
        self.places: dict[tuple[str, Source], LayerIndex] = {}
        """The indexes with a place where an array was."""

    def __call__(self, layer: str, source: Source) -> LayerIndex:
        key = layer, source
        if key not in self._made:
            made = self._make(layer, source)
            try:
                self.places[key] = _swap(made, np.ndarray, self._write)
                self._file.flush()
            except OSError as error:
                raise InputError(
                    f"the index that workers share does not fit into {tempfile.gettempdir()}: {error.strerror};"
                    " set TMPDIR to a larger folder, or leave out --workers"
                ) from error
            self._made[key] = map_index(self._file.fileno(), self.places[key])
        return self._made[key]

    @property
    def file(self) -> int:
        """The file's descriptor."""
        return self._file.fileno()

    def _write(self, array: np.ndarray[Any, Any]) -> _Place:
        offset = -(-self._file.tell() // PAGE) * PAGE
        self._file.seek(offset)
        self._file.write(array.data.cast("B"))
        return _Place(offset, array.shape, array.dtype.str)


def map_index(file: int, places: LayerIndex) -> LayerIndex:
    """Return an index that lies in a file, mapped, not read."""
    whole = mmap.mmap(file, 0, access=mmap.ACCESS_COPY)  # nobody writes, so the pages stay shared

    def array(place: _Place) -> np.ndarray[Any, Any]:
        return np.ndarray(place.shape, place.dtype, whole, place.offset)

    index: LayerIndex = _swap(places, _Place, array)
    return index


def _swap(record: Any, kind: type, by: Callable[[Any], Any]) -> Any:
    """A record of records with every value of this kind replaced."""
    if isinstance(record, kind):
        return by(record)
    if not is_dataclass(record) or isinstance(record, type):
        return record
    return replace(record, **{f.name: _swap(getattr(record, f.name), kind, by) for f in fields(record)})


@dataclass
class _Worker:
    """A process, our end of its pipe, and what it is trying."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    proposal: Candidate | None = None


class Workers:
    """Processes beside this one, each with a share of the cores."""

    def __init__(
        self, count: int, shared: SharedIndexes, rows: Mapping[str, slice], ood: str,
        threads: int | None = None, energy: NDArray[np.float64] | None = None,
    ) -> None:  # fmt: skip
        """Start `count` processes that try proposals on these indexes.

        Raises:
            InputError: not on this platform.
        """
        if sys.platform == "win32":
            raise InputError("--workers needs Linux or macOS; leave it out, one process uses all cores too")
        share = max(1, (threads or os.cpu_count() or 1) // count)
        self._shared = shared
        self._setup = (shared.places, dict(rows), ood, energy, share, REMEMBER_BYTES // count)
        self._lost: dict[int, int] = {}
        self._workers = [self._start() for _ in range(count)]

    @property
    def idle(self) -> int:
        """Workers at rest."""
        return sum(worker.proposal is None for worker in self._workers)

    @property
    def busy(self) -> int:
        """Workers at work."""
        return len(self._workers) - self.idle

    def submit(self, proposal: Candidate) -> None:
        """Give a proposal to a worker at rest."""
        number = next(i for i, worker in enumerate(self._workers) if worker.proposal is None)
        self._give(number, proposal)

    def collect(self) -> list[Answer]:
        """Return what is done, waiting for at least one.

        Raises:
            StudyError: a trial that kills its workers.
        """
        answers: list[Answer] = []
        while not answers and self.busy:
            ready = wait([worker.pipe for worker in self._workers if worker.proposal is not None])
            for number, worker in enumerate(self._workers):
                if worker.pipe in ready:
                    answers += self._hear(number)
        return answers

    def close(self) -> None:
        """End all workers, those at work at once."""
        for worker in self._workers:
            worker.pipe.close()  # a worker at rest ends by itself
            if worker.proposal is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.wait()

    def _start(self) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        files = (theirs.fileno(), self._shared.file)
        command = [sys.executable, "-c", _COMMAND, json.dumps(sys.path), *map(str, files)]
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(command, pass_fds=files, stdin=quiet, stdout=quiet)  # noqa: S603  our own
        theirs.close()
        ours.send(self._setup)
        return _Worker(process, ours)

    def _give(self, number: int, proposal: Candidate) -> None:
        worker = self._workers[number]
        worker.proposal = proposal
        try:
            worker.pipe.send(proposal)
        except OSError:  # it was killed while it was idle
            self._replace(number)

    def _hear(self, number: int) -> list[Answer]:
        worker = self._workers[number]
        assert worker.proposal is not None
        try:
            answer = worker.pipe.recv()
        except (EOFError, OSError):
            self._replace(number)
            return []
        if isinstance(answer, Exception):
            raise answer
        proposal, worker.proposal = worker.proposal, None
        return [(proposal, answer)]

    def _replace(self, number: int) -> None:
        """A new process for one that died, and its trial to it."""
        proposal = self._workers[number].proposal
        assert proposal is not None
        self._workers[number].pipe.close()
        code = self._workers[number].process.wait()
        self._lost[proposal.number] = self._lost.get(proposal.number, 0) + 1
        if self._lost[proposal.number] >= LIVES:
            raise StudyError(
                f"trial {proposal.number} ended {LIVES} workers (exit code {code}), memory may be short; fewer"
                " --workers, and the same command goes on"
            )
        self._workers[number] = self._start()
        self._give(number, proposal)


def serve() -> None:
    """A worker: its setup, then proposals in and outcomes out, until the pipe ends."""
    pipe, file = Connection(int(sys.argv[2])), int(sys.argv[3])
    try:
        places, rows, ood, energy, threads, remember = pipe.recv()
    except (EOFError, OSError):  # the parent ended
        return
    set_threads(threads)
    made = {key: map_index(file, arrays) for key, arrays in places.items()}
    evaluator = Evaluator(Scorer(lambda layer, source: made[layer, source], rows, remember), ood, energy)
    while True:
        try:
            proposal = pipe.recv()
            try:
                answer: TrialResult | Exception = evaluator.evaluate(proposal)
            except Exception as error:  # the parent raises it
                answer = error
            pipe.send(answer)
        except (EOFError, OSError):
            return
