"""Chunks and completions in OpenAI's shapes, checked with the openai package's own types."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import httpx
import pytest
from httpx_sse import EventSource
from hypothesis import given
from hypothesis import strategies as st
from openai._streaming import SSEDecoder
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from claude_proxy.cli.events import Event
from claude_proxy.cli.outcomes import Outcome, OutcomeKind
from claude_proxy.dialects import completion
from claude_proxy.dialects.answer import REASONING, TEXT, Piece
from claude_proxy.dialects.completion import ChatAnswer, ChatStream
from claude_proxy.dialects.inline import InlineActivity
from claude_proxy.errors import Failure, ProxyError
from tests.answers import (
    SESSION,
    assistant,
    call,
    delta,
    init,
    outcome,
    result,
    started,
    stopped,
    streamed,
    text,
    thinking,
    tool_result,
)

_T = TypeVar("_T", ChatStream, ChatAnswer)

EXTRAS = {
    "ChatCompletionChunk": {"claude"},
    "ChatCompletion": {"claude"},
    "ChoiceDelta": {"reasoning_content", "reasoning"},
    "ChatCompletionMessage": {"reasoning_content", "reasoning"},
}
"""What our objects have beside OpenAI's fields; it is documented for users."""

CLAUDE = {"session_id": SESSION, "workspace": None, "cost_usd": 0.25, "num_turns": 1}
USAGE = {
    "prompt_tokens": 123,
    "completion_tokens": 7,
    "total_tokens": 130,
    "prompt_tokens_details": {"cached_tokens": 100},
}

EVENTS = [
    init(),
    *started("m1"),
    *streamed("m1", [(thinking("Hm."), ["Hm."]), (text("Hello you"), ["Hello", " you"])]),
    *stopped(),
]


def form(**changed: object) -> dict[str, Any]:
    usual: dict[str, object] = {
        "completion_id": "chatcmpl-1",
        "created": 1700000000,
        "model": "claude-code",
        "include_usage": False,
        "bare_json": None,
        "activity": "reasoning",
    }
    return usual | changed


def stream(**changed: object) -> ChatStream:
    return planned(ChatStream, **changed)


def planned(kind: type[_T], **changed: Any) -> _T:
    """An answer that knows what its turn runs on."""
    workspace, shown = changed.pop("workspace", None), changed.pop("shown", {})
    answer = kind(**form(**changed))
    answer.planned(workspace, shown)
    return answer


def check(model: BaseModel) -> None:
    """Refuse every field that neither OpenAI's types nor our documentation know."""
    extras = set(model.model_extra or {})
    assert extras <= EXTRAS.get(type(model).__name__, set()), (type(model), extras)
    for name in type(model).model_fields:
        value = getattr(model, name)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, BaseModel):
                check(part)


def frames_of(sent: bytes) -> list[str]:
    """The data of each frame, by two parsers that know nothing of each other."""
    by_openai = [found.data for found in SSEDecoder().iter_bytes(iter([sent]))]
    response = httpx.Response(200, headers={"Content-Type": "text/event-stream"}, content=sent)
    by_httpx = [found.data for found in EventSource(response).iter_sse()]
    by_lines = [line[6:] for line in sent.decode().splitlines() if line]
    assert by_openai == by_httpx == by_lines
    assert all(by_openai)
    return by_openai


def chunks_of(sent: bytes) -> list[dict[str, Any]]:
    """All chunks of a stream, each checked."""
    chunks = []
    for data in frames_of(sent):
        if data != "[DONE]":
            check(ChatCompletionChunk.model_validate_json(data, strict=True))
            chunks.append(json.loads(data))
    return chunks


def deltas_of(chunks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]


def content_of(chunks: Sequence[dict[str, Any]], field: str = "content") -> str:
    return "".join(said.get(field) or "" for said in deltas_of(chunks))


def whole(
    events: Sequence[Event], ended: Event | Outcome | None = None, **changed: object
) -> list[dict[str, Any]]:
    """The chunks of a turn whose events come one by one."""
    chat = stream(**changed)
    sent = b"".join(chat.events([one]) for one in events)
    end = ended if isinstance(ended, Outcome) else outcome(ended or result())
    sent += chat.end(end, SESSION)
    assert sent.endswith(b"data: [DONE]\n\n")
    return chunks_of(sent)


