"""
The pace of process starts: one in each turn of the reactor, and a few under way at a time.

To start a process keeps the reactor busy for a moment.  A burst of starts would do so for all these
moments together, and every stream that is running would stand still meanwhile.  So between two
starts the reactor looks at everything else that is ready.

That alone is not enough.  The CLI computes for half a second before it says its first word, and the
system call that starts a process returns only when the new one has had its first share of a
processor.  With a hundred beginners that want theirs, this takes a tenth of a second.  So only so
many may be beginners at a time.  On average a burst is answered sooner for it: all need the same
processors anyway, and those who go first are not slowed down by those who come last.
"""

from __future__ import annotations

from collections import deque

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

__all__ = ["START_WAIT", "Pace", "Start"]

START_WAIT = 1.0
"""Seconds after which a process is no beginner any more, though it has said nothing yet."""


class Start:
    """A process that is starting."""

    def __init__(self, clock: IReactorTime, pace: Pace) -> None:
        self._pace = pace
        self._over_timer: IDelayedCall | None = clock.callLater(START_WAIT, self._waited)

    def over(self) -> None:
        """It has said its first word, has ended, or could not be started; again does nothing."""
        if self._over_timer is not None:
            self._over_timer.cancel()
            self._waited()

    def _waited(self) -> None:
        self._over_timer = None
        self._pace.start_over()


class Pace:
    """Who may start a process now.  How many wait is bounded by who calls it."""

    def __init__(self, clock: IReactorTime, *, at_once: int) -> None:
        """
        @param at_once: how many may be starting at a time; four for each processor do well.
        """
        self._clock = clock
        self._at_once = at_once
        self._starting = 0
        self._waiting: deque[Deferred[Start]] = deque()
        self._used = False

    @property
    def starting(self) -> int:
        """How many processes are starting."""
        return self._starting

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._waiting)

    async def my_turn(self) -> Start:
        """
        Return when the caller may start a process: at once, or after those who came before.

        The process counts as starting until `Start.over`, or until `START_WAIT` has passed.
        Cancelling the wait gives the turn to the next.
        """
        if self._is_free():
            return self._begin()
        turn: Deferred[Start] = Deferred(self._waiting.remove)
        self._waiting.append(turn)
        return await turn

    def start_over(self) -> None:
        """A process is not starting any more; for `Start` only."""
        self._starting -= 1
        self._wake()

    def _is_free(self) -> bool:
        return not self._used and self._starting < self._at_once

    def _begin(self) -> Start:
        self._used = True
        self._starting += 1
        self._clock.callLater(0, self._next_turn)
        return Start(self._clock, self)

    def _next_turn(self) -> None:
        self._used = False
        self._wake()

    def _wake(self) -> None:
        if self._waiting and self._is_free():
            self._waiting.popleft().callback(self._begin())
