"""
What the server really sends to an unmodified client, byte by byte, and whether all of it is right.

A L{Tap} stands between a client and a server and keeps what comes back.  Every answer is then
checked against the openai package's own types, strictly: no value of another type, no field that
OpenAI's API does not have but the documented ones.  And every stream is checked as a whole, for
what the types cannot say.
"""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse, IncompleteRead
from typing import Any, Self, TypeVar, cast
from urllib.parse import urlsplit

from openai.types import CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from pydantic import BaseModel

__all__ = ["Tap", "check_error", "check_stream"]

_M = TypeVar("_M", bound=BaseModel)

_REASONING = frozenset({"reasoning_content", "reasoning"})
_OURS: dict[type[BaseModel], frozenset[str]] = {
    ChatCompletion: frozenset({"claude"}),
    ChatCompletionChunk: frozenset({"claude"}),
    ChatCompletionMessage: _REASONING,
    ChoiceDelta: _REASONING,
}
"""The documented fields that OpenAI's API does not have."""

_CLAUDE: dict[str, tuple[type, ...]] = {
    "session_id": (str,),
    "workspace": (str,),
    "cost_usd": (int, float),
    "num_turns": (int,),
}
_DONE = "[DONE]"


def check_stream(text: str, *, complete: bool = True) -> list[ChatCompletionChunk]:
    """
    Check the whole body of a stream and return its chunks.

    @param complete: the client has not left before its end.
    """
    frames = text.split("\n\n")
    rest = frames.pop()
    assert not (complete and rest), f"The stream ends in the middle of a frame: {rest[-200:]!r}"
    data = [_data_of(frame) for frame in frames]
    error = bool(data) and '"error"' in data[-1][:12]
    if error:
        check_error(data.pop())
    ended = bool(data) and data[-1] == _DONE
    if ended:
        data.pop()
    chunks = [_strictly(ChatCompletionChunk, frame) for frame in data]
    _check_order(chunks, whole=ended)
    assert ended or error or not complete, f"The stream just stops: {text[-500:]!r}"
    assert not (ended and error)
    return chunks


