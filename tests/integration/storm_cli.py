"""
A CLI that misbehaves on order, for the storm in test_storm.py.

It speaks what the proxy needs of Claude Code 2.1 and remembers its sessions, but the prompt is a
JSON object that says how to behave: `do` names a function of this module, the rest are its
parameters.  It imports little, because one starts for each turn.

Its answers can be checked: `text_of` makes them from the turn's token, and every result tells the
tokens of all messages that its session has taken so far.  Two processes in one session at the same
time leave a note in the file `collisions` beside the sessions.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

__all__ = ["GARBAGE", "GONE_CODE", "LAST_WORDS", "WEATHER", "Order", "text_of"]

Order = dict[str, Any]

LAST_WORDS = "storm: the mast is broken"
"""The last line on stderr of a process that dies with words."""

GONE_CODE = 3
"""The exit code of a process that is started with the model `gone`."""

WEATHER = {"type": "weather", "wind": "north"}
"""An event of a type that nobody knows: it is passed on."""

GARBAGE = (
    b"not an event",
    b"\xff\xfe\x80 no text",
    b"[1, 2]",
    b"null",
    b'{"type": "assistant", "message": ',
    b"",
    b"\x1b[31mdata: {}\x1b[0m",
    b"{}}",
)
"""Lines that are no events: they are left out."""

_BANNER = "2.1.197 (a storm)"
_FLUSH_BYTES = 30_000
_DRIP_SECONDS = 0.02


def text_of(token: str, size: int) -> str:
    """The answer of so many characters: no two turns, and no two places in it, are alike."""
    return " ".join(f"{token}.{number}é𝄞" for number in range(size // 6 + 1))[:size]


class Session:
    """A conversation on disk: the tokens of the messages that it has taken, one a line."""

    def __init__(self, name: str, folder: str) -> None:
        self.name = name
        self.folder = folder
        self.path = os.path.join(folder, name)  # noqa: PTH118 - pathlib takes long to import
        self.told: list[str] = []

    def exists(self) -> bool:
        return os.path.exists(self.path)  # noqa: PTH110 - as above

    def read(self) -> None:
        with open(self.path, encoding="ascii") as file:  # noqa: PTH123 - as above
            self.told = file.read().split()

    def hold(self) -> None:
        """Keep others out until this process ends; note it down if somebody is in."""
        with open(self.path + ".lock", "wb") as lock:  # noqa: PTH123 - as above
            held = os.dup(lock.fileno())  # not inherited by a child that becomes a program
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            collisions = os.path.join(self.folder, "collisions")  # noqa: PTH118 - as above
            with open(collisions, "a", encoding="ascii") as file:  # noqa: PTH123 - as above
                file.write(f"process {os.getpid()} in {self.name}\n")

    def take(self, token: str) -> None:
        """Remember a message; a process that is killed here has done it or not, never half."""
        self.told.append(token)
        self.save()

    def save(self) -> None:
        new = f"{self.path}.{os.getpid()}"
        with open(new, "w", encoding="ascii") as file:  # noqa: PTH123 - as above
            file.write("\n".join(self.told))
        os.replace(new, self.path)  # noqa: PTH105 - as above


class Input:
    """Standard input, watched while waiting."""

    def __init__(self) -> None:
        self.stubborn = False
        self.answered = False
        self._rest = b""
        self._ended = False

    def line(self, seconds: float | None = None) -> bytes | None:
        """The next line; None if there is none in time.  At the end of it all, the process ends."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if self._ended:
                time.sleep(3600 if left is None else left)
                return None
            if not select.select([0], [], [], left)[0]:
                return None
            data = os.read(0, 1 << 16)
            self._rest += data
            if not data:
                self._ended = True
                if not self.stubborn:
                    sys.exit(0)
        line, _, self._rest = self._rest.partition(b"\n")
        return line


