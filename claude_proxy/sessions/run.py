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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import uuid4

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorProcess, IReactorThreads, IReactorTime
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from zope.interface import implementer

from claude_proxy.cli import command, control
from claude_proxy.cli.outcomes import Outcome, OutcomeKind
from claude_proxy.cli.probe import CliProbe
from claude_proxy.cli.process import AgentProcess
from claude_proxy.cli.sweep import Sweeper
from claude_proxy.cli.turn import Limits, Turn
from claude_proxy.cli.versions import Capabilities
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.interfaces import IRunningTurn, ITurnObserver
from claude_proxy.sessions.book import Plan, SessionBook
from claude_proxy.sessions.leases import Lease, Leases
from claude_proxy.sessions.mcp import McpServers
from claude_proxy.sessions.policy import check_permissions
from claude_proxy.sessions.turns import TurnRequest
from claude_proxy.sessions.workspaces import Workspaces, check_name

__all__ = ["COME_BACK", "Run", "RunContext", "RunSettings"]

_T = TypeVar("_T")

COME_BACK = 5
"""Seconds after which a client may try again what the server could not do just now."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """
    What a run needs to know of the settings.

    @ivar environment: what agent processes see, before our marker.
    @ivar line_limit: longest line accepted from an agent process, in bytes.
    @ivar run_directory: a private directory of this run, for files that agent processes read.
    @ivar marker: the beginning of the marker of every agent process of this run.
    """

    limits: Limits
    kill_timeout: float
    line_limit: int
    environment: Mapping[str, str]
    allow_skip_permissions: bool
    workspace_hooks: bool
    run_directory: Path
    marker: str


class RunContext:
    """What all runs share: the settings, and those who do the work."""

    log = Logger(namespace="claude_proxy.sessions")

    def __init__(
        self,
        reactor: IReactorProcess,
        clock: IReactorTime,
        settings: RunSettings,
        *,
        book: SessionBook,
        leases: Leases,
        workspaces: Workspaces,
        mcp: McpServers,
        probe: CliProbe,
        sweeper: Sweeper,
    ) -> None:
        self.reactor = reactor
        self.clock = clock
        self.settings = settings
        self.book = book
        self.leases = leases
        self.workspaces = workspaces
        self.mcp = mcp
        self.probe = probe
        self.sweeper = sweeper
        self._processes_started = 0

    def next_marker(self) -> str:
        """The marker of the next agent process; no two are the same."""
        self._processes_started += 1
        return f"{self.settings.marker}.{self._processes_started}"

    async def in_thread(self, function: Callable[..., _T], *args: object) -> _T:
        """Run what may block."""
        pool = cast(Any, self.reactor).getThreadPool()
        result: _T = await deferToThreadPool(
            cast(IReactorThreads, self.reactor), pool, function, *args
        )
        return result


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

    def start(self) -> Deferred[None]:
        """Set out; the Deferred fires when all is over, and never fails."""
        self._work = Deferred.fromCoroutine(self._run())
        return self._work

    def stop(self, reason: ProxyError | None) -> None:
        if self._turn is not None:
            self._turn.stop(reason)
        elif not self._reported:
            self._stop_reason = reason
            self._work.cancel()

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
        around, request = self._context, self._request
        can = await around.probe.capabilities()
        servers = self._check(can)
        plan = await around.book.resolve(request, can)
        leases = []
        try:
            lease = await around.leases.acquire(plan.lease_key)
            leases.append(lease)
            if plan.source_key is not None:
                leases.append(await around.leases.acquire(plan.source_key))
            if any(taken.waited for taken in leases):
                # What was read before may be old: the session has moved on meanwhile.
                plan = await self._resolve_again(plan, can)
            await self._perform(plan, can, servers, leases)
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
        command.check_supported(
            self._turn_settings(), can, partial_messages=request.partial_messages
        )
        command.check_rules("allowed-tools", request.allowed_tools, can)
        command.check_rules("disallowed-tools", request.disallowed_tools, can)
        return self._context.mcp.config.servers_for(request.mcp_tools)

    def _turn_settings(self) -> command.TurnSettings:
        request = self._request
        return command.TurnSettings(
            allowed_tools=(*request.allowed_tools, *request.mcp_tools),
            permission_mode=request.permission_mode,
            effort=request.effort,
            system_prompt=request.system_prompt,
            append_system_prompt=request.append_system_prompt,
            json_schema=request.json_schema,
        )

    async def _perform(
        self, plan: Plan, can: Capabilities, servers: tuple[str, ...], leases: list[Lease]
    ) -> None:
        around, request = self._context, self._request
        self.session_id = plan.session_id
        self._observer.turn_planned(plan.session_id)
        directory = await around.in_thread(around.workspaces.open, plan.workspace)
        around.book.planned(plan, request)
        key = command.LaunchKey(
            workspace=str(directory),
            model=request.model,
            disallowed_tools=request.disallowed_tools,
            max_turns=request.max_turns,
            skip_permissions=request.skip_permissions,
            mcp_servers=servers,
        )
        mcp_file = await self._write_mcp_file(servers)
        try:
            outcome = await self._run_turn(plan, key, can, mcp_file, leases)
            if _exists_already(outcome, plan):
                # It began, but the server was ended before that could be written down.
                start = command.SessionStart(command.StartKind.RESUME, plan.session_id)
                outcome = await self._run_turn(
                    replace(plan, start=start), key, can, mcp_file, leases
                )
            self._report(outcome)
            for agent, marker in self._agents:
                await agent.when_gone()
                around.sweeper.sweep(marker)
        finally:
            if mcp_file is not None:
                await around.in_thread(_remove, mcp_file)

    async def _write_mcp_file(self, servers: tuple[str, ...]) -> Path | None:
        """The servers' configuration holds secrets: in a private file, argv is public."""
        if not servers:
            return None
        path = self._context.settings.run_directory / f"mcp-{uuid4().hex}.json"
        text = self._context.mcp.config.subset_json(servers)
        written: Deferred[None] = Deferred()

        def over(result: Any) -> Deferred[None] | None:
            if written.called:
                # The turn was stopped meanwhile, and its thread has written all the same.
                return Deferred.fromCoroutine(self._context.in_thread(_remove, path))
            written.callback(result)
            return None

        writing = self._context.in_thread(_write_private, path, text)
        Deferred.fromCoroutine(writing).addBoth(over)
        try:
            await written
        except OSError as error:
            if error.errno in _EXHAUSTED:
                raise _not_started(error) from error
            raise
        return path

    async def _run_turn(
        self,
        plan: Plan,
        key: command.LaunchKey,
        can: Capabilities,
        mcp_file: Path | None,
        leases: list[Lease],
    ) -> Outcome:
        around, request = self._context, self._request
        settings = self._turn_settings()
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
            agent.request("initialize", command.initialize_fields(settings, can))
        turn.start(agent, control.user_message(request.content, str(uuid4())))
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
        environment: Any = command.build_environment(around.settings.environment, marker)
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


def _write_private(path: Path, text: bytes) -> None:
    """Blocks."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
    except OSError:
        _remove(path)  # what a full disk has taken of it may be a secret
        raise


def _remove(path: Path) -> None:
    """Blocks."""
    path.unlink(missing_ok=True)
