"""One turn, its process and its client played by the test."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from zope.interface import implementer
from zope.interface.verify import verifyObject

from claude_proxy.cli.events import Event, parse_event
from claude_proxy.cli.figures import ProcessTotals
from claude_proxy.cli.outcomes import Ending, Figures, Outcome, OutcomeKind
from claude_proxy.cli.pairing import Pairing
from claude_proxy.cli.turn import Limits, Turn
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.interfaces import IAgentListener, ITurnObserver

TOTAL, INACTIVITY = 100.0, 10.0

INIT = {"type": "system", "subtype": "init", "session_id": "s-1"}
STATUS = {"type": "system", "subtype": "status", "session_id": "s-1"}
START = {"type": "stream_event", "event": {"type": "message_start"}, "session_id": "s-1"}
DELTA = {"type": "stream_event", "event": {"type": "content_block_delta"}, "session_id": "s-1"}
TEXT = {"type": "assistant", "session_id": "s-1"}
USER = {"type": "user", "session_id": "s-1"}
RESULT = {"type": "result", "subtype": "success", "is_error": False, "session_id": "s-1"}
REFUSED = {"type": "system", "subtype": "model_refusal_no_fallback"}
RATE_LIMITED = {"type": "result", "subtype": "success", "is_error": True, "api_error_status": 429}


def retry(status: object) -> dict[str, Any]:
    return {"type": "system", "subtype": "api_retry", "attempt": 1, "error_status": status}


def limit(**info: object) -> dict[str, Any]:
    return {"type": "rate_limit_event", "rate_limit_info": info}


@implementer(ITurnObserver)
class Observer:
    """Keeps what it is told, and may act when it is told of events."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.then: Callable[[], object] = lambda: None

    def turn_planned(
        self, session_id: str | None, workspace: str | None, parameters: Mapping[str, object]
    ) -> None:
        raise AssertionError("a turn does not plan itself")

    def turn_events(self, events: list[Event]) -> None:
        assert events
        self.batches.append([event.subtype or event.type for event in events])
        self.then()

    def turn_ended(self, outcome: Outcome) -> None:
        raise AssertionError("that is told by the one who started the turn")


class Agent:
    """Keeps what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.log_context = {"request_id": "req_1"}

    def write(self, data: bytes) -> None:
        self.asked.append(f"write {data.decode()}")

    def finish(self) -> None:
        self.asked.append("finish")

    def stop(self) -> None:
        self.asked.append("stop")

    def pause(self) -> None:
        self.asked.append("pause")

    def resume(self) -> None:
        self.asked.append("resume")


class Play:
    """A started turn with all around it; the request came two seconds before its start."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.observer = Observer()
        self.agent = Agent()
        self.begun: list[str | None] = []
        self.outcomes: list[Outcome] = []
        self.turn = Turn(
            self.clock,
            self.observer,
            Limits(TOTAL, INACTIVITY),
            requested=self.clock.seconds(),
            begun=self.begun.append,
            noticed=lambda _event: None,
            pairing=Pairing("uuid", fresh=True, cautious=False, is_command=False),
            totals=ProcessTotals(),
            keeps=False,
        )
        self.turn.done.addCallback(self.outcomes.append)
        self.clock.advance(2)

    def start(self) -> None:
        self.turn.start(cast(Any, self.agent), b"hello")

    def says(self, *events: dict[str, Any]) -> None:
        parsed = [parse_event(json.dumps(event).encode()) for event in events]
        self.turn.events_received([event for event in parsed if event is not None])

    def passes(self, seconds: float) -> None:
        self.clock.pump([0.5] * int(seconds / 0.5))

    @property
    def outcome(self) -> Outcome:
        """How the turn ended: once, with no timer left."""
        assert len(self.outcomes) == 1
        assert self.clock.getDelayedCalls() == []
        return self.outcomes[0]

    @property
    def error(self) -> ProxyError:
        assert self.outcome.kind is OutcomeKind.FAILURE
        assert self.outcome.error is not None
        return self.outcome.error


