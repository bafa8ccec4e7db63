"""
The messages of a chat, told apart: system prompt, what was said before, what is new.

What is new is everything after the last message of the assistant.  Earlier messages keep their
roles, each once and in order.  The Messages API has two roles only: a system message that comes
later and the result of a client's tool become text of the user, a call of a client's tool becomes
text of the assistant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from claude_proxy.dialects import history
from claude_proxy.dialects.content import TEXT_PARTS, to_blocks
from claude_proxy.dialects.fields import TurnFields, check_fields, convert, overridden, refusal
from claude_proxy.dialects.parameters import parse_parameters, shown_session
from claude_proxy.errors import ProxyError
from claude_proxy.sessions.turns import Message

__all__ = ["MAX_MESSAGES", "ROLES", "Conversation", "read_messages"]

MAX_MESSAGES = 5000
"""The most messages that one request may carry."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_SYSTEM = ("system", "developer")
_SILENCE = "(no answer)"
"""Stands for an answer without text: the Messages API takes no empty message."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """
    What the messages of a request say.

    @ivar system_prompt: of the system messages at the beginning, or None.
    @ivar history: what was said before, in the Messages API's roles; ends with the assistant.
    @ivar content: what is new, as content blocks.
    @ivar said: role and content of every message as the client sent them, for fingerprints.
    @ivar tips: the fingerprints of what was said before.
    @ivar given: the parameters at the top of the last message.
    @ivar earlier: those at the top of messages before it, where the newest wins.
    @ivar shown_session: the session id at the top of the last answer.
    """

    system_prompt: str | None = field(repr=False)
    history: tuple[Message, ...] = field(repr=False)
    content: list[dict[str, Any]] = field(repr=False)
    said: tuple[tuple[str, object], ...] = field(repr=False)
    tips: tuple[str, ...]
    given: TurnFields
    earlier: TurnFields
    shown_session: str | None


def read_messages(messages: object, text_parameters: str) -> Conversation:
    """
    Tell the messages of a request apart.

    @param text_parameters: which parameters a text may set: ``all``, ``safe`` or ``none``.
    @raise ProxyError: INVALID_VALUE with the path of what is not acceptable.
    """
    checked = _checked(messages)
    said = [_as_said(message, f"messages[{i}]") for i, message in enumerate(checked)]
    last = len(said) - 1
    if said[last][0] != "user":
        what = "must be 'user': the last message is what is to be answered"
        raise refusal(f"messages[{last}].role", what)
    leading = next(i for i, (role, _) in enumerate(said) if role not in _SYSTEM)
    answers = [i for i, (role, _) in enumerate(said) if role == "assistant"]
    new = answers[-1] + 1 if answers else leading
    reader = _Reader(text_parameters, checked)
    told = [reader.read(i, said[i][1]) for i in range(leading, len(said))]
    is_shown = answers and text_parameters != "none"
    return Conversation(
        system_prompt=_system_prompt(said[:leading]),
        history=tuple(message for message in told[: new - leading] if message.content),
        content=_new_content(told[new - leading :], f"messages[{last}].content", reader.given),
        said=tuple(said),
        tips=history.tips(said[:new]),
        given=reader.given,
        earlier=reader.earlier,
        shown_session=shown_session(_first_text(said[new - 1][1])[1]) if is_shown else None,
    )


def _checked(messages: object) -> Sequence[dict[str, Any]]:
    """The messages, if each is an object and has a role."""
    if not isinstance(messages, list) or not messages:
        raise refusal("messages", "must be a list of at least one message")
    if len(messages) > MAX_MESSAGES:
        what = f"holds {len(messages)} messages; at most {MAX_MESSAGES} are taken"
        raise refusal("messages", what)
    for position, message in enumerate(messages):
        if not isinstance(message, dict):
            what = 'must be an object, such as {"role": "user", "content": "..."}'
            raise refusal(f"messages[{position}]", what)
        if message.get("role") not in ROLES:
            what = f"must be one of {', '.join(ROLES[:-1])}"
            raise refusal(f"messages[{position}].role", what)
    return messages


def _as_said(message: Mapping[str, Any], at: str) -> tuple[str, object]:
    """Role and content of a message; calls of the client's tools are part of the content."""
    role, content = message["role"], message.get("content")
    if role != "assistant":
        return role, content
    if content is None and isinstance(message.get("refusal"), str):
        content = message["refusal"]
    return role, _with_calls(content, _calls(message, at))


def _with_calls(content: object, calls: list[str]) -> object:
    if not calls:
        return content
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    if not isinstance(parts, list):
        return content  # which is refused when it is read
    return [*parts, *({"type": "text", "text": call} for call in calls)]


def _calls(message: Mapping[str, Any], at: str) -> list[str]:
    """The calls of the client's tools in an answer, each as a sentence."""
    calls = []
    listed = message.get("tool_calls")
    if listed is not None and not isinstance(listed, list):
        raise refusal(f"{at}.tool_calls", "must be a list")
    for position, call in enumerate(listed or ()):
        path = f"{at}.tool_calls[{position}]"
        if not isinstance(call, dict):
            raise refusal(path, "must be an object")
        kind = _kind(call)
        calls.append(_called(call.get(kind), f"{path}.{kind}"))
    if message.get("function_call") is not None:
        calls.append(_called(message["function_call"], f"{at}.function_call"))
    return calls


