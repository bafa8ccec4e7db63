"""
What workspaces hold for the CLI that it is not let read, because they are not trusted.

Whoever wonders why a command of theirs does not exist, or why a rule does not hold, finds the
reason in the log: once for each workspace.
"""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

__all__ = ["LOOKED_AFTER", "NAMES", "IgnoredFiles"]

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

LOOKED_AFTER = 60.0
"""Seconds after which a workspace is looked at again in which there was nothing to tell of."""

_REMEMBERED = 1000
"""Workspaces of which it is known that they were told of, or looked at; the oldest is forgotten."""


class IgnoredFiles:
    """Tells of them."""

    _log = Logger(namespace="claude_proxy.sessions")

    def __init__(
        self, clock: IReactorTime, in_thread: Callable[..., Awaitable[tuple[str, ...]]]
    ) -> None:
        """
        @param in_thread: runs what may block.
        """
        self._clock = clock
        self._in_thread = in_thread
        self._due: dict[Path, float] = {}  # when to look again

    def look(self, workspace: Path, log_context: Mapping[str, Any]) -> None:
        """
        See what is in a workspace, and tell of it unless that was done; nobody waits for it.

        One in which there was nothing is looked at again after `LOOKED_AFTER`.

        @param log_context: fields of the record.
        """
        now = self._clock.seconds()
        if now >= self._due.get(workspace, now):
            self._put_off(workspace, now + LOOKED_AFTER)
            looking = Deferred.fromCoroutine(self._look(workspace, dict(log_context)))
            looking.addErrback(self._not_seen, log_context)

    async def _look(self, workspace: Path, log_context: Mapping[str, Any]) -> None:
        names = await self._in_thread(_names_in, workspace)
        if not names or self._due.get(workspace) == math.inf:
            return
        self._put_off(workspace, math.inf)
        self._log.warn(
            "the CLI does not read {names} in {workspace}, because WORKSPACE_HOOKS is false",
            type="workspace_settings_ignored",
            names=list(names),
            workspace=str(workspace),
            **log_context,
        )

    def _put_off(self, workspace: Path, due: float) -> None:
        self._due.pop(workspace, None)
        while len(self._due) >= _REMEMBERED:
            del self._due[next(iter(self._due))]
        self._due[workspace] = due

    def _not_seen(self, failure: Failure, log_context: Mapping[str, Any]) -> None:
        # Names that cannot be looked for are none; only a fault of ours comes here.
        self._log.failure(
            "a workspace was not looked at", failure, type="internal_error", **log_context
        )


def _names_in(workspace: Path) -> tuple[str, ...]:
    return tuple(name for name in NAMES if os.path.lexists(workspace / name))
