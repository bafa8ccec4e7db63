"""What Prometheus reads of a server that really works: sockets, processes, times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.daemon import Daemon
from tests.e2e.processes import wait_until
from tests.integration.server import Running, in_thread, serving, until
from tests.scrape import figures_in, promtool
from tests.support import in_reactor

CLI = """
def user():
    for text in sys.stdin:
        event = json.loads(text)
        if event["type"] == "user":
            return event
    return None


def interrupted():
    for text in sys.stdin:
        if json.loads(text).get("request", {}).get("subtype") == "interrupt":
            return True
    return False


def result(turns, **fields):
    usage = {"input_tokens": 100, "output_tokens": 50, "cache_read_input_tokens": 3000,
             "cache_creation_input_tokens": 400}
    end = {"subtype": "success", "is_error": False, "result": "done", "usage": usage,
           "total_cost_usd": 0.25 * turns, **fields}
    write(line(type="result", **end))


turns = 0
while (event := user()) is not None:
    turns += 1
    write(INIT + json.dumps({**event, "session_id": SESSION, "isReplay": True}).encode() + b"\\n")
    word = event["message"]["content"]
    if word == "die":
        sys.exit(3)
    if word == "stay":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        tell("stays", SESSION)
        while True:
            time.sleep(60)
    write(line(type="assistant", message={"id": "m", "content": [{"type": "text", "text": "hi"}]}))
    if word == "hang":
        tell("hangs", SESSION)
        if not interrupted():
            sys.exit(0)
        result(turns, subtype="error_during_execution", is_error=True, usage={}, errors=["stop"])
    elif word == "fail":
        result(turns, is_error=True, result="Overloaded", api_error_status=529)
    else:
        result(turns)
"""


def client(server: Running) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=20, trust_env=False)


async def ask(server: Running, word: str, **fields: Any) -> httpx.Response:
    """A turn, from its beginning to its end."""

    def post() -> httpx.Response:
        with client(server) as own:
            return own.post("/api/claude", json={"prompt": word, **fields})

    return await in_thread(post)


async def scrape(server: Running) -> dict[str, float]:
    """The figures; checked by Prometheus's own tool."""

    def get() -> bytes:
        with client(server) as own:
            answer = own.get("/metrics")
        assert answer.status_code == 200
        promtool("check", "metrics", given=answer.content)
        return answer.content

    return {
        name.removeprefix("claude_proxy_"): value
        for name, value in figures_in(await in_thread(get)).items()
    }


def session_of(answer: httpx.Response) -> str:
    return answer.headers["x-claude-session-id"]


@in_reactor
async def test_each_end_of_a_turn_is_counted_as_what_it_was(tmp_path: Path) -> None:
    async with serving(tmp_path, CLI) as server:
        assert (await ask(server, "succeed")).status_code == 200
        assert (await ask(server, "fail", stream=False)).status_code == 503
        assert (await ask(server, "die", stream=False)).status_code == 502
        assert (await ask(server, "go", workspace="../x")).status_code == 400
        with server.connect() as leaving:
            leaving.sendall(request("hang"))
            await until(lambda: server.told("hangs"), "the turn runs")
        await until(lambda: server.is_idle, "the turn is over")
        figures = await scrape(server)
    outcomes = ("success", "upstream_overloaded", "cli_failed", "invalid_value", "abandoned")
    for outcome in outcomes:
        assert figures[f'turns_total{{outcome="{outcome}"}}'] == 1, outcome
        assert figures[f'turn_duration_seconds_count{{outcome="{outcome}"}}'] == 1, outcome
    # Only two had a result, and one was refused before it had a process.
    assert figures['tokens_total{kind="input"}'] == 200
    assert figures['tokens_total{kind="output"}'] == 100
    assert figures['tokens_total{kind="cache_read"}'] == 6000
    assert figures['tokens_total{kind="cache_creation"}'] == 800
    assert figures["cost_dollars_total"] == 0.5
    assert figures['turn_starts_total{process="new"}'] == 4
    assert figures['turn_first_token_seconds_count{process="new"}'] == 3
    assert figures['process_starts_total{purpose="turn"}'] == 4
    assert sum(n for name, n in figures.items() if name.startswith("process_exits_total")) == 4
    assert figures['process_exits_total{ending="failure"}'] == 1
    assert figures["turns_running"] == figures["live_sessions"] == 0
    for status, count in {"200": 2, "400": 1, "502": 1, "503": 1}.items():
        labels = f'dialect="native",route="/api/claude",status="{status}"'
        assert figures[f"http_requests_total{{{labels}}}"] == count, status
    assert figures['http_requests_cut_total{dialect="native",route="/api/claude"}'] == 1
    assert figures["http_connections"] == 1
    assert figures["internal_errors_total"] == 0


def request(word: str, session: str | None = None) -> bytes:
    """The bytes of a request for a turn."""
    fields = {"prompt": word} if session is None else {"prompt": word, "session-id": session}
    body = json.dumps(fields).encode()
    head = "POST /api/claude HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@in_reactor
