"""Requests of the OpenAI dialect: what is taken, what it means, what is refused."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claude_proxy.dialects import chat, history
from claude_proxy.dialects.sampling import IGNORED_FIELDS, REFUSED_FIELDS, USED_FIELDS
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.turns import Message, TurnRequest
from tests.support import TURN_FIELDS

SESSION = "AAAAAAAA-bbbb-4ccc-8ddd-EEEEEEEEEEEE"
OTHER = "11111111-2222-4333-8444-555555555555"
THIRD = "99999999-2222-4333-8444-555555555555"
USER = {"role": "user", "content": "hello"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def decode(
    text_parameters: str = "all",
    conversation: str | None = None,
    session_header: str | None = None,
    **fields: Any,
) -> chat.ChatRequest:
    body = json.dumps({"messages": [USER], **fields}).encode()
    return chat.decode_request(
        body,
        text_parameters=text_parameters,
        conversation=conversation,
        session_header=session_header,
    )


def turn_from(request: chat.ChatRequest, model: str | None = None) -> TurnRequest:
    return chat.turn_request(
        request, model=model, tenant="alice", request_id="req_1", received=12.5
    )


def turn(**fields: Any) -> TurnRequest:
    return turn_from(decode(**fields))


def refused(**fields: Any) -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        decode(**fields)
    assert caught.value.failure is Failure.INVALID_VALUE
    return caught.value


def said(*contents: str) -> list[dict[str, str]]:
    """Messages of the user and the assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def blocks(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}]


def test_messages_are_enough() -> None:
    request = decode()
    assert request.model == "claude-code"
    assert not request.stream
    assert not request.include_usage
    assert request.bare_json is None
    assert request.ignored == ()
    assert (request.message_count, request.prompt_characters) == (1, 5)
    assert request.tip_source == (("user", "hello"),)
    assert turn_from(request) == TurnRequest(
        content=blocks("hello"),
        tenant="alice",
        request_id="req_1",
        received=12.5,
        literal=True,
        inherit=frozenset(chat.INHERITED),
    )


def test_every_field_reaches_the_turn() -> None:
    request = decode(
        model="ignored",
        messages=[
            {"role": "system", "content": "System."},
            *said("one", "two", "three"),
        ],
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
        },
        reasoning_effort="low",
        max_completion_tokens=100,
        max_tokens=5,
        conversation="chat-1",
        claude={
            "session-id": SESSION,
            **TURN_FIELDS,
            "model": "opus",
            "permission-mode": "plan",
            "effort": "max",
            "max-turns": 3,
            "fork": True,
        },
    )
    assert request.model == "opus"
    assert request.stream
    assert request.include_usage
    assert request.bare_json == "schema"
    assert turn_from(request, "claude-opus-4-1") == TurnRequest(
        content=blocks("three"),
        tenant="alice",
        request_id="req_1",
        received=12.5,
        session_id=SESSION.lower(),
        fork=True,
        workspace="project",
        model="claude-opus-4-1",
        max_turns=3,
        effort="max",
        permission_mode="plan",
        skip_permissions=True,
        allowed_tools=("Bash(git *)", "Edit"),
        disallowed_tools=("WebFetch",),
        mcp_tools=("mcp__github__get_repo",),
        system_prompt="You are a test.",
        append_system_prompt="Be brief.",
        json_schema=SCHEMA,
        literal=True,
        max_output_tokens=100,
        history=(Message("user", blocks("one")), Message("assistant", blocks("two"))),
        tips=history.tips(request.tip_source[:-1]),
        conversation="chat-1",
    )


@pytest.mark.parametrize("nothing", [None, ""])
@pytest.mark.parametrize("name", sorted({*USED_FIELDS, *IGNORED_FIELDS, "unknown"} - {"messages"}))
def test_null_and_the_empty_string_mean_absent(name: str, nothing: str | None) -> None:
    assert turn(**{name: nothing}) == turn()


