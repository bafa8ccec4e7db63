"""
Lines to events.

Only the few fields that the server itself acts on are decoded; the line stays beside them byte for
byte, so that unknown types and fields of newer CLI versions pass through as they came.  Nothing
here matches on a byte prefix: the order of keys differs between CLI versions.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

__all__ = ["Event", "parse_event"]


class Event(msgspec.Struct, gc=False, omit_defaults=True):
    """
    One line of the CLI's stream-json output.

    @ivar type: for example ``system``, ``assistant``, ``stream_event``, ``result``; empty when the
        line has none.
    @ivar is_replay: the line repeats a user message that was sent to the CLI.
    @ivar parent_tool_use_id: set on what a sub-agent says.
    @ivar line: the line as it came, without its newline.
    """

    type: str = ""
    subtype: str | None = None
    session_id: str | None = None
    uuid: str | None = None
    is_replay: bool = msgspec.field(default=False, name="isReplay")
    parent_tool_use_id: str | None = None
    # Not part of the wire format; were a key of this name ever sent, it would be overwritten.
    line: bytes = msgspec.field(default=b"", name="(line)")

    def fields(self) -> dict[str, Any]:
        """Decode the whole line; called only for the few events whose other fields matter."""
        decoded: dict[str, Any] = msgspec.json.decode(self.line)
        return decoded

    def __repr__(self) -> str:
        # The line holds what people wrote and read: it stays out of logs and tracebacks.
        return f"<Event {self.type}/{self.subtype} of {len(self.line)} bytes>"


_decode_event = msgspec.json.Decoder(Event).decode
_decode_anything = msgspec.json.Decoder().decode


def parse_event(line: bytes) -> Event | None:
    """
    Decode one line.

    @return: the event, or None if the line is no JSON object: the CLI and the programs it runs
        print such lines now and then, and none of them is an event.
    """
    try:
        event = _decode_event(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _parse_odd(line)
    event.line = line
    return event


def _parse_odd(line: bytes) -> Event | None:
    """Decode an object whose known fields have unexpected types: what fits is kept."""
    try:
        decoded = _decode_anything(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(decoded, dict):
        return None

    def text(key: Literal["type", "subtype", "session_id", "uuid"]) -> str | None:
        value = decoded.get(key)
        return value if isinstance(value, str) else None

    return Event(
        type=text("type") or "",
        subtype=text("subtype"),
        session_id=text("session_id"),
        uuid=text("uuid"),
        is_replay=decoded.get("isReplay") is True,
        line=line,
    )
