"""
One try at a turn: the process it runs on, and what becomes of that.

Whoever makes it holds the leases.  It uses the session's live process, a spare or a process of its
own, in this order; one that is found dead, or dies before it says anything, is replaced by the next
kind, and nobody needs to know.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum, auto
from functools import partial
from pathlib import Path
from uuid import uuid4

from twisted.internet.defer import CancelledError

from claude_proxy.cli import command, control, prompt
from claude_proxy.cli.events import Event
from claude_proxy.cli.outcomes import Outcome, OutcomeKind, died_unheard
from claude_proxy.cli.pairing import Pairing
from claude_proxy.cli.turn import Turn
from claude_proxy.cli.versions import Capabilities
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.interfaces import ITurnObserver
from claude_proxy.sessions import agents
from claude_proxy.sessions.book import Plan
from claude_proxy.sessions.context import RunContext
from claude_proxy.sessions.leases import Lease
from claude_proxy.sessions.policy import skips_permissions, turn_settings
from claude_proxy.sessions.pool import Agent, Setup, can_be_set, changes, notice
from claude_proxy.sessions.retelling import retell
from claude_proxy.sessions.turns import TurnRequest

__all__ = ["Attempt"]

_LONGEST = 500
"""Characters of what the CLI says of a refusal."""


class _State(Enum):
    PREPARING = auto()
    """Nothing of it is at work: whoever waits for it may cancel it."""
    RUNNING = auto()
    """An agent process has the message."""
    CLEARING = auto()
    """Processes are leaving; they are waited for, whatever happens."""


class Attempt:
    """
    One try at a turn.

    @ivar session_id: of the session, as the client knows it, as far as it is known.
    @ivar kept: the id under which the session is kept, once the CLI has taken the message.
    @ivar lease_key: the name under which it is leased.
    @ivar process_kind: ``live``, ``spare`` or ``new``: what it runs on, once it runs.
    """

    def __init__(
        self,
        context: RunContext,
        request: TurnRequest,
        observer: ITurnObserver,
        *,
        can: Capabilities,
        servers: tuple[str, ...],
        plan: Plan,
        leases: list[Lease],
    ) -> None:
        """
        @param servers: the MCP servers that the turn may use.
        @param leases: of the session; and, where it begins as a fork, of its source.
        """
        self.session_id = plan.session_id
        self.kept: str | None = None
        self.lease_key = plan.lease_key
        self.process_kind: str | None = None
        self._context = context
        self._request = request
        self._observer = observer
        self._log = context.log
        self._can = can
        self._servers = servers
        self._plan = plan
        self._leases = leases
        self._state = _State.PREPARING
        self._is_unwanted = False
        self._turn: Turn | None = None
        self._agents: list[Agent] = []
        self._log_context: dict[str, object] = {}
        self._transcript: Path | None = None

    async def perform(self) -> Outcome:
        """
        Run the turn; what it leaves is for `clear_away` and `forget_transcript`.

        @raise ProxyError: no process could be started, or the workspace cannot be used.
        """
        around, plan, can = self._context, self._plan, self._can
        self._tell_plan(plan)
        # A live process holds its directory: while that is in its place, it need not be looked for.
        directory = around.pool.directory(plan.lease_key) or str(
            await around.in_thread(around.workspaces.open, plan.workspace)
        )
        setup = self._setup(directory)
        if can.live:
            around.spares.used(setup)
        outcome = await self._go_on(plan, setup)
        if outcome is None:
            outcome = await self._begin_on_spare(plan, setup)
            plan = self._plan
        if outcome is None:
            around.book.planned(plan, self._request)
            plan = await self._retell(plan, setup.key.workspace)
            outcome = await self._start_out(plan, setup)
        return outcome

    async def clear_away(self) -> None:
        """Wait until the processes that do not stay are gone, and remove what they leave."""
        self._state = _State.CLEARING
        leaving, self._agents = self._agents, []
        for agent in leaving:
            await agent.process.when_gone()
            await self._context.bury(agent)

    async def _make_way(self) -> None:
        """
        Be rid of one process before the next is tried.

        @raise CancelledError: meanwhile the turn was stopped.
        """
        await self.clear_away()
        self._state = _State.PREPARING
        if self._is_unwanted:
            raise CancelledError

    async def forget_transcript(self) -> None:
        """Remove the history that was told to a session of which nothing has come."""
        if self._transcript is not None and self.kept is None:
            await self._context.files.remove(self._transcript)

    # What may be done to it from outside.

    def stop(self, reason: ProxyError | None) -> bool:
        """
        End it now; None stands for a client that has left.

        @return: False if nothing is at work yet: whoever waits for it is to cancel it.
        """
        if self._state is _State.RUNNING and self._turn is not None:
            self._turn.stop(reason)
            return True
        self._is_unwanted = True
        return self._state is _State.CLEARING

    def interrupt(self) -> bool:
        """Ask the CLI to end the turn with a result; False if no turn runs."""
        return self._turn is not None and self._turn.interrupt()

    def pause(self) -> None:
        """Read nothing from the process: the client is slow."""
        if self._turn is not None:
            self._turn.pause()

    def resume(self) -> None:
        """Read on."""
        if self._turn is not None:
            self._turn.resume()

    # Which process.

    def _setup(self, workspace: str) -> Setup:
        around, request = self._context, self._request
        key = command.LaunchKey(
            workspace=workspace,
            model=request.model,
            disallowed_tools=request.disallowed_tools,
            max_turns=request.max_turns,
            skip_permissions=skips_permissions(request),
            mcp_servers=self._servers,
            max_output_tokens=request.max_output_tokens,
        )
        return Setup(
            key,
            cli=(*around.probe.resolve(), self._can.version),
            mcp=around.mcp.generation if self._servers else 0,
        )

    def _tell_plan(self, plan: Plan) -> None:
        self.session_id = plan.session_id
        self._observer.turn_planned(plan.session_id, plan.workspace, self._request.parameters)

    async def _go_on(self, plan: Plan, setup: Setup) -> Outcome | None:
        """Run the turn on the session's live process; None if there is none, or no more."""
        pool = self._context.pool
        if plan.start.kind is not command.StartKind.RESUME:
            return None
        agent = pool.take(plan.lease_key, setup)
        if agent is not None and not can_be_set(agent, turn_settings(self._request), self._can):
            agent.process.finish()
            self._agents.append(agent)
            await self._make_way()
            return None
        if agent is None:
            # Also if it was ended for another reason: while it leaves, it may still write.
            await pool.vacated(plan.lease_key)
            return None
        outcome = await self._run_turn(agent, plan)
        if not died_unheard(outcome):
            return outcome
        # It was dead already, or died before it took the message: nobody needs to know.
        await self._make_way()
        return None

    async def _begin_on_spare(self, plan: Plan, setup: Setup) -> Outcome | None:
        """Run a new session's turn on a process that was started ahead; None if there is none."""
        is_new = plan.start.kind is command.StartKind.NEW and plan.record_id is None
        if not (is_new and self._can.live) or self._request.history:
            return None
        agent = await self._context.spares.take(setup)
        if agent is None:
            return None
        session_id = str(agent.cli_session)
        start = command.SessionStart(command.StartKind.NEW, session_id)
        plan = replace(plan, session_id=session_id, lease_key=session_id, start=start)
        self._plan, self.lease_key = plan, session_id
        self._leases[0].add_key(session_id)
        self._tell_plan(plan)
        self._context.book.planned(plan, self._request)
        outcome = await self._run_turn(agent, plan)
        if not died_unheard(outcome):
            return outcome
        # Its session is known by now: the next process begins that one.
        await self._make_way()
        return None

    async def _start_out(self, plan: Plan, setup: Setup) -> Outcome:
        """Run the turn on a process of its own."""
        outcome = await self._start_and_run(plan, setup)
        if died_unheard(outcome) and not self._can.control:
            # 1.0.24 ends at once if another process is just writing the configuration that they
            # share, as those do that are started at the same time.
            await self._make_way()
            outcome = await self._start_and_run(plan, setup)
        if _exists_already(outcome, plan):
            # It began, but the server was ended before that could be written down.
            await self._make_way()
            start = command.SessionStart(command.StartKind.RESUME, plan.session_id)
            outcome = await self._start_and_run(replace(plan, start=start), setup)
        return outcome

    async def _start_and_run(self, plan: Plan, setup: Setup) -> Outcome:
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
            self._can,
            reusable=self._can.live and around.pool.keeps,
            log_context=self._log_context,
        )
        return await self._run_turn(agent, plan)

    async def _retell(self, plan: Plan, workspace: str) -> Plan:
        """Tell a new session what was said before it."""
        if not self._request.history or plan.start.kind is not command.StartKind.NEW:
            return plan
        told = await retell(self._context, self._request, plan, Path(workspace), self._can)
        self._request, self._transcript = told.request, told.transcript
        return told.plan

    # The turn on it.

    async def _run_turn(self, agent: Agent, plan: Plan) -> Outcome:
        around, request, can = self._context, self._request, self._can
        settings = turn_settings(request)
        message_id = str(uuid4())
        keeps = can.live and around.pool.keeps
        self._agents.append(agent)
        self._turn = turn = Turn(
            around.clock,
            self._observer,
            around.settings.limits,
            requested=request.received,
            begun=lambda cli_id: self._begun(plan, cli_id),
            noticed=partial(self._noticed, agent),
            pairing=Pairing(
                message_id,
                fresh=agent.turns == 0,
                cautious=agent.is_restless or bool(agent.background),
                is_command=not request.literal and prompt.may_be_command(request.blocks),
            ),
            totals=agent.totals,
            keeps=keeps,
        )
        process = agent.process
        process.attach(turn)
        process.describe(request_id=request.request_id, session_id=plan.session_id)
        self._log_context = process.log_context
        is_spare = process.purpose == "spare"
        self.process_kind = "live" if agent.turns else "spare" if is_spare else "new"
        if can.control and agent.turns == 0:
            fields = command.initialize_fields(settings, can)
            process.request("initialize", fields, partial(self._greeted, turn, bool(fields)))
        for subtype, fields in changes(agent, settings, can):
            process.request(subtype, fields, partial(self._is_set, turn))
        content = prompt.literal(request.blocks, can) if request.literal else request.content
        self._state = _State.RUNNING
        turn.start(process, control.user_message(content, message_id))
        self._log_start(agent)
        outcome = await turn.done
        self._state = _State.CLEARING
        agent.totals = turn.totals
        agent.turns += 1
        self._write_down(plan, outcome)
        if turn.may_be_taken:
            self._may_have_moved_on()
        if keeps:
            self._keep_or_end(agent, outcome)
        return outcome

    def _greeted(self, turn: Turn, has_settings: bool, answer: control.ControlAnswer) -> None:
        self._context.learn(self._can.version, answer)
        if has_settings:
            self._is_set(turn, answer)

    def _is_set(self, turn: Turn, answer: control.ControlAnswer) -> None:
        """A turn does not run without what it asked for: it might do what it was not to do."""
        if answer.error is not None:
            message = f"The Claude CLI refused a setting of this turn: {answer.error[:_LONGEST]}"
            turn.stop(ProxyError(Failure.CLI_FAILED, message))

    def _may_have_moved_on(self) -> None:
        """The session may have heard the message; nobody may find it by its history any more."""
        record_id, start = self._plan.record_id, self._plan.start
        if record_id is not None and start.kind is command.StartKind.RESUME and start.session_id:
            self._context.book.resumed_by(record_id, start.session_id)

    def _noticed(self, agent: Agent, event: Event) -> None:
        if event.type == "result":
            self._context.went_on(agent, event)
        else:
            notice(agent, event)

    def _keep_or_end(self, agent: Agent, outcome: Outcome) -> None:
        """After a turn that went well its process waits for the next one."""
        pool = self._context.pool
        stays = (
            outcome.kind in (OutcomeKind.SUCCESS, OutcomeKind.LIMIT)
            and self.kept is not None
            and outcome.session_id == self.session_id
            and pool.keeps
            and not agent.has_moved
            and not agent.process.ended
        )
        if stays and self.kept is not None:
            agent.cli_session = outcome.session_id
            self._agents.remove(agent)
            pool.park(agent, self.kept)
        elif outcome.result is not None:
            agent.process.finish()

    def _log_start(self, agent: Agent) -> None:
        self._log.info(
            "turn started in agent process {pid}",
            type="turn_start",
            pid=agent.process.pid,
            process=self.process_kind,
            request_id=self._request.request_id,
            session_id=self.session_id,
            tenant=self._request.tenant,
        )

    def _begun(self, plan: Plan, cli_id: str | None) -> None:
        """The CLI has taken the message, and says under which id."""
        book, known_as = self._context.book, plan.start.session_id
        self.session_id = self._log_context["session_id"] = cli_id or plan.session_id
        if self.session_id is not None:
            self.kept = book.begun(plan, self._request, self.session_id)
            self._leases[0].add_key(self.kept)
            if known_as is not None and known_as != self.session_id:
                # Under the new id there is nothing to resume before the result.
                book.resumed_by(self.kept, known_as)
        for source_lease in self._leases[1:]:
            source_lease.release()

    def _write_down(self, plan: Plan, outcome: Outcome) -> None:
        """What the turn's end means for the session."""
        book = self._context.book
        # An old CLI keeps no transcript under an id that it took in the midst of a turn (/clear).
        kept_by_cli = self._can.session_id or outcome.session_id == self.session_id
        if outcome.result is not None and outcome.session_id is not None:
            if self.kept is None and outcome.error is None:
                self._begun(plan, outcome.session_id)  # 1.0.24 clears without an init event
            elif (
                self.kept is not None
                and outcome.session_id != plan.start.session_id
                and kept_by_cli
            ):
                book.resumed_by(self.kept, outcome.session_id)
        if self.kept is not None:
            book.used(self.kept, self._request, outcome)


def _exists_already(outcome: Outcome, plan: Plan) -> bool:
    """Whether a session that was taken for new is known to the CLI."""
    return (
        plan.record_id is not None
        and plan.start.kind is command.StartKind.NEW
        and outcome.error is not None
        and "is already in use" in outcome.error.message
    )