def check_error(body: str) -> dict[str, Any]:
    """Check an error, of a stream or of an answer that is none, and return it."""
    envelope = json.loads(body)
    assert list(envelope) == ["error"], envelope
    error: dict[str, Any] = envelope["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["param"] is None or isinstance(error["param"], str)
    for name in ("message", "type", "code"):
        assert isinstance(error[name], str), error
        assert error[name], error
    return error


def _data_of(frame: str) -> str:
    # Whatever else SSE allows (comments, ids, event names, several lines), some client stumbles.
    assert frame.startswith("data: "), frame
    assert len(frame.splitlines()) == 1, "Something in the frame looks like the end of a line."
    return frame[6:]


def _check_order(chunks: list[ChatCompletionChunk], *, whole: bool) -> None:
    heads = {(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}
    assert len(heads) <= 1, heads
    reasons: list[str | None] = []
    for number, chunk in enumerate(chunks):
        last = number == len(chunks) - 1
        if not chunk.choices:
            assert last, "Only the last chunk has no choice."
            assert chunk.usage is not None
            assert reasons[-1] is not None
            continue
        [choice] = chunk.choices
        assert not any(reasons), "Nothing comes after the reason to finish."
        assert choice.index == 0
        assert choice.delta.role == ("assistant" if number == 0 else None)
        assert choice.delta.tool_calls is None
        assert choice.delta.refusal is None
        assert chunk.usage is None
        assert ("claude" in (chunk.model_extra or {})) == (choice.finish_reason is not None)
        reasons.append(choice.finish_reason)
    if whole:
        assert reasons, "There is no chunk."
        assert reasons[-1] in ("stop", "length", "content_filter"), reasons
    else:
        assert not any(reasons), "A stream that fails has no reason to finish."


def _strictly(model: type[_M], body: str) -> _M:
    value = model.model_validate_json(body, strict=True)
    for holder in _models(value):
        extra = dict(holder.model_extra or {})
        unknown = set(extra) - _OURS.get(type(holder), frozenset())
        assert not unknown, f"{type(holder).__name__} has no {unknown}: {body[:500]}"
        _check_ours(extra)
        if isinstance(holder, CompletionUsage):
            assert holder.total_tokens == holder.prompt_tokens + holder.completion_tokens
    return value


def _check_ours(extra: dict[str, Any]) -> None:
    if "claude" in extra:
        claude = extra["claude"]
        assert list(claude) == list(_CLAUDE), claude
        for name, kinds in _CLAUDE.items():
            assert claude[name] is None or isinstance(claude[name], kinds), claude
        assert claude["session_id"]
    if _REASONING & set(extra):
        assert isinstance(extra["reasoning"], str)
        assert extra["reasoning_content"] == extra["reasoning"]


def _models(value: object) -> Iterator[BaseModel]:
    if isinstance(value, BaseModel):
        yield value
        for name in type(value).model_fields:
            yield from _models(getattr(value, name))
    elif isinstance(value, list):
        for item in value:
            yield from _models(item)


def _check_completion(body: str) -> None:
    [choice] = _strictly(ChatCompletion, body).choices
    assert choice.index == 0
    assert choice.finish_reason in ("stop", "length", "content_filter")
    assert choice.message.tool_calls is None


def _check_models(body: str) -> None:
    listed = json.loads(body)
    assert list(listed) == ["object", "data"]
    for entry in listed["data"]:
        _strictly(Model, json.dumps(entry))


_CHECKS = {
    "chat.completion": _check_completion,
    "list": _check_models,
    "model": lambda body: _strictly(Model, body),
}


@dataclass(frozen=True)
class _Response:
    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool

    def check(self) -> None:
        kind = self.headers.get("content-type", "")
        assert self.headers.get("x-request-id"), self
        text = self.body.decode() if self.complete else self.body.decode(errors="ignore")
        if kind.startswith("text/event-stream"):
            assert self.status == 200
            assert self.headers["x-accel-buffering"] == "no"
            check_stream(text, complete=self.complete)
            return
        assert kind == "application/json", self
        if not self.complete:
            return
        if self.status == 200:
            _CHECKS[json.loads(text)["object"]](text)
        else:
            check_error(text)


class Tap:
    """
    Passes connections on to a server and keeps what the server sends.

    A context manager; on leaving, everything is checked that has not been checked before.

    @param url: of the server; without a path.
    """

    def __init__(self, url: str) -> None:
        self._target = (str(urlsplit(url).hostname), int(urlsplit(url).port or 80))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[_Connection] = []
        self.checked = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._listener.close()
        for connection in self._connections:
            connection.close()
        if kind is None:
            self.check()

    @property
    def url(self) -> str:
        """What stands for the server's own."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def check(self) -> None:
        """
        Check all answers that have ended since the last time.

        @raise AssertionError: or pydantic's ValidationError: something in them is not right.
        """
        for connection in list(self._connections):
            for response in connection.new():
                self.checked += 1
                response.check()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
            except OSError:
                return
            self._connections.append(_Connection(client, server))


class _Connection:
    """Two sockets, and two threads that copy from one to the other."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self._client, self._server = client, server
        self._kept = bytearray()
        self._ended = False
        self._cut = False
        self._taken = 0
        threading.Thread(target=self._copy, args=(client, server, None), daemon=True).start()
        threading.Thread(target=self._copy, args=(server, client, self._kept), daemon=True).start()

    def close(self) -> None:
        """Hang up on both."""
        self._ended = True
        for one in (self._client, self._server):
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def new(self) -> Iterator[_Response]:
        """The answers that have ended and were not given before."""
        ended = self._ended
        for response in list(_responses(bytes(self._kept)))[self._taken :]:
            if response.complete or ended:
                self._taken += 1
                assert response.complete or not self._cut, "The server has hung up in an answer."
                yield response

    def _copy(self, source: socket.socket, target: socket.socket, kept: bytearray | None) -> None:
        try:
            while data := source.recv(65536):
                if kept is not None:
                    kept += data
                target.sendall(data)
        except OSError:
            pass
        if not self._ended:
            self._cut = source is self._server
            self.close()


def _responses(data: bytes) -> Iterator[_Response]:
    kept = _Kept(data)
    while kept.tell() < len(data):
        response = HTTPResponse(cast(socket.socket, kept))
        try:
            response.begin()
        except HTTPException:
            return  # its head has not come as a whole
        try:
            body, complete = response.read(), True
        except IncompleteRead as error:
            body, complete = error.partial, False
        headers = {name.lower(): value for name, value in response.getheaders()}
        yield _Response(response.status, headers, body, complete)
        if not complete:
            return


class _Kept(io.BytesIO):
    """Bytes, where http.client expects a socket."""

    def makefile(self, *_arguments: object) -> Self:
        return self

    def close(self) -> None:
        """Another response may follow."""
