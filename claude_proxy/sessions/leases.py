"""
The lease: the exclusive right to run a turn on a session.

Two processes that resume one session at the same time lose one of its two answers, so a session
has one writer.  Whoever comes second waits, in order, for a bounded time and in bounded number.

A key is in one of three states, and each of its ways is taken in one place:

=======  =====================  ===========================  =======================
key      somebody asks          its lease is released        the last waiter leaves
=======  =====================  ===========================  =======================
free     held                   (there is none)              (there is none)
held     awaited                free                         (there is none)
awaited  awaited (or refused,   held, or awaited if others   held
         if the room is full)   wait: by the first in line
=======  =====================  ===========================  =======================

`waiting.py` has the table of those who wait.  A lease itself is held until it is released, and
nothing that comes later brings it back.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IReactorTime

from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.waiting import Line, WaitingRoom, counted

__all__ = ["Lease", "Leases"]


class Lease:
    """
    One holder's right, under one or more keys.

    @ivar waited: somebody else held it first, so what was read before may have changed.
    """

    def __init__(self, leases: Leases, key: str, *, waited: bool) -> None:
        self.waited = waited
        self._leases = leases
        self._keys = [key]

    def add_key(self, key: str) -> None:
        """
        Hold this key as well: a session got its name while its first turn was running.

        Nothing happens if another holds that key, or if this lease has been released.
        """
        # Who holds nothing any more would never give back what they got now.
        if self._keys and key not in self._keys and self._leases.claim(key):
            self._keys.append(key)

    def release(self) -> None:
        """Let the next one have it; releasing twice does nothing."""
        keys, self._keys = self._keys, []
        for key in keys:
            self._leases.pass_on(key)


class Leases:
    """All leases of the server."""

    def __init__(self, clock: IReactorTime, *, waiting_room: WaitingRoom) -> None:
        self._clock = clock
        self._room = waiting_room
        self._held: dict[str, Line[Lease]] = {}

    @property
    def held(self) -> int:
        """How many keys are held."""
        return len(self._held)

    @property
    def waiting(self) -> int:
        """How many wait for a lease."""
        return sum(map(len, self._held.values()))

    def claim(self, key: str) -> bool:
        """Take a key at once if nobody holds it; say whether that worked."""
        if key in self._held:
            return False
        self._held[key] = Line(self._clock, self._room)
        return True

    def acquire(self, key: str, patience: float | None = None) -> Deferred[Lease]:
        """
        Get the lease for a key, now or in turn.  Cancelling the Deferred leaves the queue.

        @param patience: seconds to wait at most; None for all that the waiting room grants.
        @raise ProxyError: SERVER_BUSY if too many wait already; SESSION_BUSY after the patience.
            Both in the Deferred.
        """
        if self.claim(key):
            return succeed(Lease(self, key, waited=False))
        line, room = self._held[key], self._room
        if room.is_full:
            return fail(self._refusal(len(line)))
        return line.join(room.patience if patience is None else patience, self._gave_up)

    def pass_on(self, key: str) -> None:
        """Give a key that is free now to the next in line; for `Lease` only."""
        if not self._held[key].serve(lambda: Lease(self, key, waited=True)):
            del self._held[key]

    def _refusal(self, ahead: int) -> ProxyError:
        room = self._room
        advice = room.advice(ahead + 1)
        message = (
            f"This session is busy with an earlier turn, {counted(ahead, 'more request')} waiting "
            f"for it, and the queue is full: {room.waiting} of at most {room.length} requests are "
            f"waiting. Try again in {counted(advice, 'second')}."
        )
        return ProxyError(Failure.SERVER_BUSY, message, retry_after=advice)

    def _gave_up(self, ahead: int) -> ProxyError:
        waited = (
            f"This session was still busy with an earlier turn after {self._room.patience:g} "
            "seconds of waiting"
        )
        if ahead:
            message = (
                f"{waited}, with {counted(ahead, 'request')} in line before this one. Try again "
                "when they have had their turns."
            )
        else:
            message = f"{waited}, and this request was the next. Try again when that has ended."
        return ProxyError(Failure.SESSION_BUSY, message)
