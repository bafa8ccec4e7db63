"""What the server lives through: signals, a crash, and a system that has nothing left to give."""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.daemon import Daemon, children_of, processes_with_env, sse_events, wait_until
from tests.integration.server import is_alive, write_cli

ALICE, BOB = "sk-alice-0123456789", "sk-bob-0123456789"
BEARER = {"authorization": f"Bearer {ALICE}"}

CLI = """
append("starts", json.dumps([SESSION, "--resume" in OPTIONS, os.getcwd()]))
prompt = message()
if prompt.startswith("stubborn"):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    nap = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(300)"]
    away = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "start_new_session": True}
    children = [subprocess.Popen(nap), subprocess.Popen(nap, **away)]
    if prompt == "stubborn":
        write(INIT)
    pids = [os.getpid(), *(child.pid for child in children)]
    append("stubborn", " ".join(map(str, pids)))
    while True:
        time.sleep(300)
write(INIT)
if prompt == "wait":
    tell("waiting", SESSION)
    while not os.path.exists(os.path.join(FOLDER, "go")):
        time.sleep(0.02)
write(RESULT)
leave()
"""
"""
Answers; or waits for the test's word; or hears nothing, neither signals nor the end of its input,
with a child that holds its stdout and one that has gone into a session of its own.
"""

QUICK = {"DRAIN_TIMEOUT_MS": "300", "PROCESS_KILL_TIMEOUT_MS": "500"}
LADDER = 0.3 + 1.0 + 1.0 + 0.5
"""Seconds until the last stubborn child is killed: drain, interrupt, end of input, TERM."""

MCP = '{"mcpServers": {"github": {"command": "x", "env": {"TOKEN": "very-secret"}}}}'
TOOL: dict[str, Any] = {"mcp_allowed_tools": ["mcp__github__x"]}


