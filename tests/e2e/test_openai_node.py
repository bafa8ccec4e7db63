"""`POST /v1/chat/completions` and the models, asked by the openai package for Node.js."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.chat_frames import Tap
from tests.e2e.claude_cli import Claude
from tests.e2e.daemon import Daemon
from tests.e2e.messages_api import MessagesApi
from tests.e2e.node import OPENAI_NODE, NodeProgram

KEY = "sk-node-0123456789abcdef"
# A queue that nobody waits in for long, and a CLI that repeats nothing by itself.
SETTINGS = {
    "API_KEY": KEY,
    "QUEUE_TIMEOUT_MS": "500",
    "CLAUDE_CODE_MAX_RETRIES": "0",
}


class Client:
    """The program, talking to one server."""

    def __init__(self, program: NodeProgram, url: str) -> None:
        self.program = program
        self.url = url
        # Takes longer than all that the server does against silence; other tests run meanwhile.
        self.silence = program.start("stream", **self.command("[[delay 21s]] [[text At last.]]"))

    def ask(self, do: str, text: str = "", **command: Any) -> dict[str, Any]:
        return self.program.ask(do, **self.command(text, **command))

    def command(self, text: str, options: Any = None, **command: Any) -> dict[str, Any]:
        """What a command to say this consists of; a C{body} is added to the request's own."""
        message = {"role": "user", "content": text}
        body = {"model": "claude-code", "messages": [message], **command.pop("body", {})}
        with_key = {"apiKey": KEY, **(options or {})}
        return {"url": self.url, "options": with_key, "body": body, **command}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProgram]:
    folder = tmp_path_factory.mktemp("openai-node")
    with NodeProgram(folder, "openai_node.mjs", OPENAI_NODE) as program:
        yield program


