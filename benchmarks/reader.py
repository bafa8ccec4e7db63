"""
The reader of `many_streams`: the same loop for bare pipes and for answers of the server.

    python -m benchmarks.reader pipes CHILD COUNT AT_ONCE RESULTS
    python -m benchmarks.reader relay PORT COUNT AT_ONCE RESULTS
    python -m benchmarks.reader server PORT COUNT AT_ONCE RESULTS

All it does while events arrive is to note when which bytes did; what they were is looked at when
all is over.
"""

from __future__ import annotations

import bisect
import gc
import json
import os
import re
import select
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from benchmarks.harness import connect, request_bytes
from benchmarks.pacer import MARK, OVER
from benchmarks.relay import start_child

__all__ = ["Arrived", "read_arrived"]

_BODY: dict[str, object] = {"prompt": "x", "include-partial-messages": True}
_ANSWER_END = b"0\r\n\r\n"
_EVENT = re.compile(rb"%b(\d+)%b(\d+)%b" % ((MARK.encode(),) * 3))
_SIZE = 1 << 16


@dataclass
class _Stream:
    """One stream, as its bytes arrive."""

    close: Callable[[], None]
    pieces: list[tuple[int, bytes]] = field(default_factory=list)


@dataclass(frozen=True)
class Arrived:
    """
    What has arrived of all streams.

    @ivar latencies: seconds between an event's writing and its arrival, of each event.
    @ivar counts: how many events came in each stream.
    """

    latencies: list[float]
    counts: list[int]


def _read_all(
    begin: Callable[[], tuple[int, _Stream]], count: int, at_once: int, end: bytes
) -> list[_Stream]:
    """
    Begin so many streams and read them to their ends.

    @param begin: begins one; returns the descriptor to read it from.
    @param at_once: so many may have been begun that have not said anything yet; between two
        beginnings it is looked whether there is anything to read.
    @param end: how each stream ends.
    """
    streams: dict[int, _Stream] = {}
    done: list[_Stream] = []
    epoll = select.epoll()
    begun = heard = 0
    while len(done) < count:
        free = begun < count and begun - heard < at_once
        if free:
            descriptor, stream = begin()
            streams[descriptor] = stream
            epoll.register(descriptor, select.EPOLLIN)
            begun += 1
        for descriptor, _ in epoll.poll(0 if free else -1):
            data = os.read(descriptor, _SIZE)
            now = time.monotonic_ns()
            stream = streams[descriptor]
            if not stream.pieces:
                heard += 1
            stream.pieces.append((now, data))
            if data.endswith(end) or not data:
                epoll.unregister(descriptor)
                done.append(streams.pop(descriptor))
                stream.close()
    epoll.close()
    return done


def _arrived(streams: list[_Stream], end: bytes) -> Arrived:
    """Look at each stream: every event must be there, in its order, and the end."""
    latencies: list[float] = []
    counts = []
    for stream in streams:
        times = [when for when, _ in stream.pieces]
        ends = list(accumulate(len(data) for _, data in stream.pieces))
        whole = b"".join(data for _, data in stream.pieces)
        events = list(_EVENT.finditer(whole))
        if [int(event[1]) for event in events] != list(range(len(events))):
            raise SystemExit("Events came in another order.")
        if not whole.endswith(end) or OVER.strip() not in whole:
            raise SystemExit(f"A stream has no end: {whole[-300:]!r}")
        for event in events:
            arrived = times[bisect.bisect_left(ends, event.end())]
            latencies.append((arrived - int(event[2])) / 1e9)
        counts.append(len(events))
    return Arrived(latencies, counts)


def _child(path: str, folder: str) -> tuple[int, _Stream]:
    child = start_child(path, folder)
    return child.stdout.fileno(), _Stream(child.close)


def _connected(port: int) -> tuple[int, _Stream]:
    connection = connect(port)
    return connection.fileno(), _Stream(connection.close)


def _asked(port: int) -> tuple[int, _Stream]:
    connection = connect(port)
    connection.sendall(request_bytes(_BODY))
    return connection.fileno(), _Stream(connection.close)


def read_arrived(path: Path) -> Arrived:
    """What a reader has written down."""
    return Arrived(**json.loads(path.read_text(encoding="utf-8")))


def main() -> None:
    """Be the reader."""
    kind, where, count, at_once, path = sys.argv[1:]
    gc.disable()
    with tempfile.TemporaryDirectory() as folder:
        begin: Callable[[], tuple[int, _Stream]] = {
            "pipes": lambda: _child(where, folder),
            "relay": lambda: _connected(int(where)),
            "server": lambda: _asked(int(where)),
        }[kind]
        end = _ANSWER_END if kind == "server" else OVER
        streams = _read_all(begin, int(count), int(at_once), end)
    arrived = _arrived(streams, end)
    results = {"latencies": arrived.latencies, "counts": arrived.counts}
    Path(path).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
