"""
The lease: the exclusive right to run a turn on a session.

Two processes that resume one session at the same time lose one of its two answers, so a session
has one writer.  Whoever comes second waits, in order, for a bounded time and in bounded number.
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import suppress

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from claude_proxy.errors import Failure, ProxyError

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
        """Hold this key as well: a session got its name while its first turn was running."""
        if key not in self._keys and self._leases.claim(key):
            self._keys.append(key)

    def release(self) -> None:
        """Let the next one have it; releasing twice does nothing."""
        keys, self._keys = self._keys, []
        for key in keys:
            self._leases.pass_on(key)


class _Waiter:
    """Somebody who waits for one key."""

    def __init__(self) -> None:
        self.granted: Deferred[Lease]
        self.patience_timer: IDelayedCall | None = None


class Leases:
    """All leases of the server."""

    def __init__(self, clock: IReactorTime, *, queue_length: int, queue_timeout: float) -> None:
        """
        @param queue_length: how many may wait, over all sessions.
        @param queue_timeout: seconds that each may wait.
        """
        self._clock = clock
        self._queue_length = queue_length
        self._queue_timeout = queue_timeout
        self._held: dict[str, deque[_Waiter]] = {}
        self._waiting = 0

    @property
    def held(self) -> int:
        """How many keys are held."""
        return len(self._held)

    @property
    def waiting(self) -> int:
        """How many wait."""
        return self._waiting

    def claim(self, key: str) -> bool:
        """Take a key at once if nobody holds it; say whether that worked."""
        if key in self._held:
            return False
        self._held[key] = deque()
        return True

    def acquire(self, key: str) -> Deferred[Lease]:
        """
        Get the lease for a key, now or in turn.  Cancelling the Deferred leaves the queue.

        @raise ProxyError: SERVER_BUSY if too many wait already; SESSION_BUSY after the timeout.
            Both in the Deferred.
        """
        if self.claim(key):
            granted: Deferred[Lease] = Deferred()
            granted.callback(Lease(self, key, waited=False))
            return granted
        if self._waiting >= self._queue_length:
            refused: Deferred[Lease] = Deferred()
            retry_after = max(1, math.ceil(self._queue_timeout))
            refused.errback(ProxyError(Failure.SERVER_BUSY, retry_after=retry_after))
            return refused
        waiter = _Waiter()
        waiter.granted = Deferred(lambda _: self._leave(key, waiter))
        waiter.patience_timer = self._clock.callLater(
            self._queue_timeout, self._lost_patience, key, waiter
        )
        self._held[key].append(waiter)
        self._waiting += 1
        return waiter.granted

    def pass_on(self, key: str) -> None:
        """Give a key that is free now to the next in line; for `Lease` only."""
        queue = self._held[key]
        if not queue:
            del self._held[key]
            return
        waiter = queue.popleft()
        self._waiting -= 1
        _stop_timer(waiter)
        waiter.granted.callback(Lease(self, key, waited=True))

    def _leave(self, key: str, waiter: _Waiter) -> None:
        _stop_timer(waiter)
        with suppress(ValueError):
            self._held[key].remove(waiter)
            self._waiting -= 1

    def _lost_patience(self, key: str, waiter: _Waiter) -> None:
        waiter.patience_timer = None
        self._leave(key, waiter)
        message = (
            f"This session was still busy with an earlier turn after {self._queue_timeout:g} "
            "seconds of waiting. Try again when that one has ended."
        )
        waiter.granted.errback(ProxyError(Failure.SESSION_BUSY, message))


def _stop_timer(waiter: _Waiter) -> None:
    if waiter.patience_timer is not None:
        waiter.patience_timer.cancel()
        waiter.patience_timer = None
