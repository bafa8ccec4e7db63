"""The HTTP server: connections, and the requests that come in by them."""

from __future__ import annotations

from time import monotonic
from typing import Any, cast

from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.logger import Logger
from twisted.web.resource import IResource
from twisted.web.server import Site

from claude_proxy.web.bodies import Bodies
from claude_proxy.web.channel import IDLE_TIME, Newcomer, ProxyChannel
from claude_proxy.web.connections import OVERFLOW, Connections
from claude_proxy.web.gate import Gate
from claude_proxy.web.guesses import Guesses
from claude_proxy.web.request import ProxyRequest

__all__ = ["ProxySite"]

_CONNECTIONS = 512
_BODIES = 256 * 1024 * 1024


class ProxySite(Site):
    """
    A site whose requests pass the gate.

    @ivar gate: read by each request.
    @ivar clock: for the timers of refused requests.
    @ivar connections: all there are.
    @ivar bodies: how much of them is held.
    @ivar guesses: the wrong keys that came in.
    """

    _log = Logger(namespace="claude_proxy.web")

    protocol = cast(Any, ProxyChannel)

    def __init__(
        self,
        resource: IResource,
        gate: Gate,
        reactor: IReactorTime,
        *,
        max_connections: int = _CONNECTIONS,
        overflow: int = OVERFLOW,
        max_bodies: int = _BODIES,
    ) -> None:
        """
        @param max_connections: how many there may be at once.
        @param overflow: how many more there may be for a moment, those that are refused included.
        @param max_bodies: what the bodies of unanswered requests may take together, in bytes; one
            of the largest may always come in.
        """
        super().__init__(
            resource,
            requestFactory=ProxyRequest,
            timeout=IDLE_TIME,
            reactor=reactor,
            parsePOSTFormSubmission=False,
        )
        self.gate = gate
        self.clock = reactor
        self.connections = Connections(max_connections, overflow)
        self.bodies = Bodies(max(max_bodies, gate.max_body))
        self.guesses = Guesses()
        self.displayTracebacks = False

    def buildProtocol(self, addr: IAddress | None) -> Any:
        if not self.connections.make_room():
            return Newcomer(self.connections, self.clock.callLater)
        channel: Any = super().buildProtocol(addr)
        channel.connections = self.connections
        return channel

    def acceptableProtocols(self) -> list[bytes]:
        # HTTP/2, which Twisted offers where it can, has channels of another kind.
        return [b"http/1.1"]

    def log(self, request: Any) -> None:
        """Write one record for an answered request, in place of an access log line."""
        self.log_end(request, complete=True)

    def log_end(self, request: ProxyRequest, *, complete: bool) -> None:
        """
        Write the record for a request that is over.

        @param complete: its client did not leave before the end of the answer.
        """
        self._log.debug(
            "{method} {path} answered with {status}",
            type="response",
            method=request.method.decode("latin-1"),
            path=request.path.decode("latin-1"),
            status=request.code if request.startedWriting else None,
            complete=complete,
            bytes=request.sentLength,
            duration_ms=round((monotonic() - request.received) * 1000, 1),
            request_id=request.request_id,
        )
