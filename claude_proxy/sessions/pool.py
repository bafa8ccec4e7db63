"""
Live sessions: agent processes that wait for the next turn of their session.

A process that stays saves its session's next turn the start of another one.  What it was started
with cannot be changed, so it is used again only for a turn that would start it in the same way.
Processes that wait are bounded in number and time; the one that was used least recently goes first.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from claude_proxy.cli.command import (
    LaunchKey,
    TurnSettings,
    initialize_fields,
    turn_requests,
)
from claude_proxy.cli.events import Event
from claude_proxy.cli.figures import ProcessTotals, turn_result
from claude_proxy.cli.outcomes import Ending
from claude_proxy.cli.process import AgentProcess
from claude_proxy.cli.versions import Capabilities
from claude_proxy.interfaces import IAgentListener
from claude_proxy.sessions.deferreds import branch

__all__ = ["Agent", "AgentPool", "Setup"]


@dataclass(frozen=True, slots=True)
class Setup:
    """
    All that is fixed in a process from its start.

    @ivar cli: the program and its version.
    @ivar mcp: which reading of the MCP configuration it was started with.
    """

    key: LaunchKey
    cli: tuple[str, ...]
    mcp: int


@dataclass(slots=True, eq=False)
class Agent:
    """
    One agent process, and what is known of it.

    @ivar session: the id under which its session is kept and leased.
    @ivar cli_session: the id by which the CLI knows it.
    @ivar marker: by which what it leaves behind is found.
    @ivar files: what it was given to read; to be removed when it is gone.
    @ivar settings: those of its last turn, or of the one for which it was started.
    @ivar default_mode: the permission mode that it has when none is asked for, once it is known.
    @ivar totals: what it has reported so far.
    @ivar turns: how many it has had.
    @ivar background: tasks that an earlier turn began and that are not known to have ended.
    @ivar directory: where its first turn began, as it said.
    @ivar has_moved: its turns begin in another directory now, where a new process would not.
    @ivar is_restless: it may begin turns by itself even without such tasks.
    @ivar place: which directory on the disk it was started in; None if that is not known.
    """

    process: AgentProcess
    setup: Setup
    marker: str
    settings: TurnSettings
    session: str | None = None
    cli_session: str | None = None
    files: list[Path] = field(default_factory=list)
    default_mode: str | None = None
    totals: ProcessTotals = field(default_factory=ProcessTotals)
    turns: int = 0
    background: set[str] = field(default_factory=set)
    is_restless: bool = False
    directory: object = None
    has_moved: bool = False
    place: tuple[int, int] | None = None


@implementer(IAgentListener)
class _Bench:
    """Listens to a process between its turns."""

    _log = Logger(namespace="claude_proxy.sessions")

    def __init__(self, pool: AgentPool, agent: Agent) -> None:
        self.is_stirring = False
        self.idle_timer: IDelayedCall | None = None
        self._pool = pool
        self._agent = agent

    def events_received(self, events: list[Event]) -> None:
        """What comes now belongs to nobody's turn: a task in the background, mostly."""
        for event in events:
            if event.type == "system" and event.subtype == "init":
                self.is_stirring = self._agent.is_restless = True
                if event.session_id != self._agent.cli_session:
                    self._pool.drop(self._agent, "its session is another one now")
            elif event.subtype == "task_notification":
                # The CLI tells its model of it, in a turn that begins some milliseconds later.
                self.is_stirring = True
            elif event.type == "result":
                self.is_stirring = False
                own, self._agent.totals = turn_result(event, self._agent.totals)
                self._pool.went_on(self._agent, own)
            notice(self._agent, event)
        self._log.info(
            "{count} events between turns",
            type="background_events",
            count=len(events),
            kinds=sorted({event.subtype or event.type for event in events}),
            pid=self._agent.process.pid,
            session_id=self._agent.session,
        )

    def agent_ended(self, ending: Ending) -> None:
        self._pool.lost(self._agent, ending)

    def stop_timer(self) -> None:
        if self.idle_timer is not None and self.idle_timer.active():
            self.idle_timer.cancel()
        self.idle_timer = None