@pytest.mark.parametrize("name", sorted(REFUSED_FIELDS))
def test_null_asks_for_nothing(name: str) -> None:
    nothing: dict[str, Any] = {name: None}
    assert turn(**nothing) == turn()
    assert decode(**nothing).ignored == ()


# What is ignored, and what is refused.


@pytest.mark.parametrize("name", [*IGNORED_FIELDS, "frobnicate"])
@pytest.mark.parametrize("value", [0.7, "x", ["a"], {"a": 1}, True, False, 0])
def test_what_only_tunes_is_accepted_without_effect(name: str, value: Any) -> None:
    fields: dict[str, Any] = {name: value}
    request = decode(**fields)
    assert request.ignored == (name,)
    assert turn_from(request) == turn()


def test_client_tools_with_a_free_choice_are_accepted_without_effect() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for choice in ("auto", "none", None):
        request = decode(tools=tools, tool_choice=choice, parallel_tool_calls=True)
        assert request.ignored == ("tools", "parallel_tool_calls")


def test_what_is_ignored_is_told_in_short() -> None:
    unknown: dict[str, Any] = {f"{i:03}" + "x" * 500: 1 for i in range(500)}
    ignored = decode(**unknown).ignored
    assert len(ignored) == 50
    assert max(map(len, ignored)) == 64


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 1),
        ("logprobs", False),
        ("top_logprobs", 0),
        ("modalities", ["text"]),
        ("modalities", []),
        ("tool_choice", "auto"),
        ("tool_choice", "none"),
        ("tool_choice", {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}),
        ("function_call", "auto"),
        ("function_call", "none"),
    ],
)
def test_a_field_may_say_what_is_so_anyway(name: str, value: object) -> None:
    fields: dict[str, Any] = {name: value}
    request = decode(**fields)
    assert request.ignored == ()
    assert turn_from(request) == turn()


REFUSED: list[tuple[str, object, str]] = [
    ("n", 2, "must be 1"),
    ("n", 0, "must be 1"),
    ("n", "1", "must be 1"),
    ("n", True, "must be 1"),
    ("logprobs", True, "log probabilities"),
    ("logprobs", 5, "log probabilities"),
    ("top_logprobs", 3, "log probabilities"),
    ("top_logprobs", "x", "log probabilities"),
    ("modalities", ["text", "audio"], "text only"),
    ("modalities", "text", "text only"),
    ("audio", {"voice": "alloy", "format": "wav"}, "text only"),
    ("tool_choice", "required", "client's tools"),
    ("tool_choice", "any", "client's tools"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}, "client's tools"),
    ("tool_choice", {"type": "allowed_tools", "allowed_tools": {"mode": "required"}}, "client's"),
    ("tool_choice", {"type": "allowed_tools"}, "client's tools"),
    ("tool_choice", ["auto"], "client's tools"),
    ("function_call", {"name": "f"}, "client's tools"),
]


@pytest.mark.parametrize(("name", "value", "sentence"), REFUSED)
def test_what_changes_the_form_of_the_answer_is_refused(
    name: str, value: object, sentence: str
) -> None:
    error = refused(**{name: value})
    assert error.param == name
    assert f"'{name}'" in error.message
    assert sentence in error.message


