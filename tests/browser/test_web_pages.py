"""
Pages in a real browser, and a server that must not do what they want.

Each page tries what the web lets a page do without being asked.  What it reports does not matter
half as much as what the server did: no turn was begun, no process started, no session touched.
That the same page succeeds where the server allows it shows that it could have.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.browser.pages import Pages, Rebound
from tests.e2e.daemon import Daemon

KEY = "sk-browser-0123456789abcdef"
BODY = json.dumps({"prompt": "Say hello.", "dangerously-skip-permissions": False})
ACTS = ("request", "turn_start", "process_start")
"""Records of a server that does something for somebody."""


@contextmanager
def serving(folder: Path, **env: str) -> Iterator[Daemon]:
    """The real daemon, with the demonstration in the place of the CLI."""
    settings = {"CLAUDE_PROXY_DEMO_DELAY_MS": "20", "LOG_LEVEL": "debug", **env}
    nowhere = "http://127.0.0.1:9"
    with Daemon(folder, "claude", nowhere, env=settings, args=["--demo"]) as daemon:
        daemon.wait_for_record("cli_found")
        yield daemon


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Without a key: whoever can reach it may use it."""
    with serving(tmp_path_factory.mktemp("open")) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def closed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """With a key, and no origin allowed."""
    with serving(tmp_path_factory.mktemp("closed"), API_KEY=KEY) as daemon:
        yield daemon


@pytest.fixture(params=["open", "closed"])
def server(request: pytest.FixtureRequest) -> Daemon:
    """Both of them."""
    daemon: Daemon = request.getfixturevalue(f"{request.param}_server")
    return daemon


def acts(daemon: Daemon) -> list[str]:
    """What it did so far."""
    return [record["type"] for record in daemon.records() if record.get("type") in ACTS]


def answered(daemon: Daemon, since: int, method: str, path: str) -> list[int]:
    """The statuses of such requests after the first so many records."""
    records = daemon.records()[since:]
    return [
        record["status"]
        for record in records
        if (record.get("type"), record.get("method"), record.get("path"))
        == ("response", method, path)
    ]


