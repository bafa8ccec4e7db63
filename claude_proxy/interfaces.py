"""The seams: what one layer may expect of another.  Few and narrow on purpose."""

from __future__ import annotations

from collections.abc import Mapping

from twisted.internet.defer import Deferred
from zope.interface import Attribute, Interface

from claude_proxy.cli.events import Event
from claude_proxy.cli.outcomes import Ending, Outcome
from claude_proxy.errors import ProxyError

__all__ = [
    "IAgentListener",
    "IFramer",
    "IRunningTurn",
    "ISessionControl",
    "ITurnObserver",
    "IWholeAnswer",
]


class IAgentListener(Interface):
    """Who is told what an agent process says; implemented by a turn."""

    def events_received(events: list[Event]) -> None:
        """
        Take the events that arrived together, in order; never empty.

        Control messages are not among them.
        """

    def agent_ended(ending: Ending) -> None:
        """
        Take the process's `Ending`; nothing follows.

        All it wrote has been delivered before, unless the ending says that something was lost.
        """


class ITurnObserver(Interface):
    """Who follows a turn; implemented by the response to a client."""

    def turn_planned(
        session_id: str | None, workspace: str | None, parameters: Mapping[str, object]
    ) -> None:
        """
        Learn what the turn runs on; once more if it is planned anew.

        @param session_id: None where only the CLI will tell.
        @param workspace: name of the session's workspace; None is the shared one.
        @param parameters: those in force, what was inherited included.
        """

    def turn_events(events: list[Event]) -> None:
        """
        Take the turn's events that arrived together, in order.

        The result is not among them: it comes with the outcome.
        """

    def turn_ended(outcome: Outcome) -> None:
        """Take the turn's `Outcome`: called exactly once, last, whatever happened."""


class IRunningTurn(Interface):
    """The handle by which the one who asked for a turn steers it."""

    session_id = Attribute("the session's id as far as it is known: str or None")

    def stop(reason: ProxyError | None) -> None:
        """End the turn now, with this `ProxyError`, or with None if nobody listens any more."""

    def remember(tip: str) -> None:
        """Let the session be found by this fingerprint of its conversation; at the turn's end."""

    def pause() -> None:
        """Stop reading from the agent process: the client is the slow one."""

    def resume() -> None:
        """Read on."""


class ISessionControl(Interface):
    """
    What can be told of a session that is at work, and done to it; implemented by who runs turns.

    Sessions are named by the ids under which they are kept.  Who calls never cancels.
    """

    def state(session_id: str) -> str:
        """
        What is going on in it now.

        ``running``: a turn is under way; ``live``: a process waits for its next turn; else
        ``idle``.
        """

    def interrupt(session_id: str) -> Deferred[bool]:
        """
        Stop the turn that is under way, so that it ends with the CLI's own result.

        @return: fires when it has ended, with True; with False at once if there is none.
        """

    def end(session_id: str, reason: ProxyError) -> Deferred[None]:
        """
        Stop the turn that is under way, with this `ProxyError`, and end the session's process.

        The session is unknown already: whoever waits for its lease is to look it up anew.

        @return: fires when nothing of the session runs any more; at once if nothing did.
        """


class IFramer(Interface):
    """
    A dialect's way to tell a turn as a stream, as it happens; implemented by dialects.

    Each method returns bytes for the client, none if there is nothing to tell.
    """

    def planned(workspace: str | None, parameters: Mapping[str, object]) -> None:
        """Learn what the turn runs on, as its observer does."""

    def open() -> bytes:
        """Begin, where nothing has happened yet that could be told."""

    def events(events: list[Event]) -> bytes:
        """
        Tell the events that arrived together; the result is not among them.

        @raise ProxyError: the stream cannot go on and be true.
        """

    def beat() -> bytes:
        """Give a sign of life in a long silence."""

    def end(outcome: Outcome, session_id: str | None) -> bytes:
        """
        Tell how the turn ended; nothing follows.

        @raise ProxyError: its success is none by this dialect's standards.
        """

    def failure(error: ProxyError, session_id: str | None) -> bytes:
        """Tell that the stream fails; nothing follows."""


class IWholeAnswer(Interface):
    """A dialect's way to tell a turn as one JSON body at its end; implemented by dialects."""

    def planned(workspace: str | None, parameters: Mapping[str, object]) -> None:
        """Learn what the turn runs on, as its observer does."""

    def events(events: list[Event]) -> None:
        """
        Take the events that arrived together; the result is not among them.

        @raise ProxyError: no true answer can come of it any more.
        """

    def body(outcome: Outcome, session_id: str | None) -> bytes:
        """
        Make the body.

        @raise ProxyError: the turn failed, also by this dialect's standards alone.
        """
