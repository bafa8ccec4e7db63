"""
A new session's first turn up to its first text, with the real CLI: with a spare and without one.

    python -m benchmarks.first_turn [TRIPLES]

Triples of a turn that finds a spare, one that starts a process, and one start by hand of the same
process, interleaved.  The model is on the loopback and answers at once.  Before each triple all is
at rest and a spare waits, so each takes some four seconds: 100 of them seven minutes.  Aims: with a
spare at most 0.2 times the start by hand, without one at most 15 ms more.
"""

from __future__ import annotations

from functools import partial
from statistics import median

from benchmarks.harness import Server, argument, machine, spread
from benchmarks.pairs import Pairs, verdict
from benchmarks.real_cli import RealCli, real_cli, wait_for_rest
from benchmarks.turns import Client
from tests.e2e.processes import wait_until

_WARM_AIM, _COLD_AIM = 0.2, 0.015

_PAUSE = 0.2
"""Seconds in which the process of the turn before ends."""


class Spares:
    """Turns that find a spare."""

    def __init__(self, running: Server) -> None:
        self.times: list[float] = []
        self._running = running
        self._client = Client(running.port)
        self._client.ask("[[text first]]", "first")  # tells the server what spares are for

    def wait(self) -> int:
        """Wait for a spare that is up; its process."""
        number = len(self.times) + 1
        wait_until(lambda: len(self._started()) >= number, "a spare is started")
        wait_for_rest(self._running.pid)
        return self._started()[-1]

    def take(self, spare: int, answer: str) -> None:
        """Measure a turn on this process."""
        self.times.append(self._client.ask(f"[[text {answer}]]", answer))
        if self._running.records("turn_start")[-1]["pid"] != spare:
            raise SystemExit("The turn did not find the spare.")

    def _started(self) -> list[int]:
        return [int(record["pid"]) for record in self._running.records("spare_started")]


def measure(cli: RealCli, with_spares: Server, without: Server, count: int) -> tuple[Spares, Pairs]:
    """Take so many triples."""
    spares, pairs = Spares(with_spares), Pairs(pause=_PAUSE)
    with Client(without.port) as client:

        def start(answer: str) -> float:
            with cli.by_hand() as by_hand:
                return by_hand.ask(f"[[text {answer}]]", answer)

        def ask(answer: str) -> float:
            return client.ask(f"[[text {answer}]]", answer)

        # What the CLI does only once in a new home is no part of it.
        start("first")
        ask("first")
        for number in range(count):
            answer = f"answer {number}"
            spare = spares.wait()
            pairs.measure(partial(ask, answer), partial(start, answer))
            wait_for_rest(without.pid, with_spares.pid)
            spares.take(spare, answer)
    return spares, pairs


def main() -> None:
    """Measure and print."""
    count = argument(1, 100)
    print(machine())
    with (
        real_cli() as cli,
        cli.server("spares", LIVE_SESSIONS="0", SPARE_PROCESSES="1") as with_spares,
        cli.server("cold", LIVE_SESSIONS="0", SPARE_PROCESSES="0") as without,
    ):
        spares, pairs = measure(cli, with_spares, without, count)
    print(pairs.report("cold CLI", _COLD_AIM))
    share = median(spares.times) / median(pairs.bare)
    told = verdict(f"{_WARM_AIM:g}", met=share <= _WARM_AIM)
    print(f"{'with a spare':15}{spread(spares.times)}, {share:.2f} of the cold CLI; {told}")


if __name__ == "__main__":
    main()