def _kind(call: Mapping[str, Any]) -> str:
    return "custom" if call.get("type") == "custom" else "function"


def _called(function: object, path: str) -> str:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise refusal(path, "must be an object with the 'name' of a tool")
    # Custom tools have an input that is plain text in place of a function's arguments.
    arguments = function.get("arguments", function.get("input"))
    if arguments is None:
        arguments = "{}"
    elif not isinstance(arguments, str):
        try:
            arguments = msgspec.json.encode(arguments).decode()
        except RecursionError:
            raise refusal(path, "is nested too deeply") from None
    return f"Called the tool {function['name']} with {arguments}"


class _Reader:
    """
    Reads messages in order, and gathers the parameters at the top of the user's.

    @ivar given: those of the last message.
    @ivar earlier: those of the messages before it, where the newest wins.
    """

    def __init__(self, text_parameters: str, messages: Sequence[Mapping[str, Any]]) -> None:
        """
        @param messages: all there are, checked.
        """
        self.given = TurnFields()
        self.earlier = TurnFields()
        self._allowed = text_parameters
        self._messages = messages
        self._tools: dict[object, object] = {}

    def read(self, position: int, content: object) -> Message:
        """The message in the Messages API's form; without content, if it says nothing."""
        message, where = self._messages[position], f"messages[{position}].content"
        role = message["role"]
        if role == "user":
            content = self._without_parameters(position, content)
            return Message("user", to_blocks(content, where))
        blocks = to_blocks(content, where)
        if role == "assistant":
            self._learn_tools(message)
            return Message("assistant", _spoken(blocks) or [_text(_SILENCE)])
        if role in _SYSTEM:
            return Message("user", _introduced("System: ", blocks) if blocks else [])
        return Message("user", _introduced(self._result_of(message), blocks))

    def _without_parameters(self, position: int, content: object) -> object:
        at, text = _first_text(content)
        is_last = position == len(self._messages) - 1
        try:
            found = parse_parameters(text, self._allowed)
            if not found.fields:
                return content
            fields = convert(found.fields, TurnFields)
            check_fields(fields)
        except ProxyError:
            if is_last:
                raise
            # It was answered once, or it was no parameter then: it is the text that it is.
            return content
        if is_last:
            self.given = fields
        else:
            self.earlier = overridden(self.earlier, fields)
        if isinstance(content, list) and at is not None:
            return [*content[:at], _text(found.prompt), *content[at + 1 :]]
        return found.prompt

    def _learn_tools(self, message: Mapping[str, Any]) -> None:
        """Note the names of the client's tools by the ids of their calls."""
        for call in message.get("tool_calls") or ():
            function = call.get(_kind(call))
            if isinstance(call.get("id"), str):
                self._tools[call["id"]] = function["name"]

    def _result_of(self, message: Mapping[str, Any]) -> str:
        called = message.get("tool_call_id")
        name = self._tools.get(called) if isinstance(called, str) else None
        name = name or message.get("name")
        return f"Result of the tool {name}:\n" if isinstance(name, str) else "Result of a tool:\n"


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _spoken(blocks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks of an answer without what it only showed beside its text."""
    # In the Messages API an assistant gives no images and no files.
    told = (history.spoken(b["text"]) if b["type"] == "text" else f"({b['type']})" for b in blocks)
    return [_text(text) for text in told if text]


def _introduced(introduction: str, blocks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks, with words before them that say whose they are."""
    if blocks and blocks[0]["type"] == "text":
        return [_text(introduction + blocks[0]["text"]), *blocks[1:]]
    return [_text(introduction.strip()), *blocks]


def _system_prompt(leading: Sequence[tuple[str, object]]) -> str | None:
    texts = []
    for position, (_, content) in enumerate(leading):
        where = f"messages[{position}].content"
        for block in to_blocks(content, where):
            if block["type"] != "text":
                raise refusal(where, "must be text in a system message")
            texts.append(block["text"])
    return "\n\n".join(texts) or None


def _new_content(
    messages: Sequence[Message], where: str, given: TurnFields
) -> list[dict[str, Any]]:
    """The blocks of the new messages, as those of one message."""
    if not messages[-1].content:
        below = "" if given == TurnFields() else ": write the prompt below the parameters"
        raise refusal(where, f"must not be empty{below}")
    blocks = [block for message in messages for block in message.content]
    if not any(block["type"] == "text" for block in blocks):
        raise refusal(where, "must hold text, too: say what is to be done with what is sent")
    return blocks


def _first_text(content: object) -> tuple[int | None, str]:
    """The first text of a content, and the position of its part, if it has parts."""
    if isinstance(content, str):
        return None, content
    for position, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, dict) and isinstance(part.get("type"), str):
            text = part.get(TEXT_PARTS.get(part["type"], ""))
            if isinstance(text, str):
                return position, text
    return None, ""
