"""
One running agent process.

`AgentProcess` forwards: bytes become events for the listener, facts become inputs of the lifecycle
table, and the table's actions become signals and closed pipes.  It owns one timer, the wait of the
present rung of the kill ladder.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure as TwistedFailure

from claude_proxy.cli import control
from claude_proxy.cli.command import clean_stderr
from claude_proxy.cli.events import Event, parse_event, salvage_event
from claude_proxy.cli.framing import LineFramer, LineTooLongError
from claude_proxy.cli.lifecycle import Action, Input, Lifecycle, State
from claude_proxy.cli.outcomes import Ending
from claude_proxy.descriptors import TWISTED_READS, read_on, send_now
from claude_proxy.interfaces import IAgentListener

__all__ = ["POLITE_WAIT", "AgentProcess"]

POLITE_WAIT = 1.0
"""Seconds that every rung of the ladder but TERM waits for the process to go."""

_READ_ON = 64 * 1024 - TWISTED_READS
"""How many bytes more than Twisted does are read of stdout at a time: all that a pipe holds."""

_STDERR_KEPT = 64 * 1024
"""How many of the last bytes of stderr are kept for the error message."""


class _Pipe(Protocol):
    """The reading end of a child's stdout, as Twisted provides it."""

    def pauseProducing(self) -> None: ...

    def resumeProducing(self) -> None: ...


