"""
Which session a request means, and what is remembered of it.

A session that somebody else's key began does not exist for this one.  When the store fails, the
server goes on without its memory and says so in the log: the CLI's own transcripts remain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from uuid import uuid4

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure as TwistedFailure

from claude_proxy.cli.command import SessionStart, StartKind
from claude_proxy.cli.versions import Capabilities
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.store import SessionRecord, Store, StoreError
from claude_proxy.sessions.turns import TurnRequest

__all__ = ["Plan", "SessionBook"]


@dataclass(frozen=True, slots=True)
class Plan:
    """
    The session of a turn, before its process is started.

    @ivar session_id: the id to tell the client now, or None where only the CLI will tell.
    @ivar lease_key: what must be leased for the turn.
    @ivar source_key: what must be leased until the CLI has read it, for a fork.
    @ivar record_id: the store's name of the session; None while it has none.
    """

    session_id: str | None
    lease_key: str
    start: SessionStart
    workspace: str | None
    source_key: str | None = None
    record_id: str | None = None


class SessionBook:
    """Looks sessions up and writes down what becomes of them."""

    _log = Logger(namespace="claude_proxy.sessions")

    def __init__(
        self,
        store: Store,
        *,
        adopt_unknown: bool,
        now: Callable[[], float] = time.time,
        make_id: Callable[[], str] = lambda: str(uuid4()),
    ) -> None:
        """
        @param adopt_unknown: an id that the store does not know is tried with the CLI: there is
            only one tenant, so it can be nobody else's.
        @param now: the time of day, in seconds since the epoch.
        """
        self._store = store
        self._adopt_unknown = adopt_unknown
        self._now = now
        self._make_id = make_id

    def use(self, store: Store) -> None:
        """Keep the book in another store from now on."""
        self._store = store

    async def resolve(self, request: TurnRequest, can: Capabilities) -> Plan:
        """
        Find the session that a request means.

        @raise ProxyError: SESSION_NOT_FOUND, or INVALID_VALUE for another workspace than its own.
        """
        if request.session_id is None:
            return self._plan_new(request.workspace, can)
        record = await self._find(request.session_id)
        if record is None:
            if not self._adopt_unknown:
                raise ProxyError(Failure.SESSION_NOT_FOUND, param="session-id")
            return self._plan_known(request, can, request.session_id, request.session_id, None)
        if record.tenant != request.tenant:
            raise ProxyError(Failure.SESSION_NOT_FOUND, param="session-id")
        if request.workspace not in (None, record.workspace):
            home = f"workspace '{record.workspace}'" if record.workspace else "the shared workspace"
            message = f"This session belongs to {home}; leave 'workspace' out to continue it."
            raise ProxyError(Failure.INVALID_VALUE, message, param="workspace")
        if not record.begun:
            return self._plan_unbegun(request, can, record)
        return self._plan_known(request, can, record.id, record.cli_id, record)

    def _plan_new(self, workspace: str | None, can: Capabilities) -> Plan:
        new = self._make_id()
        own_id = new if can.session_id else None
        return Plan(own_id, new, SessionStart(StartKind.NEW, own_id), workspace)

    def _plan_unbegun(self, request: TurnRequest, can: Capabilities, record: SessionRecord) -> Plan:
        """Its first turn failed before the CLI knew it: there is nothing to resume or to copy."""
        if request.fork:
            # Its first turn may be about to begin it: the copy waits for that.
            return replace(self._plan_new(record.workspace, can), source_key=record.id)
        if not can.session_id:
            return self._plan_new(record.workspace, can)
        start = SessionStart(StartKind.NEW, record.id)
        return Plan(record.id, record.id, start, record.workspace, record_id=record.id)

    def _plan_known(
        self,
        request: TurnRequest,
        can: Capabilities,
        key: str,
        cli_id: str,
        record: SessionRecord | None,
    ) -> Plan:
        workspace = record.workspace if record else request.workspace
        if request.fork:
            new = self._make_id()
            own_id = new if can.session_id else None
            start = SessionStart(StartKind.FORK, own_id, source=cli_id)
            return Plan(own_id, new, start, workspace, source_key=key)
        start = SessionStart(StartKind.RESUME, cli_id)
        return Plan(cli_id, key, start, workspace, record_id=record.id if record else None)

    def planned(self, plan: Plan, request: TurnRequest) -> None:
        """Write down, in the background, a new session whose id is ours, before it begins."""
        if plan.start.kind is not StartKind.RESUME and plan.session_id and not plan.record_id:
            self._background(
                self._store.create(self._record(plan, request, plan.session_id, begun=False))
            )

    def begun(self, plan: Plan, request: TurnRequest, cli_id: str) -> str:
        """
        Write down, in the background, that the CLI has taken the turn's message.

        @param cli_id: the session's id by the CLI's word.
        @return: the id under which the session is kept.
        """
        known = plan.record_id or (
            plan.session_id if plan.start.kind is not StartKind.RESUME else None
        )
        if known is not None:
            self._background(self._store.begin(known, cli_id, self._now()))
            return known
        kept = plan.lease_key if plan.start.kind is StartKind.RESUME else cli_id
        self._background(self._store.create(self._record(plan, request, kept, begun=True)))
        if kept != cli_id:
            self._background(self._store.begin(kept, cli_id, self._now()))
        return kept

    def resumed_by(self, session: str, cli_id: str) -> None:
        """Write down, in the background, by which of its ids the CLI resumes the session now."""
        self._background(self._store.begin(session, cli_id, self._now()))

    def used(self, session: str, request: TurnRequest) -> None:
        """Write down, in the background, that a turn of the session has ended."""
        self._background(self._store.touch(session, self._now(), request.parameters))

    def _record(
        self, plan: Plan, request: TurnRequest, session: str, *, begun: bool
    ) -> SessionRecord:
        now = self._now()
        return SessionRecord(
            id=session,
            cli_id=session,
            workspace=plan.workspace,
            tenant=request.tenant,
            begun=begun,
            parameters=request.parameters,
            created=now,
            used=now,
        )

    async def _find(self, session_id: str) -> SessionRecord | None:
        try:
            return await self._store.find(session_id)
        except StoreError as error:
            self._log.error(
                "sessions cannot be looked up: {error}", type="store_failed", error=str(error)
            )
            return None

    def _background(self, writing: Deferred[None]) -> None:
        def failed(failure: TwistedFailure) -> None:
            self._log.error(
                "a session could not be written down: {error}",
                type="store_failed",
                error=str(failure.value),
            )

        writing.addErrback(failed)
