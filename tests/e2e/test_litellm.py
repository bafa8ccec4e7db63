"""LiteLLM, as a user of it comes to this server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.e2e.chat_frames import Tap
from tests.e2e.claude_cli import Claude
from tests.e2e.daemon import Daemon
from tests.e2e.messages_api import MessagesApi
from tests.e2e.python_clients import import_litellm, only_loopback

pytestmark = pytest.mark.litellm

KEY = "sk-litellm-0123456789abcdef"
BREAKS = '[[text So far.]] [[tool:Bash {"command": "ls"}]] [[then]] '


class LiteLLM(NamedTuple):
    """The library, and a server for it."""

    litellm: Any
    tap: Tap

    def ask(self, text: str, **options: Any) -> Any:
        return self.litellm.completion(**self.request(text, **options))

    def request(self, text: str, **options: Any) -> dict[str, Any]:
        return {
            "model": "openai/claude-code",
            "api_base": f"{self.tap.url}/v1",
            "api_key": KEY,
            "messages": [{"role": "user", "content": text}],
            "num_retries": 0,
            **options,
        }


@pytest.fixture(scope="module")
def served(
    claude_new: Claude, messages_api: MessagesApi, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiteLLM]:
    folder = tmp_path_factory.mktemp("litellm")
    env = {"API_KEY": KEY, "CLAUDE_CODE_MAX_RETRIES": "0"}
    with (
        Daemon(folder, claude_new, messages_api.url, env=env) as daemon,
        Tap(daemon.url) as tap,
        only_loopback() as tried,
    ):
        yield LiteLLM(import_litellm(), tap)
        assert tried == []


@pytest.fixture(autouse=True)
def every_frame_is_right(served: LiteLLM) -> Iterator[None]:
    """Check all that was sent to a test."""
    yield
    served.tap.check()


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_a_completion(served: LiteLLM) -> None:
    script = "[[thinking Well.]] [[text Grüße!]] [[usage in=7 cache-read=5 cache-write=3 out=11]]"
    completion = served.ask(script)
    [choice] = completion.choices
    assert (choice.message.content, choice.finish_reason) == ("Grüße!", "stop")
    assert choice.message.reasoning_content == "Well."
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (15, 11, 26)
    assert usage.prompt_tokens_details.cached_tokens == 5


def test_a_stream(served: LiteLLM) -> None:
    script = "[[thinking Well.]] [[tokens 50]] [[usage in=7 out=11]]"
    chunks = list(served.ask(script, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == "".join(f"tok{number} " for number in range(50))
    assert chunks[0].choices[0].delta.role == "assistant"
    whole = served.litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].message.reasoning_content == "Well."
    assert whole.choices[0].finish_reason == "stop"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (7, 11)


def test_a_wrong_key_is_an_authentication_error(served: LiteLLM) -> None:
    with pytest.raises(served.litellm.AuthenticationError, match="Incorrect API key provided"):
        served.ask("hello", api_key="sk-wrong")


@pytest.mark.parametrize(
    ("error", "text", "options"),
    [
        ("BadRequestError", "hello", {"n": 2}),
        ("NotFoundError", "hello", {"model": "openai/gpt-nowhere"}),
        ("RateLimitError", "[[error 429]]", {}),
        ("ServiceUnavailableError", "[[error 529]]", {}),
    ],
)
def test_an_error_has_its_class(
    served: LiteLLM, error: str, text: str, options: dict[str, Any]
) -> None:
    with pytest.raises(getattr(served.litellm, error)):
        served.ask(text, **options)


def test_an_error_in_a_stream_is_raised(served: LiteLLM) -> None:
    chunks: list[Any] = []
    stream = served.ask(BREAKS + "[[error 500]]", stream=True)
    with pytest.raises(served.litellm.ServiceUnavailableError, match="model provider"):
        chunks.extend(stream)
    assert text_of(chunks) == "So far."


def test_a_schema_is_kept_to(served: LiteLLM) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    script = '[[text Here it is.]] [[structured {"a": 1}]]'
    completion = served.ask(script, response_format=asked)
    assert completion.choices[0].message.content == '{"a":1}'
