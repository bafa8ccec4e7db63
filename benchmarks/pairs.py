"""Pairs of measurements, one after the other, so that both have the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from benchmarks.harness import spread

__all__ = ["Pairs", "verdict"]


@dataclass
class Pairs:
    """
    Seconds through the server and without it.

    @ivar pause: seconds before each measurement, in which what the one before left is done.
    """

    pause: float = 0.0
    ours: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)

    def measure(self, ours: Callable[[], float], bare: Callable[[], float]) -> None:
        """Add a pair; who is first alternates."""
        both = [(self.ours, ours), (self.bare, bare)]
        if len(self.ours) % 2:
            both.reverse()
        for samples, take in both:
            time.sleep(self.pause)
            samples.append(take())

    def report(self, bare: str, aim: float) -> str:
        """
        Three lines: both, and what the server adds, which is the median of the differences.

        @param bare: what the other one is.
        @param aim: in seconds.
        """
        added = [mine - other for mine, other in zip(self.ours, self.bare, strict=True)]
        told = verdict(f"{aim * 1000:g} ms", met=median(added) <= aim)
        return (
            f"{bare:15}{spread(self.bare)}\n"
            f"{'claude-proxy':15}{spread(self.ours)}\n"
            f"{'added':15}{spread(added)}, median of {len(added)} pairs; {told}"
        )


def verdict(aim: str, *, met: bool) -> str:
    """An aim, and whether a figure meets it."""
    return f"aim {aim}: {'met' if met else 'missed'}"
