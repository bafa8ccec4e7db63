"""The systemd units: by systemd's own judgement, and with the server that they start."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import httpx
import pytest

from claude_proxy.cli.process import POLITE_WAIT
from claude_proxy.settings import OWN_VARIABLES, SETTINGS, load_settings
from tests.deploy.tools import accepts, free_port, program, replaced, said_by
from tests.deploy.units import SERVICE, SOCKET, SOCKET_DROP_IN, entries, seconds, variables
from tests.e2e.daemon import Daemon, wait_until
from tests.integration.server import write_cli

KEY = "sk-activated-0123456789abcdef"
NOWHERE = "http://127.0.0.1:9"

# Tells what it was given besides its three pipes.
CURIOUS_CLI = """
message()
files = {fd: os.readlink("/proc/self/fd/" + fd) for fd in os.listdir("/proc/self/fd")
         if os.path.islink("/proc/self/fd/" + fd)}
tell("seen", json.dumps({"environ": dict(os.environ), "files": files}))
write(INIT)
write(RESULT)
leave()
"""


# The files.


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units as installed, with programs that are there."""
    folder = tmp_path / "units"
    (folder / "claude-proxy.service.d").mkdir(parents=True)
    twistd = Path(sys.executable).with_name("twistd")
    text = replaced(SERVICE.read_text(), {"/opt/claude-proxy/bin/twistd": str(twistd)})
    (folder / SERVICE.name).write_text(text)
    (folder / SOCKET.name).write_text(SOCKET.read_text())
    (folder / "claude-proxy.service.d" / "socket.conf").write_text(SOCKET_DROP_IN.read_text())
    return folder


def test_systemd_finds_no_fault_with_the_units(units: Path) -> None:
    verify = [program("systemd-analyze"), "verify", "--man=no"]
    said = said_by(*verify, str(units / SERVICE.name), str(units / SOCKET.name), cwd=units)
    assert said.strip() == ""


def test_systemd_would_find_a_fault(units: Path) -> None:
    path = units / SERVICE.name
    path.write_text(replaced(path.read_text(), {"KillMode=mixed": "KillMode=gentle"}))
    verify = [program("systemd-analyze"), "verify", "--man=no"]
    assert "kill mode" in said_by(*verify, str(path), cwd=units)


def test_the_sandbox_is_as_tight_as_the_documents_say(units: Path) -> None:
    security = [program("systemd-analyze"), "security", "--offline=yes", "--threshold=20"]
    said = said_by(*security, "--no-pager", str(units / SERVICE.name))
    assert "Overall exposure level" in said


def test_systemd_waits_longer_than_the_server_takes() -> None:
    settings = load_settings({}, {"HOME": "/"}, {}, Path("/"))
    ladder = settings.kill_timeout + 4 * POLITE_WAIT
    flush = 2.0
    assert seconds(SERVICE, "TimeoutStopSec") > settings.drain_timeout + 3 * ladder + flush


def test_the_units_set_nothing_that_the_server_does_not_know() -> None:
    specifiers = {"%S": "/var/lib", "%d": "/run/credentials/claude-proxy.service"}
    named = {*variables(SERVICE, specifiers), *variables(SOCKET_DROP_IN, specifiers)}
    assert named - {"HOME", "DISABLE_AUTOUPDATER"} <= {setting.variable for setting in SETTINGS}


# The server, started as the units say.


class AsAService(Daemon):
    """The server with the environment and the command of the unit, and nothing of its own."""

    def __init__(self, folder: Path, keys: str | None) -> None:
        state, credentials = folder / "lib", folder / "credentials"
        unit = variables(SERVICE, {"%S": str(state), "%d": str(credentials)})
        port = free_port()
        environment = {
            **unit,
            # As EnvironmentFile would: it wins.
            "CLAUDE_CLI": write_cli(folder, CURIOUS_CLI),
            "PORT": str(port),
            "SPARE_PROCESSES": None,
            "CREDENTIALS_DIRECTORY": str(credentials),
            "STATE_DIRECTORY": str(state),
            "ANTHROPIC_API_KEY": "sk-ant-of-the-service",
            "CLAUDE_CONFIG_DIR": None,
        }
        super().__init__(folder, "claude", NOWHERE, env=environment)
        (command,) = (value for name, value in entries(SERVICE) if name == "ExecStart")
        self.argv = [self.argv[0], *shlex.split(command)[1:]]
        for name, value in entries(SERVICE):
            if name == "StateDirectory":
                for directory in value.split():
                    (state / directory).mkdir(parents=True)
        credentials.mkdir()
        if keys is not None:
            (credentials / "api-keys").write_text(keys)


def test_the_service_serves_its_keys_from_its_credentials(tmp_path: Path) -> None:
    with AsAService(tmp_path, f"anna:{KEY}\n") as daemon:
        with daemon.client() as client:
            assert client.post("/api/claude", json={"prompt": "hi"}).status_code == 401
        with daemon.client(headers={"X-Api-Key": KEY}) as client:
            health = client.get("/health").json()
            answer = client.post("/api/claude", json={"prompt": "hi", "stream": False})
        assert health["status"] == "healthy"
        assert answer.json()["subtype"] == "success"
    seen = json.loads((tmp_path / "seen").read_text())["environ"]
    assert seen["ANTHROPIC_API_KEY"] == "sk-ant-of-the-service"
    assert seen["HOME"] == str(tmp_path / "lib/claude-proxy/home")
    assert not {"CREDENTIALS_DIRECTORY", "STATE_DIRECTORY"} & set(seen)
    assert not set(seen) & OWN_VARIABLES
    assert KEY not in str(seen)
    assert (tmp_path / "lib/claude-proxy/state/state.sqlite3").exists()
    assert (tmp_path / "lib/claude-proxy/workspaces/shared_workspace").is_dir()
    assert daemon.records("authentication", tenant="anna")
    assert not daemon.records("open_server")
    assert KEY not in daemon.output