@pytest.fixture(name="play")
def _play() -> Play:
    play = Play()
    play.start()
    return play


def test_a_turn_listens_to_its_agent(play: Play) -> None:
    verifyObject(IAgentListener, play.turn)
    verifyObject(ITurnObserver, play.observer)


# The usual way.


def test_a_turn_sends_its_message_passes_events_on_and_ends_with_the_result(play: Play) -> None:
    assert play.agent.asked == ["write hello"]
    play.says(INIT, STATUS)
    play.says(DELTA)
    play.says(TEXT, RESULT)
    assert play.observer.batches == [["init", "status"], ["stream_event"], ["assistant"]]
    assert play.outcome.kind is OutcomeKind.SUCCESS
    assert play.outcome.session_id == "s-1"
    assert play.outcome.result is not None
    assert play.outcome.result.type == "result"
    assert play.agent.asked == ["write hello", "finish"]


def test_a_result_on_its_own_passes_nothing_on(play: Play) -> None:
    play.says(RESULT)
    assert play.observer.batches == []
    assert play.outcome.kind is OutcomeKind.SUCCESS


def test_what_comes_after_the_result_is_ignored(play: Play) -> None:
    play.says(INIT, RESULT, TEXT, RESULT)
    play.says(INIT, TEXT, RESULT)
    play.turn.agent_ended(Ending(exit_code=1))
    assert play.observer.batches == [["init"]]
    assert play.outcome.kind is OutcomeKind.SUCCESS
    assert play.agent.asked == ["write hello", "finish"]
    assert play.begun == ["s-1"]


def test_the_beginning_is_told_once(play: Play) -> None:
    play.says(STATUS)
    assert play.begun == []
    play.says(INIT)
    play.says({**INIT, "session_id": "s-2"})
    assert play.begun == ["s-1"]
    play.says({"type": "result", "subtype": "success"})
    assert play.outcome.session_id == "s-2"


def test_the_session_of_the_result_wins(play: Play) -> None:
    play.says(INIT, {**RESULT, "session_id": "s-9"})
    assert play.outcome.session_id == "s-9"


# Figures.


def test_figures_count_from_the_request(play: Play) -> None:
    play.passes(1)
    play.says(INIT)
    play.passes(2)
    play.says(USER, START)
    play.passes(1)
    play.says(DELTA)
    play.passes(1)
    play.says(DELTA, TEXT, RESULT)
    assert play.outcome.figures == Figures(first_event=3, first_token=6)


def test_an_answer_without_partial_messages_has_figures_too(play: Play) -> None:
    play.says(INIT, TEXT, RESULT)
    assert play.outcome.figures == Figures(first_event=2, first_token=2)


def test_a_turn_without_events_has_no_figures(play: Play) -> None:
    play.turn.agent_ended(Ending(exit_code=0))
    assert play.outcome.figures == Figures(None, None)


# Limits of time.


def test_the_whole_turn_has_a_limit_however_much_is_said(play: Play) -> None:
    for _ in range(99):
        play.passes(1)
        play.says(DELTA)
    assert play.outcomes == []
    play.passes(1)
    assert play.error.failure is Failure.TURN_TIMEOUT
    assert play.error.message == (
        "The turn took longer than the 100 seconds that this server allows "
        "(CLAUDE_TOTAL_TIMEOUT_MS) and was stopped."
    )
    assert play.agent.asked == ["write hello", "stop"]


def test_the_whole_turn_has_a_limit_however_slow_the_client_is(play: Play) -> None:
    play.turn.pause()
    play.passes(TOTAL)
    assert play.error.failure is Failure.TURN_TIMEOUT


