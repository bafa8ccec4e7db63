"""The routes of the sessions: list, get, interrupt, delete, each for the tenant alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
from twisted.internet.task import Clock

from claude_proxy.cli.catalogue import ModelCatalogue
from claude_proxy.sessions.book import SessionBook
from claude_proxy.sessions.executor import Executor
from claude_proxy.sessions.register import SessionRegister
from claude_proxy.sessions.store import SessionRecord, Store
from claude_proxy.settings import ApiKey
from claude_proxy.web.api import JSON_PATHS, PUBLIC_PATHS, Api, ChatRules
from claude_proxy.web.auth import Authenticator, Origins
from claude_proxy.web.health import HealthReport
from claude_proxy.web.metrics import Metrics
from tests.support import Answer, Connection, FakeControl, inline_store, open_site, result_of

KEYS = {"alice": "sk-alice-0123456789", "bob": "sk-bob-0123456789"}
OURS, OTHER, FOREIGN = (f"{digit * 8}-0000-4000-8000-000000000000" for digit in "abc")
PAGE_ORIGIN = "https://page.example"

RECORD = SessionRecord(OURS, OTHER, "project", "alice", True, {}, 1763839200.5, 1763839300.0)


class World:
    """The API on a site with two keys, one session of alice's, and a connection to it."""

    def __init__(self) -> None:
        self.store: Store = inline_store()
        self.control = FakeControl()
        result_of(self.store.create(RECORD))
        # What these routes do not use is not there.
        api = Api(
            cast(Executor, None),
            SessionRegister(SessionBook(self.store, adopt_unknown=True), self.control),
            cast(HealthReport, None),
            Clock(),
            stall_timeout=60.0,
            in_thread=cast(Any, None),
            chat_rules=ChatRules(text_parameters="all", activity="reasoning", aliases=()),
            catalogue=cast(ModelCatalogue, None),
            metrics=cast(Metrics, None),
        )
        self.site = open_site(
            api.app.resource(),
            Clock(),
            authenticator=Authenticator([ApiKey(*key) for key in KEYS.items()]),
            origins=Origins(allowed=(PAGE_ORIGIN,), hosts=(), open=False),
            public=PUBLIC_PATHS,
            json_paths=JSON_PATHS,
        )
        self.connection = Connection(self.site)

    def ask(self, method: str, path: str, tenant: str = "alice", **headers: str) -> Answer:
        return self.connection.request(
            method, f"/api/sessions{path}", None, {"X-Api-Key": KEYS[tenant], **headers}
        )

    def send(self, method: str, path: str) -> None:
        """Send a request; its answer comes later."""
        head = f"{method} /api/sessions{path} HTTP/1.1\r\nHost: x\r\nX-Api-Key: {KEYS['alice']}"
        self.connection.send(f"{head}\r\nX-Request-Id: r-1\r\n\r\n".encode())


TOLD = {
    "id": OURS,
    "workspace": "project",
    "created": "2025-11-22T19:20:00.500Z",
    "last_used": "2025-11-22T19:21:40.000Z",
    "state": "idle",
    "turns": 0,
    "own_turns": 0,
    "cost_usd": 0.0,
    "last_outcome": None,
}


def test_the_sessions_of_a_key_are_listed() -> None:
    world = World()
    answer = world.ask("GET", "")
    assert (answer.status, answer.json) == (200, {"sessions": [TOLD], "next": None})
    assert answer.headers["cache-control"] == "no-store"
    assert world.ask("GET", "", "bob").json == {"sessions": [], "next": None}


def test_thousands_of_sessions_come_page_by_page() -> None:
    world = World()
    for number in range(2500):
        name = f"{number}"
        result_of(world.store.create(replace(RECORD, id=name, cli_id=name, created=number / 7)))
    seen: list[str] = []
    query, pages = "?limit=1000", 0
    while query:
        page = world.ask("GET", query).json
        seen += [session["id"] for session in page["sessions"]]
        query = f"?limit=1000&before={page['next']}" if page["next"] else ""
        pages += 1
    assert pages == 3
    assert seen == [OURS, *(f"{number}" for number in reversed(range(2500)))]
    assert len(world.ask("GET", "").json["sessions"]) == 100


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=many", "before=yesterday"])
def test_a_bad_page_is_a_400_that_names_the_parameter(query: str) -> None:
    answer = World().ask("GET", f"?{query}")
    assert (answer.status, answer.error["code"]) == (400, "invalid_value")
    assert answer.error["param"] == query.partition("=")[0]


@pytest.mark.parametrize("name", [OURS, OTHER])
def test_a_session_is_told_by_any_of_its_ids(name: str) -> None:
    world = World()
    world.control.states[OURS] = "live"
    result_of(world.store.finish_turn(OURS, 1763839300.0, 0.0625, "success", {}))
    answer = world.ask("GET", f"/{name}")
    told = {**TOLD, "state": "live", "turns": 1, "cost_usd": 0.0625, "last_outcome": "success"}
    assert (answer.status, answer.json) == (200, told)
    assert answer.headers["x-claude-session-id"] == name
    assert world.ask("HEAD", f"/{name}").status == 200


