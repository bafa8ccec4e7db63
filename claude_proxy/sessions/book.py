"""
Which session a request means, and what is remembered of it.

A session that somebody else's key began does not exist for this one.  When the store fails, the
server goes on without its memory and says so in the log: the CLI's own transcripts remain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from uuid import uuid4

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure as TwistedFailure

from claude_proxy.cli.command import SessionStart, StartKind
from claude_proxy.cli.events import Event
from claude_proxy.cli.outcomes import Outcome
from claude_proxy.cli.versions import Capabilities
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.inheritance import inherited
from claude_proxy.sessions.recent import RecentSessions
from claude_proxy.sessions.store import Place, SessionRecord, Store, StoreError
from claude_proxy.sessions.turns import TurnRequest

__all__ = ["KEPT_FOR", "KEPT_SESSIONS", "Plan", "SessionBook"]

_T = TypeVar("_T")

KEPT_FOR = 90 * 24 * 3600.0
"""
Seconds for which an unused session is remembered.  The CLI deletes its transcripts after 30 days
unless it is told otherwise; few who come back later than this will find anything to continue.
"""

KEPT_SESSIONS = 100_000
"""How many sessions are remembered: at less than 1 KiB each, a database that any disk can hold."""

_PRUNED_EVERY = 1000
"""Sessions that are written down between two prunings: one percent more than are to be kept."""

_NAME_LIMIT = 256
"""Characters of a client's name for its conversation that count; what names them are UUIDs."""

_NOT_LISTED = "There is no such session. GET /api/sessions lists those of your key."

