"""
What is written to the CLI's stdin: user messages, control requests, and answers to the CLI's own.

Every function returns one line with its newline, ready for the pipe.  A line that the CLI cannot
parse ends it, so nothing is ever written there but what these functions make.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

__all__ = ["ControlAnswer", "control_request", "parse_answer", "refusal", "user_message"]

_encode = msgspec.json.Encoder().encode


def _line(message: dict[str, Any]) -> bytes:
    return _encode(message) + b"\n"


def user_message(content: str | list[dict[str, Any]], uuid: str) -> bytes:
    """
    One user message.

    @param content: text, or content blocks in the Messages API's form.
    @param uuid: replayed by CLIs that can, so that a result is paired with its message.  The CLI
        drops a second message with the same one.
    """
    return _line(
        {
            "type": "user",
            "message": {"role": "user", "content": content},
            "parent_tool_use_id": None,
            "session_id": "",
            "uuid": uuid,
        }
    )


def control_request(request_id: str, subtype: str, fields: dict[str, Any] | None = None) -> bytes:
    """One request of ours on the control channel, for example ``initialize`` or ``interrupt``."""
    return _line(
        {
            "type": "control_request",
            "request_id": request_id,
            "request": {"subtype": subtype, **(fields or {})},
        }
    )


def refusal(request: Mapping[str, Any]) -> bytes | None:
    """
    The answer to a control request of the CLI's that this server did not ask to be sent.

    Unanswered, such a request would hold the turn for ever.

    @param request: the fields of the ``control_request`` event.
    @return: the answer's line, or None if there is no request id to answer to.
    """
    request_id = request.get("request_id")
    if not isinstance(request_id, str):
        return None
    error = "claude-proxy does not answer this kind of control request"
    return _line(
        {
            "type": "control_response",
            "response": {"subtype": "error", "request_id": request_id, "error": error},
        }
    )


class ControlAnswer(msgspec.Struct, frozen=True):
    """
    The CLI's answer to one control request of ours.

    @ivar error: None on success.
    @ivar payload: what it tells on success, mostly nothing.
    """

    request_id: str
    error: str | None
    payload: Mapping[str, Any] = {}

    def __repr__(self) -> str:
        # The payload may name the account that the CLI is logged in to.
        return f"<ControlAnswer to {self.request_id}: {self.error or 'success'}>"


def parse_answer(answer: Mapping[str, Any]) -> ControlAnswer | None:
    """Read the fields of a ``control_response``; None if it lacks what an answer must have."""
    response = answer.get("response")
    if not isinstance(response, dict):
        return None
    request_id = response.get("request_id")
    if not isinstance(request_id, str):
        return None
    if response.get("subtype") == "success":
        payload = response.get("response")
        return ControlAnswer(request_id, None, payload if isinstance(payload, dict) else {})
    error = response.get("error")
    return ControlAnswer(request_id, error if isinstance(error, str) else "unknown error")
