"""
The storm of test_storm.py as it is drawn, and what is right in it.  Nothing here does anything.

Turns are drawn from a seed: what the CLI does (see storm_cli.py), how the client behaves, and which
signal hits the child.  `judge` knows from that alone what the client must have got.
"""

from __future__ import annotations

import json
import random
import re
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.integration.storm_cli import GONE_CODE, LAST_WORDS, WEATHER, Order, text_of
from tests.support import Answer

__all__ = [
    "INACTIVITY_SECONDS",
    "SERVER",
    "TOTAL_SECONDS",
    "Entry",
    "Event",
    "Plan",
    "check_logbook",
    "draw",
    "judge",
]

Event = dict[str, Any]

INACTIVITY_SECONDS, TOTAL_SECONDS = 5, 12
"""The limits of the server; much longer than anything takes that is to end well."""

SERVER = "lighthouse"
"""The MCP server that the storm's server has."""

DECK = """
 9 good stream       3 slow leaves       2 early stream      3 silent stream kill
 8 good partials     3 good leaves       2 early whole       2 silent whole kill
 6 good whole        1 noisy leaves      2 midway stream     1 silent stream stop
 4 good slowly       2 endless leaves    1 midway whole      3 slow stream pause
 3 good old          1 stubborn leaves   1 gone stream       3 slow stream early
 3 good pipelined    2 orphan leaves     1 silent stream     1 slow whole early
 3 slow partials     1 mute leaves       1 silent whole      2 hang_up stream
 2 slow half_closes  1 flood stalls      1 mute stream       2 overloaded stream
 4 garbage stream    3 noisy partials    3 asks stream       1 overloaded whole
 3 orphan stream     2 linger stream     2 twice partials    1 linger leaves
 4 garbage partials  2 noisy whole       2 asks leaves
"""
"""So many turns of each kind: what the CLI does, what the client does, what a signal does."""

HITS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM)

RIGHT = {"good", "slow", "garbage", "noisy", "orphan", "linger", "asks", "twice"}
"""What the CLI may do and still give a right answer."""

FAILURES = {
    "early": "cli_failed",
    "gone": "cli_failed",
    "midway": "cli_failed",
    "hang_up": "cli_failed",
    "silent": "inactivity_timeout",
    "mute": "inactivity_timeout",
    "endless": "turn_timeout",
    "overloaded": "upstream_overloaded",
}
STATUS = {
    "cli_failed": 502,
    "inactivity_timeout": 504,
    "turn_timeout": 504,
    "upstream_overloaded": 503,
}


@dataclass(frozen=True)
class Plan:
    """
    One turn.

    @ivar token: names it in the prompt, in the answer and in the log.
    @ivar client: how the client behaves.
    @ivar hit: what a signal does to the child: `kill`, `stop` (for ever), `pause`, `early` (a kill
        at any moment), or nothing.
    @ivar voyage: the conversation that it is part of.
    @ivar fields: further fields of the request.
    @ivar chance: for what is decided on the way.
    """

    token: str
    order: Order
    client: str
    hit: str
    number: signal.Signals
    voyage: int
    fields: dict[str, Any]
    chance: random.Random

    def body(self, session: str | None) -> dict[str, Any]:
        """The request that continues this session, or begins one."""
        fields = {"session-id": session, **self.fields}
        if session is None:
            del fields["fork"]
        given = {name: value for name, value in fields.items() if value is not None}
        return {"prompt": json.dumps(self.order), **given}


