"""
The sessions as their owner sees them: which there are, what they do, and how to be rid of them.

What was begun here is done whether or not the client waits for it.
"""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure as TwistedFailure

from claude_proxy.errors import Failure, ProxyError
from claude_proxy.interfaces import ISessionControl
from claude_proxy.sessions.book import SessionBook
from claude_proxy.sessions.store import Place, SessionRecord

__all__ = ["Entry", "Page", "SessionRegister"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Entry:
    """
    One session.

    @ivar state: ``running``, ``live`` or ``idle``.
    """

    record: SessionRecord
    state: str


@dataclass(frozen=True, slots=True)
class Page:
    """
    A part of the list.

    @ivar end: its last place, if more follow.
    """

    entries: list[Entry]
    end: Place | None


class SessionRegister:
    """
    Lists, interrupts and deletes sessions, for the tenant that owns them.

    A session that is another tenant's, or deleted, or unknown, is SESSION_NOT_FOUND, by any of its
    ids; without the store everything here is INTERNAL_ERROR.
    """

    _log = Logger(namespace="claude_proxy.sessions")

    def __init__(self, book: SessionBook, control: ISessionControl) -> None:
        self._book = book
        self._control = control

    async def page(self, tenant: str, limit: int, before: Place | None) -> Page:
        """
        The tenant's sessions, the newest first.

        @param limit: how many at most.
        @param before: where the last page ended; None begins the list.
        """
        records = await self._book.page(tenant, limit + 1, before)
        entries = [self._entry(record) for record in records[:limit]]
        if len(records) <= limit:
            return Page(entries, None)
        last = entries[-1].record
        return Page(entries, Place(last.created, last.id))

    async def get(self, tenant: str, session_id: str) -> Entry:
        """One session."""
        return self._entry(await self._book.get(tenant, session_id))

    def _entry(self, record: SessionRecord) -> Entry:
        return Entry(record, self._control.state(record.id))

    def interrupt(self, tenant: str, session_id: str, request_id: str) -> Deferred[bool]:
        """
        Stop the session's turn.

        @param request_id: names the request in the log.
        @return: when the turn has ended: whether one was running.
        """
        return self._to_its_end(self._interrupt(tenant, session_id, request_id), request_id)

    async def _interrupt(self, tenant: str, session_id: str, request_id: str) -> bool:
        record = await self._book.get(tenant, session_id)
        interrupted = await self._control.interrupt(record.id)
        self._log.info(
            "session interrupted: {interrupted}",
            type="session_interrupted",
            interrupted=interrupted,
            request_id=request_id,
            session_id=record.id,
            tenant=tenant,
        )
        return interrupted

    def delete(self, tenant: str, session_id: str, request_id: str) -> Deferred[SessionRecord]:
        """
        Forget a session for good, and end what runs in it.

        @param request_id: names the request in the log.
        @return: when nothing runs any more: what the session was.
        """
        return self._to_its_end(self._delete(tenant, session_id, request_id), request_id)

    async def _delete(self, tenant: str, session_id: str, request_id: str) -> SessionRecord:
        # First: whoever looks it up from now on finds none, and nobody can begin a turn behind the
        # one that is stopped.
        record = await self._book.delete(tenant, session_id)
        self._log.info(
            "session deleted",
            type="session_deleted",
            request_id=request_id,
            session_id=record.id,
            tenant=tenant,
        )
        message = "This session was deleted. Leave the session id out to start a new one."
        await self._control.end(record.id, ProxyError(Failure.SESSION_NOT_FOUND, message))
        return record

    def _to_its_end(self, work: Coroutine[Any, Any, _T], request_id: str) -> Deferred[_T]:
        """Do work that goes on when nobody waits for it any more."""
        answer: Deferred[_T] = Deferred()

        def deliver(result: _T | TwistedFailure) -> None:
            if not answer.called:
                answer.callback(result)
            elif isinstance(result, TwistedFailure) and not isinstance(result.value, ProxyError):
                self._log.failure(
                    "a session could not be interrupted or deleted",
                    result,
                    type="internal_error",
                    request_id=request_id,
                )

        Deferred.fromCoroutine(work).addBoth(deliver)
        return answer
