"""
What outlives a process: which sessions there are, whose they are and how to resume them.

The state is one SQLite database, used by one thread of its own, so that a slow disk never holds up
the reactor.  Every call is queued for that thread and answered by a Deferred, in order.

A session has one id by which this server knows it, and the CLI may give it further ids (old
versions make a new one at every resume).  A client may come back with any of them, so all of them
stay known as aliases.  No id ever belongs to two sessions.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import msgspec
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IReactorFromThreads
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

__all__ = ["SessionRecord", "Store", "StoreError"]

_T = TypeVar("_T")

# Each entry leads from the version that is its index to the next one; entries are only ever added.
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE sessions (
            id TEXT PRIMARY KEY NOT NULL,
            cli_id TEXT NOT NULL,
            workspace TEXT,
            tenant TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('new', 'begun')),
            parameters TEXT NOT NULL,
            created REAL NOT NULL,
            used REAL NOT NULL
        )
        """,
        """
        CREATE TABLE aliases (
            alias TEXT PRIMARY KEY NOT NULL,
            session TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE
        )
        """,
        "CREATE INDEX aliases_by_session ON aliases (session)",
    ),
)

_SELECT = """
    SELECT id, cli_id, workspace, tenant, state, parameters, created, used FROM sessions
    WHERE id = :name OR id = (SELECT session FROM aliases WHERE alias = :name)
"""

_UPSERT = """
    INSERT INTO sessions (id, cli_id, workspace, tenant, state, parameters, created, used)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET
        cli_id = excluded.cli_id, workspace = excluded.workspace, state = excluded.state,
        parameters = excluded.parameters, used = excluded.used
"""


class StoreError(Exception):
    """The state cannot be read or written; the text is a sentence that says why."""


@dataclass(frozen=True)
class SessionRecord:
    """
    One session as it is remembered.

    @ivar id: the UUID by which this server knows it.
    @ivar cli_id: the id by which the CLI resumes it now.
    @ivar workspace: the name of its workspace, None for the shared one.
    @ivar tenant: whose session it is.
    @ivar begun: whether the CLI ever began it; before that there is no transcript to resume.
    @ivar parameters: what later turns inherit, a JSON object; not in the repr, as it may hold
        prompts.
    @ivar created: when it was made, in Unix seconds.
    @ivar used: when it was last used, in Unix seconds.
    """

    id: str
    cli_id: str
    workspace: str | None
    tenant: str
    begun: bool
    parameters: Mapping[str, object] = field(repr=False)
    created: float
    used: float


class _Stage(Enum):
    FRESH = auto()
    OPEN = auto()
    CLOSING = auto()
    ENDED = auto()


