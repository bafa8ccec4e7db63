"""
The least that a server can do, for `many_streams`: pipes handed on to sockets.

    python -m benchmarks.relay CHILD AT_ONCE

For each connection it starts a child and passes on what that says, byte for byte and at once, until
both are at their end.  No HTTP, no JSON, no limits: what it takes is what pipes, sockets and the
machine take.  Prints its port.
"""

from __future__ import annotations

import gc
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections import deque
from dataclasses import dataclass
from typing import IO
from uuid import uuid4

from benchmarks.pacer import OVER
from claude_proxy.cli.command import launch_prefix

__all__ = ["Child", "start_child"]

_SIZE = 1 << 16


@dataclass(frozen=True)
class Child:
    """A child and its pipes."""

    process: subprocess.Popen[bytes]
    stdin: IO[bytes]
    stdout: IO[bytes]

    def close(self) -> None:
        """Let it go."""
        self.stdin.close()
        self.stdout.close()


def start_child(child: str, folder: str) -> Child:
    """Start one as the server does, with its message."""
    process = subprocess.Popen(
        [*launch_prefix(folder), child, f"--session-id={uuid4()}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b'{"type":"user"}\n')
    return Child(process, process.stdin, process.stdout)


@dataclass
class _Passage:
    """One child and its client."""

    child: Child
    connection: socket.socket
    heard: bool = False


def _relay(listening: socket.socket, child: str, folder: str, at_once: int) -> None:
    waiting: deque[socket.socket] = deque()
    passages: dict[int, _Passage] = {}
    unheard = 0
    epoll = select.epoll()
    door = listening.fileno()
    epoll.register(door, select.EPOLLIN)
    while True:
        may_start = bool(waiting) and unheard < at_once
        if may_start:
            connection = waiting.popleft()
            started = start_child(child, folder)
            passages[started.stdout.fileno()] = _Passage(started, connection)
            epoll.register(started.stdout, select.EPOLLIN)
            unheard += 1
        for descriptor, _ in epoll.poll(0 if may_start else -1):
            if descriptor == door:
                connection, _ = listening.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                waiting.append(connection)
                continue
            data, passage = os.read(descriptor, _SIZE), passages[descriptor]
            passage.connection.sendall(data)
            if not passage.heard:
                passage.heard = True
                unheard -= 1
            if not data or data.endswith(OVER):
                epoll.unregister(descriptor)
                passage.child.close()
                passage.connection.close()
                del passages[descriptor]


def main() -> None:
    """Be the relay, until killed."""
    child, at_once = sys.argv[1:]
    gc.disable()
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(listening.getsockname()[1], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        _relay(listening, child, folder, int(at_once))


if __name__ == "__main__":
    main()
