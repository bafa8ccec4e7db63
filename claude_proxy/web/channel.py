"""
One connection: what it may send, for how long, and what it is told when it does otherwise.

Twisted's channel bounds the size of a head, but not the time for it: whoever sends a byte now and
then may go on for days.  It answers what it does not understand with a bare status line; here that
is an error like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from secrets import token_hex
from typing import Any, cast

import msgspec
from twisted.internet.interfaces import IDelayedCall, ISSLTransport, ITCPTransport
from twisted.internet.protocol import Protocol
from twisted.logger import Logger
from twisted.web.http import HTTPChannel

from claude_proxy import __version__
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.web.connections import Connections, Stage

__all__ = [
    "COME_BACK",
    "HEAD_TIME",
    "IDLE_TIME",
    "LINGER",
    "Newcomer",
    "ProxyChannel",
    "address_of",
    "drop",
    "new_request_id",
]

HEAD_TIME = 30.0
"""Seconds for the head of a request: from the start of the connection, or from its first byte."""

IDLE_TIME = 75
"""
Seconds that a connection may be silent between requests: more than reverse proxies keep one that
they may use again (60), or it would be closed under a request.
"""

LINGER = 2.0
"""Seconds for which what comes after a refusal is still read and dropped, for the answer's sake."""

COME_BACK = 5
"""Seconds after which a client may try again, where it is not known better."""

_log = Logger(namespace="claude_proxy.web")


class ProxyChannel(HTTPChannel):
    """
    The server's side of a connection.

    @ivar connections: all there are; set by whoever makes this one.
    @ivar maxHeaders: how many headers a request may have (Twisted's name).
    @ivar totalHeadersSize: of the request line and all headers, in bytes (Twisted's name).
    """

    maxHeaders = 100
    totalHeadersSize = 16 * 1024

    connections: Connections
    transport: Any
    _networkProducer: Any

    def __init__(self) -> None:
        super().__init__()
        self._head_timer: IDelayedCall | None = None
        self._linger_timer: IDelayedCall | None = None
        self._input_dropped = False
        self._is_secure: bool | None = None

    # What happens to the connection.

    def connectionMade(self) -> None:
        super().connectionMade()
        self.connections.add(self)
        # Here already, because TLS may never get to the first byte.
        self._head_timer = self.callLater(HEAD_TIME, self._head_is_slow)

    def connectionLost(self, reason: Any = None) -> None:
        self._stop_head_timer()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None
        self.connections.remove(self)
        super().connectionLost(reason)

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        if self._head_timer is None and self._head_begun:
            self._head_timer = self.callLater(HEAD_TIME, self._head_is_slow)

    def isSecure(self) -> bool:
        # Asked twice for each request, and always the same for a connection.
        if self._is_secure is None:
            self._is_secure = bool(super().isSecure())
        return self._is_secure

    def timeoutConnection(self) -> None:
        if self._body_begun:
            self.requests[-1].late()
        else:
            _log_closed(self.transport, "idle", None)
            self._let_go()

    def give_way(self) -> None:
        """Close now: another one needs the place."""
        if self._head_begun or self._body_begun:
            self._refuse(_too_many_connections())
            return
        if self.requests:
            self.requests[-1].hurry()
        _log_closed(self.transport, "gives way", None)
        self._drop_input()
        if not self.transport.disconnecting:
            self.loseConnection()
        self._linger()

    # What is read.

    def lineReceived(self, line: bytes) -> None:
        if self._receivedHeaderSize + len(line) > self.totalHeadersSize:
            self._refuse(self._head_too_large())
        elif line[:1] in (b" ", b"\t"):
            # Lines that are continued are out of use; RFC 9112 (5.2) lets servers refuse them.
            self._respondToBadRequestAndDisconnect()
        else:
            super().lineReceived(line)

    def lineLengthExceeded(self, line: bytes) -> None:  # noqa: ARG002 - it is dropped
        self._refuse(self._head_too_large())

    def headerReceived(self, line: bytes) -> bool:
        if self._receivedHeaderCount >= self.maxHeaders:
            self._refuse(self._head_too_large())
            return False
        try:
            return bool(super().headerReceived(line))
        except ValueError:
            # Python takes no number of more than 4300 digits, not even as the length of a body.
            self._respondToBadRequestAndDisconnect()
            return False

    def allHeadersReceived(self) -> None:
        self._stop_head_timer()
        super().allHeadersReceived()

    def rawDataReceived(self, data: bytes) -> None:
        super().rawDataReceived(data)
        # Twisted stops reading what is pipelined at some point, but not while the client does not
        # read: then it would keep whatever comes.
        held = sum(map(len, self._dataBuffer))
        if self._waitingForTransport and held > self._optimisticEagerReadSize:
            self._networkProducer.pauseProducing()

    def requestDone(self, request: Any) -> None:
        if self.persistent:
            self.connections.move(self, Stage.RESTING)
        super().requestDone(request)

    # What requests say.

    def admitted(self) -> None:
        """The head of a request is accepted."""
        self.connections.move(self, Stage.SENDING)

    def complete(self) -> None:
        """All of a request that was admitted has come."""
        self.connections.move(self, None)

    def pause_reading(self) -> None:
        """Leave what comes to the system, which tells the client to wait."""
        self._networkProducer.pauseProducing()

    def resume_reading(self) -> None:
        """Read again."""
        self._networkProducer.resumeProducing()

    # How it ends.

    @property
    def _head_begun(self) -> bool:
        """Whether there is a part of a head."""
        if self._input_dropped:
            return False
        return bool(self.line_mode and (self._buffer or self._receivedHeaderSize))

    @property
    def _body_begun(self) -> bool:
        """Whether a request still waits for its body, and has no answer."""
        if self.line_mode or self._handlingRequest or not self.requests:
            return False
        return not self.requests[-1].is_refused

    def _respondToBadRequestAndDisconnect(self) -> None:
        # Twisted's own name for it: the one place where all that it does not understand ends.
        self._refuse(ProxyError(Failure.MALFORMED_REQUEST))

    def _head_is_slow(self) -> None:
        self._head_timer = None
        if self._head_begun:
            message = (
                f"The head of the request did not come within {HEAD_TIME:.0f} seconds. Send it at "
                "once."
            )
            self._refuse(ProxyError(Failure.REQUEST_TIMEOUT, message))
        else:
            _log_closed(self.transport, "idle", None)
            self._let_go()

    def _head_too_large(self) -> ProxyError:
        message = (
            f"The head of the request is too large: this server takes {self.maxHeaders} headers "
            f"and {self.totalHeadersSize} bytes, the request line included."
        )
        return ProxyError(Failure.HEAD_TOO_LARGE, message)

    def _refuse(self, error: ProxyError) -> None:
        """Give the last answer of this connection."""
        self._drop_input()
        if not self.line_mode:
            # There is a request that can tell it, if it has not told something else already.
            self.requests[-1].refuse(error)
            return
        request_id = new_request_id()
        _log_closed(self.transport, error.failure.code, request_id)
        self.transport.write(_encode(error, request_id))
        self._networkProducer.unregisterProducer()
        _half_close(self.transport)
        self._linger()

    def _drop_input(self) -> None:
        self._stop_head_timer()
        self.setTimeout(None)
        self._input_dropped = True
        self.clearLineBuffer()
        self.dataReceived = drop  # type: ignore[method-assign]  # nothing is understood any more

    def _linger(self) -> None:
        if self._linger_timer is None:
            self._linger_timer = self.callLater(LINGER, self._lingered)

    def _lingered(self) -> None:
        self._linger_timer = None
        self.transport.abortConnection()

    def _let_go(self) -> None:
        """Close, if the client takes what is still to be sent; else cut it off by and by."""
        self.loseConnection()
        if self._abortingCall is None:
            self._abortingCall = self.callLater(self.abortTimeout, self.forceAbortClient)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class Newcomer(Protocol):
    """A connection for which there is no place: it is told so, and closed."""

    def __init__(self, connections: Connections, call_later: Callable[..., IDelayedCall]) -> None:
        """@param call_later: as the reactor has it."""
        self._connections = connections
        self._call_later = call_later
        self._timer: IDelayedCall | None = None
        self._answered = False

    def connectionMade(self) -> None:
        self._connections.refused += 1
        self._timer = self._call_later(LINGER, self._over)
        if self._connections.overflows:
            cast(Any, self.transport).abortConnection()

    def dataReceived(self, _data: bytes) -> None:
        # Not before the client has asked something: some take an early answer for a fault.
        if self._answered or self.transport is None:
            return
        self._answered = True
        request_id = new_request_id()
        error = _too_many_connections()
        _log_closed(self.transport, error.failure.code, request_id)
        self.transport.write(_encode(error, request_id))
        _half_close(self.transport)

    def connectionLost(self, _reason: Any = None) -> None:
        self._connections.refused -= 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _over(self) -> None:
        self._timer = None
        cast(Any, self.transport).abortConnection()


