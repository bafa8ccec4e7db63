"""The health report: can turns be served, and if not, why."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.logger import capturedLogs

from claude_proxy import __version__
from claude_proxy.cli.probe import VersionReport
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.mcp import McpConfig
from claude_proxy.sessions.workspaces import Probe
from claude_proxy.web.health import (
    Check,
    HealthReport,
    Level,
    check_cli,
    check_mcp,
    check_workspace,
)
from tests.support import result_of

NOON = datetime(2025, 6, 14, 12, 0, 0, 7000, tzinfo=UTC)


def made(*levels: Level, **others: Callable[[], Awaitable[Check]]) -> tuple[int, dict[str, Any]]:
    """The report of checks with these results."""

    def check(level: Level) -> Callable[[], Awaitable[Check]]:
        async def result() -> Check:
            return Check(level, f"It is {level.name}", {"level": int(level)})

        return result

    checks = {f"check{number}": check(level) for number, level in enumerate(levels)} | others
    report = HealthReport(checks, uptime=lambda: 129.46549, now=lambda: NOON)
    status, body = result_of(report.make())
    return status, body


@pytest.mark.parametrize(
    ("levels", "status", "word"),
    [
        ((), 200, "healthy"),
        ((Level.healthy, Level.healthy), 200, "healthy"),
        ((Level.degraded, Level.healthy), 200, "degraded"),
        ((Level.healthy, Level.unhealthy, Level.degraded), 503, "unhealthy"),
    ],
)
def test_a_report_is_as_well_as_its_worst_part(
    levels: tuple[Level, ...], status: int, word: str
) -> None:
    code, body = made(*levels)
    assert (code, body["status"]) == (status, word)


def test_a_report_has_its_promised_shape() -> None:
    _, body = made(Level.degraded)
    assert body == {
        "status": "degraded",
        "timestamp": "2025-06-14T12:00:00.007Z",
        "uptime": 129.465,
        "version": __version__,
        "checks": {
            "check0": {
                "status": "degraded",
                "message": "It is degraded",
                "details": {"level": 1},
                "timestamp": "2025-06-14T12:00:00.007Z",
            }
        },
    }


def test_a_broken_check_is_reported_in_the_same_shape_and_logged() -> None:
    async def broken() -> Check:
        raise ZeroDivisionError("a detail")

    with capturedLogs() as events:
        status, body = made(Level.healthy, broken=broken)
    assert (status, body["status"]) == (500, "unhealthy")
    assert body["checks"]["check0"]["status"] == "healthy"
    assert set(body["checks"]["broken"]) == {"status", "message", "details", "timestamp"}
    assert "a detail" not in str(body)
    assert [e["name"] for e in events if e.get("type") == "health_broken"] == ["broken"]


def test_a_report_waits_for_its_checks() -> None:
    answer: Deferred[Check] = Deferred()

    async def slow() -> Check:
        return await answer

    report = HealthReport({"slow": slow}, uptime=lambda: 0.0, now=lambda: NOON)
    making = Deferred.fromCoroutine(report.make())
    assert not making.called
    answer.callback(Check(Level.healthy, "Well"))
    assert result_of(making)[0] == 200


def test_the_time_is_that_of_the_day() -> None:
    before = datetime.now(UTC)
    _, body = result_of(HealthReport({}, uptime=lambda: 0.0).make())
    assert abs(datetime.fromisoformat(body["timestamp"]) - before).total_seconds() < 60


# The single checks.

VERSION = "1.0.24 (Claude Code)"


def test_a_cli_that_tells_its_version_is_healthy() -> None:
    assert check_cli(VersionReport(VERSION, 0, None), demo=False) == Check(
        Level.healthy,
        "Claude CLI is available and responsive",
        {"version": VERSION, "exitCode": 0},
    )


@pytest.mark.parametrize("demo", [True, False])
@pytest.mark.parametrize(
    ("failure", "exit_code"),
    [(Failure.CLI_NOT_FOUND, None), (Failure.CLI_FAILED, 3), (Failure.CLI_FAILED, None)],
)
def test_a_cli_that_fails_is_unhealthy_and_says_why(
    failure: Failure, exit_code: int | None, demo: bool
) -> None:
    error = ProxyError(failure, "It is broken.")
    check = check_cli(VersionReport(None, exit_code, error), demo=demo)
    details = {"version": None, "exitCode": exit_code}
    assert check == Check(Level.unhealthy, "It is broken.", details)


def test_a_demonstration_never_passes_for_the_real_thing() -> None:
    check = check_cli(VersionReport("2.1.197", 0, None), demo=True)
    assert check.level is Level.degraded
    assert "demonstration" in check.message
    assert check.details["demonstration"] is True


@pytest.mark.parametrize(
    ("readable", "writable", "level", "said"),
    [
        (True, True, Level.healthy, "accessible and writable"),
        (True, False, Level.degraded, "not writable"),
        (False, False, Level.unhealthy, "not readable"),
        (False, True, Level.unhealthy, "not readable"),
    ],
)
def test_the_workspace_is_judged_by_what_may_be_done_in_it(
    readable: bool, writable: bool, level: Level, said: str
) -> None:
    check = check_workspace(Probe(readable, writable, Path("/w")))
    assert check.level is level
    assert said in check.message
    assert check.details == {"path": "/w", "readable": readable, "writable": writable}


def test_mcp_may_be_off() -> None:
    check = check_mcp(McpConfig(enabled=False, path="/w/mcp-config.json", servers={}))
    assert check == Check(
        Level.healthy,
        "MCP is disabled (no configuration file found)",
        {"enabled": False, "configPath": "/w/mcp-config.json"},
    )


def test_mcp_servers_are_shown_by_name_only() -> None:
    servers = {"git": {"command": "git-mcp", "env": {"TOKEN": "secret"}}}
    check = check_mcp(McpConfig(enabled=True, path="/w/mcp.json", servers=servers))
    assert check.level is Level.healthy
    assert check.details == {"enabled": True, "configPath": "/w/mcp.json", "servers": ["git"]}
    assert "secret" not in str(check)
