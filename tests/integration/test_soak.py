"""A short soak; soak.py says what that is, and how to have a longer one."""

from __future__ import annotations

from pathlib import Path

from tests.integration.soak import soak


def test_processes_that_stay_give_the_same_answers_for_long(tmp_path: Path) -> None:
    tally = soak(tmp_path, turns=250, seed=1)
    for happened, times in tally.items():
        print(f"{times:6} {happened}")  # noqa: T201 - how much of it there was
    assert tally["turns"] >= 250
