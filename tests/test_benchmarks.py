"""The benchmarks run and count every event; how fast they are is for people to judge."""

from __future__ import annotations

import pytest

from tests.benchmarks import ADDED, MACHINE, MS, check_lines, run_benchmark

_CPU = r"[\d.]+ CPU s per 100,000"
_CHARACTERS = "500,000 characters"


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
                MACHINE,
                *[rf"bare start +{MS}", rf"claude-proxy +{MS}", ADDED],
                *[rf"live child +{MS}", rf"claude-proxy +{MS}", ADDED],
            ],
        ),
        (
            ["slow_client", "40", "1"],
            [
                r"memory grown by the client that reads nothing: -?[\d.]+ MB",
                r"child: [\d.]+ MB written, 0 bytes more in a second",
                rf"health check, usually +{MS}",
                rf"health check, beside it +{MS}",
                r"another stream, usually +[\d,]+ events/s",
                r"another stream, beside it +[\d,]+ events/s",
                r"when it reads at last +[\d,]+ events",
            ],
        ),
    ],
    ids=["native_stream", "chat_stream", "first_token", "slow_client"],
)
def test_a_benchmark_says_what_it_measured(command: list[str], expected: list[str]) -> None:
    check_lines(run_benchmark(*command), expected)
