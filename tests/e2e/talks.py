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

from tests.e2e.chat_frames import Tap
from tests.e2e.claude_cli import Claude
from tests.e2e.daemon import Daemon
from tests.e2e.messages_api import MessagesApi, Recorded

__all__ = ["WAYS", "Client", "Talk", "Talks", "heard", "sessions_of", "ten_turns"]

WAYS = ("restart", "one daemon")
"""How ten turns are held, see L{ten_turns}."""

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
    Two conversations, and the way to the server that they ended with.

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
) -> Iterator[dict[str, Talks]]:
    """
    Hold two such pairs of conversations, streamed and whole: one with a new daemon after half of
    the turns (C{restart}), the other with that daemon alone (C{one daemon}).

    All that is answered is checked strictly.
    """
    with _serving(folder, claude, api) as url:
        restarted = _Turns(client, f"{name}, restart")
        for number in range(1, TURNS // 2 + 1):
            restarted.take(url, number)
    with _serving(folder, claude, api) as url:
        for number in range(TURNS // 2 + 1, TURNS + 1):
            restarted.take(url, number)
        steady = _Turns(client, f"{name}, one daemon")
        for number in range(1, TURNS + 1):
            steady.take(url, number)
        yield {"restart": restarted.talks(url), "one daemon": steady.talks(url)}


@contextmanager
def _serving(folder: Path, claude: Claude, api: MessagesApi) -> Iterator[str]:
    with Daemon(folder, claude, api.url) as daemon, Tap(daemon.url) as tap:
        yield tap.url


class _Turns:
    """Two conversations that are held."""

    def __init__(self, client: Client, name: str) -> None:
        self._name = name
        self._long, self._short = Talk(client, f"{name} long"), Talk(client, f"{name} short")

    def take(self, url: str, number: int) -> None:
        """Take the next turn of the long one, and of the short one where it is its time."""
        text = f"{self._name}, turn {number} {_SCRIPTS.get(number, '')}".strip()
        answer = self._long.say(url, text, streamed=number % 2 == 1)
        assert answer == _ANSWERS.get(number, f"You said: {text}")
        if number == 3:
            self._short.say(url, self._long.shown[0][1])
            assert self._short.shown == self._long.shown[:2]
        elif number > 3 and number % 4 == 0:
            self._short.say(url, f"{self._name}, in between {number}", streamed=False)

    def talks(self, url: str) -> Talks:
        """Both, as they are now."""
        return Talks(self._name, self._long, self._short, url)


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
