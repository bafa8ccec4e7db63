"""langchain-openai, as a user of it comes to this server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from tests.e2e.chat_frames import Tap
from tests.e2e.claude_cli import Claude
from tests.e2e.daemon import Daemon
from tests.e2e.messages_api import MessagesApi
from tests.e2e.python_clients import only_loopback

KEY = "sk-langchain-0123456789abcdef"
BREAKS = '[[text So far.]] [[tool:Bash {"command": "ls"}]] [[then]] '

Model = Callable[..., Any]
"""Makes chat models; the options are those of ChatOpenAI."""


class Weather(BaseModel):
    """The weather in one place."""

    city: str
    degrees: float


@pytest.fixture(scope="module")
def model(
    claude_new: Claude, messages_api: MessagesApi, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    """Chat models of the module's one server."""
    folder = tmp_path_factory.mktemp("langchain")
    env = {"API_KEY": KEY, "CLAUDE_CODE_MAX_RETRIES": "0"}
    with (
        Daemon(folder, claude_new, messages_api.url, env=env) as daemon,
        Tap(daemon.url) as tap,
        only_loopback() as tried,
    ):

        def make(**options: Any) -> ChatOpenAI:
            usual = {"base_url": f"{tap.url}/v1", "api_key": KEY, "model": "claude-code"}
            return ChatOpenAI(**{**usual, "max_retries": 0, **options})

        yield make
        tap.check()
        assert tried == []


def test_a_message_is_answered(model: Model) -> None:
    script = "[[text Grüße!]] [[usage in=7 cache-read=5 cache-write=3 out=11]]"
    message = model(temperature=0.2).invoke(script)
    assert message.content == "Grüße!"
    assert message.response_metadata["finish_reason"] == "stop"
    assert message.tool_calls == []
    used = message.usage_metadata
    assert (used["input_tokens"], used["output_tokens"], used["total_tokens"]) == (15, 11, 26)
    assert used["input_token_details"]["cache_read"] == 5


def test_roles_are_kept(model: Model, messages_api: MessagesApi) -> None:
    said = [
        SystemMessage("You are a parrot."),
        HumanMessage("langchain roles"),
        AIMessage("Which ones?"),
        HumanMessage("All of them."),
    ]
    assert model().invoke(said).content == "You said: All of them."
    [request] = messages_api.turns("langchain roles")
    assert request.conversation.system.endswith("You are a parrot.")
    told = request.conversation.summary()["messages"]
    assert [(message["role"], message["texts"]) for message in told] == [
        ("user", ["langchain roles"]),
        ("assistant", ["Which ones?"]),
        ("user", ["All of them."]),
    ]


def test_an_answer_is_streamed(model: Model) -> None:
    script = "[[thinking Well.]] [[tokens 50]] [[usage in=7 out=11]]"
    chunks = list(model(stream_usage=True).stream(script))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.content == "".join(f"tok{number} " for number in range(50))
    assert whole.response_metadata["finish_reason"] == "stop"
    assert (whole.usage_metadata["input_tokens"], whole.usage_metadata["output_tokens"]) == (7, 11)


def test_an_answer_is_streamed_to_a_coroutine(model: Model) -> None:
    async def collect() -> str:
        return "".join([str(chunk.content) async for chunk in model().astream("[[tokens 5]]")])

    assert asyncio.run(collect()) == "tok0 tok1 tok2 tok3 tok4 "


def test_an_answer_has_the_form_of_a_model(model: Model) -> None:
    script = '[[text Here it is.]] [[structured {"city": "Ulm", "degrees": 21.5}]]'
    structured = model().with_structured_output(Weather, method="json_schema")
    assert structured.invoke(script) == Weather(city="Ulm", degrees=21.5)


def test_an_answer_is_json(model: Model) -> None:
    structured = model().with_structured_output(Weather, method="json_mode")
    script = '[[structured {"city": "Ulm", "degrees": 21.5}]]'
    assert structured.invoke(script) == Weather(city="Ulm", degrees=21.5)


def test_tools_of_the_client_that_must_be_called_are_refused(model: Model) -> None:
    structured = model().with_structured_output(Weather, method="function_calling")
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        structured.invoke("[[text never asked langchain tools]]")


def test_an_error_is_that_of_the_openai_package(model: Model) -> None:
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key provided"):
        model(api_key="sk-wrong").invoke("hello")
    with pytest.raises(openai.RateLimitError):
        model().invoke("[[error 429]]")


def test_an_error_in_a_stream_is_raised(model: Model) -> None:
    chunks: list[Any] = []
    with pytest.raises(openai.APIError, match="model provider"):
        chunks.extend(model().stream(BREAKS + "[[error 500]]"))
    assert "".join(chunk.content for chunk in chunks) == "So far."
