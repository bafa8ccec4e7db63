"""
A daemon for thousands of turns: what its log says while it is written, and what it has in hand.

Whatever turns leave behind shows here: processes, descriptors, files, leases, memory.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.e2e.daemon import Daemon
from tests.e2e.processes import children_of, processes_with_env, wait_until
from tests.support import Answer, parse_answers

__all__ = [
    "GROWTH_BYTES",
    "PATIENCE",
    "Journal",
    "Ship",
    "cleared",
    "program",
    "read_all",
    "read_for",
    "request_bytes",
    "reset",
]

GROWTH_BYTES = 5 * 1024 * 1024

PATIENCE = 60.0
"""Seconds after which a client, or the test, gives up.  Nothing here takes that long."""

_CHECKOUT = Path(__file__).resolve().parents[2]

# Run by the daemon's interpreter before all else.  Objects that refer to each other are freed when
# its collector gets to them, after some hundred turns, and glibc keeps what was freed for the next
# peak: without these two the memory would tell what was once needed, and not what is held.
_ON_SIGNAL = """
import ctypes, gc, json, os, signal

def tell(*_):
    gc.unfreeze()
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    for one in gc.get_objects():
        if type(one).__name__ == "Executor":
            around = one.context
            held = {
                "turns": one.running,
                "leases": around.leases.held,
                "slots": around.capacity.running,
                "live": around.pool.waiting,
                "spares": around.spares.waiting,
            }
            with open(os.environ["SHIP_TOLD"] + ".new", "w") as file:
                json.dump(held, file)
            os.replace(file.name, os.environ["SHIP_TOLD"])

signal.signal(signal.SIGUSR2, tell)
"""


class Journal(deque[str]):
    """
    The daemon's log, understood as it is written.

    @ivar processes: agent processes that have begun and not ended.
    @ivar strays: those that ended without having begun.
    """

    def __init__(self) -> None:
        super().__init__()
        self.processes: set[int] = set()
        self.strays: list[int] = []
        self._records: dict[str, list[dict[str, Any]]] = {}
        self._changed = threading.Condition()

    def append(self, line: str) -> None:
        record: dict[str, Any] = (
            json.loads(line) if line.startswith("{") else {"type": "no JSON", "line": line}
        )
        super().append(line)
        with self._changed:
            self._records.setdefault(record["type"], []).append(record)
            if record["type"] in ("turn_start", "spare_started"):
                self.processes.add(record["pid"])
            elif record["type"] == "process_exit":
                if record["pid"] not in self.processes:
                    self.strays.append(record["pid"])
                self.processes.discard(record["pid"])
            self._changed.notify_all()

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The records of one type so far."""
        with self._changed:
            return list(self._records.get(kind, []))

    def all(self) -> list[dict[str, Any]]:
        """All records so far, by their types."""
        with self._changed:
            return [record for records in self._records.values() for record in records]

    def wait_for(self, kind: str, token: str) -> dict[str, Any]:
        """The first such record of a turn, waited for."""

        def look() -> dict[str, Any] | None:
            records = self._records.get(kind, [])
            return next((r for r in records if r.get("request_id") == token), None)

        with self._changed:
            found = self._changed.wait_for(look, PATIENCE)
        assert found, f"{token}: no record {kind}"
        return found


