"""
Turns on their way to a client: as a stream of events, or as one whole answer, in any dialect.

The head of a stream is sent with the first frames, so that a failure before them has its true HTTP
status; after it a failure is a last event of the stream.  A client's leaving stops its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from zope.interface import implementer

from claude_proxy import __version__
from claude_proxy.cli.events import Event
from claude_proxy.cli.outcomes import Outcome
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.interfaces import IFramer, IRunningTurn, ITurnObserver, IWholeAnswer
from claude_proxy.web.outlet import Outlet
from claude_proxy.web.request import ProxyRequest, prepare_error, prepare_json

__all__ = ["EventStream", "WholeAnswer"]

HEARTBEAT = 15.0
"""Seconds of silence after which a sign of life is sent: proxies cut what is silent for 60."""

_TIMEOUTS = (Failure.TURN_TIMEOUT, Failure.INACTIVITY_TIMEOUT)

_SESSION_HEADER = b"X-Claude-Session-Id"


def _no_tip() -> str | None:
    """Of a dialect that does not find sessions by their conversations."""
    return None


class _Response:
    """What both kinds of answer have in common: an outlet, a turn, and the client's leaving."""

    _log = Logger(namespace="claude_proxy.web")

    def __init__(
        self,
        request: ProxyRequest,
        clock: IReactorTime,
        stall_timeout: float,
        dialect: IFramer | IWholeAnswer,
        tip: Callable[[], str | None] = _no_tip,
    ) -> None:
        """
        @param tip: gives, once the answer is whole, the fingerprint by which its conversation is
            found again.
        """
        self.request = request
        self.clock = clock
        self._dialect = dialect
        self._tip = tip
        self._turn: IRunningTurn | None = None
        self._session_id: str | None = None
        self._agent_acted = False
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

    def turn_planned(
        self, session_id: str | None, workspace: str | None, parameters: Mapping[str, object]
    ) -> None:
        self._session_id = session_id
        self._dialect.planned(workspace, parameters)

    def _set_session_header(self, session_id: str | None) -> None:
        if session_id is not None:
            self.request.setHeader(_SESSION_HEADER, session_id.encode())

    def _remember(self) -> None:
        """Must be done before the answer's end is sent: the next request follows at once."""
        tip = self._tip()
        if tip is not None and self._turn is not None:
            self._turn.remember(tip)

    def _refuse(self, error: ProxyError, *, interrupted: bool = False) -> None:
        """The head is unsent: the failure gets its true status."""
        self._set_session_header(self._session_id)
        if interrupted or self._agent_acted or error.failure in _TIMEOUTS:
            # The SDKs would repeat by themselves what took an hour, changed files, or was ended on
            # request.
            self.request.setHeader(b"X-Should-Retry", b"false")
        self.outlet.write(prepare_error(self.request, error))
        self.outlet.finish()

    def _watch(self, events: list[Event]) -> None:
        """See whether the agent has done something that a second turn would do again."""
        if not self._agent_acted:
            self._agent_acted = any(e.type == "user" and not e.is_replay for e in events)

    def _give_up(self, error: ProxyError) -> None:
        """What has come cannot be told truthfully: end the turn, which tells the client why."""
        if self._turn is not None:
            self._turn.stop(error)

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
    """Server-Sent Events."""

    def __init__(
        self,
        request: ProxyRequest,
        clock: IReactorTime,
        stall_timeout: float,
        framer: IFramer,
        *,
        tip: Callable[[], str | None] = _no_tip,
        patience: float | None = None,
    ) -> None:
        """
        @param patience: seconds from the turn's start after which the head is sent though there is
            nothing to tell yet; None to wait as long as it takes.
        """
        super().__init__(request, clock, stall_timeout, framer, tip)
        self._framer = framer
        self._patience = patience
        self._head_sent = False
        self._last_write = 0.0
        self._head_timer: IDelayedCall | None = None
        self._heartbeat_timer: IDelayedCall | None = None

    def turn_planned(
        self, session_id: str | None, workspace: str | None, parameters: Mapping[str, object]
    ) -> None:
        super().turn_planned(session_id, workspace, parameters)
        if self._patience is not None and self._head_timer is None:
            self._head_timer = self.clock.callLater(self._patience, self._out_of_patience)

    def turn_events(self, events: list[Event]) -> None:
        if not self._head_sent:
            self._watch(events)
        try:
            frames = self._framer.events(events)
        except ProxyError as error:
            self._give_up(error)
            return
        if frames:
            self._write(frames, events[0].session_id)

    def turn_ended(self, outcome: Outcome) -> None:
        session_id = outcome.session_id or self._session_id
        try:
            if outcome.error is not None and not self._head_sent:
                raise outcome.error
            frames = self._framer.end(outcome, session_id)
        except ProxyError as error:
            if not self._head_sent:
                self._stop_timers()
                self._refuse(error, interrupted=outcome.interrupted)
                return
            frames = self._framer.failure(error, session_id)
        else:
            self._remember()
        if frames:
            self._write(frames, session_id)
        self._stop_timers()
        self.outlet.finish()

    def _write(self, frames: bytes, session_id: str | None) -> None:
        if not self._head_sent:
            self._send_head(session_id or self._session_id)
        self._last_write = self.clock.seconds()
        self.outlet.write(frames)

    def _send_head(self, session_id: str | None) -> None:
        self._head_sent = True
        self.request.setHeader(b"Server", f"claude-proxy/{__version__}".encode())
        self.request.setHeader(b"Content-Type", b"text/event-stream")
        self.request.setHeader(b"Cache-Control", b"no-cache")
        self.request.setHeader(b"X-Accel-Buffering", b"no")
        self._set_session_header(session_id)
        if self._head_timer is not None and self._head_timer.active():
            self._head_timer.cancel()
        self._heartbeat_timer = self.clock.callLater(HEARTBEAT, self._beat)

    def _out_of_patience(self) -> None:
        if not self._head_sent:
            self._write(self._framer.open(), None)

    def _beat(self) -> None:
        silent = self.clock.seconds() - self._last_write
        if silent >= HEARTBEAT and not self.outlet.paused:
            self._last_write = self.clock.seconds()
            self.outlet.write(self._framer.beat())
            silent = 0.0
        self._heartbeat_timer = self.clock.callLater(max(HEARTBEAT - silent, 1.0), self._beat)

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._heartbeat_timer):
            if timer is not None and timer.active():
                timer.cancel()


@implementer(ITurnObserver)
class WholeAnswer(_Response):
    """One JSON body: the answer, or the error."""

    def __init__(
        self,
        request: ProxyRequest,
        clock: IReactorTime,
        stall_timeout: float,
        answer: IWholeAnswer,
        *,
        tip: Callable[[], str | None] = _no_tip,
    ) -> None:
        super().__init__(request, clock, stall_timeout, answer, tip)
        self._answer = answer

    def turn_events(self, events: list[Event]) -> None:
        self._watch(events)
        try:
            self._answer.events(events)
        except ProxyError as error:
            self._give_up(error)

    def turn_ended(self, outcome: Outcome) -> None:
        session_id = outcome.session_id or self._session_id
        try:
            body = self._answer.body(outcome, session_id)
        except ProxyError as error:
            self._refuse(error, interrupted=outcome.interrupted)
            return
        self._remember()
        self._set_session_header(session_id)
        self.outlet.write(prepare_json(self.request, 200, body))
        self.outlet.finish()