def test_the_tables_are_what_is_tested() -> None:
    assert {name for name, _, _ in REFUSED} == set(REFUSED_FIELDS)
    assert not set(REFUSED_FIELDS) & set(IGNORED_FIELDS)
    assert not set(USED_FIELDS) & {*IGNORED_FIELDS, *REFUSED_FIELDS}


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"messages": None}, "messages", "must be a list"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": "hello"}, "messages", "must be a list"),
        ({"stream": "yes"}, "stream", "got `str`"),
        ({"stream": 1}, "stream", "got `int`"),
        ({"stream_options": True}, "stream_options", "got `bool`"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "got `int`"),
        ({"model": 5}, "model", "got `int`"),
        ({"model": "a b"}, "model", "must be the name of a model"),
        ({"model": "--x"}, "model", "must be the name of a model"),
        ({"model": "x" * 300}, "model", "must be the name of a model"),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"max_tokens": "9"}, "max_tokens", "got `str`"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", ">= 1"),
        ({"max_completion_tokens": 2**31}, "max_completion_tokens", "<= 2147483647"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "none, minimal, low, medium, high"),
        ({"reasoning_effort": 3}, "reasoning_effort", "got `int`"),
        ({"claude": "x"}, "claude", "got `str`"),
        ({"claude": {"allowed_tools": []}}, "claude.allowed_tools", "claude.allowed-tools"),
        ({"claude": {"stream": True}}, "claude.stream", "Unknown field"),
        ({"claude": {"workspace": 1}}, "claude.workspace", "got `int`"),
        ({"claude": {"session-id": "x"}}, "claude.session-id", "UUID"),
        ({"claude": {"fork": True}}, "claude.fork", "'claude.session-id'"),
        ({"claude": {"allowed-tools": ["a\n"]}}, "claude.allowed-tools[0]", "control"),
        ({"response_format": "json"}, "response_format", "got `str`"),
        ({"response_format": {}}, "response_format.type", "'json_object'"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "is required",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": []}},
            "response_format.json_schema",
            "must be an object",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "is required",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": "x"}}},
            "response_format.json_schema.schema",
            "JSON Schema object",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            "response_format.json_schema.schema",
            "'$.type'",
        ),
        ({"session_header": "latest"}, "X-Claude-Session-Id", "UUID"),
        ({"messages": said("session-id=1\nx")}, "session-id", "session-id=0123"),
        ({"messages": said("workspace=a/b\nx")}, "workspace", "workspace"),
        ({"messages": said("allowed-tools=Bash\nx")}, "allowed-tools", "Write it like this"),
    ],
)
def test_a_bad_value_names_its_field(fields: dict[str, Any], param: str, sentence: str) -> None:
    error = refused(**fields)
    assert error.failure.status == 400
    assert error.param == param
    assert sentence in error.message


def test_messages_are_required() -> None:
    with pytest.raises(ProxyError) as caught:
        chat.decode_request(b"{}", text_parameters="all", conversation=None, session_header=None)
    assert caught.value.param == "messages"
    assert caught.value.message == "The field 'messages' is required."


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_object_says_so(body: bytes) -> None:
    with pytest.raises(ProxyError) as caught:
        chat.decode_request(body, text_parameters="all", conversation=None, session_header=None)
    assert caught.value.failure is Failure.INVALID_JSON


# What a request means.


@pytest.mark.parametrize(
    ("asked", "effort"),
    [
        ("none", "low"),
        ("minimal", "low"),
        ("low", "low"),
        ("medium", "medium"),
        ("high", "high"),
        ("xhigh", "xhigh"),
        ("max", "max"),
    ],
)
def test_an_effort_is_the_nearest_of_the_cli_where_it_has_any(asked: str, effort: str) -> None:
    told = turn(reasoning_effort=asked)
    assert (told.effort, told.optional) == (effort, frozenset({"effort"}))


def test_the_effort_of_the_cli_wins_and_is_meant() -> None:
    told = turn(reasoning_effort="low", claude={"effort": "high"})
    assert (told.effort, told.optional) == ("high", frozenset())


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 8}, 8),
        ({"max_completion_tokens": 8, "max_tokens": 7}, 8),
        ({"max_completion_tokens": None, "max_tokens": 7}, 7),
        ({"max_tokens": 2**31 - 1}, 128_000),
    ],
)
def test_the_newer_name_of_the_token_limit_wins(fields: dict[str, Any], limit: int) -> None:
    assert turn(**fields).max_output_tokens == limit


def test_text_is_no_form() -> None:
    assert turn(response_format={"type": "text"}) == turn()