class AgentProcess(ProcessProtocol):
    """
    The protocol of one CLI process.

    @ivar pid: the process's id, also the id of its process group; None before the start.
    @ivar purpose: what it was started for.
    """

    _log = Logger(namespace="claude_proxy.cli")

    def __init__(
        self,
        clock: IReactorTime,
        listener: IAgentListener,
        *,
        has_control: bool,
        kill_timeout: float,
        line_limit: int,
        log_context: dict[str, object],
        purpose: str = "turn",
        heard: Callable[[], None] = lambda: None,
    ) -> None:
        """
        @param has_control: it takes control requests.
        @param kill_timeout: seconds between TERM and KILL.
        @param line_limit: longest line accepted from it, in bytes.
        @param log_context: fields for every log record about it.
        @param purpose: what it is started for: a turn, to be a spare, or to name the models.
        @param heard: called once, when it says its first word or exits.
        """
        self.pid: int | None = None
        self.purpose = purpose
        self._clock = clock
        self._listener = listener
        self.has_control = has_control
        self._kill_timeout = kill_timeout
        self._framer = LineFramer(line_limit)
        self._lifecycle = Lifecycle()
        self.log_context = log_context
        self._heard: Callable[[], None] | None = heard
        self._wait_timer: IDelayedCall | None = None
        self._paused = False
        self._discarding = False
        self._last_output = 0.0
        self._stderr = bytearray()
        self._reason: TwistedFailure | None = None
        self._fault: str | None = None
        self._hung_up = False
        self._requests_made = 0
        self._unanswered: dict[str, Callable[[control.ControlAnswer], None]] = {}
        self._gone: list[Deferred[None]] = []

    # What the turn asks for.

    @property
    def ended(self) -> bool:
        """Whether it is gone, or was given up."""
        return self._lifecycle.state in (State.GONE, State.LOST)

    def when_gone(self) -> Deferred[None]:
        """Fire when the process is gone, or given up; never fails."""
        if self.ended:
            return succeed(None)
        gone: Deferred[None] = Deferred()
        self._gone.append(gone)
        return gone

    def attach(self, listener: IAgentListener) -> None:
        """Tell somebody else from now on what it says."""
        self._listener = listener

    def describe(self, **fields: object) -> None:
        """Have these fields in its log records from now on."""
        self.log_context.update(fields)

    def write(self, data: bytes) -> None:
        """Write to its stdin; a process that is gone takes nothing any more."""
        if self.transport is None or self.ended:
            return
        sent = send_now(self._pipe(0), data)
        if sent < len(data):
            self.transport.write(data[sent:])

    def request(
        self,
        subtype: str,
        fields: dict[str, Any] | None = None,
        answered: Callable[[control.ControlAnswer], None] | None = None,
    ) -> None:
        """
        Send a control request; an answer that is an error is logged.

        @param answered: called with the answer, at most once: never if the process ends before.
        """
        self._requests_made += 1
        request_id = f"req_{self._requests_made}"
        if answered is not None:
            self._unanswered[request_id] = answered
        self.write(control.control_request(request_id, subtype, fields))

    def finish(self) -> None:
        """Let it leave by itself: its last result has been read."""
        self._happened(Input.FINISH)

    def stop(self) -> None:
        """Make it end, politely first; what it still writes is read and dropped."""
        self._happened(Input.STOP if self.has_control else Input.TERMINATE)

    def pause(self) -> None:
        """Stop reading its stdout, so that it blocks when the pipe is full.  stderr is read on."""
        if not self._discarding:
            self._paused = True
            self._stdout("pauseProducing")

    def resume(self) -> None:
        """Read its stdout again."""
        if self._paused:
            self._paused = False
            self._last_output = self._clock.seconds()
            self._stdout("resumeProducing")

    # What Twisted tells.

    def connectionMade(self) -> None:
        assert self.transport is not None  # noqa: S101 - Twisted sets it before this call
        self.pid = self.transport.pid
        self._log.debug(
            "agent process {pid} started",
            type="process_start",
            purpose=self.purpose,
            pid=self.pid,
            **self.log_context,
        )

    def outReceived(self, data: bytes) -> None:
        self._last_output = self._clock.seconds()
        self._was_heard()
        if self._fault is not None:
            return
        if len(data) >= TWISTED_READS:
            data += read_on(self._pipe(1), _READ_ON)
        try:
            lines = self._framer.feed(data)
        except LineTooLongError:
            self._fail("it wrote a line longer than this server accepts")
            return
        if lines:
            self._lines_received(lines)

    def errReceived(self, data: bytes) -> None:
        self._stderr += data
        if len(self._stderr) > 2 * _STDERR_KEPT:
            del self._stderr[:-_STDERR_KEPT]

    def outConnectionLost(self) -> None:
        self._hung_up = True
        self._happened(Input.HUNG_UP)

    def processExited(self, reason: TwistedFailure) -> None:
        self._was_heard()
        self._reason = reason
        self._happened(Input.EXITED)

    def processEnded(self, reason: TwistedFailure) -> None:
        self._reason = reason
        rest = self._framer.finish()
        if rest and self._fault is None:
            # Its newline never came: it counts if it is whole, as it does for the CLI itself.
            self._lines_received([rest])
        self._happened(Input.ENDED)

    # What becomes of it.

    def _was_heard(self) -> None:
        heard, self._heard = self._heard, None
        if heard is not None:
            heard()

    def _lines_received(self, lines: list[bytes]) -> None:
        events = []
        for line in lines:
            event = parse_event(line) or self._stray(line)
            if event is None:
                continue
            if event.type.startswith("control_"):
                self._control_received(event)
            else:
                events.append(event)
                if event.type == "result":
                    self._happened(Input.RESULT)
                    self._tell(events)
                    events = []  # what follows it is for who listens then
        self._tell(events)

    def _tell(self, events: list[Event]) -> None:
        if events and not self._discarding:
            self._listener.events_received(events)

    def _stray(self, line: bytes) -> Event | None:
        """Log a line that is no event; return the event that it may hold all the same."""
        event = salvage_event(line)
        if line.strip():
            self._log.warn(
                "{length} bytes on the CLI's stdout are no event and were left out",
                type="stray_output",
                length=len(line) - (len(event.line) if event is not None else 0),
                pid=self.pid,
                **self.log_context,
            )
        return event

    def _control_received(self, event: Event) -> None:
        if event.type == "control_request":
            refusal = control.refusal(event.fields())
            if refusal is not None:
                self.write(refusal)
        elif event.type == "control_response":
            answer = control.parse_answer(event.fields())
            if answer is not None:
                self._answer_received(answer)

    def _answer_received(self, answer: control.ControlAnswer) -> None:
        if answer.error is not None:
            self._log.warn(
                "the CLI refused the control request {control_id}: {error}",
                type="control_refused",
                control_id=answer.request_id,
                error=answer.error,
                pid=self.pid,
                **self.log_context,
            )
        answered = self._unanswered.pop(answer.request_id, None)
        if answered is not None:
            answered(answer)

    def _fail(self, fault: str) -> None:
        self._fault = fault
        self._happened(Input.TERMINATE)

    def _happened(self, happened: Input) -> None:
        for action in self._lifecycle.handle(happened):
            _PERFORM[action](self)

    def _wait(self, seconds: float) -> None:
        self._stop_waiting()
        self._wait_timer = self._clock.callLater(seconds, self._waited)

    def _stop_waiting(self) -> None:
        if self._wait_timer is not None:
            self._wait_timer.cancel()
            self._wait_timer = None

    def _waited(self) -> None:
        self._wait_timer = None
        if self._lifecycle.state is State.DRAINING:
            # What a process left in its pipe is its client's: it is not cut off while it flows, or
            # while the client is slow to take it.  (A client that stalls ends the turn elsewhere.)
            idle = self._clock.seconds() - self._last_output
            if self._paused:
                self._wait(POLITE_WAIT)
                return
            if idle < POLITE_WAIT:
                self._wait(POLITE_WAIT - idle)
                return
        self._happened(Input.TIMEOUT)

    def _pipe(self, number: int) -> Any:
        """Our end of the pipe that is this descriptor of its; None if that is closed."""
        return getattr(self.transport, "pipes", {}).get(number)

    def _stdout(self, method: str) -> None:
        pipe: _Pipe | None = self._pipe(1)
        if pipe is not None:
            getattr(pipe, method)()

    def _discard_output(self) -> None:
        self._discarding = True
        self.resume()

    def _send_interrupt(self) -> None:
        self.request("interrupt")

    def _close_stdin(self) -> None:
        if self.transport is not None:
            self.transport.closeStdin()

    def _signal(self, number: signal.Signals) -> None:
        """Signal the group: while the leader is not reaped, or once in `processExited`."""
        if self.pid is None:
            return
        if self._hung_up and self._fault is None:
            # Otherwise our own signal would be told as what ended it.
            self._fault = "it closed its output and stayed"
        self._log.info(
            "sent {signal} to the process group {pid}",
            type="process_signal",
            signal=number.name,
            pid=self.pid,
            **self.log_context,
        )
        with suppress(ProcessLookupError, PermissionError, ProcessExitedAlready):
            os.killpg(self.pid, number)

    def _signal_kill(self) -> None:
        if self._lifecycle.state is State.DRAINING:
            # The leader is reaped; only what it left in its group is meant, mostly nothing.
            if self.pid is not None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)
            return
        self._signal(signal.SIGKILL)

    def _close_pipes(self) -> None:
        if self.transport is not None:
            self.transport.loseConnection()

    def _report(self, *, lost: bool = False) -> None:
        stderr = clean_stderr(self._stderr[-_STDERR_KEPT:].decode("utf-8", "replace"))
        value: Any = None if self._reason is None else self._reason.value
        ending = Ending(
            exit_code=getattr(value, "exitCode", None),
            signal=getattr(value, "signal", None),
            stderr=stderr,
            fault=self._fault,
            lost=lost,
        )
        level = self._log.error if lost else self._log.info
        level(
            "agent process {pid} ended: {ending}",
            type="process_exit",
            pid=self.pid,
            ending=ending.describe(),
            kind=ending.kind,
            **self.log_context,
        )
        self._listener.agent_ended(ending)
        waiting, self._gone = self._gone, []
        for gone in waiting:
            gone.callback(None)

    def _report_lost(self) -> None:
        self._report(lost=True)


_PERFORM: dict[Action, Callable[[AgentProcess], None]] = {
    Action.DISCARD_OUTPUT: AgentProcess._discard_output,  # noqa: SLF001 - its own methods
    Action.SEND_INTERRUPT: AgentProcess._send_interrupt,  # noqa: SLF001
    Action.CLOSE_STDIN: AgentProcess._close_stdin,  # noqa: SLF001
    Action.SIGNAL_TERM: lambda agent: agent._signal(signal.SIGTERM),  # noqa: SLF001
    Action.SIGNAL_KILL: AgentProcess._signal_kill,  # noqa: SLF001
    Action.CLOSE_PIPES: AgentProcess._close_pipes,  # noqa: SLF001
    Action.WAIT_POLITE: lambda agent: agent._wait(POLITE_WAIT),  # noqa: SLF001
    Action.WAIT_KILL: lambda agent: agent._wait(agent._kill_timeout),  # noqa: SLF001
    Action.STOP_WAITING: AgentProcess._stop_waiting,  # noqa: SLF001
    Action.REPORT_GONE: AgentProcess._report,  # noqa: SLF001
    Action.REPORT_LOST: AgentProcess._report_lost,  # noqa: SLF001
}
