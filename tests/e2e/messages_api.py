"""
Anthropic's Messages API on the loopback, answering as the script in the conversation says.

It speaks the API's real shapes to the real CLI: server-sent events with usage, JSON messages,
errors.  It keeps what it was asked, and how each answer ended, for the tests to look at.
"""

from __future__ import annotations

import json
import select
import socket
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

from tests.e2e.answers import Answer, ApiError, Wait, answer_to, events, message
from tests.e2e.conversation import Conversation
from tests.e2e.script import ScriptError, parse
from tests.secrecy import SECRETS

__all__ = ["REFUSED_KEY", "MessagesApi", "Recorded"]

REFUSED_KEY = "refused-key"

_KEPT_REQUESTS = 300
_PING_SECONDS = 1.0
_RELEASE_SECONDS = 60.0
_TICK_SECONDS = 0.02


@dataclass
class Recorded:
    """
    One request and how its answer ended.

    @ivar headers: the names in lower case.
    @ivar body: the parsed JSON body, or an empty object.
    @ivar status: the HTTP status of the answer, 0 while there is none.
    @ivar outcome: `running`, `answered`, `cut` (by the script) or `aborted` (by the client, before
        the answer was complete).
    @ivar at: when it came, in seconds of time.monotonic().
    """

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    status: int = 0
    outcome: str = "running"
    at: float = field(default_factory=time.monotonic)

    @property
    def aborted(self) -> bool:
        """Whether the client closed the connection before the answer was complete."""
        return self.outcome == "aborted"

    @cached_property
    def conversation(self) -> Conversation:
        """The body, ready to be asked."""
        return Conversation(self.body)

    @property
    def is_turn(self) -> bool:
        """Whether this is a real conversation, and not a side request of the CLI."""
        if urlsplit(self.path).path != "/v1/messages" or not self.body.get("messages"):
            return False
        return self.conversation.side_answer is None


