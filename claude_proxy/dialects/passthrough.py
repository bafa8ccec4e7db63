"""
The native dialect's answers: the CLI's own events, byte for byte.

They are told as a one-shot run of the CLI would have shown them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict

import msgspec
from zope.interface import implementer

from claude_proxy.cli.events import Event
from claude_proxy.cli.outcomes import Outcome, OutcomeKind
from claude_proxy.errors import ErrorFields, Failure, ProxyError
from claude_proxy.interfaces import IFramer, IWholeAnswer

__all__ = ["NativeAnswer", "NativeEvent", "NativeFailure", "NativeResult", "NativeStream"]

_SIGN_OF_LIFE = b":\n"
"""A comment.  No blank line follows it: some clients take one for the end of an event."""

_TIMEOUTS = (Failure.TURN_TIMEOUT, Failure.INACTIVITY_TIMEOUT)
_ANSWERED = (OutcomeKind.SUCCESS, OutcomeKind.LIMIT, OutcomeKind.REFUSAL)


class NativeEvent(TypedDict):
    """
    An event of the CLI, byte for byte: `system`, `assistant`, `user`, `stream_event`, `result`.

    Other types may come with other versions.  The last event has the type `result`.
    """

    type: str
    subtype: NotRequired[str]
    session_id: NotRequired[str | None]


class NativeResult(TypedDict):
    """The CLI's own word on how a turn ended; further fields differ from version to version."""

    type: Literal["result"]
    subtype: str
    is_error: bool
    result: NotRequired[str]
    session_id: NotRequired[str]
    num_turns: NotRequired[int]
    duration_ms: NotRequired[float]
    total_cost_usd: NotRequired[float]
    usage: NotRequired[dict[str, Any]]
    permission_denials: NotRequired[list[Any]]


class NativeFailure(TypedDict):
    """The last event of a stream that the server had to end; it alone has an `error`."""

    type: Literal["result"]
    subtype: Literal["timeout", "error"]
    is_error: bool
    result: str
    error: ErrorFields
    session_id: str | None


@implementer(IFramer)
class NativeStream:
    """
    The events as Server-Sent Events.

    What a one-shot run would not have shown is left out: replays of the user's message, and,
    unless asked for, the CLI's partial messages with the status lines that come with them.
    """

    def __init__(self, *, partial_messages: bool) -> None:
        """
        @param partial_messages: the client asked for them.
        """
        self._partial_messages = partial_messages

    def planned(self, workspace: str | None, parameters: Mapping[str, object]) -> None:
        """It is in the events."""

    def open(self) -> bytes:
        return b""

    def events(self, events: list[Event]) -> bytes:
        if self._partial_messages:
            lines = [event.line for event in events if not event.is_replay]
        else:
            lines = [
                event.line
                for event in events
                if event.type != "stream_event"
                and not event.is_replay
                and not (event.type == "system" and event.subtype == "status")
            ]
        if not lines:
            return b""
        frames = b"data: " + b"\n\ndata: ".join(lines) + b"\n\n"
        # A carriage return ends a line of an event stream; between the tokens of a JSON text, the
        # only place where it may stand, a blank does as well.
        return frames.replace(b"\r", b" ") if b"\r" in frames else frames

    def beat(self) -> bytes:
        return _SIGN_OF_LIFE

    def end(self, outcome: Outcome, session_id: str | None) -> bytes:
        if outcome.result is not None:
            return self.events([outcome.result])
        return b"" if outcome.error is None else self.failure(outcome.error, session_id)

    def failure(self, error: ProxyError, session_id: str | None) -> bytes:
        event: NativeFailure = {
            "type": "result",
            "subtype": "timeout" if error.failure in _TIMEOUTS else "error",
            "is_error": True,
            "result": error.message,
            "error": error.envelope()["error"],
            "session_id": session_id,
        }
        return b"data: " + msgspec.json.encode(event) + b"\n\n"


@implementer(IWholeAnswer)
class NativeAnswer:
    """The ``result`` event alone, for a client that did not want a stream."""

    def planned(self, workspace: str | None, parameters: Mapping[str, object]) -> None:
        """It is not told."""

    def events(self, events: list[Event]) -> None:
        """Nothing but the result is told."""

    def body(self, outcome: Outcome, session_id: str | None) -> bytes:  # noqa: ARG002 - it is in the result
        if outcome.kind in _ANSWERED and outcome.result is not None:
            return outcome.result.line
        raise outcome.error or ProxyError(Failure.INTERNAL_ERROR)
