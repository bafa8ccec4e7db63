"""The routes: what each takes apart, hands down and answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from zope.interface import implementer

from claude_proxy.cli.catalogue import ModelCatalogue
from claude_proxy.cli.events import Event, parse_event
from claude_proxy.cli.outcomes import Outcome, OutcomeKind
from claude_proxy.dialects import history
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.interfaces import IRunningTurn, ITurnObserver
from claude_proxy.sessions.book import SessionBook
from claude_proxy.sessions.executor import Executor
from claude_proxy.sessions.register import SessionRegister
from claude_proxy.sessions.turns import TurnRequest
from claude_proxy.settings import ApiKey
from claude_proxy.web.api import HEAD_PATIENCE, JSON_PATHS, PUBLIC_PATHS, Api, ChatRules
from claude_proxy.web.auth import Authenticator, Origins
from claude_proxy.web.health import Check, HealthReport, Level
from tests.scrape import make_metrics
from tests.support import Answer, Connection, FakeControl, inline_store, open_site

KEY = "sk-alice-0123456789"
SESSION = "aaaaaaaa-0000-4000-8000-000000000000"
ALIASES = (("gpt-4o", "claude-code"), ("fast", "haiku"))


@implementer(IRunningTurn)
class Turn:
    """A turn that the test plays."""

    session_id: str | None = SESSION

    def __init__(self, request: TurnRequest, observer: ITurnObserver) -> None:
        self.request = request
        self.observer = observer
        self.stopped = 0
        self.tips: list[str] = []

    def stop(self, reason: ProxyError | None) -> None:
        self.stopped += 1

    def remember(self, tip: str) -> None:
        self.tips.append(tip)

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


class Catalogue:
    """Stands in for the one that asks the CLI."""

    def __init__(self) -> None:
        self.known: tuple[str, ...] = ("sonnet", "sonnet[1m]")
        self.error: ProxyError | None = None
        self.asked = 0

    async def names(self) -> tuple[str, ...]:
        self.asked += 1
        return self.known if self.error is None else ()

    async def required_names(self) -> tuple[str, ...]:
        if self.error is not None:
            raise self.error
        return await self.names()


class World:
    """The API on a site with one key, and a connection to it."""

    def __init__(self, **rules: Any) -> None:
        self.clock = Clock()
        self.executor = Turns()
        self.check: Callable[[], Any] = lambda: Check(Level.healthy, "Well")

        async def check() -> Check:
            result = self.check()
            return await result if isinstance(result, Deferred) else cast(Check, result)

        health = HealthReport({"claudeCli": check}, uptime=lambda: 1.5)
        self.catalogue = Catalogue()
        self.metrics = make_metrics()
        self.jobs: list[Callable[[], Any]] = []
        standard = ChatRules(text_parameters="all", activity="reasoning", aliases=ALIASES)
        api = Api(
            cast(Executor, self.executor),
            SessionRegister(SessionBook(inline_store(), adopt_unknown=True), FakeControl()),
            health,
            self.clock,
            stall_timeout=60.0,
            in_thread=self._in_thread,
            chat_rules=replace(standard, **rules),
            catalogue=cast(ModelCatalogue, self.catalogue),
            metrics=self.metrics,
        )
        self.site = open_site(
            api.app.resource(),
            Clock(),
            authenticator=Authenticator([ApiKey("alice", KEY)]),
            origins=Origins(allowed=(), hosts=(), open=False),
            public=PUBLIC_PATHS,
            json_paths=JSON_PATHS,
            max_body=1_000_000,
        )
        self.connection = Connection(self.site)

    async def _in_thread(self, job: Callable[[], Any]) -> Any:
        self.jobs.append(job)
        return job()

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.connection.request(method, path, body, {"X-Api-Key": KEY, **named})

    def post(self, **fields: Any) -> None:
        """Send a native request; its answer comes later."""
        body = json.dumps({"prompt": "hello", **fields}).encode()
        length = f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\n"
        head = f"POST /api/claude HTTP/1.1\r\nHost: x\r\nX-Api-Key: {KEY}\r\nX-Request-Id: r-1\r\n"
        self.connection.send(f"{head}{length}\r\n".encode() + body)

    def chat(self, text: str = "hello", *headers: str, **fields: Any) -> None:
        """Send a chat; its answer comes later."""
        fields = {"messages": [{"role": "user", "content": text}], **fields}
        body = json.dumps(fields).encode()
        lines = [
            "POST /v1/chat/completions HTTP/1.1",
            "Host: x",
            f"X-Api-Key: {KEY}",
            "X-Request-Id: r-1",
            f"Content-Length: {len(body)}",
            "Content-Type: application/json",
            *headers,
        ]
        self.connection.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

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


# Chats.


TEXT = event(type="assistant", message={"id": "m", "content": [{"type": "text", "text": "hi"}]})


def chunks(answer: Answer) -> list[Any]:
    frames = answer.body.decode().split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") for frame in frames)
    texts = [frame.removeprefix("data: ") for frame in frames]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


def test_a_chat_is_asked_for_in_the_servers_own_words() -> None:
    world = World()
    world.clock.advance(12.5)
    world.chat("hello", claude={"workspace": "w"}, model="claude-opus-4")
    asked = world.turn.request
    assert (asked.tenant, asked.request_id, asked.received) == ("alice", "r-1", 12.5)
    assert asked.content == [{"type": "text", "text": "hello"}]
    assert asked.literal
    assert (asked.workspace, asked.model) == ("w", "claude-opus-4")


def test_a_chat_is_one_completion_unless_it_is_asked_for_as_a_stream() -> None:
    world = World()
    world.chat()
    world.turn.observer.turn_events([INIT, TEXT])
    world.turn.observer.turn_ended(SUCCESS)
    world.chat(stream=True)
    world.turn.observer.turn_events([INIT])
    world.turn.observer.turn_events([TEXT])
    world.turn.observer.turn_ended(SUCCESS)
    whole, streamed = world.connection.answers
    assert whole.json["object"] == "chat.completion"
    assert whole.json["choices"][0]["message"]["content"] == "hi"
    assert whole.headers["x-claude-session-id"] == SESSION
    assert streamed.headers["content-type"] == "text/event-stream"
    assert streamed.headers["x-claude-session-id"] == SESSION
    *told, done = chunks(streamed)
    assert done == "[DONE]"
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in told) == "hi"
    assert whole.json["id"] != told[0]["id"]


def test_the_head_of_a_chat_waits_for_content_but_not_for_ever() -> None:
    world = World()
    world.chat(stream=True)
    world.turn.observer.turn_planned(SESSION, None, {})
    world.turn.observer.turn_events([INIT])
    assert world.connection.received == b""
    world.clock.advance(HEAD_PATIENCE)
    [answer] = world.connection.answers
    [first] = chunks(answer)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_a_chat_that_fails_before_its_content_has_its_true_status() -> None:
    world = World()
    world.chat(stream=True)
    world.turn.observer.turn_planned(SESSION, None, {})
    world.turn.observer.turn_events([INIT])
    error = ProxyError(Failure.RATE_LIMIT_EXCEEDED, retry_after=3)
    world.turn.observer.turn_ended(Outcome(OutcomeKind.FAILURE, error))
    [answer] = world.connection.answers
    assert (answer.status, answer.error["code"]) == (429, "rate_limit_exceeded")
    assert answer.headers["retry-after"] == "3"


@pytest.mark.parametrize("stream", [True, False])
def test_the_session_of_a_chat_is_found_again_by_the_conversation(stream: bool) -> None:
    world = World()
    world.chat("hello", stream=stream)
    world.turn.observer.turn_events([INIT, TEXT])
    world.turn.observer.turn_ended(SUCCESS)
    said = [("user", "hello"), ("assistant", "hi")]
    assert world.turn.tips == list(history.tips(said))
    messages = [{"role": role, "content": content} for role, content in said]
    world.chat(messages=[*messages, {"role": "user", "content": "more"}])
    assert world.turn.request.tips == history.tips(said)
    assert world.turn.request.content == [{"type": "text", "text": "more"}]


def test_a_chat_that_fails_is_not_found_again() -> None:
    world = World()
    world.chat(stream=True)
    world.turn.observer.turn_events([INIT, TEXT])
    error = ProxyError(Failure.INACTIVITY_TIMEOUT)
    world.turn.observer.turn_ended(Outcome(OutcomeKind.FAILURE, error))
    [answer] = world.connection.answers
    assert chunks(answer)[-1]["error"]["code"] == "inactivity_timeout"
    assert world.turn.tips == []


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (["X-Conversation-Id: c-1"], "c-1"),
        (["X-OpenWebUI-Chat-Id: w-1"], "w-1"),
        (["X-OpenWebUI-Chat-Id: w-1", "X-Conversation-Id: c-1"], "c-1"),
        (["X-Conversation-Id: ", "X-OpenWebUI-Chat-Id: w-1"], "w-1"),
        ([f"X-Conversation-Id: {'x' * 201}"], None),
        (["X-Conversation-Id: a b"], None),
        ([], None),
    ],
)
def test_a_client_may_name_its_conversation(headers: list[str], expected: str | None) -> None:
    world = World()
    world.chat("hello", *headers)
    assert world.turn.request.conversation == expected


def test_a_client_may_name_the_session_by_a_header() -> None:
    world = World()
    world.chat("hello", f"X-Claude-Session-Id: {SESSION}")
    assert world.turn.request.session_id == SESSION
    world = World()
    world.chat("hello", "X-Claude-Session-Id: mine")
    assert world.connection.answers[0].status == 400


@pytest.mark.parametrize(
    ("model", "expected", "asked"),
    [
        ("claude-code", None, 0),
        ("gpt-4o", None, 0),
        ("fast", "haiku", 0),
        ("claude-x", "claude-x", 0),
        ("sonnet", "sonnet", 1),
    ],
)
def test_the_cli_is_asked_for_its_models_only_where_that_matters(
    model: str, expected: str | None, asked: int
) -> None:
    world = World()
    world.chat(model=model)
    assert world.turn.request.model == expected
    assert world.catalogue.asked == asked


def test_an_unknown_model_is_a_404_that_lists_the_known_ones() -> None:
    world = World()
    world.chat(model="gpt-5")
    [answer] = world.connection.answers
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    assert answer.error["param"] == "model"
    for name in ("claude-code", "fast", "sonnet", "MODEL_ALIASES"):
        assert name in str(answer.error["message"])
    assert world.executor.turns == []


def test_without_a_cli_an_unknown_model_is_not_blamed() -> None:
    world = World()
    world.catalogue.error = ProxyError(Failure.CLI_NOT_FOUND)
    world.chat(model="sonnet")
    [answer] = world.connection.answers
    assert (answer.status, answer.error["code"]) == (503, "cli_not_found")


def test_what_a_text_may_set_is_a_matter_of_the_settings() -> None:
    text = 'allowed-tools=["Bash"]\n\nhello'
    world = World()
    world.chat(text)
    assert world.turn.request.allowed_tools == ("Bash",)
    world = World(text_parameters="none")
    world.chat(text)
    assert world.turn.request.allowed_tools == ()
    assert world.turn.request.content == [{"type": "text", "text": text}]
    world = World(text_parameters="safe")
    world.chat(text)
    assert world.connection.answers[0].error["param"] == "allowed-tools"


def test_where_activity_goes_is_a_matter_of_the_settings() -> None:
    world = World(activity="content")
    world.chat("workspace=w\nhello")
    world.turn.observer.turn_planned(SESSION, "w", {})
    world.turn.observer.turn_events([INIT, TEXT])
    world.turn.observer.turn_ended(SUCCESS)
    content = world.connection.answers[0].json["choices"][0]["message"]["content"]
    assert content.startswith(f"session-id={SESSION}\nworkspace=w\n")
    assert content.endswith("hi")


def test_a_chat_is_logged_by_its_lengths_and_what_had_no_effect() -> None:
    world = World()
    with capturedLogs() as events:
        world.chat("a secret prompt", temperature=1, tools=[])
    [record] = [e for e in events if e.get("type") == "request"]
    assert (record["path"], record["messages"]) == ("/v1/chat/completions", 1)
    assert (record["prompt_characters"], record["stream"]) == (15, False)
    [ignored] = [e for e in events if e.get("type") == "fields_ignored"]
    assert sorted(ignored["fields"]) == ["temperature", "tools"]
    assert "secret" not in str(events)


def test_a_long_chat_is_decoded_in_a_thread() -> None:
    world = World()
    world.chat("short")
    assert world.jobs == []
    world = World()
    world.chat("x" * 300_000)
    assert len(world.jobs) == 1
    assert world.turn.request.content == [{"type": "text", "text": "x" * 300_000}]
    world = World()
    world.chat("x" * 300_000, n=2)
    assert world.connection.answers[0].error["param"] == "n"


def test_the_models_are_listed() -> None:
    answer = World().ask("GET", "/v1/models")
    assert answer.status == 200
    names = [model["id"] for model in answer.json["data"]]
    assert names == ["claude-code", "gpt-4o", "fast", "sonnet", "sonnet[1m]"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("claude-code", "claude-code"),
        ("gpt-4o", "gpt-4o"),
        ("sonnet%5B1m%5D", "sonnet[1m]"),
        ("claude-anything", "claude-anything"),
    ],
)
def test_one_model_is_told_by_its_name(path: str, name: str) -> None:
    answer = World().ask("GET", f"/v1/models/{path}")
    assert (answer.status, answer.json["id"], answer.json["object"]) == (200, name, "model")


def test_an_unknown_model_is_not_there() -> None:
    answer = World().ask("GET", "/v1/models/gpt-5")
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1", "/v1/completions"])
def test_an_unknown_path_below_v1_names_those_that_exist(path: str) -> None:
    answer = World().ask("POST", path, b"{}", Content_Type="application/json")
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    for known in ("POST /v1/chat/completions", "GET /v1/models", "POST /api/claude"):
        assert known in str(answer.error["message"])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/v1/models/claude-code"])
def test_chats_and_models_need_a_key(path: str) -> None:
    world = World()
    answer = world.connection.request("GET", path)
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")


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
        ("GET", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/v1/models/x", "GET, HEAD"),
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
