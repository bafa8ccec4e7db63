"""The daemon as people run it: by twistd, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.daemon import Daemon, children_of, sse_events, wait_until

KEY = "sk-a-key-that-nobody-may-see-0123456789"
SLOW = {"CLAUDE_PROXY_DEMO_DELAY_MS": "500"}
QUICK = {"CLAUDE_PROXY_DEMO_DELAY_MS": "0"}
NOWHERE = "http://127.0.0.1:9"


class Demo(Daemon):
    """A daemon that serves the built-in demonstration."""

    def __init__(self, folder: Path, *args: str, **env: str | None) -> None:
        super().__init__(folder, "claude", NOWHERE, env={**QUICK, **env}, args=("--demo", *args))

    def fails_to_start(self) -> str:
        """Start it; what it says on stderr before it ends with exit code 1."""
        self.start()
        assert self.wait() == 1
        return "\n".join(self.stderr_lines)


@contextmanager
def running_turn(daemon: Daemon) -> Iterator[Iterator[dict[str, Any]]]:
    """A turn whose first event has come; its further events."""
    with (
        daemon.client() as client,
        client.stream("POST", "/api/claude", json={"prompt": "hi"}) as response,
    ):
        assert response.status_code == 200
        events = sse_events(response)
        assert next(events)["subtype"] == "init"
        yield events


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


# A life.


def test_it_starts_answers_and_stops(tmp_path: Path) -> None:
    with Demo(tmp_path) as daemon:
        with running_turn(daemon) as events:
            last = list(events)[-1]
        assert (last["type"], last["subtype"]) == ("result", "success")
        assert "This is a demonstration" in last["result"]
        with daemon.client() as client:
            health = client.get("/health")
            assert health.status_code == 200
            assert health.json()["checks"]["claudeCli"]["details"]["demonstration"] is True
            again = client.post(
                "/api/claude",
                json={"prompt": "again", "session-id": last["session_id"], "stream": False},
            )
            assert "turn 2 of this session" in again.json()["result"]
    # Twistd ends by the signal that stopped it, after all was put in order.
    assert daemon.returncode == -signal.SIGTERM
    assert daemon.records("server_stopped")
    assert daemon.records("demonstration")
    assert not list((tmp_path / "state").rglob("run/*"))


def test_a_session_outlives_the_server(tmp_path: Path) -> None:
    with Demo(tmp_path) as daemon, running_turn(daemon) as events:
        session = list(events)[-1]["session_id"]
    with Demo(tmp_path) as daemon, daemon.client() as client:
        answer = client.post(
            "/api/claude", json={"prompt": "again", "session-id": session, "stream": False}
        )
        assert "turn 2 of this session" in answer.json()["result"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_running_turn_is_told_that_the_server_stops(
    tmp_path: Path, number: signal.Signals
) -> None:
    with Demo(tmp_path, DRAIN_TIMEOUT_MS="300", **SLOW) as daemon:
        with running_turn(daemon) as events:
            daemon.process.send_signal(number)
            last = list(events)[-1]
        assert last["type"] == "result"
        assert last["is_error"] is True
        assert last["error"]["code"] == "shutting_down"
        assert daemon.wait() == -number
    assert children_of(os.getpid()) == []


def test_a_turn_that_ends_in_time_ends_as_it_would_have(tmp_path: Path) -> None:
    with Demo(tmp_path, CLAUDE_PROXY_DEMO_DELAY_MS="5", DRAIN_TIMEOUT_MS="10000") as daemon:
        with running_turn(daemon) as events:
            daemon.process.send_signal(signal.SIGTERM)
            daemon.wait_for_record("server_stopping")
            with pytest.raises(httpx.ConnectError), daemon.client() as client:
                client.get("/health")
            last = list(events)[-1]
        assert (last["type"], last["subtype"]) == ("result", "success")
        assert daemon.wait() == -signal.SIGTERM
        assert daemon.records("server_stopped")


# Starts that fail.


def test_a_taken_port_is_one_sentence(tmp_path: Path, taken_port: int) -> None:
    daemon = Demo(tmp_path, f"--port={taken_port}")
    daemon.argv[2] = f"--pidfile={tmp_path / 'twistd.pid'}"
    said = daemon.fails_to_start()
    assert said.startswith("Address already in use: claude-proxy cannot listen on ")
    assert str(taken_port) in said
    assert "Traceback" not in daemon.output
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "twistd.pid").exists()
    assert not daemon.records("server_listening")


def test_all_bad_settings_are_named_at_once(tmp_path: Path) -> None:
    daemon = Demo(tmp_path, "--host=nowhere.example", PORT=None, QUEUE_LENGTH="many", LOG_LEVEL="x")
    daemon.argv.append("--port=99999")
    said = daemon.fails_to_start()
    assert said.startswith("claude-proxy did not start.")
    for variable, value in (
        ("PORT", "99999"),
        ("HOST", "nowhere.example"),
        ("QUEUE_LENGTH", "many"),
        ("LOG_LEVEL", "x"),
    ):
        assert f"{variable} is '{value}'" in said
    assert said.count("Accepted: ") == 4
    assert "Traceback" not in daemon.output


def test_a_broken_mcp_file_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "mcp.json").write_text('{"mcpServers": {"git": {}}}')
    said = Demo(tmp_path, MCP_CONFIG_PATH=str(tmp_path / "mcp.json")).fails_to_start()
    assert "mcpServers.git" in said
    assert "Traceback" not in said


def test_an_unusable_endpoint_is_named(tmp_path: Path) -> None:
    said = Demo(tmp_path, LISTEN="tcp:port=http").fails_to_start()
    assert "LISTEN" in said
    assert "Traceback" not in said


def test_two_servers_do_not_share_their_state(tmp_path: Path) -> None:
    with Demo(tmp_path) as first:
        said = Demo(tmp_path).fails_to_start()
        assert said.startswith("claude-proxy did not start.")
        assert f"in use by the process {first.pid}" in said
        assert "STATE_PATH" in said
        with first.client() as client:
            assert client.get("/health").status_code == 200


# The MCP configuration.


def test_the_mcp_configuration_is_read_again_on_sighup(tmp_path: Path) -> None:
    path = tmp_path / "mcp.json"

    def write(servers: Mapping[str, object]) -> None:
        path.write_text(json.dumps({"mcpServers": servers}))

    def shown() -> list[str]:
        with daemon.client() as client:
            details = client.get("/health").json()["checks"]["mcpConfig"]["details"]
        names: list[str] = details["servers"]
        return names

    write({"one": {"command": "x", "env": {"TOKEN": "very-secret"}}})
    with Demo(tmp_path, MCP_CONFIG_PATH=str(path)) as daemon:
        assert shown() == ["one"]
        write({"one": {"command": "x"}, "two": {"command": "y"}})
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for_record("mcp_reloaded")
        assert shown() == ["one", "two"]
        path.write_text('{"mcpServers": {"three": {"env": {"TOKEN": "very-secret"}}}}')
        daemon.process.send_signal(signal.SIGHUP)
        record = daemon.wait_for_record("mcp_reload_failed")
        assert "mcpServers.three" in str(record)
        assert shown() == ["one", "two"]
    assert "very-secret" not in daemon.output


# Daemonized.


class Daemonized:
    """A daemon in the background, with a pidfile and a log file."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.demo = Demo(folder, *args)
        self.demo.base.mkdir(parents=True)
        self.pidfile = folder / "proxy.pid"
        self.logfile = folder / "proxy.log"
        twistd, *_ = self.demo.argv
        own = self.demo.argv[self.demo.argv.index("claude-proxy") :]
        self.argv = [twistd, f"--pidfile={self.pidfile}", f"--logfile={self.logfile}", *own]

    def start(self) -> subprocess.CompletedProcess[str]:
        """What the command has come to that goes on in the background."""
        return subprocess.run(
            self.argv,
            cwd=self.demo.base,
            env=self.demo.environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def records(self) -> list[dict[str, Any]]:
        """The records in the log file; every line must be one."""
        lines = self.logfile.read_text().splitlines() if self.logfile.exists() else []
        return [json.loads(line) for line in lines]

    def port(self) -> int:
        """Where it listens, by its log."""
        wait_until(
            lambda: any(record["type"] == "server_listening" for record in self.records()),
            "it listens",
        )
        [record] = [r for r in self.records() if r["type"] == "server_listening"]
        return int(record["port"])


def test_it_runs_in_the_background_with_a_pidfile_and_a_log_file(tmp_path: Path) -> None:
    daemon = Daemonized(tmp_path)
    started = daemon.start()
    assert (started.returncode, started.stderr) == (0, "")
    url = f"http://127.0.0.1:{daemon.port()}"
    pid = int(daemon.pidfile.read_text())
    try:
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
        answer = httpx.post(
            f"{url}/api/claude", json={"prompt": "hi", "stream": False}, trust_env=False
        )
        assert answer.json()["subtype"] == "success"
        lock = (tmp_path / "state" / "demo" / "lock").read_text()
        assert lock.splitlines()[0] == str(pid)
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not daemon.pidfile.exists(), "it has ended")
    types = [record["type"] for record in daemon.records()]
    assert {"server_listening", "turn_end", "server_stopped"} <= set(types)


