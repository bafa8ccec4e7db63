"""Sessions and workspaces with the real CLIs: what is continued, by whom, and where."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from tests.e2e.claude_cli import Claude
from tests.e2e.daemon import wait_until
from tests.e2e.messages_api import MessagesApi
from tests.e2e.server import Answer, Server, StartServer

ONE, TWO, HISTORY = "[[text one]]", "[[text two]]", "[[history]]"


def workspace_of(server: Server, name: str) -> Path:
    return server.daemon.base / "workspace" / name


# Going on.


def test_a_session_is_continued_turn_after_turn(server: Server) -> None:
    first = server.ask(ONE)
    second = server.ask(TWO, session_id=first.session_id)
    assert second.text == "two"
    assert server.ask(HISTORY, session_id=second.session_id).told == [ONE, TWO, HISTORY]
    # The first id names the session for good, also where the CLI makes one at each turn.
    fourth = server.ask(HISTORY, session_id=first.session_id)
    assert fourth.told == [ONE, TWO, HISTORY, HISTORY]


def test_the_id_stays_the_same_where_the_cli_keeps_it(new_server: Server) -> None:
    first = new_server.ask(ONE)
    second = new_server.ask(TWO, session_id=first.session_id.upper())
    assert second.session_id == first.session_id
    assert {event["session_id"] for event in second.events} == {first.session_id}


def test_turns_without_a_session_know_nothing_of_each_other(new_server: Server) -> None:
    first = new_server.ask(ONE)
    second = new_server.ask(HISTORY)
    assert second.told == [HISTORY]
    assert second.session_id != first.session_id


def test_a_session_outlives_the_server(
    claude: Claude, start_server: StartServer, messages_api: MessagesApi
) -> None:
    first = start_server(claude)
    session = first.ask(ONE, workspace="home").session_id
    first.daemon.stop()
    second = start_server(claude)
    assert second.ask(HISTORY, session_id=session).told == [ONE, HISTORY]
    name = f"crash-{uuid4()}"
    with (
        suppress(httpx.TransportError),
        second.asking(f"[[text {name}]] [[hang]]", session_id=session) as response,
    ):
        messages_api.wait_for(lambda request: request.status == 200, text=name)
        second.daemon.kill()
        response.read()
    third = start_server(claude)
    told = third.ask(HISTORY, session_id=session).told
    assert (told[:2], told[-1]) == ([ONE, HISTORY], HISTORY)


def test_a_session_outlives_a_turn_whose_client_left(
    server: Server, messages_api: MessagesApi
) -> None:
    first = server.ask(ONE)
    name = f"leaving-{uuid4()}"
    with server.asking(f"[[text {name}]] [[hang]]", session_id=first.session_id) as response:
        told = response.headers["x-claude-session-id"]
        messages_api.wait_for(lambda request: request.status == 200, text=name)
    messages_api.wait_for(lambda request: request.aborted, text=name)
    for session in (first.session_id, told):
        history = server.ask(HISTORY, session_id=session).told
        assert (history[0], history[-1]) == (ONE, HISTORY)


def test_a_session_outlives_a_turn_that_failed(server: Server) -> None:
    first = server.ask(ONE)
    failed = server.ask("[[error 400]]", session_id=first.session_id)
    assert failed.result["is_error"] is True
    for session in (first.session_id, failed.session_id):
        history = server.ask(HISTORY, session_id=session).told
        assert (history[0], history[-1]) == (ONE, HISTORY)


def test_the_command_clear_empties_a_session(server: Server) -> None:
    first = server.ask(ONE)
    cleared = server.ask("/clear", session_id=first.session_id)
    assert cleared.result["subtype"] == "success"
    history = server.ask(HISTORY, session_id=first.session_id).told
    # The old CLI keeps nothing that could be resumed after it, so it has no effect there.
    assert (ONE in history) is server.claude.is_old
    assert history[-1] == HISTORY


def test_what_a_turn_asked_for_is_for_that_turn_alone(new_server: Server) -> None:
    first = new_server.ask(ONE, system_prompt="You are a parrot.", model="claude-parrot-4-5")
    told = new_server.ask("[[echo]]", session_id=first.session_id).told
    assert "parrot" not in told["system_tail"]
    assert told["model"] != "claude-parrot-4-5"


# Copies.


def test_a_fork_leaves_the_session_as_it_was(server: Server) -> None:
    first = server.ask(ONE, workspace="fork-home")
    fork = server.ask(TWO, session_id=first.session_id, fork=True)
    assert fork.text == "two"
    assert fork.events[0]["cwd"] == str(workspace_of(server, "fork-home"))
    assert fork.session_id != first.session_id
    assert {event["session_id"] for event in fork.events} == {fork.session_id}
    assert server.ask(HISTORY, session_id=first.session_id).told == [ONE, HISTORY]
    assert server.ask(HISTORY, session_id=fork.session_id).told == [ONE, TWO, HISTORY]


# Unknown and foreign ones.


@pytest.mark.parametrize(("stream", "fork"), [(True, False), (False, True)])
def test_a_session_that_nobody_knows_is_not_found(server: Server, stream: bool, fork: bool) -> None:
    answer = server.ask(ONE, session_id=str(uuid4()), stream=stream, fork=fork)
    assert answer.status == 404
    assert answer.error["code"] == "session_not_found"


def test_a_session_that_was_not_begun_here_is_tried(
    server: Server, start_server: StartServer
) -> None:
    first = server.ask(ONE)
    # Another state directory, so that nothing is remembered, with the same CLI's transcripts.
    daemon = server.daemon
    shared = {
        "WORKSPACE_BASE_PATH": str(daemon.base),
        "CLAUDE_CONFIG_DIR": daemon.environment["CLAUDE_CONFIG_DIR"],
        "HOME": daemon.environment["HOME"],
    }
    stranger = start_server(server.claude, shared)
    assert stranger.ask(HISTORY, session_id=first.session_id).told == [ONE, HISTORY]


# Order.


def test_turns_on_one_session_wait_for_each_other(
    server: Server, messages_api: MessagesApi
) -> None:
    first = server.ask(ONE)
    held = f"serialized-{first.session_id}"

    def say(prompt: str) -> Answer:
        return server.ask(prompt, session_id=first.session_id)

    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(say, f"[[hold {held}]] [[text slow]]")
        messages_api.wait_for(lambda _: True, text=held)
        quick = pool.submit(say, "[[text quick]]")
        started = len(server.daemon.records("turn_start"))
        wait_until(
            lambda: len(server.daemon.records("request", session_id=first.session_id)) == 2,
            "both requests are received",
        )
        assert not quick.done()
        assert len(server.daemon.records("turn_start")) == started
        messages_api.release(held)
        assert slow.result().text == "slow"
        assert quick.result().text == "quick"
    told = server.ask(HISTORY, session_id=first.session_id).told
    assert told == [ONE, f"[[hold {held}]] [[text slow]]", "[[text quick]]", HISTORY]


def test_a_session_can_be_waited_for_while_its_first_turn_runs(
    new_server: Server, messages_api: MessagesApi
) -> None:
    held = f"first-{uuid4()}"
    with (
        ThreadPoolExecutor(1) as pool,
        new_server.asking(f"[[tokens 2]] [[wait {held}]] [[text one]]") as response,
    ):
        session = response.headers["x-claude-session-id"]
        second = pool.submit(new_server.ask, HISTORY, session_id=session)
        wait_until(
            lambda: bool(new_server.daemon.records("request", session_id=session)),
            "the second request is received",
        )
        assert not second.done()
        messages_api.release(held)
        response.read()
        assert second.result().told == [f"[[tokens 2]] [[wait {held}]] [[text one]]", HISTORY]


def test_turns_on_different_sessions_run_at_once(server: Server, messages_api: MessagesApi) -> None:
    name = f"together-{uuid4()}"
    with ThreadPoolExecutor(3) as pool:
        turns = [pool.submit(server.ask, f"[[hold {name}]] [[text {n}]]") for n in range(3)]
        wait_until(lambda: len(messages_api.turns(name)) == 3, "all three are with the model")
        messages_api.release(name)
        assert [turn.result().text for turn in turns] == ["0", "1", "2"]


# Workspaces.


def test_workspaces_are_kept_apart(server: Server) -> None:
    write = '[[tool:Write {"file_path": "FILE", "content": "x"}]] [[then]] [[text written]]'
    for name in ("apart-one", "apart-two"):
        file = workspace_of(server, name) / f"{name}.txt"
        answer = server.ask(
            write.replace("FILE", str(file)), workspace=name, permission_mode="acceptEdits"
        )
        assert answer.text == "written"
        assert answer.events[0]["cwd"] == str(workspace_of(server, name))
        assert [path.name for path in workspace_of(server, name).iterdir()] == [f"{name}.txt"]


def test_without_a_name_it_is_the_shared_workspace(server: Server) -> None:
    answer = server.ask(ONE)
    assert answer.events[0]["cwd"] == str(server.daemon.base / "shared_workspace")


def test_a_session_has_one_workspace_and_remembers_it(server: Server) -> None:
    first = server.ask(ONE, workspace="mine")
    for other in ("yours", "shared_workspace"):
        answer = server.ask(TWO, session_id=first.session_id, workspace=other)
        assert (answer.status, answer.error["param"]) == (400, "workspace")
        assert "'mine'" in answer.error["message"]
    assert not workspace_of(server, "yours").exists()
    assert server.ask(TWO, session_id=first.session_id, workspace="mine").text == "two"
    third = server.ask(HISTORY, session_id=first.session_id)
    assert third.told == [ONE, TWO, HISTORY]
    assert third.events[0]["cwd"] == str(workspace_of(server, "mine"))