@pytest.fixture(scope="module")
def client(
    program: NodeProgram,
    claude_new: Claude,
    messages_api: MessagesApi,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("daemon")
    with (
        Daemon(folder, claude_new, messages_api.url, env=SETTINGS) as daemon,
        Tap(daemon.url) as tap,
    ):
        yield Client(program, tap.url)


def content_of(chunks: list[dict[str, Any]]) -> str:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


def ends_of(chunks: list[dict[str, Any]]) -> list[str]:
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    return [reason for reason in reasons if reason is not None]


# Answers.


def test_a_whole_answer_is_a_completion(client: Client) -> None:
    text = "[[text Grüße!]] [[usage in=7 cache-read=5 cache-write=3 out=11]]"
    answer = client.ask("create", text, body={"model": "claude-parrot-4-5"})
    completion = answer["completion"]
    assert completion["object"] == "chat.completion"
    assert completion["id"].startswith("chatcmpl-")
    assert completion["model"] == "claude-parrot-4-5"
    [choice] = completion["choices"]
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == "Grüße!"
    usage = completion["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (15, 11)
    assert usage["total_tokens"] == 26
    assert usage["prompt_tokens_details"]["cached_tokens"] == 5
    assert answer["request_id"]


def test_a_stream_is_chunks(client: Client) -> None:
    chunks = client.ask("stream", "[[tokens 5]]")["chunks"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert choices[0]["delta"]["role"] == "assistant"
    assert content_of(chunks) == "tok0 tok1 tok2 tok3 tok4 "
    assert ends_of(chunks) == ["stop"]
    assert all(chunk.get("usage") is None for chunk in chunks)


def test_usage_comes_at_the_end_of_a_stream_that_asks_for_it(client: Client) -> None:
    body = {"stream_options": {"include_usage": True}}
    *chunks, last = client.ask("stream", "[[text hello]]", body=body)["chunks"]
    assert last["choices"] == []
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (10, 20)
    assert all(chunk["usage"] is None for chunk in chunks)


@pytest.mark.parametrize("do", ["create", "stream"])
def test_thinking_is_reasoning_and_no_content(client: Client, do: str) -> None:
    answer = client.ask(do, "[[thinking Well, well.]] [[text It is so.]]")
    if do == "create":
        parts = [answer["completion"]["choices"][0]["message"]]
    else:
        parts = [choice["delta"] for chunk in answer["chunks"] for choice in chunk["choices"]]
    for name, expected in {
        "reasoning_content": "Well, well.",
        "reasoning": "Well, well.",
        "content": "It is so.",
    }.items():
        assert "".join(part.get(name) or "" for part in parts).strip() == expected


def test_the_stream_helper_puts_the_answer_together(client: Client) -> None:
    answer = client.ask("helper", "[[thinking Hm.]] [[tokens 4]]")
    heard = answer["heard"]
    assert "".join(heard["content"]) == "tok0 tok1 tok2 tok3 "
    assert (heard["errors"], heard["ends"]) == (0, 1)
    [choice] = answer["completion"]["choices"]
    assert choice["message"]["content"] == "tok0 tok1 tok2 tok3 "
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_has_the_form_of_a_zod_schema(client: Client, streamed: bool) -> None:
    weather = {"city": "Rome", "degrees": 21.5}
    script = f"[[text Let me see.]] [[structured {json.dumps(weather)}]]"
    answer = client.ask("parse", script, streamed=streamed)
    assert answer["parsed"] == weather
    assert json.loads(answer["content"]) == weather


def test_the_extension_object_goes_through_the_sdk(client: Client) -> None:
    body = {"claude": {"workspace": "from-node"}}
    completion = client.ask("create", "[[text hello]]", body=body)["completion"]
    assert completion["claude"]["workspace"] == "from-node"


def test_the_models_are_listed_and_found(client: Client) -> None:
    models = client.ask("models")["models"]
    assert {model["object"] for model in models} == {"model"}
    assert "claude-code" in [model["id"] for model in models]
    for name in ("claude-code", "claude-parrot-4-5"):
        assert client.ask("model", name=name)["model"]["id"] == name
    error = client.ask("model", name="gpt-nothing")["error"]
    assert (error["is"][0], error["code"]) == ("NotFoundError", "model_not_found")


# Errors.

FAILURES = [
    ("create", {"body": {"n": 2}}, ("BadRequestError", 400, "invalid_value")),
    ("stream", {"body": {"tool_choice": "required"}}, ("BadRequestError", 400, "invalid_value")),
    ("stream", {"options": {"apiKey": "sk-no"}}, ("AuthenticationError", 401, "invalid_api_key")),
    ("stream", {"body": {"model": "gpt-no"}}, ("NotFoundError", 404, "model_not_found")),
    ("create", {"text": "[[error 400]]"}, ("BadRequestError", 400, "upstream_invalid_request")),
    ("stream", {"text": "[[error 429]]"}, ("RateLimitError", 429, "rate_limit_exceeded")),
    ("create", {"text": "[[error 500]]"}, ("InternalServerError", 502, "upstream_error")),
    ("stream", {"text": "[[error 529]]"}, ("InternalServerError", 503, "upstream_overloaded")),
]


@pytest.mark.parametrize(("do", "command", "expected"), FAILURES)
def test_a_failure_has_its_class(
    client: Client, do: str, command: dict[str, Any], expected: tuple[str, int, str]
) -> None:
    error = client.ask(do, **{"text": "[[text hello]]", **command})["error"]
    assert (error["is"][0], error["status"], error["code"]) == expected
    assert "APIError" in error["is"]
    assert error["message"].startswith(f"{error['status']} ")
    assert error["request_id"]


def test_a_refused_field_is_named(client: Client) -> None:
    error = client.ask("create", "[[text hello]]", body={"n": 2})["error"]
    assert (error["param"], error["type"]) == ("n", "invalid_request_error")


def test_a_failure_in_a_stream_is_thrown(client: Client) -> None:
    code = "upstream_overloaded"
    script = '[[text So far.]] [[tool:Bash {"command": "ls"}]] [[then]] [[error 529]]'
    answer = client.ask("stream", script)
    assert content_of(answer["chunks"]).strip() == "So far."
    assert ends_of(answer["chunks"]) == []
    error = answer["error"]
    assert (error["is"][0], error["code"]) == ("APIError", code)
    assert error["message"]
    assert error["type"]
    assert client.ask("helper", script)["error"]["code"] == code


def test_a_session_that_is_busy_is_a_conflict(client: Client, messages_api: MessagesApi) -> None:
    first = client.ask("create", "[[text hello]]")["completion"]
    body = {"claude": {"session-id": first["claude"]["session_id"]}}
    text = "[[hold node-busy]] node busy"
    running = client.program.start("create", **client.command(text, body=body))
    messages_api.wait_for(lambda _: True, text=text)
    error = client.ask("create", "[[text me too]]", body=body)["error"]
    assert (error["is"][0], error["status"], error["code"]) == (
        "ConflictError",
        409,
        "session_busy",
    )
    messages_api.release("node-busy")
    assert "completion" in running.result(20)


def test_a_client_that_cannot_wait_times_out(client: Client) -> None:
    error = client.ask("create", "[[hang]]", options={"timeout": 500})["error"]
    assert error["is"][:2] == ["APIConnectionTimeoutError", "APIConnectionError"]


# Leaving.


@pytest.mark.parametrize("how", ["signal", "controller", "break"])
def test_leaving_a_stream_stops_the_turn(
    client: Client, messages_api: MessagesApi, how: str
) -> None:
    text = f"[[text One.]] [[hang]] node leaves by {how}"
    assert client.ask("leave", text, how=how)["text"] == "One."
    messages_api.wait_for(lambda request: request.aborted, text=text)


def test_aborting_a_whole_answer_stops_the_turn(client: Client, messages_api: MessagesApi) -> None:
    text = "[[text One.]] [[hang]] node aborts"
    running = client.program.start("create", **client.command(text), name="to abort")
    messages_api.wait_for(lambda _: True, text=text)
    client.program.ask("abort", name="to abort")
    assert running.result(20)["error"]["is"][0] == "APIUserAbortError"
    messages_api.wait_for(lambda request: request.aborted, text=text)


def test_a_long_silence_is_bridged(client: Client) -> None:
    answer = client.silence.result(60)
    assert "error" not in answer
    assert content_of(answer["chunks"]) == "At last."
    assert ends_of(answer["chunks"]) == ["stop"]
    assert answer["chunks"][0]["choices"][0]["delta"]["role"] == "assistant"
