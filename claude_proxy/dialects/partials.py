"""
Partial messages of the CLI: what its ``stream_event`` lines hold, as far as it matters.

They come by the hundred thousand, and decoding them is most of the work of a stream.
"""

from __future__ import annotations

import msgspec

from claude_proxy.cli.events import Event

__all__ = ["UNDECODABLE", "Delta", "Head", "Partial", "Start", "decode_line", "decode_odd"]

UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding JSON may raise."""


class Delta(msgspec.Struct, gc=False):
    """More of a block; or, at a message's end, why it ends."""

    type: str = ""
    text: str = ""
    thinking: str = ""
    stop_reason: str | None = None


class Start(msgspec.Struct, gc=False):
    """A block that begins."""

    type: str = ""
    text: str = ""
    thinking: str = ""


class Head(msgspec.Struct, gc=False):
    """A message that begins."""

    id: str | None = None
    model: str | None = None


class Partial(msgspec.Struct, gc=False):
    """One event of the Messages API's stream."""

    type: str = ""
    delta: Delta | None = None
    content_block: Start | None = None
    message: Head | None = None


class Line(msgspec.Struct, gc=False):
    """A ``stream_event`` line."""

    event: Partial


decode_line = msgspec.json.Decoder(Line).decode
"""Decode a line; raises one of `UNDECODABLE`, for which there is `decode_odd`."""


def decode_odd(event: Event) -> Partial:
    """Decode what a strict decoder does not take; what is like nothing known is empty."""
    try:
        return msgspec.convert(event.fields(), Line).event
    except msgspec.ValidationError:
        return Partial()
