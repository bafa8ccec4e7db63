"""
Conversations as clients have them: the client keeps what it shows, and sends all of it each time.

The ten turns that tests of several clients look at are here, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.e2e.claude_cli import Claude
from tests.e2e.daemon import Daemon
from tests.e2e.messages_api import MessagesApi, Recorded

__all__ = ["Client", "Talk", "Talks", "heard", "sessions_of", "ten_turns"]

TURNS = 10

_LOOKING = '[[text Looking.]] [[tool:Bash {"command": "ls"}]] [[then]] [[text Seen.]]'
_SCRIPTS = {3: "[[thinking Well, well.]] [[text I thought.]]", 4: _LOOKING, 7: _LOOKING}
_ANSWERS = {3: "I thought.", 4: "Looking.\n\nSeen.", 7: "Looking.\n\nSeen."}


class Client(Protocol):
    """A program that holds conversations."""

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        """C{say}, C{copy}, C{edit} and C{cut} are what is asked of it."""


class Talk:
    """
    One conversation that a client holds.

    @ivar name: by which the client knows it.
    @ivar shown: the role and the text of all messages, as the client shows them.
    @ivar sessions: the session that answered, turn by turn.
    """

    def __init__(
        self, client: Client, name: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        self.shown: list[tuple[str, str]] = []
        self.sessions: list[str] = []
        self._client = client
        self.name = name
        self._headers = dict(headers or {})

    def say(self, url: str, text: str, *, streamed: bool = True, key: str = "any") -> str:
        """Say something to the server there and return what it answers."""
        command = {"url": url, "key": key, "headers": self._headers, "talk": self.name}
        answer = self._client.ask("say", **command, text=text, streamed=streamed)
        assert "error" not in answer, answer
        self.shown += [("user", text), ("assistant", answer["text"])]
        self.sessions.append(answer["session"])
        return str(answer["text"])

    def copy(self) -> Talk:
        """The same conversation once more, to go on from here in another way."""
        other = Talk(self._client, f"{self.name}, copied", headers=self._headers)
        self._client.ask("copy", talk=self.name, to=other.name)
        other.shown = list(self.shown)
        return other

    def edit(self, at: int, text: str) -> None:
        """Change what a message of the user says, and keep all that follows."""
        assert self.shown[at][0] == "user"
        self._client.ask("edit", talk=self.name, at=at, text=text)
        self.shown[at] = ("user", text)

    def cut(self, at: int) -> None:
        """Take away this message and all that follows."""
        self._client.ask("cut", talk=self.name, at=at)
        del self.shown[at:]


@dataclass(frozen=True)
class Talks:
    """
    Two conversations, and the server that they ended with.

    @ivar name: tells the texts from those of other clients.
    @ivar long: ten turns.
    @ivar short: begun in the third of them, with the first words of the other; it goes on after
        every fourth turn of the other.
    """

    name: str
    long: Talk
    short: Talk
    url: str


@contextmanager
def ten_turns(
    client: Client, name: str, folder: Path, claude: Claude, api: MessagesApi
) -> Iterator[Talks]:
    """Hold the two conversations, streamed and whole, with a new daemon after half of the turns."""
    long, short = Talk(client, f"{name} long"), Talk(client, f"{name} short")

    def turn(url: str, number: int) -> None:
        text = f"{name}, turn {number} {_SCRIPTS.get(number, '')}".strip()
        answer = long.say(url, text, streamed=number % 2 == 1)
        assert answer == _ANSWERS.get(number, f"You said: {text}")
        if number == 3:
            short.say(url, long.shown[0][1])
            assert short.shown == long.shown[:2]
        elif number > 3 and number % 4 == 0:
            short.say(url, f"{name}, in between {number}", streamed=False)

    half = TURNS // 2
    with Daemon(folder, claude, api.url) as daemon:
        for number in range(1, half + 1):
            turn(daemon.url, number)
    with Daemon(folder, claude, api.url) as daemon:
        for number in range(half + 1, TURNS + 1):
            turn(daemon.url, number)
        yield Talks(name, long, short, daemon.url)


def heard(request: Recorded) -> list[tuple[str, str]]:
    """What the model heard: the role and the text of all messages, but for calls of tools."""
    return [
        (message["role"], "\n".join(message["texts"]))
        for message in request.conversation.summary()["messages"]
        if message["texts"]
    ]


def sessions_of(*talks: Talk) -> set[str]:
    """All sessions that answered in these conversations."""
    return {session for talk in talks for session in talk.sessions}
