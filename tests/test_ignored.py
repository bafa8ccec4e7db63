"""What the log tells of workspaces whose files the CLI is not let read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, capturedLogs

from claude_proxy.cli.versions import capabilities_of
from claude_proxy.sessions import ignored
from claude_proxy.sessions.ignored import LOOKED_AFTER, NAMES, IgnoredFiles
from tests.test_executor import World

KIND = "workspace_settings_ignored"


async def at_once(work: Callable[..., Any], *args: Any) -> Any:
    return work(*args)


def put(workspace: Path, name: str) -> None:
    path = workspace / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


def told(events: Sequence[LogEvent]) -> list[tuple[list[str], str]]:
    assert {event["type"] for event in events} <= {KIND}
    return [(event["names"], event["workspace"]) for event in events]


@pytest.mark.parametrize("name", NAMES)
def test_each_of_them_is_told(name: str, tmp_path: Path) -> None:
    put(tmp_path, name)
    for read in ("CLAUDE.md", ".claude/CLAUDE.md", ".claude/rules/rule.md"):
        put(tmp_path, read)
    with capturedLogs() as events:
        IgnoredFiles(Clock(), at_once).look(tmp_path, {"request_id": "req_1"})
    assert told(events) == [([name], str(tmp_path))]
    assert events[0]["request_id"] == "req_1"


def test_a_link_that_leads_nowhere_is_told_too(tmp_path: Path) -> None:
    (tmp_path / ".claude").mkdir()
    (tmp_path / ".claude" / "agents").symlink_to("nowhere")
    with capturedLogs() as events:
        IgnoredFiles(Clock(), at_once).look(tmp_path, {})
    assert told(events) == [([".claude/agents"], str(tmp_path))]


def test_each_workspace_is_told_once_and_when_it_has_some(tmp_path: Path) -> None:
    clock = Clock()
    files = IgnoredFiles(clock, at_once)
    first, second = tmp_path / "a", tmp_path / "b"
    with capturedLogs() as events:
        files.look(first, {})
        assert events == []
        put(first, ".claude/skills")
        put(second, ".claude/agents")
        files.look(first, {})
        assert events == []  # nobody looks that often
        clock.advance(LOOKED_AFTER)
        for _ in range(3):
            files.look(first, {})
            files.look(second, {})
            put(first, ".claude/agents")
            clock.advance(LOOKED_AFTER)
    assert told(events) == [
        ([".claude/skills"], str(first)),
        ([".claude/agents"], str(second)),
    ]


def test_two_looks_at_the_same_time_tell_once(tmp_path: Path) -> None:
    looks: list[Deferred[tuple[str, ...]]] = []

    def later(*_: object) -> Deferred[tuple[str, ...]]:
        looks.append(Deferred())
        return looks[-1]

    clock = Clock()
    files = IgnoredFiles(clock, later)
    with capturedLogs() as events:
        files.look(tmp_path, {"request_id": "req_1"})
        clock.advance(LOOKED_AFTER)
        files.look(tmp_path, {"request_id": "req_2"})
        for look in looks:
            look.callback((".claude/agents",))
    assert [event["request_id"] for event in events] == ["req_1"]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ignored, "_REMEMBERED", 2)
    files = IgnoredFiles(Clock(), at_once)
    for name in "abc":
        put(tmp_path / name, ".claude/agents")
    with capturedLogs() as events:
        for name in "abccba":
            files.look(tmp_path / name, {})
    assert [Path(workspace).name for _, workspace in told(events)] == ["a", "b", "c", "a"]
    assert len(files._due) == 2


def test_a_fault_in_looking_disturbs_nobody(tmp_path: Path) -> None:
    async def broken(*_: object) -> tuple[str, ...]:
        raise ZeroDivisionError

    with capturedLogs() as events:
        IgnoredFiles(Clock(), broken).look(tmp_path, {"request_id": "req_1"})
    [event] = events
    assert event["type"] == "internal_error"
    assert event["log_failure"].check(ZeroDivisionError)
    assert event["request_id"] == "req_1"


@pytest.mark.parametrize(
    ("version", "hooks", "count"),
    [("2.1.197", False, 1), ("2.1.197", True, 0), ("1.0.24", False, 0)],
)
def test_turns_look_where_the_cli_is_told_to_read_nothing(
    version: str, hooks: bool, count: int, tmp_path: Path
) -> None:
    world = World(tmp_path, capabilities_of(version), workspace_hooks=hooks)
    put(world.base / "shared_workspace", ".claude/commands")
    with capturedLogs() as events:
        for number in range(2):
            world.ask(request_id=f"req_{number}")
    records = [event for event in events if event.get("type") == KIND]
    assert [(r["names"], r["request_id"]) for r in records] == [
        ([".claude/commands"], "req_0")
    ] * count
