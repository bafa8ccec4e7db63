"""A turn's way from a request to an agent process and back, with a child that the test plays."""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorProcess
from twisted.logger import capturedLogs
from zope.interface import implementer
from zope.interface.verify import verifyObject

from claude_proxy.cli.command import MARKER
from claude_proxy.cli.events import Event
from claude_proxy.cli.outcomes import Outcome, OutcomeKind
from claude_proxy.cli.probe import CliProbe
from claude_proxy.cli.sweep import Sweeper
from claude_proxy.cli.turn import Limits
from claude_proxy.cli.versions import Capabilities, capabilities_of
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.interfaces import IRunningTurn, ITurnObserver
from claude_proxy.sessions.book import SessionBook
from claude_proxy.sessions.context import RunContext, RunSettings
from claude_proxy.sessions.executor import Executor
from claude_proxy.sessions.mcp import McpServers
from claude_proxy.sessions.turns import TurnRequest
from claude_proxy.sessions.waiting import WaitingRoom
from claude_proxy.sessions.workspaces import Workspaces
from tests.support import FakeChild, FakeReactor, inline_store, result_of

OLD = capabilities_of("1.0.24")
NEW = capabilities_of("2.1.197")
MCP = '{"mcpServers":{"git":{"command":"git-mcp","env":{"TOKEN":"very-secret"}}}}'

ASK = TurnRequest(content="hello", tenant="alice", request_id="req_1", received=0.0)
A = "aaaaaaaa-0000-4000-8000-000000000000"