def draw(seed: int, count: int) -> list[Plan]:
    """The turns; the longest one begins."""
    chance = random.Random(seed)
    cards = re.findall(r"(\d+) (\w+) (\w+)(?: (kill|stop|pause|early))?", DECK)
    deck = [tuple(card[1:]) for card in cards for _ in range(int(card[0]))]
    drawn = [("endless", "stream", "")]
    while len(drawn) < count:
        drawn += chance.sample(deck, len(deck))
    plans: list[Plan] = []
    for number, (do, client, hit) in enumerate(drawn[:count]):
        near = plans and chance.random() < 0.15  # so that turns of one conversation meet
        voyage = plans[-1].voyage if near else chance.randrange(count // 3 + 1)
        plans.append(
            Plan(
                token=f"t{number}",
                order=_order(chance, f"t{number}", do, client, hit),
                client=client,
                hit=hit,
                number=chance.choice(HITS),
                voyage=voyage,
                fields=_fields(chance, do, client, voyage),
                chance=random.Random(chance.random()),
            )
        )
    return plans


def _order(chance: random.Random, token: str, do: str, client: str, hit: str) -> Order:
    huge = do == "good" and client in ("stream", "partials", "whole") and chance.random() < 0.15
    size = 1_700_000 if huge else int(10 ** chance.uniform(0, 5))  # the huge one: lines of 2 MB
    defiant = not hit and do in ("silent", "mute", "midway") and chance.random() < 0.3
    order: Order = {
        "token": token,
        "do": do,
        "size": size,
        "piece": max(chance.choice([20, 200, 2000]), size // 200),
        "pause": chance.uniform(0.001, 0.02),
        "fill": "x" * int(10 ** chance.uniform(0, 6)) if chance.random() < 0.2 else "",
        "blocks": 1000,
        "code": chance.choice([0, 1, 2, 77]),
        "words": chance.random() < 0.5,
        "stubborn": defiant,
    }
    if do == "stubborn":
        order |= {"do": "endless", "stubborn": True}
    if chance.random() < 0.2:
        order["cut"] = size // 50 + 1
    return order


def _fields(chance: random.Random, do: str, client: str, voyage: int) -> dict[str, Any]:
    return {
        "include-partial-messages": client in ("partials", "slowly", "stalls"),
        "stream": client != "whole",
        "workspace": f"bay{voyage % 3}" if voyage % 2 else None,
        "model": "gone" if do == "gone" else None,
        "fork": chance.random() < 0.1,
        "mcp-allowed-tools": [f"mcp__{SERVER}__look"] if chance.random() < 0.1 else None,
    }


# One answer.


def judge(plan: Plan, answer: Answer) -> Event:
    """
    Check that this is exactly the right answer, or the right failure.

    @return: what the client could see last: the `result`, or the body of a refusal.
    """
    assert answer.complete, "the answer was cut"
    do = plan.order["do"]
    end: Event
    if answer.status != 200:
        code = str(answer.error["code"])
        assert answer.status == STATUS[code], (answer.status, code)
        end, message = answer.json, str(answer.error["message"])
    else:
        events = _events(answer) if plan.fields["stream"] else []
        end = events[-1] if events else answer.json
        code, message = _code(end), str(end["result"])
        _check_events(plan, events, succeeded=not code)
    wanted = {FAILURES.get(do, "")}
    if plan.hit in ("kill", "early"):
        wanted = {"cli_failed"} if plan.hit == "kill" else {"cli_failed", ""}
        do = "hit"
    assert code in wanted, (code, wanted, message)
    if code:
        assert _sentence(plan, do) in message, message
    else:
        _check_success(plan, end)
    return end


def _events(answer: Answer) -> list[Event]:
    assert answer.headers["content-type"] == "text/event-stream"
    *frames, rest = answer.body.decode().split("\n\n")
    assert rest == ""
    assert all(frame.startswith("data: ") for frame in frames)
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def _code(end: Event) -> str:
    """How a turn with status 200 ended; empty if well."""
    assert end["type"] == "result"
    if "error" not in end:
        return FAILURES["overloaded"] if end["is_error"] else ""
    assert end["is_error"]
    code = str(end["error"]["code"])
    assert end["subtype"] == ("timeout" if "timeout" in code else "error")
    return code


def _check_events(plan: Plan, events: list[Event], *, succeeded: bool) -> None:
    """Check what came before the last event of a stream."""
    if not events:
        return
    assert len({event["session_id"] for event in events}) == 1
    first, *between, _last = events
    assert (first["type"], first["subtype"]) == ("system", "init")
    text = text_of(plan.token, plan.order["size"])
    partials = "".join(
        event["event"]["delta"]["text"] for event in between if event["type"] == "stream_event"
    )
    assert text.startswith(partials)
    assert bool(partials) <= plan.fields["include-partial-messages"]
    if succeeded:
        assert partials == text or not plan.fields["include-partial-messages"]
        whole = [event["message"]["content"] for event in between if event["type"] == "assistant"]
        assert whole == [[{"type": "text", "text": text}]]
    others = [event for event in between if event["type"] not in ("stream_event", "assistant")]
    weather = [{**WEATHER, "session_id": first["session_id"]}]
    assert others == (weather if plan.order["do"] == "garbage" else [])


def _check_success(plan: Plan, result: Mapping[str, Any]) -> None:
    assert result["subtype"] == "success"
    assert result["result"] == text_of(plan.token, plan.order["size"])
    assert result["servers"] == ([SERVER] if plan.fields["mcp-allowed-tools"] else [])
    assert result["told"][-1] == plan.token


def _sentence(plan: Plan, do: str) -> str:
    """What the message of a failure must say."""
    words = f": {LAST_WORDS}" if plan.order["words"] else "."
    died = f"(exit code {plan.order['code']}){words}"
    silent = f"was silent for the {INACTIVITY_SECONDS} seconds"
    sentences: dict[str, str] = {
        "hit": f"(signal {plan.number.value})",
        "gone": f"(exit code {GONE_CODE}): {LAST_WORDS}",
        "early": died,
        "midway": died,
        "hang_up": "(exit code 0)",
        "silent": silent,
        "mute": silent,
        "endless": f"longer than the {TOTAL_SECONDS} seconds",
        "overloaded": "529 Overloaded",
    }
    return sentences[do]


# All answers together.


@dataclass
class Entry:
    """
    What became of one turn, as far as its client knows.

    @ivar session: the one that it asked for, or learnt of.
    @ivar source: for a fork, the session that was copied.
    @ivar begun: the CLI surely took its message.
    @ivar told: the tokens that its result named.
    """

    token: str
    session: str | None
    source: str | None
    started: float
    ended: float = 0.0
    begun: bool = False
    told: list[str] = field(default_factory=list)


def check_logbook(entries: Iterable[Entry], final: Mapping[str, list[str]]) -> None:
    """
    Check what the sessions know of their turns.

    No message may be lost, taken twice, out of order or in another session.

    @param final: what each session that there is knew at last.
    """
    by_session: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.session is not None:
            by_session.setdefault(entry.session, []).append(entry)
    for session, told in final.items():
        turns = by_session.get(session, [])
        place = {token: position for position, token in enumerate(told)}
        assert len(place) == len(told), f"{session} took a message twice: {told}"
        strange = set(told) - _known(session, by_session)
        assert not strange, f"{session} took messages of others: {strange}"
        for turn in turns:
            lost = turn.begun and turn.token not in place
            assert not lost, f"{session} lost {turn.token}: {told} of {turns}"
            assert told[: len(turn.told)] == turn.told, f"{session} at {turn.token}: {told}"
        sure = [turn for turn in turns if turn.token in place]
        wrong = [
            (one.token, other.token)
            for one in sure
            for other in sure
            if one.ended < other.started and place[one.token] > place[other.token]
        ]
        assert not wrong, f"{session} took messages out of order: {wrong}"


def _known(session: str, by_session: Mapping[str, list[Entry]]) -> set[str]:
    """The tokens that may be in a session: those sent to it, and to those that it was copied of."""
    tokens: set[str] = set()
    todo, seen = [session], {session}
    while todo:
        for turn in by_session.get(todo.pop(), []):
            tokens.add(turn.token)
            if turn.source is not None and turn.source not in seen:
                seen.add(turn.source)
                todo.append(turn.source)
    return tokens
