"""The whole server in the tests' own reactor, on a real socket, with a CLI that a test writes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.threads import deferToThread

from claude_proxy.interfaces import IRunningTurn, ITurnObserver
from claude_proxy.sessions.executor import Executor
from claude_proxy.sessions.mcp import McpServers
from claude_proxy.sessions.turns import TurnRequest
from claude_proxy.settings import load_settings
from claude_proxy.tap import _Builder
from tests.e2e.processes import is_alive
from tests.secrecy import SECRETS

__all__ = ["Running", "in_thread", "is_alive", "pause", "serving", "turn", "until"]

_T = TypeVar("_T")

reactor: Any = _reactor

PROMPT = "go, and let no log have these words"
"""What is said where it does not matter."""

_TICK_SECONDS = 0.02

_PRELUDE = '''
import hashlib, json, os, signal, subprocess, sys, time

if "--version" in sys.argv:
    print("2.1.197 (Claude Code)")
    sys.exit(0)

FOLDER = {folder!r}
OPTIONS = dict(word.partition("=")[::2] for word in sys.argv)
SESSION = OPTIONS.get("--session-id") or OPTIONS.get("--resume")


def tell(name, text):
    """Let the test know something."""
    fresh = os.path.join(FOLDER, "%s.%d.new" % (name, os.getpid()))
    with open(fresh, "w") as file:
        file.write(str(text))
    os.replace(fresh, os.path.join(FOLDER, name))


def append(name, text):
    with open(os.path.join(FOLDER, name), "a") as file:
        file.write(text + "\\n")


def line(**event):
    return json.dumps({{"session_id": SESSION, **event}}).encode() + b"\\n"


def write(data):
    left = memoryview(data)
    while left:
        left = left[os.write(1, left):]


def message():
    """Wait for the user's message; its text."""
    for text in sys.stdin:
        event = json.loads(text)
        if event["type"] == "user":
            return event["message"]["content"]
    sys.exit(0)


def leave():
    """Wait for the end of the input."""
    for _ in sys.stdin:
        pass
    sys.exit(0)


INIT = line(type="system", subtype="init")
RESULT = line(type="result", subtype="success", is_error=False, result="done")
tell("pid", os.getpid())
'''


def write_cli(folder: Path, body: str) -> str:
    """
    Write a program that plays the CLI, and return how it is called.

    @param body: what it does after `--version` was answered; see the prelude for its words.
    """
    program = folder / "cli.py"
    program.write_text(_PRELUDE.format(folder=str(folder)) + body)
    return shlex.join([sys.executable, "-I", "-S", str(program)])


class Running:
    """
    A server that listens.

    @ivar port: where.
    @ivar executor: what runs its turns.
    """

    def __init__(self, folder: Path, port: int, executor: Executor) -> None:
        self.folder = folder
        self.port = port
        self.executor = executor

    def told(self, name: str) -> str:
        """What the program has told the test by this name; empty if it has not."""
        path = self.folder / name
        return path.read_text().strip() if path.exists() else ""

    @property
    def is_idle(self) -> bool:
        """Whether no turn runs and no session is held."""
        return self.executor.running == self.executor.context.leases.held == 0

    def connect(self, *, receive_buffer: int | None = None) -> socket.socket:
        """
        A blocking socket to it; the kernel accepts without the server's help.

        @param receive_buffer: in bytes, to make a client that cannot take much at once.
        """
        client = socket.socket()
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(20)
        client.connect(("127.0.0.1", self.port))
        return client


@asynccontextmanager
async def serving(folder: Path, body: str, **variables: str) -> AsyncIterator[Running]:
    """
    Run a server until the block is left.

    @param body: what its CLI does, see `write_cli`.
    @param variables: settings, by their environment variables.
    """
    environ = {
        "PATH": os.environ["PATH"],
        "SPARE_PROCESSES": "0",
        "LIVE_SESSIONS": "0",  # what is left behind shows when no process stays
        "PORT": "0",
        "HOST": "127.0.0.1",
        "CLAUDE_CLI": write_cli(folder, body),
        "WORKSPACE_BASE_PATH": str(folder / "base"),
        "STATE_PATH": str(folder / "state"),
        "DRAIN_TIMEOUT_MS": "0",
        "PROCESS_KILL_TIMEOUT_MS": "500",
        **variables,
    }
    settings = load_settings({}, environ, {}, folder)
    SECRETS.learn_environment(environ, folder)
    mcp = McpServers(settings.mcp_config_path, named=False)
    endpoint = serverFromString(reactor, settings.listen)
    service = _Builder(reactor, settings, mcp, demo=False).build(endpoint, None)
    _learn_prompts(service._executor)
    hang_up = signal.getsignal(signal.SIGHUP)
    service.privilegedStartService()
    service.startService()
    try:
        port: Any = service._port
        yield Running(folder, port.getHost().port, service._executor)
    finally:
        await service.stopService()
        signal.signal(signal.SIGHUP, hang_up)


def _learn_prompts(executor: Executor) -> None:
    """Keep in mind what no log may show of the turns that it runs."""
    run = executor.run

    def run_and_learn(request: TurnRequest, observer: ITurnObserver) -> IRunningTurn:
        for block in request.blocks:
            SECRETS.learn_prompt(str(block.get("text", "")))
        return run(request, observer)

    executor.run = run_and_learn  # type: ignore[method-assign]  # a test's own one


async def until(condition: Callable[[], _T], what: str, limit: float = 10.0) -> _T:
    """
    Wait for something that only polling can tell, while the server goes on; return it.

    @param limit: in seconds.
    @raise AssertionError: it did not happen in time.
    """
    deadline = time.monotonic() + limit
    while not (result := condition()):
        assert time.monotonic() < deadline, f"Not within {limit} s: {what}"
        await pause(_TICK_SECONDS)
    return result


async def pause(seconds: float) -> None:
    """Let the server go on for a while."""
    over: Deferred[None] = Deferred()
    reactor.callLater(seconds, over.callback, None)
    await over


async def in_thread(function: Callable[..., _T], *args: Any) -> _T:
    """Do what blocks, such as reading from a socket."""
    result: _T = await deferToThread(function, *args)
    return result


def turn(
    session: str | None = None,
    *,
    key: str | None = None,
    version: str = "1.1",
    prompt: str = PROMPT,
) -> bytes:
    """The bytes of a request for a turn."""
    fields = {"prompt": prompt, "session-id": session}
    SECRETS.learn_prompt(prompt)
    body = json.dumps({name: value for name, value in fields.items() if value}).encode()
    head = [
        f"POST /api/claude HTTP/{version}",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *([f"X-Api-Key: {key}"] if key else []),
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body
