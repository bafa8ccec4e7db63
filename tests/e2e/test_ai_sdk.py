"""`POST /v1/chat/completions` asked by Vercel's `ai` with `@ai-sdk/openai-compatible`."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.chat_frames import Tap
from tests.e2e.claude_cli import Claude
from tests.e2e.daemon import Daemon
from tests.e2e.messages_api import MessagesApi
from tests.e2e.node import AI_SDK, NodeProgram

WEATHER = {"city": "Rome", "degrees": 21.5}
PNG = (  # one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJ"
    "RU5ErkJggg=="
)
PDF = base64.b64encode(b"%PDF-1.4\n%%EOF\n").decode()


class Client:
    """The program, talking to one server."""

    def __init__(self, program: NodeProgram, url: str) -> None:
        self.program = program
        self.url = url
        # Takes longer than all that the server does against silence; other tests run meanwhile.
        self.silence = program.start("stream", **self.command("[[delay 21s]] [[text At last.]]"))

    def ask(self, do: str, prompt: str, **command: Any) -> dict[str, Any]:
        return self.program.ask(do, **self.command(prompt, **command))

    def command(self, prompt: str, call: Any = None, **command: Any) -> dict[str, Any]:
        """What a command to say this consists of; a C{call} is added to the call's own."""
        asked = {"prompt": prompt, **(call or {})}
        return {"url": self.url, "model": "claude-code", "call": asked, **command}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProgram]:
    folder = tmp_path_factory.mktemp("ai-sdk")
    with NodeProgram(folder, "ai_sdk.mjs", AI_SDK) as program:
        yield program


