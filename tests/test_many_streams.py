"""Many streams at once: the benchmark runs and loses nothing, and what it has taught stays."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from claude_proxy.settings import load_settings

_ROOT = Path(__file__).resolve().parent.parent

_MS = r" +[\d.]+ ms"
_LATENCIES = rf"p50{_MS}  p99{_MS}"


def _run(*command: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def _expected(streams: int, rhythm: str, events: int, ours: str) -> list[str]:
    begin = rf" *{streams} {rhythm} +"
    return [
        rf"{begin}pipes +{_LATENCIES}",
        rf"{begin}relay +{_LATENCIES}  p99 [\d.]+ of pipes",
        rf"{begin}server +{_LATENCIES}  p99 [\d.]+ of pipes, [\d.]+ of relay",
        rf"{begin}{events} events, all in order; {ours}; pacer late by [\d.]+ ms \(p99\)",
    ]


@pytest.mark.parametrize("streams", [3, 10])
def test_the_benchmark_of_many_streams_gets_every_event_in_its_order(streams: int) -> None:
    lines = _run(
        *("-m", "benchmarks.many_streams", str(streams)),
        *("--events", "4", "--gap", "5", "--rounds", "1"),
    )
    together = (
        r"-?\d+ kB a stream; \d+ us CPU an event; \d+ % of a core; "
        r"-?[\d.]+ ms CPU for the rest of a stream"
    )
    expected = [
        *_expected(streams, "together", streams * 4, together),
        *_expected(streams, "rolling", streams * 4, r"[\d.]+ ms CPU a stream"),
    ]
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line


def test_hundreds_who_connect_at_the_same_moment_are_kept_until_they_are_taken() -> None:
    # Linux drops what is beyond, and a client notices after a second.
    listen = load_settings({}, {}, {}, Path("/nowhere")).listen
    backlog = int(listen.rpartition("backlog=")[2])
    with socket.create_server(("127.0.0.1", 0), backlog=backlog) as server:
        address = server.getsockname()
        clients = []
        for _ in range(min(500, backlog)):
            client = socket.create_connection(address, timeout=0.9)
            clients.append(client)
        for client in clients:
            client.close()


def test_a_started_server_spares_the_collector_its_own_code(tmp_path: Path) -> None:
    program = (
        "import gc, sys\n"
        "from claude_proxy import tap\n"
        "options = tap.Options()\n"
        "options.parseOptions(['--port', '0', '--state-path', sys.argv[1]])\n"
        "options.parent = None\n"
        "tap.makeService(options)\n"
        "print(gc.get_freeze_count() > 50_000, gc.get_threshold()[0])\n"
    )
    assert _run("-c", program, str(tmp_path / "state")) == ["True 10000"]
