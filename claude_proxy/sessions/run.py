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
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from twisted.internet.defer import CancelledError, Deferred, succeed
from zope.interface import implementer

from claude_proxy.cli import command, control, prompt, transcript
from claude_proxy.cli.outcomes import Outcome, OutcomeKind
from claude_proxy.cli.pairing import Pairing
from claude_proxy.cli.turn import Turn
from claude_proxy.cli.versions import Capabilities
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.interfaces import IRunningTurn, ITurnObserver
from claude_proxy.sessions import agents
from claude_proxy.sessions.book import Plan
from claude_proxy.sessions.capacity import Slot
from claude_proxy.sessions.context import RunContext
from claude_proxy.sessions.deferreds import branch
from claude_proxy.sessions.leases import Lease
from claude_proxy.sessions.policy import (
    adapt,
    check_permissions,
    check_supported,
    skips_permissions,
    turn_settings,
)
from claude_proxy.sessions.pool import Agent, Setup, can_be_set, changes, notice
from claude_proxy.sessions.turns import TurnRequest
from claude_proxy.sessions.workspaces import check_name

__all__ = ["Run"]

_T = TypeVar("_T")


@implementer(IRunningTurn)
class Run:
    """One turn on its way."""

    def __init__(self, context: RunContext, request: TurnRequest, observer: ITurnObserver) -> None:
        self.session_id: str | None = request.session_id
        self._context = context
        self._request = request
        self._observer = observer
        self._log = context.log
        self._work: Deferred[None] = Deferred()
        self._turn: Turn | None = None
        self._agents: list[Agent] = []
        self._kept: str | None = None
        self._log_context: dict[str, object] = {}
        self._stop_reason: ProxyError | None = None
        self._reported = False
        self._asked = request
        self._lost = self._unwanted = self._stopped = False
        self._lease_key: str | None = None
        self._patience = context.waiting_room.patience
        self._workspace: str | None = None
        self._transcript: Path | None = None

    def start(self) -> Deferred[None]:
        """Set out; the Deferred fires when all is over, and never fails."""
        self._work = Deferred.fromCoroutine(self._run())
        return self._work

    def is_on(self, session: str) -> bool:
        """Whether the turn has, or will have, the lease of this session."""
        return session in (self._kept, self._lease_key)

    def interrupt(self) -> Deferred[bool]:
        """
        Have the CLI end its turn with a result of its own.

        @return: fires with True when all of the turn is over; with False at once if none runs.
        """
        if self._turn is None or self._lost or not self._turn.interrupt():
            return succeed(False)
        over: Deferred[bool] = Deferred()
        branch(self._work).addCallback(lambda _: over.callback(True))
        return over

    def stop(self, reason: ProxyError | None) -> None:
        self._stopped = True
        if self._turn is not None and not self._lost:
            self._turn.stop(reason)
        elif not self._reported:
            self._stop_reason = reason
            if self._lost:
                self._unwanted = True  # its process leaves by itself; there is to be no second one
            else:
                self._work.cancel()

    def remember(self, tip: str) -> None:
        if self._kept is not None:
            self._context.book.remember_tip(self._kept, tip, self._request.conversation)

    def pause(self) -> None:
        if self._turn is not None:
            self._turn.pause()

    def resume(self) -> None:
        if self._turn is not None:
            self._turn.resume()

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
            if self._unwanted:
                raise CancelledError
            self._turn, self._lost = None, False
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
            leases.append(await self._wait(partial(around.leases.acquire, plan.lease_key)))
            if plan.source_key is not None:
                leases.append(await self._wait(partial(around.leases.acquire, plan.source_key)))
            slot = await self._wait(around.capacity.acquire)
            if any(taken.waited for taken in leases):
                # What was read before may be old: the session has moved on meanwhile.
                if not await around.book.holds(request):
                    return False
                plan = await self._resolve_again(plan, can)
            return await self._perform(plan, can, servers, leases)
        finally:
            if slot is not None:
                slot.release()
            for taken in leases:
                taken.release()

    async def _wait(self, acquire: Callable[[float], Deferred[_T]]) -> _T:
        """Wait in a line; all that a request waits counts together."""
        clock = self._context.clock
        since = clock.seconds()
        try:
            return await acquire(self._patience)
        finally:
            self._patience -= clock.seconds() - since

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

    async def _perform(
        self, plan: Plan, can: Capabilities, servers: tuple[str, ...], leases: list[Lease]
    ) -> bool:
        around, request = self._context, self._request
        self._tell_plan(plan)
        directory = await around.in_thread(around.workspaces.open, plan.workspace)
        key = command.LaunchKey(
            workspace=str(directory),
            model=request.model,
            disallowed_tools=request.disallowed_tools,
            max_turns=request.max_turns,
            skip_permissions=skips_permissions(request),
            mcp_servers=servers,
            max_output_tokens=request.max_output_tokens,
        )
        setup = Setup(
            key,
            cli=(*around.probe.resolve(), can.version),
            mcp=around.mcp.generation if servers else 0,
        )
        try:
            if can.live:
                around.spares.used(setup)
            outcome = await self._go_on(plan, setup, can, leases)
            if outcome is None:
                outcome = await self._begin_on_spare(plan, setup, can, leases)
            if outcome is None:
                around.book.planned(plan, request)
                plan = await self._tell_history(plan, key.workspace, can)
                outcome = await self._start_out(plan, setup, can, leases)
            self._lost = self._is_lost(outcome)
            if not self._lost:
                self._report(outcome)
            await self._clear_away()
            return not self._lost
        finally:
            if self._transcript is not None and self._kept is None:
                # No session has come of it.
                await around.files.remove(self._transcript)

    def _tell_plan(self, plan: Plan) -> None:
        self.session_id = plan.session_id
        self._observer.turn_planned(plan.session_id, plan.workspace, self._request.parameters)

    async def _begin_on_spare(
        self, plan: Plan, setup: Setup, can: Capabilities, leases: list[Lease]
    ) -> Outcome | None:
        """Run a new session's turn on a process that was started ahead; None if there is none."""
        is_new = plan.start.kind is command.StartKind.NEW and plan.record_id is None
        if not (is_new and can.live) or self._request.history:
            return None
        agent = await self._context.spares.take(setup)
        if agent is None:
            return None
        session_id = str(agent.cli_session)
        start = command.SessionStart(command.StartKind.NEW, session_id)
        spare_plan = replace(plan, session_id=session_id, lease_key=session_id, start=start)
        self._lease_key = session_id
        leases[0].add_key(session_id)
        self._tell_plan(spare_plan)
        self._context.book.planned(spare_plan, self._request)
        outcome = await self._run_turn(agent, spare_plan, can, leases)
        if not _died_unheard(outcome):
            return outcome
        await self._clear_away()
        self._lease_key = plan.lease_key
        self._tell_plan(plan)
        return None

    async def _go_on(
        self, plan: Plan, setup: Setup, can: Capabilities, leases: list[Lease]
    ) -> Outcome | None:
        """Run the turn on the session's live process; None if there is none, or no more."""
        pool = self._context.pool
        if plan.start.kind is not command.StartKind.RESUME or plan.lease_key not in pool:
            return None
        agent = pool.take(plan.lease_key, setup)
        if agent is not None and not can_be_set(agent, turn_settings(self._request), can):
            agent.process.finish()
            self._agents.append(agent)
            await self._clear_away()
            return None
        if agent is None:
            await pool.vacated(plan.lease_key)
            return None
        outcome = await self._run_turn(agent, plan, can, leases)
        if not _died_unheard(outcome):
            return outcome
        # It was dead already, or died before it took the message: nobody needs to know.
        await self._clear_away()
        return None

    async def _start_out(
        self, plan: Plan, setup: Setup, can: Capabilities, leases: list[Lease]
    ) -> Outcome:
        """Run the turn on a process of its own."""
        outcome = await self._start_and_run(plan, setup, can, leases)
        if _exists_already(outcome, plan):
            # It began, but the server was ended before that could be written down.
            start = command.SessionStart(command.StartKind.RESUME, plan.session_id)
            outcome = await self._start_and_run(replace(plan, start=start), setup, can, leases)
        return outcome

    async def _start_and_run(
        self, plan: Plan, setup: Setup, can: Capabilities, leases: list[Lease]
    ) -> Outcome:
        around = self._context
        self._log_context = {
            "request_id": self._request.request_id,
            "session_id": plan.session_id,
        }
        around.make_room()
        agent = await agents.start(
            around,
            setup,
            plan.start,
            turn_settings(self._request),
            can,
            reusable=can.live and around.pool.keeps,
            log_context=self._log_context,
        )
        return await self._run_turn(agent, plan, can, leases)

    async def _clear_away(self) -> None:
        """Wait until the processes that do not stay are gone, and remove what they leave."""
        leaving, self._agents = self._agents, []
        for agent in leaving:
            await agent.process.when_gone()
            await self._context.bury(agent)

    def _is_lost(self, outcome: Outcome) -> bool:
        """Whether the session that was found for the client, who named none, is no more."""
        return (
            outcome.error is not None
            and not self._stopped
            and outcome.error.failure is Failure.SESSION_NOT_FOUND
            and self._request.session_id is not None
            and self._asked.session_id is None
        )

    async def _tell_history(self, plan: Plan, workspace: str, can: Capabilities) -> Plan:
        """Tell a new session what was said before it."""
        request = self._request
        if not request.history or plan.start.kind is not command.StartKind.NEW:
            return plan
        if not can.transcripts:
            return self._as_context(plan)
        # Where the CLI makes ids of its own, this is the one that it resumes.
        session_id = plan.start.session_id or plan.lease_key
        try:
            self._transcript = await self._context.files.write_transcript(
                request.history, session_id, Path(workspace), can
            )
        except OSError as error:
            self._log.warn(
                "a transcript cannot be written: {error}; the conversation so far is told as one "
                "message",
                type="transcript_failed",
                error=error.strerror,
                request_id=request.request_id,
            )
            return self._as_context(plan)
        start = command.SessionStart(command.StartKind.RESUME, session_id)
        return replace(plan, start=start, record_id=plan.session_id)

    def _as_context(self, plan: Plan) -> Plan:
        """Tell what was said before at the head of the new message."""
        request = self._request
        told = transcript.as_context([(said.role, said.content) for said in request.history])
        self._request = replace(request, content=[*told, *request.blocks])
        return plan

    async def _run_turn(
        self, agent: Agent, plan: Plan, can: Capabilities, leases: list[Lease]
    ) -> Outcome:
        around, request = self._context, self._request
        settings = turn_settings(request)
        message_id = str(uuid4())
        keeps = can.live and around.pool.keeps
        self._agents.append(agent)
        self._turn = turn = Turn(
            around.clock,
            self._observer,
            around.settings.limits,
            requested=request.received,
            begun=lambda cli_id: self._begun(plan, leases, cli_id),
            noticed=lambda event: notice(agent, event),
            pairing=Pairing(
                message_id,
                fresh=agent.turns == 0,
                cautious=agent.is_restless or bool(agent.background),
                is_command=not request.literal and _is_command(request.blocks),
            ),
            totals=agent.totals,
            keeps=keeps,
        )
        process = agent.process
        process.attach(turn)
        process.describe(request_id=request.request_id, session_id=plan.session_id)
        self._log_context = process.log_context
        self._log_start(agent)
        if can.control and agent.turns == 0:
            process.request(
                "initialize",
                command.initialize_fields(settings, can),
                lambda answer: around.learn(can.version, answer),
            )
        for subtype, fields in changes(agent, settings, can):
            process.request(subtype, fields)
        content = prompt.literal(request.blocks, can) if request.literal else request.content
        turn.start(process, control.user_message(content, message_id))
        outcome = await turn.done
        agent.totals = turn.totals
        agent.turns += 1
        self._write_down(plan, leases, outcome, can)
        if keeps:
            self._keep_or_end(agent, outcome)
        return outcome

    def _keep_or_end(self, agent: Agent, outcome: Outcome) -> None:
        """After a turn that went well its process waits for the next one."""
        pool = self._context.pool
        stays = (
            outcome.kind in (OutcomeKind.SUCCESS, OutcomeKind.LIMIT)
            and self._kept is not None
            and outcome.session_id == self.session_id
            and pool.keeps
            and not agent.has_moved
            and not agent.process.ended
        )
        if stays and self._kept is not None:
            agent.cli_session = outcome.session_id
            self._agents.remove(agent)
            pool.park(agent, self._kept)
        elif outcome.result is not None:
            agent.process.finish()

    def _log_start(self, agent: Agent) -> None:
        self._log.info(
            "turn started in agent process {pid}",
            type="turn_start",
            pid=agent.process.pid,
            live=agent.turns > 0,
            request_id=self._request.request_id,
            session_id=self.session_id,
            tenant=self._request.tenant,
        )

    def _begun(self, plan: Plan, leases: list[Lease], cli_id: str | None) -> None:
        """The CLI has taken the message, and says under which id."""
        book, known_as = self._context.book, plan.start.session_id
        self.session_id = self._log_context["session_id"] = cli_id or plan.session_id
        if self.session_id is not None:
            self._kept = book.begun(plan, self._request, self.session_id)
            leases[0].add_key(self._kept)
            if known_as is not None and known_as != self.session_id:
                # Under the new id there is nothing to resume before the result.
                book.resumed_by(self._kept, known_as)
        for source_lease in leases[1:]:
            source_lease.release()

    def _write_down(
        self, plan: Plan, leases: list[Lease], outcome: Outcome, can: Capabilities
    ) -> None:
        """What the turn's end means for the session."""
        book = self._context.book
        # An old CLI keeps no transcript under an id that it took in the midst of a turn (/clear).
        kept_by_cli = can.session_id or outcome.session_id == self.session_id
        if outcome.result is not None and outcome.session_id is not None:
            if self._kept is None and outcome.error is None:
                self._begun(plan, leases, outcome.session_id)  # 1.0.24 clears without an init event
            elif (
                self._kept is not None
                and outcome.session_id != plan.start.session_id
                and kept_by_cli
            ):
                book.resumed_by(self._kept, outcome.session_id)
        if self._kept is not None:
            book.used(self._kept, self._request, outcome)

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
            request_id=self._request.request_id,
            session_id=outcome.session_id or self.session_id,
            tenant=self._request.tenant,
            duration_ms=_milliseconds(duration),
            first_event_ms=_milliseconds(figures.first_event),
            first_token_ms=_milliseconds(figures.first_token),
            **outcome.totals,
        )
        self._observer.turn_ended(outcome)


def _died_unheard(outcome: Outcome) -> bool:
    """Whether a process ended by itself before it said anything of its turn."""
    return (
        outcome.error is not None
        and outcome.error.failure is Failure.CLI_FAILED
        and outcome.result is None
        and outcome.figures.first_event is None
    )


def _is_command(blocks: list[dict[str, Any]]) -> bool:
    """Whether the CLI may take a message for a command, which it runs without its model."""
    return bool(blocks) and str(blocks[-1].get("text", "")).lstrip().startswith("/")


def _exists_already(outcome: Outcome, plan: Plan) -> bool:
    """Whether a session that was taken for new is known to the CLI."""
    return (
        plan.record_id is not None
        and plan.start.kind is command.StartKind.NEW
        and outcome.error is not None
        and "is already in use" in outcome.error.message
    )


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
