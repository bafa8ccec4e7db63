"""
How sessions are listed: what may be asked for, and how each is told.  Pure.

A list is handed out page by page.  The end of a page is told as a word that clients hand back; what
it holds is nobody else's business.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, TypedDict

import msgspec

from claude_proxy.dialects.fields import spelt, told
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.records import Place, SessionRecord

__all__ = [
    "BEFORE",
    "LIMIT",
    "STATES",
    "DeletedSession",
    "InterruptedSession",
    "PageQuery",
    "Session",
    "SessionPage",
    "decode_query",
    "encode_deleted",
    "encode_interrupted",
    "encode_page",
    "encode_session",
]

_DEFAULT_LIMIT = 100
_MAX_LIMIT = 1000

_NUMBER = re.compile("[0-9]{1,4}")
_PLACE = re.compile(r"([0-9]+\.[0-9]+)_([!-~]+)")

_KEPT = (
    "The session is forgotten. The CLI's transcript of the conversation is not deleted: it stays "
    "on the server, in the CLI's own configuration directory, under the session's id."
)
_NOTHING_KEPT = "The session is forgotten. It had not begun, so there is no transcript of it."

LIMIT = Annotated[int, told(minimum=1, maximum=_MAX_LIMIT, default=_DEFAULT_LIMIT)]
"""What a client may say of how many sessions it wants."""

BEFORE = Annotated[str, spelt(_PLACE)]
"""What it may say of where a page is to begin."""

STATES = ("running", "live", "idle")
"""What a session can be: in a turn, waiting in a process, or neither."""

_Moment = Annotated[str, told(format="date-time")]


class Session(TypedDict):
    """
    A session; `workspace` is null for the shared one, `cost_usd` of all its turns.

    Its `own_turns` are those that the agent began by itself.
    """

    id: str
    workspace: str | None
    created: _Moment
    last_used: _Moment
    state: Annotated[str, told(enum=list(STATES))]
    turns: int
    own_turns: int
    cost_usd: float
    last_outcome: str | None


class SessionPage(TypedDict):
    """A part of the list, the newest session first; `next` is for the parameter `before`."""

    sessions: list[Session]
    next: str | None


class InterruptedSession(TypedDict):
    """Whether a turn was running; it has ended."""

    id: str
    interrupted: bool


class DeletedSession(TypedDict):
    """What has become of a session that is deleted, and of the CLI's transcript of it."""

    id: str
    deleted: bool
    transcript_kept: bool
    message: str


@dataclass(frozen=True, slots=True)
class PageQuery:
    """
    Which page is asked for.

    @ivar limit: how many sessions at most.
    @ivar before: where the last page ended; None for the first page.
    """

    limit: int
    before: Place | None


def decode_query(given: Mapping[bytes, Sequence[bytes]]) -> PageQuery:
    """
    Read a URL's query; what is unknown in it counts for nothing, of what is repeated the last one.

    @raise ProxyError: INVALID_VALUE that names the parameter.
    """
    limit, before = _last(given, b"limit"), _last(given, b"before")
    return PageQuery(_limit(limit) if limit else _DEFAULT_LIMIT, _place(before) if before else None)


def _last(given: Mapping[bytes, Sequence[bytes]], name: bytes) -> str:
    values = given.get(name)
    return values[-1].decode("utf-8", "replace") if values else ""


def _limit(text: str) -> int:
    number = int(text) if _NUMBER.fullmatch(text) else 0
    if not 1 <= number <= _MAX_LIMIT:
        message = f"'limit' must be a number from 1 to {_MAX_LIMIT}."
        raise ProxyError(Failure.INVALID_VALUE, message, param="limit")
    return number


def _place(text: str) -> Place:
    match = _PLACE.fullmatch(text)
    created = float(match[1]) if match else math.inf
    if match is None or math.isinf(created):
        message = "'before' must be the 'next' of an earlier page, as the server gave it."
        raise ProxyError(Failure.INVALID_VALUE, message, param="before")
    return Place(created, match[2])


def encode_page(sessions: Iterable[tuple[SessionRecord, str]], end: Place | None) -> bytes:
    """
    A page of the list.

    @param sessions: each with its state.
    @param end: the page's last place, if more follow.
    """
    described = [_described(record, state) for record, state in sessions]
    following = None if end is None else f"{end.created!r}_{end.session_id}"
    page: SessionPage = {"sessions": described, "next": following}
    return msgspec.json.encode(page)


def encode_session(record: SessionRecord, state: str) -> bytes:
    """One session."""
    return msgspec.json.encode(_described(record, state))


def encode_interrupted(session_id: str, *, interrupted: bool) -> bytes:
    """
    What has become of a session's turn.

    @param session_id: the id by which the client asked.
    @param interrupted: whether there was one.
    """
    answer: InterruptedSession = {"id": session_id, "interrupted": interrupted}
    return msgspec.json.encode(answer)


def encode_deleted(record: SessionRecord) -> bytes:
    """What has become of a session that is deleted."""
    answer: DeletedSession = {
        "id": record.id,
        "deleted": True,
        "transcript_kept": record.begun,
        "message": _KEPT if record.begun else _NOTHING_KEPT,
    }
    return msgspec.json.encode(answer)


def _described(record: SessionRecord, state: str) -> Session:
    return {
        "id": record.id,
        "workspace": record.workspace,
        "created": _timestamp(record.created),
        "last_used": _timestamp(record.used),
        "state": state,
        "turns": record.turns,
        "own_turns": record.own_turns,
        "cost_usd": round(record.cost, 9),  # a sum of doubles has dust at its end
        "last_outcome": record.outcome,
    }


def _timestamp(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