def test_in_the_background_too_a_taken_port_is_told_and_leaves_no_pidfile(
    tmp_path: Path, taken_port: int
) -> None:
    daemon = Daemonized(tmp_path, f"--port={taken_port}")
    started = daemon.start()
    assert started.returncode == 1
    assert "Address already in use: claude-proxy cannot listen on" in started.stderr
    assert "Traceback" not in started.stderr
    # Twistd tells the terminal first, and then takes its file away.
    wait_until(lambda: not daemon.pidfile.exists(), "no pidfile is left")


def test_in_the_background_too_bad_settings_are_told(tmp_path: Path) -> None:
    daemon = Daemonized(tmp_path, "--port=none", "--queue-length=many")
    started = daemon.start()
    assert started.returncode == 1
    assert "PORT is 'none'" in started.stderr
    assert "QUEUE_LENGTH is 'many'" in started.stderr
    assert not daemon.pidfile.exists()


# Keys.


def test_without_a_key_the_log_suggests_a_fresh_one(tmp_path: Path) -> None:
    suggestions = set()
    for _ in range(2):
        with Demo(tmp_path) as daemon:
            record = daemon.wait_for_record("open_server")
        assert f"API_KEY={record['suggestion']}" in record["message"]
        assert record["suggestion"].startswith("sk-")
        suggestions.add(record["suggestion"])
    assert len(suggestions) == 2


