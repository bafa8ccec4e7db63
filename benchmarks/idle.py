"""
What the server costs while nothing happens, and apart from it the processes that it keeps.

    python -m benchmarks.idle [SECONDS]

With no live session, then with 1 and 4 of them, for so many seconds each (10 if you say nothing).
PSS is the memory that a process has for itself and its share of what it has together with others.
"""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.harness import Server, argument, machine
from benchmarks.real_cli import cpu_seconds, real_cli, wait_for_rest
from benchmarks.turns import Client
from tests.e2e.processes import children_of

_LIVE = (0, 1, 4)


def pss(pid: int) -> float:
    """The proportional memory of a process, in MB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no Pss")


def measure(running: Server, live: int, seconds: int) -> str:
    """One line about so many idle seconds."""
    processes = children_of(running.pid)
    if len(processes) != live:
        raise SystemExit(f"{len(processes)} processes are kept, not {live}.")
    all_of_them = [running.pid, *processes]
    before, begin = [cpu_seconds(pid) for pid in all_of_them], time.monotonic()
    time.sleep(seconds)
    spent = time.monotonic() - begin
    used = [cpu_seconds(pid) - was for pid, was in zip(all_of_them, before, strict=True)]
    own, others = (share / spent * 100 for share in (used[0], sum(used[1:])))
    memory = sum(map(pss, processes))
    return (
        f"{live} live: server {running.memory():.1f} MB RSS, {pss(running.pid):.1f} MB PSS, "
        f"CPU {own:.3f} %; its processes {memory:.1f} MB PSS, CPU {others:.2f} %"
    )


def main() -> None:
    """Measure and print."""
    seconds = argument(1, 10)
    print(machine())
    with real_cli() as cli, cli.server("server", SPARE_PROCESSES="0") as running:
        for live in _LIVE:
            with Client(running.port) as client:
                for number in range(live - len(children_of(running.pid))):
                    client.ask(f"[[text {number}]]", str(number))
            wait_for_rest(running.pid)
            print(measure(running, live, seconds))


if __name__ == "__main__":
    main()
