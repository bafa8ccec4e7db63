"""Spares with the real CLI: a new session begins without a start."""

from __future__ import annotations

import pytest

from tests.e2e.claude_cli import Claude
from tests.e2e.daemon import children_of, processes_with_env, wait_until
from tests.e2e.server import Answer, Server, StartServer


@pytest.fixture
def server(claude_new: Claude, start_server: StartServer) -> Server:
    return start_server(claude_new, {"SPARE_PROCESSES": "1", "LIVE_SESSIONS": "0"})


def pid_of(server: Server, answer: Answer) -> int:
    [record] = server.daemon.records("turn_start", request_id=answer.headers["x-request-id"])
    return int(record["pid"])


def wait_for_spare(server: Server, number: int = 1) -> int:
    """The process that was started ahead, once it has been."""
    wait_until(lambda: len(server.daemon.records("spare_started")) >= number, "a spare is started")
    return int(server.daemon.records("spare_started")[number - 1]["pid"])


def test_a_new_session_begins_on_a_process_that_was_started_ahead(server: Server) -> None:
    first = server.ask("[[text one]]")
    spare = wait_for_spare(server)
    second = server.ask("[[echo]]", system_prompt="Be a spare.", allowed_tools=["Read"])
    assert pid_of(server, second) == spare != pid_of(server, first)
    assert "Be a spare." in str(second.told)
    assert second.session_id == second.result["session_id"] != first.session_id
    # Its session is one like any other.
    assert server.ask("[[history]]", session_id=second.session_id).told == [
        "[[echo]]",
        "[[history]]",
    ]
    assert wait_for_spare(server, 2) != spare, "another one takes its place"


def test_what_has_changed_since_is_known_to_a_new_session(server: Server) -> None:
    server.ask("[[text one]]", workspace="w")
    wait_for_spare(server)
    (server.daemon.base / "workspace" / "w" / "CLAUDE.md").write_text("Say moo.")
    second = server.ask("[[echo]]", workspace="w")
    assert pid_of(server, second) != server.daemon.records("spare_started")[0]["pid"]


def test_a_session_in_another_workspace_does_not_get_it(server: Server) -> None:
    server.ask("[[text one]]")
    spare = wait_for_spare(server)
    assert pid_of(server, server.ask("[[text two]]", workspace="other")) != spare


def test_the_server_takes_its_spares_with_it(server: Server) -> None:
    server.ask("[[text one]]")
    assert wait_for_spare(server) in children_of(server.daemon.pid)
    server.daemon.stop()
    assert processes_with_env(str(server.daemon.folder)) == []
