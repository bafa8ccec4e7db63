"""
Clients in Python, as their users use them.

Each holds conversations in the form that its library has for them, and tries nothing twice, so that
no failure stays hidden.
"""

from __future__ import annotations

import copy
import importlib
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_openai import ChatOpenAI
from openai import OpenAI

__all__ = ["PYTHON_CLIENTS", "LangChainClient", "LiteLLMClient", "OpenAIClient", "only_loopback"]

MODEL = "claude-code"


class Answered(NamedTuple):
    """
    What came back.

    @ivar message: in the library's own form, as it goes into the conversation.
    """

    text: str
    session: str
    message: Any


class PythonClient(ABC):
    """A client that holds conversations, see L{tests.e2e.talks.Client}."""

    def __init__(self) -> None:
        self._talks: dict[str, list[Any]] = {}

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        """Do what is asked: C{say}, C{copy}, C{edit} or C{cut}."""
        commands: Mapping[str, Callable[..., dict[str, Any]]] = {
            "say": self._say,
            "copy": self._copy,
            "edit": self._edit,
            "cut": self._cut,
        }
        return commands[do](**command)

    @abstractmethod
    def user(self, content: Any) -> Any:
        """A message of the user."""

    @abstractmethod
    def complete(
        self, url: str, key: str, headers: Mapping[str, str], messages: list[Any], *, streamed: bool
    ) -> Answered:
        """Send a conversation and wait for the answer."""

    def _say(
        self,
        url: str,
        key: str,
        headers: Mapping[str, str],
        talk: str,
        *,
        text: Any,
        streamed: bool,
    ) -> dict[str, Any]:
        messages = [*self._talks.get(talk, []), self.user(text)]
        answer = self.complete(url, key, headers, messages, streamed=streamed)
        self._talks[talk] = [*messages, answer.message]
        return {"text": answer.text, "session": answer.session}

    def _copy(self, talk: str, to: str) -> dict[str, Any]:
        self._talks[to] = copy.deepcopy(self._talks[talk])
        return {}

    def _edit(self, talk: str, at: int, text: str) -> dict[str, Any]:
        self._talks[talk][at] = self.user(text)
        return {}

    def _cut(self, talk: str, at: int) -> dict[str, Any]:
        del self._talks[talk][at:]
        return {}


class OpenAIClient(PythonClient):
    """The openai package."""

    def user(self, content: Any) -> Any:
        return {"role": "user", "content": content}

    def complete(
        self, url: str, key: str, headers: Mapping[str, str], messages: list[Any], *, streamed: bool
    ) -> Answered:
        options: Any = {"default_headers": headers, "max_retries": 0}
        with OpenAI(base_url=f"{url}/v1", api_key=key, **options) as client:
            completions = client.chat.completions
            if streamed:
                chunks: Any = list(completions.create(model=MODEL, messages=messages, stream=True))
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                message: Any = {"role": "assistant", "content": text}
                return Answered(text, chunks[-1].claude["session_id"], message)
            completion: Any = completions.create(model=MODEL, messages=messages)
        message = completion.choices[0].message
        return Answered(message.content, completion.claude["session_id"], message)


class LangChainClient(PythonClient):
    """langchain-openai."""

    def user(self, content: Any) -> Any:
        return HumanMessage(content)

    def complete(
        self, url: str, key: str, headers: Mapping[str, str], messages: list[Any], *, streamed: bool
    ) -> Answered:
        model = ChatOpenAI(
            base_url=f"{url}/v1",
            api_key=key,
            model=MODEL,
            default_headers=headers,
            include_response_headers=True,
            max_retries=0,
        )
        message: Any
        if streamed:
            message = AIMessageChunk("")
            for chunk in model.stream(messages):
                message += chunk
        else:
            message = model.invoke(messages)
        session = message.response_metadata["headers"]["x-claude-session-id"]
        return Answered(message.content, session, message)


class LiteLLMClient(PythonClient):
    """LiteLLM."""

    def __init__(self) -> None:
        super().__init__()
        self.litellm = import_litellm()

    def user(self, content: Any) -> Any:
        return {"role": "user", "content": content}

    def complete(
        self, url: str, key: str, headers: Mapping[str, str], messages: list[Any], *, streamed: bool
    ) -> Answered:
        completion = self.litellm.completion(
            model=f"openai/{MODEL}",
            api_base=f"{url}/v1",
            api_key=key,
            extra_headers=dict(headers),
            messages=messages,
            stream=streamed,
            max_retries=0,
        )
        told = completion._hidden_params["additional_headers"]
        if streamed:
            completion = self.litellm.stream_chunk_builder(list(completion))
        message = completion.choices[0].message
        return Answered(message.content, told["llm_provider-x-claude-session-id"], message)


PYTHON_CLIENTS: Mapping[str, Callable[[], PythonClient]] = {
    "openai_python": OpenAIClient,
    "langchain": LangChainClient,
    "litellm": LiteLLMClient,
}


def import_litellm() -> Any:
    """Import LiteLLM without what it does then: fetch a list of prices from the Internet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        litellm: Any = importlib.import_module("litellm")
    litellm.telemetry = False
    litellm.suppress_debug_info = True
    return litellm


@contextmanager
def only_loopback() -> Iterator[list[object]]:
    """Let this process reach nothing but its own machine; gives the addresses that it tried."""
    tried: list[object] = []
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
            tried.append(address)
            raise ConnectionRefusedError(address)
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield tried