@pytest.fixture(scope="module")
def client(
    program: NodeProgram,
    claude_new: Claude,
    messages_api: MessagesApi,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("daemon")
    # A CLI that repeats nothing by itself.
    env = {"CLAUDE_CODE_MAX_RETRIES": "0"}
    with Daemon(folder, claude_new, messages_api.url, env=env) as daemon, Tap(daemon.url) as tap:
        yield Client(program, tap.url)


def of_type(answer: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [part for part in answer["parts"] if part["type"] == kind]


def told(answer: dict[str, Any], kind: str) -> list[str]:
    return [part["text"] for part in of_type(answer, kind)]


# Answers.


def test_a_whole_answer_has_text_reasoning_and_usage(client: Client) -> None:
    script = "[[thinking Well, well.]] [[text Grüße!]] [[usage in=7 cache-read=5 out=11]]"
    answer = client.ask("generate", script, model="claude-parrot-4-5")
    assert answer["text"] == "Grüße!"
    assert answer["reasoning"].strip() == "Well, well."
    assert answer["finish_reason"] == "stop"
    assert answer["usage"]["inputTokens"] == 12
    assert answer["usage"]["inputTokenDetails"]["cacheReadTokens"] == 5
    assert answer["usage"]["outputTokens"] == 11
    assert answer["usage"]["totalTokens"] == 23
    assert answer["tool_calls"] == []
    assert answer["response"]["model"] == "claude-parrot-4-5"


def test_a_stream_has_parts_in_order(client: Client) -> None:
    answer = client.ask("stream", "[[thinking Well, well.]] [[tokens 3]]")
    kinds = list(dict.fromkeys(part["type"] for part in answer["parts"]))
    assert kinds == [
        "start",
        "start-step",
        "reasoning-start",
        "reasoning-delta",
        "reasoning-end",
        "text-start",
        "text-delta",
        "text-end",
        "finish-step",
        "finish",
    ]
    assert "".join(told(answer, "reasoning-delta")).strip() == "Well, well."
    assert "".join(told(answer, "text-delta")) == "tok0 tok1 tok2 "
    [end] = of_type(answer, "finish")
    assert end["finishReason"] == "stop"
    assert (end["totalUsage"]["inputTokens"], end["totalUsage"]["outputTokens"]) == (10, 20)


def test_tools_of_the_cli_are_reasoning_between_texts(client: Client) -> None:
    script = '[[text Looking.]] [[tool:Bash {"command": "ls"}]] [[then]] [[text Seen.]]'
    answer = client.ask("stream", script)
    assert "".join(told(answer, "text-delta")) == "Looking.\n\nSeen."
    assert "Bash" in "".join(told(answer, "reasoning-delta"))
    assert of_type(answer, "tool-call") == []
    assert of_type(answer, "error") == []


@pytest.mark.parametrize("how", ["generateObject", "streamObject", "output"])
def test_an_object_has_the_form_of_a_schema(client: Client, how: str) -> None:
    script = f"[[text Let me see.]] [[structured {json.dumps(WEATHER)}]]"
    answer = client.ask("object", script, how=how)
    assert answer["object"] == WEATHER
    assert answer.get("partial", [WEATHER])[-1] == WEATHER


def test_an_object_without_a_schema_is_an_object(client: Client) -> None:
    script = f"[[structured {json.dumps(WEATHER)}]]"
    assert client.ask("object", script, how="no-schema")["object"] == WEATHER


def test_what_the_call_says_reaches_the_model(client: Client) -> None:
    call = {
        "system": "You are a parrot.",
        "temperature": 0.5,
        "stopSequences": ["END"],
        "providerOptions": {
            "proxy": {"reasoningEffort": "low", "claude": {"workspace": "from-ai"}},
        },
    }
    answer = client.ask("generate", "[[echo]]", call=call)
    reached = json.loads(answer["text"])
    assert reached["system_tail"].strip().endswith("You are a parrot.")
    assert reached["output_config"]["effort"] == "low"
    assert answer["metadata"]["claude"]["workspace"] == "from-ai"


def test_images_and_files_reach_the_model(client: Client) -> None:
    content = [
        {"type": "text", "text": "[[echo]]"},
        {"type": "image", "image": PNG},
        {"type": "file", "data": PDF, "mediaType": "application/pdf", "filename": "a.pdf"},
    ]
    call = {"prompt": [{"role": "user", "content": content}]}
    [message] = json.loads(client.ask("generate", "", call=call)["text"])["messages"]
    assert [kind for kind in message["types"] if kind != "text"] == ["image", "document"]


# Errors.

FAILURES = [
    (404, "model_not_found", "[[text hello]]", {"model": "gpt-nothing"}),
    (400, "upstream_invalid_request", "[[error 400]]", {}),
    (429, "rate_limit_exceeded", "[[error 429]]", {}),
    (503, "upstream_overloaded", "[[error 529]]", {}),
]


@pytest.mark.parametrize(("status", "code", "script", "command"), FAILURES)
def test_a_failure_of_a_whole_answer_is_thrown(
    client: Client, status: int, code: str, script: str, command: dict[str, Any]
) -> None:
    error = client.ask("generate", script, **command)["error"]
    assert (error["name"], error["status"]) == ("AI_APICallError", status)
    assert error["data"]["error"]["code"] == code
    assert error["message"] == error["data"]["error"]["message"]
    assert error["retryable"] is (status in {429, 503})


def test_a_failure_before_a_stream_is_an_error_part(client: Client) -> None:
    answer = client.ask("stream", "[[error 529]]")
    [part] = of_type(answer, "error")
    assert part["error"]["status"] == 503
    assert part["error"]["data"]["error"]["code"] == "upstream_overloaded"
    assert answer["errors"] == [part["error"]["message"]]
    assert told(answer, "text-delta") == []


def test_a_failure_in_a_stream_is_an_error_part(client: Client) -> None:
    script = '[[text So far.]] [[tool:Bash {"command": "ls"}]] [[then]] [[error 529]]'
    answer = client.ask("stream", script)
    assert "".join(told(answer, "text-delta")).strip() == "So far."
    [part] = of_type(answer, "error")
    assert part["error"]["code"] == "upstream_overloaded"
    assert answer["errors"] == [part["error"]["message"]]
    assert [end["finishReason"] for end in of_type(answer, "finish")] == ["error"]


# Leaving.


def test_leaving_a_stream_stops_the_turn(client: Client, messages_api: MessagesApi) -> None:
    text = "[[text One.]] [[hang]] ai leaves"
    answer = client.ask("stream", text, leave=True)
    assert told(answer, "text-delta") == ["One."]
    assert len(of_type(answer, "abort")) == 1
    messages_api.wait_for(lambda request: request.aborted, text=text)


def test_aborting_a_whole_answer_stops_the_turn(client: Client, messages_api: MessagesApi) -> None:
    text = "[[text One.]] [[hang]] ai aborts"
    running = client.program.start("generate", **client.command(text), name="to abort")
    messages_api.wait_for(lambda _: True, text=text)
    client.program.ask("abort", name="to abort")
    assert running.result(20)["error"]["name"] == "AbortError"
    messages_api.wait_for(lambda request: request.aborted, text=text)


def test_a_long_silence_is_bridged(client: Client) -> None:
    answer = client.silence.result(60)
    assert of_type(answer, "error") == []
    assert "".join(told(answer, "text-delta")) == "At last."
    assert [end["finishReason"] for end in of_type(answer, "finish")] == ["stop"]