@pytest.mark.parametrize("keys", [None, "", "# nobody yet\n"])
def test_without_keys_the_service_does_not_start(tmp_path: Path, keys: str | None) -> None:
    daemon = AsAService(tmp_path, keys)
    daemon.start()
    assert daemon.wait() == 1
    assert "API_KEYS_FILE" in daemon.stderr_lines[1]
    assert not daemon.records("server_listening")


# Socket activation.


class Activated(Daemon):
    """
    The server behind `systemd-socket-activate`, which does what systemd does for a socket unit.

    @param listen: for LISTEN.
    @param address: on which the socket listens, a host or the path of a socket.
    """

    def __init__(self, folder: Path, listen: str, address: str, **env: str | None) -> None:
        own = {
            "CLAUDE_CLI": write_cli(folder, CURIOUS_CLI),
            "LISTEN": listen,
            "CREDENTIALS_DIRECTORY": str(folder / "credentials"),
        }
        super().__init__(folder, "claude", NOWHERE, env={**own, **env})
        self.host, self.path = ("", address) if "/" in address else (address, "")
        if self.host:
            self.port = free_port(self.host)
        shown = f"[{self.host}]" if ":" in self.host else self.host
        where = f"{shown}:{self.port}" if self.host else self.path
        passed = [f"--setenv={name}" for name in self.environment]
        name = "--fdname=claude-proxy.socket"
        socket = [program("systemd-socket-activate"), f"--listen={where}", name]
        self.argv = [*socket, *passed, *self.argv]

    def client(self, **options: object) -> httpx.Client:
        """By way of the socket; the first request is what starts the server."""
        wait_until(lambda: accepts(self.path or (self.host, self.port)), "the socket listens")
        if self.path:
            transport = httpx.HTTPTransport(uds=self.path)
            return super().client(base_url="http://localhost", transport=transport, **options)
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return super().client(base_url=f"http://{shown}:{self.port}", **options)


@pytest.mark.parametrize(
    ("listen", "address", "is_public"),
    [
        ("systemd:domain=INET:index=0", "127.0.0.1", False),
        ("systemd:domain=INET:index=0", "0.0.0.0", True),
        ("systemd:domain=INET6:name=claude-proxy.socket", "::1", False),
        ("systemd:domain=INET6:index=0", "::", True),
        ("systemd:domain=UNIX:index=0", "/socket", False),
    ],
)
def test_a_request_to_a_passed_socket_starts_the_server_and_is_answered(
    tmp_path: Path, listen: str, address: str, is_public: bool
) -> None:
    address = str(tmp_path / "socket") if address == "/socket" else address
    daemon = Activated(tmp_path, listen, address)
    daemon.start()
    try:
        with daemon.client() as client:
            answer = client.post("/api/claude", json={"prompt": "hi", "stream": False})
        assert answer.json()["subtype"] == "success"
        record = daemon.wait_for_record("server_listening")
        assert record["listen"] == listen
        assert record["port"] == (daemon.port or None)
        # By the address of the socket, of which LISTEN says nothing.
        assert bool(daemon.records("public_without_keys")) is is_public
    finally:
        daemon.stop()
    assert daemon.records("server_stopped")


def test_the_agent_gets_neither_the_socket_nor_the_service_manager_s_variables(
    tmp_path: Path,
) -> None:
    (tmp_path / "credentials").mkdir()
    key_file = tmp_path / "credentials" / "api-keys"
    key_file.write_text(f"anna:{KEY}\n")
    # All that systemd may set, besides what socket activation does.
    more = {"NOTIFY_SOCKET": "@none", "WATCHDOG_PID": "1", "WATCHDOG_USEC": "1"}
    daemon = Activated(
        tmp_path,
        "systemd:domain=INET:index=0",
        "127.0.0.1",
        API_KEYS_FILE=str(key_file),
        STATE_DIRECTORY=str(tmp_path / "lib"),
        **more,
    )
    daemon.start()
    try:
        with daemon.client(headers={"X-Api-Key": KEY}) as client:
            answer = client.post("/api/claude", json={"prompt": "hi", "stream": False})
        assert answer.json()["subtype"] == "success"
        inherited = Path(f"/proc/{daemon.pid}/environ").read_bytes().decode()
    finally:
        daemon.stop()
    for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "CREDENTIALS_DIRECTORY"):
        assert f"\0{name}=" in f"\0{inherited}", "the server itself was given it"
    seen = json.loads((tmp_path / "seen").read_text())
    assert not [name for name in seen["environ"] if name.startswith(("LISTEN_", "WATCHDOG_"))]
    assert not {"CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "STATE_DIRECTORY"} & set(seen["environ"])
    assert KEY not in str(seen)
    assert not [target for target in seen["files"].values() if target.startswith("socket:")]


@pytest.mark.parametrize(
    "listen",
    [
        "systemd:domain=INET:index=0",
        "systemd:domain=INET:name=other",
        "systemd:domain=NONE:index=0",
        "systemd:",
    ],
)
def test_a_socket_that_was_not_passed_is_told_in_a_sentence(tmp_path: Path, listen: str) -> None:
    daemon = Daemon(tmp_path, "claude", NOWHERE, env={"LISTEN": listen}, args=["--demo"])
    daemon.start()
    assert daemon.wait() == 1
    said = "\n".join(daemon.stderr_lines)
    assert f"LISTEN={listen}" in said or f"LISTEN is '{listen}'" in said
    assert "Traceback" not in said
    assert os.linesep.join(said.splitlines()[2:]) == ""