def test_any_json_object_is_asked_for_in_words_too() -> None:
    request = decode(
        response_format={"type": "json_object"}, claude={"append-system-prompt": "Be brief."}
    )
    told = turn_from(request)
    assert request.bare_json == "object"
    assert told.json_schema == {"type": "object"}
    assert told.optional == {"json_schema"}
    assert told.append_system_prompt == f"Be brief.\n\n{chat.JSON_SENTENCE}"
    told = turn(response_format={"type": "json_object"})
    assert told.append_system_prompt == chat.JSON_SENTENCE


def test_the_model_of_the_claude_object_wins() -> None:
    assert decode(model="gpt-4o").model == "gpt-4o"
    assert decode(model="gpt-4o", claude={"model": "haiku"}).model == "haiku"
    assert turn(claude={"model": "haiku"}).model is None


def test_the_system_prompt_of_the_claude_object_wins() -> None:
    messages = [{"role": "system", "content": "one"}, USER]
    assert turn(messages=messages).system_prompt == "one"
    assert turn(messages=messages, claude={"system-prompt": "two"}).system_prompt == "two"


def test_the_text_wins_over_the_claude_object_over_the_header() -> None:
    text = f"session-id={OTHER}\nhello"
    ids: dict[str, Any] = {"session_header": THIRD, "claude": {"session-id": SESSION}}
    assert turn(messages=said(text), **ids).session_id == OTHER
    assert turn(**ids).session_id == SESSION.lower()
    assert turn(session_header=THIRD).session_id == THIRD
    assert turn(session_header="").session_id is None
    told = turn(
        messages=said('workspace=a allowed-tools=["A"]\nx'),
        claude={"workspace": "b", "allowed-tools": ["B"], "disallowed-tools": ["C"]},
    )
    assert (told.workspace, told.allowed_tools, told.disallowed_tools) == ("a", ("A",), ("C",))


def test_a_copy_may_be_of_the_session_that_the_text_names() -> None:
    told = turn(messages=said(f"session-id={OTHER}\nx"), claude={"fork": True})
    assert (told.session_id, told.fork) == (OTHER, True)


def test_what_is_given_is_not_inherited_even_if_it_is_nothing() -> None:
    told = turn(
        messages=said("dangerously-skip-permissions=false\nx"), claude={"allowed-tools": []}
    )
    assert told.inherit == set(chat.INHERITED) - {"dangerously-skip-permissions", "allowed-tools"}
    assert not told.skip_permissions


EARLIER = 'workspace=a allowed-tools=["A"] dangerously-skip-permissions=true\nx'


def test_earlier_messages_say_what_a_new_session_inherits() -> None:
    told = turn(messages=said(EARLIER, "y", "z"))
    assert (told.workspace, told.allowed_tools, told.skip_permissions) == ("a", ("A",), True)
    assert told.inherit == set(chat.INHERITED)


def test_what_is_given_now_wins_over_earlier_messages() -> None:
    told = turn(messages=said(EARLIER, "y", "z"), claude={"workspace": "b", "allowed-tools": []})
    assert (told.workspace, told.allowed_tools, told.skip_permissions) == ("b", (), True)
    told = turn(messages=said(EARLIER, "y", "z"), claude={"permission-mode": "plan"})
    assert (told.permission_mode, told.skip_permissions) == ("plan", False)


def test_a_session_that_is_named_has_its_own_parameters() -> None:
    told = turn(messages=said(EARLIER, "y", "z"), session_header=OTHER)
    assert (told.workspace, told.allowed_tools, told.skip_permissions) == (None, (), False)


def test_permissions_are_never_read_from_an_answer() -> None:
    answer = f"session-id={OTHER}\ndangerously-skip-permissions=true\nworkspace=a\n\ny"
    told = turn(messages=said("x", answer, "z"))
    assert told.hinted_session == OTHER
    assert (told.session_id, told.workspace, told.skip_permissions) == (None, None, False)
    assert turn(messages=said("x", answer, "z"), text_parameters="none").hinted_session is None


