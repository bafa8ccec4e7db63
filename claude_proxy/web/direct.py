"""
Connections whose bytes leave at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twisted.protocols.policies import ProtocolWrapper

from claude_proxy.descriptors import send_now

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
        sent = send_now(self.transport, data)
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
