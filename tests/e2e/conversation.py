"""The body of one Messages API request, read the way a scripted model needs it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

__all__ = ["Conversation"]

_REMINDER = re.compile(r"<system-reminder>.*?</system-reminder>", re.DOTALL)
_SCRIPT = re.compile(r"\[\[[a-z]")
_SYSTEM_TAIL = 1000
_SIDE_TOKENS = 1024
_COMMAND = re.compile(r"Command: (\S+)")


class Conversation:
    """
    One request body.

    The CLI's `<system-reminder>` parts are left out of all texts.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = body
        self.model: str = str(body.get("model", ""))
        self.messages: list[dict[str, Any]] = list(body.get("messages", []))

    @cached_property
    def tools(self) -> list[str]:
        """The names of the tools that the request offers."""
        return [str(tool.get("name", "")) for tool in self.body.get("tools") or []]

    @cached_property
    def system(self) -> str:
        """The system prompt, its blocks joined by blank lines."""
        system = self.body.get("system") or ""
        if isinstance(system, str):
            return system
        return "\n\n".join(str(block.get("text", "")) for block in system)

    @cached_property
    def user_texts(self) -> list[str]:
        """Every text of the user so far, in order, tool results left out."""
        return [text for _, text in self._user_texts]

    @cached_property
    def _user_texts(self) -> list[tuple[int, str]]:
        return [
            (index, text)
            for index, message in enumerate(self.messages)
            if message.get("role") == "user"
            for text in _texts(message)
        ]

    @cached_property
    def script(self) -> str:
        """The last user text that contains a script, or an empty string."""
        return next((text for text in reversed(self.user_texts) if _SCRIPT.search(text)), "")

    @cached_property
    def answered(self) -> int:
        """
        How many requests were answered since the script came.

        Counted from the history, so that repeated requests count once.  1.0.24 sends what it did
        with tools twice in one request: messages with the same tool calls are one.
        """
        start = max((i for i, text in self._user_texts if _SCRIPT.search(text)), default=0)
        calls: set[tuple[str, ...]] = set()
        texts = 0
        group: list[dict[str, Any]] = []
        for message in [*self.messages[start + 1 :], {"role": "user"}]:
            if message.get("role") == "assistant":
                group += _blocks(message)
            elif message.get("role") == "user" and group:
                ids = tuple(str(b["id"]) for b in group if b.get("type") == "tool_use")
                calls.update([ids] if ids else [])
                texts += not ids
                group = []
        return len(calls) + texts

    @cached_property
    def last_tool_results(self) -> list[str]:
        """
        The texts of the tool results that the last user message brings, in the order of the calls.

        1.0.24 sends them in the order in which the tools ended.
        """
        users = [message for message in self.messages if message.get("role") == "user"]
        last = _blocks(users[-1]) if users else []
        results = [block for block in last if block.get("type") == "tool_result"]
        calls = [str(block.get("id")) for message in self.messages for block in _blocks(message)]
        order = {call: index for index, call in enumerate(calls)}
        results.sort(key=lambda result: order.get(str(result.get("tool_use_id")), 0))
        return [" ".join(_texts(result)) for result in results]

    @property
    def is_repetition(self) -> bool:
        """Whether this repeats a request whose stream has broken: that is what does not stream."""
        return not self.body.get("stream")

    @cached_property
    def key(self) -> str:
        """
        What tells this turn from others, as well as a request can: repeated requests share it.

        The user id holds the session id in newer CLIs and only the installation's in 1.0.24.
        """
        user = str((self.body.get("metadata") or {}).get("user_id", ""))
        return "\0".join([user, str(len(self._user_texts)), self.script, str(self.answered)])

    @cached_property
    def side_answer(self) -> str | None:
        """A harmless answer to what the CLI asks for itself, or None in a real conversation."""
        last = self.user_texts[-1] if self.user_texts else ""
        if "create a detailed summary of" in last:
            return "<analysis>Short.</analysis><summary>A summary of the talk.</summary>"
        if self.tools or int(self.body.get("max_tokens", 0)) > _SIDE_TOKENS:
            return None
        if "process Bash commands" in self.system:
            # The prefix by which 1.0.24 applies rules such as Bash(git:*).
            found = _COMMAND.findall(last)
            return found[-1] if found else "none"
        return "{}"

    def summary(self) -> dict[str, Any]:
        """What `[[echo]]` tells about the request."""
        return {
            "model": self.model,
            "stream": bool(self.body.get("stream")),
            "max_tokens": self.body.get("max_tokens"),
            "system_characters": len(self.system),
            "system_tail": self.system[-_SYSTEM_TAIL:],
            "tools": self.tools,
            "output_config": self.body.get("output_config"),
            "thinking": self.body.get("thinking"),
            "messages": [
                {
                    "role": message.get("role"),
                    "types": [str(block.get("type")) for block in _blocks(message)],
                    "texts": _texts(message),
                }
                for message in self.messages
                # The CLI's own notes to the model.
                if message.get("role") != "system"
            ],
        }


def _blocks(holder: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = holder.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _texts(holder: Mapping[str, Any]) -> list[str]:
    texts = (str(b.get("text", "")) for b in _blocks(holder) if b.get("type") == "text")
    return [text for raw in texts if (text := _REMINDER.sub("", raw).strip())]
