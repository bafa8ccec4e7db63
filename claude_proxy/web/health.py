"""
The health report: can turns be served, and if not, why.

A broken part never breaks the report: each check that fails by itself is reported as such.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from typing import Annotated, Any, TypedDict

from twisted.internet.defer import CancelledError
from twisted.logger import Logger

from claude_proxy import __version__
from claude_proxy.cli.probe import VersionReport
from claude_proxy.dialects.fields import told
from claude_proxy.sessions.mcp import McpConfig
from claude_proxy.sessions.workspaces import Probe

__all__ = [
    "Check",
    "CheckedPart",
    "Health",
    "HealthReport",
    "Level",
    "check_cli",
    "check_mcp",
    "check_workspace",
]


class Level(IntEnum):
    """How well something is; a report is as well as its worst part."""

    healthy = 0
    degraded = 1
    unhealthy = 2


_Status = Annotated[str, told(enum=[level.name for level in Level])]
_Moment = Annotated[str, told(format="date-time")]


class CheckedPart(TypedDict):
    """How well one part of the server is."""

    status: _Status
    message: str
    details: dict[str, Any]
    timestamp: _Moment


class Health(TypedDict):
    """How well the server is: as well as its worst part; `uptime` is in seconds."""

    status: _Status
    timestamp: _Moment
    uptime: float
    version: str
    checks: dict[str, CheckedPart]


@dataclass(frozen=True, slots=True)
class Check:
    """One part's state, in a sentence and in details."""

    level: Level
    message: str
    details: dict[str, Any] = field(default_factory=dict)
    broken: bool = False


def check_cli(report: VersionReport, *, demo: bool) -> Check:
    """Judge what ``claude --version`` did."""
    details = {"version": report.version, "exitCode": report.exit_code}
    if report.error is not None:
        return Check(Level.unhealthy, report.error.message, details)
    if demo:
        message = "This is the built-in demonstration: no model is asked"
        return Check(Level.degraded, message, {**details, "demonstration": True})
    return Check(Level.healthy, "Claude CLI is available and responsive", details)


def check_workspace(probe: Probe) -> Check:
    """Judge what could be done in the shared workspace."""
    details = {
        "path": str(probe.path),
        "readable": probe.readable,
        "writable": probe.writable,
    }
    if not probe.readable:
        return Check(Level.unhealthy, "Workspace directory is not readable", details)
    if not probe.writable:
        return Check(Level.degraded, "Workspace directory is not writable", details)
    return Check(Level.healthy, "Workspace directory is accessible and writable", details)


def check_mcp(config: McpConfig) -> Check:
    """Say which MCP servers there are, by name."""
    message = "MCP is disabled (no configuration file found)"
    if config.enabled:
        message = f"MCP is enabled with {len(config.names)} configured servers"
    return Check(Level.healthy, message, config.describe())


class HealthReport:
    """Runs the checks and puts them together."""

    _log = Logger(namespace="claude_proxy.health")

    def __init__(
        self,
        checks: dict[str, Callable[[], Awaitable[Check]]],
        *,
        uptime: Callable[[], float],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """
        @param checks: by the names under which they are reported.
        @param uptime: seconds since the start.
        """
        self._checks = checks
        self._uptime = uptime
        self._now = now

    async def make(self, request_id: str | None = None) -> tuple[int, Health]:
        """
        The HTTP status and the body.

        @param request_id: names the request in the log.
        """
        results = {
            name: await self._run(name, check, request_id) for name, check in self._checks.items()
        }
        worst = max((result.level for result in results.values()), default=Level.healthy)
        broken = any(result.broken for result in results.values())
        status = 500 if broken else 503 if worst is Level.unhealthy else 200
        body: Health = {
            "status": worst.name,
            "timestamp": _timestamp(self._now()),
            "uptime": round(self._uptime(), 3),
            "version": __version__,
            "checks": {
                name: {
                    "status": result.level.name,
                    "message": result.message,
                    "details": result.details,
                    "timestamp": _timestamp(self._now()),
                }
                for name, result in results.items()
            },
        }
        level = self._log.debug if worst is Level.healthy else self._log.warn
        level(
            "health: {status}",
            type="health",
            status=worst.name,
            checks={name: result.level.name for name, result in results.items()},
            request_id=request_id,
        )
        return status, body

    async def _run(
        self, name: str, check: Callable[[], Awaitable[Check]], request_id: str | None
    ) -> Check:
        try:
            return await check()
        except CancelledError:
            raise  # nobody waits for the report any more
        except Exception:  # noqa: BLE001 - a report is made whatever happens
            self._log.failure(
                "the health check {name} is broken",
                type="health_broken",
                name=name,
                request_id=request_id,
            )
            message = "The check itself failed; the server's log says more"
            return Check(Level.unhealthy, message, broken=True)


def _timestamp(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
