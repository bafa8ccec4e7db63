"""Live sessions with the real CLI: a later turn needs no start, and nobody can tell otherwise."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.e2e.claude_cli import Claude
from tests.e2e.daemon import children_of, processes_with_env, wait_until
from tests.e2e.messages_api import MessagesApi
from tests.e2e.processes import is_alive
from tests.e2e.server import Answer, Server, StartServer

TOUCH = '[[tool:Bash {"command": "touch made"}]] [[then]] [[text done]]'
USAGE = "[[usage in=100 out=50]] [[text hello]]"


def start_of(server: Server, answer: Answer) -> dict[str, Any]:
    """The record of the turn's start."""
    [record] = server.daemon.records("turn_start", request_id=answer.headers["x-request-id"])
    return record


def is_live(server: Server, answer: Answer) -> bool:
    return bool(start_of(server, answer)["process"] == "live")


def session_of(server: Server, session: str) -> dict[str, Any]:
    with server.daemon.client() as client:
        told: dict[str, Any] = client.get(f"/api/sessions/{session}").json()
    return told


def _is_written(folder: Path, session: str) -> bool:
    found = folder.glob(f"*/{session}.jsonl")
    return any('"text":"one"' in path.read_text(encoding="utf-8") for path in found)


def shape(answer: Answer) -> list[str]:
    return [str(event.get("subtype") or event["type"]) for event in answer.events]


def test_later_turns_run_in_the_same_process(new_server: Server) -> None:
    first = new_server.ask("[[text one]]")
    others = [new_server.ask("[[history]]", session_id=first.session_id) for _ in range(3)]
    assert [is_live(new_server, answer) for answer in (first, *others)] == [False, True, True, True]
    assert len({start_of(new_server, answer)["pid"] for answer in (first, *others)}) == 1
    assert others[-1].told == ["[[text one]]", *["[[history]]"] * 3]
    assert session_of(new_server, first.session_id)["state"] == "live"
    assert session_of(new_server, first.session_id)["turns"] == 4


def test_a_live_turn_looks_like_one_with_a_process_of_its_own(
    claude_new: Claude, start_server: StartServer
) -> None:
    live = start_server(claude_new)
    alone = start_server(claude_new, {"LIVE_SESSIONS": "0"}, name="alone")
    told = []
    for server in (live, alone):
        session = server.ask(USAGE).session_id
        later = [
            server.ask(USAGE, session_id=session, permission_mode="acceptEdits"),
            server.ask(TOUCH, session_id=session, allowed_tools=["Bash(touch *)"]),
            server.ask(USAGE, session_id=session, include_partial_messages=True),
        ]
        assert [is_live(server, answer) for answer in later] == [server is live] * 3
        figures = ("num_turns", "total_cost_usd", "usage", "subtype", "is_error", "result")
        told.append(
            [(shape(answer), {name: answer.result[name] for name in figures}) for answer in later]
        )
        assert [
            [model["inputTokens"] for model in answer.result["modelUsage"].values()]
            for answer in later
        ] == [[100], [20], [100]]
    assert told[0] == told[1]


def test_live_turns_that_go_wrong_look_like_those_with_processes_of_their_own(
    claude_new: Claude, start_server: StartServer
) -> None:
    told = []
    for env, name in (({}, "live"), ({"LIVE_SESSIONS": "0"}, "alone")):
        server = start_server(claude_new, env, name=name)
        session = server.ask("[[text one]]").session_id
        denied = [server.ask(TOUCH, session_id=session) for _ in range(2)]
        failed = server.ask("[[error 400]]", session_id=session)
        after = server.ask("[[text two]]", session_id=session)
        refused = server.ask("[[error 529]]", session_id=session, stream=False)
        is_kept = name == "live"
        assert [is_live(server, answer) for answer in (*denied, failed)] == [is_kept] * 3
        # A process whose turn failed does not stay.
        assert [is_live(server, answer) for answer in (after, refused)] == [False, is_kept]
        figures = ("num_turns", "usage", "subtype", "is_error", "result")
        told.append(
            [
                [len(answer.result["permission_denials"]) for answer in denied],
                [
                    (shape(answer), {name: answer.result[name] for name in figures})
                    for answer in (*denied, failed, after)
                ],
                (refused.status, refused.error),
            ]
        )
    assert told[0][0] == [1, 1]
    assert told[0] == told[1]


def test_a_tool_that_was_allowed_once_is_not_allowed_for_ever(new_server: Server) -> None:
    session = new_server.ask("[[text one]]", workspace=f"w-{uuid4()}").session_id
    allowed = new_server.ask(TOUCH, session_id=session, allowed_tools=["Bash(touch *)"])
    refused = new_server.ask(TOUCH, session_id=session)
    assert is_live(new_server, refused)
    assert [len(answer.result["permission_denials"]) for answer in (allowed, refused)] == [0, 1]


