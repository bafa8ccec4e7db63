"""
The soak of soak.py as it is drawn, and what is right in it.  Nothing here does anything.

Turns are drawn from a seed: what the CLI does (see soak_cli.py), in which dialect it is asked, what
happens meanwhile, and which settings the turn wants.  `judge` knows from that alone what the client
must have got.
"""

from __future__ import annotations

import json
import random
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tests.integration.soak_cli import COMMAND, api_ms_of, cost_of, tokens_of
from tests.integration.storm_cli import LAST_WORDS, Order, text_of
from tests.support import Answer

__all__ = [
    "INHERITED",
    "SERVER",
    "Fields",
    "Plan",
    "Verdict",
    "cost_of_turn",
    "draw",
    "events_of",
    "force_of",
    "judge",
    "plain",
]

Fields = dict[str, Any]

SERVER = "lighthouse"
"""The MCP server that the soak's server has."""

DECK = """
 24 good stream      8 good partials     12 good whole      14 good chat       10 good chats
  4 slow stream      2 slow chat          3 slow chats
  8 background stream 2 background whole  3 background chat  3 alarm stream      3 command stream
  2 command whole    2 limit stream       2 limit chat       2 limit whole
  2 overloaded stream 1 overloaded chat   1 overloaded whole 1 early stream      1 early chat
  4 wait stream interrupt   2 wait whole interrupt   3 wait chat interrupt   2 slow chats interrupt
  2 wait stream kill        2 wait whole kill        2 wait chats kill       1 wait chat kill
  3 slow stream early_kill  2 slow chat early_kill   3 good stream early_kill
  2 wait stream delete      1 wait chat delete       1 slow stream delete    1 wait chats delete
  2 wait stream leave       2 slow stream leave      1 slow whole leave      2 slow chat leave
  2 good partials leave     1 wait chats leave       1 background stream leave
"""
"""So many turns of each kind: what the CLI does, the dialect, what happens meanwhile."""

BEFORE = ("kill", "kill", "kill", "delete", "ghost", "rewind", "rewind", "rewind")
"""What may happen between two turns of a session; not all of it can at every time."""

INHERITED = (
    "allowed-tools",
    "disallowed-tools",
    "mcp-allowed-tools",
    "dangerously-skip-permissions",
    "permission-mode",
)

_STATUS = {
    "cli_failed": 502,
    "interrupted": 502,
    "upstream_overloaded": 503,
    "session_not_found": 404,
}

_DUST = 1e-9
"""Less than anything costs; what is left over from adding binary numbers is less than this."""


@dataclass(frozen=True)
class Plan:
    """
    One turn.

    @ivar token: names it in the prompt, in the answer and in the log.
    @ivar dialect: `stream`, `partials`, `whole`, `chat` or `chats` (a stream).
    @ivar act: what happens meanwhile: `interrupt`, `kill`, `early_kill` (at any moment), `delete`,
        `leave`, or nothing.
    @ivar voyage: the conversation that it is part of.
    @ivar fields: what it wants, in the names of the native dialect.
    @ivar before: what happens before it: `kill` (of the process that waits), `delete`, `ghost` (the
        session that was deleted last is asked for), `rewind` (the client edits its history).
    @ivar fork: it goes on in a copy.
    @ivar inherits: it leaves out what a session of its own remembers, if that is known.
    @ivar beside: another one that is sent to the same session at the same time.
    @ivar chance: for what is decided on the way.
    """

    token: str
    order: Order
    dialect: str
    act: str
    number: signal.Signals
    voyage: int
    fields: Fields
    before: str
    fork: bool
    inherits: bool
    beside: Plan | None
    chance: random.Random

    @property
    def is_chat(self) -> bool:
        return self.dialect.startswith("chat")

    @property
    def prompt(self) -> str:
        text = json.dumps(self.order)
        return COMMAND + text if self.order["do"] == "command" else text

    def native(self, session: str | None) -> Fields:
        """The body of a request that continues this session, or begins one."""
        fields = {"session-id": session, **self.fields}
        given = {name: value for name, value in fields.items() if value is not None}
        options = {
            "include-partial-messages": self.dialect == "partials",
            "stream": self.dialect != "whole",
            "fork": self.fork and session is not None,
        }
        return {"prompt": self.prompt, **given, **options}

    def chat(self, before: list[Fields], *, inherits: bool) -> Fields:
        """The body of a request with this history."""
        fields = {name: value for name, value in self.fields.items() if value is not None}
        model = fields.pop("model", "claude-code")
        most_tokens = fields.pop("most-tokens", None)
        if inherits:
            fields = {name: value for name, value in fields.items() if name not in INHERITED}
        else:
            # What is not named would be inherited from what the session had last.
            names = ("allowed-tools", "disallowed-tools", "mcp-allowed-tools")
            fields = {**{name: [] for name in names}, "permission-mode": "default", **fields}
        body: Fields = {
            "model": model,
            "messages": [*before, {"role": "user", "content": self.prompt}],
            "claude": fields,
        }
        if most_tokens is not None:
            body["max_completion_tokens"] = most_tokens
        if self.dialect == "chats":
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body


