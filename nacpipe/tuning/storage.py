"""Where a study is kept: a journal file by default, any RDB by URL.

A journal is lines of JSON, appended under a lock. Two things that Optuna's own file lock does not survive are mended
here: a process killed while it holds the lock (the kernel drops a flock with its process; nobody waits 30 s), and a
last line torn by a full disk or a power cut (the next append would glue to it and make the study unreadable for ever;
here the torn tail is cut off under the lock before anything is appended).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from nacpipe.errors import MissingExtra, NacError, StudyError
from nacpipe.files import NEW_FILE, lock_file, lock_handle
from nacpipe.tuning.request import without_password

HEARTBEAT = 15  # seconds between a server study's signs of life; a trial without one for twice as long is repeated
RETRIES = 3  # times that a trial is repeated
ATTEMPTS = 5  # to make a new database's tables, where others do it in the same moment

SYNC = 0.25  # seconds between two waits of a journal for the disk
UNSYNCED = 1 << 22  # bytes; more than is appended in that time

JOURNAL = b'{"op_code":'  # how Optuna's first line begins


class TailMendingLock:
    """An exclusive flock on the journal itself; taking it cuts off a torn last line."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._held: list[int] = []

    def acquire(self) -> bool:
        """Wait for the lock."""
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, NEW_FILE)
        try:
            lock_handle(handle)
            _check_journal(handle, self._path)
            _cut_torn_tail(handle)
        except BaseException:
            os.close(handle)
            raise
        self._held.append(handle)
        return True

    def release(self) -> None:
        """Give the lock back."""
        os.close(self._held.pop())

    def mend(self) -> None:
        """Cut off what a power cut left of the last lines: a torn one, and all from a piece that was never written."""
        self.acquire()
        try:
            handle = self._held[-1]
            start = max(0, os.fstat(handle).st_size - UNSYNCED)
            tail = os.pread(handle, UNSYNCED, start)
            if (hole := tail.find(b"\0")) >= 0:
                os.ftruncate(handle, start + tail.rfind(b"\n", 0, hole) + 1)
        finally:
            self.release()


class Journal(JournalFileBackend):
    """Optuna's journal, which waits for the disk (fsync) at most every SYNC seconds.

    Every line is with the system before `append_logs` returns: a process that is killed loses none. A power cut can
    lose those of the last SYNC seconds; `sync_study` waits for them.
    """

    def __init__(self, path: str, lock_obj: Any) -> None:
        """Keep a study in a file."""
        super().__init__(path, lock_obj=lock_obj)
        self._lock_of_file, self._synced = lock_obj, float("-inf")

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append lines; where the system refuses one (a full disk), its error names the file."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        try:
            self._lock_of_file.acquire()
            try:
                with open(self._file_path, "ab") as file:
                    file.write(lines.encode())
                    file.flush()
                    if time.monotonic() - self._synced >= SYNC:
                        os.fsync(file.fileno())
                        self._synced = time.monotonic()
            finally:
                self._lock_of_file.release()
        except OSError as error:
            error.filename = error.filename or self._file_path
            raise


def sync_study(where: str) -> None:
    """Wait until a journal is on the disk; databases wait by themselves."""
    if not backend(where) and Path(where).exists():
        with open(where, "ab") as file:  # Windows forces no file that is open for reading alone
            os.fsync(file.fileno())


def _check_journal(handle: int, path: str) -> None:
    """Refuse a file that is something else before a byte of it is cut or added."""
    head = os.pread(handle, len(JOURNAL), 0)
    if not JOURNAL.startswith(head):
        raise StudyError(
            f"{path} is not a study's journal; name another --storage FILE (a database is"
            f" {shlex.quote(f'sqlite:///{path}')})"
        )


@contextmanager
def only_runner(where: str, study: str) -> Iterator[None]:
    """Hold a study in a file for this process: two searches would try the same trials.

    Taken before the study is made. On a database server the trials are shared out instead.

    Raises:
        StudyError: another process searches it now.
    """
    with ExitStack() as held:
        try:
            held.enter_context(_file_lock(where, f".{study.replace('/', '-')}.running", wait=False))
        except BlockingIOError:
            where = without_password(where)
            raise StudyError(f"study {study} in {where} is being searched by another process; wait for it") from None
        yield


@contextmanager
def _file_lock(where: str, suffix: str, *, wait: bool) -> Iterator[None]:
    """Hold a lock beside the file that a study is kept in; the kernel drops that of a process that was killed.

    Where there is no such file, or no folder for it, nothing is held: opening the study says what is wrong.

    Raises:
        BlockingIOError: another process holds it, and this one does not wait.
    """
    file = study_file(where)
    if file is None or not file.parent.is_dir():
        yield
        return
    with lock_file(f"{os.path.realpath(file)}{suffix}", wait=wait):  # one lock, whatever way the file is named
        yield


def _cut_torn_tail(handle: int) -> None:
    size = os.fstat(handle).st_size
    if size == 0 or os.pread(handle, 1, size - 1) == b"\n":
        return
    start = size
    while start > 0:  # the last line end before the torn tail
        step = min(start, 1 << 16)
        found = os.pread(handle, step, start - step).rfind(b"\n")
        if found >= 0:
            os.ftruncate(handle, start - step + found + 1)
            return
        start -= step
    os.ftruncate(handle, 0)


