"""The native dialect: what it takes, and what it sends."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from claude_proxy.dialects import native
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.turns import TurnRequest
from tests.support import TURN_FIELDS

SESSION = "AAAAAAAA-bbbb-4ccc-8ddd-EEEEEEEEEEEE"

FIELDS: dict[str, Any] = {
    "prompt": "say\nhello \N{GRINNING FACE}",
    "session-id": SESSION,
    **TURN_FIELDS,
    "model": "claude-opus-4-1@20250805[1m]",
    "permission-mode": "plan",
    "effort": "high",
    "max-turns": 3,
    "include-partial-messages": True,
    "fork": True,
    "stream": False,
}


def body(**fields: Any) -> bytes:
    """A body of these fields, written with underscores, and a prompt."""
    named = {name.replace("_", "-"): value for name, value in fields.items()}
    return json.dumps({"prompt": "hi", **named}).encode()


def refusal(text: bytes) -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        native.decode_request(text)
    assert caught.value.failure.status == 400
    return caught.value


def turn_of(text: bytes) -> TurnRequest:
    return native.turn_request(
        native.decode_request(text), tenant="alice", request_id="req_1", received=12.5
    )


def test_every_field_reaches_the_turn() -> None:
    assert turn_of(json.dumps(FIELDS).encode()) == TurnRequest(
        content="say\nhello \N{GRINNING FACE}",
        tenant="alice",
        request_id="req_1",
        received=12.5,
        session_id=SESSION.lower(),
        fork=True,
        workspace="project",
        partial_messages=True,
        model="claude-opus-4-1@20250805[1m]",
        max_turns=3,
        effort="high",
        permission_mode="plan",
        skip_permissions=True,
        allowed_tools=("Bash(git *)", "Edit"),
        disallowed_tools=("WebFetch",),
        mcp_tools=("mcp__github__get_repo",),
        system_prompt="You are a test.",
        append_system_prompt="Be brief.",
    )
    assert native.decode_request(json.dumps(FIELDS).encode()).stream is False


def test_a_whole_number_may_be_written_with_a_point() -> None:
    # JSON has one kind of number, and some clients write all of theirs so.
    assert turn_of(b'{"prompt":"hi","max-turns":3.0}').max_turns == 3
    for text in (b"3.5", b"1e300"):
        assert refusal(b'{"prompt":"hi","max-turns":' + text + b"}").param == "max-turns"


def test_a_prompt_is_enough() -> None:
    expected = TurnRequest(content="hi", tenant="alice", request_id="req_1", received=12.5)
    assert turn_of(b'{"prompt":"hi"}') == expected
    decoded = native.decode_request(b'{"prompt":"hi"}')
    assert decoded.stream
    assert not decoded.include_partial_messages


def test_the_fields_are_those_that_are_promised() -> None:
    assert {info.encode_name for info in msgspec.structs.fields(native.NativeRequest)} == set(
        FIELDS
    )


@pytest.mark.parametrize("nothing", [None, ""])
@pytest.mark.parametrize("name", sorted(set(FIELDS) - {"prompt"}))
def test_null_and_the_empty_string_mean_absent(name: str, nothing: str | None) -> None:
    assert turn_of(body(**{name: nothing})) == turn_of(body())
    assert native.decode_request(body(**{name: nothing})) == native.decode_request(body())


@pytest.mark.parametrize(
    "name", ["allowed_tools", "sessionId", "Prompt", "tools", "", "a" * 300, "a`b", "a\nb", "$.x"]
)
def test_an_unknown_field_is_named_and_the_known_ones_are_listed(name: str) -> None:
    error = refusal(json.dumps({"prompt": "hi", name: 1}).encode())
    assert error.failure is Failure.INVALID_VALUE
    assert error.param == name[:100]
    assert f"Unknown field '{name[:100]}'" in error.message
    assert all(field in error.message for field in FIELDS)


@pytest.mark.parametrize("value", [None, ""])
def test_an_unknown_field_is_refused_even_without_a_value(value: str | None) -> None:
    assert refusal(json.dumps({"prompt": "hi", "allowed_tools": value}).encode()).param == (
        "allowed_tools"
    )


OTHERS: dict[str, list[Any]] = {
    "string": [1, 1.5, True, [], ["x"], {}, {"a": 1}],
    "boolean": [0, 1, "true", "x", [], {}],
    "list": [1, True, "Bash", {}, {"a": 1}, [1], [None], ["ok", ["x"]], [{}]],
    "number": [0, -1, 1.5, True, "x", "3", [], {}, 10**7, 10**30],
}
TYPES = {
    "dangerously-skip-permissions": "boolean",
    "include-partial-messages": "boolean",
    "fork": "boolean",
    "stream": "boolean",
    "allowed-tools": "list",
    "disallowed-tools": "list",
    "mcp-allowed-tools": "list",
    "max-turns": "number",
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in FIELDS for value in OTHERS[TYPES.get(name, "string")]],
)
def test_a_wrong_type_names_its_field(name: str, value: Any) -> None:
    error = refusal(body(**{name: value}))
    assert error.failure is Failure.INVALID_VALUE
    assert error.param is not None
    assert error.param.partition("[")[0] == name
    assert name in error.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{}", "The field 'prompt' is required."),
        (b'{"prompt":null}', "'prompt'"),
        (b'{"prompt":""}', "must not be empty"),
        (b'{"prompt":" \\n\\t "}', "must not be empty"),
    ],
)
def test_there_must_be_a_prompt(text: bytes, said: str) -> None:
    error = refusal(text)
    assert error.param == "prompt"
    assert said in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"session-id": "latest"}, "session-id"),
        ({"session-id": SESSION + "0"}, "session-id"),
        ({"session-id": f"{SESSION}\n"}, "session-id"),
        ({"session-id": "../../etc/passwd"}, "session-id"),
        ({"fork": True}, "fork"),
        ({"model": "--help"}, "model"),
        ({"model": "a b"}, "model"),
        ({"model": "a" * 300}, "model"),
        ({"model": "opus\n"}, "model"),
        ({"permission-mode": "plan now"}, "permission-mode"),
        ({"permission-mode": "plan\n"}, "permission-mode"),
        ({"effort": "huge"}, "effort"),
        ({"allowed-tools": [""]}, "allowed-tools[0]"),
        ({"allowed-tools": ["a", "b\nc"]}, "allowed-tools[1]"),
        ({"disallowed-tools": ["a\0"]}, "disallowed-tools[0]"),
        ({"disallowed-tools": ["x" * 1025]}, "disallowed-tools[0]"),
        ({"allowed-tools": ["x"] * 257}, "allowed-tools"),
    ],
)
def test_a_value_out_of_range_names_its_field(fields: dict[str, Any], param: str) -> None:
    error = refusal(body(**fields))
    assert (error.failure, error.param) == (Failure.INVALID_VALUE, param)


@pytest.mark.parametrize("effort", ["low", "medium", "high", "xhigh", "max"])
def test_the_efforts_of_the_cli_are_known(effort: str) -> None:
    assert turn_of(body(effort=effort)).effort == effort


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b" ",
        b"hello",
        b"{",
        b'{"prompt": "x",}',
        b"[]",
        b'"prompt"',
        b"null",
        b"1",
        b"\xff\xfe",
        b'{"prompt":"\xff"}',
        b'{"prompt":"\\ud800"}',
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"prompt":' + b"1" * 10_000 + b"}",
        b'{"prompt":1e999}',
        b'{"prompt":NaN}',
    ],
)
def test_what_is_no_json_object_is_a_400(text: bytes) -> None:
    assert refusal(text).failure in (Failure.INVALID_JSON, Failure.INVALID_VALUE)


@pytest.mark.parametrize("text", [b"", b"[]", b'"x"', b"null", b"{"])
def test_what_is_no_json_object_says_so(text: bytes) -> None:
    assert refusal(text).failure is Failure.INVALID_JSON


def test_a_request_shows_nothing_of_itself_in_a_log() -> None:
    decoded = native.decode_request(json.dumps(FIELDS).encode())
    turn = turn_of(json.dumps(FIELDS).encode())
    for secret in ("hello", "You are", "brief"):
        assert secret not in repr(decoded)
        assert secret not in repr(turn)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
NAMES = st.sampled_from(sorted(FIELDS)) | st.text(max_size=12)


def tolerates(text: bytes) -> None:
    """Take it or refuse it with a 400 that can be sent."""
    refused = None
    try:
        turn_of(text)
    except ProxyError as error:
        refused = error
    if refused is not None:
        assert refused.failure in (Failure.INVALID_JSON, Failure.INVALID_VALUE)
        msgspec.json.encode(refused.envelope())


@given(st.dictionaries(NAMES, JSON, max_size=6), st.booleans())
def test_a_hostile_object_is_taken_or_refused_never_more(
    fields: dict[str, Any], prompted: bool
) -> None:
    prompt = {"prompt": "hi"} if prompted else {}
    tolerates(json.dumps({**fields, **prompt}).encode())


@given(st.binary(max_size=200))
@example(b'{"prompt":"x","\xff":1}')
def test_hostile_bytes_are_refused_never_more(text: bytes) -> None:
    tolerates(text)


@given(st.binary(max_size=20), st.integers(0, 400), st.integers(0, 20))
def test_a_damaged_body_is_taken_or_refused_never_more(
    damage: bytes, position: int, length: int
) -> None:
    text = json.dumps(FIELDS).encode()
    tolerates(text[:position] + damage + text[position + length :])
