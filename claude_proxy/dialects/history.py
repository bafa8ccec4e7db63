"""
Fingerprints of conversations: they tell which session a history belongs to.

The fingerprint of a history, its *tip*, is a chain of SHA-256 over its messages.  What is hashed
carries its length, so that two histories have one tip only if they are the same message by
message, except for what clients change by themselves:

- runs of whitespace count as one blank, and blank text counts as none: null, ``""`` and ``[]`` are
  one and the same empty content;
- a string and a list of one part with this text are the same; several parts of text stay several;
- system and developer messages are no part of it: clients put the time of day there;
- an image or a file counts by its data, not by its name or ``detail``; one that is given as a URL
  counts by this URL;
- an answer counts by what it says.  Blocks at its top that show a session id, and sections of
  thinking (``<thinking>``, ``<think>``, ``<details type="reasoning">``, parts of reasoning), are
  cut out, whether the client keeps what it was shown or not.

Of a message only its role and its content are looked at: ``reasoning_content``, ``name`` and such
may come back or be dropped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence

from claude_proxy.dialects.content import REASONING_PARTS, TEXT_PARTS
from claude_proxy.dialects.parameters import without_shown_block
from claude_proxy.errors import Failure, ProxyError

__all__ = ["next_tip", "spoken", "tips"]

_BEGINNING = hashlib.sha256(b"claude-proxy conversation 1").digest()
_UNHEARD = frozenset({"system", "developer"})

_OPENING = re.compile(r"<(thinking|think)>|<details(\s[^<>]*+)>")
_REASONING = re.compile(r"""\stype=["']?reasoning["']?(?=\s|$)""")


def tips(messages: Sequence[tuple[str, object]]) -> tuple[str, ...]:
    """
    The fingerprints, any of which finds the session that ended with this history; none if it says
    nothing.

    @param messages: role and content, as the client sent them, of what stands before the new
        messages.
    @raise ProxyError: INVALID_VALUE if a content is nested too deeply.
    """
    heard = [message for message in messages if message[0] not in _UNHEARD]
    return (_chain(heard),) if heard else ()


def next_tip(messages: Sequence[tuple[str, object]], answer: str) -> str:
    """
    The fingerprint of a whole conversation, once it has been answered.

    It is what `tips` gives for the next request of a client that sends these messages and the
    answer's text again, with or without what it was shown beside the text.

    @param messages: as in `tips`, all of them, the new ones too.
    """
    return _chain([*messages, ("assistant", answer)])


def spoken(text: str) -> str:
    """
    What an answer says: its text without sections of thinking, and without the blocks at its top
    that show a session id.  The time is linear in the length of the text.
    """
    return without_shown_block(_without_thinking(text)).strip()


def _chain(messages: Sequence[tuple[str, object]]) -> str:
    state = _BEGINNING
    for role, content in messages:
        if role in _UNHEARD:
            continue
        digest = hashlib.sha256(state + _framed(b"role", role))
        for kind, data in _items(role, content):
            digest.update(_framed(kind, data))
        state = digest.digest()
    return state.hex()


def _framed(kind: bytes, data: str) -> bytes:
    encoded = data.encode("utf-8", "surrogatepass")
    return b"%s %d %s" % (kind, len(encoded), encoded)


def _items(role: str, content: object) -> Iterator[tuple[bytes, str]]:
    """What counts in a content, in order: kind and data of each."""
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        kind, data = (b"text", part) if isinstance(part, str) else _item(part)
        if kind == b"text":
            data = " ".join((spoken(data) if role == "assistant" else data).split())
        if data or kind != b"text":
            yield kind, data


def _item(part: object) -> tuple[bytes, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if part is None or (isinstance(kind, str) and kind in REASONING_PARTS):
        return b"text", ""
    if isinstance(part, dict) and isinstance(kind, str):
        text = part.get(TEXT_PARTS[kind]) if kind in TEXT_PARTS else None
        if isinstance(text, str):
            return b"text", text
        data = _data(kind, part)
        if data is not None:
            return b"data", data
    return b"json", _json(part)


def _data(kind: str, part: dict[object, object]) -> str | None:
    """The data of an image or a file: the base64 of a ``data:`` URL, or the URL itself."""
    given: object = None
    if kind in ("image_url", "input_image"):
        given = part.get("image_url")
        given = given.get("url") if isinstance(given, dict) else given
    elif kind == "file":
        held = part.get("file")
        given = held.get("file_data") if isinstance(held, dict) else None
    elif kind == "input_file":
        given = part.get("file_data")
    if not isinstance(given, str) or not given:
        return None
    head, comma, data = given.partition(",")
    return data if comma and head[:5].lower() == "data:" else given


def _json(value: object) -> str:
    """Anything else, as JSON with its keys in order."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"))
    except RecursionError:
        message = "The content of a message is nested too deeply."
        raise ProxyError(Failure.INVALID_VALUE, message, param="messages") from None


def _without_thinking(text: str) -> str:
    """Cut the sections out, each with its end; a section that never ends is text."""
    said: list[str] = []
    kept_from = 0
    position = 0
    endless: set[str] = set()
    while (tag := _OPENING.search(text, position)) is not None:
        position = tag.end()
        name = tag[1] or "details"
        if name in endless or not (tag[1] or _REASONING.search(tag[2])):
            continue
        closing = f"</{name}>"
        end = text.find(closing, position)
        if end < 0:
            endless.add(name)
            continue
        said.append(text[kept_from : tag.start()].strip())
        position = kept_from = end + len(closing)
    if not kept_from:
        return text
    said.append(text[kept_from:].strip())
    return "\n\n".join(piece for piece in said if piece)