class _DaemonThread(Thread):
    """Does not keep a process alive whose start failed, with nobody left to close the store."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, daemon=True, **kwargs)


class Store:
    """
    The sessions that are remembered.

    Every method but the constructor returns a Deferred, which fails with StoreError when the
    database cannot do what is asked, before `open`, after `close`, and when `max_pending` calls
    are waiting already.
    """

    def __init__(
        self, path: Path | None, reactor: IReactorFromThreads, *, max_pending: int = 10_000
    ) -> None:
        """
        Nothing is touched before `open`.

        @param path: the database file; None keeps everything in memory.
        @param reactor: where the answers are delivered.
        @param max_pending: how many calls may wait for the thread.
        """
        self._path = path
        self._reactor = reactor
        self._max_pending = max_pending
        self._pool = ThreadPool(minthreads=1, maxthreads=1, name="claude-proxy-store")
        self._pool.threadFactory = _DaemonThread
        self._pending = 0
        self._stage = _Stage.FRESH
        self._closers: list[Deferred[None]] = []
        self._connection: sqlite3.Connection | None = None  # for the store's own thread only

    def open(self) -> Deferred[None]:
        """
        Start the thread, open the database and bring it up to date.

        Fails if the file is damaged, no database, of a newer version or not writable; the store is
        closed then.
        """
        return Deferred.fromCoroutine(self._open())

    async def _open(self) -> None:
        if self._stage is not _Stage.FRESH:
            raise StoreError("The state store was opened before.")
        try:
            self._pool.start()
        except RuntimeError as error:
            raise StoreError(f"The state store has no thread to work on: {error}.") from error
        self._stage = _Stage.OPEN
        try:
            await self._submit(self._connect)
        except StoreError:
            await self.close()
            raise

    def find(self, session_id: str) -> Deferred[SessionRecord | None]:
        """The session that has this id, or had it once; None if there is none."""
        return self._ask(partial(_find, name=session_id))

    def create(self, record: SessionRecord) -> Deferred[None]:
        """
        Remember a new session, or replace what is known of it except when it was created.

        Fails if its id belongs to another tenant, or one of its ids to another session.
        """
        return self._ask_with(record.parameters, partial(_create, record=record))

    def begin(self, session_id: str, cli_id: str, now: float) -> Deferred[None]:
        """
        Remember that the CLI began, or resumed, a session, and by which id it resumes it next.

        Fails if there is no such session, or `cli_id` belongs to another one.
        """
        return self._ask(partial(_begin, name=session_id, cli_id=cli_id, now=now))

    def touch(
        self, session_id: str, now: float, parameters: Mapping[str, object] | None = None
    ) -> Deferred[None]:
        """
        Remember that a session was used, and its parameters if any are given (all of them anew).

        Fails if there is no such session.
        """
        touch = partial(_touch, name=session_id, now=now)
        return self._ask(touch) if parameters is None else self._ask_with(parameters, touch)

    def close(self) -> Deferred[None]:
        """Do what is queued, close the database and end the thread.  May be called again."""
        if self._stage is _Stage.FRESH:
            self._stage = _Stage.ENDED
        if self._stage is _Stage.ENDED:
            return succeed(None)
        closed: Deferred[None] = Deferred()
        self._closers.append(closed)
        if self._stage is _Stage.OPEN:
            self._stage = _Stage.CLOSING
            self._submit(self._disconnect).addBoth(self._ended)
        return closed

    def _ended(self, result: Failure | None) -> None:
        self._stage = _Stage.ENDED
        self._pool.stop()  # joins the thread, which has just done its last work
        closers, self._closers = self._closers, []
        for closed in closers:
            closed.callback(result)

    def _ask(self, job: Callable[[sqlite3.Connection], _T]) -> Deferred[_T]:
        if self._stage is not _Stage.OPEN:
            return fail(StoreError("The state store is not open."))
        if self._pending >= self._max_pending:
            return fail(StoreError("The state store is too slow: too many calls wait for it."))
        return self._submit(lambda: job(self._opened()))

    def _ask_with(
        self, parameters: Mapping[str, object], job: Callable[..., None]
    ) -> Deferred[None]:
        # Encoded at once: the caller may change the mapping while the work waits.
        try:
            return self._ask(partial(job, parameters=_encoded(parameters)))
        except StoreError as error:
            return fail(error)

    def _submit(self, job: Callable[[], _T]) -> Deferred[_T]:
        # The Deferred that is handed out is not the one of the thread: cancelling it must neither
        # lose count of the work that still waits nor disturb what follows that work.
        answer: Deferred[_T] = Deferred()

        def deliver(result: _T | Failure) -> None:
            self._pending -= 1
            answer.callback(result)

        self._pending += 1
        deferToThreadPool(self._reactor, self._pool, self._guarded, job).addBoth(deliver)
        return answer

    # From here on: in the store's own thread.

    def _guarded(self, job: Callable[[], _T]) -> _T:
        try:
            return job()
        except sqlite3.Error as error:
            raise self._explained(error) from error
        except OSError as error:
            raise StoreError(
                f"{self._named()} cannot be made: {error.strerror}. Make its directory writable, "
                "or set STATE_PATH to another one."
            ) from error
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise StoreError(f"{self._named()} cannot hold or give a value: {error}.") from error

    def _named(self) -> str:
        return "The state database" + ("" if self._path is None else f" {self._path}")

    def _explained(self, error: sqlite3.Error) -> StoreError:
        # Errors of the module itself have no code; extended codes keep the plain one below.
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
            return self._damaged(str(error))
        what = str(error).split(" with text ")[0]  # what follows is a column's content
        return StoreError(
            f"{self._named()} cannot be used: {what}. Check the space and the permissions of its "
            "directory, or set STATE_PATH to another one."
        )

    def _damaged(self, finding: str) -> StoreError:
        return StoreError(
            f"{self._named()} is damaged or not a database ({finding}). Move it away, or set "
            "STATE_PATH to another directory: a new one is made at the next start."
        )

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StoreError(f"{self._named()} could not be opened.")
        return self._connection

    def _connect(self) -> None:
        if self._path is not None:
            _make_private_file(self._path)
        connection = sqlite3.connect(self._path or ":memory:", isolation_level=None)
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        if self._path is not None:
            with suppress(OSError):  # an older file that another user owns stays as it is
                self._path.chmod(0o600)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA busy_timeout = 5000")
        self._check_version(connection)  # first: a newer database is left exactly as it is
        finding = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if finding != "ok":
            raise self._damaged(finding)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        # Also when there is nothing to migrate: this is how an unwritable database shows now.
        with _transaction(connection):
            for migration in _MIGRATIONS[self._check_version(connection) :]:
                for statement in migration:
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")

    def _check_version(self, connection: sqlite3.Connection) -> int:
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        if version < 0:
            raise self._damaged(f"version {version}")
        if version > len(_MIGRATIONS):
            raise StoreError(
                f"{self._named()} has version {version}, newer than version {len(_MIGRATIONS)} "
                "which this program knows. Upgrade claude-code-proxy, or set STATE_PATH to "
                "another directory."
            )
        return version

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            connection.close()


def _make_private_file(path: Path) -> None:
    # SQLite gives its journal files the permissions of the database.
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # some errors have rolled back already
            connection.execute("ROLLBACK")
        raise


def _encoded(parameters: Mapping[str, object]) -> str:
    try:
        return msgspec.json.encode(dict(parameters)).decode()
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise StoreError(f"The parameters are not JSON: {type(error).__name__}.") from error


def _find(connection: sqlite3.Connection, name: str) -> SessionRecord | None:
    row = connection.execute(_SELECT, {"name": name}).fetchone()
    if row is None:
        return None
    session, cli_id, workspace, tenant, state, parameters, created, used = row
    begun = state == "begun"
    kept = msgspec.json.decode(parameters, type=dict[str, object])
    return SessionRecord(session, cli_id, workspace, tenant, begun, kept, created, used)


def _known(connection: sqlite3.Connection, name: str) -> str:
    found = _find(connection, name)
    if found is None:
        raise StoreError(f"There is no session {name}.")
    return found.id


def _add_alias(connection: sqlite3.Connection, session: str, alias: str) -> None:
    owner = _find(connection, alias)
    if owner is None:
        connection.execute("INSERT INTO aliases (alias, session) VALUES (?, ?)", (alias, session))
    elif owner.id != session:
        raise StoreError(f"The session id {alias} belongs to another session.")


def _create(connection: sqlite3.Connection, record: SessionRecord, parameters: str) -> None:
    state = "begun" if record.begun else "new"
    row = (record.id, record.cli_id, record.workspace, record.tenant, state, parameters)
    with _transaction(connection):
        known = _find(connection, record.id)
        if known is not None and (known.id, known.tenant) != (record.id, record.tenant):
            raise StoreError(f"The session id {record.id} belongs to another session or tenant.")
        connection.execute(_UPSERT, (*row, record.created, record.used))
        _add_alias(connection, record.id, record.cli_id)


def _begin(connection: sqlite3.Connection, name: str, cli_id: str, now: float) -> None:
    with _transaction(connection):
        session = _known(connection, name)
        _add_alias(connection, session, cli_id)
        connection.execute(
            "UPDATE sessions SET state = 'begun', cli_id = ?, used = ? WHERE id = ?",
            (cli_id, now, session),
        )


def _touch(
    connection: sqlite3.Connection, name: str, now: float, parameters: str | None = None
) -> None:
    with _transaction(connection):
        connection.execute(
            "UPDATE sessions SET used = ?, parameters = coalesce(?, parameters) WHERE id = ?",
            (now, parameters, _known(connection, name)),
        )
