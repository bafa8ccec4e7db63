"""
One turn on an agent process: one user message and everything up to its result.

A turn has two clocks beside the process's own ladder: the limit of the whole turn, and the longest
silence of the CLI, which stands still while the client is the slow one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from zope.interface import implementer

from claude_proxy.cli.events import Event
from claude_proxy.cli.figures import ProcessTotals, turn_result
from claude_proxy.cli.outcomes import (
    Ending,
    Figures,
    Outcome,
    OutcomeKind,
    outcome_of_ending,
    outcome_of_result,
)
from claude_proxy.cli.pairing import Pairing
from claude_proxy.cli.process import AgentProcess
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.interfaces import IAgentListener, ITurnObserver

__all__ = ["Limits", "Turn"]


_RESULT_WAIT = 5.0
"""Seconds that an interrupted turn may take to its result; the CLI takes some 10 ms."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a turn may take, and how long the CLI may be silent in it, in seconds."""

    total: float
    inactivity: float


class _State(Enum):
    WAITING = auto()
    """The message is sent, no event has come."""
    RUNNING = auto()
    ENDED = auto()


@implementer(IAgentListener)
class Turn:
    """
    Follows one turn and ends it exactly once.

    @ivar done: fires with the `Outcome`; never fails.
    @ivar totals: what the process has reported so far.
    @ivar may_be_taken: it was ended when the CLI may have taken the message, and not said so yet.
    """

    _log = Logger(namespace="claude_proxy.cli")

    def __init__(
        self,
        clock: IReactorTime,
        observer: ITurnObserver,
        limits: Limits,
        *,
        requested: float,
        begun: Callable[[str | None], None],
        noticed: Callable[[Event], None],
        pairing: Pairing,
        totals: ProcessTotals,
        keeps: bool,
    ) -> None:
        """
        @param requested: when the request came, by `clock`: figures count from then.
        @param begun: called with the session's id when the CLI has taken the message.
        @param noticed: called with each event about the process as a whole, and with the results
            of turns that the process has begun by itself.
        @param pairing: tells which events are the turn's own.
        @param totals: what the process has reported before.
        @param keeps: the process may stay after its result; whoever asked for the turn decides.
        """
        self.done: Deferred[Outcome] = Deferred()
        self._clock = clock
        self._observer = observer
        self._limits = limits
        self._requested = requested
        self._begun: Callable[[str | None], None] | None = begun
        self._noticed = noticed
        self._pairing = pairing
        self._keeps = keeps
        self.totals = totals
        self.may_be_taken = False
        self._state = _State.WAITING
        self._agent: AgentProcess | None = None
        self._session_id: str | None = None
        self._refused = False
        self._retry_after: int | None = None
        self._figures = Figures()
        self._paused = False
        self._last_heard = 0.0
        self._total_timer: IDelayedCall | None = None
        self._inactivity_timer: IDelayedCall | None = None
        self._result_timer: IDelayedCall | None = None

    def start(self, agent: AgentProcess, lines: bytes) -> None:
        """Send the message; from now on the clocks run."""
        self._agent = agent
        self._last_heard = self._clock.seconds()
        self._total_timer = self._clock.callLater(self._limits.total, self._took_too_long)
        self._inactivity_timer = self._clock.callLater(self._limits.inactivity, self._was_silent)
        agent.write(lines)

    def stop(self, reason: ProxyError | None) -> None:
        """End the turn now; `reason` is None if its client has left."""
        if self._state is _State.ENDED:
            return
        self.may_be_taken = self._begun is not None
        kind = OutcomeKind.ABANDONED if reason is None else OutcomeKind.FAILURE
        self._end(Outcome(kind, reason))
        if self._agent is not None:
            self._agent.stop()

    def interrupt(self) -> bool:
        """
        Ask the CLI to end the turn with a result; False if no turn runs.

        One that takes no such request, or gives no result in time, is stopped.
        """
        if self._state is _State.ENDED or self._agent is None:
            return False
        if not self._agent.has_control:
            self._interrupted_in_vain()
        elif self._result_timer is None:
            self._agent.request("interrupt")
            self._result_timer = self._clock.callLater(_RESULT_WAIT, self._interrupted_in_vain)
        return True

    def _interrupted_in_vain(self) -> None:
        self._result_timer = None
        message = "The turn was interrupted, and the Claude CLI ended it without a result."
        self.stop(ProxyError(Failure.CLI_FAILED, message))

    def pause(self) -> None:
        """The client is slow: read nothing, and do not count the silence against the CLI."""
        if self._state is not _State.ENDED and self._agent is not None:
            self._paused = True
            self._agent.pause()

    def resume(self) -> None:
        """The client has caught up."""
        if self._paused and self._agent is not None:
            self._paused = False
            self._last_heard = self._clock.seconds()
            self._agent.resume()

    # What the agent process tells.

    def events_received(self, events: list[Event]) -> None:
        now = self._last_heard = self._clock.seconds()
        events = self._sort(events)
        if not events:
            return
        if self._state is _State.WAITING:
            self._state = _State.RUNNING
            self._figures = replace(self._figures, first_event=now - self._requested)
        for position, event in enumerate(events):
            if event.type == "stream_event" or event.type == "assistant":  # noqa: PLR1714 - hot
                if self._figures.first_token is None or event.type == "assistant":
                    self._content_received(event, now)
            elif event.type == "result":
                self._result_received(events[: position + 1])
                return
            elif event.type == "system":
                if not self._system_received(event, events[: position + 1]):
                    return
            elif event.type == "rate_limit_event":
                self._limit_received(event)
        self._deliver(events)

    def _sort(self, events: list[Event]) -> list[Event]:
        """The turn's own events; what others cost is not its cost."""
        if self._state is _State.ENDED:
            return []
        own = self._pairing.sort(events)
        while self._pairing.foreign_results:
            result, self.totals = turn_result(self._pairing.foreign_results.pop(0), self.totals)
            self._noticed(result)
        return own

    def agent_ended(self, ending: Ending) -> None:
        if self._state is not _State.ENDED:
            if self._pairing.is_holding:
                self.may_be_taken = True
                first_event = self._last_heard - self._requested
                self._figures = replace(self._figures, first_event=first_event)
            self._end(outcome_of_ending(ending, spoke=self._state is _State.RUNNING))

    def _deliver(self, events: list[Event]) -> None:
        try:
            self._observer.turn_events(events)
        except Exception:  # noqa: BLE001 - it must not reach the reactor, which would drop the pipe
            about: dict[str, Any] = {} if self._agent is None else self._agent.log_context
            self._log.failure("events could not be passed on", type="internal_error", **about)
            self.stop(ProxyError(Failure.INTERNAL_ERROR))

    def _content_received(self, event: Event, now: float) -> None:
        if event.type == "assistant":
            self._noticed(event)
        if self._figures.first_token is None and _has_content(event):
            self._figures = replace(self._figures, first_token=now - self._requested)

    def _system_received(self, event: Event, so_far: list[Event]) -> bool:
        """Take note of what concerns the turn as a whole; False if it ended here."""
        self._noticed(event)
        if event.subtype == "init":
            self._session_id = event.session_id
            if self._begun is not None:
                begun, self._begun = self._begun, None
                begun(event.session_id)
        elif event.subtype == "model_refusal_no_fallback":
            self._refused = True
        elif event.subtype == "api_retry" and event.fields().get("error_status") == 401:  # noqa: PLR2004 - Unauthorized
            # The CLI would try the same key ten times more, for three minutes.
            self._deliver(so_far)
            self.stop(ProxyError(Failure.CLI_NOT_AUTHENTICATED))
            return False
        return True

    def _limit_received(self, event: Event) -> None:
        info = event.fields().get("rate_limit_info")
        resets_at = info.get("resetsAt") if isinstance(info, dict) else None
        if isinstance(resets_at, (int, float)):
            self._retry_after = max(1, math.ceil(resets_at - self._clock.seconds()))

    def _result_received(self, events: list[Event]) -> None:
        *before, result = events
        if before:
            self._deliver(before)
        if self._state is _State.ENDED:
            return
        result, self.totals = turn_result(result, self.totals)
        outcome = outcome_of_result(result, refused=self._refused, retry_after=self._retry_after)
        self._end(outcome)
        # A client that became slow with these very events is no longer asked, and a process whose
        # output is not read never comes to its end.
        self.resume()
        if self._agent is not None and not self._keeps:
            self._agent.finish()

    # Its ends.

    def _took_too_long(self) -> None:
        self._total_timer = None
        message = (
            f"The turn took longer than the {self._limits.total:g} seconds that this server allows "
            "(CLAUDE_TOTAL_TIMEOUT_MS) and was stopped."
        )
        self.stop(ProxyError(Failure.TURN_TIMEOUT, message))

    def _was_silent(self) -> None:
        self._inactivity_timer = None
        silent = 0.0 if self._paused else self._clock.seconds() - self._last_heard
        left = self._limits.inactivity - silent
        if left > 0:
            # Re-armed here rather than at each event: events come by the hundred thousand.
            self._inactivity_timer = self._clock.callLater(left, self._was_silent)
            return
        message = (
            f"The Claude CLI was silent for the {self._limits.inactivity:g} seconds that this "
            "server allows (CLAUDE_INACTIVITY_TIMEOUT_MS) and was stopped."
        )
        self.stop(ProxyError(Failure.INACTIVITY_TIMEOUT, message))

    def _end(self, outcome: Outcome) -> None:
        self._state = _State.ENDED
        for timer in (self._total_timer, self._inactivity_timer, self._result_timer):
            if timer is not None:
                timer.cancel()
        self._total_timer = self._inactivity_timer = self._result_timer = None
        session_id = outcome.session_id or self._session_id
        self.done.callback(replace(outcome, figures=self._figures, session_id=session_id))


def _has_content(event: Event) -> bool:
    """Whether an event brings text, thinking or a tool call, or begins to."""
    return event.type == "assistant" or b'"content_block_' in event.line
