"""
What outlives a process: which sessions there are, whose they are and how to resume them.

The state is one SQLite database, used by one thread of its own, so that a slow disk never holds up
the reactor.  Every call is queued for that thread and answered by a Deferred, in order.  What is
only written down is handed to it a moment later, together with what came meanwhile.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import suppress
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

from claude_proxy.sessions import records, schema
from claude_proxy.sessions.records import Place, SessionRecord
from claude_proxy.sessions.schema import StoreError

__all__ = ["Place", "SessionRecord", "Store", "StoreError"]

_T = TypeVar("_T")


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
        self,
        path: Path | None,
        reactor: IReactorFromThreads,
        *,
        max_pending: int = 10_000,
        later: Callable[[Callable[[], None]], object] = lambda work: work(),
    ) -> None:
        """
        Nothing is touched before `open`.

        @param path: the database file; None keeps everything in memory.
        @param reactor: where the answers are delivered.
        @param max_pending: how many calls may wait for the thread.
        @param later: calls what it is given a moment later: until then the thread, which has to
            share the interpreter, is not woken for what is only to be written down.
        """
        self._path = path
        self._reactor = reactor
        self._max_pending = max_pending
        self._pool = ThreadPool(minthreads=1, maxthreads=1, name="claude-proxy-store")
        self._pool.threadFactory = _DaemonThread
        self._later = later
        self._pending = 0
        self._queue: list[tuple[Callable[[], Any], Deferred[Any]]] = []
        self._stage = _Stage.FRESH
        self._closers: list[Deferred[None]] = []
        # For the store's own thread only:
        self._connection: sqlite3.Connection | None = None
        self._impatient = False

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
        return self._ask(partial(records.find, name=session_id))

    def is_deleted(self, session_id: str) -> Deferred[bool]:
        """Whether a session that was deleted has had this id."""
        return self._ask(partial(records.is_deleted, name=session_id))

    def page(
        self, tenant: str, limit: int, before: Place | None = None
    ) -> Deferred[list[SessionRecord]]:
        """
        The tenant's sessions, the newest first.

        @param limit: how many at most.
        @param before: only those that follow this place in the list; None begins it.
        """
        return self._ask(partial(records.page, tenant=tenant, limit=limit, before=before))

    def create(self, record: SessionRecord) -> Deferred[None]:
        """
        Remember a new session, or replace what is known of it except when it was created.

        It has no tip then, and no turns but those that were counted before, whatever the record
        says.  Fails if its id belongs to another tenant, or one of its ids to another session.  A
        session that was deleted stays so, also in the methods that follow.
        """
        return self._note_with(record.parameters, partial(records.create, record=record))

    def begin(self, session_id: str, cli_id: str, now: float) -> Deferred[None]:
        """
        Remember that the CLI began, or resumed, a session, and by which id it resumes it next.

        The session has no tip from then on, until `set_tip`.  Fails if there is no such session, or
        `cli_id` belongs to another one.
        """
        return self._note(partial(records.begin, name=session_id, cli_id=cli_id, now=now))

    def finish_turn(
        self,
        session_id: str,
        now: float,
        cost: float,
        outcome: str,
        parameters: Mapping[str, object],
    ) -> Deferred[None]:
        """
        Remember that a turn of a session has ended.

        Fails if there is no such session.

        @param cost: of this turn, in US dollars; what is no amount counts for nothing.
        @param outcome: how it ended, in a word.
        @param parameters: what later turns inherit; they replace all that were known.
        """
        finish = partial(records.finish_turn, name=session_id, now=now, cost=cost, outcome=outcome)
        return self._note_with(parameters, finish)

    def finish_own_turn(self, session_id: str, cost: float) -> Deferred[None]:
        """
        Remember that a turn has ended that the session's agent began by itself.

        Fails if there is no such session.

        @param cost: of this turn, in US dollars; what is no amount counts for nothing.
        """
        return self._note(partial(records.finish_own_turn, name=session_id, cost=cost))

    def set_tip(self, session_id: str, tip: str, conversation: str | None) -> Deferred[None]:
        """
        Remember with which history a session ends now.

        Fails if there is no such session.

        @param tip: the history's fingerprint, not empty.
        @param conversation: the client's name for it; None leaves it the one that it has.
        """
        return self._note(
            partial(records.set_tip, name=session_id, tip=tip, conversation=conversation)
        )

    def claim(
        self,
        tenant: str,
        tips: tuple[str, ...],
        conversation: str | None,
        *,
        workspace: str | None = None,
        hinted: str | None = None,
    ) -> Deferred[SessionRecord | None]:
        """
        Find the one session that ends with a history, and take its tip: nobody else finds it.

        None if there is no such session, or several that nothing tells apart.

        @param tips: the history's fingerprints.
        @param conversation: the client's name for it.  Sessions of another name do not count, and
            of several that are left that of the same name does.
        @param workspace: only sessions of this workspace count; None is any.
        @param hinted: an id of the one that counts, if there are several.
        """
        claim = partial(records.claim, tenant=tenant, tips=tips, conversation=conversation)
        return self._ask(partial(claim, workspace=workspace, hinted=hinted))

    def unclaim(self, session_id: str, tip: str) -> Deferred[None]:
        """Give a session its tip back, unless the CLI has taken it up since it was claimed."""
        return self._note(partial(records.unclaim, name=session_id, tip=tip))

    def delete(self, session_id: str, tenant: str) -> Deferred[SessionRecord | None]:
        """
        Forget a session, if it is this tenant's; what it was, or None if there is none.

        All its ids stay known as deleted, also when sessions are pruned.
        """
        return self._ask(partial(records.delete, name=session_id, tenant=tenant))

    def prune(self, before: float, keep: int) -> Deferred[int]:
        """
        Forget sessions, with all their ids; how many it were.

        @param before: those that were last used before this time, in Unix seconds.
        @param keep: those that are not among so many that were used last.
        """
        return self._ask(partial(records.prune, before=before, keep=keep))

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
        answer = self._note(job)
        self._hand_over()
        return answer

    def _note(self, job: Callable[[sqlite3.Connection], _T]) -> Deferred[_T]:
        """Have something done for which nobody waits; it stays in order with all else."""
        if self._stage is not _Stage.OPEN:
            return fail(StoreError("The state store is not open."))
        if self._pending >= self._max_pending:
            return fail(StoreError("The state store is too slow: too many calls wait for it."))
        answer = self._enqueue(lambda: self._patiently(job))
        if len(self._queue) == 1:
            self._later(self._hand_over)
        return answer

    def _note_with(
        self, parameters: Mapping[str, object], job: Callable[..., None]
    ) -> Deferred[None]:
        # Encoded at once: the caller may change the mapping while the work waits.
        try:
            return self._note(partial(job, parameters=records.encoded(parameters)))
        except StoreError as error:
            return fail(error)

    def _submit(self, job: Callable[[], _T]) -> Deferred[_T]:
        answer = self._enqueue(job)
        self._hand_over()
        return answer

    def _enqueue(self, job: Callable[[], _T]) -> Deferred[_T]:
        # The Deferred that is handed out is not the one of the thread: cancelling it must neither
        # lose count of the work that still waits nor disturb what follows that work.
        answer: Deferred[_T] = Deferred()
        self._pending += 1
        self._queue.append((job, answer))
        return answer

    def _hand_over(self) -> None:
        queue, self._queue = self._queue, []
        if not queue:
            return

        def deliver(results: list[object]) -> None:
            for (_, answer), result in zip(queue, results, strict=True):
                self._pending -= 1
                answer.callback(result)

        jobs = [job for job, _ in queue]
        deferToThreadPool(self._reactor, self._pool, self._work_off, jobs).addCallback(deliver)

    # From here on: in the store's own thread.

    def _work_off(self, jobs: list[Callable[[], Any]]) -> list[object]:
        return [self._result_of(job) for job in jobs]

    def _result_of(self, job: Callable[[], Any]) -> object:
        try:
            return self._guarded(job)
        except Exception:  # noqa: BLE001  # it is for who has asked, and the next job is not
            return Failure()  # type: ignore[no-untyped-call]  # Twisted has no types for it

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

    def _patiently(self, job: Callable[[sqlite3.Connection], _T]) -> _T:
        """Wait for locks, but not for one that has outlasted our patience until it is gone."""
        connection = self._opened()
        before = connection.total_changes
        try:
            result = job(connection)
        except sqlite3.OperationalError as error:
            if not self._impatient and _code(error) == sqlite3.SQLITE_BUSY:
                # Every call behind this one would wait as long, and turns for theirs.
                self._be_patient(connection, milliseconds=0)
            raise
        if self._impatient and connection.total_changes > before:
            self._be_patient(connection, milliseconds=schema.PATIENCE)
        return result

    def _be_patient(self, connection: sqlite3.Connection, *, milliseconds: int) -> None:
        self._impatient = milliseconds == 0
        connection.execute(f"PRAGMA busy_timeout = {milliseconds}")

    def _named(self) -> str:
        return "The state database" + ("" if self._path is None else f" {self._path}")

    def _explained(self, error: sqlite3.Error) -> StoreError:
        if _code(error) in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
            return schema.damaged(self._named(), str(error))
        what = str(error).split(" with text ")[0]  # what follows is a column's content
        return StoreError(
            f"{self._named()} cannot be used: {what}. Check the space and the permissions of its "
            "directory, or set STATE_PATH to another one."
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
            schema.prepare(connection, self._named())
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        if self._path is not None:
            with suppress(OSError):  # an older file that another user owns stays as it is
                self._path.chmod(0o600)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with suppress(sqlite3.Error):  # what stays in the journal is read at the next start
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()


def _code(error: sqlite3.Error) -> int:
    # Errors of the module itself have no code; extended codes keep the plain one below.
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return code & 0xFF


def _make_private_file(path: Path) -> None:
    # SQLite gives its journal files the permissions of the database.
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
