"""
The storm: many turns at once through children, clients and signals that misbehave at random.

A real daemon runs with the CLI of storm_cli.py.  Every client that stays must get exactly the right
answer or the right failure, and when all is quiet nothing may be left.  What happens is drawn from
a seed; only the timing is not.  Two variables of the environment ask for other weather:

STORM_SEED   the seed: another one draws other turns
STORM_TURNS  how many turns, 500 without it; some 20,000 take half an hour and show slower leaks
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests.e2e.processes import processes_with_env
from tests.integration import storm_cli
from tests.integration.ship import (
    GROWTH_BYTES,
    Ship,
    cleared,
    program,
    read_all,
    read_for,
    request_bytes,
    reset,
)
from tests.integration.storm_plan import (
    INACTIVITY_SECONDS,
    SERVER,
    TOTAL_SECONDS,
    Entry,
    Plan,
    check_logbook,
    draw,
    judge,
)
from tests.support import Answer, parse_answers

AT_ONCE = 16
WARM_UP = 100
SETTINGS = {
    "LOG_LEVEL": "info",
    "LIVE_SESSIONS": "0",
    "CLAUDE_INACTIVITY_TIMEOUT_MS": str(INACTIVITY_SECONDS * 1000),
    "CLAUDE_TOTAL_TIMEOUT_MS": str(TOTAL_SECONDS * 1000),
    "PROCESS_KILL_TIMEOUT_MS": "500",
    "CLIENT_STALL_TIMEOUT_MS": "3000",
    "MAX_BODY_BYTES": str(4 * 1024 * 1024),
}

MCP = json.dumps({"mcpServers": {SERVER: {"command": "light"}}})


def kept_alive(request: bytes) -> bytes:
    """The same request, but not the last one."""
    return request.replace(b"Connection: close\r\n", b"", 1)


def read_slowly(client: socket.socket, chance: random.Random) -> bytes:
    """Everything, in bites, with breaks that add up to a second or two."""
    received, breaks = bytearray(), 0.0
    while data := client.recv(chance.choice([1, 100, 4096, 1 << 16])):
        received += data
        if breaks < 1.5:
            pause = chance.uniform(0, 0.01)
            time.sleep(pause)
            breaks += pause
    return bytes(received)


def call(ship: Ship, session: str | None) -> list[str]:
    """A turn that is nothing special; the tokens that its session knew before."""
    order = {"token": "call", "do": "good", "size": 10, "piece": 10}
    body = {"prompt": json.dumps(order), "session-id": session, "stream": False}
    answer = ship.ask(request_bytes(body, f"call-{session}"))
    assert answer.status == 200, (session, answer)
    told: list[str] = answer.json["told"]
    assert told.pop() == order["token"]
    return told


class Crew:
    """The clients of one storm."""

    def __init__(self, ship: Ship) -> None:
        self.entries: list[Entry] = []
        self._ship = ship
        self._sessions: dict[int, str] = {}
        self._clients: dict[str, Callable[[Plan, bytes], Answer | str | None]] = {
            "half_closes": self._half_closes,
            "leaves": self._leaves,
            "pipelined": self._pipelined,
            "slowly": self._slowly,
            "stalls": self._stalls,
        }

    def attempt(self, plan: Plan) -> str:
        """Perform one turn; say what was wrong with it."""
        try:
            self._sail(plan)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
            return f"{plan.token} ({plan.order['do']} {plan.client} {plan.hit}): {error!r}"
        return ""

    def _sail(self, plan: Plan) -> None:
        """Perform one turn and judge what comes of it."""
        known = self._sessions.get(plan.voyage)
        fork = bool(known and plan.fields["fork"])
        entry = Entry(
            plan.token,
            session=None if fork else known,
            source=known if fork else None,
            started=time.monotonic(),
        )
        self.entries.append(entry)
        version = "1.0" if plan.client == "old" else "1.1"
        request = request_bytes(plan.body(known), plan.token, version=version)
        try:
            answer = self._clients.get(plan.client, self._stays)(plan, request)
            if isinstance(answer, str):
                self._learn(plan, entry, answer)
            elif answer is not None:
                self._learn(plan, entry, answer.headers["x-claude-session-id"])
                end = judge(plan, answer)
                entry.begun = answer.status == 200
                entry.told = end.get("told", [])
        finally:
            entry.ended = time.monotonic()

    def _learn(self, plan: Plan, entry: Entry, session: str) -> None:
        assert entry.session in (None, session), "another session has answered"
        entry.session = self._sessions[plan.voyage] = session

    # How clients behave.  They return an answer that is to be judged, or what they know of the
    # session, or nothing.

    def _stays(self, plan: Plan, request: bytes) -> Answer:
        watcher = None
        seen: list[bytes] = []

        def look(received: bytes) -> None:
            if not seen and (found := re.search(rb'"pid": (\d+),', received)):
                seen.append(found[1])
                self._hit(plan, int(found[1]))

        if plan.hit == "early" or (plan.hit and plan.client == "whole"):
            watcher = threading.Thread(target=self._hit_unseen, args=(plan,))
            watcher.start()
        with self._ship.connect() as client:
            client.sendall(request)
            received = read_all(client, look if plan.hit and watcher is None else None)
        if watcher is not None:
            watcher.join()
        [answer] = parse_answers(received, closed=True)
        return answer

    def _slowly(self, plan: Plan, request: bytes) -> Answer:
        third = len(request) // 3 + 1
        with self._ship.connect(narrow=True) as client:
            for start in range(0, len(request), third):
                client.sendall(request[start : start + third])
                time.sleep(0.01)
            [answer] = parse_answers(read_slowly(client, plan.chance), closed=True)
        return answer

    def _pipelined(self, plan: Plan, request: bytes) -> Answer:
        """Four requests at once; the answers come in their order."""
        health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        bad = kept_alive(request_bytes(b"{", "bad"))
        with self._ship.connect() as client:
            client.sendall(kept_alive(request) + health + bad + request_bytes(b"[]", "last"))
            answer, *others = parse_answers(read_all(client), closed=True)
        assert [other.status for other in others] == [200, 400, 400]
        assert others[0].json["checks"]["claudeCli"]["status"] == "healthy"
        return answer

    def _leaves(self, plan: Plan, request: bytes) -> str | None:
        """At any moment: within its request, before the answer or within it."""
        chance = plan.chance
        received = b""
        with self._ship.connect() as client:
            if chance.random() < 0.2:
                client.sendall(request[: chance.randrange(len(request))])
            else:
                client.sendall(request)
                received = read_for(client, chance.choice([0, 0.02, 0.1, 0.2, 1]))
            if chance.random() < 0.5:
                reset(client)
        head = re.search(rb"X-Claude-Session-Id: (\S+)\r\n", received, re.IGNORECASE)
        return head[1].decode() if head is not None else None

    def _half_closes(self, plan: Plan, request: bytes) -> None:
        """It says that nothing more will come: for this server it has left."""
        with self._ship.connect() as client, suppress(ConnectionResetError):
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            read_all(client)

    def _stalls(self, plan: Plan, request: bytes) -> None:
        """It reads nothing, and is let go."""
        with self._ship.connect(narrow=True) as client:
            client.sendall(request)
            self._ship.journal.wait_for("client_stalled", plan.token)
            with suppress(ConnectionResetError):
                read_all(client)
                raise AssertionError("the client that stalled was not let go")

    # Signals.

    def _hit(self, plan: Plan, pid: int) -> None:
        """The child has begun to answer."""
        if plan.hit == "kill":
            self._ship.signal_child(pid, plan.number)
            return
        self._ship.signal_child(pid, signal.SIGSTOP)
        if plan.hit == "pause":
            time.sleep(plan.chance.uniform(0, 0.5))
            self._ship.signal_child(pid, signal.SIGCONT)

    def _hit_unseen(self, plan: Plan) -> None:
        """At any moment from the child's start on, or while it says nothing for ever."""
        self._ship.journal.wait_for("turn_start", plan.token)
        time.sleep(plan.chance.uniform(0, 0.3) if plan.hit == "early" else 1)
        # A session that was taken for new, and is not, is started twice.
        start = self._ship.records("turn_start", request_id=plan.token)[-1]
        self._ship.signal_child(start["pid"], plan.number)

    # The end.

    def call_at_every_port(self) -> dict[str, list[str]]:
        """Use every session once more: nobody holds it; return what each of them knows."""
        sessions = {entry.session for entry in self.entries if entry.session is not None}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return dict(zip(sessions, pool.map(partial(call, self._ship), sessions), strict=True))


