"""
The benchmarks run, count every event and look at the memory that a slow client costs; how fast they
are is for people to judge.
"""

from __future__ import annotations

import re

import pytest

from tests.benchmarks import ADDED, MACHINE, MS, check_lines, run_benchmark

_CPU = r"[\d.]+ CPU s per 100,000"
_CHARACTERS = "500,000 characters"
_MOST = 5.0
"""MB that a client may cost that reads nothing."""


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
    ],
    ids=["native_stream", "chat_stream", "first_token"],
)
def test_a_benchmark_says_what_it_measured(command: list[str], expected: list[str]) -> None:
    check_lines(run_benchmark(*command), expected)


def test_a_client_that_reads_nothing_costs_no_memory_and_loses_nothing() -> None:
    first, *lines = run_benchmark("slow_client", "40", "1")
    grown = re.fullmatch(r"memory grown by the client that reads nothing: (-?[\d.]+) MB", first)
    assert grown, first
    assert float(grown[1]) <= _MOST
    expected = [
        r"child: [\d.]+ MB written, 0 bytes more in a second",
        rf"health check, usually +{MS}",
        rf"health check, beside it +{MS}",
        r"another stream, usually +[\d,]+ events/s",
        r"another stream, beside it +[\d,]+ events/s",
        r"when it reads at last +[\d,]+ events",
    ]
    check_lines(lines, expected)
