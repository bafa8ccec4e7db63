"""
What a socket or a pipe takes, or gives, at once.

Twisted keeps what is written until the next turn of the reactor, which then asks the system whether
there is room: two system calls more for each event of a stream, four for a message to a process,
and a wait for everybody else who is ready.  Mostly there is room, so it is tried at once.

And it reads 8 KiB in each turn of the reactor, which for a process that says much is an eighth of
what the pipe holds.
"""

from __future__ import annotations

import os

from twisted.internet.abstract import FileDescriptor

__all__ = ["TWISTED_READS", "read_on", "send_now"]

TWISTED_READS = 8192
"""Bytes that Twisted reads at most at a time: if it got so many, there may be more."""


def send_now(descriptor: object, data: bytes) -> int:
    """
    Have the system take data past Twisted's buffer; return how many bytes it took.

    It takes nothing if something is in the buffer, which comes first; nor if it is no plain
    descriptor: under TLS, these are not the bytes that the socket is to see.
    """
    if not isinstance(descriptor, FileDescriptor) or descriptor.disconnecting:
        return 0
    # Twisted offers no public way to ask whether its buffer is empty.
    if not descriptor.connected or descriptor.dataBuffer or descriptor._tempDataBuffer:  # noqa: SLF001
        return 0
    sent = descriptor.writeSomeData(data)
    # An error shows again when the reactor tries, and is handled there.
    return sent if isinstance(sent, int) else 0


def read_on(descriptor: object, most: int) -> bytes:
    """
    What there is to read beside what Twisted has just read; empty if that was all.

    @param most: bytes.
    """
    if not isinstance(descriptor, FileDescriptor) or not descriptor.connected:
        return b""
    try:
        return os.read(descriptor.fileno(), most)  # type: ignore[no-untyped-call]  # Twisted's has no types
    except OSError:
        # There is no more now.  An error shows again, as does the end, when the reactor reads.
        return b""
