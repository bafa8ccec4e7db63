"""
The load run: hundreds of clients at the same time, for minutes, and nothing wrong or left.

    python -m benchmarks.load [MINUTES] [--clients N] [--seed SEED]

A real daemon runs with the CLI of `load_cli`.  Clients of all four kinds (streams and whole answers
of both dialects) hold conversations with it: they go on in a process that stays, resume a session
whose process has gone, or begin one, sometimes in a process that was started ahead.  A fifth of
them leave early, and of the processes one in twenty fails.

Each answer is judged by what was asked and by what its session must know.  The time is divided into
watches: the first minute, then three minutes each.  After each, when the last answers have come,
nothing may be held but processes that wait, and in the end not even those.  The memory may have
grown by 10 MB at most since the first minute.  A run that is no longer than that is not warm before
its end: there, 20 MB since the first third are accepted.

A child takes 6 to 14 seconds for an answer of 20 to 60 pieces.  So two hundred clients begin some
20 turns in a second, more than half of them in a new process, and read some 600 pieces in a second.
That keeps one of two processors busy, most of it with the starts of children, which are real
processes.  At a higher rate one would measure how long they wait for a processor.

The latency of an event is the time from its writing by the child to its reading by the client.
What passes before the first token is counted without the child's own pause and the queue; with the
start of the child, if there was one.  Some clients do without the server: they start the same child
and read its pipe.  What they see is what the machine takes by itself.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import load_cli
from benchmarks.harness import machine
from benchmarks.load_clients import Report, Told, read_report
from benchmarks.load_plan import LONGEST, Talk, body_of, check, draw
from tests.e2e.processes import children_of, processes_with_env, wait_until
from tests.integration.ship import (
    PATIENCE,
    Ship,
    cleared,
    program,
    read_all,
    request_bytes,
)

__all__ = ["load"]

GROWTH_BYTES = 10 * 1024 * 1024

YOUNG_BYTES = 20 * 1024 * 1024
"""How much it may grow after the first third of a run so short that it is all warming up."""

TURNS, LIVE, SPARES = 172, 24, 4

SETTINGS = {
    "LOG_LEVEL": "info",
    "MAX_CONCURRENT_TURNS": str(TURNS),
    "LIVE_SESSIONS": str(LIVE),
    "SPARE_PROCESSES": str(SPARES),
    "PROCESS_KILL_TIMEOUT_MS": "1000",
}
"""All else is as it is without settings: 64 may wait for 30 s, and 512 connections be open."""

WARNINGS = {"live_lost", "open_server", "stray_output"}
"""What may be warned of: the garbage of children that fail, and a spare that got the message."""

_PIPES = 3
"""Descriptors that the server holds for one process."""


class Dock(Ship):
    """The daemon; processes may wait there."""

    def in_hand(self) -> dict[str, Any]:
        found = super().in_hand()
        alive = set(found.pop("starts without an exit"))
        children = set(found.pop("children"))
        found["processes that are gone"] = alive - children
        found["processes that nobody knows"] = children - alive
        found["marked processes"] -= children
        return found

    def wait_for_rest(self, descriptors: Counter[str]) -> None:
        """Wait until nothing is held but processes that wait, and for each its pipes."""
        own = _PIPES * (LIVE + SPARES)
        held = self.wait_for_calm(descriptors + Counter({"pipe": own}))
        assert held["live"] <= LIVE, held
        assert held["spares"] <= SPARES, held
        wait_until(lambda: self._fits(descriptors), "as many pipes as processes", PATIENCE)

    def _fits(self, descriptors: Counter[str]) -> bool:
        alive = self.journal.processes
        pipes = self.descriptors["pipe"] - descriptors["pipe"]
        return pipes == _PIPES * len(alive) and set(children_of(self.pid)) == alive


@dataclass
class _Result:
    """
    What is found out.

    @ivar memory: what the server had while there was load: seconds of load before, and bytes.
    @ivar calms: the memory after each watch, when all that can be freed is freed, in bytes.
    @ivar cpu: seconds of CPU that the server used.
    @ivar idle: seconds that the machine's processors had nothing to do.
    @ivar seconds: how long there was load.
    """

    reports: list[Report] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    calms: list[int] = field(default_factory=list)
    cpu: float = 0.0
    idle: float = 0.0
    seconds: float = 0.0

    @property
    def turns(self) -> list[Told]:
        """All that the server was asked for."""
        return [turn for turn in self._all if turn.dialect != "bare"]

    @property
    def bare(self) -> list[Told]:
        """Those that did without it."""
        return [turn for turn in self._all if turn.dialect == "bare"]

    @property
    def _all(self) -> Iterator[Told]:
        return (turn for report in self.reports for turn in report.turns)


def _watches(minutes: float) -> Iterator[float]:
    """How many seconds each watch has."""
    left = minutes * 60
    yield min(left, 60.0)
    while (left := left - (60.0 if left == minutes * 60 else 180.0)) > 0:
        yield min(left, 180.0)


def load(folder: Path, minutes: float, clients: int, seed: int) -> list[str]:
    """
    Put the load on a daemon of its own.

    @param folder: empty; all of it happens there.
    @return: what there is to tell.
    @raise AssertionError: something was wrong, or something that was meant to happen did not.
    """
    result = _Result()
    ship = Dock(folder, program(load_cli.__name__), SETTINGS, '{"mcpServers": {}}')
    with cleared(folder), ship:
        try:
            ship.wait_for_record("cli_found")
            descriptors = ship.descriptors
            _prelude(ship, seed)
            for number, seconds in enumerate(_watches(minutes), 1):
                # Then some of the first turns find a process that was started ahead.
                wait_until(lambda: ship.held()["spares"] == SPARES, "spares", PATIENCE)
                _watch(ship, result, seconds, clients, (seed, number))
                ship.wait_for_rest(descriptors)
                result.calms.append(ship.memory)
        finally:
            (folder / "log").write_text("\n".join(ship.journal))
        ship.check_log({})
        warnings = {r["type"] for r in ship.journal.all() if r.get("level") == "warn"}
        assert warnings <= WARNINGS, warnings
    collisions = folder / "config" / "sessions" / "collisions"
    assert not collisions.exists(), collisions.read_text()
    assert ship.returncode == -signal.SIGTERM
    assert processes_with_env(str(folder)) == []
    assert ship.journal.processes == set()
    return [*_check_memory(result, minutes), *_tell(ship, result, clients)]


def _prelude(ship: Dock, seed: int) -> None:
    """Some turns one after the other, so that the server knows what processes to start ahead."""
    chance = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
    for number in range(SPARES):
        talk = Talk(is_chat=False, number=number, fields={})
        plan = draw(chance, talk, f"t{number}")
        order = {**plan.order, "do": "good", "first": 0, "gap": 0, "breaks": 0}
        plan = replace(plan, order=order, act="", dialect="whole")
        with ship.connect() as client:
            client.sendall(request_bytes(body_of(plan, talk), plan.token))
            assert check(plan, talk, read_all(client)) == ""


def _watch(
    ship: Dock, result: _Result, seconds: float, clients: int, seed: tuple[int, int]
) -> None:
    """One watch."""
    path = ship.folder / f"report{seed[1]}"
    asking = max(seconds - LONGEST, 1.0)
    command = [sys.executable, "-m", "benchmarks.load_clients", str(ship.port), str(clients)]
    command += [str(asking), str(seed[0]), str(seed[1]), str(path)]
    used, idle, begin = _cpu(ship.pid), _idle(), time.monotonic() - result.seconds
    process = subprocess.Popen(command)
    while process.poll() is None:
        result.memory.append((time.monotonic() - begin, ship.memory))
        time.sleep(0.2)
    assert process.returncode == 0, "The clients have failed."
    result.cpu += _cpu(ship.pid) - used
    result.idle += _idle() - idle
    result.seconds = time.monotonic() - begin
    report = read_report(path)
    assert not report.wrong, f"{len(report.wrong)} of {len(report.turns)}: {report.wrong[:5]}"
    assert report.most > clients * 0.7, f"Only {report.most} were there at the same time."
    result.reports.append(report)


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _idle() -> float:
    words = Path("/proc/stat").read_text().split()
    return (int(words[4]) + int(words[5])) / os.sysconf("SC_CLK_TCK")


def _check_memory(result: _Result, minutes: float) -> Iterator[str]:
    """Check that it has not grown since the beginning."""
    warm = minutes > 1
    beginning, most = (60.0, GROWTH_BYTES) if warm else (minutes * 20, YOUNG_BYTES)
    before = max(size for moment, size in result.memory if moment <= beginning)
    later = max(size for moment, size in result.memory if moment > beginning)
    calms = " ".join(f"{size / 1e6:.1f}" for size in result.calms)
    told = (
        f"memory at most {before / 1e6:.1f} MB in the first {beginning:.0f} s, then "
        f"{later / 1e6:.1f} MB; in each calm {calms} MB"
    )
    assert later - before <= most, told
    assert max(result.calms) - result.calms[0] <= most, told
    yield told


def _tell(ship: Dock, result: _Result, clients: int) -> Iterator[str]:
    turns = result.turns
    ends = Counter(turn.end for turn in turns)
    most = max(report.most for report in result.reports)
    yield f"{clients} clients, {most} of them at the same time, for {result.seconds:.0f} s"
    yield (
        f"{len(turns):,} turns, {len(turns) / result.seconds:.1f}/s: {ends['']:,} right answers, "
        f"{ends['cli_failed']} right failures, {ends['left']:,} left early"
    )
    yield from _tell_times(ship, result)
    share = 1 - result.idle / result.seconds / (os.cpu_count() or 1)
    busy = max(report.busy for report in result.reports) / 1e6
    yield (
        f"server {result.cpu / result.seconds * 100:.0f} % of a processor, "
        f"{result.cpu / len(turns) * 1000:.1f} ms a turn; machine {share * 100:.0f} % busy; "
        f"clients busy with judging for {busy:.1f} ms at most"
    )


def _tell_times(ship: Dock, result: _Result) -> Iterator[str]:
    ways = _ways(ship)
    kinds = Counter(ways.values())
    assert set(kinds) == {"live", "spare", "new"}, kinds
    yield (
        f"{kinds['live']:,} in a live process, {kinds['spare']} in a spare, "
        f"{kinds['new']:,} in a new one"
    )
    waited: Counter[str] = Counter()
    for one in ship.journal.of("queue_left"):
        waited[one["request_id"]] += one["waited_ms"]
    if waited:
        yield f"{len(waited):,} had to wait for a slot: {_spread(list(waited.values()))}"
    through = [turn for turn in result.turns if turn.latencies]
    bare = result.bare
    for name, turns in (("through it", through), ("a bare pipe", bare)):
        yield _row("an event", [one / 1e6 for turn in turns for one in turn.latencies], name)
    firsts: dict[str, list[float]] = {}
    for turn in through:
        firsts.setdefault(ways[turn.token], []).append(_first(turn) - waited[turn.token])
    for way, samples in sorted(firsts.items()):
        yield _row("a first token", samples, f"{way} process")
    yield _row("a first token", [_first(turn) for turn in bare], "a bare start")


def _ways(ship: Dock) -> dict[str, str]:
    """How each turn got its process, that has answered it."""
    spares = {record["pid"] for record in ship.journal.of("spare_started")}
    used: set[int] = set()
    ways: dict[str, str] = {}
    for record in ship.journal.of("turn_start"):
        pid = record["pid"]
        ways[record["request_id"]] = "live" if pid in used else "spare" if pid in spares else "new"
        used.add(pid)
    return ways


def _first(turn: Told) -> float:
    """Milliseconds to the first token, but for the child's own pause."""
    return (turn.heard - turn.asked + turn.first) / 1e6


def _row(what: str, samples: Sequence[float], how: str) -> str:
    return f"{what:14}{how:14}{_spread(samples)}, of {len(samples):,}"


def _spread(samples: Sequence[float]) -> str:
    """Of samples in ms."""
    ordered = sorted(samples)
    middle, high = (ordered[len(ordered) * share // 100] for share in (50, 99))
    return f"p50 {middle:.2f} ms, p99 {high:.2f} ms"


def main() -> None:
    """Run, and tell."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load")
    parser.add_argument("minutes", nargs="?", type=float, default=10)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="a new one, where all of it happens; it stays")
    given = parser.parse_args()
    print(machine())
    if given.folder is not None:
        given.folder.mkdir()
        lines = load(given.folder.resolve(), given.minutes, given.clients, given.seed)
    else:
        with tempfile.TemporaryDirectory() as folder:
            lines = load(Path(folder), given.minutes, given.clients, given.seed)
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