def test_the_chunks_of_a_stream() -> None:
    chunks = whole(EVENTS)
    assert deltas_of(chunks) == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Hm.", "reasoning": "Hm."},
        {"content": "Hello"},
        {"content": " you"},
        {},
    ]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None, None, None, None, "stop"]
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-1"}
    assert {chunk["created"] for chunk in chunks} == {1700000000}
    assert {chunk["model"] for chunk in chunks} == {"claude-x-1"}
    assert not any("usage" in chunk for chunk in chunks)
    assert ["claude" in chunk for chunk in chunks] == [False] * 4 + [True]
    assert chunks[-1]["claude"] == CLAUDE


def test_what_comes_together_goes_out_together() -> None:
    sent = stream().events(EVENTS)
    assert deltas_of(chunks_of(sent)) == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Hm.", "reasoning": "Hm."},
        {"content": "Hello you"},
    ]


def test_events_that_say_nothing_send_nothing() -> None:
    assert stream().events([init(), *started("m1")]) == b""
    assert stream().events([]) == b""


def test_usage_comes_last_and_only_when_asked_for() -> None:
    chunks = whole(EVENTS, include_usage=True)
    assert [chunk["usage"] for chunk in chunks] == [None] * 5 + [USAGE]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["claude"] == chunks[-2]["claude"] == CLAUDE


def test_tokens_that_are_only_counted_by_model_are_told() -> None:
    counted = {"inputTokens": 10, "outputTokens": 20, "cacheReadInputTokens": 5}
    ended = result(usage={"input_tokens": 0, "output_tokens": 0}, modelUsage={"claude-x": counted})
    assert whole(EVENTS, ended, include_usage=True)[-1]["usage"] == {
        "prompt_tokens": 15,
        "completion_tokens": 20,
        "total_tokens": 35,
        "prompt_tokens_details": {"cached_tokens": 5},
    }


@pytest.mark.parametrize(
    "strange", [{}, {"usage": None}, {"usage": None, "modelUsage": {"x": 1}}, {"usage": "many"}]
)
def test_a_result_without_figures_counts_nothing(strange: dict[str, Any]) -> None:
    ended = result(**{"usage": {}, "num_turns": None, "total_cost_usd": None, **strange})
    last = whole(EVENTS, ended, include_usage=True)[-1]
    assert last["usage"]["total_tokens"] == 0
    assert last["claude"] == {**CLAUDE, "cost_usd": None, "num_turns": None}


def test_the_head_may_go_out_before_anything_is_said() -> None:
    chat = stream()
    opened = chat.open()
    assert deltas_of(chunks_of(opened)) == [{"role": "assistant", "content": ""}]
    assert chat.open() == b""
    assert deltas_of(chunks_of(chat.beat())) == [{}]
    sent = opened + chat.events(EVENTS) + chat.end(outcome(result()), SESSION)
    assert {chunk["model"] for chunk in chunks_of(sent)} == {"claude-code"}
    assert content_of(chunks_of(sent)) == "Hello you"


def test_a_sign_of_life_may_be_the_first() -> None:
    assert deltas_of(chunks_of(stream().beat())) == [{"role": "assistant", "content": ""}]


def test_a_turn_in_which_nothing_is_said_is_a_stream_all_the_same() -> None:
    chunks = whole([init()])
    assert deltas_of(chunks) == [{"role": "assistant", "content": ""}, {}]


LIMITS = [
    (result(None, subtype="error_max_turns", is_error=True), "length"),
    (result(None, subtype="error_max_budget_usd", is_error=True), "length"),
    (result("API Error: output token maximum", is_error=True), "length"),
    (result("API Error: refused", is_error=True, stop_reason="refusal"), "content_filter"),
    (result("Hello you"), "stop"),
]


@pytest.mark.parametrize(("ended", "reason"), LIMITS)
def test_the_reason_of_the_end_is_the_true_one(ended: Event, reason: str) -> None:
    chunks = whole(EVENTS, ended)
    assert chunks[-1]["choices"][0]["finish_reason"] == reason
    assert content_of(chunks) == "Hello you"
    assert whole_answer(EVENTS, ended)["choices"][0]["finish_reason"] == reason


