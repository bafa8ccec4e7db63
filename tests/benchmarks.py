"""Running a benchmark with small numbers, and what its lines have in common."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ADDED", "MACHINE", "MS", "check_lines", "run_benchmark"]

_ROOT = Path(__file__).resolve().parent.parent

_NUMBER = r"-?[\d.]+"

MS = rf"{_NUMBER} ms \({_NUMBER} to {_NUMBER}\)"

MACHINE = r"\d+ processors \(.+\), load [\d.]+, Python [\d.]+, Twisted [\d.]+"

ADDED = rf"added +{MS}, median of \d+ pairs; aim \d+ ms: (met|missed)"


def run_benchmark(name: str, *parameters: str, seconds: int = 60) -> list[str]:
    """
    The lines that a benchmark prints; it fails by itself if an event is lost or an answer wrong.

    @param seconds: how long it may take.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *parameters],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def check_lines(lines: Sequence[str], patterns: Sequence[str]) -> None:
    """Compare each line with its pattern."""
    assert len(lines) == len(patterns), lines
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line
