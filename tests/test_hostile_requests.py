"""Whatever bytes and bodies come in: a turn is started, or the answer is an error in JSON."""

from __future__ import annotations

import base64
import copy
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.logger import capturedLogs

from tests.support import TURN_FIELDS, Answer, Connection, parse_answers
from tests.test_api import KEY, World

SECONDS = 2.0
"""For one example, on a machine that has other things to do."""


def checked(act: Callable[[World], None], *, head: bool = False) -> tuple[World, list[Answer]]:
    """
    What comes of it; and that none of it is a fault, in the answer or in the log.

    @param head: some of the requests may be HEAD, so that answers cannot be told apart.
    """
    world = World()
    begun = time.monotonic()
    with capturedLogs() as events:
        act(world)
        received = world.connection.received
        world.connection.lose()
    assert time.monotonic() - begun < SECONDS
    faults = [e for e in events if "log_failure" in e or e.get("type") == "internal_error"]
    assert faults == []
    assert b"<html" not in received.lower()
    assert b"Traceback" not in received
    assert b"HTTP/1.1 5" not in received
    assert received == b"" or received.startswith(b"HTTP/1.")
    answers = [] if head else parse_answers(received, closed=True)
    for answer in answers:
        assert answer.complete
        if answer.status >= 400:
            assert answer.error["message"]
            assert answer.headers["x-request-id"]
        else:
            assert answer.status in (200, 204)
    return world, answers


# Bytes.

