"""
The way out to one client: flow control, stall timer, and an end that always comes.

An `Outlet` owns the writing side of a request.  It passes the socket's pauses on to whoever
produces, lets a client go that takes nothing for too long, and finishes a response only when the
socket has taken all of it: twisted.web counts the time a finished response needs to drain as idle
time, and would cut off a slow client.
"""

from __future__ import annotations

import fcntl
import sys
import termios
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure as TwistedFailure
from zope.interface import implementer

from claude_proxy.web.direct import DirectConnection
from claude_proxy.web.request import ProxyRequest

__all__ = ["Outlet"]


_LOOKS = 4
"""How often within the stall timeout it is looked whether the socket took anything."""


class _State(Enum):
    OPEN = auto()
    DRAINING = auto()
    """All is written; the socket has not taken it yet."""
    CLOSED = auto()


def _ignore() -> None:
    """What an outlet does for an event that nobody wants to hear of."""


@implementer(IPushProducer)
class Outlet:
    """
    Writes one response.

    @ivar closed: fires once when the response is finished or its client has gone; never fails.
    """

    _log = Logger(namespace="claude_proxy.web")

    def __init__(
        self,
        request: ProxyRequest,
        clock: IReactorTime,
        stall_timeout: float,
        *,
        on_pause: Callable[[], None] = _ignore,
        on_resume: Callable[[], None] = _ignore,
        on_gone: Callable[[], None] = _ignore,
    ) -> None:
        """
        @param stall_timeout: seconds for which a client may take nothing.
        @param on_gone: called once if the client leaves before the response is finished.
        """
        self.closed: Deferred[None] = Deferred()
        self._request = request
        self._clock = clock
        self._stall_timeout = stall_timeout
        self._on_pause = on_pause
        self._on_resume = on_resume
        self._on_gone = on_gone
        self._state = _State.OPEN
        self._stall_timer: IDelayedCall | None = None
        self._unsent = 0
        self._last_progress = 0.0
        request.notifyFinish().addErrback(self._lost)
        request.registerProducer(self, streaming=True)

    @property
    def paused(self) -> bool:
        """Whether the socket takes nothing at the moment."""
        return self._stall_timer is not None

    def write(self, data: bytes) -> None:
        """Write; without effect once the client has gone."""
        if self._state is _State.OPEN:
            was_paused = self.paused
            self._send(data)
            if was_paused:
                self._unsent += len(data)  # or what is taken meanwhile would not be seen

    def _send(self, data: bytes) -> None:
        connection = self._request.channel.transport
        if not isinstance(connection, DirectConnection):
            self._request.write(data)
            return
        connection.gather()  # the head and the first of the body are one piece
        try:
            self._request.write(data)
        finally:
            connection.send()

    def finish(self) -> None:
        """End the response when the socket has taken all that was written."""
        if self._state is not _State.OPEN:
            return
        self._state = _State.DRAINING
        if not self.paused:
            self._finish()

    # What the socket says.

    def pauseProducing(self) -> None:
        if self._stall_timer is None and self._state is not _State.CLOSED:
            self._unsent = _unsent_bytes(self._request)
            self._last_progress = self._clock.seconds()
            self._stall_timer = self._clock.callLater(self._stall_timeout / _LOOKS, self._look)
            if self._state is _State.OPEN:
                self._on_pause()

    def resumeProducing(self) -> None:
        self._stop_stall_timer()
        if self._state is _State.DRAINING:
            self._finish()
        elif self._state is _State.OPEN:
            self._on_resume()

    def stopProducing(self) -> None:
        """The connection is lost; `notifyFinish` says so, too, and always."""

    def _look(self) -> None:
        """Slow is not stalled: see whether the socket has taken anything since the last look."""
        now = self._clock.seconds()
        unsent = _unsent_bytes(self._request)
        if unsent < self._unsent:
            self._unsent, self._last_progress = unsent, now
        if now - self._last_progress < self._stall_timeout:
            self._stall_timer = self._clock.callLater(self._stall_timeout / _LOOKS, self._look)
            return
        self._stall_timer = None
        self._log.warn(
            "let a client go that read nothing for {seconds} seconds",
            type="client_stalled",
            seconds=self._stall_timeout,
            request_id=self._request.request_id,
        )
        transport: Any = self._request.channel.transport
        transport.abortConnection()

    def _lost(self, _reason: TwistedFailure) -> None:
        """The client left, by itself or because it was let go."""
        self._close()
        self._on_gone()

    def _finish(self) -> None:
        self._state = _State.CLOSED
        self._request.unregisterProducer()
        self._request.finish()
        self._close()

    def _close(self) -> None:
        self._state = _State.CLOSED
        self._stop_stall_timer()
        if not self.closed.called:
            self.closed.callback(None)

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


def _unsent_bytes(request: ProxyRequest) -> int:
    """
    How much of a response the client's system has not taken yet.

    Part of it is in Twisted's buffer, which has no public way to ask.  Without these attributes
    (another kind of transport) no progress can be seen, and the stall timer measures the time since
    the pause.
    """
    transport: Any = request.channel.transport
    while (below := getattr(transport, "transport", None)) is not None:  # wrappers, TLS
        transport = below
    buffered = len(getattr(transport, "dataBuffer", b"")) - int(getattr(transport, "offset", 0))
    return buffered + int(getattr(transport, "_tempDataLen", 0)) + _in_kernel(transport)


def _in_kernel(transport: Any) -> int:
    """
    What this system still holds of what was given to a socket.

    It takes more only when a third of its buffer is free, which may be a megabyte: too coarse to
    tell a slow client from one that reads nothing.
    """
    try:
        held = fcntl.ioctl(transport.getHandle().fileno(), termios.TIOCOUTQ, bytes(4))
    except (AttributeError, OSError, ValueError):
        return 0  # no socket, or a system that does not tell
    return int.from_bytes(held, sys.byteorder)
