"""A server whose CLI misbehaves, and the proof that nothing is left of a bad day."""

from __future__ import annotations

import gc
import json
import os
import shlex
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.logger import ILogObserver, LogEvent, LogLevel, globalLogPublisher
from zope.interface import provider

from claude_proxy.cli import process
from claude_proxy.cli.command import MARKER
from tests.e2e.processes import children_of, processes_with_env
from tests.integration.server import Running, in_thread, serving, until
from tests.support import Answer, parse_answers

__all__ = [
    "Step",
    "ask",
    "encode_turn",
    "events_of",
    "misbehaving",
    "nothing_left",
    "quick_ladder",
    "read_all",
]

Step = list[Any]
"""A word of `bad_cli.py` and what belongs to it."""

_PROGRAM = Path(__file__).with_name("bad_cli.py")
_TOOL = "mcp__tools__look"
_STEADY_LOOKS = 3

reactor: Any = _reactor


def misbehaving(folder: Path, **variables: str) -> AbstractAsyncContextManager[Running]:
    """A server with `bad_cli.py`, impatient, and with an MCP server for `_TOOL`."""
    config = folder / "mcp.json"
    config.write_text(json.dumps({"mcpServers": {"tools": {"command": "true"}}}))
    defaults = {
        "CLAUDE_CLI": shlex.join([sys.executable, "-I", "-S", str(_PROGRAM), str(folder)]),
        "MCP_CONFIG_PATH": str(config),
        "PROCESS_KILL_TIMEOUT_MS": "200",
    }
    return serving(folder, "", **{**defaults, **variables})


@contextmanager
def quick_ladder(seconds: float = 0.2) -> Iterator[None]:
    """Make the polite rungs of the kill ladder shorter than their second."""
    usual, process.POLITE_WAIT = process.POLITE_WAIT, seconds
    try:
        yield
    finally:
        process.POLITE_WAIT = usual


def encode_turn(
    script: list[Step] | str,
    *,
    version: str = "1.1",
    **fields: Any,
) -> bytes:
    """The bytes of a request for a turn; it also asks for a tool, so that there is a file."""
    prompt = script if isinstance(script, str) else json.dumps(script)
    named = {name.replace("_", "-"): value for name, value in fields.items() if value is not None}
    body = json.dumps({"prompt": prompt, "mcp-allowed-tools": [_TOOL], **named}).encode()
    head = (
        f"POST /api/claude HTTP/{version}\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def read_all(client: socket.socket) -> bytes:
    """Everything up to the end of the connection."""
    received = []
    while data := client.recv(65536):
        received.append(data)
    return b"".join(received)


async def ask(server: Running, script: list[Step] | str, **fields: Any) -> Answer:
    """One turn on a connection of its own."""

    def exchange(client: socket.socket) -> bytes:
        # Without keep-alive the end of the connection is the end of the answer.
        client.sendall(encode_turn(script, version="1.0", **fields))
        return read_all(client)

    with server.connect() as client:
        [answer] = parse_answers(await in_thread(exchange, client), closed=True)
    assert answer.complete
    return answer


def events_of(answer: Answer) -> list[dict[str, Any]]:
    """The events of a stream."""
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream"
    *frames, rest = answer.body.split(b"\n\n")
    assert rest == b""
    return [json.loads(frame.removeprefix(b"data: ")) for frame in frames]


def _possessions(server: Running) -> dict[str, list[Any]]:
    """What a server has at the moment, by kind."""
    context = server.executor.context
    descriptors = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one by which this very list is read
            descriptors.append(str(link.readlink()))
    return {
        "turns": [None] * server.executor.running,
        "leases": [None] * context.leases.held,
        "waiting": [None] * context.leases.waiting,
        "files": [path.name for path in context.settings.run_directory.iterdir()],
        "marked": processes_with_env(f"{MARKER}={context.settings.marker}."),
        "children": children_of(os.getpid()),
        "timers": reactor.getDelayedCalls(),
        "descriptors": descriptors,
    }


_NONE_AT_REST = ("turns", "leases", "waiting", "files", "marked", "children")


async def _at_rest(server: Running) -> dict[str, list[Any]]:
    """What a server has when nothing happens: what was the same for a moment."""
    seen: list[dict[str, list[Any]]] = []

    def is_steady() -> bool:
        seen.append(_possessions(server))
        counts = [[len(things) for things in has.values()] for has in seen[-_STEADY_LOOKS:]]
        busy = any(seen[-1][kind] for kind in _NONE_AT_REST)
        return not busy and counts == [counts[0]] * _STEADY_LOOKS

    await until(is_steady, "the server is at rest")
    return seen[-1]


@asynccontextmanager
async def nothing_left(server: Running, limit: float = 10.0) -> AsyncIterator[None]:
    """
    Check that what happens in the block leaves nothing behind.

    That is no turn, lease, file, process (running or not reaped), timer or descriptor, and no
    error in the log that nobody handled.

    @param limit: in seconds, from the end of the block until all is gone.
    """
    await ask(server, "warm up")  # what is made once for all is made by now
    before = await _at_rest(server)
    faults: list[LogEvent] = []

    @provider(ILogObserver)
    def note_fault(event: LogEvent) -> None:
        if "log_failure" in event or event["log_level"] is LogLevel.critical:
            faults.append(event)

    globalLogPublisher.addObserver(note_fault)
    try:
        yield
        left: dict[str, list[Any]] = {}

        def all_gone() -> bool:
            left.clear()
            for kind, things in _possessions(server).items():
                if len(things) > len(before[kind]):
                    left[kind] = [thing for thing in things if thing not in before[kind]]
            return not left

        try:
            await until(all_gone, "all is gone", limit)
        except AssertionError:
            raise AssertionError(f"Left after {limit:g} seconds: {left}") from None
        gc.collect()  # Deferreds tell of failures that nobody took when they are collected
        assert not faults, f"Logged: {faults}"
    finally:
        globalLogPublisher.removeObserver(note_fault)
