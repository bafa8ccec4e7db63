"""What an agent does beside its answer, in words: its tool calls and their results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["CALL_LENGTH", "RESULT_LENGTH", "describe_call", "describe_result"]

CALL_LENGTH = 500
"""Characters of a tool's input that are shown."""

RESULT_LENGTH = 2000
"""Characters of a tool's result that are shown."""

_BY_SUB_AGENT = "Sub-agent: "


def describe_call(block: Mapping[str, Any], *, sub_agent: bool) -> str:
    """Put a ``tool_use`` block into one line: the tool's name and its input as JSON."""
    given = json.dumps(block.get("input"), ensure_ascii=False, separators=(",", ":"))
    whose = _BY_SUB_AGENT if sub_agent else ""
    return f"{whose}Tool call: {block.get('name')} {_cut(given, CALL_LENGTH)}"


def describe_result(block: Mapping[str, Any], *, sub_agent: bool) -> str:
    """Put a ``tool_result`` block into words; an error is called one."""
    whose = _BY_SUB_AGENT if sub_agent else ""
    what = "Tool error" if block.get("is_error") is True else "Tool result"
    return f"{whose}{what}: {_cut(_text(block.get('content')), RESULT_LENGTH)}"


def _text(content: object) -> str:
    """The text of a result; of what is no text, such as an image, the name of its kind."""
    if isinstance(content, str):
        return content.strip()
    if not isinstance(content, list):
        return ""
    parts = []
    for part in content:
        if isinstance(part, dict):
            text = part.get("text")
            parts.append(text if isinstance(text, str) else f"[{part.get('type')}]")
    return "\n".join(parts).strip()


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}... ({len(text):,} characters)"
