"""
Streams as clients read them: by three parsers that know nothing of each other, whatever an event
says and however the bytes are cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import httpx
import pytest
from httpx_sse import EventSource
from hypothesis import given, settings
from hypothesis import strategies as st
from openai._streaming import SSEDecoder as OpenAiEvents

from claude_proxy.cli.events import Event, parse_event
from claude_proxy.cli.outcomes import Outcome, OutcomeKind
from claude_proxy.dialects.completion import ChatStream
from claude_proxy.dialects.passthrough import NativeStream
from claude_proxy.errors import Failure, ProxyError
from tests.answers import SESSION, init, outcome, result, started, stopped, streamed
from tests.answers import text as text_block
from tests.answers import thinking as thinking_block

Frame = tuple[str, str, str]
"""Of one event: its name, its data, its id."""


def by_httpx(pieces: Sequence[bytes]) -> list[Frame]:
    """As httpx-sse reads."""
    headers = {"Content-Type": "text/event-stream"}
    response = httpx.Response(200, headers=headers, content=iter(pieces))
    return [(event.event, event.data, event.id) for event in EventSource(response).iter_sse()]


def by_openai(pieces: Sequence[bytes]) -> list[Frame]:
    """As OpenAI's library reads."""
    events = OpenAiEvents().iter_bytes(iter(pieces))
    return [(event.event or "message", event.data, event.id or "") for event in events]


def by_standard(pieces: Sequence[bytes]) -> list[Frame]:
    """
    As browsers read: WHATWG HTML, 9.2.6, word for word.

    It dispatches an event at a blank line alone, and not if there is no data.
    """
    text = b"".join(pieces).decode("utf-8").removeprefix("\ufeff")
    frames: list[Frame] = []
    data, name, last_id = "", "", ""
    *lines, _unfinished = re.split("\r\n|\n|\r", text)
    for line in lines:
        if line == "":
            if data:
                frames.append((name or "message", data.removesuffix("\n"), last_id))
            data, name = "", ""
            continue
        if line.startswith(":"):
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data += value + "\n"
        elif field == "id" and "\0" not in value:
            last_id = value
    return frames


def read(sent: bytes, cuts: Sequence[int]) -> list[str]:
    """The data of all events, on which the parsers agree."""
    places = [0, *sorted(cut % (len(sent) + 1) for cut in cuts), len(sent)]
    pieces = [sent[a:b] for a, b in pairwise(places) if a < b]
    frames = by_standard(pieces)
    assert by_httpx(pieces) == by_openai(pieces) == frames
    assert all(name == "message" and last_id == "" for name, _, last_id in frames)
    assert sent == b"" or sent.endswith(b"\n")
    return [data for _, data, _ in frames]


# What the parsers make of frames that are not ours, so that their agreement means something.


@pytest.mark.parametrize(
    ("sent", "frames"),
    [
        (b"data: a\n\n", [("message", "a", "")]),
        (b"data: a\ndata: b\n\n", [("message", "a\nb", "")]),
        (b"event: x\ndata: a\n\n: no\n\ndata: b\n\n", [("x", "a", ""), ("message", "b", "")]),
        (b"data: a\r\n\r\ndata:b\r\rdata:  c\n\n", [("message", x, "") for x in ("a", "b", " c")]),
        ("data: a\u2028b\u0085c\x0bd\n\n".encode(), [("message", "a\u2028b\u0085c\x0bd", "")]),
    ],
)
def test_the_parsers_know_the_standard(sent: bytes, frames: list[Frame]) -> None:
    for cut in range(len(sent)):
        pieces = [piece for piece in (sent[:cut], sent[cut:]) if piece]
        assert by_standard(pieces) == by_openai(pieces) == frames
        assert [(n or "message", d, i) for n, d, i in by_httpx(pieces)] == frames


# Both dialects.