def test_a_message_that_was_cut_and_not_continued_ends_by_its_length() -> None:
    events = [*started("m1"), *streamed("m1", [(text("a"), ["a"])]), *stopped("max_tokens")]
    assert whole(events)[-1]["choices"][0]["finish_reason"] == "length"


FAILED = Outcome(OutcomeKind.FAILURE, ProxyError(Failure.UPSTREAM_OVERLOADED))


def test_a_failure_is_raised_and_told_as_an_error() -> None:
    chat = stream()
    chat.events(EVENTS)
    with pytest.raises(ProxyError) as caught:
        chat.end(FAILED, SESSION)
    assert chat.answer_text is None
    (data,) = frames_of(chat.failure(caught.value, SESSION))
    assert json.loads(data) == ProxyError(Failure.UPSTREAM_OVERLOADED).envelope()


def test_a_failure_that_only_the_dialect_sees_is_raised() -> None:
    chat = stream(bare_json="schema")
    chat.events(EVENTS)
    with pytest.raises(ProxyError, match="fits the schema"):
        chat.end(outcome(result("prose")), SESSION)
    assert chat.answer_text is None


def test_a_stream_that_cannot_go_on_is_an_error() -> None:
    chat = stream()
    chat.events([*started("m1"), delta("One")])
    with pytest.raises(ProxyError, match="reads differently"):
        chat.events([assistant("m2", text("Two"))])
    assert chat.events([assistant("m2", text("Three"))]) == b""
    with pytest.raises(ProxyError, match="reads differently"):
        chat.end(outcome(result("Two")), SESSION)
    assert chat.answer_text is None


def test_a_client_that_has_left_is_sent_nothing() -> None:
    chat = stream()
    chat.events(EVENTS)
    assert chat.end(Outcome(OutcomeKind.ABANDONED), SESSION) == b""
    assert chat.answer_text is None


# What is remembered.


@pytest.mark.parametrize(
    ("ended", "expected"),
    [(ended, None if reason == "content_filter" else "Hello you") for ended, reason in LIMITS],
)
def test_the_text_of_a_good_answer_is_remembered(ended: Event, expected: str | None) -> None:
    for chat in (stream(), stream(activity="none")):
        for one in EVENTS:
            chat.events([one])
        assert chat.answer_text is None
        chat.end(outcome(ended), SESSION)
        assert chat.answer_text == expected


def test_an_endless_answer_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "LONGEST_REMEMBERED", 8)
    chat = stream()
    chat.events(EVENTS)
    chat.events([assistant("m2", text(" and you"))])
    chat.end(outcome(result()), SESSION)
    assert chat.answer_text is None
    assert chat._answer == []


# Where activity goes.

TOOLS = [
    init(),
    assistant("m1", thinking("Hm.")),
    assistant("m1", text("Let me see.")),
    assistant("m1", call(command="ls")),
    tool_result("file"),
    assistant("m2", text("A file.")),
]

SHOWN = {"dangerously-skip-permissions": True, "allowed-tools": ["Bash"]}

IN_TEXT = f"""session-id={SESSION}
workspace=project
dangerously-skip-permissions=true
allowed-tools=["Bash"]

<thinking>
Hm.
</thinking>

Let me see.

<thinking>
Tool call: Bash {{"command":"ls"}}

Tool result: file
</thinking>

A file."""


def test_activity_may_be_left_out() -> None:
    chunks = whole(TOOLS, activity="none")
    assert content_of(chunks) == "Let me see.\n\nA file."
    assert not any("reasoning" in said for said in deltas_of(chunks))


def test_activity_may_stand_in_the_text() -> None:
    chat = stream(activity="content", shown=SHOWN, workspace="project")
    sent = b"".join(chat.events([one]) for one in TOOLS)
    sent += chat.end(outcome(result("A file.")), SESSION)
    chunks = chunks_of(sent)
    assert content_of(chunks) == IN_TEXT
    assert not any("reasoning" in said for said in deltas_of(chunks))
    assert chunks[-1]["claude"]["workspace"] == "project"
    assert chat.answer_text == IN_TEXT


def test_activity_in_the_text_is_closed_at_the_end() -> None:
    said = content_of(whole([init(), assistant("m1", call(a=1))], activity="content"))
    assert said == (
        f'session-id={SESSION}\n\n<thinking>\nTool call: Bash {{"a":1}}\n</thinking>\n\n'
    )