TOKENS = st.sampled_from(
    ["GET", "POST", "OPTIONS", "DELETE", "PUT", "get", "PRI", "CONNECT", "TRACE", "G\u00e9T", ""]
)
TARGETS = st.sampled_from(
    [
        "/health",
        "/api/claude",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/x%2fy",
        "/api/sessions?limit=1&before=%00",
        "/api/sessions/%ff",
        "/api/sessions/../../etc/passwd",
        "/metrics",
        "//",
        "*",
        "http://evil.example/health",
        "/" + "a" * 300,
        "/?" + "a=b&" * 200,
        "\u00b0",
    ]
) | st.text("/%.?&=ab0", max_size=12).map(lambda text: f"/{text}")
VERSIONS = st.sampled_from(["HTTP/1.1"] * 6 + ["HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "http/1.1", ""])
NAMES = st.sampled_from(
    [
        "Host",
        "Origin",
        "Authorization",
        "X-Api-Key",
        "Content-Type",
        "Content-Length",
        "Transfer-Encoding",
        "Connection",
        "Expect",
        "Cookie",
        "Upgrade",
        "X-Request-Id",
        "X-Conversation-Id",
        "Access-Control-Request-Method",
        "Access-Control-Request-Headers",
    ]
) | st.text("aA-_: \t", max_size=4)
VALUES = st.sampled_from(
    [
        KEY,
        f"Bearer {KEY}",
        "Bearer",
        "application/json",
        "localhost",
        "[::1]:x",
        "[",
        "0",
        "5",
        "-1",
        "0x5",
        "9" * 4301,
        "chunked",
        "gzip, chunked",
        "close",
        "keep-alive, upgrade",
        "100-continue",
        "h2c",
        "a=b; c; =; d==",
        "null",
        "GET",
        "\x00",
        "\u00ff" * 9,
    ]
) | st.text(st.characters(max_codepoint=255), max_size=8)
BODIES = st.sampled_from(
    [
        b"",
        b"x",
        b"{}",
        b'{"prompt":"hi"}',
        b"5\r\nhello\r\n0\r\n\r\n",
        b"5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n",
        b"ffffffffffffffffffffff\r\n",
        b"-1\r\n",
        b"5\r\nhelloworld",
        b"\r\n\r\n",
    ]
) | st.binary(max_size=20)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A request, more or less."""
    lines = [f"{draw(TOKENS)} {draw(TARGETS)} {draw(VERSIONS)}"]
    if draw(st.booleans()):
        lines.append(f"X-Api-Key: {KEY}")
    pairs = draw(st.lists(st.tuples(NAMES, VALUES), max_size=5))
    separator = draw(st.sampled_from([": ", ": ", ": ", ":", " : ", ""]))
    lines += [f"{name}{separator}{value}" for name, value in pairs]
    end = draw(st.sampled_from(["\r\n"] * 5 + ["\n", "\r", "\r\n "]))
    return end.join([*lines, "", ""]).encode("latin-1", "replace") + draw(BODIES)


@st.composite
def wires(draw: st.DrawFn) -> list[bytes]:
    """Some requests on a connection, damaged here and there, and cut anywhere."""
    data = bytearray(b"".join(draw(st.lists(messages(), min_size=1, max_size=3))))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(data)))
        data[place : place + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=6)))
    return [bytes(data[a:b]) for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def send(connection: Connection, pieces: Sequence[bytes]) -> None:
    """As a socket would deliver them: nothing more once it is closed."""
    for piece in pieces:
        if not connection.aborted:
            connection.send(piece)


@settings(max_examples=250, deadline=None)
@given(wires())
@example([b"GET / HTTP/1.1\r\nContent-Length: " + b"9" * 4301 + b"\r\nX: y\r\n\r\n"])
@example([b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", b"x"])
@example([b"POST / HTTP/1.1\r\nContent-Length: +5\r\n\r\nhello"])
@example([b"\r\n\r\n\r\n"])
def test_hostile_bytes_are_answered_in_json_and_are_no_fault(pieces: list[bytes]) -> None:
    checked(lambda world: send(world.connection, pieces), head=b"HEAD" in b"".join(pieces))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=4))
def test_noise_is_answered_in_json_and_is_no_fault(pieces: list[bytes]) -> None:
    world, answers = checked(lambda world: send(world.connection, pieces))
    assert [answer.status for answer in answers] in ([], [400])
    assert world.executor.turns == []


@settings(max_examples=60, deadline=None)
@given(wires(), st.data())
def test_however_bytes_are_cut_the_answers_are_the_same(
    pieces: list[bytes], data: st.DataObject
) -> None:
    whole = b"".join(pieces)
    _, cut = checked(lambda world: send(world.connection, pieces))
    _, uncut = checked(lambda world: send(world.connection, [whole]))
    _, crumbs = checked(lambda world: send(world.connection, [bytes([byte]) for byte in whole]))
    kinds = [[(a.status, a.headers["content-type"]) for a in told] for told in (cut, uncut, crumbs)]
    assert kinds[0] == kinds[1] == kinds[2]


# Bodies.

PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d494844520000000100000001080600000"
        "01f15c4890000000d49444154789c6360000002000001e221bc330000000049454e44ae426082"
    )
).decode()

NATIVE: dict[str, Any] = {
    "prompt": "hello",
    "session-id": "aaaaaaaa-0000-4000-8000-000000000000",
    **TURN_FIELDS,
    "model": "opus",
    "permission-mode": "plan",
    "effort": "high",
    "max-turns": 3,
    "include-partial-messages": True,
    "fork": True,
    "stream": False,
}

CHAT: dict[str, Any] = {
    "model": "gpt-4o",
    "messages": [
        {"role": "system", "content": "You are a test."},
        {"role": "user", "content": 'workspace=project\nallowed-tools=["Bash"]\n\nhello'},
        {
            "role": "assistant",
            "content": "session-id=aaaaaaaa-0000-4000-8000-000000000000\n\nhi",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "look"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
            ],
        },
    ],
    "stream": True,
    "stream_options": {"include_usage": True},
    "response_format": {
        "type": "json_schema",
        "json_schema": {
            "name": "x",
            "schema": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {}},
        },
    },
    "reasoning_effort": "high",
    "max_completion_tokens": 100,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "tool_choice": "auto",
    "temperature": 0.5,
    "claude": {"workspace": "project", "allowed-tools": ["Edit"], "max-turns": 2},
}

ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    2**63,
    10**400,
    1.5,
    1e308,
    "",
    " ",
    "\x00",
    "../../etc",
    "-rf",
    "\ud800",
    "a" * 2000,
    "workspace=..\n",
    "session-id=",
    "data:image/png;base64,",
    "data:,",
    "file:///etc/passwd",
    "http://[",
    [],
    {},
    [[]],
    {"": None},
    {"type": "object", "$ref": "#"},
]
VALUE = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there is something in a body, from the outside in."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [path, *(p for key, below in inner for p in places(below, (*path, key)))]


@st.composite
def mutants(draw: st.DrawFn, original: dict[str, Any]) -> bytes:
    """A valid body in which something is otherwise."""
    body = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(body)[1:] or [("x",)]))
        holder = body
        for key in path[:-1]:
            holder = holder[key]
        how = draw(st.sampled_from(["replace", "drop", "rename", "double", "swap"]))
        if how == "drop" and path[-1] != "x":
            del holder[path[-1]]
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(st.text(max_size=5))] = holder.pop(path[-1], None)
        elif how == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[path[-1]]))
        elif how == "swap":
            other = draw(st.sampled_from(sorted(original)))
            holder[path[-1]] = copy.deepcopy(original[other])
        else:
            holder[path[-1]] = copy.deepcopy(draw(VALUE))
    # Not every number and half character can be written otherwise than as Python writes it.
    text = json.dumps(body).encode()
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.binary(max_size=6)) + text[place + 1 :]
    return text


def is_taken_or_refused(path: str, body: bytes) -> bool:
    """Whether a turn is started; if not, the answer is a 4xx in JSON."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nX-Api-Key: {KEY}\r\nContent-Length: {len(body)}\r\n"
        "Content-Type: application/json\r\n\r\n"
    )
    world, answers = checked(lambda world: world.connection.send(head.encode() + body))
    if world.executor.turns:
        assert len(world.executor.turns) == 1
        assert answers == []
        return True
    [answer] = answers
    assert 400 <= answer.status < 500
    return False


def test_the_originals_are_valid() -> None:
    assert is_taken_or_refused("/api/claude", json.dumps(NATIVE).encode())
    chat = {**CHAT, "response_format": {"type": "text"}}
    assert is_taken_or_refused("/v1/chat/completions", json.dumps(chat).encode())


@settings(max_examples=200, deadline=None)
@given(mutants(NATIVE))
def test_a_native_body_that_is_almost_valid_is_taken_or_refused(body: bytes) -> None:
    is_taken_or_refused("/api/claude", body)


@settings(max_examples=250, deadline=None)
@given(mutants(CHAT))
def test_a_chat_that_is_almost_valid_is_taken_or_refused(body: bytes) -> None:
    is_taken_or_refused("/v1/chat/completions", body)
