"""
One turn from its request to its end.

Each turn is one coroutine that goes through the same rooms in the same order: what the CLI can do,
whether it is allowed, which session, the lease, the workspace, the process, the turn, the process's
end.  Whatever happens on the way becomes one outcome for the observer, and the lease is given back
last, when nothing writes to the session any more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from twisted.internet.defer import CancelledError, Deferred, succeed
from zope.interface import implementer

from claude_proxy.cli.outcomes import Outcome, OutcomeKind
from claude_proxy.cli.versions import Capabilities
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.interfaces import IRunningTurn, ITurnObserver
from claude_proxy.sessions.attempt import Attempt
from claude_proxy.sessions.book import Plan
from claude_proxy.sessions.capacity import Slot
from claude_proxy.sessions.context import RunContext
from claude_proxy.sessions.deferreds import branch
from claude_proxy.sessions.leases import Lease
from claude_proxy.sessions.policy import (
    adapt,
    check_permissions,
    check_supported,
)
from claude_proxy.sessions.turns import TurnRequest
from claude_proxy.sessions.workspaces import check_name

__all__ = ["Run"]

_T = TypeVar("_T")


@implementer(IRunningTurn)
class Run:
    """One turn on its way."""

    def __init__(self, context: RunContext, request: TurnRequest, observer: ITurnObserver) -> None:
        self._context = context
        self._request = request
        self._observer = observer
        self._log = context.log
        self._work: Deferred[None] = Deferred()
        self._attempt: Attempt | None = None
        self._stop_reason: ProxyError | None = None
        self._reported = self._stopped = self._interrupted = False
        self._asked = request
        self._lease_key: str | None = None
        self._patience = context.waiting_room.patience
        self._workspace: str | None = None

    @property
    def session_id(self) -> str | None:
        return self._attempt.session_id if self._attempt is not None else self._request.session_id

    @property
    def _kept(self) -> str | None:
        return self._attempt.kept if self._attempt is not None else None

    def start(self) -> Deferred[None]:
        """Set out; the Deferred fires when all is over, and never fails."""
        self._work = Deferred.fromCoroutine(self._run())
        return self._work

    def is_on(self, session: str) -> bool:
        """Whether the turn has, or will have, the lease of this session."""
        attempt = self._attempt
        return session == self._lease_key or (
            attempt is not None and session in (attempt.kept, attempt.lease_key)
        )

    def interrupt(self) -> Deferred[bool]:
        """
        Have the CLI end its turn with a result of its own.

        @return: fires with True when all of the turn is over; with False at once if none runs.
        """
        if self._attempt is None or not self._attempt.interrupt():
            return succeed(False)
        self._interrupted = True
        self._log.info(
            "the turn is interrupted on request",
            type="turn_interrupted",
            request_id=self._request.request_id,
            session_id=self.session_id,
        )
        over: Deferred[bool] = Deferred()
        branch(self._work).addCallback(lambda _: over.callback(True))
        return over

    def stop(self, reason: ProxyError | None) -> None:
        if self._reported:
            return
        self._stopped, self._stop_reason = True, reason
        if self._attempt is None or not self._attempt.stop(reason):
            self._work.cancel()

    def remember(self, tip: str) -> None:
        if self._kept is not None:
            self._context.book.remember_tip(self._kept, tip, self._request.conversation)

    def pause(self) -> None:
        if self._attempt is not None:
            self._attempt.pause()

    def resume(self) -> None:
        if self._attempt is not None:
            self._attempt.resume()

    async def _run(self) -> None:
        try:
            await self._work_through()
        except CancelledError:
            if self._stop_reason is None:
                self._report(Outcome(OutcomeKind.ABANDONED))
            else:
                self._report(Outcome(OutcomeKind.FAILURE, self._stop_reason))
        except ProxyError as error:
            self._report(Outcome(OutcomeKind.FAILURE, error))
        except Exception:  # noqa: BLE001 - the client must be told, whatever it was
            self._log.failure(
                "a turn failed by a fault of ours",
                type="internal_error",
                request_id=self._request.request_id,
            )
            self._report(Outcome(OutcomeKind.FAILURE, ProxyError(Failure.INTERNAL_ERROR)))

    async def _work_through(self) -> None:
        around, asked = self._context, self._request
        can = await around.probe.capabilities()
        asked = adapt(asked, can)
        self._request = await around.book.recognise(asked)
        if not await self._with_lease(can):
            # The session that was found is lost to this turn: another turn has moved it on, or the
            # CLI has no transcript of it any more.  The history is all there is.
            if self._stopped:
                raise CancelledError
            self._attempt = None
            self._request = replace(
                self._request,
                session_id=None,
                claimed=None,
                workspace=self._workspace,
                history=asked.history,
            )
            await self._with_lease(can)

    async def _with_lease(self, can: Capabilities) -> bool:
        """Run the turn; False if the session that was found for it is lost."""
        around, request = self._context, self._request
        servers = self._check(can)
        try:
            plan = await around.book.resolve(request, can)
        except ProxyError as error:
            if error.failure is Failure.SESSION_NOT_FOUND and request.claimed is not None:
                return False  # deleted since it was found
            raise
        self._workspace, self._lease_key = plan.workspace, plan.lease_key
        leases: list[Lease] = []
        slot: Slot | None = None
        try:
            acquire = around.leases.acquire
            leases.append(await self._wait("session", partial(acquire, plan.lease_key)))
            if plan.source_key is not None:
                leases.append(await self._wait("session", partial(acquire, plan.source_key)))
            slot = await self._wait("slot", around.capacity.acquire)
            if any(taken.waited for taken in leases):
                # What was read before may be old: the session has moved on meanwhile.
                if not await around.book.holds(request):
                    return False
                plan = await self._resolve_again(plan, can)
            self._attempt = Attempt(
                around,
                self._request,
                self._observer,
                can=can,
                servers=servers,
                plan=plan,
                leases=leases,
            )
            return await self._try(self._attempt)
        finally:
            if slot is not None:
                slot.release()
            for taken in leases:
                taken.release()

    async def _try(self, attempt: Attempt) -> bool:
        try:
            outcome = await attempt.perform()
            is_lost = self._is_lost(outcome)
            if not is_lost:
                self._report(outcome)
            await attempt.clear_away()
        finally:
            await attempt.forget_transcript()
        return not is_lost

    async def _wait(self, line: str, acquire: Callable[[float], Deferred[_T]]) -> _T:
        """Wait in a line; all that a request waits counts together."""
        clock = self._context.clock
        since = clock.seconds()
        got = acquire(self._patience)
        has_to_wait = not got.called
        try:
            return await got
        finally:
            waited = clock.seconds() - since
            self._patience -= waited
            if has_to_wait:
                self._log.info(
                    "the turn waited {waited_ms} ms for its {line}",
                    type="queue_left",
                    line=line,
                    waited_ms=_milliseconds(waited),
                    request_id=self._request.request_id,
                    session_id=self.session_id,
                )

    async def _resolve_again(self, plan: Plan, can: Capabilities) -> Plan:
        fresh = await self._context.book.resolve(self._request, can)
        if plan.source_key is None:
            return fresh
        # A fork's own id is made up anew each time: the one that is leased stays.
        return replace(plan, start=replace(fresh.start, session_id=plan.start.session_id))

    def _check(self, can: Capabilities) -> tuple[str, ...]:
        """Refuse what cannot be done, before anything is waited for; return the MCP servers."""
        request, settings = self._request, self._context.settings
        if request.workspace is not None:
            check_name(request.workspace)
        check_permissions(
            request,
            allowed=settings.allow_skip_permissions,
            is_root=os.geteuid() == 0,
            environment=settings.environment,
        )
        check_supported(request, can)
        return self._context.mcp.config.servers_for(request.mcp_tools)

    def _is_lost(self, outcome: Outcome) -> bool:
        """Whether the session that was found for the client, who named none, is no more."""
        return (
            outcome.error is not None
            and not self._stopped
            and outcome.error.failure is Failure.SESSION_NOT_FOUND
            and self._request.session_id is not None
            and self._asked.session_id is None
        )

    def _report(self, outcome: Outcome) -> None:
        """Tell the observer how it ended; only the first time counts."""
        if self._reported:
            return
        self._reported = True
        if self._kept is None:
            # Before the client hears of it: the next try is to find what this one has found.
            self._context.book.unclaim(self._request)
        figures = outcome.figures
        duration = self._context.clock.seconds() - self._request.received
        self._log.info(
            "turn ended: {outcome}",
            type="turn_end",
            outcome=outcome.code,
            process=None if self._attempt is None else self._attempt.process_kind,
            request_id=self._request.request_id,
            session_id=outcome.session_id or self.session_id,
            tenant=self._request.tenant,
            duration_ms=_milliseconds(duration),
            first_event_ms=_milliseconds(figures.first_event),
            first_token_ms=_milliseconds(figures.first_token),
            **outcome.totals,
        )
        self._observer.turn_ended(replace(outcome, interrupted=self._interrupted))


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