@pytest.mark.parametrize("interrupted", [True, False])
def test_an_interrupt_says_whether_there_was_a_turn_to_stop(interrupted: bool) -> None:
    world = World()
    world.send("POST", f"/{OURS}/interrupt")
    assert world.connection.received == b""
    world.control.interrupts[OURS].callback(interrupted)
    [answer] = world.connection.answers
    assert (answer.status, answer.json) == (200, {"id": OURS, "interrupted": interrupted})


def test_a_deleted_session_is_gone_and_the_answer_says_what_stays() -> None:
    world = World()
    world.send("DELETE", f"/{OTHER}")
    assert world.connection.received == b""
    _reason, ending = world.control.endings[OURS]
    ending.callback(None)
    [answer] = world.connection.answers
    told = answer.json
    assert (answer.status, told["id"], told["deleted"]) == (200, OURS, True)
    assert told["transcript_kept"]
    assert "transcript" in told["message"]
    for method, path in (("GET", OURS), ("GET", OTHER), ("DELETE", OURS)):
        assert world.ask(method, f"/{path}").status == 404
    assert world.ask("GET", "").json["sessions"] == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/{}"),
        ("HEAD", "/{}"),
        ("DELETE", "/{}"),
        ("POST", "/{}/interrupt"),
    ],
)
@pytest.mark.parametrize(
    ("tenant", "name"),
    [
        ("bob", OURS),
        ("bob", OTHER),
        ("alice", FOREIGN),
        ("alice", "no-uuid"),
        ("alice", "..%00%0d%0a"),
        ("alice", "x" * 2000),
    ],
)
def test_what_is_not_the_keys_own_is_a_404(method: str, path: str, tenant: str, name: str) -> None:
    world = World()
    answer = world.ask(method, path.format(name), tenant)
    assert answer.status == 404
    if method != "HEAD":
        assert (answer.error["code"], answer.error["param"]) == ("session_not_found", None)
    assert (world.control.interrupts, world.control.endings) == ({}, {})
    assert world.ask("GET", f"/{OURS}").status == 200


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "", "GET, HEAD"),
        ("DELETE", "", "GET, HEAD"),
        ("POST", f"/{OURS}", "DELETE, GET, HEAD"),
        ("PUT", f"/{OURS}", "DELETE, GET, HEAD"),
        ("GET", f"/{OURS}/interrupt", "POST"),
        ("DELETE", f"/{OURS}/interrupt", "POST"),
    ],
)
def test_a_wrong_method_is_a_405_that_names_the_right_ones(
    method: str, path: str, allowed: str
) -> None:
    world = World()
    answer = world.ask(method, path)
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == allowed
    assert world.ask("GET", f"/{OURS}").status == 200


@pytest.mark.parametrize("path", ["/", f"/{OURS}/", f"/{OURS}/else", f"/{OURS}/interrupt/"])
def test_other_paths_are_a_404_that_names_these(path: str) -> None:
    answer = World().ask("GET", path)
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    assert "GET /api/sessions" in str(answer.error["message"])


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("GET", f"/{OURS}"), ("DELETE", f"/{OURS}"), ("POST", f"/{OURS}/interrupt")],
)
def test_without_a_key_nothing_is_told_or_done(method: str, path: str) -> None:
    world = World()
    answer = world.connection.request(method, f"/api/sessions{path}")
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert (world.control.interrupts, world.control.endings) == ({}, {})


def test_a_web_page_of_an_allowed_origin_may_delete() -> None:
    world = World()
    asked = {"Origin": PAGE_ORIGIN, "Access-Control-Request-Method": "DELETE"}
    answer = world.ask("OPTIONS", f"/{OURS}", **asked)
    assert answer.status == 204
    assert answer.headers["access-control-allow-origin"] == PAGE_ORIGIN
    assert "DELETE" in answer.headers["access-control-allow-methods"]


def test_without_the_store_it_is_a_500_that_says_why() -> None:
    world = World()
    result_of(world.store.close())
    for method, path in (("GET", ""), ("GET", f"/{OURS}"), ("DELETE", f"/{OURS}")):
        answer = world.ask(method, path, **{"X-Request-Id": "r-1"})
        assert (answer.status, answer.error["code"]) == (500, "internal_error")
        message = str(answer.error["message"])
        assert "memory of its sessions cannot be read or written" in message
        assert message.endswith("under this request id: r-1.")


def test_who_leaves_before_the_session_is_ended_breaks_nothing() -> None:
    world = World()
    world.send("DELETE", f"/{OURS}")
    world.connection.lose()
    world.control.endings[OURS][1].callback(None)
    assert result_of(world.store.is_deleted(OURS))
