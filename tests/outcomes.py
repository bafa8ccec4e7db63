"""
What clients are told at the end of a turn, in the words of docs/outcomes.md.

That page is the expectation: the tests of its rows read it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import openai

from tests.e2e.chat_frames import check_stream

__all__ = ["FORMS", "Form", "check", "documented"]

_PAGE = Path(__file__).resolve().parent.parent / "docs" / "outcomes.md"
_WORDS = re.compile(r"\b\d{3}\b|Retry-After|(?<=`)[a-z_]+(?=`)")
_SECONDS = 30.0

Json = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """
    One of the four forms of an answer.

    @ivar is_chat: the OpenAI dialect's.
    """

    is_chat: bool
    stream: bool

    def __str__(self) -> str:
        return f"{'OpenAI' if self.is_chat else 'native'}, {'stream' if self.stream else 'whole'}"

    def ask(
        self,
        url: str,
        prompt: str,
        native: Mapping[str, Any],
        chat: Mapping[str, Any],
        *,
        seconds: float = _SECONDS,
    ) -> httpx.Response:
        """
        Run a turn on the server there.

        @param native: fields of the request in the native dialect.
        @param chat: fields of the request in the OpenAI dialect.
        @param seconds: of silence, after which this client leaves.
        """
        body = {"prompt": prompt, **native}
        if self.is_chat:
            body = {"messages": [{"role": "user", "content": prompt}], **chat}
        path = "/v1/chat/completions" if self.is_chat else "/api/claude"
        return _http().post(url + path, json={"stream": self.stream, **body}, timeout=seconds)


FORMS = tuple(Form(is_chat, stream) for is_chat in (False, True) for stream in (True, False))
"""In the order of the columns of the page."""


def documented(file: str) -> dict[str, tuple[list[str], ...]]:
    """
    The rows that are tested there: what a client is told in each form, by how the turn ends.

    Nothing is told in a form that cannot end so.
    """
    rows = (row for row in _rows() if len(row) == len(FORMS) + 2)
    return {
        ending: tuple(_WORDS.findall(cell) for cell in cells)
        for ending, *cells, tests in rows
        if f"`{file}::" in tests
    }


def check(form: Form, answer: httpx.Response, expected: Sequence[str], said: str) -> None:
    """
    Check an answer: what it tells, and what the openai package makes of it.

    @param expected: what it tells, as the page has it.
    @param said: what the model has said; nothing else may be in the answer's content.
    """
    told = _hear(form, answer)
    assert told.words == expected, f"{form}: {told}"
    if form.is_chat:
        failed = bool(told.error)
        assert told.content == ("" if failed and not form.stream else said)
        where = told.words[0] if answer.is_error else "a stream that had begun" if failed else ""
        assert _raised_by_openai(form, answer) == _documented_classes().get(where, ""), str(form)


@cache
def _http() -> httpx.Client:
    """A client for all requests: to make one takes longer than most answers."""
    return httpx.Client(trust_env=False)


@cache
def _openai() -> openai.OpenAI:
    """Another one, as above."""
    return openai.OpenAI(base_url="http://localhost", api_key="any", max_retries=0)


def _rows() -> Iterator[list[str]]:
    """The rows of the page's tables."""
    for line in _PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def _documented_classes() -> dict[str, str]:
    """What the openai package raises, by the status or the place of an error."""
    return {where: name.strip("`") for where, name in (row for row in _rows() if len(row) == 2)}


@dataclass(frozen=True)
class _Told:
    """
    What an answer told.

    @ivar words: the status and what decides, as the page has them.
    @ivar content: the answer itself; empty in the native dialect.
    @ivar error: the sentence of an error that this server tells.
    """

    words: list[str]
    content: str = ""
    error: str = ""


def _hear(form: Form, answer: httpx.Response) -> _Told:
    """Read an answer; checks that it is whole and has the form that was asked for."""
    if answer.is_error or not form.stream:
        assert answer.headers["content-type"] == "application/json"
        body = answer.json()
        if answer.is_error:
            return _refusal(answer, body)
        return _completion(body) if form.is_chat else _result(body)
    assert answer.headers["content-type"] == "text/event-stream"
    *frames, rest = answer.text.split("\n\n")
    assert rest == ""
    said = [frame.removeprefix("data: ") for frame in frames]
    if form.is_chat:
        check_stream(answer.text)
        return _chunks(said)
    events = [json.loads(event) for event in said]
    assert [event["type"] for event in events].count("result") == 1
    return _result(events[-1])


def _refusal(answer: httpx.Response, body: Json) -> _Told:
    """An error with a status of its own."""
    assert list(body) == ["error"]
    comes_back = int(answer.headers.get("retry-after", 0)) > 0
    words = [str(answer.status_code), body["error"]["code"]]
    return _Told([*words, *["Retry-After"] * comes_back], error=body["error"]["message"])


def _result(event: Json) -> _Told:
    """The end of a turn in the native dialect."""
    assert event["type"] == "result"
    words = ["200", event["subtype"], *["is_error"] * event["is_error"]]
    error = event.get("error")
    if error is None:
        return _Told(words)
    assert event["result"] == error["message"]
    assert event["session_id"]
    return _Told([*words, error["code"]], error=error["message"])


def _completion(completion: Json) -> _Told:
    [choice] = completion["choices"]
    return _Told(["200", choice["finish_reason"]], choice["message"]["content"])


def _chunks(said: list[str]) -> _Told:
    """A stream of the OpenAI dialect, which ends in one of two ways."""
    whole = said[-1] == "[DONE]"
    *chunks, last = [json.loads(chunk) for chunk in (said[:-1] if whole else said)]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    content = "".join(delta.get("content", "") for delta in deltas)
    if whole:
        [choice] = last["choices"]
        assert choice["delta"] == {}
        return _Told(["200", choice["finish_reason"]], content)
    assert list(last) == ["error"]
    return _Told(["200", last["error"]["code"]], content, last["error"]["message"])


def _raised_by_openai(form: Form, answer: httpx.Response) -> str:
    """The class of what the openai package raises when it is given an answer, if it does."""
    with _replaying(answer) as url:
        create = partial(
            _openai().with_options(base_url=url).chat.completions.create, model="any", messages=[]
        )
        try:
            if form.stream:
                list(create(stream=True))
            else:
                create()
        except openai.APIError as error:
            return type(error).__name__
    return ""


@contextmanager
def _replaying(answer: httpx.Response) -> Iterator[str]:
    """A server that gives an answer once more; its address."""

    class Replay(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(answer.status_code)
            self.send_header("content-type", answer.headers["content-type"])
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            """Keep the output of the tests clean."""

    with HTTPServer(("127.0.0.1", 0), Replay) as server:
        server.timeout = _SECONDS
        thread = Thread(target=server.handle_request)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        thread.join()
