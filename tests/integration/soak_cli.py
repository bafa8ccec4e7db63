"""
A CLI that stays for many turns, for the soak in soak.py.

It extends the one of the storm by what Claude Code 2.1.197 does between and beside turns: a queue
of messages, settings that change from turn to turn, figures that add up over the process, tasks in
the background after which it begins a turn by itself, and local commands.

Every answer begins with a JSON object that tells what a client cannot see otherwise: the tokens of
all messages that this process knows of its session, the settings in force, and how many turns it
has had.  What it knows it has read when it started, as the real one has.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from tests.integration import storm_cli
from tests.integration.storm_cli import Cli, Order, Session, open_session, text_of

__all__ = ["COMMAND", "INSTRUCTIONS", "OWN_COST", "api_ms_of", "cost_of", "main", "tokens_of"]

COMMAND = "/cost "
"""What a prompt begins with that the CLI takes for a command of its own."""

INSTRUCTIONS = "CLAUDE.md"
"""The file in its directory that it reads when it starts, and tells of."""

_UNASKED = "Nobody has asked for this."
_OWN_TOKENS = 1000

OWN_COST = 7.5
"""What a turn costs that it begins by itself, in USD: it would show in any other."""


def _number(token: str) -> int:
    return int(token.strip("abcdefghijklmnopqrstuvwxyz"))


def cost_of(token: str) -> float:
    """What the turn with this token costs, in USD."""
    return (_number(token) % 97 + 1) * 0.000123


def api_ms_of(token: str) -> int:
    """How long it waits for the API, by its own account."""
    return _number(token) % 40 + 1


def tokens_of(token: str) -> tuple[int, int]:
    """How much it reads and writes."""
    return _number(token) % 53 + 3, _number(token) % 11 + 1


class InterruptedTurnError(Exception):
    """The turn is to end now."""


class LiveCli(Cli):
    """One process."""

    def __init__(self, session: Session, options: dict[str, str], words: list[str]) -> None:
        super().__init__(session, options)
        servers: list[str] = []
        if "--mcp-config" in options:
            with open(options["--mcp-config"], "rb") as file:  # noqa: PTH123 - pathlib is slow to import
                servers = list(json.load(file)["mcpServers"])
        self.skips = "--dangerously-skip-permissions" in options
        self.force: dict[str, Any] = {
            "model": options.get("--model"),
            "denied": [w.partition("=")[2] for w in words if w.startswith("--disallowedTools=")],
            "most_turns": options.get("--max-turns"),
            "most_tokens": os.environ.get("CLAUDE_CODE_MAX_OUTPUT_TOKENS"),
            "servers": servers,
            "place": os.path.basename(os.getcwd()),  # noqa: PTH109, PTH119 - as above
            "mode": "bypassPermissions" if self.skips else "default",
            "effort": None,
            "allowed": [],
            "system": None,
            "appended": None,
        }
        self.read = ""
        if os.path.exists(INSTRUCTIONS):  # noqa: PTH110 - as above
            with open(INSTRUCTIONS, encoding="ascii") as file:  # noqa: PTH123 - as above
                self.read = file.read()
        self.turns = 0
        self.messages: list[tuple[str, Order]] = []
        self.tasks: list[tuple[float, str, bool]] = []
        self.cost = 0.0
        self.api_ms = 0
        self.models: dict[str, dict[str, Any]] = {}
        self._initialized = self._running = self._replayed = self._is_command = False
        self._uuid = ""

    def run(self) -> None:
        while True:
            now = time.monotonic()
            self.tasks.sort()
            if self.tasks and self.tasks[0][0] <= now:
                self._turn_of_its_own(*self.tasks.pop(0)[1:])
            elif self.messages:
                self._turn(*self.messages.pop(0))
            else:
                line = self.input.line(self.tasks[0][0] - now if self.tasks else None)
                if line is not None:
                    self._control(json.loads(line))

    def _turn(self, uuid: str, order: Order) -> None:
        self.order, self._uuid, self._replayed = order, uuid, False
        self._is_command = order.get("command", False)
        self.turns += 1
        self._running = True
        try:
            _BEHAVIOURS[order["do"]](self)
        except InterruptedTurnError:
            self._replay()
            note = {"type": "text", "text": "[Request interrupted by user]"}
            self.event(type="user", message={"role": "user", "content": [note]})
            self.result("", "error_during_execution", is_error=True)
        self._running = False
        self.order = {}
        self.flush()

    def _turn_of_its_own(self, task: str, announced: bool) -> None:
        if announced:
            self.event(type="system", subtype="task_updated", task_id=task)
            self.nap(0.005)
            self.event(type="system", subtype="task_notification", task_id=task, status="completed")
            self.nap(0.002)
        self._init()
        self.nap(0.02)
        content = [{"type": "text", "text": _UNASKED}]
        self._stream("message_start", message={"id": f"msg_{task}", "role": "assistant"})
        self._stream("content_block_delta", index=0, delta={"type": "text_delta", "text": _UNASKED})
        self.nap(0.01)
        self._assistant(content)
        self._spend(OWN_COST, _OWN_TOKENS, _OWN_TOKENS, _OWN_TOKENS)
        self._result_of(_UNASKED, {"input_tokens": 1, "output_tokens": 1}, 1)

    # What it says.

    def _init(self) -> None:
        self.event(
            type="system",
            subtype="init",
            pid=os.getpid(),
            cwd=os.getcwd(),  # noqa: PTH109 - as above
            permissionMode=self.force["mode"],
            model=self.force["model"] or "claude-usual",
        )
        self.flush()

    def _stream(self, kind: str, **fields: Any) -> None:
        self.event(type="stream_event", event={"type": kind, **fields}, parent_tool_use_id=None)

    def _assistant(self, content: list[Any]) -> None:
        message = {"id": f"msg_{self.order.get('token')}", "role": "assistant", "content": content}
        self.event(type="assistant", message=message, parent_tool_use_id=None)

    def begin(self) -> None:
        if not self.session.exists():
            self.session.save()  # what has begun can be resumed
        self._init()
        if not self._is_command:
            self.session.take(self.order["token"])
        self._stream("message_start", message={"id": f"msg_{self.order['token']}"})
        block = {"type": "text", "text": ""}
        self._stream("content_block_start", index=0, content_block=block)

    def text(self) -> str:
        token = self.order["token"]
        told = {
            "token": token,
            "told": self.session.told,
            "force": self.force,
            "read": self.read,
            "turn": self.turns,
        }
        return json.dumps(told) + text_of(token, self.order["size"])

    def partials(self, between: Any = lambda _: None) -> None:
        text, piece = self.text(), self.order["piece"]
        for number, start in enumerate(range(0, len(text), piece)):
            delta = {"type": "text_delta", "text": text[start : start + piece]}
            self._stream("content_block_delta", index=0, delta=delta)
            between(number)

    def conclude(self) -> None:
        self._replay()
        self._assistant([{"type": "text", "text": self.text()}])
        self._stream("content_block_stop", index=0)
        self._stream("message_delta", delta={"stop_reason": "end_turn"})
        self._stream("message_stop")
        self.result(self.text())

    def _replay(self) -> None:
        if not (self._replayed or self._is_command):
            self._replayed = True
            message = {"role": "user", "content": "again"}
            self.event(type="user", message=message, uuid=self._uuid, isReplay=True)

    def result(self, text: str, subtype: str = "success", *, is_error: bool = False) -> None:
        self._replay()  # at the latest
        token = self.order["token"]
        spent = not self._is_command and (not is_error or subtype == "error_max_turns")
        taken, made = tokens_of(token) if spent else (0, 0)
        if spent:
            self._spend(cost_of(token), api_ms_of(token), taken, made)
        usage = {"input_tokens": taken, "output_tokens": made}
        turns = 0 if self._is_command else 1
        self._result_of(text, usage, turns, subtype=subtype, is_error=is_error)

    def _spend(self, cost: float, api_ms: int, taken: int, made: int) -> None:
        self.cost += cost
        self.api_ms += api_ms
        model = self.force["model"] or "claude-usual"
        used = self.models.setdefault(
            model, {"inputTokens": 0, "outputTokens": 0, "costUSD": 0.0, "contextWindow": 200_000}
        )
        used["inputTokens"] += taken
        used["outputTokens"] += made
        used["costUSD"] += cost

    def _result_of(
        self,
        text: str,
        usage: dict[str, int],
        turns: int,
        *,
        subtype: str = "success",
        is_error: bool = False,
    ) -> None:
        self.event(
            type="result",
            subtype=subtype,
            is_error=is_error,
            duration_api_ms=self.api_ms,
            num_turns=turns,
            **(
                {"errors": ["stopped"]} if subtype == "error_during_execution" else {"result": text}
            ),
            total_cost_usd=self.cost,
            usage=usage,
            modelUsage=self.models,
        )
        self.flush()

    # What it hears.

    def _control(self, message: dict[str, Any]) -> None:
        if message["type"] == "user":
            self.messages.append((message["uuid"], _order_in(message["message"]["content"])))
        elif message["type"] == "control_request":
            self._answer(message["request_id"], message["request"])
            if message["request"]["subtype"] == "interrupt" and self._running:
                raise InterruptedTurnError

    def _answer(self, request_id: str, request: dict[str, Any]) -> None:
        response: dict[str, Any] = {"subtype": "success", "request_id": request_id}
        subtype = request["subtype"]
        before = self.force["mode"]
        if subtype == "set_permission_mode" and request["mode"] == "bypassPermissions":
            response |= {"subtype": "error", "error": "not launched with it"}
        elif subtype == "set_permission_mode":
            self.force["mode"] = request["mode"]
            response["response"] = {"mode": request["mode"]}
        elif subtype == "apply_flag_settings":
            settings = request["settings"]
            self.force["allowed"] = settings["permissions"]["allow"]
            self.force["effort"] = settings["effortLevel"]
        elif subtype == "initialize" and not self._initialized:
            self._initialized = True
            self.force["system"] = request.get("systemPrompt")
            self.force["appended"] = request.get("appendSystemPrompt")
        if subtype == "initialize":
            models = [{"value": "claude-usual", "resolvedModel": "claude-usual"}]
            response["response"] = {"commands": [], "models": models}
        self.event(type="control_response", response=response)
        if self.force["mode"] != before:
            mode = self.force["mode"]
            self.event(type="system", subtype="status", status=None, permissionMode=mode)
        self.flush()


def _order_in(content: Any) -> Order:
    """The order that a message holds."""
    text: str = content if isinstance(content, str) else content[0]["text"]
    order: Order = json.loads(text.removeprefix(COMMAND))
    return {**order, "command": text.startswith(COMMAND)}


# How to behave, beside what the storm's CLI knows.


def wait(cli: LiveCli) -> None:
    """It says something, leaves a mark that it has, and waits to be stopped."""
    cli.begin()
    cli.partials()
    cli.flush()
    with open(os.path.join(_folder(), f"begun.{cli.order['token']}"), "w"):  # noqa: PTH118, PTH123 - as above
        pass
    cli.nap(3600)


def background(cli: LiveCli) -> None:
    """A task goes on after its result, and then it tells of it unasked."""
    cli.begin()
    cli.partials()
    task = f"task{cli.order['token']}"
    cli.event(type="system", subtype="task_started", task_id=task)
    if cli.order["orphan"]:
        os.posix_spawnp("sleep", ["sleep", "600"], os.environ, setsid=True)
    cli.tasks.append((time.monotonic() + cli.order["after"], task, True))
    cli.conclude()


def alarm(cli: LiveCli) -> None:
    """It is to begin a turn by itself, and nothing tells of it before."""
    cli.begin()
    cli.partials()
    cli.tasks.append((time.monotonic() + cli.order["after"], cli.order["token"], False))
    call = {"type": "tool_use", "id": "tool", "name": "CronCreate", "input": {}}
    cli.event(type="assistant", message={"id": "msg_tool", "role": "assistant", "content": [call]})
    cli.conclude()


def limit(cli: LiveCli) -> None:
    """It ends at a limit, and stays."""
    cli.begin()
    cli.partials()
    cli.result("", "error_max_turns", is_error=True)


_BEHAVIOURS: dict[str, Any] = {
    **{name: getattr(storm_cli, name) for name in ("early", "good", "overloaded", "slow")},
    "command": storm_cli.good,
    **{one.__name__: one for one in (alarm, background, limit, wait)},
}


def _folder() -> str:
    return os.path.join(os.environ["CLAUDE_CONFIG_DIR"], "sessions")  # noqa: PTH118 - as above


def _read_transcript(name: str, folder: str) -> None:
    """Make a session of what somebody else wrote down as the CLI's own transcript, if there is."""
    projects = os.path.join(os.environ["CLAUDE_CONFIG_DIR"], "projects")  # noqa: PTH118 - as above
    for project in os.listdir(projects) if os.path.isdir(projects) else ():  # noqa: PTH208, PTH112 - as above
        path = os.path.join(projects, project, f"{name}.jsonl")  # noqa: PTH118 - as above
        if os.path.exists(path):  # noqa: PTH110 - as above
            with open(path, encoding="utf-8") as file:  # noqa: PTH123 - as above
                lines = [json.loads(line) for line in file]
            session = Session(name, folder)
            for line in lines:
                if line["type"] == "user":
                    session.take(_order_in(line["message"]["content"])["token"])


def main(kind: type[LiveCli] = LiveCli) -> None:
    """Be the CLI, of this kind."""
    options = dict(word.partition("=")[::2] for word in sys.argv[1:])
    if "--version" in options:
        print("2.1.197 (a soak)")  # noqa: T201 - it is a program
        return
    folder = _folder()
    os.makedirs(folder, exist_ok=True)  # noqa: PTH103 - as above
    source = options.get("--resume", "")
    if source and not Session(source, folder).exists():
        _read_transcript(source, folder)
    kind(open_session(options, folder), options, sys.argv[1:]).run()