def backend(where: str) -> str:
    """Return a database's kind, `postgresql` of `postgresql+psycopg://…`; empty for a path, which is a journal."""
    scheme, found, _ = where.partition("://")
    return scheme.partition("+")[0] if found else ""


def is_server(where: str) -> bool:
    """Return True for a database that several machines may share."""
    return backend(where) not in ("", "sqlite")


def study_file(where: str) -> Path | None:
    """Return the file that studies are kept in, a journal or SQLite's; None where there is none."""
    if not (kind := backend(where)):
        return Path(where)
    if kind != "sqlite":
        return None
    import sqlalchemy

    try:
        database = sqlalchemy.make_url(where).database or ""
    except (sqlalchemy.exc.SQLAlchemyError, ValueError):  # no URL: opening it says so
        return None
    path = unquote(urlsplit(database).path) if database.startswith("file:") else database
    return None if path in ("", ":memory:") else Path(path)


DRIVERS = {"postgresql": "psycopg", "mysql": "pymysql", "mariadb": "pymysql"}  # what the extras install


def with_driver(where: str) -> str:
    """Return a database's URL with the driver that nacpipe installs, where it names none."""
    kind, found, rest = where.partition("://")
    return f"{kind}+{DRIVERS[kind]}{found}{rest}" if found and kind in DRIVERS else where


def is_there(where: str) -> bool:
    """Return False where opening would make something: a journal or SQLite file, or Optuna's tables in a database.

    Raises:
        StudyError: a database cannot be reached.
        MissingExtra: its driver is not installed.
    """
    if not backend(where):
        return Path(where).exists()
    if not is_server(where) and ((file := study_file(where)) is None or not file.is_file()):
        return False
    import sqlalchemy

    try:
        url = sqlalchemy.make_url(with_driver(where))
        with sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool).connect() as connection:
            held = sqlalchemy.inspect(connection)
            return all(held.has_table(table) for table in ("version_info", "alembic_version"))  # this one is made last
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        raise cannot_open(where, error) from error


def open_storage(where: str, *, write: bool = True) -> BaseStorage:
    """Open a journal file (a path) or a database (a URL with `://`).

    Only to look, a journal's torn tail is left, and a database must have its tables (`is_there`).

    Raises:
        StudyError: it cannot be opened, naming it.
    """
    try:
        if backend(where):
            if write:
                _make_sqlite(where)
            return _open_database(where, write)
        if not Path(where).parent.is_dir():
            raise StudyError(f"the folder of the study {where} is not there")
        if sys.platform == "win32":
            return JournalStorage(Journal(where, lock_obj=JournalFileOpenLock(where)))
        lock = TailMendingLock(where)
        if write:
            lock.mend()
        return JournalStorage(Journal(where, lock_obj=lock))
    except StudyError:
        raise
    except Exception as error:  # every database driver has errors of its own
        raise cannot_open(where, error) from error


def _open_database(where: str, write: bool) -> RDBStorage:
    """Open a database; on a server, trials of a process that is gone are repeated by another (Optuna's heartbeat)."""
    heartbeat: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if is_server(where):
            repeat = RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)
            heartbeat = {"heartbeat_interval": HEARTBEAT, "heartbeat_stale_trial_callback": repeat}
        for attempt in range(ATTEMPTS):
            try:
                return RDBStorage(with_driver(where), skip_table_creation=not write, **heartbeat)
            except Exception as error:
                if attempt + 1 == ATTEMPTS or not _made_by_another(error):
                    raise
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("the loop returns or raises")


def _made_by_another(error: Exception) -> bool:
    """Return whether another process made the same tables in the same moment."""
    import sqlalchemy

    kinds = sqlalchemy.exc.IntegrityError | sqlalchemy.exc.ProgrammingError
    return isinstance(error, kinds) or isinstance(error.__cause__, kinds)


def _make_sqlite(where: str) -> None:
    """Make the empty file of a new SQLite database, with the umask's mode: SQLite itself would make it 0644."""
    import sqlalchemy

    url = sqlalchemy.make_url(with_driver(where))
    path = url.database
    if url.get_backend_name() == "sqlite" and path and path != ":memory:" and not path.startswith("file:"):
        with suppress(OSError):  # what is wrong with the place is SQLite's to say
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, NEW_FILE))


def cannot_open(where: str, error: Exception) -> NacError:
    """Return what a person is told when a storage cannot be opened."""
    root = error.__cause__ or error
    if isinstance(root, ModuleNotFoundError):
        kind = backend(where)
        extra = "postgresql" if kind == "postgresql" else "mysql"
        ours = f"install it with: pip install 'nacpipe[{extra}]'" if root.name == DRIVERS.get(kind) else "install it"
        return MissingExtra(f"this needs {root.name}; {ours}")
    return StudyError(f"the study's storage {without_password(where)} cannot be opened: {cause(error)}")


def cause(error: BaseException) -> str:
    """Return the first line of what is behind an error; Optuna's own words for it guess, and often wrongly."""
    root = error.__cause__ or error
    return f"{type(root).__name__}: {(str(root).splitlines() or [''])[0]}"


@contextmanager
def opening(where: str, *, create: bool) -> Iterator[None]:
    """Let one command at a time make a study in a file; a database server sees to it itself."""
    with _file_lock(where, ".opening", wait=True) if create and not is_server(where) else nullcontext():
        yield
