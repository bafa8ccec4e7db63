"""What happened to a request is told by all lines of the log that have its id, and by no others."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.e2e.daemon import Daemon, sse_events, wait_until
from tests.integration.server import write_cli

KEY = "sk-of-the-one-who-asks-0123456789"

CLI = """
word = message().split()[0]
if word == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if word == "untidy":
    write(b"this is no event\\n")
    refusal = {"subtype": "error", "request_id": "req_1", "error": "not today"}
    write(line(type="control_response", response=refusal))
write(INIT)
write(line(type="assistant", message={"id": "m", "content": [{"type": "text", "text": "hi"}]}))
if word == "die":
    sys.exit(3)
if word == "stubborn":
    while True:
        time.sleep(60)
if word == "wait":
    while not os.path.exists(os.path.join(FOLDER, "enough")):
        time.sleep(0.02)
if word == "hang":
    for text in sys.stdin:
        if json.loads(text).get("request", {}).get("subtype") == "interrupt":
            write(line(type="result", subtype="error_during_execution", is_error=True, errors=[]))
            break
    leave()
write(RESULT)
leave()
"""

START = ["authentication", "request", "process_start", "turn_start"]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("story")
    env = {
        "CLAUDE_CLI": write_cli(folder, CLI),
        "API_KEY": KEY,
        "LOG_LEVEL": "debug",
        "LIVE_SESSIONS": "0",
        "CLAUDE_TOTAL_TIMEOUT_MS": "3000",
        "PROCESS_KILL_TIMEOUT_MS": "200",
    }
    with Daemon(folder, "claude", "http://127.0.0.1:9", env=env) as started:
        yield started


def ask(daemon: Daemon, word: str, **fields: Any) -> httpx.Response:
    """A turn, from its beginning to its end."""
    body = {"prompt": f"{word} and keep it to yourself", **fields}
    with daemon.client(headers={"x-api-key": KEY}) as client:
        return client.post("/api/claude", json=body)


def id_of(answer: httpx.Response) -> str:
    return answer.headers["x-request-id"]


def lines_with(daemon: Daemon, text: str) -> list[dict[str, Any]]:
    """What grep finds."""
    return [json.loads(line) for line in list(daemon.lines) if text in line]


def story(daemon: Daemon, request_id: str, last: str) -> list[str]:
    """The types of the records with an id, in order, when the last one has come."""
    daemon.wait_for_record(last, request_id=request_id)
    records = lines_with(daemon, request_id)
    assert all(record["request_id"] == request_id for record in records)
    # Nothing else was told of its process.
    pids = {record["pid"] for record in records if record["type"] == "turn_start"}
    for pid in pids:
        assert all(record in records for record in daemon.records(pid=pid))
    return [record["type"] for record in records]


def only(daemon: Daemon, kind: str, request_id: str) -> dict[str, Any]:
    [record] = daemon.records(kind, request_id=request_id)
    return record


def test_a_success(daemon: Daemon) -> None:
    asked = id_of(ask(daemon, "succeed"))
    end = ["turn_end", "response", "process_exit"]
    assert story(daemon, asked, "process_exit") == [*START, *end]
    assert only(daemon, "turn_end", asked)["outcome"] == "success"


def test_what_the_cli_did_wrong(daemon: Daemon) -> None:
    asked = id_of(ask(daemon, "untidy"))
    middle = ["stray_output", "control_refused"]
    end = ["turn_end", "response", "process_exit"]
    assert story(daemon, asked, "process_exit") == [*START, *middle, *end]


def test_a_wait_in_the_queue(daemon: Daemon) -> None:
    session = str(uuid4())
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(ask, daemon, "wait", **{"session-id": session})
        daemon.wait_for_record("turn_start", session_id=session)
        second = threads.submit(ask, daemon, "succeed", **{"session-id": session})
        wait_until(lambda: len(daemon.records("request", session_id=session)) == 2, "two ask")
        (daemon.folder / "enough").touch()
        assert first.result().status_code == 200
        asked = id_of(second.result())
    types = story(daemon, asked, "process_exit")
    assert types[:4] == ["authentication", "request", "queue_left", "process_start"]
    assert only(daemon, "queue_left", asked)["line"] == "session"
    assert only(daemon, "turn_end", asked)["outcome"] == "success"


def test_a_timeout_and_the_kill_ladder(daemon: Daemon) -> None:
    answer = ask(daemon, "stubborn", stream=False)
    assert answer.status_code == 504
    asked = id_of(answer)
    end = ["turn_end", "request_failed", "response"]
    ladder = ["process_signal", "process_signal", "process_exit"]
    assert story(daemon, asked, "process_exit") == [*START, *end, *ladder]
    assert only(daemon, "turn_end", asked)["outcome"] == "turn_timeout"
    signals = daemon.records("process_signal", request_id=asked)
    assert [record["signal"] for record in signals] == ["SIGTERM", "SIGKILL"]


def test_the_example_in_the_documents_is_what_happens(daemon: Daemon) -> None:
    page = Path(__file__).parents[2] / "docs" / "logs.md"
    section = page.read_text().partition("## What happened to a request")[2]
    shown = section.partition("```json\n")[2].partition("```")[0].splitlines()
    example = [json.loads(line) for line in shown]
    asked = id_of(ask(daemon, "stubborn", stream=False))
    daemon.wait_for_record("process_exit", request_id=asked)
    records = [r for r in lines_with(daemon, asked) if r["level"] != "debug"]
    assert [list(record) for record in example] == [list(record) for record in records]
    varying = r"\d+(\.\d+)?|[0-9a-f-]{32,36}"
    for told, happened in zip(example, records, strict=True):
        for name in ("level", "component", "type", "message", "status", "signal", "ending"):
            told_text, text = str(told.get(name)), str(happened.get(name))
            assert re.sub(varying, "_", told_text) == re.sub(varying, "_", text)


def test_a_client_that_leaves(daemon: Daemon) -> None:
    body = {"prompt": "hang and keep it to yourself"}
    with (
        daemon.client(headers={"x-api-key": KEY}) as client,
        client.stream("POST", "/api/claude", json=body) as answer,
    ):
        next(sse_events(answer))
        asked = id_of(answer)
    daemon.wait_for_record("process_exit", request_id=asked)
    types = story(daemon, asked, "response")
    assert types[:4] == START
    assert set(types[4:]) == {"client_gone", "turn_end", "response", "process_exit"}
    assert only(daemon, "turn_end", asked)["outcome"] == "abandoned"
    assert only(daemon, "response", asked)["complete"] is False


def test_a_key_that_is_refused(daemon: Daemon) -> None:
    with daemon.client(headers={"x-api-key": "sk-of-somebody-else-0123"}) as client:
        answer = client.post("/api/claude", json={"prompt": "let me in at once, please"})
    assert answer.status_code == 401
    asked = id_of(answer)
    assert story(daemon, asked, "response") == ["authentication", "request_failed", "response"]
    assert only(daemon, "authentication", asked)["verdict"] == "refused"


def test_a_stream_that_the_cli_cuts(daemon: Daemon) -> None:
    answer = ask(daemon, "die")
    assert answer.status_code == 200
    asked = id_of(answer)
    assert story(daemon, asked, "response") == [*START, "process_exit", "turn_end", "response"]
    assert only(daemon, "turn_end", asked)["outcome"] == "cli_failed"
    assert only(daemon, "process_exit", asked)["ending"] == "exit code 3"


def test_an_interrupt_and_the_turn_that_it_ends(daemon: Daemon) -> None:
    session = str(uuid4())
    body = {"prompt": "hang and keep it to yourself", "session-id": session}
    with (
        daemon.client(headers={"x-api-key": KEY}) as client,
        client.stream("POST", "/api/claude", json=body) as turn,
    ):
        events = sse_events(turn)
        next(events)
        answer = client.post(f"/api/sessions/{session}/interrupt")
        assert list(events)
        asked, stopped = id_of(answer), id_of(turn)
    assert answer.json()["interrupted"] is True
    types = story(daemon, stopped, "process_exit")
    assert types[: len(START) + 1] == [*START, "turn_interrupted"]
    assert sorted(types[len(START) + 1 :]) == ["process_exit", "response", "turn_end"]
    own = ["authentication", "session_interrupted", "response"]
    assert story(daemon, asked, "response") == own
    # The two find each other by their session.
    assert only(daemon, "session_interrupted", asked)["session_id"] == session
    assert only(daemon, "turn_interrupted", stopped)["session_id"] == session


def test_a_chat_with_fields_without_effect(daemon: Daemon) -> None:
    messages = [{"role": "user", "content": "succeed and keep it to yourself"}]
    body = {"messages": messages, "temperature": 0.5}
    with daemon.client(headers={"x-api-key": KEY}) as client:
        asked = id_of(client.post("/v1/chat/completions", json=body))
    assert "fields_ignored" in story(daemon, asked, "response")


def test_what_is_not_understood_at_all(daemon: Daemon) -> None:
    with socket.create_connection(("127.0.0.1", daemon.port)) as client:
        client.sendall(b"what is this\r\n\r\n")
        head = client.makefile("rb").read().decode("ascii").lower()
    asked = head.partition("x-request-id: ")[2].partition("\r\n")[0]
    assert story(daemon, asked, "connection_closed") == ["connection_closed"]


def test_a_look_at_the_health(daemon: Daemon) -> None:
    with daemon.client() as client:
        asked = id_of(client.get("/health"))
    assert story(daemon, asked, "response") == ["health", "response"]