def wait_answered(daemon: Daemon, since: int, method: str, path: str) -> list[int]:
    """The same, waited for: an answer that no page can read is not a sign of anything."""
    deadline = time.monotonic() + 10
    while not (found := answered(daemon, since, method, path)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found, f"{method} {path} never arrived"
    return found


# What a page of somebody else tries.

PLAIN_POST = """
  const answer = await fetch(SERVER + PATH, {method: "POST", mode: "no-cors", body: BODY,
    headers: {"Content-Type": "text/plain"}});
  return {type: answer.type, status: answer.status};
"""
BEACON = """
  navigator.sendBeacon(SERVER + PATH, new Blob([BODY], {type: "text/plain"}));
  return {};
"""
FORM = """
  const form = document.body.appendChild(document.createElement("form"));
  Object.assign(form, {action: SERVER + PATH, method: "POST", enctype: ENCTYPE});
  const field = form.appendChild(document.createElement("input"));
  Object.assign(field, {name: BODY.slice(0, -1) + ', "model": "', value: '"}'});
  setTimeout(() => form.submit(), 100);
  return {};
"""
SIMPLE = {
    "fetch": PLAIN_POST,
    "fetch without a type": PLAIN_POST.replace("text/plain", ""),
    "beacon": BEACON,
    "form as text": FORM.replace("ENCTYPE", '"text/plain"'),
    "form as usual": FORM.replace("ENCTYPE", '"application/x-www-form-urlencoded"'),
    "form as parts": FORM.replace("ENCTYPE", '"multipart/form-data"'),
}
PATHS = ["/api/claude", "/v1/chat/completions"]


def run(
    pages: Pages, daemon: Daemon, script: str, path: str = "/api/claude", **where: Any
) -> dict[str, Any]:
    """Run a page's script, in which SERVER, PATH and BODY mean this server and this request."""
    body = (
        BODY
        if path == "/api/claude"
        else json.dumps({"messages": [{"role": "user", "content": "Hello."}]})
    )
    given = {"SERVER": daemon.url, "PATH": path, "BODY": body, "KEY": KEY}
    constants = "".join(f"const {name} = {json.dumps(value)};" for name, value in given.items())
    report: dict[str, Any] = pages.run(constants + script, **where)
    return report


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("script", SIMPLE.values(), ids=SIMPLE)
def test_a_request_that_needs_no_leave_does_nothing(
    pages: Pages, server: Daemon, script: str, path: str
) -> None:
    before, since = acts(server), len(server.records())
    statuses: list[int] = []

    def arrived() -> None:
        statuses.extend(wait_answered(server, since, "POST", path))

    report = run(pages, server, script, path, after=arrived)
    assert statuses == [401 if server.environment.get("API_KEY") else 403]
    assert report in ({}, {"type": "opaque", "status": 0})
    assert acts(server) == before


JSON_POST = """
  const answer = await fetch(SERVER + PATH, {method: "POST", body: BODY,
    headers: {"Content-Type": "application/json", ...HEADERS}});
  return {status: answer.status, text: await answer.text()};
"""
WITHOUT_KEY = JSON_POST.replace("HEADERS", "{}")
WITH_KEY = JSON_POST.replace("HEADERS", "{Authorization: `Bearer ${KEY}`}")
ELSEWHERE = ["evil.test", "127.0.0.1", "localhost"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("script", [WITHOUT_KEY, WITH_KEY], ids=["without a key", "with a key"])
@pytest.mark.parametrize("host", ELSEWHERE)
def test_a_page_of_another_origin_does_not_get_past_the_preflight(
    pages: Pages, server: Daemon, script: str, path: str, host: str
) -> None:
    before, since = acts(server), len(server.records())
    assert run(pages, server, script, path, host=host) == {"failed": "TypeError"}
    assert wait_answered(server, since, "OPTIONS", path) in ([403], [204])
    assert answered(server, since, "POST", path) == []
    assert acts(server) == before


BLOB_BEACON = BEACON.replace("text/plain", "application/json")
NO_ORIGIN = """
  const frame = document.createElement("iframe");
  frame.sandbox = "allow-scripts";
  frame.srcdoc = `<script>fetch("${SERVER + PATH}", {method: "POST", mode: "no-cors",
    body: ${JSON.stringify(BODY)}}).finally(() => parent.postMessage("over", "*"))<\\/script>`;
  const over = new Promise((resolve) => window.addEventListener("message", resolve));
  document.body.append(frame);
  await over;
  return {};
"""
SOCKET = """
  const socket = new WebSocket(SERVER.replace("http", "ws") + PATH);
  return await new Promise((resolve) => {
    socket.onopen = () => resolve({opened: true});
    socket.onerror = () => resolve({opened: false});
  });
"""


def test_a_beacon_that_needs_leave_gets_none(pages: Pages, server: Daemon) -> None:
    before, since = acts(server), len(server.records())
    run(pages, server, BLOB_BEACON)
    wait_answered(server, since, "OPTIONS", "/api/claude")
    assert answered(server, since, "POST", "/api/claude") == []
    assert acts(server) == before


def test_a_page_without_an_origin_is_a_stranger_too(pages: Pages, server: Daemon) -> None:
    before, since = acts(server), len(server.records())
    run(pages, server, NO_ORIGIN)
    assert wait_answered(server, since, "POST", "/api/claude")[0] in (401, 403)
    assert acts(server) == before


def test_there_is_no_web_socket(pages: Pages, server: Daemon) -> None:
    before = acts(server)
    assert run(pages, server, SOCKET) == {"opened": False}
    assert acts(server) == before


# What a page can get without a leave, by tags and events.

READ = """
  const answer = await fetch(SERVER + PATH);
  return {text: await answer.text()};
"""
EVENTS = """
  const source = new EventSource(SERVER + PATH);
  return await new Promise((resolve) => {
    source.onmessage = (event) => resolve({data: event.data});
    source.onerror = () => { source.close(); resolve({failed: "error"}); };
  });
"""
SCRIPT_TAG = """
  const tag = document.createElement("script");
  tag.src = SERVER + PATH;
  const over = new Promise((resolve) => {
    tag.onload = () => resolve({loaded: true});
    tag.onerror = () => resolve({failed: "error"});
  });
  document.body.append(tag);
  return await over;
"""


@pytest.mark.parametrize("script", [READ, EVENTS, SCRIPT_TAG], ids=["fetch", "events", "script"])
@pytest.mark.parametrize("path", ["/api/sessions", "/v1/models", "/health", "/api/claude"])
def test_a_page_can_read_nothing(pages: Pages, server: Daemon, script: str, path: str) -> None:
    before = acts(server)
    assert run(pages, server, script, path) in ({"failed": "TypeError"}, {"failed": "error"})
    assert acts(server) == before


def test_a_page_cannot_delete_a_session(pages: Pages, open_server: Daemon) -> None:
    with open_server.client() as client:
        session = client.post("/api/claude", json={"prompt": "Hello."}).headers[
            "x-claude-session-id"
        ]
        path = f"/api/sessions/{session}"
        delete = 'await fetch(SERVER + PATH, {method: "DELETE"}); return {done: true};'
        assert run(pages, open_server, delete, path) == {"failed": "TypeError"}
        assert client.get(path).json()["id"] == session


# A name that is rebound: for the browser, the page and the server have one origin.

REBOUND = """
  await fetch("/flip");
  const told = {};
  for (const path of ["/api/sessions", "/v1/models", "/health"]) {
    told[path] = (await fetch(path)).status;
  }
  const headers = {"Content-Type": "application/json"};
  const answer = await fetch(PATH, {method: "POST", body: BODY, headers});
  told[PATH] = answer.status;
  await answer.text();
  return told;
"""


def test_a_rebound_host_is_not_answered(pages: Pages, open_server: Daemon) -> None:
    before = acts(open_server)
    with Rebound(pages.port, open_server.port) as host:
        told = run(pages, open_server, REBOUND, port=host.port)
    assert told == dict.fromkeys(["/api/sessions", "/v1/models", "/health", "/api/claude"], 403)
    assert acts(open_server) == before


def test_a_rebound_host_has_no_key(pages: Pages, closed_server: Daemon) -> None:
    before = acts(closed_server)
    with Rebound(pages.port, closed_server.port) as host:
        told = run(pages, closed_server, REBOUND, port=host.port)
    # Health is for everybody.
    assert told.pop("/health") == 200
    assert set(told.values()) == {401}
    assert acts(closed_server) == before


def test_the_same_page_would_act_under_a_name_that_is_allowed(pages: Pages, tmp_path: Path) -> None:
    with Rebound(pages.port) as host:
        origin = f"http://evil.test:{host.port}"
        with serving(tmp_path, ALLOWED_HOSTS="evil.test", CORS_ORIGINS=origin) as daemon:
            host.then(daemon.port)
            told = run(pages, daemon, REBOUND, port=host.port)
            assert told["/api/claude"] == 200
            assert "turn_start" in acts(daemon)


# What is allowed.

STREAM = """
  const headers = {"Content-Type": "application/json", ...HEADERS};
  const answer = await fetch(SERVER + PATH, {method: "POST", body: BODY, headers});
  const reader = answer.body.getReader();
  const pieces = [];
  for (let piece; !(piece = await reader.read()).done;) {
    pieces.push(new TextDecoder().decode(piece.value));
  }
  const session = answer.headers.get("X-Claude-Session-Id");
  const gone = session && await fetch(`${SERVER}/api/sessions/${session}`,
    {method: "DELETE", headers: HEADERS});
  return {status: answer.status, pieces: pieces.length, text: pieces.join(""), session,
    request: answer.headers.get("X-Request-Id"), gone: gone && gone.status};
"""
STREAM_WITH_KEY = STREAM.replace("...HEADERS", "...keyed").replace("HEADERS", "keyed")


def is_whole_turn(report: dict[str, Any]) -> bool:
    events = [line for line in report["text"].splitlines() if line.startswith("data: ")]
    succeeded = json.loads(events[-1][6:])["subtype"] == "success"
    return bool(succeeded and report["pieces"] > 2)


@pytest.mark.parametrize("origins", ["listed", "*"])
def test_a_page_of_an_allowed_origin_streams_with_its_key(
    pages: Pages, tmp_path: Path, origins: str
) -> None:
    allowed = pages.origin("chat.test") if origins == "listed" else "*"
    keyed = "const keyed = {Authorization: `Bearer ${KEY}`};"
    with serving(tmp_path, API_KEY=KEY, CORS_ORIGINS=allowed) as daemon:
        report = run(pages, daemon, keyed + STREAM_WITH_KEY, host="chat.test")
        assert is_whole_turn(report)
        assert report["session"]
        assert report["request"]
        assert report["gone"] == 200
        # The page still needs the key.
        nothing = run(pages, daemon, WITHOUT_KEY, host="chat.test")
        assert nothing["status"] == 401
        assert acts(daemon).count("turn_start") == 1


def test_without_keys_only_the_listed_origin_is_let_in(pages: Pages, tmp_path: Path) -> None:
    allowed = pages.origin("chat.test")
    with serving(tmp_path, CORS_ORIGINS=allowed) as daemon:
        none = "const none = {};"
        script = none + STREAM.replace("...HEADERS", "...none").replace("HEADERS", "none")
        assert is_whole_turn(run(pages, daemon, script, host="chat.test"))
        before = acts(daemon)
        for host in ELSEWHERE:
            assert run(pages, daemon, script, host=host) == {"failed": "TypeError"}
        assert acts(daemon) == before