def test_an_answer_without_activity_shows_its_session_all_the_same() -> None:
    assert content_of(whole([init()], activity="content")) == f"session-id={SESSION}\n\n"
    said = content_of(whole([assistant("m1", text("Hi."))], activity="content"))
    assert said == f"session-id={SESSION}\n\nHi."


def test_without_anything_to_show_there_is_only_the_text() -> None:
    assert InlineActivity().place([Piece(TEXT, "a"), Piece(REASONING, "\n\nb")]) == [
        Piece(TEXT, "a\n\n<thinking>\nb")
    ]
    assert InlineActivity().end() == []


@pytest.mark.parametrize("activity", ["reasoning", "content", "none"])
def test_bare_json_is_bare_wherever_activity_goes(activity: str) -> None:
    ended = result('{"a":1}', structured_output={"a": 1})
    chunks = whole(TOOLS, ended, bare_json="schema", activity=activity, shown=SHOWN)
    assert content_of(chunks) == '{"a":1}'
    thought = content_of(chunks, "reasoning_content")
    assert ("Let me see." in thought) is (activity != "none")
    answered = whole_answer(TOOLS, ended, bare_json="schema", activity=activity, shown=SHOWN)
    assert answered["choices"][0]["message"]["content"] == '{"a":1}'


# Whole answers.


def whole_answer(
    events: Sequence[Event], ended: Event | None = None, **changed: object
) -> dict[str, Any]:
    answer = planned(ChatAnswer, **changed)
    answer.events(list(events))
    body = answer.body(outcome(ended or result()), SESSION)
    check(ChatCompletion.model_validate_json(body, strict=True))
    decoded: dict[str, Any] = json.loads(body)
    return decoded


def test_a_whole_answer() -> None:
    assert whole_answer(EVENTS, workspace="project") == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "claude-x-1",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello you",
                    "refusal": None,
                    "reasoning_content": "Hm.",
                    "reasoning": "Hm.",
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
        "claude": {**CLAUDE, "workspace": "project"},
    }


def test_a_whole_answer_without_reasoning_has_no_field_for_it() -> None:
    answered = whole_answer(TOOLS, activity="none")
    assert answered["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Let me see.\n\nA file.",
        "refusal": None,
    }


def test_a_whole_answer_remembers_its_text() -> None:
    answer = planned(ChatAnswer, activity="content", shown=SHOWN, workspace="project")
    answer.events(TOOLS)
    assert answer.answer_text is None
    answer.body(outcome(result()), SESSION)
    assert answer.answer_text == IN_TEXT


@pytest.mark.parametrize("ended", [FAILED, replace(FAILED, error=None)])
def test_a_whole_answer_of_a_failed_turn_is_its_error(ended: Outcome) -> None:
    answer = planned(ChatAnswer)
    answer.events(EVENTS)
    with pytest.raises(ProxyError) as caught:
        answer.body(ended, SESSION)
    expected = ended.error.failure if ended.error else Failure.INTERNAL_ERROR
    assert caught.value.failure is expected
    assert answer.answer_text is None


def test_a_whole_answer_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "LONGEST_WHOLE", 8)
    answer = planned(ChatAnswer)
    with pytest.raises(ProxyError, match="'stream': true"):
        answer.events(EVENTS)
    assert answer._told == {TEXT: [], REASONING: []}


# Any text at all.


def test_nothing_in_a_text_ends_its_line() -> None:
    said = "a\u2028b\u2029c\u0085d\re\nf\x0bg\x0ch\x1ci\x1dj\x1ek data: x\n\n"
    assert content_of(whole([assistant("m1", text(said))])) == said


def test_half_a_character_breaks_no_frame() -> None:
    chunks = whole([], model="half \ud83d\u2028")
    assert chunks[0]["model"] == "half ?\u2028"


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=8),
    st.sampled_from(["reasoning", "none"]),
    st.booleans(),
)
def test_every_text_arrives_as_it_was(said: list[str], activity: str, usage: bool) -> None:
    answer = "".join(said)
    events = [*started("m1"), *streamed("m1", [(text(answer), said)]), *stopped()]
    chunks = whole(events, result(answer), activity=activity, include_usage=usage)
    assert content_of(chunks) == answer
    assert whole_answer(events, result(answer))["choices"][0]["message"]["content"] == answer
