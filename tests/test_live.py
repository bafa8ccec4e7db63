"""Live sessions: turns on a process that stays, with a child that the test plays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.logger import capturedLogs

from claude_proxy.cli.outcomes import OutcomeKind
from claude_proxy.cli.versions import Capabilities, capabilities_of
from claude_proxy.errors import Failure
from tests.support import FakeChild
from tests.test_executor import A, World, init, option, result, signals, text, user_message

__all__ = ["signals"]  # a fixture that keeps the tests from real processes

NEW = capabilities_of("2.1.197")
MIDDLE = capabilities_of("1.0.128")

Make = Callable[..., World]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda can=NEW, live=4: World(tmp_path, can, live=live)


@pytest.fixture
def world(make: Make) -> World:
    return make()


def is_quiet(world: World) -> bool:
    """Whether nothing but live processes and their timers is left."""
    world.reactor.advance(0)
    return (
        world.executor.running == world.leases.held == world.leases.waiting == 0
        and len(world.reactor.getDelayedCalls()) == world.context.pool.waiting
    )


def begin(world: World, **fields: Any) -> tuple[str, FakeChild]:
    """The first turn of a session whose process stays."""
    _, observer = world.ask(**fields)
    child, session = world.children[-1], observer.planned[0] or A
    child.says(init(session), text(), result(session, total_cost_usd=0.5))
    assert observer.outcome.kind is OutcomeKind.SUCCESS
    assert not child.stdin_closed
    assert world.executor.running == 0
    return session, child


def messages(child: FakeChild) -> list[dict[str, Any]]:
    return [line for line in child.lines if line["type"] == "user"]


def requests(child: FakeChild) -> list[dict[str, Any]]:
    return [line["request"] for line in child.lines if line["type"] == "control_request"]


def answer(child: FakeChild, session: str, **fields: Any) -> None:
    """Let a child do its next turn."""
    uuid = messages(child)[-1]["uuid"]
    replay = {"type": "user", "isReplay": True, "uuid": uuid, "session_id": session}
    child.says(init(session), replay, text(), result(session, **fields))


# Reuse.


def test_a_later_turn_has_the_process_of_the_one_before(world: World) -> None:
    session, child = begin(world)
    turn, observer = world.ask(session_id=session, content="more")
    assert world.children == [child]
    assert observer.planned == [session] == [turn.session_id]
    assert [message["message"]["content"] for message in messages(child)] == ["hello", "more"]
    assert [request["subtype"] for request in requests(child)] == ["initialize"]
    answer(child, session, total_cost_usd=0.75)
    assert observer.outcome.kind is OutcomeKind.SUCCESS
    assert observer.outcome.totals["total_cost_usd"] == 0.25, "its own, not that of the process"
    assert observer.events == ["init", "user", "assistant"]
    assert is_quiet(world)


def test_the_lease_is_free_as_soon_as_the_process_waits(world: World) -> None:
    session, child = begin(world)
    world.ask(session_id=session)
    _, second = world.ask(session_id=session)
    assert second.planned == []
    answer(child, session)
    assert len(messages(child)) == 3
    answer(child, session)
    assert second.outcome.kind is OutcomeKind.SUCCESS


def test_echoes_of_settings_are_not_the_clients(world: World) -> None:
    session, child = begin(world)
    _, observer = world.ask(session_id=session, permission_mode="plan")
    assert requests(child)[-1] == {"subtype": "set_permission_mode", "mode": "plan"}
    child.says({"type": "system", "subtype": "status", "permissionMode": "plan"})
    assert observer.events == []
    answer(child, session)
    assert observer.events == ["init", "user", "assistant"]


def test_rules_are_told_each_turn_and_revoked(world: World) -> None:
    session, child = begin(world, allowed_tools=("Bash",))
    assert option(child, "--allowedTools") is None
    [_, allowed] = requests(child)
    assert allowed["settings"]["permissions"]["allow"] == ["Bash"]
    world.ask(session_id=session, allowed_tools=("Bash",))
    assert len(requests(child)) == 2, "they are in force already"
    answer(child, session)
    world.ask(session_id=session)
    assert requests(child)[-1]["settings"]["permissions"]["allow"] == []
    answer(child, session)


def test_the_mode_goes_back_to_what_it_was_without_one(world: World) -> None:
    _, observer = world.ask()
    child, session = world.children[-1], observer.planned[0] or A
    child.says({**init(session), "permissionMode": "acceptEdits"}, result(session))
    world.ask(session_id=session, permission_mode="plan")
    answer(child, session)
    world.ask(session_id=session)
    assert requests(child)[-1] == {"subtype": "set_permission_mode", "mode": "acceptEdits"}


def test_a_mode_whose_before_is_not_known_needs_another_process(world: World) -> None:
    session, child = begin(world, permission_mode="plan")
    world.ask(session_id=session)
    assert child.stdin_closed
    assert len(world.children) == 1
    child.exits()
    assert option(world.children[1], "--resume") == session


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "opus"},
        {"disallowed_tools": ("WebFetch",)},
        {"max_turns": 3},
        {"system_prompt": "Be a poet."},
        {"append_system_prompt": "Rhyme."},
        {"json_schema": {"type": "object"}},
        {"mcp_tools": ("mcp__git__log",)},
        {"max_output_tokens": 2000},
        {"skip_permissions": True},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_is_fixed_at_the_start_needs_another_process(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    world = World(tmp_path, live=4, IS_SANDBOX="1")
    session, child = begin(world)
    _, observer = world.ask(session_id=session, **changed)
    assert child.stdin_closed
    assert len(world.children) == 1, "the session has one writer"
    child.exits()
    second = world.children[1]
    assert option(second, "--resume") == session
    second.says(init(session), result(session))
    assert observer.outcome.kind is OutcomeKind.SUCCESS
    assert world.context.pool.waiting == 1


def refuse(child: FakeChild, subtype: str, error: str) -> None:
    """Let a child refuse its last control request of this kind."""
    sent = [line for line in child.lines if line["type"] == "control_request"]
    request_id = [line["request_id"] for line in sent if line["request"]["subtype"] == subtype][-1]
    response = {"subtype": "error", "request_id": request_id, "error": error}
    child.says({"type": "control_response", "response": response})


@pytest.mark.parametrize(
    ("fields", "subtype"),
    [
        ({"permission_mode": "plan"}, "set_permission_mode"),
        ({"allowed_tools": ("Read",)}, "apply_flag_settings"),
        ({"effort": "low"}, "apply_flag_settings"),
        ({"system_prompt": "Be a poet."}, "initialize"),
    ],
)
def test_a_turn_does_not_run_without_a_setting_that_is_refused(
    world: World, fields: dict[str, Any], subtype: str
) -> None:
    session = None
    if subtype != "initialize":
        session, _ = begin(world)
    _, observer = world.ask(session_id=session, **fields)
    refuse(world.children[-1], subtype, "not " + "x" * 1000)
    if session is not None:
        # A new process may take what one that has had other turns did not.
        assert observer.outcomes == []
        world.children[0].exits()
        refuse(world.children[1], subtype, "not " + "x" * 1000)
    assert observer.failure is Failure.CLI_FAILED
    error = observer.outcome.error
    assert error is not None
    assert error.message == "The Claude CLI refused a setting of this turn: not " + "x" * 496
    child = world.children[-1]
    child.says(init(A), text(), result(A))
    child.exits()
    assert observer.events == []
    assert world.context.pool.waiting == 0
    assert is_quiet(world)


def test_a_greeting_without_settings_may_be_refused(world: World) -> None:
    _, observer = world.ask()
    refuse(world.children[0], "initialize", "no")
    world.children[0].says(init(A), text(), result(A))
    assert observer.outcome.kind is OutcomeKind.SUCCESS


def test_another_cli_needs_another_process(world: World) -> None:
    session, child = begin(world)
    world.probe.can = replace(NEW, version="2.1.198")
    world.ask(session_id=session)
    assert child.stdin_closed
    child.exits()
    assert option(world.children[1], "--resume") == session


def test_a_changed_mcp_configuration_needs_another_process(world: World) -> None:
    session, child = begin(world, mcp_tools=("mcp__git__log",))
    world.context.mcp.reload()
    world.ask(session_id=session, mcp_tools=("mcp__git__log",))
    assert child.stdin_closed
    child.exits()
    assert len(world.children) == 2


def test_what_has_an_old_mcp_configuration_ends_when_another_is_read(tmp_path: Path) -> None:
    world = World(tmp_path, live=4, spares=2)
    _, with_servers = begin(world, mcp_tools=("mcp__git__log",))
    _, without = begin(world)
    for _ in range(2):
        world.reactor.advance(30)
    spares = world.children[2:]
    assert len(spares) == 2
    world.context.mcp.reload()
    world.executor.mcp_changed()
    assert (with_servers.stdin_closed, without.stdin_closed) == (True, False)
    assert sorted(spare.stdin_closed for spare in spares) == [False, True]


@pytest.mark.parametrize(("can", "live"), [(MIDDLE, 4), (NEW, 0)])
def test_without_live_sessions_each_turn_has_its_process(
    make: Make, can: Capabilities, live: int
) -> None:
    world = make(can, live)
    _, observer = world.ask(allowed_tools=("Bash",))
    child, session = world.children[-1], observer.planned[0] or A
    assert option(child, "--allowedTools") == "Bash"
    child.says(init(session), result(session))
    assert child.stdin_closed
    child.exits()
    assert world.is_idle()


# The end of waiting.


def test_a_process_does_not_wait_for_ever(world: World) -> None:
    session, child = begin(world)
    world.reactor.advance(299)
    assert not child.stdin_closed
    world.reactor.advance(1)
    assert child.stdin_closed
    child.exits()
    assert world.is_idle()
    assert world.sweeper.swept == ["state.run.1"]
    world.ask(session_id=session)
    assert option(world.children[1], "--resume") == session


def test_the_one_that_was_used_least_recently_goes(make: Make) -> None:
    world = make(live=2)
    first, one = begin(world)
    _, two = begin(world)
    world.ask(session_id=first)
    answer(one, first)
    _, three = begin(world)
    assert [child.stdin_closed for child in (one, two, three)] == [False, True, False]
    two.exits()
    assert is_quiet(world)


def test_a_process_that_dies_idle_is_forgotten(world: World) -> None:
    session, child = begin(world)
    with capturedLogs() as events:
        child.exits(1)
    assert [e["session_id"] for e in events if e.get("type") == "live_lost"] == [session]
    assert world.is_idle()
    world.ask(session_id=session)
    assert option(world.children[1], "--resume") == session


def test_no_other_process_starts_before_the_one_that_gave_way_is_gone(make: Make) -> None:
    world = make(live=1)
    session, child = begin(world)
    _, other = begin(world)
    assert child.stdin_closed
    _, observer = world.ask(session_id=session)
    assert world.children == [child, other], "it may still write to the session"
    child.exits()
    assert option(world.children[2], "--resume") == session
    world.children[2].says(init(session), result(session))
    assert observer.outcome.kind is OutcomeKind.SUCCESS


def test_who_leaves_while_the_one_that_gave_way_leaves_starts_no_other(make: Make) -> None:
    world = make(live=1)
    session, child = begin(world)
    _, other = begin(world)
    turn, observer = world.ask(session_id=session)
    turn.stop(None)
    assert observer.outcome.kind is OutcomeKind.ABANDONED
    child.exits()
    assert world.children == [child, other]


def test_one_that_dies_with_the_message_unread_is_replaced(world: World) -> None:
    session, child = begin(world)
    _, observer = world.ask(session_id=session, content="more")
    child.exits(1)
    assert observer.outcomes == []
    second = world.children[1]
    assert user_message(second)["message"]["content"] == "more"
    second.says(init(session), result(session))
    assert observer.outcome.kind is OutcomeKind.SUCCESS


def test_who_leaves_while_a_dead_process_is_cleared_away_starts_no_other(world: World) -> None:
    session, child = begin(world)
    turn, observer = world.ask(session_id=session, content="more")
    cleared: Deferred[None] = Deferred()

    async def bury(agent: object) -> None:
        await cleared

    world.context.bury = bury  # type: ignore[method-assign]
    child.exits(1)
    turn.stop(None)
    cleared.callback(None)
    assert observer.outcome.kind is OutcomeKind.ABANDONED
    assert world.children == [child]
    assert world.is_idle()


def test_who_leaves_while_an_unfit_process_leaves_starts_no_other(world: World) -> None:
    session, child = begin(world)
    turn, observer = world.ask(session_id=session, system_prompt="Be a poet.")
    assert child.stdin_closed
    turn.stop(None)
    child.exits()
    assert observer.outcome.kind is OutcomeKind.ABANDONED
    assert world.children == [child]
    assert world.is_idle()
    assert world.sweeper.swept == ["state.run.1"]


def test_one_that_dies_when_it_may_have_taken_the_message_is_a_failure(world: World) -> None:
    session, child = begin(world)
    child.says({"type": "system", "subtype": "task_started", "task_id": "1"})
    _, observer = world.ask(session_id=session)
    child.says(init(session), text())  # whose turn it is shows only later
    child.exits(1)
    assert observer.failure is Failure.CLI_FAILED
    assert world.children == [child], "the message may not be sent twice"
    assert world.is_idle()


def test_one_that_dies_after_a_turn_of_its_own_is_replaced(world: World) -> None:
    session, child = begin(world)
    child.says({"type": "system", "subtype": "task_started", "task_id": "1"})
    _, observer = world.ask(session_id=session)
    child.says(init(session), text(), result(session))
    child.exits(1)
    assert observer.outcomes == []
    world.children[1].says(init(session), result(session))
    assert observer.outcome.kind is OutcomeKind.SUCCESS


def test_one_that_dies_in_its_turn_is_a_failure(world: World) -> None:
    session, child = begin(world)
    _, observer = world.ask(session_id=session)
    child.says(init(session))
    child.exits(1)
    assert observer.failure is Failure.CLI_FAILED
    assert world.is_idle()


@pytest.mark.parametrize(
    "ended",
    [
        {"subtype": "error_during_execution", "is_error": True, "errors": ["no"]},
        {"is_error": True, "api_error_status": 500},
    ],
)
def test_a_process_whose_turn_failed_does_not_stay(world: World, ended: dict[str, Any]) -> None:
    session, child = begin(world)
    _, observer = world.ask(session_id=session)
    answer(child, session, **ended)
    assert observer.outcome.kind is OutcomeKind.FAILURE
    assert child.stdin_closed
    child.exits()
    assert world.is_idle()


def test_a_process_whose_session_became_another_does_not_stay(world: World) -> None:
    _, observer = world.ask(content="/clear")
    child = world.children[-1]
    child.says(init(str(observer.planned[0])), result(A))
    assert child.stdin_closed
    child.exits()
    assert world.is_idle()


def test_a_client_that_leaves_ends_the_process(world: World) -> None:
    session, child = begin(world)
    turn, observer = world.ask(session_id=session)
    child.says(init(session))
    turn.stop(None)
    assert child.interrupted
    child.says(result(session))
    assert child.stdin_closed
    child.exits()
    assert observer.outcome.kind is OutcomeKind.ABANDONED
    assert world.is_idle()


def test_a_server_that_stops_ends_them_all(world: World) -> None:
    _, one = begin(world)
    _, two = begin(world)
    stopped: list[None] = []
    Deferred.fromCoroutine(world.executor.shut_down(5)).addCallback(stopped.append)
    assert one.stdin_closed
    assert two.stdin_closed
    assert stopped == []
    one.exits()
    two.exits()
    assert stopped == [None]
    assert world.is_idle()


# What goes on between turns.


def test_events_between_turns_are_nobodys(world: World) -> None:
    session, child = begin(world)
    with capturedLogs() as events:
        child.says({"type": "system", "subtype": "task_updated", "task_id": "t"})
    [record] = [e for e in events if e.get("type") == "background_events"]
    assert (record["session_id"], record["kinds"]) == (session, ["task_updated"])
    _, observer = world.ask(session_id=session)
    answer(child, session)
    assert observer.events == ["init", "user", "assistant"]


def test_a_process_that_is_about_to_begin_a_turn_of_its_own_is_not_asked(world: World) -> None:
    session, child = begin(world)
    child.says({"type": "system", "subtype": "task_notification", "task_id": "t"})
    _, observer = world.ask(session_id=session)
    assert child.stdin_closed
    assert len(messages(child)) == 1
    child.says(init(session), text(), result(session))
    child.exits()
    world.reactor.advance(0)
    world.children[-1].says(init(session), text(), result(session))
    assert observer.outcome.kind is OutcomeKind.SUCCESS
    assert is_quiet(world)


def test_what_arrives_together_with_a_result_is_no_part_of_the_turn(world: World) -> None:
    session, child = begin(world)
    _, observer = world.ask(session_id=session)
    uuid = messages(child)[-1]["uuid"]
    replay = {"type": "user", "isReplay": True, "uuid": uuid, "session_id": session}
    notice = {"type": "system", "subtype": "task_notification", "task_id": "t"}
    child.says(init(session), replay, text(), result(session), notice, init(session))
    assert observer.outcome.kind is OutcomeKind.SUCCESS
    assert observer.events == ["init", "user", "assistant"]
    world.ask(session_id=session)
    assert child.stdin_closed, "it has begun a turn of its own"
    assert len(messages(child)) == 2


def test_a_process_is_asked_again_after_a_turn_of_its_own(world: World) -> None:
    session, child = begin(world)
    child.says({"type": "system", "subtype": "task_notification", "task_id": "t"})
    child.says(init(session), text(), result(session))
    _, observer = world.ask(session_id=session)
    answer(child, session)
    assert observer.outcome.kind is OutcomeKind.SUCCESS
    assert world.children == [child]


def test_a_turn_of_the_clis_own_never_answers_ours(world: World) -> None:
    session, child = begin(world)
    own = {"type": "assistant", "message": {"content": [{"type": "text", "text": "by myself"}]}}
    child.says({"type": "system", "subtype": "task_started", "task_id": "t"})
    _, observer = world.ask(session_id=session)
    child.says(
        {"type": "system", "subtype": "task_notification", "task_id": "t"},
        init(session),
        own,
        result(session, result="by myself", total_cost_usd=1.5),
    )
    assert observer.events == []
    assert observer.outcomes == []
    answer(child, session, result="ours", total_cost_usd=2.0)
    assert observer.outcome.totals["total_cost_usd"] == 0.5
    assert observer.events == ["init", "user", "assistant"]
    assert observer.outcome.result is not None
    assert observer.outcome.result.fields()["result"] == "ours"
    assert figures(world, session) == (2, 1, 2.0)


def test_a_process_that_is_busy_by_itself_is_not_disturbed_but_replaced(world: World) -> None:
    session, child = begin(world)
    child.says(init(session), text("by myself"))
    world.ask(session_id=session)
    assert child.stdin_closed
    child.exits()
    assert len(world.children) == 2


def test_a_process_that_changes_its_session_while_it_waits_is_not_kept(world: World) -> None:
    _, child = begin(world)
    child.says(init(A))
    assert child.stdin_closed
    child.exits()
    assert world.is_idle()


def test_what_happens_between_turns_is_in_no_turns_figures(world: World) -> None:
    session, child = begin(world)
    child.says(init(session), text(), result(session, total_cost_usd=1.5))
    _, observer = world.ask(session_id=session)
    answer(child, session, total_cost_usd=1.75)
    assert observer.outcome.totals["total_cost_usd"] == 0.25
    assert figures(world, session) == (2, 1, 1.75)


def figures(world: World, session: str) -> tuple[int, int, float]:
    """A session's record: turns, turns of its agent's own, cost of all."""
    found: list[Any] = []
    world.store.find(session).addCallback(found.append)
    return found[0].turns, found[0].own_turns, found[0].cost


def test_a_process_that_works_in_another_directory_now_is_not_kept(world: World) -> None:
    _, observer = world.ask()
    child, session = world.children[-1], str(observer.planned[0])
    child.says({**init(session), "cwd": "/w"}, result(session))
    world.ask(session_id=session)
    child.says({**init(session), "cwd": "/w/.claude/worktrees/x"}, result(session))
    assert child.stdin_closed


# Spares.


def rest(world: World) -> FakeChild:
    """Let the server rest until a spare is started."""
    before = len(world.children)
    for _ in range(3):
        world.reactor.advance(1)
    assert len(world.children) == before + 1
    return world.children[-1]


def test_a_new_session_begins_on_a_spare(tmp_path: Path) -> None:
    world = World(tmp_path, spares=1, HOME=str(tmp_path))
    world.session()
    spare = rest(world)
    session = option(spare, "--session-id")
    assert session is not None
    assert spare.lines == []
    turn, observer = world.ask(system_prompt="Be a test.", allowed_tools=("Bash",))
    assert world.children[-1] is spare
    assert observer.planned[-1] == session == turn.session_id
    assert [request["subtype"] for request in requests(spare)] == [
        "initialize",
        "apply_flag_settings",
    ]
    world.finish(spare, session)
    assert observer.outcome.kind is OutcomeKind.SUCCESS
    world.ask(session_id=session)
    assert option(world.children[-1], "--resume") == session


def test_a_spare_that_dies_with_the_message_unread_is_replaced(tmp_path: Path) -> None:
    world = World(tmp_path, spares=1, HOME=str(tmp_path))
    world.session()
    spare = rest(world)
    _, observer = world.ask(content="more")
    spare.exits(1)
    world.reactor.advance(0)
    child = world.children[-1]
    assert child is not spare
    assert user_message(child)["message"]["content"] == "more"
    session = option(child, "--session-id")
    assert session == observer.planned[-1] == option(spare, "--session-id"), "no id is left over"
    world.finish(child, str(session))
    assert observer.outcome.kind is OutcomeKind.SUCCESS


def test_what_a_spare_cannot_do_has_a_process_of_its_own(tmp_path: Path) -> None:
    world = World(tmp_path, spares=1, HOME=str(tmp_path))
    session = world.session()
    spare = rest(world)
    world.ask(model="opus")
    world.ask(session_id=session)
    assert spare.lines == []


def test_a_server_that_stops_ends_its_spares(tmp_path: Path) -> None:
    world = World(tmp_path, spares=1, HOME=str(tmp_path))
    world.session()
    spare = rest(world)
    stopped: list[None] = []
    Deferred.fromCoroutine(world.executor.shut_down(5)).addCallback(stopped.append)
    assert spare.stdin_closed
    spare.exits()
    assert stopped == [None]


def test_processes_that_wait_give_way_to_turns(tmp_path: Path) -> None:
    world = World(tmp_path, live=4, turns=2)
    _, one = begin(world)
    second, two = begin(world)
    assert not one.stdin_closed, "beside one turn there was room for one that waits"
    world.ask(session_id=second)
    answer(two, second)
    assert not one.stdin_closed, "a process that is used again takes no more room"
    world.ask()
    assert (one.stdin_closed, two.stdin_closed) == (True, False)
    world.ask()
    assert two.stdin_closed


def test_spares_give_way_first(tmp_path: Path) -> None:
    world = World(tmp_path, live=4, spares=1, turns=2, HOME=str(tmp_path))
    _, kept = begin(world)
    spare = rest(world)
    world.ask(model="opus")
    assert (kept.stdin_closed, spare.stdin_closed) == (False, True)


def test_what_waits_and_what_works_is_never_more_than_turns_may_run(tmp_path: Path) -> None:
    world = World(tmp_path, live=4, spares=1, turns=2, HOME=str(tmp_path))
    spares_used = 0
    for _ in range(5):
        before = len(world.children)
        _, observer = world.ask()
        session = observer.planned[-1]
        assert session is not None
        child = next(child for child in world.children if option(child, "--session-id") == session)
        spares_used += len(world.children) == before
        assert sum(not child.stdin_closed for child in world.children) <= 2, "at work"
        child.says(init(session), text(), result(session))
        world.reactor.pump([1] * 4)
        assert sum(not child.stdin_closed for child in world.children) <= 2, "at rest"
    assert spares_used
