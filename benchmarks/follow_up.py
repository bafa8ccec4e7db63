"""
What the server adds to a follow-up turn of a live session, up to its first text, with the real CLI.

    python -m benchmarks.follow_up [PAIRS]

Pairs of one turn through the server and one by hand with a process of the same kind, interleaved,
in sessions of 25 turns.  The model is on the loopback and answers at once.  Aim: at most 4 ms.
"""

from __future__ import annotations

from functools import partial

from benchmarks.harness import Server, argument, machine
from benchmarks.pairs import Pairs
from benchmarks.real_cli import RealCli, real_cli, wait_for_rest
from benchmarks.turns import Client

_AIM = 0.004
_TURNS = 25
"""In one session: its history makes each turn a little slower than the one before."""

_PAUSE = 0.03
"""Seconds in which both CLIs write down the turn before."""


def measure(cli: RealCli, running: Server, pairs: Pairs, count: int) -> None:
    """Add so many pairs, in a new session of each kind."""
    with Client(running.port) as client, cli.by_hand() as by_hand:
        client.ask("[[text first]]", "first")
        by_hand.ask("[[text first]]", "first")
        session = client.session
        wait_for_rest(running.pid, by_hand.pid)
        for _ in range(count):
            answer = f"answer {len(pairs.ours)}"
            prompt = f"[[text {answer}]]"
            pairs.measure(
                partial(client.ask, prompt, answer, session),
                partial(by_hand.ask, prompt, answer),
            )
    starts = running.records("turn_start")
    if [start["process"] == "live" for start in starts[-count - 1 :]] != [False, *[True] * count]:
        raise SystemExit("A turn did not run in the process of the one before.")


def main() -> None:
    """Measure and print."""
    count = argument(1, 200)
    pairs = Pairs(pause=_PAUSE)
    print(machine())
    # Nothing else is to be started meanwhile.
    with real_cli() as cli, cli.server("server", SPARE_PROCESSES="0") as running:
        cpu = 0.0
        for done in range(0, count, _TURNS):
            before = running.cpu()
            measure(cli, running, pairs, min(_TURNS, count - done))
            cpu += running.cpu() - before
    print(pairs.report("live CLI", _AIM))
    print(f"{'CPU':15}{cpu / count * 1000:.1f} ms of the server for each turn")


if __name__ == "__main__":
    main()
