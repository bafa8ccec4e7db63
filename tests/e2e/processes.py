"""What only the operating system knows about processes, from Linux's /proc, and how to wait."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["children_of", "is_alive", "processes_with_env", "wait_until"]

_PROC = Path("/proc")
_TICK_SECONDS = 0.02


def children_of(pid: int) -> list[int]:
    """All living descendants of a process, from /proc; unreaped ones count."""
    parents: dict[int, list[int]] = {}
    for folder in _PROC.glob("[0-9]*"):
        try:
            # The name in parentheses may contain anything.
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(folder.name))
    found: list[int] = []
    todo = [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return sorted(found)


def processes_with_env(marker: str) -> list[int]:
    """
    The processes whose environment contains this text, this process excepted, from /proc.

    The path of a test's folder finds its daemon, every CLI under it and all their children.
    """
    found = []
    for folder in _PROC.glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if marker.encode() in environment and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return sorted(found)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped does not."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 30.0) -> None:
    """
    Wait for something that only polling can tell.

    @param what: says in the failure what was waited for.
    @param timeout: in seconds.
    @raise AssertionError: it did not happen in time.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"Not within {timeout} s: {what}")
        time.sleep(_TICK_SECONDS)
