"""
The fields of a chat completion that the CLI has no knob for.

Those that only tune the answer are accepted without effect; those whose silent loss would change
the answer's form, or leave a client waiting for what never comes, are refused.  docs/openai.md
shows both tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, NamedTuple

from claude_proxy.dialects.fields import refusal

__all__ = [
    "IGNORED_FIELDS",
    "REFUSED_FIELDS",
    "TAKEN_VALUES",
    "USED_FIELDS",
    "check_refused",
    "ignored_fields",
]

USED_FIELDS = (
    "claude",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "model",
    "reasoning_effort",
    "response_format",
    "stream",
    "stream_options",
)
"""What a request says with effect."""

IGNORED_FIELDS: Mapping[str, str] = {
    "temperature": "the CLI has no such setting",
    "top_p": "the CLI has no such setting",
    "top_k": "the CLI has no such setting",
    "min_p": "the CLI has no such setting",
    "stop": "the CLI has no such setting: the answer goes on to its end",
    "seed": "the CLI has no such setting",
    "frequency_penalty": "the CLI has no such setting",
    "presence_penalty": "the CLI has no such setting",
    "repetition_penalty": "the CLI has no such setting",
    "logit_bias": "the CLI has no such setting",
    "prediction": "the CLI has no such setting",
    "verbosity": "the CLI has no such setting; say it in the system prompt",
    "user": "nothing is told to the model's provider",
    "safety_identifier": "nothing is told to the model's provider",
    "metadata": "completions are not stored",
    "store": "completions are not stored",
    "service_tier": "the CLI has no such setting",
    "prompt_cache_key": "the CLI looks after its cache by itself",
    "prompt_cache_retention": "the CLI looks after its cache by itself",
    "web_search_options": "the agent searches with its own tools",
    "tools": "the agent uses its own tools, those of the client are not offered to it",
    "functions": "the agent uses its own tools, those of the client are not offered to it",
    "parallel_tool_calls": "the agent uses its own tools as it likes",
}
"""What is accepted without effect, and why.  Names that nobody knows are accepted so, too."""


class _Rule(NamedTuple):
    """
    @ivar accepts: whether a value that is given changes nothing.
    @ivar what: what is said to be refused, in a table.
    @ivar sentence: what the client is told of its field.
    @ivar schema: what is accepted, as a JSON Schema.
    """

    accepts: Callable[[Any], bool]
    what: str
    sentence: str
    schema: Mapping[str, Any]


_CLIENT_TOOLS = (
    "this server does not offer the client's tools to the agent, which uses its own; leave it out, "
    "or send 'auto' or 'none'"
)


def _is_number(value: object, most: int, least: int = 0) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _is_free_choice(value: object) -> bool:
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        # The long form of the choice among some of the tools.
        allowed = value.get("allowed_tools")
        return isinstance(allowed, dict) and allowed.get("mode") == "auto"
    return value in ("auto", "none")


_FREE_CHOICE: Mapping[str, Any] = {
    "anyOf": [
        {"type": "string", "enum": ["auto", "none"]},
        {
            "type": "object",
            "required": ["type", "allowed_tools"],
            "properties": {
                "type": {"type": "string", "const": "allowed_tools"},
                "allowed_tools": {
                    "type": "object",
                    "required": ["mode"],
                    "properties": {"mode": {"type": "string", "const": "auto"}},
                },
            },
        },
    ]
}

_RULES: Mapping[str, _Rule] = {
    "n": _Rule(
        lambda value: _is_number(value, 1, least=1),
        "more than 1",
        "must be 1: the agent gives one answer; send the request several times for several",
        {"type": "integer", "const": 1},
    ),
    "logprobs": _Rule(
        lambda value: value is False,
        "`true`",
        "must be false: the CLI gives no log probabilities",
        {"type": "boolean", "const": False},
    ),
    "top_logprobs": _Rule(
        lambda value: _is_number(value, 0),
        "more than 0",
        "must be 0: the CLI gives no log probabilities",
        {"type": "integer", "const": 0},
    ),
    "modalities": _Rule(
        lambda value: isinstance(value, list) and all(item == "text" for item in value),
        'anything but `["text"]`',
        'must be ["text"]: the agent answers in text only',
        {"type": "array", "items": {"type": "string", "const": "text"}},
    ),
    "audio": _Rule(
        lambda _value: False,
        "any",
        "cannot be had: the agent answers in text only; leave it out",
        {"type": "null"},
    ),
    "tool_choice": _Rule(
        _is_free_choice,
        "`required`, or the name of a tool",
        f"cannot be followed: {_CLIENT_TOOLS}",
        _FREE_CHOICE,
    ),
    "function_call": _Rule(
        _is_free_choice,
        "the name of a function",
        f"cannot be followed: {_CLIENT_TOOLS}",
        _FREE_CHOICE,
    ),
}

REFUSED_FIELDS: Mapping[str, str] = {name: rule.what for name, rule in _RULES.items()}
"""What is refused, and for which values."""

TAKEN_VALUES: Mapping[str, Mapping[str, Any]] = {name: rule.schema for name, rule in _RULES.items()}
"""The values that are not refused, as JSON Schemas; null is not, either."""

_MAX_SHOWN = 50
_MAX_NAME = 64


def check_refused(fields: Mapping[str, Any]) -> None:
    """
    @raise ProxyError: INVALID_VALUE; a field asks for another form of answer than there is.
    """
    for name, rule in _RULES.items():
        value = fields.get(name)
        if value is not None and not rule.accepts(value):
            raise refusal(name, rule.sentence)


def ignored_fields(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the fields that are given without effect, for a log: cut, and not too many."""
    known = {*USED_FIELDS, *_RULES}
    given = (name for name, value in fields.items() if value is not None and name not in known)
    return tuple(name[:_MAX_NAME] for name in islice(given, _MAX_SHOWN))