class MessagesApi:
    """
    The scripted API, served from threads of this process on a free port of 127.0.0.1.

    Safe to use from several tests at once; the newest few hundred requests are kept.
    """

    def __init__(self) -> None:
        self._kept: deque[Recorded] = deque(maxlen=_KEPT_REQUESTS)
        self._changed = threading.Condition()
        self._failures: Counter[str] = Counter()
        self._released: set[str] = set()
        self._closing = False
        self._server = _Server(self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """What goes into ANTHROPIC_BASE_URL."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def requests(self) -> list[Recorded]:
        """All kept requests, oldest first."""
        with self._changed:
            return list(self._kept)

    def turns(self, text: str = "") -> list[Recorded]:
        """
        The requests of real conversations in which the user says this, oldest first.

        @param text: looked for in the user's texts; tests that share the API tell their own
            requests by a text of their own.
        """
        return [
            request
            for request in self.requests
            if request.is_turn and any(text in said for said in request.conversation.user_texts)
        ]

    def clear(self) -> None:
        """Forget the kept requests and all releases."""
        with self._changed:
            self._kept.clear()
            self._released.clear()

    def release(self, name: str) -> None:
        """Let every `[[wait NAME]]` and `[[hold NAME]]` go on, now and later."""
        with self._changed:
            self._released.add(name)
            self._changed.notify_all()

    def wait_for(
        self, wanted: Callable[[Recorded], bool], timeout: float = 30.0, *, text: str = ""
    ) -> Recorded:
        """
        The first conversation request that is as wanted, waiting for it to come or to become so.

        @param timeout: in seconds.
        @param text: as for L{turns}.
        @raise AssertionError: there is none in time.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = next((request for request in self.turns(text) if wanted(request)), None)
            if found is not None:
                return found
            with self._changed:
                self._changed.wait(_TICK_SECONDS)
        seen = [(request.status, request.outcome) for request in self.turns(text)]
        raise AssertionError(f"No such request within {timeout} s; seen: {seen}")

    # What follows is for the handler threads.

    def keep(self, request: Recorded) -> None:
        if request.is_turn:
            for text in request.conversation.user_texts:
                SECRETS.learn_prompt(text)
        with self._changed:
            self._kept.append(request)
            self._changed.notify_all()

    def answer(self, conversation: Conversation) -> Answer:
        with self._changed:
            failures = self._failures[conversation.key]
        side = conversation.side_answer
        try:
            steps = parse(f"[[text {json.dumps(side)}]]" if side else conversation.script)
            answer = answer_to(conversation, steps, 0 if side else conversation.answered, failures)
        except (ScriptError, ValueError) as error:
            return Answer(
                conversation.model, error=ApiError(400, "invalid_request_error", f"Script: {error}")
            )
        if answer.error is not None:
            with self._changed:
                self._failures[conversation.key] += 1
        return answer

    def waited(self, wait: Wait, gone: Callable[[], bool]) -> bool:
        """Sit a wait out; False if the client has gone or the server is closing."""
        seconds = _RELEASE_SECONDS if wait.name else wait.seconds
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if gone():
                return False
            with self._changed:
                if self._closing:
                    return False
                if wait.name in self._released:
                    return True
                self._changed.wait(min(left, _TICK_SECONDS))
        return not wait.name


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, api: MessagesApi) -> None:
        self.api = api
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that leave are part of the tests."""


class _ClientGoneError(Exception):
    """The client has closed the connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_HEAD(self) -> None:
        self._serve(self._nothing)

    def do_GET(self) -> None:
        self._serve(self._not_found)

    def do_POST(self) -> None:
        routes = {"/v1/messages": self._messages, "/v1/messages/count_tokens": self._count}
        self._serve(routes.get(urlsplit(self.path).path, self._not_found))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the base class's name)
        """Keep the output of the tests clean."""

    def _serve(self, route: Callable[[Recorded], None]) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        try:
            body = json.loads(raw or b"{}")
        except ValueError:
            body = {}
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Recorded(self.command, self.path, headers, body)
        self.server.api.keep(request)
        try:
            if REFUSED_KEY in (headers.get("x-api-key"), headers.get("authorization", "")[7:]):
                refused = ApiError(401, "authentication_error", "invalid x-api-key")
                self._error(request, refused)
            else:
                route(request)
            if request.outcome == "running":
                request.outcome = "answered"
        except (_ClientGoneError, ConnectionError):
            request.outcome = "aborted"
            self.close_connection = True

    def _nothing(self, request: Recorded) -> None:
        self._send(request, 200, {}, b"")

    def _not_found(self, request: Recorded) -> None:
        self._error(request, ApiError(404, "not_found_error", "Not Found"))

    def _count(self, request: Recorded) -> None:
        tokens = len(json.dumps(request.body)) // 4
        self._json(request, 200, {"input_tokens": tokens}, {})

    def _messages(self, request: Recorded) -> None:
        answer = self.server.api.answer(request.conversation)
        for wait in answer.before:
            self._wait(wait)
        if answer.error is not None:
            self._error(request, answer.error, answer.headers)
        elif request.body.get("stream"):
            self._stream(request, answer)
        elif answer.ending == "hang":
            self._hang()
        else:
            self._json(request, 200, message(answer), answer.headers)

    def _stream(self, request: Recorded, answer: Answer) -> None:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        self._head(request, 200, {**headers, "transfer-encoding": "chunked", **answer.headers})
        for event in events(answer):
            if isinstance(event, Wait):
                self._wait(event)
            else:
                self._event(event)
        if answer.ending == "hang":
            self._hang(lambda: self._event({"type": "ping"}))
        elif answer.ending == "cut":
            request.outcome = "cut"
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.wfile.write(b"0\r\n\r\n")

    def _event(self, event: Mapping[str, Any]) -> None:
        if self._client_gone():
            raise _ClientGoneError
        data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        frame = f"event: {event['type']}\ndata: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(frame), frame))

    def _wait(self, wait: Wait) -> None:
        if not self.server.api.waited(wait, self._client_gone):
            raise _ClientGoneError

    def _hang(self, ping: Callable[[], None] = lambda: None) -> None:
        while True:
            self._wait(Wait(seconds=_PING_SECONDS))
            ping()

    def _client_gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def _error(
        self, request: Recorded, error: ApiError, headers: Mapping[str, str] | None = None
    ) -> None:
        detail = {"type": error.type, "message": error.message}
        body = {"type": "error", "error": detail}
        self._json(request, error.status, body, {**(headers or {}), **error.headers})

    def _json(
        self, request: Recorded, status: int, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> None:
        raw = json.dumps(body, ensure_ascii=False).encode()
        self._send(request, status, {"content-type": "application/json", **headers}, raw)

    def _send(self, request: Recorded, status: int, headers: Mapping[str, str], raw: bytes) -> None:
        self._head(request, status, {**headers, "content-length": str(len(raw))})
        self.wfile.write(raw)

    def _head(self, request: Recorded, status: int, headers: Mapping[str, str]) -> None:
        request.status = status
        self.send_response(status)
        self.send_header("request-id", f"req_{uuid.uuid4().hex[:24]}")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