class Served(Daemon):
    """A daemon with the CLI above."""

    def __init__(self, folder: Path, *args: str, **env: str) -> None:
        own = {"CLAUDE_CLI": write_cli(folder, CLI), "LIVE_SESSIONS": "0", **env}
        super().__init__(folder, "claude", "http://127.0.0.1:9", env=own, args=args)

    @property
    def starts(self) -> list[tuple[str, bool, Path]]:
        """Of each start of a CLI: the session, whether it was resumed, and where."""
        path = self.folder / "starts"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(session, resumed, Path(cwd)) for session, resumed, cwd in map(json.loads, lines)]

    @property
    def stubborn(self) -> list[int]:
        """The processes that hear nothing."""
        path = self.folder / "stubborn"
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def ask(self, prompt: str = "hi", **fields: Any) -> httpx.Response:
        """A turn as a whole."""
        body = {"prompt": prompt, "stream": False}
        body |= {name.replace("_", "-"): value for name, value in fields.items()}
        with self.client(headers=BEARER) as client:
            return client.post("/api/claude", json=body)

    def answers(self, prompt: str = "hi", **fields: Any) -> str:
        """Have a turn run to its good end; its session."""
        response = self.ask(prompt, **fields)
        assert response.status_code == 200, response.text
        assert response.json()["result"] == "done"
        return response.headers["x-claude-session-id"]

    @contextmanager
    def waiting_turn(self) -> Iterator[Iterator[dict[str, Any]]]:
        """A turn that runs until the test gives its word; its events."""
        (self.folder / "go").unlink(missing_ok=True)
        with (
            self.client(headers=BEARER) as client,
            client.stream("POST", "/api/claude", json={"prompt": "wait"}) as response,
        ):
            assert response.status_code == 200
            events = sse_events(response)
            assert next(events)["subtype"] == "init"
            yield events

    def release(self) -> None:
        """Let that turn end."""
        (self.folder / "go").touch()

    def descriptors(self) -> int:
        """How many files it holds open."""
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    def settled(self) -> int:
        """How many files it holds open when nothing goes on in it."""
        wait_until(lambda: not children_of(self.pid), "all turns are over")
        counts = [self.descriptors()]
        while len(counts) < 5 or len(set(counts[-5:])) > 1:
            time.sleep(0.02)
            counts.append(self.descriptors())
        return counts[-1]

    def limit_descriptors(self, limit: int) -> None:
        """Let it open no file beyond so many."""
        _, hard = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (min(limit, hard), hard))

    def state_of(self, session: str) -> str:
        """What the database says of a session."""
        with closing(sqlite3.connect(self.state / "state.sqlite3")) as database:
            query = "SELECT state FROM sessions WHERE id = ?"
            return "".join(state for (state,) in database.execute(query, [session]))

    @contextmanager
    def short_files(self, limit: int) -> Iterator[None]:
        """Let it, and what it starts meanwhile, write no file beyond so many bytes."""
        before = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (limit, before[1]))
        yield
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, before)

    def cpu_seconds(self) -> float:
        """What it has computed so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Asking(threading.Thread):
    """A client that waits for its answer."""

    def __init__(self, daemon: Served, **fields: Any) -> None:
        super().__init__(daemon=True)
        self._daemon = daemon
        self._fields = {name.replace("_", "-"): value for name, value in fields.items()}
        self.status = 0
        self.headers = httpx.Headers()
        self.last: dict[str, Any] = {}
        self.start()

    def run(self) -> None:
        with (
            suppress(httpx.TransportError),  # the server may crash
            self._daemon.client(headers=BEARER) as client,
            client.stream("POST", "/api/claude", json=self._fields) as response,
        ):
            self.status, self.headers = response.status_code, response.headers
            if response.headers["content-type"] == "text/event-stream":
                for event in sse_events(response):
                    self.last = event
            else:
                self.last = json.loads(response.read())

    def check_told_that_it_stops(self) -> None:
        """It has the one true ending for a server that stops."""
        self.join(10)
        assert self.last["error"]["code"] == "shutting_down"
        assert self.last["error"]["message"] == "The server is stopping. Try again in a moment."
        if self.status == 200:
            assert (self.last["type"], self.last["is_error"]) == ("result", True)
        else:
            assert (self.status, self.headers["retry-after"]) == (503, "5")


# Signals.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_every_client_is_told_the_truth_and_every_child_is_gone(
    tmp_path: Path, number: signal.Signals
) -> None:
    with Served(tmp_path, **QUICK) as daemon:
        first = Asking(daemon, prompt="stubborn")
        wait_until(lambda: first.last != {}, "the first turn runs")
        session = first.last["session_id"]
        clients = [
            first,
            Asking(daemon, prompt="stubborn in silence"),
            Asking(daemon, prompt="stubborn in silence", stream=False),
            Asking(daemon, prompt="after the first", session_id=session),
        ]
        wait_until(lambda: len(daemon.stubborn) == 9, "three turns run")
        daemon.wait_for_record("request", session_id=session)
        before = time.monotonic()
        daemon.process.send_signal(number)
        for client in clients:
            client.check_told_that_it_stops()
        told = time.monotonic() - before
        assert daemon.wait() == -number
        ended = time.monotonic() - before
        assert [client.status for client in clients] == [200, 503, 503, 503]
        assert told < LADDER  # nobody waits for the last child
        assert ended < LADDER + 2
        assert not any(map(is_alive, daemon.stubborn))
        assert processes_with_env(str(tmp_path)) == []
        assert len(daemon.starts) == 3
        assert daemon.records("server_stopped")
        assert "Traceback" not in daemon.output
        assert not any((daemon.state / "run").glob("*"))


def test_a_second_signal_ends_the_waiting_and_nothing_else(tmp_path: Path) -> None:
    with Served(tmp_path, **{**QUICK, "DRAIN_TIMEOUT_MS": "600000"}) as daemon:
        client = Asking(daemon, prompt="stubborn")
        wait_until(lambda: len(daemon.stubborn) == 3, "the turn runs")
        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait_for_record("server_stopping")
        daemon.process.send_signal(signal.SIGTERM)
        daemon.process.send_signal(signal.SIGINT)
        client.check_told_that_it_stops()
        daemon.wait()
        assert daemon.records("server_stopped")
        assert "Traceback" not in daemon.output
        assert processes_with_env(str(tmp_path)) == []


def test_after_a_crash_the_next_start_sweeps_what_is_left_and_sessions_go_on(
    tmp_path: Path,
) -> None:
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "mcp-config.json").write_text(MCP)
    with Served(tmp_path) as daemon:
        session = daemon.answers(workspace="project")
        client = Asking(daemon, prompt="stubborn", workspace="project", **TOOL)
        wait_until(lambda: client.last != {}, "the turn runs")
        interrupted = client.last["session_id"]
        wait_until(lambda: len(daemon.stubborn) == 3, "its family runs")
        # Written down a moment after the client has heard of it.
        wait_until(lambda: daemon.state_of(interrupted) == "begun", "it is written down")
        [secret] = (daemon.state / "run").iterdir()
        daemon.kill()
        left = daemon.stubborn
        assert all(map(is_alive, left))  # neither the end of input nor a group ends these
        assert secret.exists()
    with Served(tmp_path) as daemon:
        record = daemon.wait_for_record("sweep")
        assert record["count"] == 3
        assert not any(map(is_alive, left))
        client.join(10)
        assert not secret.exists()
        for known in (session, interrupted):
            assert daemon.answers(session_id=known) == known
            assert daemon.starts[-1] == (known, True, daemon.base / "workspace" / "project")
        assert not daemon.records("store_failed")
    assert processes_with_env(str(tmp_path)) == []


def test_sighup_disturbs_no_turn(tmp_path: Path) -> None:
    path = tmp_path / "cwd" / "mcp-config.json"
    with Served(tmp_path) as daemon, daemon.waiting_turn() as events:
        daemon.process.send_signal(signal.SIGHUP)
        assert daemon.wait_for_record("mcp_reloaded")["mcp_servers"] == []
        path.write_text("{")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for_record("mcp_reload_failed")
        path.write_text(MCP)
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for_record("mcp_reloaded", mcp_servers=["github"])
        daemon.release()
        assert list(events)[-1]["result"] == "done"
        assert daemon.answers(**TOOL)


# Descriptors.


def test_when_connections_take_all_descriptors_others_are_refused_and_it_recovers(
    tmp_path: Path,
) -> None:
    with Served(tmp_path) as daemon:
        daemon.answers()
        before = daemon.settled()
        with daemon.waiting_turn() as events:
            daemon.limit_descriptors(daemon.descriptors() + 8)
            clients = [socket.create_connection(("127.0.0.1", daemon.port)) for _ in range(40)]
            refused = []
            for client in clients[8:]:
                client.settimeout(5)
                with suppress(ConnectionResetError):
                    assert client.recv(1) == b""  # at once, not some day
                refused.append(client)
            assert len(refused) == 32
            time.sleep(0.1)
            records, computed = len(daemon.lines), daemon.cpu_seconds()
            time.sleep(1)
            assert daemon.cpu_seconds() - computed < 0.2
            assert len(daemon.lines) - records < 5
            daemon.release()
            assert list(events)[-1]["result"] == "done"
            for client in clients:
                client.close()
        assert daemon.answers()
        assert daemon.settled() == before
        assert "Traceback" not in daemon.output


def test_without_descriptors_for_a_child_a_turn_is_refused_and_nothing_leaks(
    tmp_path: Path,
) -> None:
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "mcp-config.json").write_text(MCP)
    with Served(tmp_path) as daemon:
        session = daemon.answers(**TOOL)
        before = daemon.settled()
        seen = []
        for spare in range(12):
            daemon.limit_descriptors(before + spare)
            for fields in ({}, TOOL):
                starts = len(daemon.starts)
                try:
                    response = daemon.ask(session_id=session, **fields)
                except httpx.TransportError:
                    seen.append("refused")
                    continue
                if response.status_code == 200:
                    seen.append("answered")
                    continue
                error = response.json()["error"]
                assert (response.status_code, error["code"]) == (429, "server_busy"), error
                assert response.headers["retry-after"] == "5"
                assert "Too many open files" in error["message"]
                assert len(daemon.starts) == starts
                seen.append("busy")
        assert set(seen) - {"refused"} == {"busy", "answered"}
        assert seen[-2:] == ["answered"] * 2
        assert daemon.settled() == before
        assert daemon.answers(session_id=session, **TOOL) == session
        wait_until(lambda: not any((daemon.state / "run").iterdir()), "no file is left")
        assert "Traceback" not in daemon.output


@pytest.mark.parametrize("chance", ["the next turn", "the end"])
def test_what_cannot_be_swept_for_want_of_descriptors_is_swept_later(
    tmp_path: Path, chance: str
) -> None:
    with Served(tmp_path, **QUICK) as daemon:
        with (
            daemon.client() as client,
            client.stream("POST", "/api/claude", json={"prompt": "stubborn"}) as response,
        ):
            assert response.status_code == 200
            wait_until(lambda: len(daemon.stubborn) == 3, "the turn runs")
        daemon.limit_descriptors(5)
        daemon.wait_for_record("sweep_failed")
        *_, away = daemon.stubborn
        assert is_alive(away)
        daemon.limit_descriptors(1000)
        if chance == "the next turn":
            daemon.answers()
            wait_until(lambda: not is_alive(away), "it is swept")
    assert daemon.records("sweep", count=1)
    assert processes_with_env(str(tmp_path)) == []


# The database.


def check_unknown(response: httpx.Response) -> None:
    """The answer of a server that several keys share, to one who names a session of nobody."""
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": "There is no such session. Leave the session id out to start a new one.",
        "type": "invalid_request_error",
        "param": "session-id",
        "code": "session_not_found",
    }


def lock(path: Path) -> Callable[[], None]:
    """Take the database for somebody else; what gives it back."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    return other.close