def place_of(directory: str) -> tuple[int, int] | None:
    """Which directory on the disk a path leads to; None if to none."""
    try:
        found = os.stat(directory)  # noqa: PTH116 - for every turn: a Path costs four times as much
    except OSError:
        return None
    return found.st_dev, found.st_ino


def notice(agent: Agent, event: Event) -> None:
    """Take note of what an event says of a process as a whole."""
    if event.type == "assistant":
        if b'"CronCreate"' in event.line:
            agent.is_restless = True  # its turns begin without any other sign
    elif event.subtype == "init":
        fields = event.fields()
        directory, mode = fields.get("cwd"), fields.get("permissionMode")
        agent.has_moved = agent.directory not in (None, directory)
        agent.directory = agent.directory or directory
        if agent.default_mode is None and agent.settings.permission_mode is None:
            agent.default_mode = mode if isinstance(mode, str) else None
    elif event.subtype == "task_started":
        agent.background.add(str(event.fields().get("task_id")))
    elif event.subtype == "task_notification":
        agent.background.discard(str(event.fields().get("task_id")))


def can_be_set(agent: Agent, settings: TurnSettings, can: Capabilities) -> bool:
    """Whether what belongs to a turn can be told a process that has had others."""
    if initialize_fields(settings, can) != initialize_fields(agent.settings, can):
        return False  # what only the first request of this kind can set holds for good
    mode = settings.permission_mode
    return mode is not None or agent.settings.permission_mode is None or bool(agent.default_mode)


def changes(
    agent: Agent, settings: TurnSettings, can: Capabilities
) -> list[tuple[str, dict[str, Any]]]:
    """The control requests that bring a turn's settings into force in a process that stays."""
    if not can.live:
        return []
    in_force = agent.settings if agent.turns else TurnSettings()
    wanted = settings
    if settings.permission_mode is None and in_force.permission_mode is not None:
        wanted = replace(settings, permission_mode=agent.default_mode)
    agent.settings = settings
    skips = agent.setup.key.skip_permissions
    return turn_requests(wanted, in_force, skip_permissions=skips)


