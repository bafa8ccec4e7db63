"""
Lines to events.

Only the few fields that the server itself acts on are decoded; the line stays beside them byte for
byte, so that unknown types and fields of newer CLI versions pass through as they came.  Nothing
here matches on a byte prefix: the order of keys differs between CLI versions.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

__all__ = ["Event", "parse_event", "salvage_event"]


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
        """
        Decode the whole line; called only for the few events whose other fields matter.

        @return: empty if something in it cannot be held, such as a number beyond all bounds.
        """
        return _decode_object(self.line) or {}

    def __repr__(self) -> str:
        # The line holds what people wrote and read: it stays out of logs and tracebacks.
        return f"<Event {self.type}/{self.subtype} of {len(self.line)} bytes>"


_decode_event = msgspec.json.Decoder(Event).decode
_decode_anything = msgspec.json.Decoder().decode
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

# An escape sequence: a whole surrogate pair, half of one, or any other.
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|(?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)


def parse_event(line: bytes) -> Event | None:
    """
    Decode one line.

    @return: the event, or None if the line is no JSON object: the CLI and the programs it runs
        print such lines now and then, and none of them is an event.
    """
    try:
        event = _decode_event(line)
    except _UNDECODABLE:
        return _parse_odd(line)
    event.line = line
    return event


def salvage_event(line: bytes) -> Event | None:
    """
    Find the event behind words that somebody else wrote into its line.

    A program that shares the CLI's stdout may end its output without a newline; the event that
    follows must not be lost, least of all a result.

    @return: the event, if what follows the first opening brace is one that belongs to a session.
    """
    start = line.find(b'{"')
    event = parse_event(line[start:]) if start > 0 else None
    return event if event is not None and event.type and event.session_id else None


def _parse_odd(line: bytes) -> Event | None:
    """Decode an object that has known fields of unexpected types: what fits is kept."""
    decoded = _decode_object(line)
    if decoded is None:
        return None

    def text(
        key: Literal["type", "subtype", "session_id", "uuid", "parent_tool_use_id"],
    ) -> str | None:
        value = decoded.get(key)
        return value if isinstance(value, str) else None

    return Event(
        type=text("type") or "",
        subtype=text("subtype"),
        session_id=text("session_id"),
        uuid=text("uuid"),
        is_replay=decoded.get("isReplay") is True,
        parent_tool_use_id=text("parent_tool_use_id"),
        line=line,
    )


def _decode_object(line: bytes) -> dict[str, Any] | None:
    """Decode a line that is, or can be mended to be, a JSON object."""
    try:
        decoded = _decode_anything(line)
    except _UNDECODABLE:
        try:
            decoded = _decode_anything(_mend(line))
        except _UNDECODABLE:
            return None
    return decoded if isinstance(decoded, dict) else None


def _mend(line: bytes) -> bytes:
    """
    Put the replacement character where a string of the line holds no text.

    The CLI cuts long texts between two UTF-16 units.  Where that halves a character, it writes
    half of a surrogate pair, which JSON's grammar allows and a strict decoder does not.
    """

    def replaced(escape: re.Match[bytes]) -> bytes:
        return escape[0] if escape["half"] is None else b"\\ufffd"

    return _ESCAPE.sub(replaced, line).decode("utf-8", "replace").encode()