def test_silence_ends_a_turn(play: Play) -> None:
    play.passes(INACTIVITY - 0.5)
    assert play.outcomes == []
    play.passes(0.5)
    assert play.error.failure is Failure.INACTIVITY_TIMEOUT
    assert play.error.message == (
        "The Claude CLI was silent for the 10 seconds that this server allows "
        "(CLAUDE_INACTIVITY_TIMEOUT_MS) and was stopped."
    )
    assert play.agent.asked == ["write hello", "stop"]


def test_the_silence_counts_from_the_last_event(play: Play) -> None:
    for _ in range(4):
        play.passes(7)
        play.says(DELTA)
    play.passes(INACTIVITY - 0.5)
    assert play.outcomes == []
    play.passes(0.5)
    assert play.error.failure is Failure.INACTIVITY_TIMEOUT


def test_one_timer_watches_the_silence_however_many_events_come(play: Play) -> None:
    for _ in range(100):
        play.says(DELTA)
    assert len(play.clock.getDelayedCalls()) == 2


def test_the_silence_of_a_paused_process_does_not_count(play: Play) -> None:
    play.passes(9)
    play.turn.pause()
    play.passes(60)
    assert play.outcomes == []
    play.turn.resume()
    play.passes(INACTIVITY - 0.5)
    assert play.outcomes == []
    play.passes(0.5)
    assert play.error.failure is Failure.INACTIVITY_TIMEOUT
    assert play.agent.asked == ["write hello", "pause", "resume", "stop"]


# Ends before the result.


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (None, OutcomeKind.ABANDONED),
        (ProxyError(Failure.SHUTTING_DOWN), OutcomeKind.FAILURE),
    ],
)
def test_a_stopped_turn_ends_with_its_reason(
    play: Play, reason: ProxyError | None, kind: OutcomeKind
) -> None:
    play.says(INIT)
    play.turn.stop(reason)
    assert play.outcome.kind is kind
    assert play.outcome.error is reason
    assert play.outcome.session_id == "s-1"
    play.turn.stop(ProxyError(Failure.INTERNAL_ERROR))
    play.says(TEXT, RESULT)
    play.turn.agent_ended(Ending(signal=9))
    assert play.outcome.error is reason
    assert play.observer.batches == [["init"]]
    assert play.agent.asked == ["write hello", "stop"]


@pytest.mark.parametrize("reason", [None, ProxyError(Failure.SHUTTING_DOWN)])
def test_a_turn_can_be_stopped_before_its_start(reason: ProxyError | None) -> None:
    play = Play()
    play.turn.stop(reason)
    assert play.outcome.error is reason
    assert play.agent.asked == []


def test_a_turn_can_be_told_its_result_before_its_start() -> None:
    play = Play()
    play.says(RESULT)
    assert play.outcome.kind is OutcomeKind.SUCCESS
    assert play.agent.asked == []


def test_an_agent_that_ends_without_a_word_ends_the_turn(play: Play) -> None:
    play.turn.agent_ended(Ending(exit_code=127, stderr="node: not found"))
    assert play.error.failure is Failure.CLI_NOT_FOUND
    assert play.agent.asked == ["write hello"]


def test_an_agent_that_ends_after_some_words_ends_the_turn(play: Play) -> None:
    play.says(INIT)
    play.turn.agent_ended(Ending(exit_code=127, stderr="node: not found"))
    assert play.error.failure is Failure.CLI_FAILED
    assert play.error.message == (
        "The Claude CLI ended without a result (exit code 127): node: not found"
    )
    assert play.outcome.session_id == "s-1"


def test_a_refused_key_ends_the_turn_at_once_after_what_was_said_so_far(play: Play) -> None:
    play.says(INIT, retry(401), retry(401), TEXT, RESULT)
    assert play.observer.batches == [["init", "api_retry"]]
    assert play.error.failure is Failure.CLI_NOT_AUTHENTICATED
    assert play.error.message == Failure.CLI_NOT_AUTHENTICATED.sentence
    assert play.agent.asked == ["write hello", "stop"]