def new_request_id() -> str:
    """An id for a request that has none."""
    return f"req_{token_hex(16)}"


def address_of(transport: Any) -> str:
    """Where the other end is."""
    peer = transport.getPeer()
    return str(getattr(peer, "host", None) or getattr(peer, "name", None) or "unix")


def drop(data: bytes) -> None:
    """What a connection does with data that nobody waits for any more."""


def _half_close(transport: Any) -> None:
    """Say that nothing more will come, and go on reading if possible."""
    if ISSLTransport.providedBy(transport) or not ITCPTransport.providedBy(transport):
        transport.loseConnection()  # under TLS, what comes meanwhile is still read
    else:
        transport.loseWriteConnection()


def _too_many_connections() -> ProxyError:
    message = (
        "This server has as many connections as it may have. Try again a little later; its "
        "administrator may raise MAX_CONNECTIONS."
    )
    return ProxyError(Failure.SERVER_BUSY, message, retry_after=COME_BACK)


def _encode(error: ProxyError, request_id: str) -> bytes:
    """A whole response, where there is no request that could make one."""
    body = msgspec.json.encode(error.envelope())
    status = error.failure.status
    head = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        f"Server: claude-proxy/{__version__}",
        f"X-Request-Id: {request_id}",
        "X-Content-Type-Options: nosniff",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    if error.retry_after is not None:
        head.append(f"Retry-After: {error.retry_after}")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def _log_closed(transport: Any, reason: str, request_id: str | None) -> None:
    write = _log.debug if reason == "idle" else _log.info
    write(
        "closed a connection: {reason}",
        type="connection_closed",
        reason=reason,
        address=address_of(transport),
        request_id=request_id,
    )
