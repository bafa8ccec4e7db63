"""
Connections whose bytes leave at once.

Twisted keeps what is written until the next turn of the reactor, which then asks the system whether
the socket takes it: two system calls more for each event of a stream, and a wait for everybody else
who is ready.  A socket mostly takes it at once, so it is asked at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twisted.internet.abstract import FileDescriptor
from twisted.protocols.policies import ProtocolWrapper

__all__ = ["DirectConnection"]


class DirectConnection(ProtocolWrapper):
    """
    One connection of a client.

    What is written goes Twisted's way, except between `gather` and `send`.
    """

    _gathered: list[bytes] | None = None

    def gather(self) -> None:
        """Keep what is written until `send`, so that it leaves in one piece."""
        if self._gathered is None:
            self._gathered = []

    def send(self) -> None:
        """Give what was gathered to the socket now; what it does not take waits as usual."""
        gathered, self._gathered = self._gathered, None
        if not gathered:
            return
        data = b"".join(gathered)
        sent = _send(self.transport, data)
        if sent < len(data):
            self._transport.write(data[sent:])

    def write(self, data: bytes) -> None:
        if self._gathered is None:
            self._transport.write(data)
        else:
            self._gathered.append(data)

    def writeSequence(self, data: Iterable[bytes]) -> None:
        if self._gathered is None:
            self._transport.writeSequence(data)
        else:
            self._gathered.extend(data)

    def loseConnection(self) -> None:
        self.send()
        super().loseConnection()

    @property
    def _transport(self) -> Any:
        return self.transport


def _send(transport: object, data: bytes) -> int:
    """
    Have a socket take data past Twisted's buffer; return how much it took.

    It takes nothing if something is in the buffer, which comes first; nor if it is no plain socket:
    under TLS, these are not the bytes that the socket is to see.
    """
    if not isinstance(transport, FileDescriptor) or transport.disconnecting:
        return 0
    # Twisted offers no public way to ask whether its buffer is empty.
    if not transport.connected or transport.dataBuffer or transport._tempDataBuffer:  # noqa: SLF001
        return 0
    sent = transport.writeSomeData(data)
    # An error shows again when the reactor tries, and is handled there.
    return sent if isinstance(sent, int) else 0