_NO_STORE = (
    "The server's memory of its sessions cannot be read or written now. "
    "Its log says why, and more under this request id."
)


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
        self._written_down = 0
        self._recent = RecentSessions()

    def use(self, store: Store) -> None:
        """Keep the book in another store from now on."""
        self._store = store
        self._recent.forget()

    async def recognise(self, request: TurnRequest) -> TurnRequest:
        """
        Find the session that a request continues, where it may mean one without naming it.

        One that is found becomes the request's `session_id`, and adds what the request inherits.
        The history is told no more, except to a session that is not known to have begun.  Where
        nothing is found the request comes back as it is: its session will be a new one.

        A session that was found by its history is claimed: no other request finds it.  If the turn
        does not begin, `unclaim` is due.
        """
        try:
            if request.session_id is not None:
                return await self._named(request, request.session_id) or request
            return (
                await self._named(request, request.conversation)
                or await self._found_by_history(request)
                or await self._shown(request)
                or request
            )
        except StoreError as error:
            self._complain(error)
            return request

    async def _named(self, request: TurnRequest, name: str | None) -> TurnRequest | None:
        """The request continues the session of this name, if it is one that is known."""
        if name is None or not (request.inherit or request.history or request.session_id is None):
            return None
        record = await self._store.find(name)
        if record is None or record.tenant != request.tenant:
            return None
        return self._continued(request, record, name)

    async def _found_by_history(self, request: TurnRequest) -> TurnRequest | None:
        if not request.tips or request.fork:  # a copy leaves its source alone, its tip too
            return None
        record = await self._claim(request)
        if record is None:
            return None
        return replace(self._continued(request, record, record.id), claimed=record.claimed)

    def _claim(self, request: TurnRequest) -> Deferred[SessionRecord | None]:
        claimed: Deferred[SessionRecord | None] = Deferred()

        def over(result: SessionRecord | TwistedFailure | None) -> None:
            if not claimed.called:
                claimed.callback(result)
            elif isinstance(result, SessionRecord) and result.claimed is not None:
                # The client has left meanwhile, and nobody else knows of this claim.
                self._background(self._store.unclaim(result.id, result.claimed))

        self._store.claim(
            request.tenant,
            request.tips,
            _shortened(request.conversation),
            workspace=request.workspace,
            hinted=request.hinted_session,
        ).addBoth(over)
        return claimed

    async def _shown(self, request: TurnRequest) -> TurnRequest | None:
        """The request continues the session that an old answer shows, unless it knows better."""
        if request.hinted_session is None:
            return None
        record = await self._store.find(request.hinted_session)
        if record is None:
            # Another server began it, or the state was lost.  If the CLI has lost it too, the
            # history is all there is.
            if not self._adopt_unknown or await self._store.is_deleted(request.hinted_session):
                return None
            return replace(request, session_id=request.hinted_session)
        if record.tenant != request.tenant or not record.begun:
            return None
        if record.tip is not None or request.workspace not in (None, record.workspace):
            return None  # its tip is another one, or none: the history was edited
        return self._continued(request, record, request.hinted_session)

    @staticmethod
    def _continued(request: TurnRequest, record: SessionRecord, name: str) -> TurnRequest:
        history = () if record.begun else request.history
        return replace(inherited(request, record.parameters), session_id=name, history=history)

    async def holds(self, request: TurnRequest) -> bool:
        """
        Whether the session that a request has claimed still ends with its history.

        Another turn, of a request that names the session, may have begun since, while this one
        waited for the lease.  True if nothing was claimed.
        """
        if request.claimed is None or request.session_id is None:
            return True
        record = await self._find(request.session_id)
        return record is not None and record.claimed == request.claimed

    def unclaim(self, request: TurnRequest) -> None:
        """Let a session be found again, in the background, if a request claimed one in vain."""
        if request.claimed is not None and request.session_id is not None:
            self._background(self._store.unclaim(request.session_id, request.claimed))

    def remember_tip(self, session: str, tip: str, conversation: str | None) -> None:
        """
        Write down, in the background, with which history a session ends.

        To be called when all else of the turn is written down: what `begun` and `resumed_by` write
        takes the tip away.

        @param session: the id under which the session is kept.
        @param conversation: the client's name for it; None leaves it the one that it has.
        """
        self._background(self._store.set_tip(session, tip, _shortened(conversation)))

    async def resolve(self, request: TurnRequest, can: Capabilities) -> Plan:
        """
        Find the session that a request means.

        @raise ProxyError: SESSION_NOT_FOUND, or INVALID_VALUE for another workspace than its own.
        """
        if request.session_id is None:
            return self._plan_new(request.workspace, can)
        record = await self._find_alive(request.session_id)
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
            self._write_down(self._record(plan, request, plan.session_id, begun=False))

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
            self.resumed_by(known, cli_id)
            return known
        kept = plan.lease_key if plan.start.kind is StartKind.RESUME else cli_id
        record = self._record(plan, request, kept, begun=True)
        self._write_down(replace(record, cli_id=cli_id))
        return kept

    def resumed_by(self, session: str, cli_id: str) -> None:
        """Write down, in the background, by which of its ids the CLI resumes the session now."""
        self._recent.begun(session, cli_id)
        self._background(self._store.begin(session, cli_id, self._now()))

    def used(self, session: str, request: TurnRequest, outcome: Outcome) -> None:
        """Write down, in the background, how a turn of the session has ended."""
        cost = outcome.totals.get("total_cost_usd", 0.0)
        self._background(
            self._store.finish_turn(session, self._now(), cost, outcome.code, request.parameters)
        )

    def went_on(self, session: str, result: Event) -> None:
        """
        Write down, in the background, a turn that the session's agent began by itself.

        @param result: its own, with its own figures.
        """
        cost = result.fields().get("total_cost_usd")
        amount = cost if isinstance(cost, (int, float)) else 0.0
        self._background(self._store.finish_own_turn(session, amount))

    async def page(self, tenant: str, limit: int, before: Place | None) -> list[SessionRecord]:
        """
        The tenant's sessions, the newest first.

        @param limit: how many at most.
        @param before: only those that follow this place in the list; None begins it.
        @raise ProxyError: INTERNAL_ERROR: the store has failed.
        """
        return await self._asked(self._store.page(tenant, limit, before))

    async def get(self, tenant: str, session: str) -> SessionRecord:
        """
        One session of the tenant, by any of its ids.

        @raise ProxyError: SESSION_NOT_FOUND, or INTERNAL_ERROR: the store has failed.
        """
        record = await self._asked(self._store.find(session))
        if record is None or record.tenant != tenant:
            raise ProxyError(Failure.SESSION_NOT_FOUND, _NOT_LISTED)
        return record

    async def delete(self, tenant: str, session: str) -> SessionRecord:
        """
        Forget a session of the tenant for good; what it was.

        @raise ProxyError: SESSION_NOT_FOUND, or INTERNAL_ERROR: the store has failed.
        """
        self._recent.forget()
        record = await self._asked(self._store.delete(session, tenant))
        if record is None:
            raise ProxyError(Failure.SESSION_NOT_FOUND, _NOT_LISTED)
        return record

    async def _asked(self, answer: Deferred[_T]) -> _T:
        """What is asked for its own sake, and so cannot be done without the store."""
        try:
            return await answer
        except StoreError as error:
            self._complain(error)
            raise ProxyError(Failure.INTERNAL_ERROR, _NO_STORE) from error

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

    def _write_down(self, record: SessionRecord) -> None:
        writing: Deferred[Any] = self._store.create(record)
        if self._written_down % _PRUNED_EVERY == 0:  # the first of a run, too
            before = self._now() - KEPT_FOR
            writing.addCallback(lambda _: self._prune(before))
        self._background(writing)
        self._written_down += 1

    def _prune(self, before: float) -> Deferred[int]:
        self._recent.forget()
        return self._store.prune(before, KEPT_SESSIONS)

    async def _find_alive(self, session_id: str) -> SessionRecord | None:
        """What is known of a session.  SESSION_NOT_FOUND if it was deleted."""
        known = self._recent.get(session_id)
        if known is not None:
            return known
        changes = self._recent.changes
        try:
            record = await self._store.find(session_id)
            if record is None and await self._store.is_deleted(session_id):
                raise ProxyError(Failure.SESSION_NOT_FOUND, param="session-id")
        except StoreError as error:
            self._complain(error)
            return None
        if record is not None:
            self._recent.keep(record, changes)
        return record

    async def _find(self, session_id: str) -> SessionRecord | None:
        try:
            return await self._store.find(session_id)
        except StoreError as error:
            self._complain(error)
            return None

    def _complain(self, error: StoreError) -> None:
        self._log.error(
            "sessions cannot be looked up: {error}", type="store_failed", error=str(error)
        )

    def _background(self, writing: Deferred[Any]) -> None:
        def failed(failure: TwistedFailure) -> None:
            self._log.error(
                "a session could not be written down: {error}",
                type="store_failed",
                error=str(failure.value),
            )

        writing.addErrback(failed)


def _shortened(conversation: str | None) -> str | None:
    return None if conversation is None else conversation[:_NAME_LIMIT]
