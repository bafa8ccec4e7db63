"""
One turn from its request to its end.

Each turn is one coroutine that goes through the same rooms in the same order: what the CLI can do,
whether it is allowed, which session, the lease, the workspace, the process, the turn, the process's
end.  Whatever happens on the way becomes one outcome for the observer, and the lease is given back
last, when nothing writes to the session any more.
"""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from twisted.internet.defer import CancelledError, Deferred
from zope.interface import implementer

from claude_proxy.cli import command, control, prompt, transcript
from claude_proxy.cli.outcomes import Outcome, OutcomeKind
from claude_proxy.cli.process import AgentProcess
from claude_proxy.cli.turn import Turn
from claude_proxy.cli.versions import Capabilities
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.interfaces import IRunningTurn, ITurnObserver
from claude_proxy.sessions.book import Plan
from claude_proxy.sessions.context import COME_BACK, RunContext
from claude_proxy.sessions.leases import Lease
from claude_proxy.sessions.policy import adapt, check_permissions, check_supported, turn_settings
from claude_proxy.sessions.turns import TurnRequest
from claude_proxy.sessions.workspaces import check_name

__all__ = ["Run"]


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
        self._agents: list[tuple[AgentProcess, str]] = []
        self._kept: str | None = None
        self._log_context: dict[str, object] = {}
        self._stop_reason: ProxyError | None = None
        self._reported = False
        self._asked = request
        self._lost = self._unwanted = False
        self._workspace: str | None = None
        self._transcript: Path | None = None

    def start(self) -> Deferred[None]:
        """Set out; the Deferred fires when all is over, and never fails."""
        self._work = Deferred.fromCoroutine(self._run())
        return self._work

    def stop(self, reason: ProxyError | None) -> None:
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
        plan = await around.book.resolve(request, can)
        self._workspace = plan.workspace
        leases = []
        try:
            lease = await around.leases.acquire(plan.lease_key)
            leases.append(lease)
            if plan.source_key is not None:
                leases.append(await around.leases.acquire(plan.source_key))
            if any(taken.waited for taken in leases):
                # What was read before may be old: the session has moved on meanwhile.
                if not await around.book.holds(request):
                    return False
                plan = await self._resolve_again(plan, can)
            return await self._perform(plan, can, servers, leases)
        finally:
            for taken in leases:
                taken.release()

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
        self.session_id = plan.session_id
        self._observer.turn_planned(plan.session_id, plan.workspace, request.parameters)
        directory = await around.in_thread(around.workspaces.open, plan.workspace)
        around.book.planned(plan, request)
        key = command.LaunchKey(
            workspace=str(directory),
            model=request.model,
            disallowed_tools=request.disallowed_tools,
            max_turns=request.max_turns,
            skip_permissions=request.skip_permissions,
            mcp_servers=servers,
            max_output_tokens=request.max_output_tokens,
        )
        plan = await self._tell_history(plan, key.workspace, can)
        mcp_file = await self._write_mcp_file(servers)
        try:
            outcome = await self._run_turn(plan, key, can, mcp_file, leases)
            if _exists_already(outcome, plan):
                # It began, but the server was ended before that could be written down.
                start = command.SessionStart(command.StartKind.RESUME, plan.session_id)
                outcome = await self._run_turn(
                    replace(plan, start=start), key, can, mcp_file, leases
                )
            self._lost = self._is_lost(outcome)
            if not self._lost:
                self._report(outcome)
            for agent, marker in self._agents:
                await agent.when_gone()
                around.sweeper.sweep(marker)
            self._agents = []
            return not self._lost
        finally:
            if mcp_file is not None:
                await around.files.remove(mcp_file)
            if self._transcript is not None and self._kept is None:
                # No session has come of it.
                await around.files.remove(self._transcript)

    def _is_lost(self, outcome: Outcome) -> bool:
        """Whether the session that was found for the client, who named none, is no more."""
        return (
            outcome.error is not None
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

    async def _write_mcp_file(self, servers: tuple[str, ...]) -> Path | None:
        if not servers:
            return None
        try:
            return await self._context.files.write_mcp(
                self._context.mcp.config.subset_json(servers)
            )
        except OSError as error:
            if error.errno in _EXHAUSTED:
                raise _not_started(error) from error
            raise

    async def _run_turn(
        self,
        plan: Plan,
        key: command.LaunchKey,
        can: Capabilities,
        mcp_file: Path | None,
        leases: list[Lease],
    ) -> Outcome:
        around, request = self._context, self._request
        settings = turn_settings(request)
        self._log_context = {"request_id": request.request_id, "session_id": plan.session_id}
        turn = Turn(
            around.clock,
            self._observer,
            around.settings.limits,
            requested=request.received,
            begun=lambda cli_id: self._begun(plan, leases, cli_id),
        )
        agent = AgentProcess(
            around.clock,
            turn,
            has_control=can.control,
            kill_timeout=around.settings.kill_timeout,
            line_limit=around.settings.line_limit,
            log_context=self._log_context,
        )
        argv = command.build_argv(
            around.probe.resolve(),
            key,
            settings,
            plan.start,
            can,
            mcp_config=str(mcp_file) if mcp_file is not None else None,
            hooks=around.settings.workspace_hooks,
        )
        self._spawn(agent, argv, key.workspace)
        self._turn = turn
        if can.control:
            agent.request(
                "initialize",
                command.initialize_fields(settings, can),
                lambda answer: around.learn(can.version, answer),
            )
        content = prompt.literal(request.blocks, can) if request.literal else request.content
        turn.start(agent, control.user_message(content, str(uuid4())))
        outcome = await turn.done
        self._write_down(plan, leases, outcome, can)
        return outcome

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
            book.used(self._kept, self._request)

    def _spawn(self, agent: AgentProcess, argv: list[str], workspace: str) -> None:
        around, request = self._context, self._request
        marker = around.next_marker()
        full = [*command.launch_prefix(workspace), *argv]
        environment: Any = command.build_environment(
            around.settings.environment, marker, max_output_tokens=request.max_output_tokens
        )
        try:
            around.reactor.spawnProcess(agent, full[0], full, env=environment)
        except OSError as error:
            raise _not_started(error) from error
        self._agents.append((agent, marker))
        self._log.info(
            "turn started in agent process {pid}",
            type="turn_start",
            pid=agent.pid,
            request_id=request.request_id,
            session_id=self.session_id,
            tenant=request.tenant,
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
            request_id=self._request.request_id,
            session_id=outcome.session_id or self.session_id,
            tenant=self._request.tenant,
            duration_ms=_milliseconds(duration),
            first_event_ms=_milliseconds(figures.first_event),
            first_token_ms=_milliseconds(figures.first_token),
            **outcome.totals,
        )
        self._observer.turn_ended(outcome)


_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)


def _not_started(error: OSError) -> ProxyError:
    """Why the system could not start a process, in our words."""
    if error.errno in _EXHAUSTED:
        message = (
            f"The server cannot start another process now ({error.strerror}). Try again a little "
            "later; its administrator may raise the limits of descriptors, processes or memory."
        )
        return ProxyError(Failure.SERVER_BUSY, message, retry_after=COME_BACK)
    message = f"{Failure.CLI_NOT_FOUND.sentence} The system said: {error.strerror}"
    return ProxyError(Failure.CLI_NOT_FOUND, message)


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
