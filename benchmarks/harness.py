"""A server to measure, and the instruments."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import twisted

__all__ = [
    "Server",
    "argument",
    "connect",
    "elapsed",
    "machine",
    "request_bytes",
    "server",
    "spread",
]

_HERE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Server:
    """
    A running daemon.

    @ivar log: the file with its records.
    """

    pid: int
    port: int
    log: Path

    def cpu(self) -> float:
        """CPU seconds it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Its resident memory, in MB."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise RuntimeError("no VmRSS")

    def descriptors(self) -> int:
        """How many descriptors it holds."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Its log records of this type so far, oldest first."""
        records = map(json.loads, self.log.read_text().splitlines())
        return [record for record in records if record["type"] == kind]


@contextmanager
def server(cli: Path, **settings: str) -> Iterator[Server]:
    """Run the daemon with this CLI; `settings` are environment variables."""
    with tempfile.TemporaryDirectory(prefix="claude-proxy-benchmark-") as folder:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": folder,
            "PYTHONPATH": str(_HERE),
            "CLAUDE_CLI": str(cli),
            "PORT": "0",
            "NODE_ENV": "production",
            "LOG_LEVEL": "info",
            "STATE_PATH": f"{folder}/state",
            **settings,
        }
        command = [
            str(Path(sys.executable).with_name("twistd")),
            "-n",
            "--pidfile=",
            "claude-proxy",
        ]
        # To a file: a pipe that nobody reads would hold the server up.
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output)
        try:
            yield Server(process.pid, _wait_for_port(log), log)
        finally:
            process.terminate()
            process.wait(timeout=30)


def _wait_for_port(log: Path) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        lines = log.read_text().splitlines()
        if any('"cli_found"' in line for line in lines):
            (port,) = [json.loads(line)["port"] for line in lines if '"server_listening"' in line]
            return int(port)
        time.sleep(0.05)
    raise RuntimeError("the server did not start:\n" + log.read_text())


def request_bytes(body: dict[str, object], path: str = "/api/claude") -> bytes:
    """A whole POST request."""
    encoded = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(encoded)}\r\n\r\n"
    )
    return head.encode() + encoded


def connect(port: int) -> socket.socket:
    """A connection that sends without delay."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def spread(samples: Sequence[float]) -> str:
    """Median with 5th and 95th percentile, in ms, of samples in seconds."""
    ordered = sorted(sample * 1000 for sample in samples)
    low, high = ordered[len(ordered) * 5 // 100], ordered[len(ordered) * 95 // 100]
    return f"{statistics.median(ordered):.2f} ms ({low:.2f} to {high:.2f})"


def argument(position: int, default: int) -> int:
    """A number from the command line, counted from 1."""
    return int(sys.argv[position]) if len(sys.argv) > position else default


def elapsed(since: float) -> float:
    """Seconds since a `time.perf_counter` value."""
    return time.perf_counter() - since


def machine() -> str:
    """What the figures were measured on."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    kind = names[0] if names else platform.machine()
    return (
        f"{os.cpu_count()} processors ({kind}), load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, Twisted {twisted.__version__}"
    )
