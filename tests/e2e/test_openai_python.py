"""`POST /v1/chat/completions` and the models, asked by the openai package for Python."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.e2e.answers import big_text
from tests.e2e.chat_frames import Tap
from tests.e2e.claude_cli import Claude
from tests.e2e.daemon import Daemon, processes_with_env, wait_until
from tests.e2e.messages_api import MessagesApi
from tests.e2e.server import Server, StartServer

KEY = "sk-python-0123456789abcdef"
# A queue in which nobody waits for long, and a CLI that repeats nothing by itself.
SETTINGS = {
    "API_KEY": KEY,
    "QUEUE_TIMEOUT_MS": "500",
    "MAX_BODY_BYTES": "1000000",
    "MODEL_ALIASES": "gpt-4o=claude-parrot-4-5",
    "CLAUDE_CODE_MAX_RETRIES": "0",
}
TOOL = '[[tool:Bash {"command": "ls"}]] [[then]]'
SILENCE = "[[delay 23s]] [[text At last.]]"
BREAKS = f"[[text So far.]] {TOOL}"

PNG = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\2\0\0\0\x90wS\xde"
    b"\0\0\0\x0cIDAT\x08\xd7c\xf8\xcf\xc0\0\0\3\1\1\0\x18\xdd\x8d\xb0\0\0\0\0IEND\xaeB`\x82"
)
PDF = b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n%%EOF\n"


class Weather(BaseModel):
    """The weather in one place."""

    city: str
    degrees: float


@dataclass(frozen=True)
class Served:
    """A daemon, and clients for it."""

    daemon: Daemon
    tap: Tap

    def client(self, **options: Any) -> OpenAI:
        usual = {"base_url": f"{self.tap.url}/v1", "api_key": KEY, "max_retries": 0}
        return OpenAI(**{**usual, **options})

    @asynccontextmanager
    async def async_client(self, **options: Any) -> AsyncIterator[AsyncOpenAI]:
        usual = {"base_url": f"{self.tap.url}/v1", "api_key": KEY, "max_retries": 0}
        async with AsyncOpenAI(**{**usual, **options}) as client:
            yield client


@pytest.fixture(scope="module")
def served(
    claude_new: Claude, messages_api: MessagesApi, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("openai-python")
    with (
        Daemon(folder, claude_new, messages_api.url, env=SETTINGS) as daemon,
        Tap(daemon.url) as tap,
    ):
        yield Served(daemon, tap)


@pytest.fixture(autouse=True)
def every_frame_is_right(served: Served) -> Iterator[None]:
    """Check all that was sent to a test."""
    yield
    served.tap.check()


@pytest.fixture(scope="module", autouse=True)
def silence(served: Served) -> Future[list[Any]]:
    """
    The chunks of a stream in which nothing is said for long; other tests run meanwhile.

    That is longer than the head is held back and a sign of life is due, together.
    """
    chunks: Future[list[Any]] = Future()

    def collect() -> None:
        try:
            with served.client() as client:
                chunks.set_result(list(create(client, SILENCE, stream=True)))
        except openai.OpenAIError as error:
            chunks.set_exception(error)

    threading.Thread(target=collect, daemon=True).start()
    return chunks


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with served.client() as client:
        yield client


def asked(content: Any, **fields: Any) -> dict[str, Any]:
    """The arguments of a request that says only this."""
    return {"model": "claude-code", "messages": [{"role": "user", "content": content}], **fields}


def create(client: OpenAI, content: Any, **fields: Any) -> Any:
    return client.chat.completions.create(**asked(content, **fields))


def text_of(chunks: list[Any]) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return "".join(choice.delta.content or "" for choice in choices)


def reasoning_of(chunks: list[Any], name: str = "reasoning_content") -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return "".join(getattr(choice.delta, name, None) or "" for choice in choices)


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


# Whole answers.


def test_a_whole_answer(client: OpenAI) -> None:
    script = "[[thinking Well.]] [[text Grüße!]] [[usage in=7 cache-read=5 cache-write=3 out=11]]"
    completion = create(client, script, model="claude-parrot-4-5")
    assert completion.id.startswith("chatcmpl-")
    assert completion.model == "claude-parrot-4-5"
    [choice] = completion.choices
    assert (choice.message.content, choice.finish_reason) == ("Grüße!", "stop")
    assert choice.message.reasoning_content == choice.message.reasoning == "Well."
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (15, 11, 26)
    assert usage.prompt_tokens_details.cached_tokens == 5


def test_an_answer_with_its_head(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        **asked("[[text hello]]"), extra_headers={"X-Request-Id": "python-mine"}
    )
    assert raw.headers["x-request-id"] == raw.request_id == "python-mine"
    completion: Any = raw.parse()
    assert completion.claude["session_id"] == raw.headers["x-claude-session-id"]
    assert completion.claude["num_turns"] == 1
    assert completion.claude["cost_usd"] > 0
    with client.chat.completions.with_streaming_response.create(
        **asked("[[text hello]]", stream=True)
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"] == "text/event-stream"
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"


def test_a_long_answer_arrives_whole(client: OpenAI) -> None:
    chunks = list(create(client, "[[big 300000]]", stream=True))
    assert text_of(chunks) == big_text(300_000)


def test_no_character_breaks_a_stream(client: OpenAI) -> None:
    text = "a\u2028b\u2029c\u0085d\r\n\r\ndata: {}\n\n\x00\x1b😀 data: [DONE]"
    assert text_of(list(create(client, f"[[text {json.dumps(text)}]]", stream=True))) == text


# Streams.


def test_a_stream(client: OpenAI) -> None:
    script = "[[thinking Well.]] [[tokens 50]] [[usage in=7 cache-read=5 out=11]]"
    chunks = list(create(client, script, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == "".join(f"tok{number} " for number in range(50))
    assert reasoning_of(chunks) == reasoning_of(chunks, "reasoning") == "Well."
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (12, 11)


def test_text_comes_when_it_is_written(client: OpenAI, messages_api: MessagesApi) -> None:
    name = f"python-{uuid4()}"
    stream = create(client, f"[[tokens 2]] [[wait {name}]] [[text end]]", stream=True)
    chunks: list[Any] = []
    for chunk in stream:
        chunks.append(chunk)
        if "tok1" in text_of(chunks):
            break
    assert text_of(chunks) == "tok0 tok1 "
    messages_api.release(name)
    chunks = list(stream)
    assert text_of(chunks) == "end"
    # Only those who ask are told the usage.
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_the_stream_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(**asked("[[thinking Well.]] [[tokens 4]]")) as stream:
        events = list(stream)
        completion = stream.get_final_completion()
    deltas = [event.delta for event in events if event.type == "content.delta"]
    assert "".join(deltas) == "tok0 tok1 tok2 tok3 "
    assert completion.choices[0].message.content == "tok0 tok1 tok2 tok3 "
    assert completion.choices[0].finish_reason == "stop"


def test_what_a_tool_does_is_reasoning(client: OpenAI) -> None:
    script = f"[[text Looking.]] {TOOL} [[text Seen.]]"
    chunks = list(create(client, script, stream=True))
    assert text_of(chunks) == "Looking.\n\nSeen."
    assert 'Bash {"command":"ls"}' in reasoning_of(chunks)
    assert "Tool result: " in reasoning_of(chunks)
    assert all(choice.delta.tool_calls is None for chunk in chunks for choice in chunk.choices)


def test_what_a_sub_agent_says_is_no_answer(client: OpenAI) -> None:
    script = "[[subagent [[text Sub says.]]]] [[then]] [[text Main says.]]"
    chunks = list(create(client, script, stream=True))
    assert text_of(chunks) == "Main says."


def test_a_stream_of_the_provider_that_breaks_is_told_once(client: OpenAI) -> None:
    chunks = list(create(client, "[[tokens 20]] [[cut]]", stream=True))
    assert text_of(chunks) == "".join(f"tok{number} " for number in range(20))
    assert chunks[-1].choices[0].finish_reason == "stop"


# Coroutines.


def test_answers_for_coroutines(served: Served) -> None:
    async def collect() -> list[str]:
        async with served.async_client() as client:
            whole = client.chat.completions.create(**asked("[[text whole]]"))
            stream = client.chat.completions.create(**asked("[[tokens 3]]", stream=True))
            completion, chunks = await asyncio.gather(whole, stream)
            streamed = text_of([chunk async for chunk in chunks])
            async with client.chat.completions.stream(**asked("[[text helped]]")) as helper:
                helped = await helper.get_final_completion()
            return [
                completion.choices[0].message.content,
                streamed,
                str(helped.choices[0].message.content),
            ]

    assert asyncio.run(collect()) == ["whole", "tok0 tok1 tok2 ", "helped"]


# Forms.


def test_an_answer_in_the_form_of_a_model(client: OpenAI) -> None:
    script = '[[text Here it is.]] [[structured {"city": "Ulm", "degrees": 21.5}]]'
    completion: Any = client.chat.completions.parse(**asked(script), response_format=Weather)
    message = completion.choices[0].message
    assert message.parsed == Weather(city="Ulm", degrees=21.5)
    assert json.loads(message.content) == {"city": "Ulm", "degrees": 21.5}
    with client.chat.completions.stream(**asked(script), response_format=Weather) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.parsed == Weather(city="Ulm", degrees=21.5)
    assert streamed.content == message.content


def test_an_answer_is_a_json_object(client: OpenAI) -> None:
    asks = {"response_format": {"type": "json_object"}}
    content = create(client, '[[structured {"a": [1]}]]', **asks).choices[0].message.content
    assert json.loads(content) == {"a": [1]}


def test_an_answer_that_never_fits_is_a_failure(client: OpenAI) -> None:
    script = " [[then]] ".join(['[[structured {"city": 1}]]'] * 10)
    with pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.parse(**asked(script), response_format=Weather)
    assert raised.value.code in ("upstream_error", "cli_failed")


# What reaches the model.


def test_the_fields_of_a_request_reach_the_model(client: OpenAI, messages_api: MessagesApi) -> None:
    text = "python fields"
    client.chat.completions.create(
        model="gpt-4o",
        messages=[
            {"role": "system", "content": "You are a parrot."},
            {"role": "developer", "content": "Speak Latin."},
            {"role": "user", "content": text},
        ],
        reasoning_effort="low",
        max_completion_tokens=4321,
        temperature=0.3,
        stop=["never"],
        seed=1,
        user="somebody",
        metadata={"a": "b"},
        tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
    )
    [request] = messages_api.turns(text)
    told = request.conversation.summary()
    assert told["model"] == "claude-parrot-4-5"
    assert told["max_tokens"] == 4321
    assert told["output_config"]["effort"] == "low"
    assert told["system_tail"].endswith("You are a parrot.\n\nSpeak Latin.")
    assert "f" not in told["tools"]


def test_fields_without_effect_are_named_in_the_log(served: Served, client: OpenAI) -> None:
    headers = {"X-Request-Id": f"python-{uuid4()}"}
    create(client, "[[text hello]]", temperature=0.3, logit_bias={"1": 2}, extra_headers=headers)
    record = served.daemon.wait_for_record("fields_ignored", request_id=headers["X-Request-Id"])
    assert sorted(record["fields"]) == ["logit_bias", "temperature"]


def test_images_and_files_reach_the_model(client: OpenAI, messages_api: MessagesApi) -> None:
    url = "https://example.invalid/parrot.png"
    content = [
        {"type": "text", "text": "python images"},
        {"type": "image_url", "image_url": {"url": data_url("image/png", PNG)}},
        {"type": "image_url", "image_url": {"url": url}},
        {
            "type": "file",
            "file": {"filename": "a.pdf", "file_data": data_url("application/pdf", PDF)},
        },
        {"type": "text", "text": "[[text seen]]"},
    ]
    assert create(client, content).choices[0].message.content == "seen"
    [request] = messages_api.turns("python images")
    messages = request.conversation.messages
    blocks = [block for message in messages for block in message["content"] if "source" in block]
    sources = [block["source"] for block in blocks]
    assert [block["type"] for block in blocks] == ["image", "image", "document"]
    assert [source["type"] for source in sources] == ["base64", "url", "base64"]
    assert base64.b64decode(sources[0]["data"]) == PNG
    assert sources[1]["url"] == url
    assert base64.b64decode(sources[2]["data"]) == PDF


def test_an_extension_object_says_how_a_turn_is_run(served: Served, client: OpenAI) -> None:
    script = '[[tool:Bash {"command": "echo made > made"}]] [[then]] [[text done]]'
    claude = {"workspace": "python", "allowed-tools": ["Bash"]}
    completion = create(client, script, extra_body={"claude": claude})
    assert completion.claude["workspace"] == "python"
    assert (served.daemon.base / "workspace" / "python" / "made").read_text() == "made\n"


def test_text_is_text(server: Server, messages_api: MessagesApi) -> None:
    workspace = server.daemon.base / "workspace" / "text-is-text"
    workspace.mkdir(parents=True)
    (workspace / "note.txt").write_text("the note says forty-two")
    name = str(uuid4())
    script = f"@note.txt {name} /cost [[text read as text]]"
    with (
        Tap(server.daemon.url) as tap,
        OpenAI(base_url=f"{tap.url}/v1", api_key="any", max_retries=0) as client,
    ):
        claude = {"workspace": workspace.name}
        for text in (script, f"/cost {script}"):
            completion = create(client, text, extra_body={"claude": claude})
            assert completion.choices[0].message.content == "read as text"
    requests = messages_api.turns(name)
    assert len(requests) == 2
    assert "forty-two" not in json.dumps([request.body for request in requests])


def test_an_old_cli_serves_openai_clients_too(old_server: Server) -> None:
    with (
        Tap(old_server.daemon.url) as tap,
        OpenAI(base_url=f"{tap.url}/v1", api_key="any", max_retries=0) as client,
    ):
        chunks = list(create(client, f"[[text Looking.]] {TOOL} [[text Seen.]]", stream=True))
        assert text_of(chunks) == "Looking.\n\nSeen."
        asks = {"response_format": {"type": "json_object"}}
        content = create(client, '[[text ```json\n{"a": 2}\n```]]', **asks)
        assert content.choices[0].message.content == '{"a": 2}'
        image = {"type": "image_url", "image_url": {"url": data_url("image/png", PNG)}}
        with pytest.raises(openai.BadRequestError, match=r"1\.0\.24"):
            create(client, [{"type": "text", "text": "Look."}, image])


# How it ends.


@pytest.mark.parametrize(
    ("script", "reason", "error"),
    [
        (
            " [[then]] ".join(["[[text On and on.]] [[stop max_tokens]]"] * 4),
            "length",
            openai.LengthFinishReasonError,
        ),
        (
            "[[text I would]] [[stop refusal]]",
            "content_filter",
            openai.ContentFilterFinishReasonError,
        ),
    ],
)
def test_an_answer_that_is_cut_short_says_so(
    client: OpenAI, script: str, reason: str, error: type[openai.OpenAIError]
) -> None:
    assert create(client, script).choices[0].finish_reason == reason
    with client.chat.completions.stream(**asked(script)) as stream, pytest.raises(error):
        stream.get_final_completion()


# Models.


def test_the_models_are_listed_and_found(client: OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names[:2] == ["claude-code", "gpt-4o"]
    assert "haiku" in names
    for name in ("claude-code", "gpt-4o", "claude-parrot-4-5"):
        assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError, match="MODEL_ALIASES"):
        client.models.retrieve("gpt-nowhere")


# Errors.

FAILURES = [
    ("hello", {"n": 2}, "BadRequestError 400 invalid_value"),
    ("hello", {"stream": True, "tool_choice": "required"}, "BadRequestError 400 invalid_value"),
    ("hello", {"logprobs": True}, "BadRequestError 400 invalid_value"),
    ("", {"stream": True}, "BadRequestError 400 invalid_value"),
    ("hello", {"model": "gpt-nowhere"}, "NotFoundError 404 model_not_found"),
    ("[[error 404]]", {"stream": True}, "NotFoundError 404 model_not_found"),
    ("[[error 400]]", {}, "BadRequestError 400 upstream_invalid_request"),
    ("[[error 429]]", {"stream": True}, "RateLimitError 429 rate_limit_exceeded"),
    ("[[error 529]]", {"stream": True}, "InternalServerError 503 upstream_overloaded"),
    ("x" * 1_000_000, {}, "APIStatusError 413 request_too_large"),
]


@pytest.mark.parametrize(("text", "fields", "expected"), FAILURES)
def test_a_failure_has_its_class(
    client: OpenAI, text: str, fields: dict[str, Any], expected: str
) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        create(client, text, **fields)
    error = raised.value
    assert f"{type(error).__name__} {error.status_code} {error.code}" == expected
    assert error.request_id


def test_a_refused_field_is_named(client: OpenAI) -> None:
    for field, value in {"n": 2, "logprobs": True, "claude": {"allowed_tools": []}}.items():
        with pytest.raises(openai.BadRequestError) as raised:
            create(client, "hello", extra_body={field: value})
        assert str(raised.value.param).startswith(field)


def test_a_wrong_key_is_an_authentication_error(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key") as raised:
        create(served.client(api_key="sk-wrong"), "hello")
    assert raised.value.code == "invalid_api_key"


def test_another_path_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions") as raised:
        client.responses.create(model="claude-code", input="hello")
    assert raised.value.code == "not_found"


def test_a_page_of_a_browser_is_denied(new_server: Server) -> None:
    client = OpenAI(base_url=f"{new_server.daemon.url}/v1", api_key="any", max_retries=0)
    with pytest.raises(openai.PermissionDeniedError) as raised:
        create(client, "hello", extra_headers={"Origin": "https://page.invalid"})
    assert raised.value.code == "origin_not_allowed"


def test_an_error_in_a_stream_is_raised(client: OpenAI) -> None:
    chunks: list[Any] = []
    stream = create(client, f"{BREAKS} [[error 429]]", stream=True)
    with pytest.raises(openai.APIError) as raised:
        chunks.extend(stream)
    assert raised.value.code == "rate_limit_exceeded"
    assert text_of(chunks) == "So far."
    assert all(choice.finish_reason is None for chunk in chunks for choice in chunk.choices)


def test_an_error_in_a_stream_is_raised_in_helpers_and_coroutines(served: Served) -> None:
    script = f"{BREAKS} [[error 529]]"
    with (
        served.client() as client,
        client.chat.completions.stream(**asked(script)) as stream,
        pytest.raises(openai.APIError, match="overloaded"),
    ):
        stream.until_done()

    async def collect() -> None:
        async with served.async_client() as client:
            async for _ in await client.chat.completions.create(**asked(script, stream=True)):
                pass

    with pytest.raises(openai.APIError, match="overloaded"):
        asyncio.run(collect())


def test_a_server_that_is_killed_is_noticed(
    claude_new: Claude, start_server: StartServer, messages_api: MessagesApi
) -> None:
    daemon = start_server(claude_new).daemon
    with OpenAI(base_url=f"{daemon.url}/v1", api_key="any", max_retries=0) as client:
        stream = create(client, "[[tokens 2]] [[hang]]", stream=True)
        next(chunk for chunk in stream if text_of([chunk]))
        daemon.kill()
        # Which one it is depends on the package's version; what counts is that there is one.
        with pytest.raises(Exception, match=r"(?i)connection|peer closed|incomplete"):
            list(stream)
        with pytest.raises(openai.APIConnectionError):
            create(client, "hello")
    # What it has left is ended by the next one.
    again = start_server(claude_new).daemon
    wait_until(lambda: processes_with_env(str(daemon.folder)) == [again.pid], "the CLI has ended")


# Trying again.


def test_what_may_pass_is_tried_again(served: Served, messages_api: MessagesApi) -> None:
    name = str(uuid4())
    with served.client(max_retries=1) as client, pytest.raises(openai.InternalServerError):
        create(client, f"{name} [[error 529]]")
    assert len(messages_api.turns(name)) == 2


def test_what_cannot_pass_is_not_tried_again(served: Served, messages_api: MessagesApi) -> None:
    name = str(uuid4())
    with served.client(max_retries=2) as client, pytest.raises(openai.BadRequestError):
        create(client, f"{name} [[error 400]]")
    assert len(messages_api.turns(name)) == 1


def test_a_session_that_is_busy_is_a_conflict_until_it_is_not(
    served: Served, client: OpenAI, messages_api: MessagesApi
) -> None:
    session = create(client, "[[text hello]]").claude["session_id"]
    same = {"extra_body": {"claude": {"session-id": session}}}
    name = str(uuid4())
    with ThreadPoolExecutor() as pool, served.client(max_retries=5) as patient:
        running = pool.submit(create, client, f"[[hold {name}]] [[text first]]", **same)
        messages_api.wait_for(lambda _: True, text=name)
        with pytest.raises(openai.ConflictError) as raised:
            create(client, "[[text me too]]", **same)
        assert raised.value.code == "session_busy"
        trying = pool.submit(create, patient, "[[text then me]]", **same)
        # Its first try is over when the second one begins.
        asks = lambda: served.daemon.records("request", session_id=session)  # noqa: E731
        wait_until(lambda: len(asks()) >= 4, "it is tried again")
        messages_api.release(name)
        assert running.result().choices[0].message.content == "first"
        assert trying.result().choices[0].message.content == "then me"


# Leaving.


def test_a_client_that_waits_no_longer_stops_the_turn(
    served: Served, client: OpenAI, messages_api: MessagesApi
) -> None:
    name = str(uuid4())
    # Its process is there already, so that the model is asked within the time on any machine.
    session = create(client, "[[text hello]]").claude["session_id"]
    same = {"extra_body": {"claude": {"session-id": session}}}
    with served.client(timeout=1.5) as hasty, pytest.raises(openai.APITimeoutError):
        create(hasty, f"{name} [[hang]]", **same)
    messages_api.wait_for(lambda request: request.aborted, text=name)


def test_leaving_a_stream_stops_the_turn(served: Served, messages_api: MessagesApi) -> None:
    name = str(uuid4())
    headers = {"X-Request-Id": f"python-{name}"}
    with (
        served.client() as client,
        create(client, f"{name} [[tokens 2]] [[hang]]", stream=True, extra_headers=headers) as s,
    ):
        next(chunk for chunk in s if text_of([chunk]))
    messages_api.wait_for(lambda request: request.aborted, text=name)
    ended = served.daemon.wait_for_record("turn_end", request_id=headers["X-Request-Id"])
    assert ended["outcome"] == "abandoned"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_task_that_is_cancelled_stops_the_turn(
    served: Served, messages_api: MessagesApi, streamed: bool
) -> None:
    name = str(uuid4())

    async def ask() -> None:
        async with served.async_client() as client:
            script = f"{name} [[tokens 2]] [[hang]]"
            answer: Any = await client.chat.completions.create(**asked(script, stream=streamed))
            async for _ in answer:
                pass

    async def cancel() -> None:
        task = asyncio.create_task(ask())
        await asyncio.to_thread(messages_api.wait_for, lambda r: r.status == 200, text=name)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    messages_api.wait_for(lambda request: request.aborted, text=name)


def test_a_long_silence_is_bridged(silence: Future[list[Any]]) -> None:
    chunks = silence.result(60)
    first = next(number for number, chunk in enumerate(chunks) if text_of([chunk]))
    bridge = [chunk.choices[0].delta.model_dump(exclude_unset=True) for chunk in chunks[:first]]
    assert bridge == [{"role": "assistant", "content": ""}, {}]
    assert text_of(chunks) == "At last."
    assert chunks[-1].choices[0].finish_reason == "stop"