def spoil(path: Path) -> Callable[[], None]:
    path.write_bytes(b"this is no database" * 1000)
    return lambda: None


def put_in_the_way(path: Path) -> Callable[[], None]:
    path.unlink()
    path.mkdir()
    return lambda: None


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lock, "cannot be used: database is locked"),
        (spoil, "is damaged or not a database"),
        (put_in_the_way, "cannot be used: unable to open database file"),
    ],
)
def test_without_its_database_it_says_so_once_and_serves(
    tmp_path: Path, harm: Callable[[Path], Callable[[], None]], said: str
) -> None:
    keys = {"API_KEYS": f"{ALICE},{BOB}", "HOST": "127.0.0.1"}
    path = tmp_path / "state" / "state.sqlite3"
    with Served(tmp_path, **keys) as daemon:
        earlier = daemon.answers()
    undo = harm(path)
    with Served(tmp_path, **keys) as daemon:
        record = daemon.wait_for_record("store_failed")
        assert said in record["error"]
        assert str(path) in record["error"]
        assert record["message"].endswith(
            "Sessions are remembered until the server stops, no longer."
        )
        session = daemon.answers(workspace="project")
        assert daemon.answers(session_id=session) == session
        assert daemon.starts[-1] == (session, True, daemon.base / "workspace" / "project")
        check_unknown(daemon.ask(session_id=earlier))
        assert len(daemon.records("store_failed")) == 1
    undo()
    if harm is lock:  # nothing happened to it
        with Served(tmp_path, **keys) as daemon:
            assert daemon.answers(session_id=earlier) == earlier