@pytest.mark.parametrize(
    "changed",
    [
        {"system_prompt": "Be brief."},
        {"model": "claude-parrot-4-5"},
        {"disallowed_tools": ["Bash"]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_is_fixed_at_the_start_gets_another_process(
    new_server: Server, changed: dict[str, Any]
) -> None:
    first = new_server.ask("[[text one]]")
    second = new_server.ask("[[history]]", session_id=first.session_id, **changed)
    assert not is_live(new_server, second)
    assert second.session_id == first.session_id
    assert second.told == ["[[text one]]", "[[history]]"]
    third = new_server.ask("[[text three]]", session_id=first.session_id, **changed)
    assert is_live(new_server, third)


def test_a_process_that_is_killed_while_it_waits_is_replaced(new_server: Server) -> None:
    first = new_server.ask("[[text one]]")
    transcripts = new_server.daemon.folder / "config" / "projects"
    # The CLI writes its transcript a moment after the result; what is lost there is lost for good.
    wait_until(lambda: _is_written(transcripts, first.session_id), "the transcript is written")
    os.kill(start_of(new_server, first)["pid"], signal.SIGKILL)
    second = new_server.ask("[[history]]", session_id=first.session_id)
    assert second.told == ["[[text one]]", "[[history]]"]
    new_server.daemon.wait_for_record("turn_end", session_id=first.session_id)


def test_what_waits_ends_with_a_server_that_is_killed(
    claude_new: Claude, start_server: StartServer
) -> None:
    server = start_server(claude_new, {"SPARE_PROCESSES": "1"}, name="killed")
    first = server.ask("[[text one]]")
    spare = server.daemon.wait_for_record("spare_started")["pid"]
    waiting = [start_of(server, first)["pid"], spare]
    assert all(map(is_alive, waiting))
    server.daemon.kill()
    wait_until(lambda: not any(map(is_alive, waiting)), "they read the end of their input")


def test_an_interrupted_turn_ends_with_its_result(
    new_server: Server, messages_api: MessagesApi
) -> None:
    name = f"interrupted-{uuid4()}"
    first = new_server.ask("[[text one]]")
    with ThreadPoolExecutor(1) as pool, new_server.daemon.client() as client:
        turn = pool.submit(
            new_server.ask, f"[[text so far]] [[wait {name}]]", session_id=first.session_id
        )
        wait_until(lambda: bool(messages_api.turns(name)), "the model was asked")
        answer = client.post(f"/api/sessions/{first.session_id}/interrupt")
        assert answer.json() == {"id": first.session_id, "interrupted": True}
        result = turn.result(30).result
    assert result["subtype"] == "error_during_execution"
    assert new_server.ask("[[text two]]", session_id=first.session_id).text == "two"


def test_a_deleted_session_leaves_no_process_and_is_gone(new_server: Server) -> None:
    first = new_server.ask("[[text one]]")
    pid = start_of(new_server, first)["pid"]
    assert pid in children_of(new_server.daemon.pid)
    with new_server.daemon.client() as client:
        assert client.delete(f"/api/sessions/{first.session_id}").json()["deleted"] is True
        assert client.get(f"/api/sessions/{first.session_id}").status_code == 404
    assert pid not in children_of(new_server.daemon.pid)
    assert new_server.ask("[[text two]]", session_id=first.session_id).status == 404


def test_what_a_command_in_the_background_brings_is_in_nobodys_answer(new_server: Server) -> None:
    background = {"command": "sleep 1; echo done", "run_in_background": True}
    first = new_server.ask(
        f"[[tool:Bash {background!s}]] [[then]] [[text started]]".replace("'", '"').replace(
            "True", "true"
        ),
        allowed_tools=["Bash"],
    )
    new_server.daemon.wait_for_record("background_events", session_id=first.session_id)
    second = new_server.ask(USAGE, session_id=first.session_id)
    assert second.text == "hello"
    assert second.result["usage"]["input_tokens"] == 100


def test_a_conversation_of_an_openai_client_is_live_too(new_server: Server) -> None:
    messages: list[dict[str, Any]] = []
    answers: list[httpx.Response] = []
    with new_server.daemon.client() as client:
        for n in range(3):
            messages.append({"role": "user", "content": f"[[text answer {n}]]"})
            answer = client.post("/v1/chat/completions", json={"messages": messages})
            messages.append(answer.json()["choices"][0]["message"])
            answers.append(answer)
    starts = [
        new_server.daemon.records("turn_start", request_id=answer.headers["x-request-id"])[0]
        for answer in answers
    ]
    assert [start["process"] == "live" for start in starts] == [False, True, True]
    assert len({answer.headers["x-claude-session-id"] for answer in answers}) == 1


def test_the_server_takes_its_live_processes_with_it(
    claude_new: Claude, start_server: StartServer
) -> None:
    server = start_server(claude_new, {"LIVE_SESSIONS": "2"})
    sessions = [server.ask("[[text one]]").session_id for _ in range(3)]
    wait_until(lambda: len(children_of(server.daemon.pid)) == 2, "the oldest is gone")
    states = [session_of(server, session)["state"] for session in sessions]
    assert states == ["idle", "live", "live"]
    server.daemon.stop()
    assert processes_with_env(str(server.daemon.folder)) == []


def test_so_many_turns_at_once_and_the_others_wait(
    claude_new: Claude, start_server: StartServer, messages_api: MessagesApi
) -> None:
    server = start_server(
        claude_new, {"MAX_CONCURRENT_TURNS": "1", "QUEUE_LENGTH": "1", "LIVE_SESSIONS": "0"}
    )
    name = f"held-{uuid4()}"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.ask, f"[[hold {name}]] [[text first]]")
        wait_until(lambda: bool(messages_api.turns(name)), "the first turn runs")
        second = pool.submit(server.ask, "[[text second]]")
        wait_until(lambda: len(server.daemon.records("request")) == 2, "the second one waits")
        third = server.ask("[[text third]]")
        assert (third.status, third.error["code"]) == (429, "server_busy")
        assert int(third.headers["retry-after"]) > 0
        messages_api.release(name)
        assert (first.result(30).text, second.result(30).text) == ("first", "second")