def draw(seed: int, count: int) -> list[Plan]:
    """The turns."""
    chance = random.Random(seed)
    cards = re.findall(r"(\d+) (\w+) (stream|partials|whole|chats?)(?: ([a-z_]+))?", DECK)
    deck = [tuple(card[1:]) for card in cards for _ in range(int(card[0]))]
    drawn: list[tuple[str, ...]] = []
    while len(drawn) < count:
        drawn += chance.sample(deck, len(deck))
    plans: list[Plan] = []
    for number, (do, dialect, act) in enumerate(drawn[:count]):
        is_chat = dialect.startswith("chat")
        lately = [plan.voyage for plan in plans[-12:] if plan.is_chat == is_chat]
        # Even voyages are chats, which continue by their history alone.
        anywhere = 2 * chance.randrange(count // 24 + 3) + (not is_chat)
        voyage = chance.choice(lately) if lately and chance.random() < 0.7 else anywhere
        plan = plain(chance, f"t{number}", do, dialect, voyage)
        # Beside another turn, what becomes of each would not be known.
        meets = not is_chat and not act and chance.random() < 0.06
        plans.append(
            replace(
                plan,
                act=act,
                fields=_fields(chance, seed, voyage),
                before=chance.choice(BEFORE) if chance.random() < 0.16 else "",
                fork=not is_chat and not act and chance.random() < 0.07,
                inherits=chance.random() < 0.4,
                beside=plain(chance, f"b{number}", "good", "whole", voyage) if meets else None,
            )
        )
    return plans


def plain(chance: random.Random, token: str, do: str, dialect: str, voyage: int) -> Plan:
    """A turn without adornments."""
    size = int(10 ** chance.uniform(0, 4))
    order: Order = {
        "token": token,
        "do": do,
        "size": size,
        "piece": max(chance.choice([40, 400, 4000]), size // 100),
        "pause": chance.uniform(0.001, 0.01),
        "after": chance.choice([0, 0, 0.003, 0.05, 0.3]),
        "orphan": chance.random() < 0.1,
        "code": chance.choice([0, 1, 77]),
        "words": chance.random() < 0.5,
    }
    if chance.random() < 0.1:
        order["cut"] = size // 20 + 10
    number = chance.choice([signal.SIGKILL, signal.SIGTERM])
    own_chance = random.Random(chance.random())
    return Plan(token, order, dialect, "", number, voyage, {}, "", False, False, None, own_chance)


def _fields(chance: random.Random, seed: int, voyage: int) -> Fields:
    """What a turn wants: mostly what its conversation always wants."""
    own = random.Random(f"{seed} {voyage}")
    fields: Fields = {
        "workspace": f"bay{voyage % 3}" if own.random() < 0.4 else None,
        "model": own.choice([None, None, "claude-light"]),
        "allowed-tools": own.choice([None, ["Read"], ["Bash(ls *)", "Edit"]]),
    }
    if chance.random() < 0.3:  # what a process that stays can be told
        fields["permission-mode"] = chance.choice([None, "default", "plan", "acceptEdits"])
        fields["effort"] = chance.choice([None, "low", "high"])
        fields["allowed-tools"] = chance.choice([None, [], ["Write"], ["Read", "Glob"]])
    if chance.random() < 0.12:  # what takes another one
        name, value = chance.choice(
            [
                ("model", "claude-dark"),
                ("disallowed-tools", ["WebFetch"]),
                ("max-turns", 7),
                ("dangerously-skip-permissions", True),
                ("mcp-allowed-tools", [f"mcp__{SERVER}__look"]),
                ("system-prompt", "Be a sailor."),
                ("append-system-prompt", "Be brief."),
            ]
        )
        fields[name] = value
    if voyage % 2 == 0 and chance.random() < 0.05:
        fields["most-tokens"] = 4000
    return fields


def force_of(fields: Fields) -> dict[str, Any]:
    """The settings that must be in force in a turn with these fields."""
    given = fields.get
    tools = given("mcp-allowed-tools") or []
    skips = bool(given("dangerously-skip-permissions"))
    system, turns, tokens = given("system-prompt"), given("max-turns"), given("most-tokens")
    return {
        "model": given("model"),
        "denied": given("disallowed-tools") or [],
        "most_turns": None if turns is None else str(turns),
        "most_tokens": None if tokens is None else str(tokens),
        "servers": [SERVER] if tools else [],
        "place": given("workspace") or "shared_workspace",
        "mode": "bypassPermissions" if skips else given("permission-mode") or "default",
        "effort": given("effort"),
        "allowed": [*(given("allowed-tools") or []), *tools],
        "system": None if system is None else [system],
        "appended": given("append-system-prompt"),
    }


# One answer.


@dataclass(frozen=True)
class Verdict:
    """
    What an answer turned out to be.

    @ivar code: the failure, `interrupted`, `limit`, or empty.
    @ivar text: what it says.
    """

    code: str
    text: str = ""

    @property
    def head(self) -> dict[str, Any]:
        """What the CLI told at the beginning of its text."""
        told: dict[str, Any] = json.JSONDecoder().raw_decode(self.text)[0]
        return told


def wanted(plan: Plan) -> set[str]:
    """How a turn may end."""
    do = plan.order["do"]
    by_act = {
        "interrupt": {"interrupted"},
        "kill": {"cli_failed"},
        "early_kill": {"cli_failed", ""},
        "spare_kill": {"cli_failed", ""},
        "delete": {"session_not_found"},
    }
    by_itself = {"limit": "limit", "overloaded": "upstream_overloaded", "early": "cli_failed"}
    if not plan.act:
        return {by_itself.get(do, "")}
    # What does not wait may come to its end before it is stopped.
    return by_act[plan.act] | ({""} if do != "wait" else set())


def cost_of_turn(plan: Plan) -> float:
    """What a turn costs that came to its own end."""
    return 0.0 if plan.order["do"] == "command" else cost_of(plan.token)


def judge(plan: Plan, answer: Answer, fields: Fields) -> Verdict:
    """
    Check that this is exactly the right answer, or the right failure.

    @param fields: what is in force, what is inherited included.
    """
    assert answer.complete, "the answer was cut"
    if answer.status != 200:
        verdict = _judge_failure(plan, answer.error)
        assert answer.status == _STATUS[verdict.code], answer
    elif plan.is_chat:
        verdict = _judge_chat(plan, answer)
    else:
        verdict = _judge_native(plan, answer, fields)
    assert verdict.code in wanted(plan), verdict
    if verdict.text:
        _check_text(plan, verdict.text, fields)
    return verdict


def _judge_failure(plan: Plan, error: Mapping[str, Any]) -> Verdict:
    code, message = str(error["code"]), str(error["message"])
    if code == "cli_failed" and message.endswith("could not finish the turn: stopped"):
        return Verdict("interrupted")
    words = f": {LAST_WORDS}" if plan.order["words"] else "."
    died = f"(exit code {plan.order['code']}){words}"
    sentence = {
        "cli_failed": f"(signal {plan.number.value})" if plan.act else died,
        "upstream_overloaded": "529 Overloaded",
        "session_not_found": "This session was deleted.",
    }
    assert sentence[code] in message, message
    return Verdict(code)


def events_of(answer: Answer) -> list[Fields]:
    """The events of a stream; a chat's without the word that ends it."""
    assert answer.headers["content-type"] == "text/event-stream"
    *frames, rest = answer.body.decode().split("\n\n")
    assert rest == ""
    assert all(frame.startswith("data: ") for frame in frames)
    data = [frame.removeprefix("data: ") for frame in frames]
    return [json.loads(one) for one in data if one != "[DONE]"]


def _judge_native(plan: Plan, answer: Answer, fields: Fields) -> Verdict:
    events = events_of(answer) if plan.dialect != "whole" else [answer.json]
    *before, end = events
    assert end["type"] == "result"
    assert {event["session_id"] for event in events} == {answer.headers["x-claude-session-id"]}
    partials, whole = _read_events(plan, before)
    if "error" in end:
        assert (end["is_error"], end["subtype"]) == (True, "error")
        return _judge_failure(plan, end["error"])
    code = {"error_during_execution": "interrupted", "error_max_turns": "limit"}.get(
        end["subtype"], "upstream_overloaded" if end["is_error"] else ""
    )
    _check_figures(plan, end, fields, spent=code in ("", "limit"))
    if not code:
        assert not before or whole == end["result"]
        assert partials == (whole if plan.dialect == "partials" else "")
    return Verdict(code, end["result"] if not code else "")


def _read_events(plan: Plan, events: list[Fields]) -> tuple[str, str]:
    """The texts of partial and of whole messages; checks that there is nothing else."""
    if not events:
        return "", ""
    first, *others = events
    assert (first["type"], first["subtype"]) == ("system", "init"), events
    partials, whole = "", ""
    for event in others:
        if event["type"] == "stream_event":
            assert plan.dialect == "partials"
            partials += event["event"].get("delta", {}).get("text", "")
        elif event["type"] == "assistant":
            blocks = event["message"]["content"]
            whole += "".join(block.get("text", "") for block in blocks)
        elif event["type"] == "user":
            assert plan.act == "interrupt"
            assert event["message"]["content"][0]["text"] == "[Request interrupted by user]"
        else:
            assert (event["type"], event["subtype"]) == ("system", "task_started")
            assert event["task_id"] == f"task{plan.token}"
    return partials, whole


def _check_figures(plan: Plan, result: Fields, fields: Fields, *, spent: bool) -> None:
    """Check that they are this turn's, not those of its process."""
    is_command = plan.order["do"] == "command"
    spent = spent and not is_command
    taken, made = tokens_of(plan.token) if spent else (0, 0)
    assert result["usage"] == {"input_tokens": taken, "output_tokens": made}
    assert result["num_turns"] == (0 if is_command else 1)
    assert result["duration_api_ms"] == (api_ms_of(plan.token) if spent else 0)
    cost = cost_of(plan.token) if spent else 0.0
    assert abs(result["total_cost_usd"] - cost) < _DUST, (result["total_cost_usd"], cost)
    by_model = result["modelUsage"]
    if not spent:
        assert by_model == {}
        return
    assert list(by_model) == [fields.get("model") or "claude-usual"]
    [used] = by_model.values()
    assert abs(used.pop("costUSD") - cost) < _DUST
    assert used == {"inputTokens": taken, "outputTokens": made, "contextWindow": 200_000}


def _judge_chat(plan: Plan, answer: Answer) -> Verdict:
    if plan.dialect == "chat":
        body = answer.json
        text = body["choices"][0]["message"]["content"]
        reason = body["choices"][0]["finish_reason"]
    else:
        chunks = events_of(answer)
        body = chunks[-1]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk.get("choices")]
        text = "".join(delta.get("content") or "" for delta in deltas)
        if "error" in body:
            return _judge_failure(plan, body["error"])
        assert answer.body.endswith(b"data: [DONE]\n\n")
        reason = chunks[-2]["choices"][0]["finish_reason"]
    taken, made = tokens_of(plan.token)
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (taken, made)
    extras = body["claude"]
    assert abs(extras["cost_usd"] - cost_of(plan.token)) < _DUST
    assert extras["session_id"] == answer.headers["x-claude-session-id"]
    code = {"stop": "", "length": "limit"}[reason]
    return Verdict(code, text)


def _check_text(plan: Plan, text: str, fields: Fields) -> None:
    head, length = json.JSONDecoder().raw_decode(text)
    assert head["token"] == plan.token
    assert head["force"] == force_of(fields), (head["force"], force_of(fields))
    assert text[length:] == text_of(plan.token, plan.order["size"])
