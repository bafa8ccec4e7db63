"""What goes wrong with the real CLIs: what the client is told, and that nothing is left behind."""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest

from tests.e2e.claude_cli import Claude
from tests.e2e.daemon import processes_with_env, sse_events, wait_until
from tests.e2e.messages_api import REFUSED_KEY, MessagesApi, Recorded
from tests.e2e.server import Server, StartServer

ENVIRONMENT = {"LIVE_SESSIONS": "0"}
"""What is left behind shows when no process stays."""

# What the model provider refuses.

REFUSED = [
    (400, 400, "upstream_invalid_request"),
    (403, 502, "cli_not_authenticated"),
    (404, 404, "model_not_found"),
    (413, 400, "upstream_invalid_request"),
]
RETRIED = [
    (429, 429, "rate_limit_exceeded"),
    (500, 502, "upstream_error"),
    (529, 503, "upstream_overloaded"),
]


@pytest.mark.parametrize(("sent", "status", "code"), REFUSED + RETRIED)
def test_an_error_of_the_provider_has_its_status(
    new_server: Server, sent: int, status: int, code: str
) -> None:
    answer = new_server.ask(f"[[error {sent}]]", stream=False)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert "The CLI said: " in answer.error["message"]


@pytest.mark.parametrize("sent", [400, 429, 500, 529])
def test_in_a_stream_an_error_of_the_provider_is_the_cli_s_own_result(
    new_server: Server, sent: int
) -> None:
    answer = new_server.ask(f"[[error {sent}]]")
    assert answer.status == 200
    assert (answer.result["subtype"], answer.result["is_error"]) == ("success", True)
    assert str(sent) in answer.result["result"]
    retries = [event for event in answer.events if event.get("subtype") == "api_retry"]
    assert [retry["error_status"] for retry in retries] == ([] if sent == 400 else [sent])


@pytest.mark.parametrize(("sent", "status", "code"), REFUSED[:1])
def test_an_error_that_an_old_cli_tells_in_prose_has_its_status(
    old_server: Server, sent: int, status: int, code: str
) -> None:
    answer = old_server.ask(f"[[error {sent}]]", stream=False)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert old_server.ask(f"[[error {sent}]]").result["is_error"] is True


def test_an_error_that_passes_is_no_failure(server: Server) -> None:
    for script in ("[[error 529 x1]]", "[[error 429 retry-after=1 x1]]"):
        assert server.ask(f"{script} [[text After all.]]").text == "After all."


def test_a_limit_says_when_it_ends(claude_new: Claude, start_server: StartServer) -> None:
    # Only an account has such limits; a key has not.
    token = {"ANTHROPIC_API_KEY": None, "CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat-test"}
    server = start_server(claude_new, token)
    reset = int(time.time()) + 600
    headers = {"status": "rejected", "reset": reset, "5h-status": "rejected", "5h-reset": reset}
    script = "".join(
        f"[[header anthropic-ratelimit-unified-{name}: {value}]]"
        for name, value in {**headers, "representative-claim": "five_hour"}.items()
    )
    answer = server.ask(f"{script} [[error 429]]", stream=False)
    assert (answer.status, answer.error["code"]) == (429, "rate_limit_exceeded")
    assert 590 < int(answer.headers["retry-after"]) <= 600


def test_a_refusal_of_the_model_is_an_answer(new_server: Server) -> None:
    for stream in (True, False):
        answer = new_server.ask("[[text I would]] [[stop refusal]]", stream=stream)
        assert answer.status == 200
        assert answer.result["subtype"] == "success"


# Who may ask the model provider.


def test_a_refused_key_ends_the_turn_at_once(
    claude_new: Claude, start_server: StartServer, messages_api: MessagesApi
) -> None:
    # With as many retries as the CLI makes by itself: three minutes.
    env = {"ANTHROPIC_API_KEY": REFUSED_KEY, "CLAUDE_CODE_MAX_RETRIES": None}
    server = start_server(claude_new, env)
    name = f"refused-{uuid4()}"
    streamed = server.ask(f"[[text {name}]]")
    assert streamed.status == 200
    assert streamed.result["subtype"] == "error"
    assert streamed.result["error"]["code"] == "cli_not_authenticated"
    assert "ANTHROPIC_API_KEY" in streamed.result["result"]
    whole = server.ask(f"[[text {name}]]", stream=False)
    assert (whole.status, whole.error["code"]) == (502, "cli_not_authenticated")
    assert len(messages_api.turns(name)) == 2
    assert REFUSED_KEY not in server.daemon.output


def test_a_cli_without_a_key_is_not_logged_in(claude: Claude, start_server: StartServer) -> None:
    server = start_server(claude, {"ANTHROPIC_API_KEY": None})
    whole = server.ask("[[text hello]]", stream=False)
    assert (whole.status, whole.error["code"]) == (502, "cli_not_authenticated")
    assert "/login" in whole.error["message"]
    streamed = server.ask("[[text hello]]")
    assert streamed.result["is_error"] is True
    assert "/login" in streamed.result["result"]


