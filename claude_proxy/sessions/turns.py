"""What is asked of a session: a turn, in no dialect's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["TurnRequest"]


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """
    One user message and how it is to be run.

    @ivar content: the prompt, or content blocks in the Messages API's form.
    @ivar tenant: whose request it is: the name of an API key, or ``anonymous``.
    @ivar request_id: names the request in the log and in the response.
    @ivar received: when the request came, by the reactor's clock, in seconds.
    @ivar session_id: the session to continue, or None for a new one.
    @ivar fork: continue in a copy of the session.
    @ivar workspace: name of the workspace; None is the session's own, or the shared one.
    @ivar partial_messages: the client wants the CLI's partial messages.
    @ivar mcp_tools: ``mcp__SERVER__TOOL`` names; their servers are offered, these tools allowed.
    """

    content: str | list[dict[str, Any]] = field(repr=False)
    tenant: str
    request_id: str
    received: float
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

    @property
    def parameters(self) -> Mapping[str, object]:
        """What a later turn of the session may inherit: never text that people wrote."""
        chosen: dict[str, object] = {
            "allowed-tools": list(self.allowed_tools),
            "disallowed-tools": list(self.disallowed_tools),
            "mcp-allowed-tools": list(self.mcp_tools),
            "dangerously-skip-permissions": self.skip_permissions,
        }
        return {name: value for name, value in chosen.items() if value}