class Cli:
    """One process."""

    def __init__(self, session: Session, options: dict[str, str]) -> None:
        self.session = session
        self.options = options
        self.input = Input()
        self.order: Order = {}
        self._out = bytearray()

    def run(self) -> None:
        while not self.order:
            line = self.input.line()
            message = json.loads(line or b"{}")
            if message["type"] == "user":
                self.order = json.loads(message["message"]["content"])
            else:
                self._control(message)
        if self.order.get("stubborn"):
            self.be_stubborn()
        _BEHAVIOURS[self.order["do"]](self)
        self.flush()
        while True:  # its end is the end of its input
            self.nap(3600)

    # What it says.

    def event(self, **fields: Any) -> None:
        event = {**fields, "session_id": self.session.name}
        # No escapes: a character is cut in two wherever a read ends.
        self.raw(json.dumps(event, ensure_ascii=False).encode())

    def raw(self, line: bytes) -> None:
        self._out += line + b"\n"
        if len(self._out) > _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write it all, cut into pieces of `cut` bytes if so ordered."""
        data, self._out = bytes(self._out), bytearray()
        cut = self.order.get("cut", len(data)) or 1
        for start in range(0, len(data), cut):
            left = memoryview(data)[start : start + cut]
            while left:
                left = left[os.write(1, left) :]

    def begin(self) -> None:
        """Take the message, and say so."""
        self.session.take(self.order["token"])
        self.event(type="system", subtype="init", pid=os.getpid())
        self.flush()

    def text(self) -> str:
        return text_of(self.order["token"], self.order["size"])

    def partials(self, between: Callable[[int], object] = lambda _: None) -> None:
        text, piece = self.text(), self.order["piece"]
        for number, start in enumerate(range(0, len(text), piece)):
            delta = {"type": "text_delta", "text": text[start : start + piece]}
            self.event(type="stream_event", event={"type": "content_block_delta", "delta": delta})
            between(number)

    def result(self, text: str, subtype: str = "success", *, is_error: bool = False) -> None:
        servers: list[str] = []
        if "--mcp-config" in self.options:
            with open(self.options["--mcp-config"], "rb") as file:  # noqa: PTH123 - as above
                servers = list(json.load(file)["mcpServers"])
        self.event(
            type="result",
            subtype=subtype,
            is_error=is_error,
            result=text,
            told=self.session.told,
            servers=servers,
        )
        self.flush()

    def conclude(self) -> None:
        content = [{"type": "text", "text": self.text()}]
        self.event(type="assistant", message={"role": "assistant", "content": content})
        self.result(self.text())

    # What it hears.

    def nap(self, seconds: float) -> None:
        """Wait, and listen meanwhile; an interrupt ends the turn, as the real CLI does."""
        self.flush()
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            line = self.input.line(left)
            if line is not None:
                self._control(json.loads(line))

    def _control(self, message: dict[str, Any]) -> None:
        if message["type"] == "control_response":
            self.input.answered = True
        if message["type"] != "control_request" or self.input.stubborn:
            return
        response = {"subtype": "success", "request_id": message["request_id"]}
        self.event(type="control_response", response=response)
        self.flush()
        if message["request"]["subtype"] == "interrupt":
            self.result("", "error_during_execution", is_error=True)
            while True:
                self.input.line()

    def be_stubborn(self) -> None:
        self.input.stubborn = True
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def die(self) -> NoReturn:
        if self.order.get("words"):
            complain(f"a gust\n\x1b[1m{LAST_WORDS}\x1b[0m\n\n")
        os._exit(self.order["code"])


def complain(text: str) -> None:
    """Write to stderr."""
    left = memoryview(text.encode())
    while left:
        left = left[os.write(2, left) :]


# How to behave.


def good(cli: Cli) -> None:
    cli.begin()
    cli.partials()
    cli.conclude()


def slow(cli: Cli) -> None:
    cli.begin()
    cli.partials(lambda number: cli.nap(cli.order["pause"]) if number % 5 == 0 else None)
    cli.conclude()


def garbage(cli: Cli) -> None:
    cli.begin()
    cli.partials(lambda number: cli.raw(GARBAGE[number % len(GARBAGE)]))
    cli.event(**WEATHER)
    cli.conclude()


def noisy(cli: Cli) -> None:
    cli.begin()
    for _ in range(20):
        complain("thunder " * 8_000)
    cli.partials(lambda _: complain("lightning\n"))
    cli.conclude()


def asks(cli: Cli) -> None:
    """It asks for a permission and waits for the answer, for ever if need be."""
    cli.begin()
    request = {"subtype": "can_use_tool", "tool_name": "Bash", "input": {}}
    cli.event(type="control_request", request_id="ask", request=request)
    while not cli.input.answered:
        cli.nap(0.05)
    cli.partials()
    cli.conclude()


def twice(cli: Cli) -> None:
    """After its result it goes on as if nothing had been."""
    good(cli)
    cli.event(type="assistant", message={"content": [{"type": "text", "text": "unasked"}]})
    cli.result("unasked")


def orphan(cli: Cli) -> None:
    """It leaves a child in a session of its own, which holds its pipes."""
    argv = ["sleep", "600"]
    os.posix_spawnp(argv[0], argv, os.environ, setsid=True)
    good(cli)


def linger(cli: Cli) -> None:
    good(cli)
    cli.be_stubborn()


def flood(cli: Cli) -> None:
    """More than the kernel keeps for a client that reads nothing."""
    cli.begin()
    for _ in range(cli.order["blocks"]):
        cli.event(type="assistant", message={"content": [{"type": "text", "text": "~" * 16_000}]})
    cli.conclude()


def overloaded(cli: Cli) -> None:
    cli.begin()
    cli.partials()
    cli.result("API Error: 529 Overloaded", is_error=True)


def early(cli: Cli) -> None:
    cli.die()


def midway(cli: Cli) -> None:
    cli.begin()
    cli.partials()
    cli.flush()
    cli.die()


def silent(cli: Cli) -> None:
    """Also for those that are waiting to be killed."""
    cli.begin()
    cli.partials()


def mute(cli: Cli) -> None:
    cli.session.take(cli.order["token"])


def endless(cli: Cli) -> None:
    cli.begin()
    while True:
        cli.event(type="assistant", message={"content": [{"type": "text", "text": "drip"}]})
        cli.nap(_DRIP_SECONDS)


def hang_up(cli: Cli) -> None:
    """It closes its stdout and lives on."""
    cli.begin()
    os.close(1)


_BEHAVIOURS: dict[str, Callable[[Cli], None]] = {
    behaviour.__name__: behaviour
    for behaviour in (
        asks,
        early,
        endless,
        flood,
        garbage,
        good,
        hang_up,
        linger,
        midway,
        mute,
        noisy,
        orphan,
        overloaded,
        silent,
        slow,
        twice,
    )
}


def open_session(options: dict[str, str], folder: str) -> Session:
    """The session that the options mean; the process ends as the real one does if it cannot."""
    source = options.get("--resume")
    own = options.get("--session-id")
    session = Session(own or source or "", folder)
    session.hold()
    if source is not None:
        conversation = Session(source, folder)
        if not conversation.exists():
            said = f"No conversation found with session ID: {source}"
            lost = {"type": "result", "subtype": "error_during_execution", "is_error": True}
            os.write(1, json.dumps({**lost, "errors": [said]}).encode() + b"\n")
            complain(said + "\n")
            sys.exit(1)
        conversation.read()
        session.told = conversation.told
    elif session.exists():
        complain(f"Error: Session ID {own} is already in use.\n")
        sys.exit(1)
    return session


def main() -> None:
    """Be the CLI."""
    options = dict(word.partition("=")[::2] for word in sys.argv[1:])
    if "--version" in options:
        print(_BANNER)  # noqa: T201 - it is a program
        return
    if options.get("--model") == "gone":
        complain(LAST_WORDS + "\n")
        os._exit(GONE_CODE)
    folder = os.path.join(os.environ["CLAUDE_CONFIG_DIR"], "sessions")  # noqa: PTH118 - as above
    os.makedirs(folder, exist_ok=True)  # noqa: PTH103 - as above
    Cli(open_session(options, folder), options).run()
