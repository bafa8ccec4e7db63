"""The messages of a chat: what is the system prompt, what was said before, what is new."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_proxy.dialects import history
from claude_proxy.dialects.fields import TurnFields
from claude_proxy.dialects.messages import MAX_MESSAGES, Conversation, read_messages
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.turns import Message

SESSION = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"
PNG = "data:image/png;base64,iVBORw0KGgo="
IMAGE_PART = {"type": "image_url", "image_url": {"url": PNG}}
IMAGE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="},
}


def say(role: str, content: object, **more: object) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def text(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": one} for one in texts]


def read(*messages: object, allowed: str = "all") -> Conversation:
    return read_messages(list(messages), allowed)


def refused(messages: object, allowed: str = "all") -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        read_messages(messages, allowed)
    assert caught.value.failure is Failure.INVALID_VALUE
    return caught.value


def test_one_message_is_what_is_new() -> None:
    told = read(say("user", "hello"))
    assert told == Conversation(
        system_prompt=None,
        history=(),
        content=text("hello"),
        said=(("user", "hello"),),
        tips=(),
        given=TurnFields(),
        earlier=TurnFields(),
        shown_session=None,
    )


def test_a_conversation_is_told_apart() -> None:
    told = read(
        say("system", "Be brief."),
        say("developer", text("Be kind.", "Be true.")),
        say("user", "one"),
        say("assistant", "two"),
        say("user", "three"),
        say("user", "four"),
        say("assistant", "five"),
        say("assistant", "six"),
        say("user", [*text("seven"), IMAGE_PART]),
        say("user", "eight"),
    )
    assert told.system_prompt == "Be brief.\n\nBe kind.\n\nBe true."
    assert told.history == (
        Message("user", text("one")),
        Message("assistant", text("two")),
        Message("user", text("three")),
        Message("user", text("four")),
        Message("assistant", text("five")),
        Message("assistant", text("six")),
    )
    assert told.content == [*text("seven"), IMAGE, *text("eight")]
    assert told.tips == history.tips(told.said[:8])
    assert len(told.tips) == 1


def test_the_next_request_is_known_by_its_history() -> None:
    first = read(say("system", "x"), say("user", "one"))
    tip = history.next_tip(first.said, "two")
    second = read(say("user", "one"), say("assistant", "two"), say("user", "three"))
    assert second.tips == (tip,)
    edited = read(say("user", "ONE"), say("assistant", "two"), say("user", "three"))
    assert edited.tips != (tip,)


def test_a_later_system_message_is_text_of_the_user() -> None:
    told = read(
        say("user", "one"),
        say("system", "now\nthen"),
        say("system", "  "),
        say("assistant", "two"),
        say("developer", "soon"),
        say("user", "three"),
    )
    assert told.system_prompt is None
    assert told.history[1] == Message("user", text("System: now\nthen"))
    assert len(told.history) == 3
    assert told.content == text("System: soon", "three")


def test_client_tools_are_told_in_words() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": '{"a":1}'}}
    custom = {"id": "c2", "type": "custom", "custom": {"name": "run", "input": "ls"}}
    loose = {"id": "c3", "function": {"name": "put", "arguments": {"b": 2}}}
    told = read(
        say("user", "one"),
        say("assistant", None, tool_calls=[call, custom, loose]),
        say("tool", "found", tool_call_id="c1"),
        say("tool", text("done"), tool_call_id="c2"),
        say("tool", "", tool_call_id="c3"),
        say("tool", "lost", tool_call_id="c4"),
        say("assistant", "old", function_call={"name": "old", "arguments": "{}"}),
        say("function", "result", name="old"),
        say("user", "two"),
    )
    assert [message.content for message in told.history] == [
        text("one"),
        text(
            'Called the tool get with {"a":1}',
            "Called the tool run with ls",
            'Called the tool put with {"b":2}',
        ),
        text("Result of the tool get:\nfound"),
        text("Result of the tool run:\ndone"),
        text("Result of the tool put:"),
        text("Result of a tool:\nlost"),
        text("old", "Called the tool old with {}"),
    ]
    assert told.content == text("Result of the tool old:\nresult", "two")
    assert [message.role for message in told.history] == [
        "user",
        "assistant",
        "user",
        "user",
        "user",
        "user",
        "assistant",
    ]


def test_calls_count_in_the_fingerprint() -> None:
    def tips(arguments: str) -> tuple[str, ...]:
        call = {"id": "c1", "type": "function", "function": {"name": "g", "arguments": arguments}}
        answer = say("assistant", None, tool_calls=[call])
        return read(say("user", "one"), answer, say("user", "two")).tips

    assert tips("{}") == tips("{}")
    assert tips("{}") != tips('{"a":1}')


@pytest.mark.parametrize("content", [None, "", " \n", [], text(" "), "<think>hm</think>"])
def test_an_answer_without_text_keeps_its_place(content: object) -> None:
    told = read(say("user", "one"), say("assistant", content), say("user", "two"))
    assert told.history == (
        Message("user", text("one")),
        Message("assistant", text("(no answer)")),
    )
    assert told.content == text("two")


def test_an_answer_is_told_without_what_was_shown_beside_it() -> None:
    answer = f"session-id={SESSION}\nworkspace=a\n\n<thinking>\nhm\n</thinking>\n\nyes"
    told = read(say("user", "one"), say("assistant", answer), say("user", "two"))
    assert told.history[-1] == Message("assistant", text("yes"))
    assert told.shown_session == SESSION
    assert told.earlier == TurnFields()
    assert told.tips == read(say("user", "one"), say("assistant", "yes"), say("user", "2")).tips


def test_only_the_last_answer_shows_the_session() -> None:
    old = say("assistant", f"session-id={SESSION}\n\nyes")
    told = read(say("user", "1"), old, say("user", "2"), say("assistant", "no"), say("user", "3"))
    assert told.shown_session is None
    told = read(say("user", "1"), say("assistant", text(old["content"])), say("user", "2"))
    assert told.shown_session == SESSION
    told = read(say("user", "1"), old, say("user", "2"), allowed="safe")
    assert told.shown_session == SESSION
    assert read(say("user", "1"), old, say("user", "2"), allowed="none").shown_session is None


def test_a_refusal_is_an_answer() -> None:
    told = read(say("user", "1"), say("assistant", None, refusal="I will not."), say("user", "2"))
    assert told.history[-1] == Message("assistant", text("I will not."))


def test_an_image_in_an_answer_is_told_in_words() -> None:
    answer = say("assistant", [*text("look"), IMAGE_PART])
    told = read(say("user", "1"), answer, say("user", "2"))
    assert told.history[-1] == Message("assistant", text("look", "(image)"))


BLOCK = 'workspace=a\nallowed-tools=["Bash"]\n\n'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (BLOCK + "hello", text("hello")),
        (text(BLOCK + "hello", BLOCK), text("hello", BLOCK)),
        ([IMAGE_PART, *text(BLOCK + "hello")], [IMAGE, *text("hello")]),
        (text(BLOCK, "hello"), text("hello")),
    ],
)
def test_the_parameters_at_the_top_of_the_last_message_are_cut_out(
    content: object, expected: list[Any]
) -> None:
    told = read(say("user", content))
    assert told.content == expected
    assert told.given == TurnFields(workspace="a", allowed_tools=("Bash",))
    assert told.earlier == TurnFields()
    assert told.said == (("user", content),)


def test_parameters_of_earlier_messages_are_cut_out_and_the_newest_wins() -> None:
    told = read(
        say("user", BLOCK + "one"),
        say("assistant", "workspace=evil\ndangerously-skip-permissions=true\n\ntwo"),
        say("user", "allowed-tools=[] dangerously-skip-permissions=true\nthree"),
        say("user", "four"),
    )
    assert told.given == TurnFields()
    assert told.earlier == TurnFields(
        workspace="a", allowed_tools=(), dangerously_skip_permissions=True
    )
    assert told.history[0].content == text("one")
    assert told.content == text("three", "four")


@pytest.mark.parametrize(
    "top", ["allowed-tools=nope\n", "workspace=..\n", 'allowed-tools=["a\\n"]\n', "session-id=1\n"]
)
def test_malformed_parameters_count_in_the_last_message_only(top: str) -> None:
    told = read(say("user", top + "one"), say("assistant", "two"), say("user", "three"))
    assert told.history[0].content == text(top + "one")
    assert told.earlier == TurnFields()
    error = refused([say("user", top + "one")])
    assert error.param is not None
    assert error.param.partition("[")[0] == top.partition("=")[0]


def test_what_a_text_may_set_is_a_setting() -> None:
    assert read(say("user", BLOCK + "x"), allowed="none").content == text(BLOCK + "x")
    safe = read(say("user", f"workspace=a session-id={SESSION}\nx"), allowed="safe")
    assert safe.given == TurnFields(workspace="a", session_id=SESSION)
    assert refused([say("user", BLOCK + "x")], "safe").param == "allowed-tools"


@pytest.mark.parametrize(
    ("messages", "param", "said"),
    [
        (None, "messages", "must be a list"),
        ([], "messages", "at least one"),
        ({}, "messages", "must be a list"),
        ("hello", "messages", "must be a list"),
        (["hello"], "messages[0]", "must be an object"),
        ([say("user", "a"), None], "messages[1]", "must be an object"),
        ([{"content": "a"}], "messages[0].role", "must be one of system, developer, user"),
        ([say("User", "a")], "messages[0].role", "must be one of"),
        ([say("user", "a"), {"role": ["user"]}], "messages[1].role", "must be one of"),
        ([say("user", "a"), say("assistant", "b")], "messages[1].role", "must be 'user'"),
        ([say("system", "a")], "messages[0].role", "must be 'user'"),
        ([say("user", "a"), say("tool", "b")], "messages[1].role", "must be 'user'"),
        ([{"role": "user"}], "messages[0].content", "must not be empty"),
        ([say("user", "")], "messages[0].content", "must not be empty"),
        ([say("user", " \n\t")], "messages[0].content", "must not be empty"),
        ([say("user", [])], "messages[0].content", "must not be empty"),
        ([say("user", text(""))], "messages[0].content", "must not be empty"),
        ([say("user", "workspace=a")], "messages[0].content", "below the parameters"),
        ([say("user", "a"), say("user", "")], "messages[1].content", "must not be empty"),
        ([say("user", [IMAGE_PART])], "messages[0].content", "must hold text, too"),
        ([say("user", 1)], "messages[0].content", "must be a string or a list"),
        ([say("user", {"type": "text"})], "messages[0].content", "must be a string or a list"),
        ([say("user", [1])], "messages[0].content[0]", "must be an object"),
        ([say("user", [{"type": "text", "text": 1}])], "messages[0].content[0].text", "string"),
        ([say("user", [{"type": "x"}])], "messages[0].content[0].type", "not known"),
        (
            [say("user", "a"), say("assistant", "b"), say("user", [{"type": "input_audio"}])],
            "messages[2].content[0].type",
            "audio",
        ),
        (
            [say("user", [*text("a"), {"type": "image_url", "image_url": {"url": "data:,"}}])],
            "messages[0].content[1].image_url",
            "base64",
        ),
        ([say("system", [IMAGE_PART]), say("user", "a")], "messages[0].content", "must be text"),
        ([say("assistant", 1), say("user", "a")], "messages[0].content", "must be a string"),
        (
            [say("assistant", "", tool_calls={}), say("user", "a")],
            "messages[0].tool_calls",
            "must be a list",
        ),
        (
            [say("assistant", "", tool_calls=[1]), say("user", "a")],
            "messages[0].tool_calls[0]",
            "must be an object",
        ),
        (
            [say("assistant", 1, tool_calls=[{"function": {"name": "a"}}]), say("user", "a")],
            "messages[0].content",
            "must be a string",
        ),
        (
            [say("assistant", "", tool_calls=[{"function": {}}]), say("user", "a")],
            "messages[0].tool_calls[0].function",
            "'name'",
        ),
        (
            [say("assistant", "", function_call="x"), say("user", "a")],
            "messages[0].function_call",
            "'name'",
        ),
        ([say("user", "a")] * (MAX_MESSAGES + 1), "messages", "at most 5000"),
        ([say("user", "a")] * 10_000, "messages", "holds 10000 messages"),
    ],
)
def test_bad_messages_are_refused_by_name(messages: object, param: str, said: str) -> None:
    error = refused(messages)
    assert error.param == param
    assert f"'{param}'" in error.message
    assert said in error.message


def test_as_many_messages_as_are_allowed_are_read() -> None:
    turns = [say("user", "a"), say("assistant", "b")] * (MAX_MESSAGES // 2 - 1)
    told = read(*turns, say("user", "c"), say("user", "d"))
    assert len(told.history) == MAX_MESSAGES - 2
    assert told.content == text("c", "d")


def test_a_conversation_shows_nothing_of_itself_in_a_log() -> None:
    told = read(
        say("system", "secret"),
        say("user", "secret"),
        say("assistant", "secret"),
        say("user", "system-prompt secret"),
    )
    assert "secret" not in repr(told)


WORDS = st.text("abc @/<>=\n\N{GRINNING FACE}", min_size=1, max_size=8).map(
    lambda word: f"x{word}x"
)


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), WORDS), max_size=8), WORDS)
def test_every_text_arrives_once_and_in_order(before: list[tuple[str, str]], last: str) -> None:
    told = read(*(say(role, word) for role, word in before), say("user", last))
    arrived = [(m.role, block["text"]) for m in told.history for block in m.content]
    arrived += [("user", block["text"]) for block in told.content]
    assert arrived == [*before, ("user", last)]
    assert all(message.role == "assistant" for message in told.history[-1:])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "file", "refusal", "x"]) | JSON},
    optional={"text": JSON, "image_url": JSON, "file": JSON, "refusal": JSON},
)
CALLS = st.fixed_dictionaries(
    {}, optional={"id": JSON, "type": JSON, "function": JSON, "custom": JSON}
)
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool", "function"]),
        "content": JSON | st.lists(PARTS, max_size=3),
    },
    optional={
        "tool_calls": JSON | st.lists(CALLS, max_size=2),
        "function_call": JSON,
        "tool_call_id": JSON,
        "name": JSON,
        "refusal": JSON,
    },
)


@given(st.lists(MESSAGES | JSON, max_size=4), st.booleans())
def test_any_messages_are_read_or_refused(messages: list[Any], ends: bool) -> None:
    if ends:
        messages = [*messages, say("user", "x")]
    try:
        told = read_messages(json.loads(json.dumps(messages)), "all")
    except ProxyError as error:
        param = error.param
    else:
        param = f"{len(told.content)} blocks"
    assert param
