"""
How fast one stream of events goes through, beside a bare pipe in the same run.

    python -m benchmarks.native_stream [EVENTS]

The client counts every event.  Aims: 200,000 events a second, and 0.35 CPU seconds for 100,000.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.children import flood
from benchmarks.harness import Server, connect, elapsed, request_bytes, server

_BODY: dict[str, object] = {"prompt": "x", "include-partial-messages": True}
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


def through_server(running: Server) -> tuple[int, float, float]:
    """Events, seconds and the server's CPU seconds of one stream."""
    connection = connect(running.port)
    cpu, begin = running.cpu(), time.perf_counter()
    connection.sendall(request_bytes(_BODY))
    buffer = bytearray(1 << 20)
    events, carried = 0, b""
    while not carried.endswith(_END):
        size = connection.recv_into(buffer)
        if not size:
            raise RuntimeError("the stream was cut")
        data = carried + bytes(memoryview(buffer)[:size])
        # The blank line that ends an event may be cut in two: only a line's start counts here.
        events += data.count(b"\ndata: ", max(0, len(carried) - 6))
        carried = data[-6:]
    connection.close()
    return events, elapsed(begin), running.cpu() - cpu


def main() -> None:
    """Measure and print."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        child = flood(Path(folder, "flood"), events=count)
        lines, seconds = through_pipe(child)
        bare = lines / seconds
        print(f"bare pipe      {bare:12,.0f} lines/s")
        with server(child) as running:
            for _ in range(3):
                events, seconds, cpu = through_server(running)
                rate = events / seconds
                print(
                    f"claude-proxy   {rate:12,.0f} events/s  {cpu / events * 1e5:.3f} CPU s "
                    f"per 100,000  {rate / bare:.2f} of the pipe  {events:,} events"
                )
                if events != count + 2:
                    raise SystemExit(f"{count + 2 - events} events were lost")


if __name__ == "__main__":
    main()
