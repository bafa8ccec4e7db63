"""The native dialect's answers: the CLI's own events, byte for byte."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_proxy.cli.events import Event, parse_event
from claude_proxy.cli.outcomes import Outcome, OutcomeKind
from claude_proxy.dialects.passthrough import NativeAnswer, NativeStream
from claude_proxy.errors import Failure, ProxyError


def event(line: bytes) -> Event:
    parsed = parse_event(line)
    assert parsed is not None
    return parsed


INIT = b'{"type":"system","subtype":"init","session_id":"s","odd":  1.0}'
STATUS = b'{"type":"system","subtype":"status","status":"requesting"}'
PARTIAL = b'{"type":"stream_event","event":{"type":"message_start"}}'
REPLAY = b'{"type":"user","isReplay":true,"message":{}}'
USER = b'{"type":"user","message":{"role":"user","content":[]}}'
ASSISTANT = '{"type":"assistant","message":{"text":"\\u00e4 ä \x85 \\r\\n"}}'.encode()
UNKNOWN = b'{"hello":"from the future"}'
RESULT = b'{"duration_ms":1,"type":"result","subtype":"success","is_error":false,"result":"x"}'

ALL = [INIT, STATUS, PARTIAL, REPLAY, USER, ASSISTANT, UNKNOWN, RESULT]


def frames(*lines: bytes) -> bytes:
    return b"".join(b"data: " + line + b"\n\n" for line in lines)


def test_events_go_out_byte_for_byte_in_one_piece() -> None:
    sent = NativeStream(partial_messages=False).events([event(line) for line in ALL])
    assert sent == frames(INIT, USER, ASSISTANT, UNKNOWN, RESULT)


def test_partial_messages_go_out_when_asked_for_but_replays_never() -> None:
    sent = NativeStream(partial_messages=True).events([event(line) for line in ALL])
    assert sent == frames(INIT, STATUS, PARTIAL, USER, ASSISTANT, UNKNOWN, RESULT)


@pytest.mark.parametrize(
    ("lines", "partial"), [([], True), ([REPLAY], True), ([STATUS, PARTIAL, REPLAY], False)]
)
def test_where_nothing_is_for_the_client_nothing_is_sent(lines: list[bytes], partial: bool) -> None:
    assert NativeStream(partial_messages=partial).events([event(line) for line in lines]) == b""


def test_other_kinds_of_system_events_go_out() -> None:
    lines = [
        b'{"type":"system","subtype":"api_retry"}',
        b'{"type":"system","subtype":"compact_boundary"}',
        b'{"type":"rate_limit_event"}',
    ]
    sent = NativeStream(partial_messages=False).events([event(line) for line in lines])
    assert sent == frames(*lines)


@pytest.mark.parametrize("line", [b'{"type":"result"}\r', b'{\r"type":\r"result"\r}\r'])
def test_a_carriage_return_does_not_cut_an_event_in_two(line: bytes) -> None:
    sent = NativeStream(partial_messages=False).events([event(line)])
    assert b"\r" not in sent
    assert len(sent) == len(frames(line))
    assert json.loads(sent.removeprefix(b"data: ")) == {"type": "result"}


@given(st.dictionaries(st.text(), st.text()))
def test_no_text_in_an_event_can_end_it(fields: dict[str, str]) -> None:
    line = json.dumps({**fields, "type": "x"}, ensure_ascii=False).encode("utf-8", "replace")
    sent = NativeStream(partial_messages=False).events([event(line)])
    assert sent == frames(line)
    assert sent.count(b"\n") == 2


@pytest.mark.parametrize(
    ("failure", "subtype"),
    [
        (Failure.TURN_TIMEOUT, "timeout"),
        (Failure.INACTIVITY_TIMEOUT, "timeout"),
        (Failure.CLI_FAILED, "error"),
        (Failure.SHUTTING_DOWN, "error"),
        (Failure.INTERNAL_ERROR, "error"),
    ],
)
@pytest.mark.parametrize("session", ["s-1", None])
def test_a_failure_in_mid_stream_is_a_result_that_says_so(
    failure: Failure, subtype: str, session: str | None
) -> None:
    sent = NativeStream(partial_messages=False).failure(
        ProxyError(failure, 'It "failed"\nbadly.'), session
    )
    assert sent.startswith(b"data: ")
    assert sent.endswith(b"\n\n")
    assert sent.count(b"\n") == 2
    assert json.loads(sent.removeprefix(b"data: ")) == {
        "type": "result",
        "subtype": subtype,
        "is_error": True,
        "result": 'It "failed"\nbadly.',
        "error": {
            "message": 'It "failed"\nbadly.',
            "type": failure.type,
            "param": None,
            "code": failure.code,
        },
        "session_id": session,
    }


@pytest.mark.parametrize("kind", [OutcomeKind.SUCCESS, OutcomeKind.LIMIT, OutcomeKind.REFUSAL])
def test_a_whole_answer_is_the_result_byte_for_byte(kind: OutcomeKind) -> None:
    assert NativeAnswer().body(Outcome(kind, result=event(RESULT)), None) == RESULT


def test_a_failed_turn_has_no_whole_answer() -> None:
    error = ProxyError(Failure.RATE_LIMIT_EXCEEDED)
    outcome = Outcome(OutcomeKind.FAILURE, error, result=event(RESULT))
    with pytest.raises(ProxyError) as caught:
        NativeAnswer().body(outcome, None)
    assert caught.value is error


def test_a_turn_that_its_client_left_has_no_whole_answer() -> None:
    with pytest.raises(ProxyError) as caught:
        NativeAnswer().body(Outcome(OutcomeKind.ABANDONED), None)
    assert caught.value.failure is Failure.INTERNAL_ERROR


def test_before_anything_happened_there_is_nothing_to_tell() -> None:
    assert NativeStream(partial_messages=True).open() == b""


def test_a_sign_of_life_is_no_event() -> None:
    assert NativeStream(partial_messages=True).beat() == b":\n"


@pytest.mark.parametrize("kind", [OutcomeKind.SUCCESS, OutcomeKind.FAILURE])
def test_a_stream_ends_with_the_result_whatever_it_says(kind: OutcomeKind) -> None:
    error = None if kind is OutcomeKind.SUCCESS else ProxyError(Failure.UPSTREAM_ERROR)
    outcome = Outcome(kind, error, result=event(RESULT))
    assert NativeStream(partial_messages=False).end(outcome, "s") == frames(RESULT)


def test_a_stream_without_a_result_ends_with_the_failure() -> None:
    stream, error = NativeStream(partial_messages=False), ProxyError(Failure.CLI_FAILED)
    outcome = Outcome(OutcomeKind.FAILURE, error)
    assert stream.end(outcome, "s") == stream.failure(error, "s")
    assert stream.end(Outcome(OutcomeKind.ABANDONED), "s") == b""
