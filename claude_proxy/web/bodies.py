"""
How much memory the bodies of requests may take together.  Pure.
"""

from __future__ import annotations

__all__ = ["SMALL_BODY", "Bodies"]

SMALL_BODY = 256 * 1024
"""
Bodies up to this size, in bytes, are not counted: who asks little is served beside those who send
much.  The number of connections bounds them.  A longer one goes to a temporary file as it comes.
"""


class Bodies:
    """
    The sum of all long bodies that came in and whose requests are not answered yet.

    @ivar limit: in bytes.
    @ivar held: in bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def has_room(self, size: int) -> bool:
        """Whether a body of this size may come in as things are."""
        return size <= SMALL_BODY or self.held + size <= self.limit

    def grow(self, before: int, size: int) -> bool:
        """
        Count what has come of a body; without effect if that is too much.

        @param before: what was counted of it before, in bytes.
        @param size: what has come of it, in bytes.
        """
        if size <= SMALL_BODY:
            return True
        if self.held - before + size > self.limit:
            return False
        self.held += size - before
        return True

    def release(self, counted: int) -> None:
        """Forget what was counted of a body."""
        self.held -= counted
