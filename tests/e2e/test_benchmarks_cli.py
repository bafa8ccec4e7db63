"""The benchmarks with the real CLI: what they print, and that their answers are right."""

from __future__ import annotations

import pytest

from tests.benchmarks import ADDED, MACHINE, MS, check_lines, run_benchmark
from tests.e2e.claude_cli import Claude

_AIM = r"aim [\d.]+: (met|missed)"
_MB = r"[\d.]+ MB"


@pytest.fixture(autouse=True)
def named(claude_new: Claude, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAUDE_CLI", str(claude_new))


def test_follow_up_turns_are_measured_in_pairs() -> None:
    expected = [
        MACHINE,
        rf"live CLI +{MS}",
        rf"claude-proxy +{MS}",
        ADDED,
        r"CPU +[\d.]+ ms of the server for each turn",
    ]
    check_lines(run_benchmark("follow_up", "3"), expected)


def test_first_turns_are_measured_with_a_spare_and_without() -> None:
    expected = [
        MACHINE,
        rf"cold CLI +{MS}",
        rf"claude-proxy +{MS}",
        ADDED,
        rf"with a spare +{MS}, [\d.]+ of the cold CLI; {_AIM}",
    ]
    check_lines(run_benchmark("first_turn", "1"), expected)


def test_idling_is_measured_with_live_sessions_and_without() -> None:
    server = rf"server {_MB} RSS, {_MB} PSS, CPU [\d.]+ %"
    processes = rf"its processes {_MB} PSS, CPU [\d.]+ %"
    expected = [MACHINE, *[rf"{live} live: {server}; {processes}" for live in (0, 1, 4)]]
    check_lines(run_benchmark("idle", "1"), expected)
