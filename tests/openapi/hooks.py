"""
What Schemathesis has to know of this server beside its document.
"""

from __future__ import annotations

import re
from typing import Any

import schemathesis

_BY_NO_SCHEMA = {
    "fork": "it needs a session id beside it",
    "mcp-allowed-tools": "it depends on the servers that are configured",
    "workspace": "a session has one already",
    # Of messages: an image's or a file's data, text in system prompts, emptiness.
    r"messages\[\d+\]\.content(\[\d+\].*)?": "data is looked at, and something must be asked",
    r"response_format\.json_schema\.schema.*": "not every JSON Schema can be held to",
    r"messages\[\d+\]\.tool_calls\[\d+\]\.custom": "a custom call that has a function, too",
    "before": "a time that no number can tell",
}
"""The fields that may be refused though they are as their schema says, and why."""

_MOST_MESSAGES = 5000


def refused_for_a_reason(_context: Any, response: Any, case: Any) -> None:
    """Valid data is accepted, unless it breaks one of the rules that no schema tells."""
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    if not 400 <= response.status_code < 500 or response.status_code in (401, 404, 409, 429):
        return
    error = response.json()["error"]
    param = (error["param"] or "").removeprefix("claude.")
    if any(re.fullmatch(pattern, param) for pattern in _BY_NO_SCHEMA):
        return
    raise AssertionError(f"Valid data was refused: {error}")


def before_call(_context: Any, case: Any, _kwargs: Any) -> None:
    """
    Let a chat end with the user, without which it is refused for this alone.

    A list of messages that is invalid stays so.
    """
    if case.operation.path != "/v1/chat/completions" or not isinstance(case.body, dict):
        return
    messages = case.body.get("messages")
    if isinstance(messages, list) and 0 < len(messages) < _MOST_MESSAGES:
        last = {"role": "user", "content": "Hello"}
        case.body = {**case.body, "messages": [*messages, last]}


schemathesis.check(refused_for_a_reason)
schemathesis.hook(before_call)
