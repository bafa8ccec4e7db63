"""The nginx example, with a real nginx between client and server."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from claude_proxy.cli.process import POLITE_WAIT
from claude_proxy.settings import load_settings
from claude_proxy.web.channel import IDLE_TIME
from claude_proxy.web.stream import HEARTBEAT
from tests.deploy.proxy import SITE, Nginx
from tests.e2e.daemon import Daemon, sse_events, wait_until
from tests.e2e.processes import children_of
from tests.integration.server import write_cli

KEY = "sk-behind-nginx-0123456789abcdef"
KEYED = {"X-Api-Key": KEY}
NOWHERE = "http://127.0.0.1:9"
TURN = {"prompt": "hi"}
WHOLE = {"prompt": "hi", "stream": False}

# Writes each further event when the test says so.
STEPS_CLI = """
message()
write(INIT)
for number in range(3):
    while not os.path.exists(os.path.join(FOLDER, "go-%d" % number)):
        time.sleep(0.01)
    write(line(type="assistant", number=number))
write(RESULT)
leave()
"""

# Is silent for some seconds, which the prompt names.
SILENT_CLI = """
seconds = float(message())
write(INIT)
time.sleep(seconds)
write(RESULT)
leave()
"""

# Tells how long the prompt was.
COUNTING_CLI = """
length = len(message())
write(INIT)
write(line(type="result", subtype="success", is_error=False, result=str(length)))
leave()
"""

# The program `twistd` with a sign of life every 0.3 s instead of 15 s.
QUICK_HEART = """
import sys
import claude_proxy.web.stream
claude_proxy.web.stream.HEARTBEAT = 0.3
from twisted.scripts.twistd import run
sys.argv[0] = "twistd"
run()
"""


@contextmanager
def server(
    folder: Path, cli: str, *, quick_heart: bool = False, **env: str | None
) -> Iterator[Daemon]:
    """The server with a key, and a CLI of the test's own."""
    own = {"CLAUDE_CLI": write_cli(folder, cli), "API_KEY": KEY, "HOST": "127.0.0.1"}
    daemon = Daemon(folder, "claude", NOWHERE, env={**own, **env})
    if quick_heart:
        daemon.argv = [sys.executable, "-c", QUICK_HEART, *daemon.argv[1:]]
    with daemon:
        yield daemon


def test_each_event_reaches_the_client_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with (
        server(tmp_path, STEPS_CLI) as daemon,
        Nginx(tmp_path / "nginx", daemon) as nginx,
        nginx.client(headers=KEYED) as client,
        client.stream("POST", "/api/claude", json=TURN) as response,
    ):
        assert response.headers["server"].startswith("nginx")
        events = sse_events(response)
        assert next(events)["subtype"] == "init"
        for number in range(3):
            # The next event is not written before the last one has been read.
            (tmp_path / f"go-{number}").touch()
            assert next(events)["number"] == number
        assert next(events)["subtype"] == "success"
        assert list(events) == []


def test_silence_longer_than_nginx_waits_is_bridged_by_signs_of_life(tmp_path: Path) -> None:
    impatient = {"proxy_read_timeout 3700s;": "proxy_read_timeout 2s;"}
    with (
        server(tmp_path, SILENT_CLI, quick_heart=True) as daemon,
        Nginx(tmp_path / "nginx", daemon, impatient) as nginx,
        nginx.client(headers=KEYED) as client,
    ):
        with client.stream("POST", "/api/claude", json={"prompt": "5"}) as response:
            assert [event["type"] for event in sse_events(response)] == ["system", "result"]
        # One answer in one piece has no signs of life: this is what the long timeout is for.
        cut = client.post("/api/claude", json={"prompt": "5", "stream": False})
        assert cut.status_code == 504
        assert cut.headers["server"].startswith("nginx")
        daemon.wait_for_record("client_gone")


def test_nginx_waits_longer_than_any_answer_takes() -> None:
    (shown,) = re.findall(r"proxy_read_timeout (\d+)s;", SITE.read_text())
    settings = load_settings({}, {"HOME": "/"}, {}, Path("/"))
    longest = settings.queue_timeout + settings.total_timeout
    assert float(shown) > longest + settings.kill_timeout + 4 * POLITE_WAIT
    assert float(shown) > HEARTBEAT


def test_nginx_lets_idle_connections_go_before_the_server_does() -> None:
    (shown,) = re.findall(r"keepalive_timeout (\d+)s;", SITE.read_text())
    assert float(shown) < IDLE_TIME / 2


