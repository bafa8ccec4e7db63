"""
What the server itself adds to the time to the first text, with a child that answers at once.

    python -m benchmarks.first_token [PAIRS]

Pairs of one request and one turn by hand with the same child, interleaved: first with a process
that is started for the turn, then with one that waits for it.  Aims: at most 3 ms and 1 ms.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.children import SAID, instant, live
from benchmarks.harness import Server, argument, machine, server
from benchmarks.pairs import Pairs
from benchmarks.turns import ByHand, Client

_NEW_AIM, _LIVE_AIM = 0.003, 0.001


def new_process(child: Path, running: Server, folder: str, count: int) -> Pairs:
    """Turns with a process of their own."""
    pairs = Pairs()

    def start() -> float:
        with ByHand([str(child)], folder) as by_hand:
            return by_hand.ask("x", SAID)

    with Client(running.port) as client:
        for _ in range(count):
            pairs.measure(lambda: client.ask("x", SAID), start)
    return pairs


def live_process(child: Path, running: Server, folder: str, count: int) -> Pairs:
    """Turns with the process of the turn before."""
    pairs = Pairs()
    with Client(running.port) as client, ByHand([str(child)], folder) as by_hand:
        client.ask("x", SAID)
        by_hand.ask("x", SAID)
        session = client.session
        for _ in range(count):
            pairs.measure(
                lambda: client.ask("x", SAID, session),
                lambda: by_hand.ask("x", SAID),
            )
    starts = running.records("turn_start")
    if [start["process"] == "live" for start in starts[-count - 1 :]] != [False, *[True] * count]:
        raise SystemExit("A turn did not run in the process of the one before.")
    return pairs


def main() -> None:
    """Measure and print."""
    count = argument(1, 200)
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        child = instant(Path(folder, "instant"))
        with server(child) as running:
            print(new_process(child, running, folder, count).report("bare start", _NEW_AIM))
        child = live(Path(folder, "live"))
        with server(child) as running:
            print(live_process(child, running, folder, count).report("live child", _LIVE_AIM))


if __name__ == "__main__":
    main()