@pytest.mark.parametrize(
    ("keys", "warned"),
    [("alice:fifteen-letters\nbob:sixteen-letters-\ncarol:short\n", ["alice", "carol"]), (KEY, [])],
)
def test_short_keys_are_warned_about(tmp_path: Path, keys: str, warned: list[str]) -> None:
    (tmp_path / "keys").write_text(keys)
    with Demo(tmp_path, API_KEYS_FILE=str(tmp_path / "keys")) as daemon:
        daemon.wait_for_record("server_listening")
        with daemon.client() as client:
            client.get("/health")
    assert [record["tenants"] for record in daemon.records("short_keys")] == [warned] * bool(warned)
    assert "fifteen-letters" not in daemon.output


def test_a_public_server_without_keys_is_warned_about(tmp_path: Path) -> None:
    with Demo(tmp_path, "--host=0.0.0.0") as daemon:
        daemon.wait_for_record("public_without_keys")


def test_the_key_is_in_no_log_and_in_no_childs_environment(tmp_path: Path) -> None:
    with Demo(tmp_path, API_KEY=KEY, HOST="127.0.0.1", **SLOW) as daemon:
        bearer = {"Authorization": f"Bearer {KEY}"}
        with (
            daemon.client(headers=bearer) as client,
            client.stream("POST", "/api/claude", json={"prompt": "hi"}) as response,
        ):
            events = sse_events(response)  # kept: when it goes, the client leaves
            next(events)
            environments = [
                Path(f"/proc/{pid}/environ").read_bytes().decode()
                for pid in children_of(daemon.pid)
            ]
        with daemon.client() as client:
            refused = client.get("/x", headers={"Authorization": f"Bearer x{KEY}"})
        assert refused.status_code == 401
        assert KEY not in refused.text
    assert environments
    for environ in environments:
        assert "CLAUDE_PROXY_AGENT=" in environ
        assert KEY not in environ
        assert "API_KEY=sk-a-key" not in environ
    assert daemon.records("authentication", verdict="accepted")
    assert daemon.records("authentication", verdict="refused")
    assert not daemon.records("open_server")
    assert KEY not in daemon.output