@pytest.mark.parametrize("body", [TURN, WHOLE], ids=["stream", "whole"])
def test_leaving_nginx_stops_the_turn(tmp_path: Path, body: dict[str, object]) -> None:
    with (
        server(tmp_path, STEPS_CLI) as daemon,
        Nginx(tmp_path / "nginx", daemon) as nginx,
        nginx.client(headers=KEYED) as client,
    ):
        with pytest.raises(httpx.ReadTimeout):
            client.post("/api/claude", json=body, timeout=1.0)
        daemon.wait_for_record("client_gone")
        daemon.wait_for_record("turn_end", outcome="abandoned")
        wait_until(lambda: children_of(daemon.pid) == [], "no process is left")


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (401, {"json": TURN, "headers": {"X-Api-Key": "wrong"}}),
        (404, {"json": {**TURN, "session-id": "12345678-1234-1234-1234-123456789abc"}}),
        (413, {"content": b"x" * 200_000, "headers": {"Content-Type": "application/json"}}),
        (415, {"content": b"hi"}),
        (400, {"json": {"promt": "hi"}}),
    ],
)
def test_what_the_server_refuses_comes_through_unchanged(
    tmp_path: Path, status: int, request_: dict[str, object]
) -> None:
    fixed = {"X-Request-Id": "the-same", **KEYED}
    with (
        server(tmp_path, COUNTING_CLI, MAX_BODY_BYTES="100000", API_KEYS="sk-other") as daemon,
        Nginx(tmp_path / "nginx", daemon) as nginx,
        daemon.client(headers=fixed) as direct,
        nginx.client(headers=fixed) as client,
    ):
        expected = direct.post("/api/claude", **request_)  # type: ignore[arg-type]  # as above
        answer = client.post("/api/claude", **request_)  # type: ignore[arg-type]  # as above
    assert (answer.status_code, answer.content) == (expected.status_code, expected.content)
    assert answer.status_code == status
    changed = {"server", "connection", "date", "transfer-encoding", "content-length"}
    assert {n: v for n, v in expected.headers.items() if n not in changed} == {
        n: v for n, v in answer.headers.items() if n not in changed
    }


def test_what_is_too_large_for_nginx_gets_the_server_s_kind_of_answer(tmp_path: Path) -> None:
    small = {"client_max_body_size 32m;": "client_max_body_size 100k;"}
    body = json.dumps({"prompt": "x" * 200_000})
    with (
        server(tmp_path, COUNTING_CLI) as daemon,
        Nginx(tmp_path / "nginx", daemon, small) as nginx,
        nginx.client(headers={**KEYED, "Content-Type": "application/json"}) as client,
    ):
        answer = client.post("/api/claude", content=body)
    assert answer.status_code == 413
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"]["code"] == "request_too_large"
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert not daemon.records("response"), "the server has not seen it"


def test_nginx_takes_as_large_a_body_as_the_server(tmp_path: Path) -> None:
    (shown,) = re.findall(r"client_max_body_size (\d+)m;", SITE.read_text())
    most = load_settings({}, {"HOME": "/"}, {}, Path("/")).max_body_bytes
    assert int(shown) * 1024 * 1024 == most
    frame = len(json.dumps({"prompt": "", "stream": False}))
    body = json.dumps({"prompt": "x" * (most - frame), "stream": False})
    assert len(body) == most
    with (
        server(tmp_path, COUNTING_CLI) as daemon,
        Nginx(tmp_path / "nginx", daemon) as nginx,
        nginx.client(headers={**KEYED, "Content-Type": "application/json"}) as client,
    ):
        assert client.post("/api/claude", content=body).json()["result"] == str(most - frame)
        assert client.post("/api/claude", content=body + " ").status_code == 413


def test_connections_to_the_server_are_used_again(tmp_path: Path) -> None:
    with (
        server(tmp_path, COUNTING_CLI) as daemon,
        Nginx(tmp_path / "nginx", daemon) as nginx,
    ):
        for _ in range(5):
            with nginx.client(headers=KEYED) as client:
                assert client.get("/health").status_code == 200
                assert client.post("/api/claude", json=WHOLE).status_code == 200
        assert _established(daemon.port) == 1


def _established(port: int) -> int:
    """How many connections this port has, by Linux's own table."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


def test_without_keys_the_name_that_was_asked_for_still_counts(tmp_path: Path) -> None:
    with (
        server(tmp_path, COUNTING_CLI, API_KEY=None, ALLOWED_HOSTS="proxy.example.com") as daemon,
        Nginx(tmp_path / "nginx", daemon) as nginx,
        nginx.client() as client,
    ):

        def status(**headers: str) -> int:
            return client.post("/api/claude", json=WHOLE, headers=headers).status_code

        assert status(host="proxy.example.com") == 200
        assert status(host="rebound.example.com") == 403
        assert status(host="proxy.example.com", origin="https://evil.example") == 403


def test_plain_http_is_sent_on_to_https(tmp_path: Path) -> None:
    with server(tmp_path, COUNTING_CLI) as daemon, Nginx(tmp_path / "nginx", daemon) as nginx:
        answer = httpx.get(f"http://localhost:{nginx.plain_port}/health?x=1", trust_env=False)
    assert answer.status_code == 301
    assert answer.headers["location"] == "https://localhost/health?x=1"
