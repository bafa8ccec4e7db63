"""The harness itself: the real CLIs, run by hand, against the scripted API."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.answers import big_text
from tests.e2e.claude_cli import Claude
from tests.e2e.conversation import Conversation
from tests.e2e.daemon import (
    children_of,
    cli_environment,
    processes_with_env,
    run_cli,
    sse_events,
    user_line,
    wait_until,
)
from tests.e2e.messages_api import REFUSED_KEY, MessagesApi
from tests.e2e.script import Directive, ScriptError, parse

Events = list[dict[str, Any]]


class Talk:
    """One CLI with a folder of its own."""

    def __init__(self, claude: Claude, api: MessagesApi, folder: Path) -> None:
        self.claude = claude
        self.api = api
        self.folder = folder
        self.workspace = folder / "workspace"

    def say(self, *texts: str, args: list[str] | None = None, **env: str) -> Events:
        """Run the CLI with these user messages and return its events."""
        environment = cli_environment(self.folder, self.api.url, env)
        lines = [user_line(text) for text in texts]
        return run_cli(self.claude, args or [], lines, environment, self.workspace)


@pytest.fixture
def talk(claude: Claude, messages_api: MessagesApi, tmp_path: Path) -> Talk:
    return Talk(claude, messages_api, tmp_path)


@pytest.fixture
def new_talk(claude_new: Claude, messages_api: MessagesApi, tmp_path: Path) -> Talk:
    return Talk(claude_new, messages_api, tmp_path)


@pytest.fixture
def client(messages_api: MessagesApi) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=messages_api.url, trust_env=False, timeout=10) as client:
        yield client


def ask(text: str, **fields: Any) -> dict[str, Any]:
    """A request body as the CLI would send it, in short."""
    messages = [{"role": "user", "content": text}]
    return {"model": "m", "max_tokens": 32000, "messages": messages, **fields}


def results(events: Events) -> list[dict[str, Any]]:
    return [event for event in events if event["type"] == "result"]


def result(events: Events) -> dict[str, Any]:
    (only,) = results(events)
    return only


# The real programs.


def test_text_arrives(talk: Talk) -> None:
    events = talk.say("[[text Grüße an alle.]]")
    assert events[0]["subtype"] == "init"
    assert result(events)["result"] == "Grüße an alle."
    assert result(events)["is_error"] is False


def test_a_big_answer_arrives_whole(talk: Talk) -> None:
    assert result(talk.say("[[big 300000]]"))["result"] == big_text(300_000)


def test_an_allowed_tool_runs_and_the_script_goes_on(talk: Talk) -> None:
    script = (
        '[[text Looking.]] [[tool:Bash {"command": "echo one > made; echo out"}]]'
        ' [[then]] [[tool:Bash {"command": "cat made"}]]'
    )
    events = talk.say(script, args=["--allowedTools", "Bash"])
    assert result(events)["result"] == "Done. Tool said: one"
    assert (talk.workspace / "made").read_text() == "one\n"


def test_two_tools_in_one_message_run(talk: Talk) -> None:
    script = '[[tool:Bash {"command": "echo 1"}]] [[tool:Bash {"command": "echo 2"}]]'
    events = talk.say(script, args=["--allowedTools", "Bash"])
    assert result(events)["result"] == "Done. Tool said: 1 | 2"


def test_a_sub_agent_has_a_script_of_its_own(talk: Talk) -> None:
    script = '[[subagent [[tool:Bash {"command": "echo in-sub"}]]]] [[then]] [[text Back.]]'
    events = talk.say(script, args=["--allowedTools", "Task,Bash"])
    assert result(events)["result"] == "Back."
    assert any("in-sub" in json.dumps(e) for e in events if e.get("parent_tool_use_id"))


def test_an_error_of_the_api_fails_the_turn(talk: Talk) -> None:
    failed = result(talk.say("[[error 400]]"))
    assert failed["is_error"] is True
    assert "Scripted invalid_request_error" in failed["result"]


def test_an_error_that_comes_once_is_retried(talk: Talk) -> None:
    assert result(talk.say("[[error 529 x1]] [[text After all.]]"))["result"] == "After all."


def test_a_cut_answer_is_asked_for_again(talk: Talk) -> None:
    events = talk.say("[[tokens 3]] [[cut]]")
    assert result(events)["result"].strip() == "tok0 tok1 tok2"


def test_a_resumed_session_remembers(talk: Talk) -> None:
    first = result(talk.say("[[text hello]]"))
    resumed = talk.say("[[history]]", args=["--resume", first["session_id"]])
    assert json.loads(result(resumed)["result"]) == ["[[text hello]]", "[[history]]"]


def test_a_real_mcp_server_is_called(talk: Talk, everything_server: list[str]) -> None:
    command, *args = everything_server
    config = {"mcpServers": {"everything": {"command": command, "args": args}}}
    path = talk.folder / "mcp.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    events = talk.say(
        '[[tool:mcp__everything__echo {"message": "ping"}]]',
        args=["--mcp-config", str(path), "--allowedTools", "mcp__everything__echo"],
        MCP_CONNECTION_NONBLOCKING="0",
    )
    assert result(events)["result"] == "Done. Tool said: Echo: ping"


def test_nothing_of_the_cli_is_left(talk: Talk) -> None:
    talk.say("[[text hello]]")
    wait_until(lambda: not processes_with_env(str(talk.folder)), "the CLI's processes end")


def test_two_turns_and_thinking_in_one_process(new_talk: Talk) -> None:
    events = new_talk.say(
        "[[thinking Well, well.]] [[text one]]",
        "[[usage in=7 out=9 cache-read=5]] [[text two]]",
        args=["--include-partial-messages"],
    )
    assert [r["result"] for r in results(events)] == ["one", "two"]
    assert results(events)[1]["usage"]["cache_read_input_tokens"] == 5
    thoughts = [e["event"]["delta"] for e in events if "delta" in e.get("event", {})]
    assert "".join(d.get("thinking", "") for d in thoughts) == "Well, well."


def test_structured_output_is_delivered(new_talk: Talk) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    events = new_talk.say('[[structured {"a": 1}]]', args=["--json-schema", json.dumps(schema)])
    assert result(events)["structured_output"] == {"a": 1}


def test_a_refused_key_fails(new_talk: Talk) -> None:
    failed = result(new_talk.say("hi", ANTHROPIC_API_KEY=REFUSED_KEY))
    assert failed["api_error_status"] == 401


def test_the_echo_tells_the_request(new_talk: Talk) -> None:
    events = new_talk.say("[[echo]]", args=["--append-system-prompt", "Speak Latin."])
    told = json.loads(result(events)["result"])
    assert told["system_tail"].endswith("Speak Latin.")
    assert [message["role"] for message in told["messages"]] == ["user"]


# Processes.


def test_processes_are_found_by_parent_and_by_environment(tmp_path: Path) -> None:
    script = "sleep 60 & wait"
    with subprocess.Popen(["sh", "-c", script], env={"MARKER": str(tmp_path)}) as shell:
        try:
            wait_until(lambda: len(children_of(shell.pid)) == 1, "the shell starts its child")
            family = sorted([shell.pid, *children_of(shell.pid)])
            assert set(family) <= set(children_of(os.getpid()))
            wait_until(lambda: processes_with_env(str(tmp_path)) == family, "both carry the mark")
        finally:
            for pid in [*children_of(shell.pid), shell.pid]:
                os.kill(pid, signal.SIGKILL)


# The API by itself.


def test_a_misspelt_script_is_an_error(client: httpx.Client) -> None:
    answer = client.post("/v1/messages", json=ask("[[txt hello]]"))
    assert answer.status_code == 400
    assert "no [[txt]]" in answer.json()["error"]["message"]


def test_what_does_not_exist_is_not_found(client: httpx.Client) -> None:
    assert client.head("/").status_code == 200
    assert client.get("/v1/models").json()["error"]["type"] == "not_found_error"
    assert client.post("/v1/nothing", json={}).status_code == 404
    assert client.post("/v1/messages/count_tokens", json=ask("x")).json()["input_tokens"] > 0


def test_a_stream_waits_for_the_test(client: httpx.Client, messages_api: MessagesApi) -> None:
    body = ask("[[text a]] [[wait waits-for-the-test]] [[text b]]", stream=True)
    texts = []
    with client.stream("POST", "/v1/messages", json=body) as response:
        for event in sse_events(response):
            text = event.get("delta", {}).get("text")
            if text == "a":
                running = messages_api.turns("waits-for-the-test")
                assert [request.outcome for request in running] == ["running"]
                messages_api.release("waits-for-the-test")
            texts.append(text)
    assert [text for text in texts if text] == ["a", "b"]


def test_a_client_that_leaves_is_noticed(client: httpx.Client, messages_api: MessagesApi) -> None:
    body = ask("[[text never ends]] [[hang]]", stream=True)
    with client.stream("POST", "/v1/messages", json=body) as response:
        next(sse_events(response))
    request = messages_api.wait_for(lambda request: request.aborted, text="never ends")
    assert request.status == 200


def test_a_rate_limit_says_when_to_come_back(client: httpx.Client) -> None:
    answer = client.post("/v1/messages", json=ask("[[error 429 retry-after=3]]"))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")


def test_side_requests_follow_no_script(client: httpx.Client, messages_api: MessagesApi) -> None:
    body = ask("a side request with [[error 400]]", max_tokens=512)
    assert client.post("/v1/messages", json=body).json()["content"][0]["text"] == "{}"
    assert messages_api.turns("a side request") == []


# The language.


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("hello", []),
        ("if [[ -f x ]]", []),
        ("[[text a b]] and", [[Directive("text", "a b")]]),
        ('[[text "]] \\n"]]', [[Directive("text", "]] \n")]]),
        ("[[echo]]", [[Directive("echo")]]),
        ('[[tool:Bash {"a": [[1]]}]]', [[Directive("tool", "Bash", {"a": [[1]]})]]),
        ("[[subagent [[text a]] [[echo]]]]", [[Directive("subagent", "[[text a]] [[echo]]")]]),
        ("[[cut]] [[then]] [[hang]]", [[Directive("cut")], [Directive("hang")]]),
    ],
)
def test_a_script_is_read(text: str, steps: list[list[Directive]]) -> None:
    assert parse(text) == steps


@pytest.mark.parametrize(
    "text",
    ["[[text a", "[[tool:Bash ls]]", "[[tool {}]]", "[[structured [1]]]", "[[subagent [[x]]"],
)
def test_a_broken_script_is_refused(text: str) -> None:
    with pytest.raises(ScriptError):
        parse(text)


def test_messages_with_the_same_tool_calls_count_once() -> None:
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "Bash"}]}
    done = {"role": "user", "content": [{"type": "tool_result", "content": " x "}]}
    start = {"role": "user", "content": "<system-reminder>[[no]]</system-reminder>[[text a]]"}
    conversation = Conversation({"messages": [start, call, done, call, done]})
    assert conversation.answered == 1
    assert conversation.user_texts == ["[[text a]]"]
    assert conversation.last_tool_results == ["x"]
