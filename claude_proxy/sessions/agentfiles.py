"""
Files that agent processes read: MCP configurations, and transcripts of what was said before.

They hold secrets and what people wrote, so nobody else may read them, and what is not needed any
more is removed.  Everything happens in threads: a disk may be slow.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from twisted.internet.defer import Deferred

from claude_proxy.cli import transcript
from claude_proxy.cli.versions import Capabilities
from claude_proxy.sessions.turns import Message

__all__ = ["AgentFiles"]


class AgentFiles:
    """Writes and removes them.  Errors of the system come as OSError."""

    def __init__(
        self,
        in_thread: Callable[..., Awaitable[Any]],
        run_directory: Path,
        environment: Mapping[str, str],
        now: Callable[[], float] = time.time,
    ) -> None:
        """
        @param in_thread: runs what may block.
        @param run_directory: a private directory of this run.
        @param environment: what agent processes see: it says where the CLI keeps transcripts.
        @param now: the time of day, in seconds since the epoch.
        """
        self._in_thread = in_thread
        self._run_directory = run_directory
        self._environment = environment
        self._now = now

    async def write_mcp(self, text: bytes) -> Path:
        """Write the configuration of MCP servers: in a file, because argv is public."""
        path = self._run_directory / f"mcp-{uuid4().hex}.json"
        await self._write(path, text)
        return path

    async def write_transcript(
        self, history: Sequence[Message], session_id: str, workspace: Path, can: Capabilities
    ) -> Path:
        """Write what was said before, so that the CLI resumes it as a session of this id."""
        path = transcript.transcript_path(
            transcript.config_directory(self._environment),
            workspace,
            session_id,
            limit=can.folder_limit,
        )
        text = transcript.transcript_lines(
            [(message.role, message.content) for message in history],
            session_id=session_id,
            cwd=str(workspace),
            version=can.version,
            now=self._now(),
            make_uuid=lambda: str(uuid4()),
        )
        await self._write(path, text)
        return path

    async def remove(self, path: Path) -> None:
        """Remove one of them; one that is gone is no error."""
        await self._in_thread(_remove, path)

    async def _write(self, path: Path, text: bytes) -> None:
        written: Deferred[None] = Deferred()

        def over(result: Any) -> Deferred[None] | None:
            if written.called:
                # Nobody waits any more, and the thread has written all the same.
                return Deferred.fromCoroutine(self.remove(path))
            written.callback(result)
            return None

        async def write() -> None:
            await self._in_thread(_write_private, path, text)

        Deferred.fromCoroutine(write()).addBoth(over)
        await written


def _write_private(path: Path, text: bytes) -> None:
    """Blocks."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
    except OSError:
        _remove(path)  # what a full disk has taken of it may be a secret
        raise


def _remove(path: Path) -> None:
    """Blocks."""
    path.unlink(missing_ok=True)
