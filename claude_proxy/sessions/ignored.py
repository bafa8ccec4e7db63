"""
What workspaces hold for the CLI that it is not let read, because they are not trusted.

Whoever wonders why a command of theirs does not exist, or why a rule does not hold, finds the
reason in the log: once for each workspace.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

__all__ = ["NAMES", "IgnoredFiles"]

NAMES = (
    ".claude/settings.json",
    ".claude/settings.local.json",
    ".claude/commands",
    ".claude/agents",
    ".claude/skills",
    "CLAUDE.local.md",
)
"""
What the CLI would read in a workspace that is trusted, beside what it reads in any.

``CLAUDE.md``, ``.claude/CLAUDE.md`` and ``.claude/rules`` are text for the model, and always read.
"""

_REMEMBERED = 1000
"""Workspaces of which it is known that they were told of; the oldest is told of again."""


class IgnoredFiles:
    """Tells of them."""

    _log = Logger(namespace="claude_proxy.sessions")

    def __init__(self, in_thread: Callable[..., Awaitable[tuple[str, ...]]]) -> None:
        """
        @param in_thread: runs what may block.
        """
        self._in_thread = in_thread
        self._told: dict[Path, None] = {}

    def look(self, workspace: Path, log_context: Mapping[str, Any]) -> None:
        """
        See what is in a workspace, and tell of it unless that was done; nobody waits for it.

        @param log_context: fields of the record.
        """
        if workspace not in self._told:
            looking = Deferred.fromCoroutine(self._look(workspace, dict(log_context)))
            looking.addErrback(self._not_seen, log_context)

    async def _look(self, workspace: Path, log_context: Mapping[str, Any]) -> None:
        names = await self._in_thread(_names_in, workspace)
        if not names or workspace in self._told:
            return
        while len(self._told) >= _REMEMBERED:
            del self._told[next(iter(self._told))]
        self._told[workspace] = None
        self._log.warn(
            "the CLI does not read {names} in {workspace}, because WORKSPACE_HOOKS is false",
            type="workspace_settings_ignored",
            names=list(names),
            workspace=str(workspace),
            **log_context,
        )

    def _not_seen(self, failure: Failure, log_context: Mapping[str, Any]) -> None:
        # Names that cannot be looked for are none; only a fault of ours comes here.
        self._log.failure(
            "a workspace was not looked at", failure, type="internal_error", **log_context
        )


def _names_in(workspace: Path) -> tuple[str, ...]:
    return tuple(name for name in NAMES if os.path.lexists(workspace / name))