CUTS = st.lists(st.integers(0, 1 << 16), max_size=12)
HOSTILE = st.sampled_from(
    [
        "\n\n",
        "\r\n\r\n",
        "\r",
        "data: [DONE]\n\n",
        "event: x\n",
        ":",
        "\ufeff",
        "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e",
        "\x00",
        "id: 1",
        "retry: 1\n",
        "</think>",
        '"}\n\n',
        "\\",
        "\U0001f600",
    ]
)
TEXTS = st.lists(
    HOSTILE | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=4
).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """A line of the CLI's, written in any way that JSON allows."""
    fields = {
        **draw(st.dictionaries(TEXTS, JSON, max_size=3)),
        "type": draw(st.sampled_from(["assistant", "user", "system", "x-\u2028"])),
        "session_id": SESSION,
    }
    blank = draw(st.sampled_from(["", " ", "\t", "\r", " \r "]))
    separators = (f",{blank}", f":{blank}")
    text = json.dumps(fields, ensure_ascii=draw(st.booleans()), separators=separators)
    return (draw(st.sampled_from(["", blank])) + text + blank).encode()


def parsed(line: bytes) -> Event:
    event = parse_event(line)
    assert event is not None
    return event


FAILURES = st.sampled_from(list(Failure))
BEAT = "beat"


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.lists(lines(), min_size=1, max_size=3) | st.just(BEAT), max_size=5),
    FAILURES | st.none(),
    TEXTS,
    CUTS,
)
def test_native_events_arrive_as_the_cli_wrote_them(
    steps: list[list[bytes] | str], failure: Failure | None, message: str, cuts: list[int]
) -> None:
    stream = NativeStream(partial_messages=True)
    sent, expected = b"", list[Any]()
    for step in steps:
        if isinstance(step, str):
            sent += stream.beat()
        else:
            sent += stream.events([parsed(line) for line in step])
            expected += [json.loads(line) for line in step]
    if failure is not None:
        error = ProxyError(failure, message or None)
        sent += stream.end(Outcome(OutcomeKind.FAILURE, error), SESSION)
    told = [json.loads(data) for data in read(sent, cuts)]
    assert told[: len(expected)] == expected
    if failure is None:
        assert len(told) == len(expected)
    else:
        [last] = told[len(expected) :]
        assert (last["type"], last["error"]["code"]) == ("result", failure.code)
        assert last["result"] == (message or failure.sentence)


def chat(activity: Any, *, usage: bool = False, model: str = "claude-code") -> ChatStream:
    stream = ChatStream(
        completion_id="chatcmpl-1",
        created=1700000000,
        model=model,
        include_usage=usage,
        bare_json=None,
        activity=activity,
    )
    stream.planned(None, {})
    return stream


def said(thought: str, pieces: list[str]) -> Iterator[Event]:
    """A message that comes in pieces."""
    yield init()
    yield from started("m1")
    blocks = [(text_block("".join(pieces)), pieces)]
    if thought:
        blocks.insert(0, (thinking_block(thought), [thought]))
    yield from streamed("m1", blocks)
    yield from stopped()


@settings(max_examples=120, deadline=None)
@given(
    TEXTS,
    st.lists(TEXTS, min_size=1, max_size=4),
    st.tuples(st.sampled_from(["reasoning", "none"]), st.booleans()),
    st.tuples(FAILURES | st.none(), TEXTS),
    CUTS,
)
def test_chunks_arrive_as_they_were_meant(
    thought: str,
    pieces: list[str],
    form: tuple[str, bool],
    end: tuple[Failure | None, str],
    cuts: list[int],
) -> None:
    (activity, usage), (failure, message) = form, end
    answer = "".join(pieces)
    stream = chat(activity, usage=usage, model=message or "claude-code")
    sent = stream.open()
    for event in said(thought, pieces):
        sent += stream.events([event]) + stream.beat()
    if failure is None:
        sent += stream.end(outcome(result(answer)), SESSION)
    else:
        sent += stream.failure(ProxyError(failure, message or None), SESSION)
    *data, done = read(sent, cuts)
    assert done == "[DONE]" or failure is not None
    chunks = [json.loads(one) for one in (data if done == "[DONE]" else [*data, done])]
    errors = [chunk["error"] for chunk in chunks if "error" in chunk]
    assert [error["code"] for error in errors] == ([failure.code] if failure else [])
    if errors:
        assert errors[0]["message"] == (message or failure.sentence if failure else "")
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk.get("choices")]
    assert "".join(delta.get("content") or "" for delta in deltas) == answer
    if activity == "reasoning":
        reasoning = "".join(delta.get("reasoning_content") or "" for delta in deltas)
        assert reasoning == thought
