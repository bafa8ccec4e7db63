"""
Capacity: how many turns run at once.

Each turn is a process of some hundred megabytes.  Those beyond the limit wait, in order, in the
same waiting room as those who wait for a session: bounded in number and in time.

A turn waits for its session first and takes a slot after that, so that nobody who holds a slot
waits for anything but the CLI.  It asks for the slot in the very moment in which it gets the lease:
the place that it has just left in the waiting room is still free then.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IReactorTime

from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.waiting import Line, WaitingRoom, counted

__all__ = ["Capacity", "Slot"]


class Slot:
    """The right to run one turn."""

    def __init__(self, capacity: Capacity, since: float) -> None:
        self._capacity: Capacity | None = capacity
        self._since = since

    def release(self) -> None:
        """Let the next turn run; releasing twice does nothing."""
        capacity, self._capacity = self._capacity, None
        if capacity is not None:
            capacity.pass_on(self._since)


class Capacity:
    """
    The slots of the server.

    @ivar turns: how many there are.
    """

    def __init__(self, clock: IReactorTime, *, turns: int, waiting_room: WaitingRoom) -> None:
        self.turns = turns
        self._clock = clock
        self._room = waiting_room
        self._running = 0
        self._line: Line[Slot] = Line(clock, waiting_room)

    @property
    def running(self) -> int:
        """How many slots are taken."""
        return self._running

    @property
    def waiting(self) -> int:
        """How many wait for a slot."""
        return len(self._line)

    def acquire(self, patience: float | None = None) -> Deferred[Slot]:
        """
        Get a slot, now or in turn.  Cancelling the Deferred leaves the queue.

        @param patience: seconds to wait at most; None for all that the waiting room grants.
        @raise ProxyError: SERVER_BUSY, with the seconds after which a slot can be expected, if too
            many wait already or the patience is at its end.  Both in the Deferred.
        """
        if self._running < self.turns:
            self._running += 1
            return succeed(self._slot())
        room = self._room
        if room.is_full:
            return fail(self._refusal())
        return self._line.join(room.patience if patience is None else patience, self._gave_up)

    def pass_on(self, since: float) -> None:
        """Give the slot of a turn that began then to the next in line; for `Slot` only."""
        self._room.took(self._clock.seconds() - since)
        if not self._line.serve(self._slot):
            self._running -= 1

    def _slot(self) -> Slot:
        return Slot(self, self._clock.seconds())

    def _refusal(self) -> ProxyError:
        room = self._room
        why = (
            f"{self._now()}, and {room.waiting} of at most {room.length} requests are waiting: the "
            "queue is full"
        )
        return self._busy(why, ahead=self.waiting)

    def _gave_up(self, ahead: int) -> ProxyError:
        why = (
            f"After {self._room.patience:g} seconds of waiting this request was number {ahead + 1} "
            f"of {self.waiting + 1} in line. {self._now()}"
        )
        return self._busy(why, ahead=ahead)

    def _now(self) -> str:
        return f"{self._running} of at most {counted(self.turns, 'turn')} are running"

    def _busy(self, why: str, ahead: int) -> ProxyError:
        advice = self._room.advice(ahead + 1, self.turns)
        message = (
            f"{why}. Try again in {counted(advice, 'second')}; the server's administrator may "
            "raise MAX_CONCURRENT_TURNS."
        )
        return ProxyError(Failure.SERVER_BUSY, message, retry_after=advice)
