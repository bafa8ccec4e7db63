"""
What a client that reads nothing costs, while its child offers 300 MB (or as many as you say).

    python -m benchmarks.slow_client [MEGABYTES [SECONDS]]

Shows how much the server's memory grows in so many seconds (5 if you say nothing), that the child
is blocked, and how other clients are served meanwhile; at last the client reads after all, and gets
everything.  Aims: at most 5 MB more, and others at their usual speed.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.children import event_line, flood
from benchmarks.harness import Server, argument, connect, elapsed, server, spread
from benchmarks.native_stream import ask, read_events, through_server


def _health_times(running: Server, count: int = 100) -> list[float]:
    times = []
    connection = connect(running.port)
    for _ in range(count):
        begin = time.perf_counter()
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        connection.recv(1 << 16)
        times.append(elapsed(begin))
    connection.close()
    return times


def _written(child: Path) -> int:
    """How many bytes all processes that run the child have written so far."""
    written = 0
    for entry in Path("/proc").iterdir():
        try:
            if str(child).encode() in (entry / "cmdline").read_bytes():
                counters = dict(
                    line.split(": ") for line in (entry / "io").read_text().splitlines()
                )
                written += int(counters["wchar"])
        except OSError:
            continue
    return written


def main() -> None:
    """Measure and print."""
    megabytes, seconds = argument(1, 300), argument(2, 5)
    events = megabytes * 1_000_000 // len(event_line(200))
    with tempfile.TemporaryDirectory() as folder:
        child = flood(Path(folder, "flood"), events=events)
        with server(child) as running:
            through_server(running, events)
            usual, alone = _health_times(running), through_server(running, events)
            before = running.memory()
            idle = ask(running)
            grown = 0.0
            for _ in range(seconds * 2):
                time.sleep(0.5)
                grown = max(grown, running.memory() - before)
            written = _written(child)
            time.sleep(1)
            more = _written(child) - written
            beside, others = through_server(running, events), _health_times(running)
            print(f"memory grown by the client that reads nothing: {grown:.1f} MB")
            print(f"child: {written / 1e6:.1f} MB written, {more} bytes more in a second")
            print(f"health check, usually      {spread(usual)}")
            print(f"health check, beside it    {spread(others)}")
            print(f"another stream, usually    {events / alone[0]:,.0f} events/s")
            print(f"another stream, beside it  {events / beside[0]:,.0f} events/s")
            read_events(idle, events)
            print(f"when it reads at last      {events + 2:,} events")


if __name__ == "__main__":
    main()
