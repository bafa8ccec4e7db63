"""Conversations that continue by themselves, through clients that send all they have each time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.chat_frames import Tap
from tests.e2e.claude_cli import Claude
from tests.e2e.messages_api import MessagesApi
from tests.e2e.node import AI_SDK, OPENAI_NODE, NodeProgram
from tests.e2e.server import Server, StartServer
from tests.e2e.talks import WAYS, Talk, Talks, heard, sessions_of, ten_turns

PROGRAMS = {"openai_node": OPENAI_NODE, "ai_sdk": AI_SDK}


@pytest.fixture(scope="module", params=PROGRAMS)
def each_way(
    request: pytest.FixtureRequest,
    claude_new: Claude,
    messages_api: MessagesApi,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Talks]]:
    """Ten turns with each client."""
    name = str(request.param)
    folder = tmp_path_factory.mktemp(name)
    with (
        NodeProgram(tmp_path_factory.mktemp("program"), f"{name}.mjs", PROGRAMS[name]) as program,
        ten_turns(program, name, folder, claude_new, messages_api) as talks,
    ):
        yield talks


@pytest.fixture(params=WAYS)
def talks(request: pytest.FixtureRequest, each_way: dict[str, Talks]) -> Talks:
    """Ten turns with each client, with a restart in the middle and without."""
    return each_way[request.param]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProgram]:
    """A client for what is the same with all of them."""
    folder = tmp_path_factory.mktemp("program")
    with NodeProgram(folder, "openai_node.mjs", OPENAI_NODE) as program:
        yield program


@pytest.fixture
def url(new_server: Server) -> Iterator[str]:
    """The way to a server; what it answers is checked strictly."""
    with Tap(new_server.daemon.url) as tap:
        yield tap.url


def test_ten_turns_are_one_session(talks: Talks, messages_api: MessagesApi) -> None:
    assert len(talks.long.sessions) == 10
    assert len(sessions_of(talks.long)) == 1
    request = messages_api.turns(talks.long.shown[-2][1])[0]
    said = [text for role, text in talks.long.shown if role == "user"]
    assert request.conversation.user_texts == said


def test_another_conversation_that_began_alike_is_another_session(
    talks: Talks, messages_api: MessagesApi
) -> None:
    assert len(talks.short.sessions) == 3
    assert len(sessions_of(talks.short)) == 1
    assert not sessions_of(talks.long) & sessions_of(talks.short)
    request = messages_api.turns(talks.short.shown[-2][1])[0]
    assert heard(request) == talks.short.shown[:-1]


def test_an_edited_message_begins_a_new_session(talks: Talks, messages_api: MessagesApi) -> None:
    edited = talks.long.copy()
    edited.edit(2, "What I should have said.")
    for text in (f"{edited.name}: after the edit.", f"{edited.name}: and on."):
        edited.say(talks.url, text)
        assert heard(messages_api.turns(text)[0]) == edited.shown[:-1]
    assert len(sessions_of(edited)) == 1
    assert not sessions_of(edited) & sessions_of(talks.long, talks.short)


def test_an_answer_that_is_wanted_again_begins_a_new_session(
    talks: Talks, messages_api: MessagesApi
) -> None:
    again = talks.short.copy()
    text = again.shown[-2][1]
    again.cut(-2)
    again.say(talks.url, text, streamed=False)
    assert again.shown == talks.short.shown
    assert not sessions_of(again) & sessions_of(talks.long, talks.short)
    assert heard(messages_api.turns(text)[-1]) == again.shown[:-1]


def test_conversations_alike_are_told_apart_by_their_names(program: NodeProgram, url: str) -> None:
    names = ({"X-Conversation-Id": "one"}, {"X-OpenWebUI-Chat-Id": "other"})
    talks = [Talk(program, str(headers), headers=headers) for headers in names]
    for text in ("We begin alike.", "We go on alike."):
        for talk in talks:
            talk.say(url, text)
    assert [len(sessions_of(talk)) for talk in talks] == [1, 1]
    assert len(sessions_of(*talks)) == 2


def test_conversations_alike_without_names_are_never_mixed(
    program: NodeProgram, url: str, messages_api: MessagesApi
) -> None:
    talks = [Talk(program, name) for name in ("this", "that")]
    for talk in talks:
        talk.say(url, "We are alike so far.")
    for talk, text in zip(talks, ("I am this.", "I am that."), strict=True):
        talk.say(url, text)
        [request] = messages_api.turns(text)
        assert heard(request) == talk.shown[:-1]
    assert not sessions_of(talks[0]) & sessions_of(talks[1])


def test_a_conversation_goes_on_when_its_answers_show_more_than_the_text(
    program: NodeProgram, start_server: StartServer, claude_new: Claude, messages_api: MessagesApi
) -> None:
    server = start_server(claude_new, {"CHAT_ACTIVITY": "content"})
    talk = Talk(program, "content")
    texts = (
        "[[thinking Well, well.]] [[text I thought.]]",
        "content: and then?",
        "content: end",
    )
    with Tap(server.daemon.url) as tap:
        for text in texts:
            assert talk.say(tap.url, text).startswith("session-id=")
    assert len(sessions_of(talk)) == 1
    [request] = messages_api.turns("content: end")
    assert request.conversation.user_texts == [text for role, text in talk.shown if role == "user"]


def test_a_conversation_is_never_continued_with_another_key(
    program: NodeProgram, start_server: StartServer, claude_new: Claude
) -> None:
    keys = ("sk-one-0123456789abcdef", "sk-two-0123456789abcdef")
    server = start_server(claude_new, {"API_KEYS": ",".join(keys)})
    talk = Talk(program, "keys")
    with Tap(server.daemon.url) as tap:
        for key in keys:
            talk.say(tap.url, "Whose is it?", key=key)
    assert len(sessions_of(talk)) == 2
