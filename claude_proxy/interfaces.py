"""The seams: what one layer may expect of another.  Few and narrow on purpose."""

from __future__ import annotations

from zope.interface import Attribute, Interface

from claude_proxy.cli.events import Event
from claude_proxy.cli.outcomes import Ending, Outcome
from claude_proxy.errors import ProxyError

__all__ = ["IAgentListener", "IRunningTurn", "ITurnObserver"]


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

    def turn_planned(session_id: str | None) -> None:
        """Learn the id of the turn's session (str), or None where only the CLI will tell."""

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

    def pause() -> None:
        """Stop reading from the agent process: the client is the slow one."""

    def resume() -> None:
        """Read on."""
