"""The benchmarks run and count every event; how fast they are is for people to judge."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent

_CPU = r"[\d.]+ CPU s per 100,000"
_CHARACTERS = "500,000 characters"
_MS = r"[\d.]+ ms \([\d.]+ to [\d.]+\)"


def run(name: str, *parameters: str) -> list[str]:
    """The lines that a benchmark prints; it fails by itself if an event is lost."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *parameters],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            ["native_stream", "2500"],
            [
                r"bare pipe +[\d,]+ lines/s",
                *[rf"claude-proxy +[\d,]+ events/s  {_CPU}  [\d.]+ of the pipe  2,502 events"] * 3,
            ],
        ),
        (
            ["chat_stream", "2500"],
            [
                r"bare pipe +[\d,]+ events/s",
                *[rf"claude-proxy +[\d,]+ events/s  {_CPU}  [\d.]+ of the pipe  {_CHARACTERS}"] * 3,
            ],
        ),
        (
            ["first_token", "3"],
            [
                rf"bare start +{_MS}",
                rf"claude-proxy +{_MS}",
                r"added +-?[\d.]+ ms \(median of 3 pairs\)",
            ],
        ),
        (
            ["slow_client", "40", "1"],
            [
                r"memory grown by the client that reads nothing: -?[\d.]+ MB",
                r"child: [\d.]+ MB written, 0 bytes more in a second",
                rf"health check, usually +{_MS}",
                rf"health check, beside it +{_MS}",
                r"another stream, usually +[\d,]+ events/s",
                r"another stream, beside it +[\d,]+ events/s",
                r"when it reads at last +[\d,]+ events",
            ],
        ),
    ],
    ids=["native_stream", "chat_stream", "first_token", "slow_client"],
)
def test_a_benchmark_says_what_it_measured(command: list[str], expected: list[str]) -> None:
    lines = run(*command)
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
