"""The routes: what each takes apart, hands down and answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from zope.interface import implementer

from claude_proxy.cli.events import Event, parse_event
from claude_proxy.cli.outcomes import Outcome, OutcomeKind
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.interfaces import IRunningTurn, ITurnObserver
from claude_proxy.sessions.executor import Executor
from claude_proxy.sessions.turns import TurnRequest
from claude_proxy.settings import ApiKey
from claude_proxy.web.api import JSON_PATHS, PUBLIC_PATHS, Api
from claude_proxy.web.auth import Authenticator, Origins
from claude_proxy.web.health import Check, HealthReport, Level
from tests.support import Answer, Connection, open_site

KEY = "sk-alice-0123456789"
SESSION = "aaaaaaaa-0000-4000-8000-000000000000"


@implementer(IRunningTurn)
class Turn:
    """A turn that the test plays."""

    session_id: str | None = SESSION

    def __init__(self, request: TurnRequest, observer: ITurnObserver) -> None:
        self.request = request
        self.observer = observer
        self.stopped = 0

    def stop(self, reason: ProxyError | None) -> None:
        self.stopped += 1

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass


class Turns:
    """Stands in for the executor."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.error: Exception | None = None

    def run(self, request: TurnRequest, observer: ITurnObserver) -> IRunningTurn:
        if self.error is not None:
            raise self.error
        self.turns.append(Turn(request, observer))
        return self.turns[-1]


