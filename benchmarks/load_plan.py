"""
The turns of the load run as they are drawn, and what is right in them.  Nothing here does anything.

A turn is one of the soak's, and its answer is judged as there, when the stamps are taken out of its
text: by what was asked, by what the session must know, and by how the CLI was told to end.
"""

from __future__ import annotations

import bisect
import json
import random
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from tests.integration.soak_plan import Fields, Plan, events_of, judge
from tests.support import Answer, parse_answers

__all__ = [
    "FAILING",
    "LEAVING",
    "LONGEST",
    "Talk",
    "Times",
    "body_of",
    "check",
    "draw",
    "left",
    "new_talk",
    "times_of",
]

LEAVING, FAILING = 0.2, 0.05
"""The shares of clients that leave early, and of children that fail."""

LONGEST = 14.0
"""Seconds that a child takes at most for its answer."""

_SHORTEST = 6.0
_FIRST = (0.05, 0.6)
_PIECES = (20, 60)
_TURNS_IN_A_TALK = 6

_STAMP = re.compile(rb"~(\d+)~(\d+)~")


@dataclass
class Talk:
    """
    A conversation, as its client knows it.

    @ivar fields: what its turns want, in the names of the native dialect.
    @ivar turns: how many have been asked for.
    @ivar session: its session, as soon as that is known.
    @ivar messages: its history, in the OpenAI dialect.
    @ivar told: the tokens of the messages that its session surely knows.
    @ivar doubtful: those that it may know as well: their clients have left.
    """

    is_chat: bool
    number: int
    fields: Fields
    turns: int = 0
    session: str | None = None
    messages: list[Fields] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    doubtful: set[str] = field(default_factory=set)

    @property
    def goes_on(self) -> bool:
        """Whether there may be another turn in it."""
        return bool(self.turns) and self.turns < _TURNS_IN_A_TALK


def new_talk(chance: random.Random, number: int) -> Talk:
    """A conversation; most of them want the same, so that processes can be started ahead."""
    fields: Fields = chance.choice(
        [{}, {}, {}, {"workspace": f"bay{number % 3}"}, {"allowed-tools": ["Read"]}]
    )
    return Talk(chance.random() < 0.5, number, fields)


def draw(chance: random.Random, talk: Talk, token: str) -> Plan:
    """The next turn of a conversation; what its client or its child does wrong is its `act`."""
    pieces = chance.randint(*_PIECES)
    first = chance.uniform(*_FIRST)
    order: dict[str, Any] = {
        "token": token,
        "do": "good",
        "size": chance.randint(20, 100) * pieces,
        "pieces": pieces,
        "first": first,
        "gap": (chance.uniform(_SHORTEST, LONGEST) - first) / pieces,
        "breaks": 0,
        "fails": "",
        "words": chance.random() < 0.5,
        "code": 0,
    }
    act = ""
    lot = chance.random()
    if lot < LEAVING:
        act = "leave"
    elif lot < LEAVING + FAILING:
        order["fails"] = chance.choice(["exit", "garbage", "kill"])
        order["breaks"] = chance.randint(2, pieces // 2)
        order["code"] = chance.choice([0, 1, 77])  # 0: it just ends, without a result
        killed = order["fails"] == "kill"
        order["do"] = "wait" if killed else "early"
        act = "kill" if killed else ""
    one = ("chats", "chat") if talk.is_chat else ("partials", "whole")
    dialect = chance.choice(one)
    own = random.Random(chance.random())  # noqa: S311 - to be repeated, not to be secret
    number = signal.SIGKILL
    plan = Plan(token, order, dialect, act, number, 0, talk.fields, "", False, False, None, own)
    return replace(plan, voyage=talk.number)


# What came of a turn.


@dataclass(frozen=True)
class Times:
    """
    When the pieces of an answer were written and read, in nanoseconds of the monotonic clock.

    @ivar heard: when the CLI had the message.
    @ivar written: by the CLI, piece by piece.
    @ivar read: by the client.
    """

    heard: int
    written: list[int]
    read: list[int]


def times_of(received: Sequence[tuple[int, bytes]]) -> Times | None:
    """
    The times of a stream; None if it has no text.

    @param received: the bytes, and when each portion of them came.
    @raise AssertionError: pieces are missing, or in another order.
    """
    moments = [moment for moment, _ in received]
    ends = list(accumulate(len(data) for _, data in received))
    heard = 0
    written: list[int] = []
    read: list[int] = []
    for found in _STAMP.finditer(b"".join(data for _, data in received)):
        number, moment = int(found[1]), int(found[2])
        if number == 0 and heard:
            break  # from here on, messages say again what their pieces said
        if number == 0:
            heard = moment
            continue
        assert number == len(written) + 1, "pieces came in another order"
        written.append(moment)
        read.append(moments[bisect.bisect_left(ends, found.end())])
    return Times(heard, written, read) if written else None


def check(plan: Plan, talk: Talk, data: bytes) -> str:
    """
    Judge an answer, and remember what follows from it for the next turn.

    @return: the failure with which it has rightly ended; empty if it ended well.
    @raise AssertionError: it is not exactly the right answer, or the right failure.
    """
    [answer] = parse_answers(data, closed=True)
    plain = _STAMP.sub(b"", answer.body)
    verdict = judge(plan, replace(answer, body=plain), plan.fields)
    session = answer.headers["x-claude-session-id"]
    if not plan.is_chat:
        assert talk.session in (None, session), "another session has answered"
        talk.session = session
    if not verdict.text:
        if not plan.is_chat:
            talk.told.append(plan.token)  # it has begun
        return verdict.code
    talk.told.append(plan.token)
    told = [token for token in verdict.head["told"] if token not in talk.doubtful]
    assert told == talk.told, (told, talk.told)
    if plan.is_chat:
        said = [("user", plan.prompt), ("assistant", _chat_text(plan, answer))]
        talk.messages += [{"role": role, "content": text} for role, text in said]
    return ""


def _chat_text(plan: Plan, answer: Answer) -> str:
    """What the assistant said, with the stamps: that is what the client sends back."""
    if plan.dialect == "chat":
        return str(answer.json["choices"][0]["message"]["content"])
    chunks = [chunk for chunk in events_of(answer) if chunk.get("choices")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def left(plan: Plan, talk: Talk, data: bytes) -> None:
    """Remember what is known of a turn whose client has left."""
    if plan.is_chat:
        return  # it is not in the history, so nobody may know of it
    talk.doubtful.add(plan.token)
    head = re.search(rb"X-Claude-Session-Id: (\S+)\r\n", data, re.IGNORECASE)
    if head is not None:
        assert talk.session in (None, head[1].decode()), "another session has answered"
        talk.session = head[1].decode()


def body_of(plan: Plan, talk: Talk) -> bytes:
    """The body of the request for a turn."""
    fields = plan.chat(talk.messages, inherits=False) if talk.is_chat else plan.native(talk.session)
    return json.dumps(fields).encode()
