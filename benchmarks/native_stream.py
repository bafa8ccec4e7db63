"""
How fast one stream of events goes through, beside a bare pipe in the same run.

    python -m benchmarks.native_stream [EVENTS]

The client counts every event.  Aims: 200,000 events a second, and 0.35 CPU seconds for 100,000.
"""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.children import flood
from benchmarks.harness import Server, argument, connect, elapsed, request_bytes, server

_BODY: dict[str, object] = {"prompt": "x", "include-partial-messages": True}
_START = b"\ndata: "
_END = b"0\r\n\r\n"


def through_pipe(child: Path) -> tuple[int, float]:
    """Lines and seconds when nothing but a pipe is between the child and us."""
    process = subprocess.Popen([child], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    begin = time.perf_counter()
    process.stdin.write(b'{"type":"user"}\n')
    process.stdin.flush()
    lines, tail = 0, b""
    while b'"result"' not in tail:
        data = os.read(process.stdout.fileno(), 1 << 16)
        lines += data.count(b"\n")
        tail = data[-300:]
    seconds = elapsed(begin)
    process.communicate(timeout=10)
    return lines, seconds


def ask(running: Server) -> socket.socket:
    """Ask for the flood, and read nothing of it."""
    connection = connect(running.port)
    connection.sendall(request_bytes(_BODY))
    return connection


def read_events(connection: socket.socket, expected: int) -> None:
    """
    Read a whole stream and count its events; closes the connection.

    @param expected: how many the child sends between the first and the last event.
    """
    buffer = bytearray(1 << 20)
    events, carried = 0, b""
    with connection:
        while not carried.endswith(_END):
            size = connection.recv_into(buffer)
            if not size:
                raise SystemExit("The stream was cut.")
            data = carried + bytes(memoryview(buffer)[:size])
            # What was carried is too short to be counted twice.
            events += data.count(_START)
            carried = data[1 - len(_START) :]
    if events != expected + 2:
        raise SystemExit(f"{expected + 2 - events} events were lost.")


def through_server(running: Server, expected: int) -> tuple[float, float]:
    """Seconds, and CPU seconds of the server, for one stream; every event is counted."""
    cpu, begin = running.cpu(), time.perf_counter()
    read_events(ask(running), expected)
    return elapsed(begin), running.cpu() - cpu


def main() -> None:
    """Measure and print."""
    count = argument(1, 1_000_000)
    with tempfile.TemporaryDirectory() as folder:
        child = flood(Path(folder, "flood"), events=count)
        lines, seconds = through_pipe(child)
        bare = lines / seconds
        print(f"bare pipe      {bare:12,.0f} lines/s")
        with server(child) as running:
            for _ in range(3):
                seconds, cpu = through_server(running, count)
                rate, events = count / seconds, count + 2
                print(
                    f"claude-proxy   {rate:12,.0f} events/s  {cpu / count * 1e5:.3f} CPU s "
                    f"per 100,000  {rate / bare:.2f} of the pipe  {events:,} events"
                )


if __name__ == "__main__":
    main()