@pytest.mark.parametrize("status", [500, 529, 429, 403, None, "401"])
def test_other_retries_are_only_passed_on(play: Play, status: object) -> None:
    play.says(INIT, retry(status))
    play.says(TEXT, RESULT)
    assert play.observer.batches == [["init", "api_retry"], ["assistant"]]
    assert play.outcome.kind is OutcomeKind.SUCCESS


def test_a_refusal_is_remembered_until_the_result(play: Play) -> None:
    play.says(INIT, REFUSED)
    play.says({"type": "result", "subtype": "success", "is_error": True, "result": "No."})
    assert play.observer.batches == [["init", "model_refusal_no_fallback"]]
    assert play.outcome.kind is OutcomeKind.REFUSAL


@pytest.mark.parametrize(
    ("info", "seconds"),
    [
        ({"resetsAt": 1062}, 60),
        ({"resetsAt": 1002.25}, 1),
        ({"resetsAt": 1003.25}, 2),
        ({"resetsAt": 5}, 1),
        ({"resetsAt": "soon"}, None),
        ({"resetsAt": None}, None),
        ({}, None),
    ],
)
def test_the_end_of_a_rate_limit_is_passed_on(
    play: Play, info: dict[str, object], seconds: int | None
) -> None:
    play.says(INIT, limit(status="rejected", **info))
    play.says(RATE_LIMITED)
    assert play.observer.batches == [["init", "rate_limit_event"]]
    assert play.error.failure is Failure.RATE_LIMIT_EXCEEDED
    assert play.error.retry_after == seconds


def test_a_rate_limit_event_without_information_is_passed_on(play: Play) -> None:
    play.says({"type": "rate_limit_event", "rate_limit_info": 7}, {"type": "rate_limit_event"})
    play.says(RATE_LIMITED)
    assert play.error.retry_after is None


# The client.


def test_pausing_and_resuming_reach_the_agent(play: Play) -> None:
    play.turn.resume()
    play.turn.pause()
    play.turn.resume()
    play.turn.resume()
    assert play.agent.asked == ["write hello", "pause", "resume"]


def test_a_turn_without_an_agent_has_nothing_to_pause() -> None:
    play = Play()
    play.turn.pause()
    play.turn.resume()
    play.start()
    assert play.agent.asked == ["write hello"]


def test_a_turn_that_has_ended_pauses_nothing(play: Play) -> None:
    play.says(RESULT)
    play.turn.pause()
    play.turn.resume()
    assert play.agent.asked == ["write hello", "finish"]


def test_a_client_that_slows_down_just_before_the_result_does_not_hold_the_process(
    play: Play,
) -> None:
    # What it pauses for came together with the result: nothing else will ever resume it.
    play.observer.then = play.turn.pause
    play.says(INIT, TEXT, RESULT)
    assert play.outcome.kind is OutcomeKind.SUCCESS
    assert play.agent.asked == ["write hello", "pause", "resume", "finish"]
    play.turn.resume()
    assert play.agent.asked[-1] == "finish"


def test_a_client_that_leaves_just_before_the_result_abandons_the_turn(play: Play) -> None:
    play.observer.then = lambda: play.turn.stop(None)
    play.says(INIT, TEXT, RESULT)
    assert play.outcome.kind is OutcomeKind.ABANDONED
    assert play.agent.asked == ["write hello", "stop"]


@pytest.mark.parametrize("last", [TEXT, RESULT, retry(401)])
def test_an_observer_that_fails_ends_the_turn_and_disturbs_nobody_else(
    play: Play, last: dict[str, Any]
) -> None:
    def fail() -> None:
        raise ValueError("a fault of ours")

    play.observer.then = fail
    with capturedLogs() as logs:
        play.says(INIT, last)
    assert play.error.failure is Failure.INTERNAL_ERROR
    assert play.agent.asked == ["write hello", "stop"]
    assert [(log["type"], log["log_failure"].type, log["request_id"]) for log in logs] == [
        ("internal_error", ValueError, "req_1")
    ]