# A CLI that is none.


def test_a_cli_that_is_missing_is_said_to_be(claude_new: Claude, start_server: StartServer) -> None:
    server = start_server(claude_new, {"CLAUDE_CLI": "/nowhere/claude"})
    answer = server.ask("[[text hello]]")
    assert (answer.status, answer.error["code"]) == (503, "cli_not_found")


def test_an_option_that_the_cli_does_not_take_is_told(
    claude: Claude, start_server: StartServer
) -> None:
    server = start_server(claude, {"CLAUDE_CLI": f"{claude} --nonsense"})
    answer = server.ask("[[text hello]]")
    assert (answer.status, answer.error["code"]) == (502, "cli_failed")
    assert "--nonsense" in answer.error["message"]


# Time.


@pytest.mark.parametrize(
    ("variable", "code"),
    [
        ("CLAUDE_TOTAL_TIMEOUT_MS", "turn_timeout"),
        ("CLAUDE_INACTIVITY_TIMEOUT_MS", "inactivity_timeout"),
    ],
)
def test_a_turn_that_takes_too_long_is_stopped(
    claude: Claude,
    start_server: StartServer,
    messages_api: MessagesApi,
    variable: str,
    code: str,
) -> None:
    server = start_server(claude, {variable: "3500"})
    name = f"late-{uuid4()}"
    with ThreadPoolExecutor() as pool:
        prompt = f"[[text {name}]] [[hang]]"
        streaming = pool.submit(server.ask, prompt)
        whole = pool.submit(server.ask, prompt, stream=False).result()
        streamed = streaming.result()
    assert (streamed.result["subtype"], streamed.result["error"]["code"]) == ("timeout", code)
    assert streamed.result["session_id"] == streamed.session_id
    assert (whole.status, whole.error["code"]) == (504, code)
    wait_until(lambda: all(r.aborted for r in messages_api.turns(name)), "the model is let go")


# Who leaves.


def sleeping(name: str) -> str:
    """A script whose tool runs for longer than any test; the name finds it."""
    command = json.dumps({"command": f"NAME={name} sleep 1000"})
    return f"[[tool:Bash {command}]]"


def sleepers(name: str) -> list[int]:
    return processes_with_env(f"NAME={name}\0")


def leftovers(server: Server) -> list[int]:
    """All processes that the daemon started, and theirs."""
    marked = processes_with_env(str(server.daemon.folder))
    return [pid for pid in marked if pid != server.daemon.pid]


def with_model(request: Recorded) -> bool:
    return request.status == 200 and request.outcome == "running"


def test_a_client_that_leaves_takes_the_request_to_the_model_with_it(
    server: Server, messages_api: MessagesApi
) -> None:
    name = f"left-{uuid4()}"
    partial = {} if server.claude.is_old else {"include_partial_messages": True}
    with server.asking(f"[[text {name}]] [[hang]]", **partial) as response:
        messages_api.wait_for(with_model, text=name)
        request_id = response.headers["x-request-id"]
    messages_api.wait_for(lambda request: request.aborted, text=name, timeout=5)
    server.daemon.wait_for_record("turn_end", request_id=request_id, outcome="abandoned")
    wait_until(lambda: not leftovers(server), "the CLI has ended")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_the_tool_with_it(server: Server, stream: bool) -> None:
    name = f"tool-{uuid4()}"
    connection = server.send(sleeping(name), allowed_tools=["Bash"], stream=stream)
    wait_until(lambda: bool(sleepers(name)), "the tool runs")
    connection.close()
    wait_until(lambda: not sleepers(name), "the tool has ended")
    wait_until(lambda: not leftovers(server), "everything else has ended")


# A server that stops.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_stopped_says_so_and_leaves_nothing(
    claude: Claude, start_server: StartServer, number: signal.Signals
) -> None:
    server = start_server(claude, {"DRAIN_TIMEOUT_MS": "100"})
    name = f"stopped-{uuid4()}"
    with server.asking(sleeping(name), allowed_tools=["Bash"]) as response:
        events = sse_events(response)
        next(events)
        wait_until(lambda: bool(sleepers(name)), "the tool runs")
        server.daemon.process.send_signal(number)
        *_, last = events
    assert (last["type"], last["error"]["code"]) == ("result", "shutting_down")
    server.daemon.wait()
    assert not sleepers(name)
    assert not processes_with_env(str(server.daemon.folder))


def test_a_server_that_is_stopped_lets_turns_finish(
    claude: Claude, start_server: StartServer, messages_api: MessagesApi
) -> None:
    server = start_server(claude)
    name = f"drained-{uuid4()}"
    with server.asking(f"[[tokens 1]] [[wait {name}]] [[text done]]") as response:
        events = sse_events(response)
        next(events)
        messages_api.wait_for(with_model, text=name)
        server.daemon.process.send_signal(signal.SIGTERM)
        server.daemon.wait_for_record("server_stopping")
        messages_api.release(name)
        *_, last = events
    assert (last["type"], last["is_error"]) == ("result", False)
    server.daemon.wait()
