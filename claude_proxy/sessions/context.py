"""What all turns share: the settings that concern them, and those who do the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from twisted.internet.interfaces import IReactorProcess, IReactorThreads, IReactorTime
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from claude_proxy.cli.control import ControlAnswer
from claude_proxy.cli.events import Event
from claude_proxy.cli.probe import CliProbe
from claude_proxy.cli.sweep import Sweeper
from claude_proxy.cli.turn import Limits
from claude_proxy.sessions.agentfiles import AgentFiles
from claude_proxy.sessions.book import SessionBook
from claude_proxy.sessions.capacity import Capacity
from claude_proxy.sessions.ignored import IgnoredFiles
from claude_proxy.sessions.leases import Leases
from claude_proxy.sessions.mcp import McpServers
from claude_proxy.sessions.pacing import Pace
from claude_proxy.sessions.pool import Agent, AgentPool
from claude_proxy.sessions.spares import Spares
from claude_proxy.sessions.waiting import WaitingRoom
from claude_proxy.sessions.workspaces import Workspaces

__all__ = ["COME_BACK", "RunContext", "RunSettings"]

_T = TypeVar("_T")

COME_BACK = 5
"""Seconds after which a client may try again what the server could not do just now."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """
    What a run needs to know of the settings.

    @ivar environment: what agent processes see, before our marker.
    @ivar line_limit: longest line accepted from an agent process, in bytes.
    @ivar run_directory: a private directory of this run, for files that agent processes read.
    @ivar concurrent_turns: how many turns may run at once.
    @ivar starts_at_once: how many agent processes may be starting at a time.
    @ivar spare_processes: how many agent processes are started ahead of need.
    @ivar live_sessions: how many agent processes may wait for their sessions' next turns.
    @ivar live_idle: seconds for which each may.
    @ivar marker: the beginning of the marker of every agent process of this run.
    """

    limits: Limits
    kill_timeout: float
    line_limit: int
    environment: Mapping[str, str]
    allow_skip_permissions: bool
    workspace_hooks: bool
    run_directory: Path
    marker: str
    concurrent_turns: int
    starts_at_once: int
    spare_processes: int
    live_sessions: int
    live_idle: float


class RunContext:
    """
    What all runs share: the settings, and those who do the work.

    @ivar spares: the processes that are started ahead of need; set by the executor.
    @ivar ignored: tells once of each workspace what the CLI is not let read in it.
    @ivar learn: told the version of the CLI and what each process says of itself at its start.
    """

    log = Logger(namespace="claude_proxy.sessions")
    spares: Spares

    def __init__(
        self,
        reactor: IReactorProcess,
        clock: IReactorTime,
        settings: RunSettings,
        *,
        book: SessionBook,
        waiting_room: WaitingRoom,
        workspaces: Workspaces,
        mcp: McpServers,
        probe: CliProbe,
        sweeper: Sweeper,
    ) -> None:
        self.learn: Callable[[str, ControlAnswer], None] = lambda _version, _answer: None
        self.reactor = reactor
        self.clock = clock
        self.settings = settings
        self.book = book
        self.waiting_room = waiting_room
        self.leases = Leases(clock, waiting_room=waiting_room)
        self.capacity = Capacity(clock, turns=settings.concurrent_turns, waiting_room=waiting_room)
        self.pace = Pace(clock, at_once=settings.starts_at_once)
        self.workspaces = workspaces
        self.mcp = mcp
        self.probe = probe
        self.sweeper = sweeper
        self.ignored = IgnoredFiles(clock, self.in_thread)
        self.files = AgentFiles(self.in_thread, settings.run_directory, settings.environment)
        self.pool = AgentPool(
            clock,
            size=settings.live_sessions,
            idle=settings.live_idle,
            gone=self.bury,
            went_on=self.went_on,
        )
        self._processes_started = 0

    @property
    def room(self) -> int:
        """How many processes may wait beside those that run turns."""
        return self.capacity.turns - self.capacity.running

    def make_room(self) -> None:
        """
        Let processes that wait give way to one that is started for a turn; spares go first.

        So those that run turns and those that wait are never more than turns may run at once.
        """
        self.pool.make_room(self.room)
        self.spares.make_room(max(self.room - self.pool.waiting, 0))

    def went_on(self, agent: Agent, result: Event) -> None:
        """Take note of a turn that an agent has begun by itself: of its own result."""
        if agent.session is not None:
            self.book.went_on(agent.session, result)

    async def bury(self, agent: Agent) -> None:
        """Remove what an agent process leaves that is gone."""
        self.sweeper.sweep(agent.marker)
        files, agent.files = agent.files, []
        for path in files:
            await self.files.remove(path)

    def next_marker(self) -> str:
        """The marker of the next agent process; no two are the same."""
        self._processes_started += 1
        return f"{self.settings.marker}.{self._processes_started}"

    async def in_thread(self, function: Callable[..., _T], *args: object) -> _T:
        """Run what may block."""
        pool = cast(Any, self.reactor).getThreadPool()
        result: _T = await deferToThreadPool(
            cast(IReactorThreads, self.reactor), pool, function, *args
        )
        return result
