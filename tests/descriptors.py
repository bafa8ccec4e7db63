"""A descriptor in memory, with Twisted's own buffer before it."""

from __future__ import annotations

from typing import Any, cast

from twisted.internet.abstract import FileDescriptor
from twisted.internet.address import IPv4Address

__all__ = ["EVERYTHING", "Socket"]

EVERYTHING = 1 << 20
"""Room for whatever a test writes."""


class Descriptors:
    """A reactor that only keeps who wants to write."""

    def __init__(self) -> None:
        self.writers: list[object] = []

    def addWriter(self, writer: object) -> None:
        if writer not in self.writers:
            self.writers.append(writer)

    def removeWriter(self, writer: object) -> None:
        if writer in self.writers:
            self.writers.remove(writer)

    def removeReader(self, reader: object) -> None:
        """Nothing is read here."""


class Socket(FileDescriptor):
    """
    A socket in memory with Twisted's own buffer before it.

    @ivar pieces: what it has taken, call by call.
    @ivar room: how many bytes it takes in one call.
    """

    def __init__(self) -> None:
        self.descriptors = Descriptors()
        super().__init__(cast(Any, self.descriptors))
        self.connected = 1
        self.pieces: list[bytes] = []
        self.room = EVERYTHING
        self.error: Exception | None = None

    def writeSomeData(self, data: bytes) -> int | BaseException:
        if self.error is not None:
            return self.error
        taken = bytes(data[: self.room])
        if taken:
            self.pieces.append(taken)
        return len(taken)

    def getPeer(self) -> IPv4Address:
        return IPv4Address("TCP", "127.0.0.1", 40000)

    getHost = getPeer

    @property
    def waits(self) -> bool:
        """Whether it waits for the reactor to say that there is room."""
        return bool(self.descriptors.writers)
