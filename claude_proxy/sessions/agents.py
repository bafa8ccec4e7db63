"""How agent processes are started."""

from __future__ import annotations

import errno
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from zope.interface import implementer

from claude_proxy.cli import command
from claude_proxy.cli.command import SessionStart, StartKind, TurnSettings
from claude_proxy.cli.events import Event
from claude_proxy.cli.outcomes import Ending
from claude_proxy.cli.process import AgentProcess
from claude_proxy.cli.transcript import config_directory
from claude_proxy.cli.versions import Capabilities
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.interfaces import IAgentListener
from claude_proxy.sessions import freshness
from claude_proxy.sessions.context import COME_BACK, RunContext
from claude_proxy.sessions.pool import Agent, Setup, place_of
from claude_proxy.sessions.spares import Spares

__all__ = ["make_spares", "start"]

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)


@implementer(IAgentListener)
class _Nobody:
    """Listens to a process until its first turn does."""

    def events_received(self, events: list[Event]) -> None:
        """Nothing is said before the first message."""

    def agent_ended(self, ending: Ending) -> None:
        """The turn that follows finds it ended."""


async def start(
    around: RunContext,
    setup: Setup,
    session: SessionStart,
    settings: TurnSettings,
    can: Capabilities,
    *,
    reusable: bool,
    log_context: dict[str, object],
    purpose: str = "turn",
) -> Agent:
    """
    Start a process.

    @param settings: what belongs to its first turn; what cannot be told it later is in its argv.
    @param reusable: it may have other turns after the first.
    @raise ProxyError: CLI_NOT_FOUND, or SERVER_BUSY if the system has no room for another one.
    """
    beginning = await around.pace.my_turn()
    process = AgentProcess(
        around.clock,
        _Nobody(),
        has_control=can.control,
        kill_timeout=around.settings.kill_timeout,
        line_limit=around.settings.line_limit,
        log_context=log_context,
        purpose=purpose,
        heard=beginning.over,
    )
    marker = around.next_marker()
    agent = Agent(process, setup, marker, settings, place=place_of(setup.key.workspace))
    try:
        mcp_file = await _write_mcp_file(around, agent)
        argv = command.build_argv(
            around.probe.resolve(),
            setup.key,
            settings,
            session,
            can,
            mcp_config=mcp_file,
            hooks=around.settings.workspace_hooks,
            reusable=reusable,
        )
        _spawn(around, agent, argv)
    except BaseException:
        beginning.over()
        await around.bury(agent)
        raise
    if can.setting_sources and not around.settings.workspace_hooks:
        around.ignored.look(Path(setup.key.workspace), log_context)
    return agent


def make_spares(around: RunContext, is_busy: Callable[[], bool]) -> Spares:
    """
    The server's spares.

    @param is_busy: whether a turn is under way.
    """
    environment = around.settings.environment
    directory = config_directory(environment)
    home = Path(environment.get("HOME", directory))

    async def begin(setup: Setup, session_id: str) -> Agent:
        can = await around.probe.capabilities()
        new = SessionStart(StartKind.NEW, session_id)
        return await start(
            around,
            setup,
            new,
            TurnSettings(),
            can,
            reusable=True,
            log_context={},
            purpose="spare",
        )

    async def stamp(setup: Setup) -> bytes | None:
        sources = freshness.paths_read(Path(setup.key.workspace), directory, home)
        today = datetime.now().astimezone().date()
        return await around.in_thread(freshness.stamp, sources, today)

    return Spares(
        around.clock,
        count=around.settings.spare_processes,
        start=begin,
        gone=around.bury,
        stamp=stamp,
        room=lambda: around.room - around.pool.waiting,
        is_busy=is_busy,
        make_id=lambda: str(uuid4()),
    )


def _spawn(around: RunContext, agent: Agent, argv: list[str]) -> None:
    key = agent.setup.key
    full = [*command.launch_prefix(key.workspace), *argv]
    environment: Any = command.build_environment(
        around.settings.environment, agent.marker, max_output_tokens=key.max_output_tokens
    )
    try:
        around.reactor.spawnProcess(agent.process, full[0], full, env=environment)
    except OSError as error:
        raise _not_started(error) from error


async def _write_mcp_file(around: RunContext, agent: Agent) -> str | None:
    servers = agent.setup.key.mcp_servers
    if not servers:
        return None
    try:
        path = await around.files.write_mcp(around.mcp.config.subset_json(servers))
    except OSError as error:
        if error.errno in _EXHAUSTED:
            raise _not_started(error) from error
        raise
    agent.files.append(path)
    return str(path)


def _not_started(error: OSError) -> ProxyError:
    """Why the system could not start a process, in our words."""
    if error.errno in _EXHAUSTED:
        message = (
            f"The server cannot start another process now ({error.strerror}). Try again a little "
            "later; its administrator may raise the limits of descriptors, processes or memory."
        )
        return ProxyError(Failure.SERVER_BUSY, message, retry_after=COME_BACK)
    message = f"{Failure.CLI_NOT_FOUND.sentence} The system said: {error.strerror}"
    return ProxyError(Failure.CLI_NOT_FOUND, message)