async def test_an_interrupted_turn_is_counted_and_so_is_what_waited_for_it(tmp_path: Path) -> None:
    async with serving(tmp_path, CLI, MAX_CONCURRENT_TURNS="1") as server:
        with server.connect() as first, server.connect() as same, server.connect() as other:
            first.sendall(request("hang"))
            session = await until(lambda: server.told("hangs"), "the turn runs")
            same.sendall(request("go", session))
            other.sendall(request("go"))
            waiting = server.executor.context.waiting_room
            await until(lambda: waiting.waiting == 2, "two wait")
            figures = await scrape(server)
            assert figures['turns_queued{line="session"}'] == 1
            assert figures['turns_queued{line="slot"}'] == 1
            assert figures["turns_running"] == figures["turn_slots"] == 1
            assert figures['queue_wait_seconds_count{line="slot"}'] == 0

            def interrupt() -> Any:
                with client(server) as own:
                    return own.post(f"/api/sessions/{session}/interrupt").json()["interrupted"]

            assert await in_thread(interrupt) is True
            await until(lambda: server.is_idle, "all are over")
        figures = await scrape(server)
    assert figures["interrupts_total"] == 1
    assert figures['turns_total{outcome="cli_failed"}'] == 1
    assert figures['turns_total{outcome="success"}'] == 2
    # Who had waited for the session then waited for the slot, or got it at once.
    assert figures['queue_wait_seconds_count{line="session"}'] == 1
    assert figures['queue_wait_seconds_count{line="slot"}'] in (1, 2)
    assert figures['queue_wait_seconds_sum{line="session"}'] > 0
    assert figures["turns_running"] == figures['turns_queued{line="session"}'] == 0
    labels = 'dialect="native",route="/api/sessions/ID/interrupt",status="200"'
    assert figures[f"http_requests_total{{{labels}}}"] == 1


@in_reactor
async def test_a_live_process_is_counted_once_and_its_cost_by_turn(tmp_path: Path) -> None:
    async with serving(tmp_path, CLI, LIVE_SESSIONS="2") as server:
        session = session_of(await ask(server, "one"))
        for word in ("two", "three"):
            assert session_of(await ask(server, word, **{"session-id": session})) == session
        figures = await scrape(server)
    assert figures['process_starts_total{purpose="turn"}'] == 1
    assert figures['turn_starts_total{process="new"}'] == 1
    assert figures['turn_starts_total{process="live"}'] == 2
    assert figures['turn_first_token_seconds_count{process="live"}'] == 2
    assert figures["live_sessions"] == 1
    assert figures['process_exits_total{ending="success"}'] == 0
    # The CLI counts for the process, the server for the turn.
    assert figures["cost_dollars_total"] == 0.75
    assert figures['tokens_total{kind="output"}'] == 150


@in_reactor
async def test_a_spare_is_counted_when_it_starts_and_when_it_is_used(tmp_path: Path) -> None:
    variables = {"LIVE_SESSIONS": "2", "SPARE_PROCESSES": "1", "HOME": str(tmp_path)}
    async with serving(tmp_path, CLI, **variables) as server:
        await ask(server, "one")
        spares = server.executor.context.spares
        await until(lambda: spares.waiting == 1, "a spare waits")
        assert (await scrape(server))["spare_processes"] == 1
        await ask(server, "two")
        figures = await scrape(server)
    assert figures['process_starts_total{purpose="turn"}'] == 1
    assert figures['process_starts_total{purpose="spare"}'] == 1
    assert figures['turn_starts_total{process="new"}'] == 1
    assert figures['turn_starts_total{process="spare"}'] == 1
    assert figures['turn_first_token_seconds_count{process="spare"}'] == 1
    assert figures["spare_processes"] == 0
    assert figures["live_sessions"] == 2


@in_reactor
async def test_signals_are_counted_by_their_names(tmp_path: Path) -> None:
    async with serving(tmp_path, CLI, PROCESS_KILL_TIMEOUT_MS="100") as server:
        with server.connect() as leaving:
            leaving.sendall(request("stay"))
            await until(lambda: server.told("stays"), "the turn runs")
        await until(lambda: server.is_idle, "the process is gone")
        figures = await scrape(server)
    assert figures['process_signals_total{signal="SIGTERM"}'] == 1
    assert figures['process_signals_total{signal="SIGKILL"}'] == 1
    assert figures['process_exits_total{ending="signal"}'] == 1
    assert figures['turns_total{outcome="abandoned"}'] == 1


@pytest.mark.parametrize("level", ["error", "debug"])
def test_the_level_of_the_log_changes_no_figure(tmp_path: Path, level: str) -> None:
    path = tmp_path / "socket"
    env = {
        "API_KEY": "sk-0123456789abcdef",
        "CLAUDE_PROXY_DEMO_DELAY_MS": "0",
        "LISTEN": f"unix:{path}",
        "LOG_LEVEL": level,
    }
    key = {"x-api-key": env["API_KEY"]}
    daemon = Daemon(tmp_path, "claude", "http://127.0.0.1:9", env=env, args=["--demo"])
    daemon.start()
    try:
        wait_until(path.exists, "it listens")
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(base_url="http://localhost", transport=transport, timeout=20) as client:
            assert client.get("/metrics").status_code == 401
            body = {"prompt": "hi", "stream": False}
            told = client.post("/api/claude", json=body, headers=key).json()
            figures = figures_in(client.get("/metrics", headers=key).content)
    finally:
        daemon.stop()
    assert bool(daemon.records("turn_end")) == (level == "debug")
    assert figures['claude_proxy_turns_total{outcome="success"}'] == 1
    assert figures['claude_proxy_turn_starts_total{process="new"}'] == 1
    output = figures['claude_proxy_tokens_total{kind="output"}']
    assert output == told["usage"]["output_tokens"] > 0
    count = 'claude_proxy_http_requests_total{{dialect="{}",route="{}",status="{}"}}'
    assert figures[count.format("none", "/metrics", "401")] == 1
    assert figures[count.format("native", "/api/claude", "200")] == 1