def test_without_a_state_directory_it_says_so_once_and_serves(tmp_path: Path) -> None:
    keys = {"API_KEYS": f"{ALICE},{BOB}", "HOST": "127.0.0.1"}
    with Served(tmp_path, STATE_PATH="/proc/nothing/state", **keys) as daemon:
        [record] = daemon.records("state_unusable")
        assert "/proc/nothing/state cannot hold the server's state" in record["message"]
        session = daemon.answers(workspace="project")
        assert daemon.answers(session_id=session) == session
        assert not daemon.records("store_failed")
    assert processes_with_env(str(tmp_path)) == []


def test_a_database_locked_for_a_moment_loses_nothing(tmp_path: Path) -> None:
    with Served(tmp_path, API_KEYS=f"{ALICE},{BOB}", HOST="127.0.0.1") as daemon:
        daemon.answers()
        undo = lock(daemon.state / "state.sqlite3")
        before = time.monotonic()
        session = daemon.answers(workspace="project")
        assert time.monotonic() - before < 2  # no turn waits for the database
        time.sleep(0.5)
        undo()
        assert daemon.answers(session_id=session) == session
        assert not daemon.records("store_failed")


def test_a_database_locked_for_long_holds_no_turn_up(tmp_path: Path) -> None:
    with Served(tmp_path, API_KEYS=ALICE, HOST="127.0.0.1") as daemon:
        earlier = daemon.answers()
        undo = lock(daemon.state / "state.sqlite3")
        session = daemon.answers()
        assert "database is locked" in daemon.wait_for_record("store_failed")["error"]
        before = time.monotonic()
        for name in (earlier, session, earlier, session):
            assert daemon.answers(session_id=name) == name
        assert time.monotonic() - before < 4  # each has several things to write down
        undo()
        later = daemon.answers(workspace="project")
        assert daemon.answers(session_id=later) == later
        assert daemon.starts[-1] == (later, True, daemon.base / "workspace" / "project")


