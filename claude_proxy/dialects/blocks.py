"""
What was told of the blocks of a model's message.

The CLI tells a block in pieces and then whole, and where a request to the model broke it tells the
whole message once more.  A block takes all of that and gives every character once.  Of what was
told it keeps nothing but the length and a digest, so that an answer may be of any length.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

__all__ = ["BLOCK_KINDS", "REASONING", "TEXT", "Block", "Mark", "told_blocks"]

TEXT = "text"
"""The answer itself."""

REASONING = "reasoning"
"""What the model thought and did on the way."""

BLOCK_KINDS = {"text": TEXT, "thinking": REASONING}
"""Blocks of the Messages API that are words, and what they are told as."""

_DIGEST_SIZE = 16


class Mark(NamedTuple):
    """How many characters of a block were told, and their digest."""

    length: int
    digest: bytes


class Block:
    """
    One text or thinking block.

    @ivar kind: what pieces of it are.
    @ivar length: how many characters of it were seen.
    @ivar whole: the whole block was seen; nothing that follows belongs to it.
    @ivar fresh: nothing of it was told.
    @ivar differs: it does not begin with what was told of it.
    """

    __slots__ = ("_digest", "_owed", "differs", "fresh", "kind", "length", "whole")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.length = 0
        self.whole = False
        self.fresh = True
        self.differs = False
        self._owed: Mark | None = None
        self._digest = blake2b(digest_size=_DIGEST_SIZE)

    def repeat(self, mark: Mark) -> None:
        """Say what was told of the block by a message that broke, and which this one repeats."""
        self._owed = mark
        self.fresh = False

    def take(self, text: str) -> str:
        """
        Take the next characters.

        @return: those of them that were not told before.
        """
        owed = self._owed
        if owed is not None:
            repeated = text[: owed.length - self.length]
            self._add(repeated)
            if self.length < owed.length:
                return ""
            self._owed = None
            self.differs = self._digest.digest() != owed.digest
            text = text[len(repeated) :]
        self._add(text)
        return "" if self.differs else text

    def complete(self, text: str) -> str:
        """
        Take the whole block.

        @return: what was not told of it before.
        """
        self.whole = True
        if len(text) < self.length:
            # All that the CLI itself took note of before it was interrupted.
            return ""
        if _digest(text[: self.length]) != self._digest.digest():
            self.differs = True
            return ""
        return self.take(text[self.length :])

    def mark(self) -> Mark:
        """All that was told of it, be it by its own message or by the one that is repeated."""
        return self._owed or Mark(self.length, self._digest.digest())

    @property
    def lacks(self) -> bool:
        """Whether more was told of it than it has."""
        return self._owed is not None

    def _add(self, text: str) -> None:
        self.length += len(text)
        self._digest.update(_bytes(text))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digest(text: str) -> bytes:
    return blake2b(_bytes(text), digest_size=_DIGEST_SIZE).digest()


def told_blocks(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The content blocks of a message that are of kinds that are told, and whole."""
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if isinstance(content, list):
        yield from (block for block in content if isinstance(block, dict) and _is_told(block))


def _is_told(block: dict[str, Any]) -> bool:
    kind = block.get("type")
    if not isinstance(kind, str):
        return False
    if kind in BLOCK_KINDS:
        return isinstance(block.get(kind), str)
    return kind.endswith(("tool_use", "tool_result"))
