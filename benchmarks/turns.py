"""
One turn and the time to its first text: through the server, and with the same process by hand.

By hand means a minimal script: one write, blocking reads, and nothing done but to look for the
first text and the result.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self
from uuid import uuid4

from benchmarks.harness import connect, elapsed, request_bytes
from claude_proxy.cli.command import launch_prefix
from claude_proxy.cli.control import control_request, user_message

__all__ = ["ByHand", "Client"]

_TEXT = b'"text_delta"'
_RESULT = b'{"type":"result"'
_END = b"\r\n0\r\n\r\n"
_FAILED = (b"HTTP/1.1 4", b"HTTP/1.1 5")
_SESSION = re.compile(rb"\r\nX-Claude-Session-Id: (\S+)\r\n", re.IGNORECASE)


class ByHand:
    """
    A process of the CLI that is driven by hand; a context manager, which ends it.

    @ivar pid: that of the process.
    """

    def __init__(
        self, argv: Sequence[str], folder: str, environment: Mapping[str, str] | None = None
    ) -> None:
        """
        @param argv: the program and its arguments, as the server would start it.
        @param folder: where it works.
        """
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [*launch_prefix(folder), *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
        )
        self.pid = self._process.pid
        self._beginning = control_request("req_1", "initialize")

    def ask(self, prompt: str, answer: str) -> float:
        """
        Seconds to the first text of a turn, which is read to its end; the first turn counts from
        the start of the process.

        @raise SystemExit: the answer is another one.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # The server's first message has this before it, too.
        lines = self._beginning + user_message(prompt, str(uuid4()))
        begin = self.started if self._beginning else time.perf_counter()
        self._beginning = b""
        self._process.stdin.write(lines)
        output, seen, first = self._process.stdout.fileno(), b"", None
        while not (seen.endswith(b"\n") and _last_line(seen).startswith(_RESULT)):
            data = os.read(output, 1 << 16)
            seen += data
            if first is None and _TEXT in seen:
                first = elapsed(begin)
            if not data:
                break
        _check(seen.splitlines(), answer)
        assert first is not None
        return first

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)


class Client:
    """
    A client of the native dialect with one connection; a context manager, which closes it.

    @ivar session: of the last turn.
    """

    def __init__(self, port: int) -> None:
        self.session = ""
        self._connection = connect(port)

    def ask(self, prompt: str, answer: str, session: str | None = None) -> float:
        """
        Seconds from the request to the first text of a turn, which is read to its end.

        @param session: the one to continue; None begins one.
        @raise SystemExit: the answer is another one.
        """
        body = {"prompt": prompt, "include-partial-messages": True, "session-id": session}
        request = request_bytes(body)
        begin = time.perf_counter()
        self._connection.sendall(request)
        seen, first = b"", None
        while not seen.endswith(_END):
            data = self._connection.recv(1 << 16)
            seen += data
            if first is None and _TEXT in seen:
                first = elapsed(begin)
            if not data or seen.startswith(_FAILED):
                break
        head, _, chunks = seen.partition(b"\r\n\r\n")
        if not (head.startswith(b"HTTP/1.1 200 ") and seen.endswith(_END)):
            raise SystemExit(f"This is no whole answer: {seen!r}")
        lines = _dechunked(chunks).splitlines()
        _check([line.removeprefix(b"data: ") for line in lines if line], answer)
        assert first is not None
        found = _SESSION.search(head + b"\r\n")
        assert found is not None
        self.session = found[1].decode()
        return first

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def _last_line(data: bytes) -> bytes:
    return data[data.rfind(b"\n", 0, -1) + 1 :]


def _dechunked(chunks: bytes) -> bytes:
    whole = b""
    while chunks:
        size, _, chunks = chunks.partition(b"\r\n")
        length = int(size, 16) if size else 0
        whole += chunks[:length]
        chunks = chunks[length + 2 :]
    return whole


def _check(lines: Sequence[bytes], answer: str) -> None:
    """Whether a turn told this text and nothing else, in pieces and as its result."""
    events: list[dict[str, Any]] = []
    try:
        events += [json.loads(line) for line in lines]
    except ValueError:
        raise SystemExit(f"This is no answer: {lines!r}") from None
    pieces = [event["event"].get("delta", {}) for event in events if "event" in event]
    text = "".join(piece.get("text", "") for piece in pieces)
    results = [event["result"] for event in events if event["type"] == "result"]
    if text != answer or results != [answer]:
        raise SystemExit(f"The answer is {text!r} and the result {results!r}, not {answer!r}.")
