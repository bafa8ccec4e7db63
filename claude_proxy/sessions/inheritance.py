"""
What a turn takes over from the session that it continues.  Pure.

What is inherited was given by a request of the same tenant once; still it is read with care, since
it comes from a file.  Whether it is allowed today is decided as if the request had said it itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from claude_proxy.sessions.turns import TurnRequest

__all__ = ["inherited"]

_SKIP = "dangerously-skip-permissions"
_MODE = "permission-mode"
_BYPASS = "bypassPermissions"


def inherited(request: TurnRequest, parameters: Mapping[str, object]) -> TurnRequest:
    """
    The request with what it lets a session add.

    Skipping permissions and the permission mode are two words for one matter.  So a mode that the
    request gives keeps it from inheriting the skipping, and one that says it does not skip does not
    inherit the mode that skips.  The workspace is never inherited: a session knows its own.

    @param parameters: as `TurnRequest.parameters` gave them to an earlier turn; what is unknown or
        of a wrong type counts for nothing.
    """
    names = request.inherit
    if _MODE not in names:
        names = names - {_SKIP}
    elif _SKIP not in names and not request.skip_permissions and parameters.get(_MODE) == _BYPASS:
        names = names - {_MODE}
    changes: dict[str, Any] = {}
    for name, (attribute, read) in _READERS.items():
        value = read(parameters.get(name)) if name in names else None
        if value:
            changes[attribute] = value
    return replace(request, **changes) if changes else request


def _strings(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return ()
    return tuple(value)


def _true(value: object) -> bool:
    return value is True


def _word(value: object) -> str | None:
    return value if isinstance(value, str) else None


_READERS: Mapping[str, tuple[str, Callable[[object], object]]] = {
    "allowed-tools": ("allowed_tools", _strings),
    "disallowed-tools": ("disallowed_tools", _strings),
    "mcp-allowed-tools": ("mcp_tools", _strings),
    _SKIP: ("skip_permissions", _true),
    _MODE: ("permission_mode", _word),
}
