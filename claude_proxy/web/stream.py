"""
Turns on their way to a client: as a stream of events, or as one whole answer.

The head of a stream is sent with the first event, so that a failure before it has its true HTTP
status; after it a failure is a last event of the stream.  A client's leaving stops its turn.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from zope.interface import implementer

from claude_proxy import __version__
from claude_proxy.cli.events import Event
from claude_proxy.cli.outcomes import Outcome
from claude_proxy.dialects import native
from claude_proxy.errors import ProxyError
from claude_proxy.interfaces import IRunningTurn, ITurnObserver
from claude_proxy.web.outlet import Outlet
from claude_proxy.web.site import ProxyRequest, prepare_error, prepare_json

__all__ = ["EventStream", "WholeAnswer"]

HEARTBEAT = 15.0
"""Seconds of silence after which a sign of life is sent: proxies cut what is silent for 60."""

_SIGN_OF_LIFE = b":\n"
"""A comment.  No blank line follows it: some clients take one for the end of an event."""

_SESSION_HEADER = b"X-Claude-Session-Id"


class _Response:
    """What both kinds of answer have in common: an outlet, a turn, and the client's leaving."""

    _log = Logger(namespace="claude_proxy.web")

    def __init__(self, request: ProxyRequest, clock: IReactorTime, stall_timeout: float) -> None:
        self.request = request
        self.clock = clock
        self._turn: IRunningTurn | None = None
        self._session_id: str | None = None
        self.outlet = Outlet(
            request,
            clock,
            stall_timeout,
            on_pause=self._paused,
            on_resume=self._resumed,
            on_gone=self._gone,
        )

    def run(self, start: Callable[[], IRunningTurn]) -> None:
        """Start the turn whose observer this is."""
        try:
            self._turn = start()
        except ProxyError as error:
            self._refuse(error)

    def turn_planned(self, session_id: str | None) -> None:
        self._session_id = session_id

    def _set_session_header(self, session_id: str | None) -> None:
        if session_id is not None:
            self.request.setHeader(_SESSION_HEADER, session_id.encode())

    def _refuse(self, error: ProxyError) -> None:
        """The head is unsent: the failure gets its true status."""
        self._set_session_header(self._session_id)
        self.outlet.write(prepare_error(self.request, error))
        self.outlet.finish()

    def _paused(self) -> None:
        if self._turn is not None:
            self._turn.pause()

    def _resumed(self) -> None:
        if self._turn is not None:
            self._turn.resume()

    def _gone(self) -> None:
        self._log.info(
            "the client has left", type="client_gone", request_id=self.request.request_id
        )
        if self._turn is not None:
            self._turn.stop(None)


@implementer(ITurnObserver)
class EventStream(_Response):
    """Server-Sent Events in the native dialect."""

    def __init__(
        self,
        request: ProxyRequest,
        clock: IReactorTime,
        stall_timeout: float,
        *,
        partial_messages: bool,
    ) -> None:
        super().__init__(request, clock, stall_timeout)
        self._partial_messages = partial_messages
        self._head_sent = False
        self._last_write = 0.0
        self._heartbeat_timer: IDelayedCall | None = None

    def turn_events(self, events: list[Event]) -> None:
        frames = native.encode_events(events, partial_messages=self._partial_messages)
        if not frames:
            return
        if not self._head_sent:
            self._send_head(events[0].session_id or self._session_id)
        self._last_write = self.clock.seconds()
        self.outlet.write(frames)

    def turn_ended(self, outcome: Outcome) -> None:
        session_id = outcome.session_id or self._session_id
        if not self._head_sent and outcome.error is not None:
            self._refuse(outcome.error)
            return
        if outcome.result is not None:
            self.turn_events([outcome.result])
        elif outcome.error is not None:
            self.outlet.write(native.failure_frame(outcome.error, session_id))
        if self._heartbeat_timer is not None:
            self._heartbeat_timer.cancel()
            self._heartbeat_timer = None
        self.outlet.finish()

    def _send_head(self, session_id: str | None) -> None:
        self._head_sent = True
        self.request.setHeader(b"Server", f"claude-proxy/{__version__}".encode())
        self.request.setHeader(b"Content-Type", b"text/event-stream")
        self.request.setHeader(b"Cache-Control", b"no-cache")
        self.request.setHeader(b"X-Accel-Buffering", b"no")
        self._set_session_header(session_id)
        self._heartbeat_timer = self.clock.callLater(HEARTBEAT, self._beat)

    def _beat(self) -> None:
        silent = self.clock.seconds() - self._last_write
        if silent >= HEARTBEAT and not self.outlet.paused:
            self._last_write = self.clock.seconds()
            self.outlet.write(_SIGN_OF_LIFE)
            silent = 0.0
        self._heartbeat_timer = self.clock.callLater(max(HEARTBEAT - silent, 1.0), self._beat)


@implementer(ITurnObserver)
class WholeAnswer(_Response):
    """One JSON body: the ``result`` event, or the error."""

    def turn_events(self, events: list[Event]) -> None:
        """Nothing is sent before the end."""

    def turn_ended(self, outcome: Outcome) -> None:
        try:
            body = native.whole_answer(outcome)
        except ProxyError as error:
            self._refuse(error)
            return
        self._set_session_header(outcome.session_id or self._session_id)
        self.outlet.write(prepare_json(self.request, 200, body))
        self.outlet.finish()