# Requests that are no turns.

BAD_BODIES: list[tuple[Any, int, str]] = [
    (b"{", 400, "invalid_json"),
    (b"\xff" * 5000, 400, "invalid_json"),
    ([], 400, "invalid_json"),
    ({}, 400, "invalid_value"),
    ({"prompt": " "}, 400, "invalid_value"),
    ({"prompt": 7}, 400, "invalid_value"),
    ({"prompt": "x", "allowed_tools": ["Bash"]}, 400, "invalid_value"),
    ({"prompt": "x", "session-id": "mine"}, 400, "invalid_value"),
    ({"prompt": "x", "workspace": "../../etc"}, 400, "invalid_value"),
    ({"prompt": "x", "mcp-allowed-tools": ["mcp__pirate__rob"]}, 400, "invalid_value"),
    ({"prompt": "x", "session-id": str(uuid4())}, 404, "session_not_found"),
    ({"prompt": "x" * (5 * 1024 * 1024)}, 413, "request_too_large"),
]
BAD_REQUESTS: list[tuple[bytes, int, str]] = [
    (
        request_bytes({}, "x").replace(b"application/json", b"text/plain"),
        415,
        "unsupported_media_type",
    ),
    (request_bytes({}, "x").replace(b"localhost", b"sirens.example"), 403, "origin_not_allowed"),
    (request_bytes({}, "x").replace(b"/api/claude", b"/api/atlantis"), 404, "not_found"),
    (request_bytes({}, "x").replace(b"POST", b"PUT"), 405, "method_not_allowed"),
]


