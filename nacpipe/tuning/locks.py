"""Locks of a database server that end with the connection that holds them: of a killed process, at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import sqlalchemy

from nacpipe.errors import StudyError
from nacpipe.tuning.storage import cannot_open, cause, with_driver


@dataclass(frozen=True, slots=True)
class _Dialect:
    """How a server is asked. Every statement takes :key; `try_` and `wait` return 1 or true where the lock is held."""

    setup: tuple[str, ...]
    wait: str
    try_: str
    release: str
    number: bool
    """True where a key is a 64-bit number, false where it is a text of up to 64 characters."""


# A server finds out by itself about a client that is gone with its machine: PostgreSQL by asking the idle connection
# every few seconds, MySQL by ending one that was silent for ten minutes.
_POSTGRESQL = _Dialect(
    setup=("SET tcp_keepalives_idle = 10", "SET tcp_keepalives_interval = 5", "SET tcp_keepalives_count = 4"),
    wait="SELECT pg_advisory_lock(:key) IS NOT NULL",
    try_="SELECT pg_try_advisory_lock(:key)",
    release="SELECT pg_advisory_unlock(:key)",
    number=True,
)
_MYSQL = _Dialect(
    setup=("SET SESSION wait_timeout = 600",),
    wait="SELECT GET_LOCK(:key, 3600)",
    try_="SELECT GET_LOCK(:key, 0)",
    release="SELECT RELEASE_LOCK(:key)",
    number=False,
)
_DIALECTS = {"postgresql": _POSTGRESQL, "mysql": _MYSQL, "mariadb": _MYSQL}


class ServerLocks:
    """The locks of one study: its book's, and one per worker that lives."""

    def __init__(self, url: str, study: str) -> None:
        """Connect.

        Raises:
            StudyError: the server cannot be reached, or this kind of database has no such locks.
            MissingExtra: its driver is not installed.
        """
        try:
            engine = sqlalchemy.create_engine(
                with_driver(url), isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool
            )
        except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
            raise cannot_open(url, error) from error
        if engine.dialect.name not in _DIALECTS:
            raise StudyError(
                f"a study cannot be shared on {engine.dialect.name}; use PostgreSQL or MySQL, or a journal file or"
                " sqlite:///FILE for one process"
            )
        self._dialect, self._study = _DIALECTS[engine.dialect.name], study
        try:
            self._connection = engine.connect()
            for statement in self._dialect.setup:
                self._connection.execute(sqlalchemy.text(statement))
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise cannot_open(url, error) from error

    @contextmanager
    def book(self) -> Iterator[None]:
        """Hold the study's book; others wait."""
        if not self._ask(self._dialect.wait, "book"):
            raise StudyError(
                f"the book of study {self._study} was held by another process for an hour; look what it does"
            )
        try:
            yield
        finally:
            self._ask(self._dialect.release, "book")

    def live(self, worker: str) -> None:
        """Show, until this process ends, that the worker lives."""
        self._ask(self._dialect.try_, worker)

    def lives(self, worker: str) -> bool:
        """Return whether a worker's connection is still there."""
        if not self._ask(self._dialect.try_, worker):
            return True
        self._ask(self._dialect.release, worker)
        return False

    def close(self) -> None:
        """Let go of everything."""
        self._connection.close()

    def _ask(self, statement: str, name: str) -> bool:
        digest = hashlib.sha256(f"nacpipe {self._study} {name}".encode()).digest()
        key = int.from_bytes(digest[:8], "big", signed=True) if self._dialect.number else digest[:32].hex()
        try:
            return bool(self._connection.execute(sqlalchemy.text(statement), {"key": key}).scalar())
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise StudyError(f"the study's database went away: {cause(error)}; the same command goes on") from error
