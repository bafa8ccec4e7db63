"""A helper for work that several wait for."""

from __future__ import annotations

from twisted.internet.defer import Deferred

__all__ = ["branch"]


def branch(work: Deferred[None]) -> Deferred[None]:
    """A Deferred that fires when `work` has, however it ended, without touching its result."""
    own: Deferred[None] = Deferred()

    def fired(result: None) -> None:
        own.callback(None)
        return result

    work.addBoth(fired)
    return own
