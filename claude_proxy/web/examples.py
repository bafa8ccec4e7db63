"""
Examples of requests and answers, for the document that describes the interface.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from claude_proxy.dialects.listing import (
    DeletedSession,
    InterruptedSession,
    Session,
    SessionPage,
)
from claude_proxy.dialects.models import Model, ModelList
from claude_proxy.dialects.passthrough import NativeResult
from claude_proxy.dialects.shapes import ChatCompletion

__all__ = [
    "CHATS",
    "COMPLETION",
    "DELETED",
    "INTERRUPTED",
    "MODEL",
    "MODELS",
    "RESULT",
    "SESSION",
    "SESSIONS",
    "SESSION_ID",
    "TURNS",
]

SESSION_ID = "5f0c2a52-6c2c-4b53-9d3e-0f4f4a1a9d11"

TURNS: Mapping[str, Any] = {
    "shortest": {"prompt": "Hello"},
    "oneBody": {"prompt": "What is 6 times 7?", "stream": False},
    "inWorkspace": {
        "prompt": "What changed in the last commit?",
        "workspace": "my-project",
        "allowed-tools": ["Read", "Bash(git *)"],
        "max-turns": 5,
        "stream": False,
    },
}

CHATS: Mapping[str, Any] = {
    "shortest": {"messages": [{"role": "user", "content": "Hello"}]},
    "stream": {
        "model": "claude-code",
        "messages": [
            {"role": "system", "content": "You are a patient teacher."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "json": {
        "messages": [{"role": "user", "content": "What is 6 times 7?"}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "schema": {
                    "type": "object",
                    "properties": {"answer": {"type": "integer"}},
                    "required": ["answer"],
                }
            },
        },
        "claude": {"workspace": "my-project"},
    },
}

SESSION: Session = {
    "id": SESSION_ID,
    "workspace": "my-project",
    "created": "2026-11-22T16:25:58.963Z",
    "last_used": "2026-11-22T16:31:02.117Z",
    "state": "idle",
    "turns": 3,
    "own_turns": 0,
    "cost_usd": 0.0421,
    "last_outcome": "success",
}

RESULT: NativeResult = {
    "type": "result",
    "subtype": "success",
    "is_error": False,
    "result": "42",
    "session_id": SESSION_ID,
    "num_turns": 1,
    "total_cost_usd": 0.0021,
    "usage": {"input_tokens": 12, "output_tokens": 3},
    "permission_denials": [],
}

COMPLETION: ChatCompletion = {
    "id": "chatcmpl-3f1d9a7c0d2b4b0f8f3c5a6e7d8c9b0a",
    "object": "chat.completion",
    "created": 1795364758,
    "model": "claude-sonnet-4-5",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": {
        "prompt_tokens": 12,
        "completion_tokens": 3,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 0},
    },
    "claude": {
        "session_id": SESSION_ID,
        "workspace": None,
        "cost_usd": 0.0021,
        "num_turns": 1,
    },
}

MODEL: Model = {
    "id": "claude-code",
    "object": "model",
    "created": 1795364758,
    "owned_by": "anthropic",
}

SESSIONS: SessionPage = {"sessions": [SESSION], "next": None}

INTERRUPTED: InterruptedSession = {"id": SESSION_ID, "interrupted": True}

DELETED: DeletedSession = {
    "id": SESSION_ID,
    "deleted": True,
    "transcript_kept": True,
    "message": "The session is forgotten.",
}

MODELS: ModelList = {"object": "list", "data": [MODEL]}
