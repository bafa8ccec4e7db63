"""What is asked of a session: a turn, in no dialect's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Message", "TurnRequest"]


@dataclass(frozen=True, slots=True)
class Message:
    """
    One earlier message of a conversation.

    @ivar role: ``user`` or ``assistant``.
    @ivar content: content blocks in the Messages API's form, at least one.
    """

    role: str
    content: list[dict[str, Any]] = field(repr=False)


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """
    One user message and how it is to be run.

    @ivar content: the prompt, or content blocks in the Messages API's form.
    @ivar literal: the CLI is to take the text as text: it reads no file for an ``@path`` in it and
        runs no ``/command``.
    @ivar tenant: whose request it is: the name of an API key, or ``anonymous``.
    @ivar request_id: names the request in the log and in the response.
    @ivar received: when the request came, by the reactor's clock, in seconds.
    @ivar session_id: the session to continue, or None for a new one.
    @ivar fork: continue in a copy of the session.
    @ivar workspace: name of the workspace; None is the session's own, or the shared one.
    @ivar partial_messages: the client wants the CLI's partial messages.
    @ivar mcp_tools: ``mcp__SERVER__TOOL`` names; their servers are offered, these tools allowed.
    @ivar max_output_tokens: limit of one answer of the model.
    @ivar optional: names of fields that a CLI which has no such thing may ignore.
    @ivar history: what was said before; a new session is told, one that is continued knows it.
    @ivar tips: fingerprints of that history, any of which finds the session that ended with it.
    @ivar conversation: the client's own name for the conversation, if it gave one.
    @ivar hinted_session: the session id that an earlier answer shows; it counts if the session is
        none that is found by its tips.
    @ivar inherit: names of the parameters that are taken over from the session that is continued.
    @ivar claimed: the tip by which the session was found, and which it has lost to this request.
    """

    content: str | list[dict[str, Any]] = field(repr=False)
    tenant: str
    request_id: str
    received: float
    literal: bool = False
    session_id: str | None = None
    fork: bool = False
    workspace: str | None = None
    partial_messages: bool = False
    model: str | None = None
    max_turns: int | None = None
    effort: str | None = None
    permission_mode: str | None = None
    skip_permissions: bool = False
    allowed_tools: tuple[str, ...] = ()
    disallowed_tools: tuple[str, ...] = ()
    mcp_tools: tuple[str, ...] = ()
    system_prompt: str | None = field(default=None, repr=False)
    append_system_prompt: str | None = field(default=None, repr=False)
    json_schema: dict[str, Any] | None = field(default=None, repr=False)
    max_output_tokens: int | None = None
    optional: frozenset[str] = frozenset()
    history: tuple[Message, ...] = field(default=(), repr=False)
    tips: tuple[str, ...] = ()
    conversation: str | None = None
    hinted_session: str | None = None
    inherit: frozenset[str] = frozenset()
    claimed: str | None = None

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """The content as blocks, whichever way it is given."""
        text = self.content
        return [{"type": "text", "text": text}] if isinstance(text, str) else text

    @property
    def parameters(self) -> Mapping[str, object]:
        """What a later turn of the session may inherit: never text that people wrote."""
        chosen: dict[str, object] = {
            "allowed-tools": list(self.allowed_tools),
            "disallowed-tools": list(self.disallowed_tools),
            "mcp-allowed-tools": list(self.mcp_tools),
            "dangerously-skip-permissions": self.skip_permissions,
            "permission-mode": self.permission_mode,
        }
        return {name: value for name, value in chosen.items() if value}
