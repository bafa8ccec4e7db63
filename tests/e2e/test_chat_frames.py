"""What the strict reading of streams takes, and what it does not let pass."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.e2e.chat_frames import check_error, check_stream

ERROR = {"message": "No.", "type": "server_error", "param": None, "code": "upstream_error"}
CLAUDE = {"session_id": "s", "workspace": None, "cost_usd": 0.1, "num_turns": 1}


def chunk(delta: dict[str, Any], reason: str | None = None, **fields: Any) -> dict[str, Any]:
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return {**head, "choices": [choice], **fields}


FIRST = chunk({"role": "assistant", "content": ""})
TEXT = chunk({"content": "hello"})
LAST = chunk({}, "stop", claude=CLAUDE)
USAGE = {
    **chunk({}),
    "choices": [],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
}


def stream(*frames: object) -> str:
    texts = (frame if isinstance(frame, str) else json.dumps(frame) for frame in frames)
    return "".join(f"data: {text}\n\n" for text in texts)


@pytest.mark.parametrize(
    "body",
    [
        stream(FIRST, TEXT, LAST, "[DONE]"),
        stream(FIRST, TEXT, LAST, USAGE, "[DONE]"),
        stream(FIRST, chunk({"reasoning": "Hm.", "reasoning_content": "Hm."}), LAST, "[DONE]"),
        stream(FIRST, TEXT, {"error": ERROR}),
        stream({"error": ERROR}),
    ],
)
def test_a_true_stream_is_taken(body: str) -> None:
    check_stream(body)


@pytest.mark.parametrize(
    "body",
    [
        stream(FIRST, TEXT, LAST),
        stream(FIRST, TEXT),
        stream(FIRST, TEXT, "[DONE]"),
        stream(TEXT, LAST, "[DONE]"),
        stream(FIRST, FIRST, LAST, "[DONE]"),
        stream(FIRST, LAST, TEXT, "[DONE]"),
        stream(FIRST, LAST, LAST, "[DONE]"),
        stream(FIRST, LAST, "[DONE]", "[DONE]"),
        stream(FIRST, LAST, {"error": ERROR}),
        stream(FIRST, {"error": ERROR}, "[DONE]"),
        stream(FIRST, USAGE, LAST, "[DONE]"),
        stream(FIRST, chunk({"content": 1}), LAST, "[DONE]"),
        stream(FIRST, chunk({"text": "hello"}), LAST, "[DONE]"),
        stream(FIRST, chunk({"reasoning": "Hm."}), LAST, "[DONE]"),
        stream(FIRST, {**TEXT, "id": "d"}, LAST, "[DONE]"),
        stream(FIRST, {**TEXT, "created": "1"}, LAST, "[DONE]"),
        stream(FIRST, {**TEXT, "session_id": "s"}, LAST, "[DONE]"),
        stream(FIRST, chunk({}, "stop"), "[DONE]"),
        stream(FIRST, chunk({}, "tool_calls", claude=CLAUDE), "[DONE]"),
        stream(FIRST, LAST, "", "[DONE]"),
        ": ping\n\n" + stream(FIRST, LAST, "[DONE]"),
        "id: 1\n" + stream(FIRST, LAST, "[DONE]"),
        stream(FIRST, TEXT, LAST, "[DONE]")[:-1],
    ],
)
def test_what_is_not_right_is_noticed(body: str) -> None:
    with pytest.raises((AssertionError, ValueError, KeyError)):
        check_stream(body)


@pytest.mark.parametrize("changes", [{"message": ""}, {"code": None}, {"param": 1}, {"more": 1}])
def test_an_error_that_is_none_is_noticed(changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        check_error(json.dumps({"error": {**ERROR, **changes}}))
