"""
Waiting, wherever a request has to: bounded in number over all lines, and in time.

All lines of the server share one `WaitingRoom`, which counts.  Each thing that is waited for, a
session or a slot for a turn, has a `Line` of its own, in which the first to come is the first to be
served.  What can happen to one who waits is one table: whatever comes first counts, and what comes
later finds a place that is given up and changes nothing.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from enum import Enum, auto
from typing import Generic, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from claude_proxy.errors import ProxyError

__all__ = ["LONGEST_ADVICE", "Line", "WaitingRoom", "counted"]

_T = TypeVar("_T")

LONGEST_ADVICE = 300
"""Seconds that a client is told to stay away, at most: a forecast from the past is no promise."""

_RECENT_TURNS = 32


class WaitingRoom:
    """
    Counts those who wait, wherever that is, and foretells how long it takes.

    @ivar length: how many may wait at once.
    @ivar patience: seconds that a request may wait, over all the lines that it goes through.
    """

    def __init__(self, length: int, patience: float) -> None:
        self.length = length
        self.patience = patience
        self._waiting = 0
        self._durations: deque[float] = deque(maxlen=_RECENT_TURNS)

    @property
    def waiting(self) -> int:
        """How many wait, over all lines."""
        return self._waiting

    @property
    def is_full(self) -> bool:
        """Whether nobody else may wait."""
        return self._waiting >= self.length

    def enter(self) -> None:
        """One more waits; for `Line` only."""
        self._waiting += 1

    def leave(self) -> None:
        """One waits no longer; for `Line` only."""
        self._waiting -= 1

    def took(self, seconds: float) -> None:
        """A turn has ended, after so long."""
        self._durations.append(seconds)

    def advice(self, ahead: int, side_by_side: int = 1) -> int:
        """
        Whole seconds after which to try again, from 1 to `LONGEST_ADVICE`.

        @param ahead: how many turns have to end before.
        @param side_by_side: how many of them run at a time.
        """
        if self._durations:
            mean = sum(self._durations) / len(self._durations)
            seconds = ahead * mean / side_by_side
        else:
            seconds = self.patience
        return min(max(1, math.ceil(seconds)), LONGEST_ADVICE)


class _State(Enum):
    """Where somebody stands who has asked for something that was not free."""

    WAITING = auto()
    SERVED = auto()
    LEFT = auto()
    GAVE_UP = auto()


class _Input(Enum):
    """What happens to somebody who waits."""

    SERVE = auto()
    """It is their turn."""
    CANCEL = auto()
    """The client has gone, or the server stops."""
    TIMEOUT = auto()
    """Their patience is at its end."""


_TABLE = {
    (_State.WAITING, _Input.SERVE): _State.SERVED,
    (_State.WAITING, _Input.CANCEL): _State.LEFT,
    (_State.WAITING, _Input.TIMEOUT): _State.GAVE_UP,
}
"""The ways out.  There is one for each, so place, timer and Deferred are given up once."""


class _Waiter(Generic[_T]):
    """Somebody in a line."""

    def __init__(self) -> None:
        self.state = _State.WAITING
        self.served: Deferred[_T]
        self.patience_timer: IDelayedCall | None = None


class Line(Generic[_T]):
    """Those who wait for one thing, in the order in which they came."""

    def __init__(self, clock: IReactorTime, room: WaitingRoom) -> None:
        self._clock = clock
        self._room = room
        # One out of thousands may leave the middle at any time, or all of them at once.
        self._waiters: OrderedDict[_Waiter[_T], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiters)

    def join(self, patience: float, gave_up: Callable[[int], ProxyError]) -> Deferred[_T]:
        """
        Wait at the end of the line.  Cancelling the Deferred leaves it.

        The caller has seen that the room is not full.

        @param patience: seconds.
        @param gave_up: makes the failure for one whose patience has ended, from the number of those
            who are still before them in the line.
        """
        waiter: _Waiter[_T] = _Waiter()
        waiter.served = Deferred(lambda _: self._step_out(waiter, _Input.CANCEL))
        waiter.patience_timer = self._clock.callLater(
            max(0.0, patience), self._lost_patience, waiter, gave_up
        )
        self._waiters[waiter] = None
        self._room.enter()
        return waiter.served

    def serve(self, make: Callable[[], _T]) -> bool:
        """Give what `make` makes to the first in line; False if there is nobody."""
        if not self._waiters:
            return False
        waiter = next(iter(self._waiters))
        self._step_out(waiter, _Input.SERVE)
        waiter.served.callback(make())
        return True

    def _lost_patience(self, waiter: _Waiter[_T], gave_up: Callable[[int], ProxyError]) -> None:
        waiter.patience_timer = None
        ahead = next(number for number, other in enumerate(self._waiters) if other is waiter)
        self._step_out(waiter, _Input.TIMEOUT)
        waiter.served.errback(gave_up(ahead))

    def _step_out(self, waiter: _Waiter[_T], happened: _Input) -> None:
        """Leave nothing behind.  Who hears of it may come back at once: it is all done by then."""
        waiter.state = _TABLE[waiter.state, happened]
        del self._waiters[waiter]
        self._room.leave()
        if waiter.patience_timer is not None:
            waiter.patience_timer.cancel()
            waiter.patience_timer = None


def counted(number: int, noun: str) -> str:
    """A number and what it counts, as a sentence wants it."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
