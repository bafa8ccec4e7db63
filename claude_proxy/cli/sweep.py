"""
Ending what an agent process leaves behind.

The CLI's Bash tool starts each command in a session of its own, which no signal to the CLI or its
group reaches; some survive even the CLI's polite end.  But everything that descends from an agent
process carries our marker in its environment, and /proc shows it.  Where there is no /proc (macOS)
nothing is swept.

The functions that look through /proc block; `Sweeper` runs them in a thread.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorThreads, IReactorTime
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from claude_proxy.cli.command import MARKER

__all__ = ["GATHERED", "Sweeper", "end_marked"]

GATHERED = 0.5
"""
Seconds for which the markers of agents that have gone are gathered before one sweep ends them all.

A sweep reads the environment of every process there is: with hundreds of agents that come and go,
one for each of them would be most of what the server does.
"""

_PROC = Path("/proc")
_PASSES = 4
"""
How often the list is read at most, and twice without a find at least: a process may fork while it
is read, and one that is just becoming another program shows no environment for an instant.
"""

_PAUSE = 0.005
"""Seconds between two passes."""

_PREFIX = MARKER.encode() + b"="

_READ_AT_ONCE = 64 * 1024
"""Bytes of an environment; most have far fewer."""

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that say nothing of a process, only that one cannot look at it now."""


def _environment_of(pid: str) -> bytes | None:
    """A process's environment, empty if it shows none; None if the process is not ours."""
    try:
        # Not by pathlib: this is done for every process there is.
        descriptor = os.open(f"{_PROC}/{pid}/environ", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return b"".join(iter(lambda: os.read(descriptor, _READ_AT_ONCE), b""))
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _EXHAUSTED:
            raise
        return None


def _marker_in(environment: bytes) -> str | None:
    """The marker in an environment; None without one."""
    start = (b"\0" + environment).find(b"\0" + _PREFIX)
    if start < 0:
        return None
    entry, _, _ = environment[start + len(_PREFIX) :].partition(b"\0")
    return entry.decode("utf-8", "replace")


def _marker_of(pid: str) -> str | None:
    """The marker in a process's environment; None without one, or if the process is not ours."""
    return _marker_in(_environment_of(pid) or b"")


def _end_one(pid: str, wanted: Callable[[str], bool]) -> bool:
    """
    Kill one process if its marker is wanted.

    The pid may change hands at any moment: the process is held by a descriptor first, and its
    marker read again before it is signalled by that descriptor.
    """
    try:
        held = os.pidfd_open(int(pid))
    except OSError as error:
        if error.errno in _EXHAUSTED:
            raise
        return False
    try:
        marker = _marker_of(pid)
        if marker is None or not wanted(marker):
            return False
        try:
            signal.pidfd_send_signal(held, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True
    finally:
        os.close(held)


def end_marked(wanted: Callable[[str], bool]) -> int:
    """
    Kill every process whose marker is wanted, but never this one; return how many.  Blocks.

    @raise OSError: the processes cannot be looked at.
    """
    if not _PROC.is_dir() or not hasattr(os, "pidfd_open"):
        return 0
    # Markers are inherited and never given later: whoever has shown another one, or none, needs no
    # second look.
    passed = {str(os.getpid())}
    seen_none = False
    ended: set[str] = set()  # the next pass may find again what takes its time to die
    for _ in range(_PASSES):
        marked = []
        for pid in filter(str.isdigit, os.listdir(_PROC)):  # noqa: PTH208 - names are enough
            if pid in passed:
                continue
            environment = _environment_of(pid)
            if not environment:
                continue
            marker = _marker_in(environment)
            if marker is not None and wanted(marker):
                marked.append(pid)
            else:
                passed.add(pid)
        ended.update(pid for pid in marked if _end_one(pid, wanted))
        if not marked and seen_none:
            break
        seen_none = not marked
        time.sleep(_PAUSE)
    return len(ended)


class Sweeper:
    """
    Runs sweeps in a thread, one at a time.

    Markers that come within `GATHERED`, or during a sweep, share the next one.  What cannot be
    swept for want of descriptors or memory is tried again with the next sweep, and at the end.
    """

    _log = Logger(namespace="claude_proxy.cli")

    def __init__(self, reactor: IReactorThreads, clock: IReactorTime) -> None:
        self._reactor = reactor
        self._clock = clock
        self._markers: set[str] = set()
        self._put_off: set[str] = set()
        self._busy = False
        self._gathering_timer: IDelayedCall | None = None
        self._waiting: list[Deferred[None]] = []

    def sweep(self, marker: str) -> None:
        """End, soon, what carries exactly this marker."""
        self._markers.add(marker)
        self._gather()

    async def finish(self) -> None:
        """Sweep now what is left; wait until nothing is, or what is left cannot be swept."""
        idle: Deferred[None] = Deferred()
        self._waiting.append(idle)
        if self._gathering_timer is not None:
            self._gathering_timer.cancel()
        if not self._busy:
            self._begin()
        await idle

    def _gather(self) -> None:
        if not self._busy and self._gathering_timer is None:
            self._gathering_timer = self._clock.callLater(GATHERED, self._begin)

    def _begin(self) -> None:
        self._gathering_timer = None
        self._busy = True
        self._markers |= self._put_off
        self._put_off.clear()
        Deferred.fromCoroutine(self._work())

    async def _work(self) -> None:
        while self._markers:
            markers, self._markers = frozenset(self._markers), set()
            try:
                await self._end(markers.__contains__)
            except OSError as error:
                self._tell(error)
                if error.errno in _EXHAUSTED:
                    self._put_off |= markers
            if not self._waiting:
                break
        self._busy = False
        if self._markers:
            self._gather()
        waiting, self._waiting = self._waiting, []
        for idle in waiting:
            idle.callback(None)

    async def sweep_where(self, wanted: Callable[[str], bool]) -> int:
        """End what carries a wanted marker; return how many processes there were."""
        try:
            return await self._end(wanted)
        except OSError as error:
            self._tell(error)
            return 0

    async def _end(self, wanted: Callable[[str], bool]) -> int:
        pool = cast(Any, self._reactor).getThreadPool()
        ended: int = await deferToThreadPool(self._reactor, pool, end_marked, wanted)
        if ended:
            self._log.warn(
                "ended {count} processes that agents had left behind",
                type="sweep",
                count=ended,
            )
        return ended

    def _tell(self, error: OSError) -> None:
        self._log.error("could not sweep: {error}", type="sweep_failed", error=str(error))
