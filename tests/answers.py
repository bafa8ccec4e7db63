"""Lines as the CLI writes them in a turn, and the turns of a scripted model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from claude_proxy.cli.events import Event, parse_event
from claude_proxy.cli.outcomes import Outcome, outcome_of_result

__all__ = [
    "SESSION",
    "assistant",
    "call",
    "delta",
    "event",
    "init",
    "of_line",
    "outcome",
    "partial",
    "result",
    "started",
    "stopped",
    "streamed",
    "text",
    "thinking",
    "tool_result",
    "user",
]

SESSION = "0b6a3f4e-7d0e-4f0f-9d55-1f7e2f7a4c11"

Block = dict[str, Any]


def event(type_: str, **fields: object) -> Event:
    """An event, as its line is read."""
    return of_line(json.dumps({"type": type_, "session_id": SESSION, **fields}).encode())


def of_line(line: bytes) -> Event:
    """The event of a line."""
    parsed = parse_event(line)
    assert parsed is not None
    return parsed


def init(model: str = "claude-x-1") -> Event:
    return event("system", subtype="init", model=model, tools=["Bash"])


def partial(type_: str, **fields: object) -> Event:
    """An event of the Messages API's stream, passed on."""
    return event("stream_event", event={"type": type_, **fields}, parent_tool_use_id=None)


def text(said: str) -> Block:
    return {"type": "text", "text": said}


def thinking(said: str) -> Block:
    return {"type": "thinking", "thinking": said, "signature": "c2ln"}


def call(tool: str = "Bash", call_id: str = "t1", **given: object) -> Block:
    return {"type": "tool_use", "id": call_id, "name": tool, "input": given}


def assistant(
    message_id: str | None, *blocks: Block, parent: str | None = None, **fields: object
) -> Event:
    """Whole blocks of a message."""
    message = {
        "id": message_id,
        "role": "assistant",
        "model": fields.pop("model", "claude-x-1"),
        "content": list(blocks),
        "stop_reason": fields.pop("stop_reason", None),
    }
    return event("assistant", message=message, parent_tool_use_id=parent, **fields)


def user(content: object, *, parent: str | None = None, **fields: object) -> Event:
    message = {"role": "user", "content": content}
    return event("user", message=message, parent_tool_use_id=parent, **fields)


def tool_result(content: object, *, parent: str | None = None, is_error: bool = False) -> Event:
    block = {
        "type": "tool_result",
        "tool_use_id": "t1",
        "content": content,
        "is_error": is_error,
    }
    return user([block], parent=parent)


def result(said: str | None = "", **fields: object) -> Event:
    """The end of a turn; a success unless something else is said."""
    usual: dict[str, object] = {
        "subtype": "success",
        "is_error": False,
        "result": said,
        "num_turns": 1,
        "total_cost_usd": 0.25,
        "usage": {
            "input_tokens": 3,
            "cache_creation_input_tokens": 20,
            "cache_read_input_tokens": 100,
            "output_tokens": 7,
        },
    }
    return event("result", **(usual | fields))


def outcome(ended: Event, *, refused: bool = False) -> Outcome:
    return outcome_of_result(ended, refused=refused, retry_after=None)


def started(message_id: str) -> list[Event]:
    return [partial("message_start", message={"id": message_id, "content": []})]


def stopped(reason: str = "end_turn") -> list[Event]:
    return [partial("message_delta", delta={"stop_reason": reason}), partial("message_stop")]


def delta(said: str, index: int = 0) -> Event:
    """More of a text."""
    return partial("content_block_delta", index=index, delta={"type": "text_delta", "text": said})


def streamed(message_id: str, blocks: Sequence[tuple[Block, Iterable[str]]]) -> list[Event]:
    """Blocks as they are streamed; each is given with the pieces that it comes in."""
    events = []
    for index, (block, pieces) in enumerate(blocks):
        kind = block["type"]
        empty = {"text": text(""), "thinking": thinking("")}.get(kind, block | {"input": {}})
        events.append(partial("content_block_start", index=index, content_block=empty))
        for piece in pieces:
            more = {
                "text": {"type": "text_delta", "text": piece},
                "thinking": {"type": "thinking_delta", "thinking": piece},
            }.get(kind, {"type": "input_json_delta", "partial_json": piece})
            events.append(partial("content_block_delta", index=index, delta=more))
        events.append(assistant(message_id, block))
        events.append(partial("content_block_stop", index=index))
    return events
