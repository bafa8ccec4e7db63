"""
What the server itself adds to the time to the first token, with a child that answers at once.

    python -m benchmarks.first_token [PAIRS]

Pairs of one request and one bare start of the same child with the same launcher, interleaved.
Aim: at most 3 ms.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.children import instant
from benchmarks.harness import argument, connect, elapsed, request_bytes, server, spread
from claude_proxy.cli.command import launch_prefix

_END = b"0\r\n\r\n"
_EVENTS = 3


def bare_start(child: Path, folder: str) -> float:
    """Seconds until the first text when the child is started by hand."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*launch_prefix(folder), child], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    seen = b""
    while b"assistant" not in seen:
        seen += os.read(process.stdout.fileno(), 1 << 16)
    seconds = elapsed(begin)
    process.communicate(timeout=10)
    return seconds


def through_server(connection: socket.socket) -> float:
    """Seconds until the first text of an answer; it is read to its end."""
    begin = time.perf_counter()
    connection.sendall(request_bytes({"prompt": "x"}))
    seen, first = b"", None
    while not seen.endswith(_END):
        data = connection.recv(1 << 16)
        seen += data
        if first is None and b"assistant" in seen:
            first = elapsed(begin)
        if not data:
            break
    if first is None or seen.count(b"\ndata: ") != _EVENTS or not seen.endswith(_END):
        raise SystemExit(f"The answer is not whole: {seen!r}")
    return first


def main() -> None:
    """Measure and print."""
    pairs = argument(1, 200)
    with tempfile.TemporaryDirectory() as folder:
        child = instant(Path(folder, "instant"))
        with server(child) as running:
            connection = connect(running.port)
            ours, theirs = [], []
            for _ in range(pairs):
                ours.append(through_server(connection))
                theirs.append(bare_start(child, folder))
            connection.close()
    added = statistics.median(ours) - statistics.median(theirs)
    print(f"bare start     {spread(theirs)}")
    print(f"claude-proxy   {spread(ours)}")
    print(f"added          {added * 1000:.2f} ms (median of {pairs} pairs)")


if __name__ == "__main__":
    main()