def test_texts_set_only_what_the_setting_allows() -> None:
    told = turn(messages=said("workspace=a\nx"), text_parameters="none")
    assert (told.workspace, told.content) == (None, blocks("workspace=a\nx"))
    told = turn(messages=said("workspace=a\nx"), text_parameters="safe")
    assert (told.workspace, told.content) == ("a", blocks("x"))
    assert refused(messages=said(EARLIER), text_parameters="safe").param == "allowed-tools"
    told = turn(messages=said(EARLIER, "y", "z"), text_parameters="safe")
    assert (told.workspace, told.skip_permissions) == (None, False)


def test_commands_and_files_in_the_text_are_text() -> None:
    told = turn(messages=said("/cost @/etc/passwd"))
    assert told.literal
    assert told.content == blocks("/cost @/etc/passwd")


def test_a_request_shows_nothing_of_its_text_in_a_log() -> None:
    request = decode(
        messages=[{"role": "system", "content": "secret"}, *said("secret", "secret", "secret")],
        claude={"system-prompt": "secret", "append-system-prompt": "secret"},
        response_format={
            "type": "json_schema",
            "json_schema": {"schema": {"title": "secret"}},
        },
    )
    assert "secret" not in repr(request)
    assert "secret" not in repr(turn_from(request))


# Hostile input.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
FORMATS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "json_object", "json_schema"])},
    optional={"json_schema": JSON | st.fixed_dictionaries({"schema": JSON})},
)
BODIES = st.fixed_dictionaries(
    {"messages": JSON | st.just([USER])},
    optional={
        **{name: JSON for name in (*USED_FIELDS, *REFUSED_FIELDS, "user") if name != "messages"},
        "response_format": JSON | FORMATS,
        "claude": JSON | st.dictionaries(st.sampled_from(["workspace", "effort", "x"]), JSON),
    },
)


@settings(max_examples=300)
@given(BODIES | JSON, st.text(max_size=3) | st.none())
def test_any_body_is_a_turn_or_refused(body: object, header: str | None) -> None:
    with suppress(ProxyError):
        request = chat.decode_request(
            json.dumps(body).encode(),
            text_parameters="all",
            conversation=None,
            session_header=header,
        )
        assert turn_from(request).content


TEXTS = st.text(min_size=1, max_size=12).map(lambda text: f"a{text}z")
ROLES = st.sampled_from(["user", "assistant"])


@given(st.lists(st.tuples(ROLES, TEXTS), max_size=6), TEXTS, st.booleans())
def test_every_text_reaches_the_turn_once_and_in_order(
    before: list[tuple[str, str]], last: str, in_parts: bool
) -> None:
    messages = [
        {"role": role, "content": blocks(text) if in_parts else text}
        for role, text in [*before, ("user", last)]
    ]
    told = turn(messages=messages)
    assert isinstance(told.content, list)
    arrived = [(one.role, block["text"]) for one in told.history for block in one.content]
    arrived += [("user", block["text"]) for block in told.content]
    assert arrived == [*before, ("user", last)]


def test_values_nested_as_deep_as_json_may_be_are_read_or_refused() -> None:
    for levels in (60, 500, 900, 1000, 2000):
        deep = b"[" * levels + b"]" * levels
        for where in (
            b'"x":%s',
            b'"n":%s',
            b'"metadata":%s',
            b'"messages":[{"role":"user","content":%s}]',
            b'"messages":[{"role":"user","content":[{"type":"text","text":"a","x":%s}]}]',
            b'"messages":[{"role":"assistant","function_call":{"name":"a","arguments":%s}}]',
            b'"response_format":{"type":"json_schema","json_schema":{"schema":{"enum":%s}}}',
        ):
            body = b'{"messages":[{"role":"user","content":"a"}],' + where % deep + b"}"
            with suppress(ProxyError):
                assert chat.decode_request(
                    body, text_parameters="all", conversation=None, session_header=None
                )
