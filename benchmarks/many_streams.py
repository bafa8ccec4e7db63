"""
Many streams at once, beside as many bare pipes in the same run.

    python -m benchmarks.many_streams [STREAMS ...] [--events N] [--gap MS] [--rounds N]

Each event carries the moment in which it was written into its child's pipe.  Its latency is the
time from then until its last byte has reached the reader, which is the same program on all sides:

- bare pipes: it starts the children itself, at the server's pace, and reads their pipes;
- relay: it reads sockets, to which a small loop hands the pipes on;
- claude-proxy: it reads the answers.

The children cost nothing (see `pacer`): one process speaks for all of them, so that it is the
server that is measured, not how a machine shares its processors among hundreds of children.  Sides
take turns, round by round.  Each stream must bring every event in its order, and its end.

There are two rhythms.  "together": no stream begins before all have been started, and none ends
before all have said everything, so there really are that many at once; their events are spread
evenly.  "rolling": each begins as soon as it is there, so starts and ends of some fall into the
events of others.

Aims: the 99th percentile of the latencies at most 1.5 times that of the bare pipes; at most 100 kB
of memory for a stream.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness import Server, server
from benchmarks.pacer import child, pacing
from benchmarks.reader import read_arrived

_STARTS_AT_ONCE = 4 * (os.cpu_count() or 1)
"""How many children may be starting at a time; the server's own pace."""


@dataclass(frozen=True)
class _Plan:
    """What is measured."""

    folder: Path
    child: Path
    streams: int
    events: int
    gap: float
    together: bool


@dataclass
class _Side:
    """
    One of those that are compared.

    @ivar where: what its reader is told: the child to start, or a port.
    @ivar at_once: how many streams its reader begins before the first of them speaks.
    @ivar cpu: seconds of CPU that the server used while events came.
    @ivar cpu_all: the same with the starts and ends of the streams.
    @ivar memory: the most that the server had, in MB.
    @ivar late: how late the pacer was in the worst round, at its 99th percentile, in seconds.
    """

    kind: str
    where: str
    at_once: int
    server: Server | None = None
    latencies: list[float] = field(default_factory=list)
    cpu: float = 0.0
    cpu_all: float = 0.0
    memory: float = 0.0
    late: float = 0.0

    def used(self) -> float:
        """CPU seconds of the server so far."""
        return 0.0 if self.server is None else self.server.cpu()

    def look(self) -> None:
        """Look at the server's memory."""
        if self.server is not None:
            self.memory = max(self.memory, self.server.memory())

    def round(self, plan: _Plan) -> None:
        """Run all streams once."""
        results = plan.folder / "results"
        command = [sys.executable, "-m", "benchmarks.reader", self.kind, self.where]
        command += [str(plan.streams), str(self.at_once), str(results)]
        rhythm = pacing(plan.folder, plan.streams, plan.events, plan.gap, together=plan.together)
        with rhythm as pace:
            before_all = self.used()
            reader = subprocess.Popen(command)
            pace.wait_for_start()
            before = self.used()
            self.look()
            self.late = max(self.late, pace.wait_for_said())
            self.cpu += self.used() - before
            self.look()
            if reader.wait():
                raise SystemExit("The reader has failed.")
            self.cpu_all += self.used() - before_all
        arrived = read_arrived(results)
        lost = plan.streams * plan.events - sum(arrived.counts)
        if lost or len(arrived.counts) != plan.streams:
            raise SystemExit(f"{lost} events were lost.")
        self.latencies += arrived.latencies


@contextmanager
def _relay(path: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.relay", str(path), str(_STARTS_AT_ONCE)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().decode().strip()
    finally:
        process.kill()
        process.communicate()


def _percentile(samples: Sequence[float], share: int) -> float:
    return sorted(samples)[len(samples) * share // 100]


def _row(plan: _Plan, name: str, said: str) -> None:
    rhythm = "together" if plan.together else "rolling"
    print(f"{plan.streams:4} {rhythm:9} {name:13} {said}", flush=True)


def _show(plan: _Plan, sides: Sequence[_Side], memory: float | None) -> None:
    worst = []
    for side in sides:
        median, high = (_percentile(side.latencies, share) * 1000 for share in (50, 99))
        worst.append(high)
        said = f"p50 {median:8.2f} ms  p99 {high:8.2f} ms"
        if len(worst) > 1:
            said += "  p99 " + ", ".join(
                f"{high / other:.1f} of {past.kind}"
                for other, past in zip(worst[:-1], sides, strict=False)
            )
        _row(plan, side.kind, said)
    ours = sides[-1]
    events, rounds = len(ours.latencies), len(ours.latencies) / plan.events / plan.streams
    parts = [f"{events:,} events, all in order"]
    if memory is not None:
        parts.append(f"{memory * 1024 / plan.streams:.0f} kB a stream")
    if plan.together:
        parts.append(f"{ours.cpu / events * 1e6:.0f} us CPU an event")
        parts.append(f"{ours.cpu / rounds / plan.events / plan.gap * 100:.0f} % of a core")
        rest = (ours.cpu_all - ours.cpu) / rounds / plan.streams
        parts.append(f"{rest * 1000:.1f} ms CPU for the rest of a stream")
    else:
        parts.append(f"{ours.cpu_all / rounds / plan.streams * 1000:.1f} ms CPU a stream")
    parts.append(f"pacer late by {max(side.late for side in sides) * 1000:.1f} ms (p99)")
    _row(plan, "", "; ".join(parts))


def _measure(asked: argparse.Namespace, streams: int, *, together: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = child(folder)
        gap = asked.gap / 1000
        plan = _Plan(folder, path, streams, asked.events, gap, together)
        settings = {
            "MAX_CONCURRENT_TURNS": str(streams),
            "QUEUE_LENGTH": str(streams),
            "LIVE_SESSIONS": "0",
            "SPARE_PROCESSES": "0",
        }
        with server(path, **settings) as running, _relay(path) as relay:
            port = str(running.port)
            _Side("server", port, 1).round(_Plan(folder, path, 1, 5, gap, together))
            before = running.memory()
            sides = [
                _Side("pipes", str(path), _STARTS_AT_ONCE),
                _Side("relay", relay, streams),
                _Side("server", port, streams, running),
            ]
            for _ in range(asked.rounds):
                for side in sides:
                    side.round(plan)
        _show(plan, sides, sides[-1].memory - before if together else None)


def _raise_descriptor_limit() -> None:
    """For everything that is started from here: the server needs four for a stream."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Many streams at once.")
    parser.add_argument("streams", nargs="*", type=int, default=[1, 50, 200, 500])
    parser.add_argument("--events", type=int, default=50, help="of each stream")
    parser.add_argument("--gap", type=float, default=20, help="ms between two events of a stream")
    parser.add_argument("--rounds", type=int, default=3, help="of each side")
    asked = parser.parse_args()
    _raise_descriptor_limit()
    for streams in asked.streams:
        for together in (True, False):
            _measure(asked, streams, together=together)


if __name__ == "__main__":
    main()