def test_a_database_that_cannot_be_written_for_a_while_breaks_no_turn(tmp_path: Path) -> None:
    keys = {"API_KEYS": f"{ALICE},{BOB}", "HOST": "127.0.0.1"}
    with Served(tmp_path, **keys) as daemon:
        earlier = daemon.answers()
        daemon.settled()
        with daemon.short_files(4096):  # the CLI's notes are shorter, a page of the database is not
            lost = daemon.answers()
            error = daemon.wait_for_record("store_failed")["error"]
            assert f"{daemon.state / 'state.sqlite3'} cannot be used: disk I/O error" in error
            assert "Check the space and the permissions of its directory" in error
            assert daemon.answers(session_id=earlier) == earlier
            check_unknown(daemon.ask(session_id=lost))
            daemon.settled()
        later = daemon.answers(workspace="project")
        assert daemon.answers(session_id=later) == later
    assert daemon.records("server_stopped")
    assert "Traceback" not in daemon.output
    with Served(tmp_path, **keys) as daemon:
        for known in (earlier, later):
            assert daemon.answers(session_id=known) == known
        assert daemon.starts[-1] == (later, True, daemon.base / "workspace" / "project")
        check_unknown(daemon.ask(session_id=lost))
        assert not daemon.records("store_failed")
    assert processes_with_env(str(tmp_path)) == []


def test_a_database_that_is_damaged_while_it_serves_breaks_no_turn(tmp_path: Path) -> None:
    path = tmp_path / "state" / "state.sqlite3"
    with Served(tmp_path, API_KEYS=ALICE, HOST="127.0.0.1") as daemon:
        daemon.answers()  # one that is told to stop as it starts may not have made it yet
    fill(path)
    with Served(tmp_path, API_KEYS=ALICE, HOST="127.0.0.1") as daemon:
        earlier = daemon.answers()
        with path.open("r+b") as file:
            file.seek(4096)  # the first page stays
            file.write(b"\xa5" * (path.stat().st_size - 4096))
        sessions = [daemon.answers() for _ in range(3)]
        assert "is damaged or not a database" in daemon.wait_for_record("store_failed")["error"]
        for name in (earlier, *sessions):
            assert daemon.answers(session_id=name) == name
    assert daemon.records("server_stopped")


def fill(path: Path) -> None:
    """Give a database more sessions than fit into memory."""
    columns = "id, cli_id, workspace, tenant, state, parameters, created, used"
    now = time.time()
    parameters = json.dumps({"padding": "x" * 2000})
    rows = [(f"{n:032}", f"{n:032}", None, "x", "begun", parameters, n, now) for n in range(3000)]
    database = sqlite3.connect(path)
    database.executemany(f"INSERT INTO sessions ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
    database.commit()
    database.close()


# The log.


class Quiet(Served):
    """A daemon that cannot say where it listens: on a socket of the file system."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.socket = folder / "socket"
        super().__init__(folder, LISTEN=f"unix:{self.socket}", **env)
        self.argv.remove("--port=0")

    def client(self, **options: Any) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=str(self.socket))
        return super().client(**{**options, "base_url": "http://localhost", "transport": transport})

    def wait_until_it_answers(self) -> None:
        """Wait for the first answer."""

        def is_healthy() -> bool:
            with suppress(httpx.TransportError), self.client() as client:
                return client.get("/health").status_code == 200
            return False

        wait_until(is_healthy, "it answers")

    def serves_and_stops(self) -> None:
        """Nothing of what it cannot say keeps it from its work."""
        try:
            self.wait_until_it_answers()
            session = self.answers()
            assert self.answers(session_id=session) == session
            before = self.settled()
            for _ in range(20):
                self.answers()
            assert self.settled() == before
        except BaseException:
            self.kill()
            raise
        assert self.stop() == -signal.SIGTERM
        assert not self.socket.exists()
        assert not any((self.state / "run").glob("*"))
        assert processes_with_env(str(self.folder)) == []


def test_a_full_disk_for_the_log_breaks_no_turn(tmp_path: Path) -> None:
    (tmp_path / "proxy.log").symlink_to("/dev/full")
    daemon = Quiet(tmp_path)
    daemon.argv.insert(daemon.argv.index("claude-proxy"), f"--logfile={tmp_path / 'proxy.log'}")
    daemon.start()
    daemon.serves_and_stops()
    assert (tmp_path / "proxy.log").is_symlink()


def test_a_closed_stdout_breaks_no_turn(tmp_path: Path) -> None:
    daemon = Quiet(tmp_path)
    # The reader goes away after the first line.
    daemon.argv = ["/bin/sh", "-c", f"exec {shlex.join(daemon.argv)} > {tmp_path / 'pipe'}"]
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["head", "-n", "1", str(tmp_path / "pipe")], stdout=subprocess.PIPE)
    daemon.start()
    first, _ = reader.communicate(timeout=20)
    assert json.loads(first)["component"]
    daemon.serves_and_stops()
