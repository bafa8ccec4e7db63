"""Turns on their way to a client: as a stream of events, or as one whole answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from zope.interface import implementer
from zope.interface.verify import verifyObject

from claude_proxy.cli.events import Event, parse_event
from claude_proxy.cli.outcomes import Outcome, OutcomeKind
from claude_proxy.dialects.passthrough import NativeAnswer, NativeStream
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.interfaces import IFramer, IRunningTurn, ITurnObserver, IWholeAnswer
from claude_proxy.web.stream import HEARTBEAT, EventStream, WholeAnswer
from tests.support import Answer, Connection, KeptRequests, encode_request, open_site

SESSION = "aaaaaaaa-0000-4000-8000-000000000000"


@implementer(IRunningTurn)
class Turn:
    """Remembers how it was steered."""

    session_id: str | None = None

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def stop(self, reason: ProxyError | None) -> None:
        self.heard.append(("stop", reason))

    def remember(self, tip: str) -> None:
        self.heard.append(("remember", tip))

    def pause(self) -> None:
        self.heard.append("pause")

    def resume(self) -> None:
        self.heard.append("resume")


def event(**fields: Any) -> Event:
    parsed = parse_event(json.dumps({"session_id": SESSION, **fields}).encode())
    assert parsed is not None
    return parsed


INIT = event(type="system", subtype="init")
TEXT = event(type="assistant", message={"content": "hi"})
PARTIAL = event(type="stream_event", event={})
STATUS = event(type="system", subtype="status")
RESULT = event(type="result", subtype="success", is_error=False, result="hi")
FAILED_RESULT = event(type="result", subtype="success", is_error=True, result="no")

SUCCESS = Outcome(OutcomeKind.SUCCESS, result=RESULT, session_id=SESSION)


def failure(code: Failure, *, result: Event | None = None, **options: Any) -> Outcome:
    return Outcome(OutcomeKind.FAILURE, ProxyError(code, **options), result=result)


class World:
    """A request, its response, and the turn behind it."""

    def __init__(self, *, stream: bool = True, partial: bool = False) -> None:
        self.clock = Clock()
        kept = KeptRequests()
        self.connection = Connection(open_site(kept, Clock()))
        self.connection.send(encode_request("GET", "/", {"X-Request-Id": "r-1"}))
        [request] = kept.requests
        self.turn = Turn()
        self.response: EventStream | WholeAnswer = (
            EventStream(request, self.clock, 60.0, NativeStream(partial_messages=partial))
            if stream
            else WholeAnswer(request, self.clock, 60.0, NativeAnswer())
        )
        self.response.run(lambda: self.turn)

    @property
    def answer(self) -> Answer:
        [answer] = self.connection.answers
        return answer

    def is_over(self) -> bool:
        return self.response.outlet.closed.called and not self.clock.getDelayedCalls()


@pytest.mark.parametrize("stream", [True, False])
def test_both_kinds_of_answer_are_observers(stream: bool) -> None:
    verifyObject(ITurnObserver, World(stream=stream).response)


# A stream.


def test_a_stream_sends_events_as_they_come_and_ends_with_the_result() -> None:
    world = World()
    world.response.turn_planned(SESSION, None, {})
    assert world.connection.received == b""
    world.response.turn_events([INIT])
    assert world.answer.status == 200
    assert world.answer.body == b"data: " + INIT.line + b"\n\n"
    world.response.turn_events([STATUS, TEXT, PARTIAL, TEXT])
    world.response.turn_ended(SUCCESS)
    assert world.answer.body == NativeStream(partial_messages=False).events(
        [INIT, TEXT, TEXT, RESULT]
    )
    assert world.answer.complete
    assert world.is_over()


def test_the_head_says_what_it_is_and_forbids_buffering() -> None:
    world = World()
    world.response.turn_events([INIT])
    headers = world.answer.headers
    assert headers["content-type"] == "text/event-stream"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-request-id"] == "r-1"
    assert headers["x-claude-session-id"] == SESSION
    assert headers["server"].startswith("claude-proxy/")


def test_what_the_client_did_not_ask_for_does_not_commit_the_head() -> None:
    world = World()
    world.response.turn_events([STATUS, PARTIAL])
    assert world.connection.received == b""
    world.response.turn_ended(failure(Failure.CLI_NOT_AUTHENTICATED))
    assert world.answer.status == 502


def test_partial_messages_go_out_when_asked_for() -> None:
    world = World(partial=True)
    world.response.turn_events([PARTIAL])
    assert world.answer.body == b"data: " + PARTIAL.line + b"\n\n"


def test_events_that_come_together_are_one_write() -> None:
    world = World()
    world.response.turn_events([INIT])
    world.connection.transport.clear()
    writes: list[list[bytes]] = []
    world.connection.transport.writeSequence = writes.append
    world.response.turn_events([TEXT] * 50)
    assert [b"".join(pieces).count(b"data: ") for pieces in writes] == [50]


@pytest.mark.parametrize(
    ("code", "status"),
    [(code, code.status) for code in Failure],
)
def test_a_failure_before_the_first_event_has_its_true_status(code: Failure, status: int) -> None:
    world = World()
    world.response.turn_planned(SESSION, None, {})
    world.response.turn_ended(failure(code))
    assert world.answer.status == status
    assert world.answer.error["code"] == code.code
    assert world.answer.headers["x-claude-session-id"] == SESSION
    assert world.is_over()


def test_a_failure_says_when_to_come_back() -> None:
    world = World()
    world.response.turn_ended(failure(Failure.RATE_LIMIT_EXCEEDED, retry_after=7))
    assert world.answer.headers["retry-after"] == "7"


def test_a_failed_result_before_any_event_is_an_error_with_its_status() -> None:
    world = World()
    world.response.turn_ended(failure(Failure.RATE_LIMIT_EXCEEDED, result=FAILED_RESULT))
    assert world.answer.status == 429
    assert world.answer.complete


def test_a_failure_after_the_first_event_is_a_last_frame() -> None:
    world = World()
    world.response.turn_planned(SESSION, None, {})
    world.response.turn_events([INIT])
    outcome = failure(Failure.INACTIVITY_TIMEOUT)
    world.response.turn_ended(outcome)
    assert outcome.error is not None
    assert world.answer.status == 200
    dialect = NativeStream(partial_messages=False)
    assert world.answer.body == dialect.events([INIT]) + dialect.failure(outcome.error, SESSION)
    assert world.answer.complete
    assert world.is_over()


def test_a_failure_of_the_clis_own_is_its_own_result() -> None:
    world = World()
    world.response.turn_events([INIT])
    world.response.turn_ended(failure(Failure.UPSTREAM_ERROR, result=FAILED_RESULT))
    assert world.answer.body.count(b"data: ") == 2
    assert world.answer.body.endswith(FAILED_RESULT.line + b"\n\n")


def test_a_result_alone_is_a_stream_too() -> None:
    world = World()
    world.response.turn_ended(SUCCESS)
    assert world.answer.status == 200
    assert world.answer.body == b"data: " + RESULT.line + b"\n\n"
    assert world.is_over()


def test_an_old_cli_tells_the_session_in_its_first_event() -> None:
    world = World()
    world.response.turn_planned(None, None, {})
    world.response.turn_events([INIT])
    assert world.answer.headers["x-claude-session-id"] == SESSION


def test_without_a_session_there_is_no_such_header() -> None:
    world = World()
    world.response.turn_planned(None, None, {})
    world.response.turn_ended(failure(Failure.CLI_FAILED))
    assert "x-claude-session-id" not in world.answer.headers


def test_silence_is_bridged_by_comments() -> None:
    world = World()
    world.response.turn_events([INIT])
    before = world.answer.body
    world.clock.advance(HEARTBEAT - 0.1)
    assert world.answer.body == before
    world.clock.advance(0.1)
    assert world.answer.body == before + b":\n"
    world.clock.advance(HEARTBEAT)
    assert world.answer.body == before + b":\n:\n"


def test_a_stream_that_is_not_silent_gets_no_comments() -> None:
    world = World()
    for _ in range(20):
        world.response.turn_events([TEXT])
        world.clock.advance(HEARTBEAT / 2)
    assert b":\n" not in world.answer.body.replace(b"data: ", b"")


def test_silence_is_counted_from_the_last_event() -> None:
    world = World()
    world.response.turn_events([INIT])
    world.clock.advance(HEARTBEAT - 0.5)
    world.response.turn_events([TEXT])
    world.clock.pump([0.5] * int(2 * HEARTBEAT))
    assert world.answer.body.endswith(b"\n\n:\n")


def test_before_the_head_no_comment_commits_the_status() -> None:
    world = World()
    world.response.turn_planned(SESSION, None, {})
    world.clock.advance(10 * HEARTBEAT)
    assert world.connection.received == b""


def test_no_comments_are_piled_up_for_a_client_that_does_not_read() -> None:
    world = World()
    world.response.turn_events([INIT])
    world.connection.transport.clear()
    world.connection.block()
    world.clock.pump([HEARTBEAT] * 3)
    assert world.connection.received == b""
    world.connection.unblock()
    world.clock.advance(HEARTBEAT)
    assert world.connection.received == b"2\r\n:\n\r\n"


@pytest.mark.parametrize("stream", [True, False])
def test_a_slow_client_slows_the_turn(stream: bool) -> None:
    world = World(stream=stream)
    world.connection.block()
    world.connection.unblock()
    assert world.turn.heard == ["pause", "resume"]


def test_a_client_that_leaves_stops_its_turn() -> None:
    world = World()
    world.response.turn_events([INIT])
    with capturedLogs() as events:
        world.connection.lose()
    assert world.turn.heard == [("stop", None)]
    assert [event["request_id"] for event in events if event["type"] == "client_gone"] == ["r-1"]
    world.response.turn_events([TEXT])
    world.response.turn_ended(Outcome(OutcomeKind.ABANDONED))
    assert world.is_over()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_before_the_first_event_stops_its_turn(stream: bool) -> None:
    world = World(stream=stream)
    world.connection.lose()
    assert world.turn.heard == [("stop", None)]
    world.response.turn_ended(Outcome(OutcomeKind.ABANDONED))
    assert world.is_over()


def test_a_client_that_left_gets_no_comments() -> None:
    world = World()
    world.response.turn_events([INIT])
    world.connection.lose()
    world.connection.transport.clear()
    world.clock.pump([HEARTBEAT] * 3)
    assert world.connection.received == b""


@pytest.mark.parametrize("stream", [True, False])
def test_a_turn_that_cannot_start_is_an_error(stream: bool) -> None:
    world = World(stream=stream)

    def refuse() -> IRunningTurn:
        raise ProxyError(Failure.SHUTTING_DOWN, retry_after=5)

    world.response.run(refuse)
    assert (world.answer.status, world.answer.headers["retry-after"]) == (503, "5")
    assert world.is_over()


# A whole answer.


def test_a_whole_answer_is_the_result_alone() -> None:
    world = World(stream=False)
    world.response.turn_planned(None, None, {})
    world.response.turn_events([INIT, TEXT])
    assert world.connection.received == b""
    world.response.turn_ended(SUCCESS)
    assert world.answer.status == 200
    assert world.answer.body == RESULT.line
    assert world.answer.headers["content-type"] == "application/json"
    assert world.answer.headers["x-claude-session-id"] == SESSION
    assert world.is_over()


@pytest.mark.parametrize("code", list(Failure))
def test_a_failed_turn_is_an_error_with_its_status_and_session(code: Failure) -> None:
    world = World(stream=False)
    world.response.turn_planned(SESSION, None, {})
    world.response.turn_events([INIT, TEXT])
    world.response.turn_ended(failure(code, result=FAILED_RESULT))
    assert (world.answer.status, world.answer.error["code"]) == (code.status, code.code)
    assert world.answer.headers["x-claude-session-id"] == SESSION
    assert world.is_over()


def test_a_limit_of_the_requests_own_is_no_failure() -> None:
    world = World(stream=False)
    limited = event(type="result", subtype="error_max_turns", is_error=True)
    world.response.turn_ended(Outcome(OutcomeKind.LIMIT, result=limited, session_id=SESSION))
    assert (world.answer.status, world.answer.body) == (200, limited.line)


# Dialects with more to say.


@implementer(IFramer)
class Dialect:
    """Tells everything in one word each; what it cannot tell, it refuses."""

    def planned(self, workspace: str | None, parameters: Mapping[str, object]) -> None:
        self.plan = (workspace, parameters)

    def open(self) -> bytes:
        return b"[open]"

    def events(self, events: list[Event]) -> bytes:
        if PARTIAL in events:
            raise ProxyError(Failure.UPSTREAM_ERROR, "It broke.")
        return b"[events]" if TEXT in events else b""

    def beat(self) -> bytes:
        return b"[beat]"

    def end(self, outcome: Outcome, session_id: str | None) -> bytes:
        if outcome.result is not RESULT and outcome.error is None:
            raise ProxyError(Failure.UPSTREAM_ERROR, "No JSON.")
        return b"[end]" if outcome.error is None else self.failure(outcome.error, session_id)

    def failure(self, error: ProxyError, session_id: str | None) -> bytes:
        return b"[" + error.failure.code.encode() + b"]"


@implementer(IWholeAnswer)
class WholeDialect:
    """The same, as one body."""

    def planned(self, workspace: str | None, parameters: Mapping[str, object]) -> None:
        self.plan = (workspace, parameters)

    def events(self, events: list[Event]) -> None:
        Dialect().events(events)

    def body(self, outcome: Outcome, session_id: str | None) -> bytes:
        if outcome.error is not None:
            raise outcome.error
        return Dialect().end(outcome, session_id)


class OtherWorld(World):
    """A response in that dialect."""

    def __init__(self, *, stream: bool = True, tip: str | None = None) -> None:
        super().__init__(stream=stream)
        request = self.response.request
        self.connection.transport.clear()
        other = KeptRequests()
        self.connection = Connection(open_site(other, Clock()))
        self.connection.send(encode_request("GET", "/", {"X-Request-Id": "r-1"}))
        [request] = other.requests
        framer, whole = Dialect(), WholeDialect()
        self.dialect = framer if stream else whole
        self.response = (
            EventStream(request, self.clock, 60.0, framer, tip=lambda: tip, patience=5.0)
            if stream
            else WholeAnswer(request, self.clock, 60.0, whole, tip=lambda: tip)
        )
        self.response.run(lambda: self.turn)


def test_patience_counts_from_the_turns_start_and_sends_the_head_alone() -> None:
    world = OtherWorld()
    world.clock.advance(60)
    assert world.connection.received == b""
    world.response.turn_planned(SESSION, None, {})
    world.response.turn_events([INIT])
    world.clock.advance(4.9)
    assert world.connection.received == b""
    world.clock.advance(0.1)
    assert world.answer.status == 200
    assert world.answer.headers["x-claude-session-id"] == SESSION
    assert world.answer.body == b"[open]"
    world.response.turn_events([TEXT])
    world.response.turn_ended(SUCCESS)
    assert world.answer.body == b"[open][events][end]"
    assert world.is_over()


def test_a_turn_that_is_planned_anew_does_not_wait_anew() -> None:
    world = OtherWorld()
    world.response.turn_planned(SESSION, None, {})
    world.clock.advance(3)
    world.response.turn_planned("bbbbbbbb-0000-4000-8000-000000000000", None, {})
    world.clock.advance(2)
    assert world.answer.body == b"[open]"
    assert world.answer.headers["x-claude-session-id"].startswith("bbbb")


def test_patience_is_not_needed_once_there_is_something_to_tell() -> None:
    world = OtherWorld()
    world.response.turn_planned(SESSION, None, {})
    world.response.turn_events([TEXT])
    world.clock.advance(10)
    assert world.answer.body == b"[events]"


def test_a_failure_within_the_patience_has_its_true_status() -> None:
    world = OtherWorld()
    world.response.turn_planned(SESSION, None, {})
    world.clock.advance(4)
    world.response.turn_ended(failure(Failure.RATE_LIMIT_EXCEEDED, result=FAILED_RESULT))
    assert world.answer.status == 429
    assert world.is_over()


def test_a_client_that_leaves_within_the_patience_leaves_no_timer() -> None:
    world = OtherWorld()
    world.response.turn_planned(SESSION, None, {})
    world.connection.lose()
    world.response.turn_ended(Outcome(OutcomeKind.ABANDONED, result=RESULT))
    assert world.is_over()


def test_silence_is_bridged_in_the_dialects_own_way() -> None:
    world = OtherWorld()
    world.response.turn_events([TEXT])
    world.clock.advance(HEARTBEAT)
    assert world.answer.body == b"[events][beat]"


@pytest.mark.parametrize("stream", [True, False])
def test_what_cannot_be_told_truthfully_ends_the_turn(stream: bool) -> None:
    world = OtherWorld(stream=stream)
    world.response.turn_events([TEXT])
    world.response.turn_events([PARTIAL])
    [(word, error)] = world.turn.heard
    assert (word, error.failure) == ("stop", Failure.UPSTREAM_ERROR)
    world.response.turn_ended(Outcome(OutcomeKind.FAILURE, error))
    if stream:
        assert world.answer.body == b"[events][upstream_error]"
    else:
        assert world.answer.error["message"] == "It broke."
    assert world.is_over()


@pytest.mark.parametrize("begun", [True, False])
def test_a_success_that_is_none_for_the_dialect_is_a_failure(begun: bool) -> None:
    world = OtherWorld(tip="abc")
    if begun:
        world.response.turn_events([TEXT])
    world.response.turn_ended(Outcome(OutcomeKind.SUCCESS))
    if begun:
        assert world.answer.body == b"[events][upstream_error]"
    else:
        assert (world.answer.status, world.answer.error["message"]) == (502, "No JSON.")
    assert world.turn.heard == []
    assert world.is_over()


@pytest.mark.parametrize("stream", [True, False])
def test_the_conversation_is_remembered_before_the_answers_end_is_sent(stream: bool) -> None:
    world = OtherWorld(stream=stream, tip="abc")
    seen: list[bytes] = []
    world.turn.remember = lambda tip: seen.append(world.connection.received)  # type: ignore[method-assign]  # to look at that moment
    world.response.turn_ended(SUCCESS)
    assert seen == [b""]


def test_without_a_tip_nothing_is_remembered() -> None:
    world = OtherWorld()
    world.response.turn_ended(SUCCESS)
    assert world.turn.heard == []


def test_both_native_dialects_fit() -> None:
    verifyObject(IFramer, NativeStream(partial_messages=False))
    verifyObject(IWholeAnswer, NativeAnswer())


@pytest.mark.parametrize("stream", [True, False])
def test_the_dialect_learns_what_its_turn_runs_on(stream: bool) -> None:
    world = OtherWorld(stream=stream)
    world.response.turn_planned(SESSION, "w", {"allowed-tools": ["Bash"]})
    assert world.dialect.plan == ("w", {"allowed-tools": ["Bash"]})


TOOL_RESULT = event(type="user", message={"content": [{"type": "tool_result"}]})
REPLAY = event(type="user", message={"content": "hello"}, isReplay=True)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("events", "code", "expected"),
    [
        ([INIT, REPLAY], Failure.UPSTREAM_OVERLOADED, None),
        ([INIT, TOOL_RESULT], Failure.UPSTREAM_OVERLOADED, "false"),
        ([INIT, TOOL_RESULT], Failure.CLI_FAILED, "false"),
        ([INIT], Failure.TURN_TIMEOUT, "false"),
        ([], Failure.INACTIVITY_TIMEOUT, "false"),
        ([], Failure.SERVER_BUSY, None),
    ],
)
def test_clients_are_told_not_to_repeat_what_was_done(
    stream: bool, events: list[Event], code: Failure, expected: str | None
) -> None:
    world = OtherWorld(stream=stream)
    if events:
        world.response.turn_events(events)
    world.response.turn_ended(failure(code))
    assert world.answer.status == code.status
    assert world.answer.headers.get("x-should-retry") == expected
