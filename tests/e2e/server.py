"""What tests say to a running daemon in the native dialect, and what they get back."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.e2e.claude_cli import Claude
from tests.e2e.daemon import Daemon, sse_events

__all__ = ["Answer", "Event", "Server", "StartServer"]

Event = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """
    One whole answer.

    @ivar events: what the stream carried; of an answer that is no stream, empty.
    @ivar body: the JSON body of an answer that is no stream.
    """

    status: int
    headers: httpx.Headers
    events: list[Event] = field(default_factory=list)
    body: Event = field(default_factory=dict)

    @property
    def result(self) -> Event:
        """The turn's `result` event: the last one, and the only one."""
        assert self.status == 200, (self.status, self.body)
        if not self.events:
            assert self.body.get("type") == "result", self.body
            return self.body
        assert [event["type"] for event in self.events].count("result") == 1
        assert self.events[-1]["type"] == "result"
        return self.events[-1]

    @property
    def text(self) -> str:
        """What a turn that went well answered."""
        assert self.result["is_error"] is False, self.result
        assert self.result["subtype"] == "success", self.result
        return str(self.result["result"])

    @property
    def told(self) -> Any:
        """The JSON that `[[echo]]` and `[[history]]` answer."""
        return json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        """The error of an answer that failed before anything was sent."""
        assert self.status >= 400, (self.status, self.events, self.body)
        assert list(self.body) == ["error"]
        error: dict[str, Any] = self.body["error"]
        return error

    @property
    def session_id(self) -> str:
        """The session's id as the head tells it, or else the result."""
        return str(self.headers.get("x-claude-session-id") or self.result["session_id"])

    @property
    def tool_results(self) -> list[dict[str, Any]]:
        """The results of tools, sub-agents' included, in order."""
        return [
            block
            for event in self.events
            if event["type"] == "user" and isinstance(event["message"]["content"], list)
            for block in event["message"]["content"]
            if block["type"] == "tool_result"
        ]


class Server:
    """
    A running daemon.

    The fields of a request are keyword arguments, with underscores for hyphens.

    @ivar key: the API key to send, if any.
    """

    def __init__(self, daemon: Daemon, claude: Claude) -> None:
        self.daemon = daemon
        self.claude = claude
        self.key: str | None = None

    def ask(self, prompt: str, **fields: Any) -> Answer:
        """Run a turn and wait for all of its answer."""
        with self.asking(prompt, **fields) as response:
            if response.headers["content-type"] == "text/event-stream":
                return Answer(response.status_code, response.headers, list(sse_events(response)))
            body = json.loads(response.read())
            return Answer(response.status_code, response.headers, body=body)

    @contextmanager
    def asking(self, prompt: str, **fields: Any) -> Iterator[httpx.Response]:
        """Run a turn and read its answer as it comes; leaving closes the connection."""
        headers = {"authorization": f"Bearer {self.key}"} if self.key is not None else {}
        body = _body(prompt, fields)
        with (
            self.daemon.client(headers=headers) as client,
            client.stream("POST", "/api/claude", json=body) as response,
        ):
            yield response

    def send(self, prompt: str, **fields: Any) -> socket.socket:
        """Ask for a turn and read nothing; the connection stays open until the test closes it."""
        body = json.dumps(_body(prompt, fields)).encode()
        head = (
            "POST /api/claude HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        connection = socket.create_connection(("127.0.0.1", self.daemon.port))
        connection.sendall(head.encode() + body)
        return connection


StartServer = Callable[..., Server]
"""Of the fixture `start_server`: the CLI, the environment added, and the name of the folder."""


def _body(prompt: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": prompt, **{name.replace("_", "-"): fields[name] for name in fields}}
