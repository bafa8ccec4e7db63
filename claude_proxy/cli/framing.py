"""
Bytes to lines.

The CLI writes one JSON object a line, of any length, and its writes arrive in pieces that end
anywhere, also inside a UTF-8 character.  So bytes are framed here and only whole lines are ever
decoded.  The only separator is the byte ``\\n``: U+0085 occurs unescaped inside the CLI's strings,
and `str.splitlines` would cut there.
"""

from __future__ import annotations

__all__ = ["LineFramer", "LineTooLongError"]


class LineTooLongError(Exception):
    """A line grew past the framer's limit.  The framer cannot be used any further."""


class LineFramer:
    """
    Collects chunks of bytes and hands out the lines they complete.

    The work is linear in the number of bytes, however the lines are cut: an unfinished line is
    kept as a list of its pieces and joined once.
    """

    __slots__ = ("_limit", "_pieces", "_size")

    def __init__(self, limit: int) -> None:
        """
        @param limit: the longest line accepted, in bytes without its newline.
        """
        self._limit = limit
        self._pieces: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> list[bytes]:
        """
        Add a chunk; return the lines that it completes, without their newlines.

        @raise LineTooLongError: a line, complete or not, is longer than the limit.
        """
        lines = data.split(b"\n")
        rest = lines.pop()
        if lines:
            if self._pieces:
                self._pieces.append(lines[0])
                lines[0] = b"".join(self._pieces)
                self._pieces = []
            # No line can be too long unless all that was collected is: look closer only then.
            if self._size + len(data) > self._limit and max(map(len, lines)) > self._limit:
                raise LineTooLongError
            self._size = 0
        if rest:
            self._pieces.append(rest)
            self._size += len(rest)
            if self._size > self._limit:
                raise LineTooLongError
        return lines

    def finish(self) -> bytes:
        """Return, and forget, what came after the last newline: a line that was never ended."""
        rest = b"".join(self._pieces)
        self._pieces = []
        self._size = 0
        return rest