def send_nonsense(ship: Ship, chance: random.Random) -> None:
    """What no server should be asked; it answers each truthfully, or not at all."""
    body, *expected = chance.choice(BAD_BODIES)
    request, *also_expected = chance.choice(BAD_REQUESTS)
    answers = [ship.ask(request_bytes(body, "nonsense")), ship.ask(request)]
    assert [[a.status, a.error["code"]] for a in answers] == [expected, also_expected], answers
    for garbage in (chance.randbytes(3000), b"\r\n" * 9, b"POST /api/claude HTTP/1.1\r\nHost: "):
        with ship.connect() as client:
            client.sendall(garbage)
            received = read_for(client, chance.uniform(0, 0.1))
            assert received[:12] in (b"", b"HTTP/1.1 400"), received


class Weather:
    """What goes on beside the turns: reloads, nonsense, and a look at the memory."""

    def __init__(self, ship: Ship, chance: random.Random) -> None:
        self.peak = 0
        self.reloads = 0
        self._ship = ship
        self._chance = chance
        self._over = threading.Event()

    @contextmanager
    def blowing(self) -> Iterator[None]:
        self._over.clear()
        with ThreadPoolExecutor(1) as pool:
            blown = pool.submit(self._blow)
            try:
                yield
            finally:
                self._over.set()
                blown.result()

    def _blow(self) -> None:
        while not self._over.wait(0.3):
            self.peak = max(self.peak, self._ship.memory)
            send_nonsense(self._ship, self._chance)
            # In between, turns with MCP servers go on with the configuration read before.
            self._ship.reload('{"mcpServers": {"x": 7}}', "mcp_reload_failed")
            self._ship.reload(MCP, "mcp_reloaded")
            self.reloads += 1


def watches(plans: list[Plan]) -> Iterator[list[Plan]]:
    """The turns in portions, after each of which all is to be calm."""
    yield plans[:WARM_UP]
    rest = plans[WARM_UP:]
    size = max(200, len(rest) // 10)
    for start in range(0, len(rest), size):
        yield rest[start : start + size]


def test_a_storm_is_weathered(tmp_path: Path) -> None:
    seed = int(os.environ.get("STORM_SEED", "1"))
    count = int(os.environ.get("STORM_TURNS", "500"))
    calm: list[int] = []
    with cleared(tmp_path), Ship(tmp_path, program(storm_cli.__name__), SETTINGS, MCP) as ship:
        crew, weather = Crew(ship), Weather(ship, random.Random(seed))
        ship.wait_for_record("cli_found")
        call(ship, None)
        descriptors = ship.descriptors
        for watch in watches(draw(seed, count)):
            with weather.blowing(), ThreadPoolExecutor(AT_ONCE) as pool:
                failed = [said for said in pool.map(crew.attempt, watch) if said]
            assert not failed, f"STORM_SEED={seed}, {len(failed)} of {len(watch)}: {failed[:5]}"
            ship.wait_for_calm(descriptors)
            calm.append(ship.memory)
        assert not (tmp_path / "config" / "sessions" / "collisions").exists()
        check_logbook(crew.entries, crew.call_at_every_port())
        ship.wait_for_calm(descriptors)
        calm.append(ship.memory)
        memory = [f"{size / 1e6:.1f} MB" for size in (*calm, weather.peak)]
        print("memory in each calm, and at most:", *memory)  # noqa: T201 - how near the limit
        assert max(calm) - calm[0] <= GROWTH_BYTES, memory
        ship.check_log({"mcp_reload_failed": weather.reloads})
    assert ship.returncode == -signal.SIGTERM
    assert processes_with_env(str(tmp_path)) == []