@implementer(ITurnObserver)
class Observer:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.planned: list[str | None] = []
        self.events: list[str] = []
        self.outcomes: list[Outcome] = []

    def turn_planned(
        self, session_id: str | None, workspace: str | None, parameters: Mapping[str, object]
    ) -> None:
        self.planned.append(session_id)

    def turn_events(self, events: list[Event]) -> None:
        assert not self.outcomes, "the outcome comes last"
        self.events += [event.subtype or event.type for event in events]

    def turn_ended(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    @property
    def outcome(self) -> Outcome:
        assert len(self.outcomes) == 1, "exactly one"
        return self.outcomes[0]

    @property
    def failure(self) -> Failure:
        assert self.outcome.kind is OutcomeKind.FAILURE
        assert self.outcome.error is not None
        return self.outcome.error.failure


class Probe(CliProbe):
    """A CLI whose version is known."""

    def __init__(self, reactor: Any, can: Capabilities) -> None:
        super().__init__(reactor, reactor, ["claude"], {})
        self.can: Capabilities | ProxyError = can

    def resolve(self) -> list[str]:
        return ["/opt/claude"]

    async def capabilities(self) -> Capabilities:
        if isinstance(self.can, ProxyError):
            raise self.can
        return self.can


class SweepList(Sweeper):
    """Only remembers what is to be swept."""

    def __init__(self, reactor: Any) -> None:
        super().__init__(reactor, reactor)
        self.swept: list[str] = []
        self.finished: Deferred[None] | None = None

    def sweep(self, marker: str) -> None:
        self.swept.append(marker)

    async def finish(self) -> None:
        if self.finished is not None:
            await self.finished


class World:
    """An executor with all that it needs."""

    def __init__(
        self,
        folder: Path,
        can: Capabilities = NEW,
        *,
        live: int = 0,
        spares: int = 0,
        turns: int = 16,
        workspace_hooks: bool = False,
        **environment: str,
    ) -> None:
        self.reactor = FakeReactor()
        self.run_directory = folder / "run"
        self.run_directory.mkdir(mode=0o700)
        (folder / "mcp.json").write_text(MCP)
        self.base = folder / "base"
        self.store = inline_store()
        self.probe = Probe(self.reactor, can)
        self.sweeper = SweepList(self.reactor)
        self.context = RunContext(
            cast(IReactorProcess, self.reactor),
            self.reactor,
            RunSettings(
                limits=Limits(total=100, inactivity=50),
                kill_timeout=5,
                line_limit=1024 * 1024,
                environment={"PATH": "/usr/bin:relative", "HOME": "/root"} | environment,
                allow_skip_permissions=True,
                workspace_hooks=workspace_hooks,
                run_directory=self.run_directory,
                marker="state.run",
                concurrent_turns=turns,
                starts_at_once=8,
                spare_processes=spares,
                live_sessions=live,
                live_idle=300,
            ),
            book=SessionBook(self.store, adopt_unknown=False, now=lambda: 1000.0),
            waiting_room=WaitingRoom(2, 30),
            workspaces=Workspaces(self.base),
            mcp=McpServers(folder / "mcp.json", named=True),
            probe=self.probe,
            sweeper=self.sweeper,
        )
        self.leases = self.context.leases
        self.executor = Executor(self.context)

    def ask(self, **fields: Any) -> tuple[IRunningTurn, Observer]:
        observer = Observer()
        turn = self.executor.run(replace(ASK, **fields), observer)
        self.reactor.advance(0)  # starts are paced: the next one may begin
        return turn, observer

    @property
    def children(self) -> list[FakeChild]:
        return self.reactor.children

    def finish(self, child: FakeChild, session: str) -> None:
        """Let a child do its turn and leave."""
        child.says(init(session), result(session))
        assert child.stdin_closed
        child.exits()
        self.reactor.advance(0)

    def session(self) -> str:
        """Begin a session, end its first turn, and say its id."""
        _, observer = self.ask()
        session = observer.planned[0] or A
        self.finish(self.children[-1], session)
        return session

    def is_idle(self) -> bool:
        """Whether nothing is held, awaited, scheduled or left in the run directory."""
        self.reactor.advance(0)
        return (
            self.executor.running == self.leases.held == self.leases.waiting == 0
            and not self.reactor.getDelayedCalls()
            and not list(self.run_directory.iterdir())
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def old_world(tmp_path: Path) -> World:
    return World(tmp_path, OLD)


@pytest.fixture(autouse=True)
def signals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The signals that were sent to process groups."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "killpg", lambda group, number: sent.append((group, number)))
    return sent


def init(session: str) -> dict[str, Any]:
    return {"type": "system", "subtype": "init", "session_id": session}


def result(session: str, **fields: Any) -> dict[str, Any]:
    success = {"type": "result", "subtype": "success", "is_error": False, "result": "done"}
    return {**success, "session_id": session, **fields}


def text(said: str = "hi") -> dict[str, Any]:
    return {"type": "assistant", "message": {"content": [{"type": "text", "text": said}]}}


def user_message(child: FakeChild) -> dict[str, Any]:
    [message] = [line for line in child.lines if line["type"] == "user"]
    return message


def option(child: FakeChild, name: str) -> str | None:
    found = [word.partition("=")[2] for word in child.argv if word.startswith(f"{name}=")]
    assert len(found) <= 1
    return found[0] if found else None


# A turn that goes well.


def test_a_turn_goes_from_the_request_to_its_outcome(world: World) -> None:
    turn, observer = world.ask(system_prompt="Be a test.", workspace="project")
    verifyObject(IRunningTurn, turn)
    [child] = world.children
    [session] = observer.planned
    assert session is not None
    assert turn.session_id == session
    assert option(child, "--session-id") == session
    assert str(world.base / "workspace" / "project") in child.argv
    assert child.environment == {
        "PATH": "/usr/bin",
        "HOME": "/root",
        MARKER: "state.run.1",
    }
    first, second = child.lines
    assert first["request"] == {"subtype": "initialize", "systemPrompt": ["Be a test."]}
    assert second["message"] == {"role": "user", "content": "hello"}
    assert not any("hello" in word or "Be a test" in word for word in child.argv)

    child.says(init(session), text())
    child.says(text())
    assert observer.events == ["init", "assistant", "assistant"]
    assert not observer.outcomes
    child.says(text(), result(session, total_cost_usd=0.5))
    assert observer.events[3:] == ["assistant"]
    outcome = observer.outcome
    assert (outcome.kind, outcome.session_id) == (OutcomeKind.SUCCESS, session)
    assert outcome.totals["total_cost_usd"] == 0.5
    assert child.stdin_closed
    assert world.executor.running == 1, "its process is still there"
    child.exits()
    assert world.sweeper.swept == ["state.run.1"]
    assert world.is_idle()


def test_a_session_is_remembered_from_its_plan_to_its_end(world: World) -> None:
    _, observer = world.ask(allowed_tools=("Bash",))
    [session] = observer.planned
    assert session is not None
    record = result_of(world.store.find(session))
    assert (record.tenant, record.begun) == ("alice", False)
    world.children[0].says(init(session))
    assert result_of(world.store.find(session)).begun
    world.children[0].says(result(session))
    assert result_of(world.store.find(session)).parameters == {"allowed-tools": ["Bash"]}


def test_a_later_turn_resumes_the_session(world: World) -> None:
    session = world.session()
    turn, observer = world.ask(session_id=session)
    child = world.children[1]
    assert (option(child, "--resume"), option(child, "--session-id")) == (session, None)
    assert observer.planned == [turn.session_id] == [session]
    assert child.environment[MARKER] == "state.run.2"
    world.finish(child, session)
    assert observer.outcome.kind is OutcomeKind.SUCCESS
    assert world.is_idle()


def test_two_messages_never_have_the_same_uuid(world: World) -> None:
    world.ask()
    world.ask()
    one, other = (user_message(child)["uuid"] for child in world.children)
    assert one != other


def test_figures_count_from_the_request(world: World) -> None:
    world.reactor.advance(10)
    _, observer = world.ask(received=9.0)
    world.reactor.advance(1)
    world.children[0].says(init(A))
    world.reactor.advance(0.5)
    world.children[0].says(text())
    world.children[0].says(result(A))
    figures = observer.outcome.figures
    assert (figures.first_event, figures.first_token) == (2.0, 2.5)


def test_the_log_tells_of_a_turn_without_its_contents(world: World) -> None:
    with capturedLogs() as events:
        world.ask(content="a secret prompt")
        world.children[0].says(
            init(A), text("a secret answer"), result(A, result="a secret answer")
        )
        world.children[0].exits()
    records = {event["type"]: event for event in events if "type" in event}
    assert records["turn_start"]["request_id"] == "req_1"
    assert records["turn_start"]["pid"] == records["process_exit"]["pid"]
    assert records["turn_end"]["outcome"] == "success"
    assert "secret" not in str(events)


# What fails before a process is started.


@pytest.mark.parametrize(
    ("fields", "failure", "param"),
    [
        ({"workspace": "../etc"}, Failure.INVALID_VALUE, "workspace"),
        ({"permission_mode": "reckless"}, Failure.INVALID_VALUE, "permission-mode"),
        ({"mcp_tools": ("mcp__nobody__x",)}, Failure.INVALID_VALUE, "mcp-allowed-tools"),
        ({"session_id": A}, Failure.SESSION_NOT_FOUND, "session-id"),
        ({"session_id": A, "fork": True}, Failure.SESSION_NOT_FOUND, "session-id"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_starts(
    world: World, fields: dict[str, Any], failure: Failure, param: str
) -> None:
    _, observer = world.ask(**fields)
    assert observer.failure is failure
    assert observer.outcome.error is not None
    assert observer.outcome.error.param == param
    assert world.children == []
    assert world.is_idle()


def test_what_an_old_cli_cannot_do_is_refused(old_world: World) -> None:
    for fields in ({"effort": "high"}, {"partial_messages": True}):
        _, observer = old_world.ask(**fields)
        assert observer.failure is Failure.INVALID_VALUE
    assert old_world.children == []
    assert old_world.is_idle()


def test_skipping_permissions_as_root_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    _, observer = world.ask(skip_permissions=True)
    assert observer.failure is Failure.INVALID_VALUE
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    world.ask(skip_permissions=True)
    assert "--dangerously-skip-permissions" in world.children[0].argv


def test_a_missing_cli_is_the_outcome(world: World) -> None:
    world.probe.can = ProxyError(Failure.CLI_NOT_FOUND)
    _, observer = world.ask()
    assert observer.failure is Failure.CLI_NOT_FOUND
    assert world.is_idle()


def test_an_unusable_workspace_is_the_outcome_and_frees_the_session(world: World) -> None:
    world.base.mkdir()
    (world.base / "shared_workspace").write_text("in the way")
    _, observer = world.ask()
    assert observer.failure is Failure.WORKSPACE_UNAVAILABLE
    assert world.children == []
    assert world.is_idle()


@pytest.mark.parametrize(
    ("number", "failure"),
    [
        (errno.ENOMEM, Failure.SERVER_BUSY),
        (errno.EMFILE, Failure.SERVER_BUSY),
        (errno.EAGAIN, Failure.SERVER_BUSY),
        (errno.ENOEXEC, Failure.CLI_NOT_FOUND),
    ],
)
def test_a_cli_that_cannot_be_started_is_the_outcome_and_frees_the_session(
    world: World, number: int, failure: Failure
) -> None:
    session = world.session()
    world.reactor.spawn_error = OSError(number, os.strerror(number))
    _, observer = world.ask(session_id=session, mcp_tools=("mcp__git__log",))
    assert observer.failure is failure
    assert observer.outcome.error is not None
    assert os.strerror(number) in observer.outcome.error.message
    assert observer.outcome.error.retry_after == (5 if failure is Failure.SERVER_BUSY else None)
    assert world.is_idle()


def test_a_fault_of_ours_is_logged_and_told_without_its_details(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a detail")

    monkeypatch.setattr(world.context.book, "planned", broken)
    with capturedLogs() as events:
        _, observer = world.ask()
    assert observer.failure is Failure.INTERNAL_ERROR
    assert "a detail" not in str(observer.outcome.error)
    [record] = [event for event in events if event.get("type") == "internal_error"]
    assert record["request_id"] == "req_1"
    assert record["log_failure"].check(ZeroDivisionError)
    assert world.is_idle()


# What fails later.


def test_a_process_that_ends_without_a_result_says_how(world: World) -> None:
    _, observer = world.ask()
    world.children[0].complains("Error: out of cheese\n")
    world.children[0].exits(3)
    assert observer.failure is Failure.CLI_FAILED
    assert observer.outcome.error is not None
    assert "exit code 3" in observer.outcome.error.message
    assert "out of cheese" in observer.outcome.error.message
    assert world.is_idle()


def test_a_shell_that_finds_no_program_means_that_there_is_no_cli(world: World) -> None:
    _, observer = world.ask()
    world.children[0].complains("env: node: No such file or directory\n")
    world.children[0].exits(127)
    assert observer.failure is Failure.CLI_NOT_FOUND
    assert world.is_idle()


def test_an_endless_turn_is_stopped_and_its_process_ended(
    world: World, signals: list[tuple[int, int]]
) -> None:
    _, observer = world.ask()
    child = world.children[0]
    for _ in range(4):
        world.reactor.advance(25)
        child.says(text())
    assert observer.failure is Failure.TURN_TIMEOUT
    assert child.interrupted
    group = child.pid
    world.reactor.advance(1)
    assert child.stdin_closed
    world.reactor.advance(1)
    assert signals == [(group, signal.SIGTERM)]
    world.reactor.advance(5)
    assert signals[1:] == [(group, signal.SIGKILL)]
    assert world.leases.held == 1, "it may still write to the session"
    child.exits(number=signal.SIGKILL)
    assert world.is_idle()


def test_a_session_is_free_again_when_its_process_was_given_up(world: World) -> None:
    _, observer = world.ask()
    world.reactor.advance(50)
    assert observer.failure is Failure.INACTIVITY_TIMEOUT
    for seconds in (1, 1, 5, 1, 1):
        assert world.executor.running == 1
        world.reactor.advance(seconds)
    assert world.children[0].pipes_closed
    assert world.sweeper.swept == ["state.run.1"]
    assert world.is_idle()


def test_a_session_that_the_cli_knows_already_is_resumed(world: World) -> None:
    # The server died after the CLI had begun the session and before that was written down.
    turn, observer = world.ask()
    [session] = observer.planned
    turn.stop(None)
    world.children[0].exits()
    _, observer = world.ask(session_id=session)
    first = world.children[1]
    assert option(first, "--session-id") == session
    first.complains(f"Error: Session ID {session} is already in use.\n")
    first.exits(1)
    assert not observer.outcomes
    second = world.children[2]
    assert (option(second, "--resume"), option(second, "--session-id")) == (session, None)
    world.finish(second, str(session))
    assert observer.outcome.kind is OutcomeKind.SUCCESS
    assert world.sweeper.swept[1:] == ["state.run.2", "state.run.3"]
    assert world.is_idle()


def test_a_fresh_id_in_use_is_no_reason_to_try_again(world: World) -> None:
    _, observer = world.ask()
    world.children[0].complains("Error: Session ID x is already in use.\n")
    world.children[0].exits(1)
    assert observer.failure is Failure.CLI_FAILED
    assert len(world.children) == 1


# Two turns on one session.


def test_a_second_turn_waits_until_the_first_process_is_gone(world: World) -> None:
    session = world.session()
    _, first = world.ask(session_id=session)
    _, second = world.ask(session_id=session, content="again")
    world.children[1].says(init(session), result(session))
    assert first.outcome.kind is OutcomeKind.SUCCESS
    assert len(world.children) == 2, "the first process may still write to the session"
    assert second.planned == []
    world.children[1].exits()
    assert user_message(world.children[2])["message"]["content"] == "again"
    world.finish(world.children[2], session)
    assert second.outcome.kind is OutcomeKind.SUCCESS
    assert world.is_idle()


def test_two_sessions_do_not_wait_for_each_other(world: World) -> None:
    world.ask()
    world.ask()
    assert len(world.children) == 2


def test_a_second_turn_on_a_session_that_begins_just_now_resumes_it(world: World) -> None:
    _, first = world.ask()
    [session] = first.planned
    assert session is not None
    world.ask(session_id=session)
    assert len(world.children) == 1
    world.finish(world.children[0], session)
    assert option(world.children[1], "--resume") == session


def test_a_session_that_failed_before_it_began_is_begun_by_the_next_turn(world: World) -> None:
    _, first = world.ask()
    [session] = first.planned
    world.ask(session_id=session)
    world.children[0].exits(1)
    assert option(world.children[1], "--session-id") == session
    assert option(world.children[1], "--resume") is None


def test_waiting_too_long_and_too_many_who_wait_are_refused(world: World) -> None:
    session = world.session()
    world.ask(session_id=session)
    waiting = [world.ask(session_id=session)[1] for _ in range(2)]
    _, refused = world.ask(session_id=session)
    assert refused.failure is Failure.SERVER_BUSY
    world.children[1].says(init(session))
    world.reactor.advance(30)
    assert [observer.failure for observer in waiting] == [Failure.SESSION_BUSY] * 2
    world.children[1].says(result(session))
    world.children[1].exits()
    assert len(world.children) == 2
    assert world.is_idle()


def test_a_fork_waits_for_its_source_and_holds_it_only_until_it_was_read(world: World) -> None:
    session = world.session()
    world.ask(session_id=session)
    _, fork = world.ask(session_id=session, fork=True)
    assert len(world.children) == 2
    world.finish(world.children[1], session)
    child = world.children[2]
    [copy] = fork.planned
    assert copy not in (None, session)
    assert option(child, "--resume") == session
    assert option(child, "--session-id") == copy
    assert "--fork-session" in child.argv
    world.ask(session_id=session)
    assert len(world.children) == 3, "the source is being read"
    child.says(init(str(copy)))
    assert len(world.children) == 4
    world.finish(world.children[3], session)
    child.says(result(str(copy)))
    child.exits()
    assert fork.outcome.session_id == copy
    assert world.is_idle()


def test_a_fork_waits_for_the_first_turn_of_its_source(world: World) -> None:
    _, first = world.ask()
    [session] = first.planned
    _, fork = world.ask(session_id=session, fork=True)
    assert len(world.children) == 1, "there is nothing to copy yet"
    world.finish(world.children[0], str(session))
    child = world.children[1]
    [copy] = fork.planned
    assert option(child, "--resume") == session
    assert option(child, "--session-id") == copy != session
    world.finish(child, str(copy))
    assert world.is_idle()


# A CLI that names its sessions itself.


def test_an_old_cli_gets_no_control_requests_and_is_ended_by_signals(
    old_world: World, signals: list[tuple[int, int]]
) -> None:
    turn, observer = old_world.ask()
    child = old_world.children[0]
    assert [line["type"] for line in child.lines] == ["user"]
    assert observer.planned == [None]
    turn.stop(None)
    assert not child.interrupted
    assert [number for _, number in signals] == [signal.SIGTERM]
    child.exits(number=signal.SIGTERM)
    assert old_world.is_idle()


def test_an_old_cli_that_ends_at_its_start_is_started_once_more(old_world: World) -> None:
    # Started together, they find the configuration that they share half written by each other.
    _, observer = old_world.ask()
    old_world.children[0].exits(1)
    old_world.reactor.advance(0)
    assert observer.outcomes == []
    old_world.finish(old_world.children[1], A)
    assert observer.outcome.kind is OutcomeKind.SUCCESS
    assert old_world.is_idle()


def test_an_old_cli_that_ends_twice_is_a_failure(old_world: World) -> None:
    _, observer = old_world.ask()
    for n in range(2):
        old_world.children[n].exits(1)
        old_world.reactor.advance(0)
    assert observer.failure is Failure.CLI_FAILED
    assert len(old_world.children) == 2
    assert old_world.is_idle()


def test_a_session_is_leased_under_the_id_that_its_cli_told(old_world: World) -> None:
    turn, _ = old_world.ask()
    assert turn.session_id is None
    old_world.children[0].says(init("cli-a"))
    assert turn.session_id == "cli-a"
    old_world.ask(session_id="cli-a")
    assert (old_world.leases.waiting, len(old_world.children)) == (1, 1)
    old_world.children[0].says(result("cli-a"))
    old_world.children[0].exits()
    child = old_world.children[1]
    assert option(child, "--resume") == "cli-a"
    child.says(init("cli-b"))
    for name in ("cli-a", "cli-b"):
        old_world.ask(session_id=name)
    assert old_world.leases.waiting == 2
    child.says(result("cli-b"))
    child.exits()
    assert option(old_world.children[2], "--resume") == "cli-b"
    old_world.finish(old_world.children[2], "cli-c")
    assert option(old_world.children[3], "--resume") == "cli-c"
    old_world.finish(old_world.children[3], "cli-d")
    assert old_world.is_idle()


def test_a_fork_that_waited_copies_the_session_as_it_is_by_then(old_world: World) -> None:
    old_world.ask()
    old_world.finish(old_world.children[0], "cli-a")
    old_world.ask(session_id="cli-a")
    old_world.ask(session_id="cli-a", fork=True)
    old_world.finish(old_world.children[1], "cli-b")
    assert option(old_world.children[2], "--resume") == "cli-b"


# Clients that leave.


def test_who_leaves_while_waiting_leaves_the_queue(world: World) -> None:
    session = world.session()
    world.ask(session_id=session)
    leaving, left = world.ask(session_id=session)
    _, staying = world.ask(session_id=session)
    leaving.stop(None)
    leaving.stop(None)
    assert left.outcome.kind is OutcomeKind.ABANDONED
    assert world.leases.waiting == 1
    world.finish(world.children[1], session)
    world.finish(world.children[2], session)
    assert staying.outcome.kind is OutcomeKind.SUCCESS
    assert world.is_idle()


def test_who_leaves_while_waiting_for_a_place_leaves_the_queue(tmp_path: Path) -> None:
    world = World(tmp_path, turns=1)
    world.ask()
    leaving, left = world.ask()
    _, staying = world.ask()
    capacity = world.context.capacity
    assert (capacity.running, capacity.waiting) == (1, 2)
    leaving.stop(None)
    assert left.outcome.kind is OutcomeKind.ABANDONED
    assert (capacity.running, capacity.waiting) == (1, 1)
    for number in range(2):
        child = world.children[number]
        world.finish(child, str(option(child, "--session-id")))
    assert staying.outcome.kind is OutcomeKind.SUCCESS
    assert len(world.children) == 2, "who has left never runs"
    assert (capacity.running, capacity.waiting) == (0, 0)
    assert world.is_idle()


@pytest.mark.parametrize("tools", [(), ("mcp__git__log",)])
def test_who_leaves_while_the_workspace_is_made_starts_nothing(
    world: World, tools: tuple[str, ...]
) -> None:
    world.reactor.hold_threads()
    turn, observer = world.ask(mcp_tools=tools)
    turn.stop(None)
    assert observer.outcome.kind is OutcomeKind.ABANDONED
    world.reactor.release_threads()
    assert world.children == []
    assert world.is_idle()


def test_who_leaves_while_the_mcp_file_is_written_leaves_no_secret_behind(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = world.context.book.planned

    def hold_now(*arguments: Any) -> None:
        planned(*arguments)
        world.reactor.hold_threads()

    monkeypatch.setattr(world.context.book, "planned", hold_now)
    turn, observer = world.ask(mcp_tools=("mcp__git__log",))
    turn.stop(None)
    world.reactor.release_threads()
    assert observer.outcome.kind is OutcomeKind.ABANDONED
    assert world.children == []
    assert world.is_idle()


def test_who_leaves_in_mid_turn_has_it_interrupted(world: World) -> None:
    turn, observer = world.ask()
    child = world.children[0]
    child.says(init(A), text())
    turn.stop(None)
    assert observer.outcome.kind is OutcomeKind.ABANDONED
    assert child.interrupted
    child.says(text(), result(A, subtype="error_during_execution", is_error=True))
    assert observer.events == ["init", "assistant"]
    assert child.stdin_closed
    turn.stop(None)
    child.exits()
    assert world.sweeper.swept == ["state.run.1"]
    assert world.is_idle()


def test_a_slow_client_pauses_the_process_and_a_stop_makes_it_run_on(world: World) -> None:
    turn, _ = world.ask()
    child = world.children[0]
    turn.pause()
    assert child.stdout.paused
    turn.resume()
    assert not child.stdout.paused
    turn.pause()
    turn.stop(None)
    assert not child.stdout.paused, "a process that cannot write cannot end"
    child.exits()


def test_pausing_before_there_is_a_process_does_nothing(world: World) -> None:
    world.reactor.hold_threads()
    turn, _ = world.ask()
    turn.pause()
    turn.resume()
    world.reactor.release_threads()
    assert not world.children[0].stdout.paused


def test_a_turn_that_has_ended_cannot_be_stopped(world: World) -> None:
    turn, observer = world.ask()
    world.finish(world.children[0], A)
    turn.stop(ProxyError(Failure.SHUTTING_DOWN))
    turn.pause()
    assert observer.outcome.kind is OutcomeKind.SUCCESS


# MCP servers.


def mcp_file(child: FakeChild) -> Path:
    path = option(child, "--mcp-config")
    assert path is not None
    return Path(path)


def test_the_mcp_file_is_private_and_goes_with_its_process(world: World) -> None:
    world.ask(mcp_tools=("mcp__git__log",))
    child = world.children[0]
    path = mcp_file(child)
    assert path.parent == world.run_directory
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == MCP
    assert "--allowedTools=mcp__git__log" in child.argv
    assert "very-secret" not in str(child.argv) + str(child.environment)
    child.says(init(A), result(A))
    assert path.exists(), "the process may start its servers again"
    child.exits()
    assert not path.exists()
    assert world.is_idle()


def test_no_servers_are_offered_to_who_does_not_ask_for_them(world: World) -> None:
    world.ask()
    assert option(world.children[0], "--mcp-config") is None
    assert "--strict-mcp-config" in world.children[0].argv


def test_the_mcp_file_goes_when_the_process_cannot_be_started(world: World) -> None:
    world.reactor.spawn_error = OSError(7, "Argument list too long")
    _, observer = world.ask(mcp_tools=("mcp__git__log",))
    assert observer.failure is Failure.CLI_NOT_FOUND
    assert world.is_idle()


# The end.


def shutting_down(world: World, drain: float = 5) -> Callable[[], bool]:
    stopped = Deferred.fromCoroutine(world.executor.shut_down(drain))
    return lambda: bool(stopped.called)


def test_a_server_that_stops_takes_no_more_turns(world: World) -> None:
    assert shutting_down(world)()
    with pytest.raises(ProxyError) as caught:
        world.ask()
    assert caught.value.failure is Failure.SHUTTING_DOWN
    assert caught.value.retry_after == 5
    assert world.is_idle()


def test_running_turns_may_finish_while_the_server_drains(world: World) -> None:
    _, observer = world.ask()
    stopped = shutting_down(world)
    world.reactor.advance(4)
    assert not stopped()
    world.children[0].says(init(A), result(A))
    assert not stopped(), "its process is still there"
    world.children[0].exits()
    assert observer.outcome.kind is OutcomeKind.SUCCESS
    assert stopped()
    assert world.is_idle()


def test_after_the_drain_every_turn_is_told_that_the_server_stops(world: World) -> None:
    session = world.session()
    _, running = world.ask(session_id=session)
    _, waiting = world.ask(session_id=session)
    stopped = shutting_down(world)
    world.reactor.advance(4.9)
    assert not running.outcomes + waiting.outcomes
    world.reactor.advance(0.1)
    assert running.failure is waiting.failure is Failure.SHUTTING_DOWN
    child = world.children[1]
    assert child.interrupted
    assert not stopped()
    child.exits()
    assert stopped()
    assert len(world.children) == 2
    assert world.is_idle()


def test_a_turn_in_preparation_is_stopped_too(world: World) -> None:
    world.reactor.hold_threads()
    _, observer = world.ask()
    stopped = shutting_down(world, drain=0)
    world.reactor.advance(0)
    assert observer.failure is Failure.SHUTTING_DOWN
    assert stopped()
    world.reactor.release_threads()
    assert world.children == []
    assert world.is_idle()


def test_the_end_waits_for_the_ladder_and_for_the_sweep(world: World) -> None:
    world.sweeper.finished = Deferred()
    world.ask()
    stopped = shutting_down(world, drain=0)
    for seconds in (0, 1, 1, 5, 1, 1):
        assert not stopped()
        world.reactor.advance(seconds)
    assert world.executor.running == 0
    assert not stopped()
    world.sweeper.finished.callback(None)
    assert stopped()
