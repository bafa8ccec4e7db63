"""A process that waits in a directory that is not its session's workspace any more."""

from __future__ import annotations

from pathlib import Path

import pytest

from claude_proxy.cli.versions import capabilities_of
from tests.test_executor import World, signals
from tests.test_live import begin

__all__ = ["signals"]  # a fixture that keeps the tests from real processes


@pytest.mark.parametrize("is_made_again", [True, False])
def test_a_process_whose_workspace_was_replaced_is_not_used_again(
    tmp_path: Path, is_made_again: bool
) -> None:
    world = World(tmp_path, capabilities_of("2.1.197"), live=4)
    session, child = begin(world, workspace="w")
    [workspace] = tmp_path.rglob("workspace/w")
    workspace.rename(workspace.with_name("old"))
    if is_made_again:
        workspace.mkdir()
    world.ask(session_id=session)
    assert workspace.is_dir()
    assert child.stdin_closed, "it works in the old one"
    child.exits()
    [_, other] = world.children
    assert f"--resume={session}" in other.argv
