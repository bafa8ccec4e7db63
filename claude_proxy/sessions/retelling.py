"""
Telling a new session what was said before it.

It gets the earlier messages as a transcript in the CLI's own form, and resumes that: each message
is in its real role, once and in order.  Where there can be no transcript, what was said before
stands at the head of the new message.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from twisted.logger import Logger

from claude_proxy.cli.command import SessionStart, StartKind
from claude_proxy.cli.transcript import as_context
from claude_proxy.cli.versions import Capabilities
from claude_proxy.sessions.book import Plan
from claude_proxy.sessions.context import RunContext
from claude_proxy.sessions.turns import TurnRequest

__all__ = ["Retold", "retell"]

_log = Logger(namespace="claude_proxy.sessions")


@dataclass(frozen=True, slots=True)
class Retold:
    """
    How a turn goes on whose session has been told.

    @ivar transcript: what was written, to be removed if nothing comes of the session.
    """

    plan: Plan
    request: TurnRequest
    transcript: Path | None = None


async def retell(
    around: RunContext, request: TurnRequest, plan: Plan, workspace: Path, can: Capabilities
) -> Retold:
    """
    Tell a new session the history of a request.

    @param plan: begins a session.
    """
    if not can.transcripts:
        return _as_message(request, plan)
    # Where the CLI makes ids of its own, this is the one that it resumes.
    session_id = plan.start.session_id or plan.lease_key
    try:
        written = await around.files.write_transcript(request.history, session_id, workspace, can)
    except OSError as error:
        _log.warn(
            "a transcript cannot be written: {error}; the conversation so far is told as one "
            "message",
            type="transcript_failed",
            error=error.strerror,
            request_id=request.request_id,
        )
        return _as_message(request, plan)
    start = SessionStart(StartKind.RESUME, session_id)
    return Retold(replace(plan, start=start, record_id=plan.session_id), request, written)


def _as_message(request: TurnRequest, plan: Plan) -> Retold:
    told = as_context([(said.role, said.content) for said in request.history])
    return Retold(plan, replace(request, content=[*told, *request.blocks]))
