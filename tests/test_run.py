"""A turn of a conversation that the server finds by itself, with a child that the test plays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.logger import capturedLogs

from claude_proxy.cli.outcomes import OutcomeKind
from claude_proxy.cli.versions import Capabilities, capabilities_of
from claude_proxy.errors import Failure
from claude_proxy.sessions.turns import Message
from tests.support import FakeChild, result_of
from tests.test_executor import A, World, init, option, result, signals, text, user_message

__all__ = ["signals"]  # a fixture that keeps the tests from real processes

NEW = capabilities_of("2.1.197")
MIDDLE = capabilities_of("1.0.128")
OLD = capabilities_of("1.0.24")
OLDER = capabilities_of("1.0.18")

TIP, NEXT = "a" * 64, "b" * 64
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
INHERIT = frozenset({"allowed-tools", "dangerously-skip-permissions"})


def blocks(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": said} for said in texts]


HISTORY = (Message("user", blocks("one")), Message("assistant", blocks("1")))

Make = Callable[..., World]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda can=NEW: World(tmp_path, can, CLAUDE_CONFIG_DIR=str(tmp_path / "config"))


@pytest.fixture
def world(make: Make) -> World:
    return make()


def converse(world: World, tip: str = TIP, **fields: Any) -> str:
    """Let a session have a turn whose conversation is remembered; return its id."""
    turn, observer = world.ask(**fields)
    session = observer.planned[0] or A
    world.children[-1].says(init(session))
    remember_at_the_end(turn, observer, tip)
    world.children[-1].says(result(session))
    world.children[-1].exits()
    return session


def remember_at_the_end(turn: Any, observer: Any, tip: str) -> None:
    def ended(outcome: Any) -> None:
        observer.outcomes.append(outcome)
        turn.remember(tip)

    observer.turn_ended = ended


def transcripts(world: World) -> list[Path]:
    return sorted((world.base.parent / "config").glob("projects/*/*.jsonl"))


def said(path: Path) -> list[tuple[str, str]]:
    messages = [json.loads(line)["message"] for line in path.read_bytes().splitlines()]
    return [(m["role"], m["content"][0]["text"]) for m in messages]


# Found by its history.


def test_a_session_goes_on_when_its_history_is_known(world: World) -> None:
    session = converse(world)
    _, observer = world.ask(content=blocks("two"), tips=(TIP,), history=HISTORY)
    child = world.children[-1]
    assert option(child, "--resume") == session
    assert observer.planned == [session]
    assert user_message(child)["message"]["content"] == blocks("two")
    assert transcripts(world) == []
    world.finish(child, session)
    assert world.is_idle()


def test_a_turn_without_a_tip_leaves_its_session_unfound(world: World) -> None:
    session = converse(world)
    world.ask(tips=(TIP,), history=HISTORY)
    world.finish(world.children[-1], session)
    _, observer = world.ask(tips=(TIP,), history=HISTORY)
    assert observer.planned != [session]


def test_a_native_turn_takes_the_tip_away(world: World) -> None:
    session = converse(world)
    world.ask(session_id=session)
    world.finish(world.children[-1], session)
    _, observer = world.ask(tips=(TIP,), history=HISTORY)
    assert observer.planned != [session]


def test_of_two_requests_with_one_history_only_one_goes_on(world: World) -> None:
    session = converse(world)
    _, first = world.ask(tips=(TIP,), history=HISTORY)
    _, second = world.ask(tips=(TIP,), history=HISTORY)
    assert first.planned == [session]
    assert second.planned != [session]


def test_what_was_given_before_stays_in_force(world: World) -> None:
    converse(world, allowed_tools=("Bash",), skip_permissions=False)
    world.ask(tips=(TIP,), inherit=INHERIT)
    child = world.children[-1]
    assert option(child, "--allowedTools") == "Bash"
    world.finish(child, A)


def test_what_is_given_anew_wins(world: World) -> None:
    converse(world, allowed_tools=("Bash",))
    world.ask(tips=(TIP,), allowed_tools=("Read",), inherit=frozenset())
    assert option(world.children[-1], "--allowedTools") == "Read"


def test_a_turn_that_never_began_gives_the_session_back(world: World) -> None:
    session = converse(world)
    _, observer = world.ask(tips=(TIP,), permission_mode="reckless")
    assert observer.failure is Failure.INVALID_VALUE
    _, observer = world.ask(tips=(TIP,))
    assert observer.planned == [session]


def test_a_turn_that_began_and_failed_does_not(world: World) -> None:
    session = converse(world)
    world.ask(tips=(TIP,))
    world.children[-1].says(init(session))
    world.children[-1].exits(1)
    _, observer = world.ask(tips=(TIP,), history=HISTORY)
    assert observer.planned != [session]


def test_a_client_that_leaves_in_the_queue_gives_the_session_back(world: World) -> None:
    session = converse(world)
    world.ask(session_id=session)  # holds the lease, and has not begun
    turn, observer = world.ask(tips=(TIP,))
    turn.stop(None)
    assert observer.outcome.kind is OutcomeKind.ABANDONED
    world.children[-1].exits(1)
    _, observer = world.ask(tips=(TIP,))
    assert observer.planned == [session]


@pytest.mark.parametrize("fields", [{"tips": (TIP,)}, {"session_id": True}])
def test_a_turn_that_is_stopped_may_have_been_heard(world: World, fields: dict[str, Any]) -> None:
    session = converse(world)
    turn, _ = world.ask(
        **{name: value if value is not True else session for name, value in fields.items()}
    )
    child = world.children[-1]
    assert user_message(child)
    turn.stop(None)  # the CLI takes the message all the same, and then the interrupt
    child.exits()
    _, observer = world.ask(tips=(TIP,), history=HISTORY)
    assert observer.planned != [session]


def test_a_session_that_moved_on_meanwhile_is_not_continued(world: World) -> None:
    session = converse(world)
    world.ask(session_id=session)
    busy = world.children[-1]
    _, waiting = world.ask(tips=(TIP,), history=HISTORY, content=blocks("two"))
    assert waiting.planned == []
    world.finish(busy, session)
    [other] = waiting.planned
    assert other not in (None, session)
    [path] = transcripts(world)
    assert said(path) == [("user", "one"), ("assistant", "1")]
    world.finish(world.children[-1], str(other))
    assert world.is_idle()


# A new session that is told its history.


@pytest.mark.parametrize("can", [NEW, MIDDLE])
def test_a_new_session_is_told_what_was_said(make: Make, can: Capabilities) -> None:
    world = make(can)
    _, observer = world.ask(content=blocks("two"), history=HISTORY, tips=(TIP,))
    child = world.children[-1]
    [session] = observer.planned
    assert session is not None
    [path] = transcripts(world)
    assert path.stem == session
    assert path.stat().st_mode & 0o777 == 0o600
    assert said(path) == [("user", "one"), ("assistant", "1")]
    assert (option(child, "--resume"), option(child, "--session-id")) == (session, None)
    assert user_message(child)["message"]["content"] == blocks("two")
    world.finish(child, session)
    assert observer.outcome.kind is OutcomeKind.SUCCESS
    assert transcripts(world) == [path]
    assert result_of(world.store.find(session)).begun
    assert world.is_idle()


def test_a_cli_that_makes_ids_of_its_own_is_told_too(make: Make) -> None:
    world = make(OLD)
    _, observer = world.ask(content=blocks("two"), history=HISTORY)
    child = world.children[-1]
    assert observer.planned == [None]
    [path] = transcripts(world)
    assert option(child, "--resume") == path.stem
    child.says(init(A), result(A))
    child.exits()
    assert observer.outcome.session_id == A
    _, observer = world.ask(session_id=A)
    assert option(world.children[-1], "--resume") == A


def test_a_cli_that_takes_no_transcript_is_told_in_the_message(make: Make) -> None:
    world = make(OLDER)
    world.ask(content=blocks("two"), history=HISTORY, literal=True)
    told = user_message(world.children[-1])["message"]["content"]
    assert isinstance(told, str)
    assert [told.count(word) for word in ("one", "1", "two")] == [1, 1, 1]
    assert told.index("one") < told.index("two")
    assert transcripts(world) == []


def test_a_transcript_that_cannot_be_written_is_told_in_the_message(
    make: Make, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text("in the way")
    world = make()
    with capturedLogs() as events:
        _, observer = world.ask(content=blocks("two"), history=HISTORY)
    child = world.children[-1]
    told = "".join(block["text"] for block in user_message(child)["message"]["content"])
    assert [told.count(word) for word in ("one", "two")] == [1, 1]
    assert option(child, "--session-id") == observer.planned[0]
    [record] = [event for event in events if event.get("type") == "transcript_failed"]
    assert record["error"] == "Not a directory"


@pytest.mark.parametrize("ending", ["exit", "leave"])
def test_a_session_that_does_not_begin_leaves_no_transcript(world: World, ending: str) -> None:
    turn, observer = world.ask(content=blocks("two"), history=HISTORY)
    assert len(transcripts(world)) == 1
    if ending == "leave":
        turn.stop(None)
    world.children[-1].exits(1)
    assert observer.outcome.kind is not OutcomeKind.SUCCESS
    assert transcripts(world) == []
    assert world.is_idle()


# A session that is lost.


def no_conversation(child: FakeChild, session: str) -> None:
    sentence = f"No conversation found with session ID: {session}"
    failed = {"subtype": "error_during_execution", "is_error": True, "errors": [sentence]}
    child.says({"type": "result", "session_id": session, **failed})


def test_a_session_that_the_cli_lost_begins_anew_with_its_history(world: World) -> None:
    session = converse(world, allowed_tools=("Bash",), workspace="w")
    _, observer = world.ask(content=blocks("two"), tips=(TIP,), history=HISTORY, inherit=INHERIT)
    no_conversation(world.children[-1], session)
    world.children[-1].exits(1)
    assert observer.outcomes == []
    child = world.children[-1]
    first, second = observer.planned
    assert first == session != second
    assert second is not None
    assert option(child, "--resume") == second
    assert option(child, "--allowedTools") == "Bash"
    assert str(world.base / "workspace" / "w") in child.argv
    assert said(transcripts(world)[0])[0] == ("user", "one")
    world.finish(child, second)
    assert observer.outcome.kind is OutcomeKind.SUCCESS
    assert world.is_idle()


def test_a_session_that_was_asked_for_by_name_is_not_replaced(world: World) -> None:
    session = converse(world)
    _, observer = world.ask(session_id=session, history=HISTORY)
    no_conversation(world.children[-1], session)
    world.children[-1].exits(1)
    assert observer.failure is Failure.SESSION_NOT_FOUND
    assert world.is_idle()


def test_who_leaves_between_the_two_tries_is_let_go(world: World) -> None:
    session = converse(world)
    turn, observer = world.ask(tips=(TIP,), history=HISTORY)
    child = world.children[-1]
    no_conversation(child, session)
    turn.stop(None)
    child.exits(1)
    assert observer.outcome.kind is OutcomeKind.ABANDONED
    assert len(world.children) == 2
    assert world.is_idle()


# What only some versions take.


@pytest.mark.parametrize(
    ("can", "sent"),
    [
        (NEW, [*blocks("see @x"), {"type": "text", "text": "\n"}]),
        (MIDDLE, [*blocks("see @x"), {"type": "text", "text": "."}]),
        (OLD, "see \u200b@x"),
    ],
)
def test_text_is_text(make: Make, can: Capabilities, sent: object) -> None:
    world = make(can)
    world.ask(content=blocks("see @x"), literal=True)
    assert user_message(world.children[-1])["message"]["content"] == sent


def test_an_old_cli_takes_no_images(make: Make) -> None:
    world = make(OLD)
    _, observer = world.ask(content=[*blocks("what is this"), IMAGE], literal=True)
    assert observer.failure is Failure.INVALID_VALUE
    assert observer.outcome.error is not None
    assert observer.outcome.error.param == "messages"
    assert world.children == []


def test_an_old_cli_may_ignore_what_is_optional(make: Make) -> None:
    world = make(OLD)
    wishes = {"effort": "high", "json_schema": {"type": "object"}}
    world.ask(**wishes, optional=frozenset(wishes))
    assert option(world.children[-1], "--effort") is None
    _, observer = world.ask(**wishes)
    assert observer.failure is Failure.INVALID_VALUE


@pytest.mark.parametrize(
    ("can", "limit", "expected"),
    [
        (NEW, 2000, {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": "2000"}),
        (NEW, 50, {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": "50", "MAX_THINKING_TOKENS": "0"}),
        (NEW, 64_000, {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": "64000"}),
        (OLD, 64_000, {}),
        (NEW, None, {}),
    ],
)
def test_a_limit_of_the_answer_is_told_to_the_cli(
    make: Make, can: Capabilities, limit: int | None, expected: dict[str, str]
) -> None:
    world = make(can)
    world.ask(max_output_tokens=limit)
    environment = world.children[-1].environment
    assert {name: environment[name] for name in environment if "TOKENS" in name} == expected


def test_what_a_process_says_of_itself_is_passed_on(world: World) -> None:
    learned: list[tuple[str, object]] = []
    world.context.learn = lambda version, answer: learned.append((version, answer.payload))
    world.ask()
    child = world.children[-1]
    request_id = child.lines[0]["request_id"]
    answer = {"subtype": "success", "request_id": request_id, "response": {"models": []}}
    child.says({"type": "control_response", "response": answer}, init(A), text())
    assert learned == [("2.1.197", {"models": []})]
