"""Many streams at once: the benchmark runs and loses nothing, and what it has taught stays."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
