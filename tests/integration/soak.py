"""
The soak: thousands of turns in processes that stay, that are started ahead, and that get lost.

    python -m tests.integration.soak [TURNS] [--seed SEED]

A real daemon runs with the CLI of soak_cli.py.  Conversations in both dialects go on at random, for
longer than their processes stay.  Every client that stays must get exactly the right answer, with
the right figures, from a session that knows all of its own history and nothing else; and when all
is quiet nothing may be left but what is meant to wait.  What happens is drawn from a seed; only the
timing is not.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count as numbers
from pathlib import Path
from typing import Any

from tests.e2e.processes import children_of, processes_with_env, wait_until
from tests.integration import soak_cli
from tests.integration.ship import (
    GROWTH_BYTES,
    PATIENCE,
    Ship,
    cleared,
    program,
    request_bytes,
)
from tests.integration.soak_cli import OWN_COST
from tests.integration.soak_crew import Crew
from tests.integration.soak_plan import (
    SERVER,
    Fields,
    Plan,
    cost_of_turn,
    draw,
    plain,
)
from tests.integration.storm_plan import check_logbook

__all__ = ["soak"]

AT_ONCE = 8
WARM_UP = 200
LIVE, SPARES = 5, 2

SETTINGS = {
    "LOG_LEVEL": "info",
    "LIVE_SESSIONS": str(LIVE),
    "LIVE_IDLE_MS": "2500",
    "SPARE_PROCESSES": str(SPARES),
    "MAX_CONCURRENT_TURNS": "12",
    "CLAUDE_INACTIVITY_TIMEOUT_MS": "30000",
    "PROCESS_KILL_TIMEOUT_MS": "500",
    "IS_SANDBOX": "1",  # lets root skip permissions
}
MCP = json.dumps({"mcpServers": {SERVER: {"command": "light"}}})

WARNINGS = {"live_lost", "open_server", "spare_failed", "sweep"}
"""What may be warned of: what was made to happen."""

BY_CHANCE = {"processes busy with their own", "spares lost", "turns that were begun again"}
"""What needs a meeting of milliseconds, and may not happen in a short soak."""

PIPES = 3
"""Descriptors that the server holds for one process."""


class Harbour(Ship):
    """The daemon; processes may wait there."""

    def in_hand(self) -> dict[str, Any]:
        found = super().in_hand()
        alive = set(found.pop("starts without an exit"))
        children = set(found.pop("children"))
        found["processes that are gone"] = alive - children
        found["processes that nobody knows"] = children - alive - set(children_of_all(alive))
        found["marked processes"] -= children
        found["too many processes"] = sorted(alive) if len(alive) > LIVE + SPARES else []
        if len(found["files of the run"]) <= len(alive):
            found["files of the run"] = []
        return found

    def wait_for_rest(self, descriptors: Counter[str]) -> dict[str, int]:
        """
        Wait until no turn is under way, and nothing is left but processes that wait.

        @param descriptors: what is held without them.
        @return: what it holds by its own account.
        """
        held = self.wait_for_calm(descriptors + Counter({"pipe": PIPES * (LIVE + SPARES)}))

        def fits() -> bool:
            alive = len(self.journal.processes)
            return self.descriptors["pipe"] - descriptors["pipe"] == PIPES * alive

        wait_until(fits, "as many pipes as processes", PATIENCE)
        return held


def children_of_all(pids: set[int]) -> Iterator[int]:
    """What agents have started themselves."""
    for pid in pids:
        yield from children_of(pid)


class Soak:
    """One soak, from its first turn to its last."""

    def __init__(self, ship: Harbour, seed: int) -> None:
        self.ship = ship
        self.crew = Crew(ship)
        self.calm: list[int] = []
        self.listed = 0
        self._chance = random.Random(seed)
        self._others = numbers(1)
        self._descriptors: Counter[str] = Counter()

    def run(self, plans: list[Plan]) -> None:
        """All watches, with a lull after each."""
        self.ship.wait_for_record("cli_found")
        self._descriptors = self.ship.descriptors
        size = min(100, max(50, len(plans) // 20))
        done = 0
        for number, start in enumerate(range(0, len(plans), size)):
            watch = plans[start : start + size]
            with ThreadPoolExecutor(AT_ONCE) as pool:
                said = [*pool.map(self.crew.attempt, watch)]
            # New sessions of one kind, for which processes are started ahead then.
            kind = {"model": f"claude-{number}"}
            said += [self.crew.attempt(self._extra(kind)) for _ in range(4)]
            failed = [one for one in said if one]
            assert not failed, f"{len(failed)} of {len(said)}: {failed[:5]}"
            done += len(said)
            self._lull(number, kind, measured=done >= WARM_UP)

    def _extra(self, fields: Fields, act: str = "") -> Plan:
        number = next(self._others)
        plan = plain(self._chance, f"m{number}", "good", "stream", 10**6 + 2 * number + 1)
        return replace(plan, fields=fields, act=act, number=signal.SIGKILL)

    def _lull(self, number: int, kind: Fields, *, measured: bool) -> None:
        """Check that all is well, let processes be started ahead, and do things to them."""
        ship, crew = self.ship, self.crew
        ship.wait_for_rest(self._descriptors)
        if measured:
            self.calm.append(ship.memory)
        wanted = 1 + number % 2
        wait_until(lambda: len(crew.spares()) >= wanted, "spares", PATIENCE)
        act = ("", "edit", "kill", "race", "reload")[number % 5]
        if act == "edit":
            crew.edition = f"edition {number:04}"
            path = ship.base / "shared_workspace" / soak_cli.INSTRUCTIONS
            path.write_text(crew.edition)
        elif act == "kill":
            crew.kill_some(crew.spares(), self._chance)
            crew.kill_some(set(ship.journal.processes), self._chance)
        elif act == "reload":
            ship.reload(MCP, "mcp_reloaded")
        with ThreadPoolExecutor(2) as pool:
            firsts = [self._extra(kind, "spare_kill" if act == "race" else "") for _ in range(2)]
            failed = [one for one in pool.map(crew.attempt, firsts) if one]
        assert not failed, failed

    def finish(self) -> dict[str, int]:
        """Check all that shows only in the end; say how often what happened."""
        ship, crew = self.ship, self.crew
        ship.wait_for_rest(self._descriptors)
        self._attribute()
        self._check_list()
        for session in sorted(crew.deleted)[:30]:
            crew.check_ghost(session)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            sessions = sorted(self._sessions())
            final = dict(zip(sessions, pool.map(self._call, sessions), strict=True))
        check_logbook(crew.entries, final)
        collisions = ship.folder / "config" / "sessions" / "collisions"
        assert not collisions.exists(), collisions.read_text()
        wait_until(lambda: not ship.held()["live"], "the end of all that waits", PATIENCE)
        held = ship.wait_for_rest(self._descriptors)
        assert held["live"] == 0
        self.calm.append(ship.memory)
        ship.check_log({})
        warnings = {r["type"] for r in ship.journal.all() if r.get("level") == "warn"}
        assert warnings <= WARNINGS, warnings
        lost = {record["pid"] for record in ship.journal.of("live_lost")}
        assert lost <= crew.killed, "processes were lost that nobody has killed"
        return self._tally()

    def _attribute(self) -> None:
        """Find out, from the log, of what became of turns whose clients did not learn it."""
        started = self._started()
        for entry in self.crew.entries:
            session = started.get(entry.token)
            if session is not None:
                assert entry.session in (None, session), (entry, session)
                entry.session = session

    def _started(self) -> dict[str, str]:
        """The session of each turn that was begun."""
        starts = self.ship.journal.of("turn_start")
        return {record["request_id"]: record["session_id"] for record in starts}

    def _sessions(self) -> set[str]:
        """The sessions that there must be."""
        return set(self._started().values()) - self.crew.deleted

    def _check_list(self) -> None:
        """The sessions that are remembered are those, each with what its turns have cost."""
        costs: Counter[str] = Counter()
        ends: Counter[str] = Counter()
        paid: dict[str, float] = {}
        for record in self.ship.journal.of("turn_end"):
            session = record["session_id"]
            ends[session] += 1
            if record["outcome"] in ("success", "limit"):
                costs[session] += 1
                cost = cost_of_turn(self.crew.plans[record["request_id"]])
                paid[session] = paid.get(session, 0.0) + cost
        listed = {one["id"]: one for one in self._listed()}
        wanted = self._sessions()
        assert wanted <= set(listed), wanted - set(listed)
        # A client that leaves at the last moment before its process starts has a session, too.
        for session in set(listed) - wanted:
            assert ends[session] == 1, f"nobody has asked for {session}"
            assert costs[session] == 0
        self.listed = len(listed)
        for session, told in listed.items():
            cost = paid.get(session, 0.0) + told["own_turns"] * OWN_COST
            assert abs(told["cost_usd"] - cost) < 1e-8, (told, cost)
            assert costs[session] <= told["turns"] <= ends[session], (told, ends[session])
            assert told["state"] in ("live", "idle")

    def _listed(self) -> Iterator[Fields]:
        following: str | None = ""
        while following is not None:
            path = f"/api/sessions?limit=100&before={following}"
            answer = self.ship.ask(request_bytes(b"", "list", method="GET", path=path))
            assert answer.status == 200, answer
            yield from answer.json["sessions"]
            following = answer.json["next"]

    def _call(self, session: str) -> list[str]:
        """Use a session once more: nobody holds it; return what it knew before."""
        plan = replace(self._extra({}), dialect="whole")
        self.crew.plans[plan.token] = plan
        answer = self.ship.ask(request_bytes(plan.native(session), plan.token))
        assert answer.status == 200, answer
        told: list[str] = json.JSONDecoder().raw_decode(answer.json["result"])[0]["told"]
        assert told.pop() == plan.token
        return told

    def _tally(self) -> dict[str, int]:
        """How often what happened that was meant to."""
        journal, done = self.ship.journal, self.crew.done
        starts = journal.of("turn_start")
        spares = {record["pid"] for record in journal.of("spare_started")}
        dropped = Counter(record["reason"] for record in journal.of("live_dropped"))
        tries = Counter(record["request_id"] for record in starts)
        turns = journal.of("turn_end")
        return {
            "turns": len(turns),
            "sessions": len(self._sessions()),
            "turns in a process that had others": sum(
                record["process"] == "live" for record in starts
            ),
            "turns in a process started ahead": sum(
                record["process"] != "live" and record["pid"] in spares for record in starts
            ),
            "turns that were begun again": sum(number > 1 for number in tries.values()),
            "processes that gave way": dropped["others were used more recently"],
            "processes idle for too long": dropped["it was idle for too long"],
            "processes ended for another setup": sum(
                number for reason, number in dropped.items() if "wants another" in reason
            ),
            "processes busy with their own": sum(
                number for reason, number in dropped.items() if "its own" in reason
            ),
            "processes lost while they waited": len(journal.of("live_lost")),
            "spares ended for what they had read": sum(
                record["reason"] == "what it has read is old"
                for record in journal.of("spare_dropped")
            ),
            "spares lost": len(journal.of("spare_failed")),
            "events between turns": sum(r["count"] for r in journal.of("background_events")),
            "interrupts": done["interrupts"],
            "deletes": done["deletes"],
            "clients that left": done["left"],
            "turns killed": sum(record["outcome"] == "cli_failed" for record in turns),
            "forks": sum(entry.source is not None for entry in self.crew.entries),
            "histories rewound": done["rewound"],
            "settings inherited": done["inherited"],
            "meetings in a session": done["meetings"],
        }


def soak(folder: Path, turns: int, seed: int) -> dict[str, int]:
    """
    Soak a daemon of its own.

    @param folder: empty; all of it happens there.
    @return: how often what happened.
    @raise AssertionError: something was not right, or something that was meant to happen did not.
    """
    ship = Harbour(folder, program(soak_cli.__name__), SETTINGS, MCP)
    with cleared(folder), ship:
        running = Soak(ship, seed)
        try:
            running.run(draw(seed, turns))
            tally = running.finish()
        finally:
            (folder / "log").write_text("\n".join(ship.journal))
        memory = [f"{size / 1e6:.1f} MB" for size in running.calm]
        print("memory in each calm:", *memory)  # noqa: T201 - how near the limit
        assert max(running.calm) - running.calm[0] <= GROWTH_BYTES, memory
    assert ship.returncode == -signal.SIGTERM
    assert processes_with_env(str(folder)) == []
    _check_database(ship, running.listed, len(running.crew.deleted))
    missed = {name for name, number in tally.items() if not number} - BY_CHANCE
    assert not missed, f"this has not happened: {missed}"
    return tally


def _check_database(ship: Ship, sessions: int, deleted: int) -> None:
    """Check that the store has the rows that it must have, and no others."""
    path = ship.state / "state.sqlite3"
    with sqlite3.connect(path) as connection:
        rows = {
            table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("sessions", "aliases", "deleted")
        }
    assert rows == {"sessions": sessions, "aliases": 0, "deleted": deleted}, rows


def main() -> None:
    """Soak, and tell."""
    parser = argparse.ArgumentParser(prog="python -m tests.integration.soak")
    parser.add_argument("turns", nargs="?", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="a new one, where all of it happens; it stays")
    given = parser.parse_args()
    begin = time.monotonic()
    if given.folder is not None:
        given.folder.mkdir()
        tally = soak(given.folder.resolve(), given.turns, given.seed)
    else:
        with tempfile.TemporaryDirectory() as folder:
            tally = soak(Path(folder), given.turns, given.seed)
    told = [f"{number:6} {name}" for name, number in tally.items()]
    told.append(f"all is well after {time.monotonic() - begin:.0f} s (seed {given.seed})")
    print(*told, sep="\n")  # noqa: T201 - it is a program


if __name__ == "__main__":
    main()