class Ship(Daemon):
    """The daemon, and what can be seen of it from outside."""

    def __init__(self, folder: Path, cli: str, settings: Mapping[str, str], mcp: str) -> None:
        """
        @param cli: how its CLI is called.
        @param settings: by their environment variables.
        @param mcp: its MCP configuration.
        """
        super().__init__(
            folder, "claude", "http://127.0.0.1:9", env={**settings, "CLAUDE_CLI": cli}
        )
        self.journal = self.lines = Journal()
        self.cwd.mkdir()
        site = folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(_ON_SIGNAL)
        path = [str(site), self.environment.get("PYTHONPATH", "")]
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        self._told = folder / "told.json"
        self.environment["SHIP_TOLD"] = str(self._told)
        self._write_mcp(mcp)

    def records(self, type: str | None = None, **fields: Any) -> list[dict[str, Any]]:  # noqa: A002  (as in Daemon)
        found = self.journal.all() if type is None else self.journal.of(type)
        return [r for r in found if all(r.get(name) == value for name, value in fields.items())]

    def _write_mcp(self, text: str) -> None:
        new = self.cwd / "mcp-config.new"
        new.write_text(text)
        new.rename(self.cwd / "mcp-config.json")

    def reload(self, text: str, expected: str) -> None:
        """Have another MCP configuration read, and wait for this record of it."""
        before = len(self.journal.of(expected))
        self._write_mcp(text)
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(self.journal.of(expected)) > before, expected, PATIENCE)

    def connect(self, *, narrow: bool = False) -> socket.socket:
        """A connection; a narrow one takes little at once."""
        client = socket.socket()
        if narrow:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(PATIENCE)
        client.connect(("127.0.0.1", self.port))
        return client

    def ask(self, request: bytes) -> Answer:
        """The one answer on a connection of its own."""
        with self.connect() as client:
            client.sendall(request)
            [answer] = parse_answers(read_all(client), closed=True)
        return answer

    def signal_child(self, pid: int, number: signal.Signals) -> None:
        """Signal a child of the daemon; nobody, if it is gone."""
        with suppress(OSError):
            held = os.pidfd_open(pid)
            try:
                parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) == self.pid:
                    signal.pidfd_send_signal(held, number)
            finally:
                os.close(held)

    @property
    def memory(self) -> int:
        """What is resident, in bytes."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def held(self) -> dict[str, int]:
        """What it holds by its own account; all that can be freed is freed before."""
        self._told.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR2)
        wait_until(self._told.exists, "its account of what it holds")
        found: dict[str, int] = json.loads(self._told.read_text())
        return found

    @property
    def descriptors(self) -> Counter[str]:
        """What it holds: files by name, sockets and pipes by kind."""
        found: Counter[str] = Counter()
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(OSError):
                found[re.sub(r":\[\d+\]$", "", str(link.readlink()))] += 1
        return found

    def in_hand(self) -> dict[str, Any]:
        """All that turns have left, or not yet ended."""
        requests, ends = (
            Counter(record["request_id"] for record in self.journal.of(kind))
            for kind in ("request", "turn_end")
        )
        return {
            "turns without an end": requests - ends,
            "turns with two ends": ends - requests,
            "starts without an exit": sorted(self.journal.processes),
            "exits without a start": list(self.journal.strays),
            "children": children_of(self.pid),
            "marked processes": set(processes_with_env(str(self.folder))) - {self.pid},
            "files of the run": list((self.state / "run").iterdir()),
            "temporary files": list((self.folder / "tmp").iterdir()),
        }

    def wait_for_calm(self, descriptors: Counter[str]) -> dict[str, int]:
        """
        Wait until nothing is left of any turn, and no descriptor but these.

        @return: what it holds by its own account, see L{held}.
        """

        def left() -> dict[str, Any]:
            found = {**self.in_hand(), "descriptors": self.descriptors - descriptors}
            return {name: value for name, value in found.items() if value}

        try:
            wait_until(lambda: not left(), "calm", PATIENCE)
        except AssertionError:
            raise AssertionError(f"This is left: {left()}") from None
        held = self.held()
        assert [held[name] for name in ("turns", "leases", "slots")] == [0, 0, 0], held
        return held

    def check_log(self, expected: Mapping[str, int]) -> None:
        """
        Check that nothing went wrong that was not made to.

        @param expected: types of records that are errors, and how many there are.
        """
        records = self.journal.all()
        errors = Counter(record["type"] for record in records if record.get("level") == "error")
        assert errors == expected
        assert [record for record in records if "traceback" in record] == []
        assert self.journal.of("no JSON") == []
        assert "Unhandled" not in self.output
        assert list(self.stderr_lines) == []


def program(module: str) -> str:
    """How a CLI is called that is the function `main` of a module here; quick to start."""
    start = f"import sys; sys.path.insert(0, {str(_CHECKOUT)!r}); from {module} import main; main()"
    return shlex.join([sys.executable, "-I", "-S", "-c", start])


@contextmanager
def cleared(folder: Path) -> Iterator[Path]:
    """A folder; what still runs on behalf of it in the end is killed, should all have failed."""
    try:
        yield folder
    finally:
        for pid in processes_with_env(str(folder)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def request_bytes(
    body: object,
    token: str,
    *,
    method: str = "POST",
    path: str = "/api/claude",
    version: str = "1.1",
    headers: tuple[str, ...] = (),
) -> bytes:
    """A request, the last one on its connection."""
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [
        f"{method} {path} HTTP/{version}",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(encoded)}",
        f"X-Request-Id: {token}",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + encoded


def read_all(client: socket.socket, look: Callable[[bytes], object] | None = None) -> bytes:
    """Everything up to the end; `look` sees the beginning as it grows."""
    received = bytearray()
    while data := client.recv(1 << 16):
        received += data
        if look is not None:
            look(bytes(received[:4096]))
    return bytes(received)


def read_for(client: socket.socket, seconds: float) -> bytes:
    """What comes in so many seconds."""
    received, end = b"", time.monotonic() + seconds
    with suppress(TimeoutError):
        while (left := end - time.monotonic()) > 0:
            client.settimeout(left)
            data = client.recv(1 << 12)
            received += data
            if not data:
                break
    return received


def reset(client: socket.socket) -> None:
    """Close a connection without farewell."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
