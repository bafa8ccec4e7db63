"""The benchmarks run, and lose nothing; how fast they are is for people to judge."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        (("native_stream", "5000"), ["bare pipe", "claude-proxy", "5,002 events"]),
        (("first_token", "5"), ["bare start", "claude-proxy", "added"]),
        (("slow_client", "20"), ["memory grown", "0 bytes more", "another stream, beside it"]),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_a_benchmark_runs_and_prints_its_figures(
    command: tuple[str, str], lines: list[str]
) -> None:
    name, size = command
    ran = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", size],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    for line in lines:
        assert line in ran.stdout