class World:
    """The API on a site with one key, and a connection to it."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.executor = Turns()
        self.check: Callable[[], Any] = lambda: Check(Level.healthy, "Well")

        async def check() -> Check:
            result = self.check()
            return await result if isinstance(result, Deferred) else cast(Check, result)

        health = HealthReport({"claudeCli": check}, uptime=lambda: 1.5)
        api = Api(cast(Executor, self.executor), health, self.clock, stall_timeout=60.0)
        self.site = open_site(
            api.app.resource(),
            Clock(),
            authenticator=Authenticator([ApiKey("alice", KEY)]),
            origins=Origins(allowed=(), hosts=(), open=False),
            public=PUBLIC_PATHS,
            json_paths=JSON_PATHS,
        )
        self.connection = Connection(self.site)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.connection.request(method, path, body, {"X-Api-Key": KEY, **named})

    def post(self, **fields: Any) -> None:
        """Send a native request; its answer comes later."""
        body = json.dumps({"prompt": "hello", **fields}).encode()
        length = f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\n"
        head = f"POST /api/claude HTTP/1.1\r\nHost: x\r\nX-Api-Key: {KEY}\r\nX-Request-Id: r-1\r\n"
        self.connection.send(f"{head}{length}\r\n".encode() + body)

    @property
    def turn(self) -> Turn:
        return self.executor.turns[-1]


def event(**fields: Any) -> Event:
    parsed = parse_event(json.dumps({"session_id": SESSION, **fields}).encode())
    assert parsed is not None
    return parsed


INIT = event(type="system", subtype="init")
PARTIAL = event(type="stream_event")
RESULT = event(type="result", subtype="success", is_error=False, result="hi")
SUCCESS = Outcome(OutcomeKind.SUCCESS, result=RESULT, session_id=SESSION)


# Health.


def test_health_needs_no_key() -> None:
    answer = World().connection.request("GET", "/health")
    assert (answer.status, answer.json["status"]) == (200, "healthy")
    assert answer.json["uptime"] == 1.5
    assert answer.json["checks"]["claudeCli"]["message"] == "Well"


@pytest.mark.parametrize(
    ("level", "status"), [(Level.healthy, 200), (Level.degraded, 200), (Level.unhealthy, 503)]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_health_tells_probes_by_its_status(level: Level, status: int, method: str) -> None:
    world = World()
    world.check = lambda: Check(level, "So so")
    answer = world.ask(method, "/health")
    assert answer.status == status
    assert answer.headers["cache-control"] == "no-store"
    assert int(answer.headers["content-length"]) > 0
    assert (answer.body == b"") == (method == "HEAD")


def test_a_broken_check_is_a_500_in_the_same_shape() -> None:
    world = World()

    def broken() -> Check:
        raise ZeroDivisionError

    world.check = broken
    answer = world.ask("GET", "/health")
    assert answer.status == 500
    assert set(answer.json) == {"status", "timestamp", "uptime", "version", "checks"}


def test_who_leaves_before_the_report_is_made_breaks_nothing() -> None:
    world = World()
    checking: Deferred[Check] = Deferred()
    world.check = lambda: checking
    with capturedLogs() as events:
        world.connection.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        world.connection.lose()
    assert not [e for e in events if "log_failure" in e or e.get("type") == "internal_error"]


# Turns.


def test_a_turn_is_asked_for_in_the_servers_own_words() -> None:
    world = World()
    world.clock.advance(12.5)
    world.post(workspace="w", model="opus")
    assert world.turn.request == TurnRequest(
        content="hello",
        tenant="alice",
        request_id="r-1",
        received=12.5,
        workspace="w",
        model="opus",
    )


def test_a_turn_is_a_stream_unless_it_is_asked_for_as_a_whole() -> None:
    world = World()
    world.post()
    world.turn.observer.turn_events([INIT, PARTIAL])
    world.turn.observer.turn_ended(SUCCESS)
    world.post(stream=False)
    world.turn.observer.turn_events([INIT])
    world.turn.observer.turn_ended(SUCCESS)
    world.post(include_partial_messages=None, **{"include-partial-messages": True})
    streamed, whole, refused = world.connection.answers
    assert streamed.headers["content-type"] == "text/event-stream"
    assert streamed.body == b"data: " + INIT.line + b"\n\ndata: " + RESULT.line + b"\n\n"
    assert (whole.status, whole.body) == (200, RESULT.line)
    assert refused.error["param"] == "include_partial_messages"


def test_partial_messages_are_passed_on_when_asked_for() -> None:
    world = World()
    world.post(**{"include-partial-messages": True})
    world.turn.observer.turn_events([PARTIAL])
    assert PARTIAL.line in world.connection.received


def test_a_client_that_leaves_stops_its_turn_and_is_no_fault() -> None:
    world = World()
    with capturedLogs() as events:
        world.post()
        world.turn.observer.turn_events([INIT])
        world.connection.lose()
        world.turn.observer.turn_ended(Outcome(OutcomeKind.ABANDONED))
    assert world.turn.stopped == 1
    assert not [e for e in events if "log_failure" in e or e.get("type") == "internal_error"]
    assert world.clock.getDelayedCalls() == []


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"[]", "invalid_json", None),
        (b"{}", "invalid_value", "prompt"),
        (b'{"prompt":"x","allowed_tools":[]}', "invalid_value", "allowed_tools"),
    ],
)
def test_a_bad_body_is_a_400_that_names_the_field(
    body: bytes, code: str, param: str | None
) -> None:
    world = World()
    answer = world.ask("POST", "/api/claude", body, Content_Type="application/json")
    assert answer.status == 400
    assert (answer.error["code"], answer.error["param"]) == (code, param)
    assert world.executor.turns == []
    assert not world.connection.closed


def test_a_server_that_stops_says_when_to_come_back() -> None:
    world = World()
    world.executor.error = ProxyError(Failure.SHUTTING_DOWN, retry_after=5)
    world.post()
    [answer] = world.connection.answers
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")


def test_a_fault_of_ours_is_logged_and_its_details_stay_there() -> None:
    world = World()
    world.executor.error = ZeroDivisionError("a detail")
    with capturedLogs() as events:
        world.post()
    [answer] = world.connection.answers
    assert (answer.status, answer.error["code"]) == (500, "internal_error")
    assert "r-1" in str(answer.error["message"])
    assert b"a detail" not in answer.body
    [record] = [e for e in events if e.get("type") == "internal_error"]
    assert record["request_id"] == "r-1"
    assert record["log_failure"].check(ZeroDivisionError)


def test_a_request_is_logged_by_its_lengths() -> None:
    world = World()
    with capturedLogs() as events:
        world.post(prompt="a secret prompt")
    [record] = [e for e in events if e.get("type") == "request"]
    assert (record["prompt_characters"], record["body_bytes"]) == (15, 29)
    assert (record["request_id"], record["tenant"]) == ("r-1", "alice")
    assert "secret" not in str(events)


# Everything else.


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/api",
        "/api/claude/",
        "/healthy",
        "/health/",
        "/api/./claude",
        "/%61",
        "/a%2Fb",
        "/a?b",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS"])
def test_an_unknown_path_is_a_404_in_json(path: str, method: str) -> None:
    answer = World().ask(method, path)
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    assert "POST /api/claude" in str(answer.error["message"])


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/health", "GET, HEAD"),
        ("DELETE", "/health", "GET, HEAD"),
        ("OPTIONS", "/health", "GET, HEAD"),
        ("POST", "/%68ealth", "GET, HEAD"),
        ("GET", "/api/claude", "POST"),
        ("PUT", "/api/claude", "POST"),
        ("OPTIONS", "/api/claude", "POST"),
        ("BREW", "/api/claude", "POST"),
    ],
)
def test_a_wrong_method_is_a_405_that_says_the_right_ones(
    method: str, path: str, allow: str
) -> None:
    answer = World().ask(method, path)
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == allow
    for right in allow.split(", "):
        assert right in str(answer.error["message"])


def test_head_on_a_path_for_posts_is_a_405_without_a_body() -> None:
    answer = World().ask("HEAD", "/api/claude")
    assert (answer.status, answer.headers["allow"], answer.body) == (405, "POST", b"")


@pytest.mark.parametrize(
    "path", ["/api/claude", "/%61pi/claude", "/api%2Fclaude", "//api//claude", "/api/claud%65"]
)
def test_no_spelling_of_the_path_gets_around_the_content_type(path: str) -> None:
    world = World()
    answer = world.ask("POST", path, b'{"prompt":"x"}', Content_Type="text/plain")
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")
    assert world.executor.turns == []


@pytest.mark.parametrize("host", ["\udcff", "x" * 5000, "a b", "[", "-"])
def test_any_host_is_answered_in_json_when_keys_are_asked_for(host: str) -> None:
    answer = World().ask("GET", "/health", Host=host)
    assert answer.status == 200
    assert answer.json["status"] == "healthy"