class AgentPool:
    """The processes that wait."""

    _log = Logger(namespace="claude_proxy.sessions")

    def __init__(
        self,
        clock: IReactorTime,
        *,
        size: int,
        idle: float,
        gone: Callable[[Agent], Awaitable[None]],
        went_on: Callable[[Agent, Event], None],
    ) -> None:
        """
        @param size: how many may wait.
        @param idle: seconds for which each may.
        @param gone: called when a process that waited is gone: removes what it leaves behind.
        @param went_on: called with the result of a turn that a process has begun by itself.
        """
        self.went_on = went_on
        self._clock = clock
        self._size = size
        self._idle = idle
        self._gone = gone
        self._waiting: dict[str, tuple[Agent, _Bench]] = {}  # by session, least recently used first
        self._leaving: dict[Agent, Deferred[None]] = {}
        self._closed = False

    @property
    def keeps(self) -> bool:
        """Whether it takes processes at all."""
        return self._size > 0 and not self._closed

    @property
    def waiting(self) -> int:
        """How many processes wait."""
        return len(self._waiting)

    def __contains__(self, session: str) -> bool:
        return session in self._waiting

    def park(self, agent: Agent, session: str) -> None:
        """Let a process wait for the next turn of its session; it has just ended one."""
        agent.session = session
        bench = _Bench(self, agent)
        agent.process.attach(bench)
        self._waiting[session] = (agent, bench)
        bench.idle_timer = self._clock.callLater(
            self._idle, self.drop, agent, "it was idle for too long"
        )
        self.make_room(self._size)

    def directory(self, session: str) -> str | None:
        """
        Where the process works that waits for this session.

        None if none waits, or if the path leads to another directory by now, or to none.
        """
        found = self._waiting.get(session)
        if found is None:
            return None
        agent, directory = found[0], found[0].setup.key.workspace
        return directory if agent.place == place_of(directory) is not None else None

    def take(self, session: str, setup: Setup) -> Agent | None:
        """
        The process that waits for this session, if a turn with this setup can have it.

        One that cannot be had is ended; `vacated` tells when it is gone.
        """
        found = self._waiting.get(session)
        if found is None:
            return None
        agent, bench = found
        reason = _mismatch(agent, setup, is_stirring=bench.is_stirring)
        if reason is not None:
            self.drop(agent, reason)
            return None
        del self._waiting[session]
        bench.stop_timer()
        return agent

    async def vacated(self, session: str) -> None:
        """Wait until no process that waited for this session is left."""
        for agent, leaving in list(self._leaving.items()):
            if agent.session == session:
                await branch(leaving)

    def make_room(self, most: int) -> None:
        """End those that were used least recently, until no more than this number wait."""
        while len(self._waiting) > max(most, 0):
            agent, _ = next(iter(self._waiting.values()))
            self.drop(agent, "others were used more recently")

    def drop(self, agent: Agent, reason: str) -> None:
        """End a process that waits."""
        if self._take_off(agent):
            self._log.info(
                "a live session is no longer kept: {reason}",
                type="live_dropped",
                reason=reason,
                pid=agent.process.pid,
                session_id=agent.session,
            )
            agent.process.finish()
            self._see_off(agent)

    def lost(self, agent: Agent, ending: Ending) -> None:
        """A process that waited is gone by itself."""
        if self._take_off(agent):
            self._log.warn(
                "the process of a live session ended by itself: {ending}",
                type="live_lost",
                ending=ending.describe(),
                pid=agent.process.pid,
                session_id=agent.session,
            )
            self._see_off(agent)

    def drop_where(self, is_outdated: Callable[[Setup], bool], reason: str) -> None:
        """End those with such a setup."""
        for agent in self._agents():
            if is_outdated(agent.setup):
                self.drop(agent, reason)

    async def end(self, session: str) -> None:
        """End the process of a session, if one waits, and wait until it is gone."""
        found = self._waiting.get(session)
        if found is not None:
            self.drop(found[0], "its session was asked to end")
        await self.vacated(session)

    async def close(self) -> None:
        """Take no more, end all, and wait until they are gone."""
        self._closed = True
        for agent in self._agents():
            self.drop(agent, "the server stops")
        await DeferredList([branch(leaving) for leaving in self._leaving.values()])

    def _agents(self) -> list[Agent]:
        return [agent for agent, _ in self._waiting.values()]

    def _take_off(self, agent: Agent) -> bool:
        found = self._waiting.get(agent.session or "")
        if found is None or found[0] is not agent:
            return False
        found[1].stop_timer()
        del self._waiting[agent.session or ""]
        return True

    def _see_off(self, agent: Agent) -> None:
        leaving = Deferred.fromCoroutine(self._bury(agent))
        if not leaving.called:
            self._leaving[agent] = leaving
            leaving.addBoth(self._left, agent)

    async def _bury(self, agent: Agent) -> None:
        await agent.process.when_gone()
        await self._gone(agent)

    def _left(self, result: Failure | None, agent: Agent) -> None:
        del self._leaving[agent]
        if isinstance(result, Failure):
            self._log.failure("what an agent left was not removed", result, type="internal_error")


def _mismatch(agent: Agent, setup: Setup, *, is_stirring: bool) -> str | None:
    """Why a turn with this setup cannot have this process."""
    if agent.process.ended:
        return "it has ended"
    if is_stirring:
        return "it is busy with a task of its own"
    if agent.place != place_of(agent.setup.key.workspace):
        return "its workspace is another directory now"
    if agent.setup != setup:
        changed = [
            name for name in Setup.__slots__ if getattr(agent.setup, name) != getattr(setup, name)
        ]
        return f"the next turn wants another {', '.join(changed).replace('_', ' ')}"
    return None
