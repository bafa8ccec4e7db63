"""Conversations that continue by themselves, with clients in Python, on their good and bad days."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import openai
import pytest
from openai import OpenAI

from tests.e2e.claude_cli import Claude
from tests.e2e.messages_api import MessagesApi, Recorded
from tests.e2e.python_clients import PYTHON_CLIENTS, only_loopback
from tests.e2e.server import Server, StartServer
from tests.e2e.talks import WAYS, Talks, heard, sessions_of, ten_turns

PNG = base64.b64encode(
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\2\0\0\0\x90wS\xde"
    b"\0\0\0\x0cIDAT\x08\xd7c\xf8\xcf\xc0\0\0\3\1\1\0\x18\xdd\x8d\xb0\0\0\0\0IEND\xaeB`\x82"
).decode()
TOUCH = '[[tool:Bash {"command": "echo made >> made"}]] [[then]] [[text done]]'


NAMES = [
    pytest.param(name, marks=pytest.mark.litellm) if name == "litellm" else name
    for name in PYTHON_CLIENTS
]


@pytest.fixture(scope="module", params=NAMES)
def each_way(
    request: pytest.FixtureRequest,
    claude_new: Claude,
    messages_api: MessagesApi,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Talks]]:
    """Ten turns with each client."""
    name = str(request.param)
    client = PYTHON_CLIENTS[name]()
    with (
        only_loopback(),
        ten_turns(client, name, tmp_path_factory.mktemp(name), claude_new, messages_api) as talks,
    ):
        yield talks


@pytest.fixture(params=WAYS)
def talks(request: pytest.FixtureRequest, each_way: dict[str, Talks]) -> Talks:
    """Ten turns with each client, with a restart in the middle and without."""
    return each_way[request.param]


class Chat:
    """
    A chat window: it keeps what it shows, and sends all of it.

    @ivar sessions: which sessions have answered.
    """

    def __init__(self, server: Server, *, key: str = "any") -> None:
        self.messages: list[dict[str, Any]] = []
        self.sessions: list[str] = []
        self._url = f"{server.daemon.url}/v1"
        self._key = key

    def say(self, content: Any, *, headers: dict[str, str] | None = None, **claude: Any) -> str:
        """Say something; the fields of the extension object may be added."""
        asked: Any = [*self.messages, {"role": "user", "content": content}]
        fields = {name.replace("_", "-"): value for name, value in claude.items()}
        with OpenAI(base_url=self._url, api_key=self._key, max_retries=0) as client:
            completion: Any = client.chat.completions.create(
                model="claude-code",
                messages=asked,
                extra_headers=headers,
                extra_body={"claude": fields} if fields else None,
            )
        answer = completion.choices[0].message.content
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        self.sessions.append(completion.claude["session_id"])
        self.workspace = completion.claude["workspace"]
        return str(answer)

    @property
    def session(self) -> str:
        """The one session that has answered all the time."""
        [session] = set(self.sessions)
        return session

    @property
    def said(self) -> list[tuple[str, Any]]:
        """What the model must have heard when it gave the last answer."""
        return [(message["role"], message["content"]) for message in self.messages[:-1]]

    def copy(self) -> Chat:
        """The same messages once more; no session has answered there yet."""
        other = copy.copy(self)
        other.messages = copy.deepcopy(self.messages)
        other.sessions = []
        return other


def asked(api: MessagesApi, text: str) -> Recorded:
    """The one request in which the user said this last."""
    [request] = [r for r in api.turns(text) if text in r.conversation.user_texts[-1]]
    return request


# Ten turns.


def test_ten_turns_are_one_session(talks: Talks, messages_api: MessagesApi) -> None:
    assert len(talks.long.sessions) == 10
    assert len(sessions_of(talks.long)) == 1
    request = asked(messages_api, talks.long.shown[-2][1])
    said = [text for role, text in talks.long.shown if role == "user"]
    assert request.conversation.user_texts == said


def test_another_conversation_that_began_alike_is_another_session(
    talks: Talks, messages_api: MessagesApi
) -> None:
    assert len(talks.short.sessions) > 2
    assert len(sessions_of(talks.short)) == 1
    assert not sessions_of(talks.long) & sessions_of(talks.short)
    assert heard(asked(messages_api, talks.short.shown[-2][1])) == talks.short.shown[:-1]


def test_an_edited_message_begins_a_new_session(talks: Talks, messages_api: MessagesApi) -> None:
    edited = talks.long.copy()
    edited.edit(2, "What I should have said.")
    text = f"{edited.name}: after the edit."
    edited.say(talks.url, text)
    assert heard(asked(messages_api, text)) == edited.shown[:-1]
    assert not sessions_of(edited) & sessions_of(talks.long, talks.short)


def test_an_answer_that_is_wanted_again_begins_a_new_session(
    new_server: Server, messages_api: MessagesApi
) -> None:
    chat, name = Chat(new_server), str(uuid4())
    for text in (f"Regenerate this. {name}", f"And this. {name}"):
        chat.say(text)
    last = chat.messages[-2]["content"]
    again = chat.copy()
    del again.messages[-2:]
    again.say(last)
    assert again.session != chat.session
    assert [heard(request) for request in messages_api.turns(last)] == [chat.said, again.said]


# Bad days.


@pytest.mark.parametrize("breaks", ["[[error 400]]", "[[text Half an ans]] [[hang]]"])
def test_a_turn_that_failed_is_tried_again_with_the_same_history(
    new_server: Server, messages_api: MessagesApi, breaks: str
) -> None:
    chat, name = Chat(new_server), str(uuid4())
    chat.say(f"We begin. {name}")
    with OpenAI(base_url=f"{new_server.daemon.url}/v1", api_key="any", timeout=2.0) as client:
        messages: Any = [*chat.messages, {"role": "user", "content": f"{breaks} {name}"}]
        patient = client.with_options(max_retries=0)
        with pytest.raises(openai.APIError):
            patient.chat.completions.create(model="claude-code", messages=messages)
    messages_api.wait_for(lambda request: request.outcome != "running", text=f"{breaks} {name}")
    again = chat.copy()
    again.say(f"Again. {name}")
    assert heard(asked(messages_api, f"Again. {name}")) == again.said
    assert again.session != chat.session


def test_two_requests_with_the_same_history_at_once_are_two_sessions(
    new_server: Server, messages_api: MessagesApi
) -> None:
    chat, name = Chat(new_server), str(uuid4())
    chat.say(f"Said before the fork. {name}")
    one, other = chat.copy(), chat.copy()
    with ThreadPoolExecutor() as pool:
        saying = [pool.submit(c.say, f"Fork {n}. {name}") for n, c in enumerate((one, other))]
        for said in saying:
            said.result()
    assert one.session != other.session
    assert chat.session in (one.session, other.session)
    for branch in (one, other):
        assert heard(asked(messages_api, branch.messages[-2]["content"])) == branch.said
        branch.say(f"And on. {name}")
        assert branch.session


def test_another_key_never_continues_a_session(
    claude_new: Claude, start_server: StartServer, messages_api: MessagesApi
) -> None:
    keys = ("sk-one-0123456789abcdef", "sk-two-0123456789abcdef")
    server = start_server(claude_new, {"API_KEYS": ",".join(keys)})
    chat, other = (Chat(server, key=key) for key in keys)
    chat.say("Whose is it?")
    other.messages = list(chat.messages)
    other.say("Mine, I say.")
    assert other.session != chat.session
    assert heard(asked(messages_api, "Mine, I say.")) == other.said
    with pytest.raises(openai.NotFoundError) as raised:
        other.say("Give it to me.", session_id=chat.session)
    assert raised.value.code == "session_not_found"
    chat.say("No, mine.")
    assert chat.session


# What a client does to a conversation.


def test_white_space_and_the_system_prompt_do_not_matter(new_server: Server) -> None:
    chat = Chat(new_server)
    chat.say("Two words.\nTwo  lines.")
    chat.messages = [
        {"role": "system", "content": "You are a parrot."},
        {"role": "user", "content": [{"type": "text", "text": " Two words. Two lines. "}]},
        {"role": "assistant", "content": chat.messages[1]["content"].replace("\n", "\r\n") + "\n"},
    ]
    chat.say("On we go.")
    assert chat.session


def test_images_stay_in_the_history(new_server: Server, messages_api: MessagesApi) -> None:
    def images(request: Recorded) -> list[str]:
        blocks = [b for m in request.conversation.messages for b in m["content"]]
        return [b["source"]["data"] for b in blocks if isinstance(b, dict) and b["type"] == "image"]

    chat, name = Chat(new_server), str(uuid4())
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    chat.say([{"type": "text", "text": f"Look. {name}"}, image])
    chat.say(f"What was it? {name}")
    assert chat.session
    edited = chat.copy()
    edited.messages[2]["content"] = f"What is it? {name}"
    edited.say(f"Tell me more. {name}")
    assert edited.session != chat.session
    for text in ("What was it?", "Tell me more."):
        assert images(asked(messages_api, f"{text} {name}")) == [PNG]


def test_side_requests_do_not_disturb_a_chat(new_server: Server) -> None:
    chat = Chat(new_server)
    headers = {"X-OpenWebUI-Chat-Id": str(uuid4())}
    chat.say("Hello, parrot.", headers=headers)
    title = Chat(new_server)
    title.say(f"Make a title of this: {json.dumps(chat.messages)}", headers=headers)
    chat.say("And hello again.", headers=headers)
    assert chat.session != title.session


@pytest.mark.parametrize("way", ["text", "object", "header"])
def test_a_session_is_continued_by_its_id(
    new_server: Server, messages_api: MessagesApi, way: str
) -> None:
    first, name = Chat(new_server), str(uuid4())
    first.say(f"Remember this. {name}")
    chat = Chat(new_server)
    text = f"What did I say? {way} {name}"
    if way == "text":
        chat.say(f"session-id={first.session}\n\n{text}")
    elif way == "object":
        chat.say(text, session_id=first.session)
    else:
        chat.say(text, headers={"X-Claude-Session-Id": first.session})
    assert chat.session == first.session
    told = asked(messages_api, text).conversation.user_texts
    assert told == [f"Remember this. {name}", text]


# Parameters.


def test_parameters_are_inherited(new_server: Server) -> None:
    chat, name = Chat(new_server), f"w-{uuid4()}"
    made = new_server.daemon.base / "workspace" / name / "made"
    chat.say(f'workspace={name}\nallowed-tools=["Bash"]\n\nMay you? {TOUCH}')
    assert made.read_text() == "made\n"
    chat.say(f"Still? {TOUCH}")
    assert (chat.session, chat.workspace) == (chat.sessions[0], name)
    assert made.read_text() == "made\n" * 2
    # A new session is told by the text of the earlier messages.
    edited = chat.copy()
    edited.messages[2]["content"] = "Edited."
    edited.say(f"And now? {TOUCH}")
    assert edited.session != chat.session
    assert made.read_text() == "made\n" * 3
    edited.say(f"allowed-tools=[]\n\nNo longer? {TOUCH}")
    assert edited.session
    assert made.read_text() == "made\n" * 3


def test_parameters_of_the_extension_object_are_inherited(new_server: Server) -> None:
    chat, name = Chat(new_server), f"w-{uuid4()}"
    made = new_server.daemon.base / "workspace" / name / "made"
    chat.say(f"May you? {TOUCH}", workspace=name, allowed_tools=["Bash"])
    chat.say(f"Still? {TOUCH}")
    assert made.read_text() == "made\n" * 2
    assert (chat.session, chat.workspace) == (chat.sessions[0], name)


def test_what_a_text_may_set_is_for_the_server_to_say(
    claude_new: Claude, start_server: StartServer, messages_api: MessagesApi
) -> None:
    name = f"w-{uuid4()}"
    safe = Chat(start_server(claude_new, {"CHAT_TEXT_PARAMETERS": "safe"}, name="safe"))
    safe.say(f"workspace={name}\n\nHello.")
    assert safe.workspace == name
    with pytest.raises(openai.BadRequestError, match="CHAT_TEXT_PARAMETERS") as raised:
        safe.say('allowed-tools=["Bash"]\n\nHello.')
    assert raised.value.param == "allowed-tools"
    none = Chat(start_server(claude_new, {"CHAT_TEXT_PARAMETERS": "none"}, name="none"))
    text = f"workspace={name}\n\nHello, {name}."
    assert none.say(text) == f"You said: {text}"
    assert none.workspace is None


# Activity in the content.


def test_activity_in_the_content_is_no_part_of_the_conversation(
    claude_new: Claude, start_server: StartServer, messages_api: MessagesApi
) -> None:
    server = start_server(claude_new, {"CHAT_ACTIVITY": "content"})
    chat, name = Chat(server), str(uuid4())
    script = f"workspace=inline\n\n{name} [[thinking Well.]] [[text Looking.]] {TOUCH}"
    answer = chat.say(script)
    assert answer.startswith(f"session-id={chat.session}\nworkspace=inline\n")
    assert "<thinking>" in answer
    assert "Well." in answer
    assert answer.endswith("done")
    chat.say(f"On. {name}")
    # Two that read alike are told apart by what they show.
    twins = [Chat(server), Chat(server)]
    for twin in twins:
        twin.say(f"We are twins. {name}")
    for twin in twins:
        twin.say(f"Still twins. {name}")
    assert len({chat.session, *(twin.session for twin in twins)}) == 3
    edited = chat.copy()
    edited.messages[2]["content"] = "Edited."
    edited.say(f"After the edit. {name}")
    assert edited.session != chat.session
    told = heard(asked(messages_api, f"After the edit. {name}"))
    assert [role for role, _ in told] == ["user", "assistant"] * 2 + ["user"]
    assert told[1] == ("assistant", "Looking.\n\ndone")
    assert "session-id" not in json.dumps(told)


# The oldest CLI.


def test_an_old_cli_continues_conversations_too(
    old_server: Server, messages_api: MessagesApi
) -> None:
    chat, name = Chat(old_server), str(uuid4())
    for text in (f"First. {name}", f"Second. {name}", f"Third. {name}"):
        chat.say(text)
    assert heard(asked(messages_api, f"Third. {name}")) == chat.said
    # It gives a session a new id each time that it goes on; the turn before it had the last one.
    starts = [record["session_id"] for record in old_server.daemon.records("turn_start")]
    assert starts == [None, *chat.sessions[:2]]
