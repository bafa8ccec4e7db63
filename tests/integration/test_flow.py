"""What flows through the whole server: real sockets, real children."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from http.client import HTTPResponse
from pathlib import Path

import pytest

from claude_proxy.cli.process import AgentProcess
from claude_proxy.web.request import ProxyRequest
from tests.integration.server import (
    Running,
    in_thread,
    is_alive,
    pause,
    serving,
    turn,
    until,
)
from tests.support import Answer, in_reactor, parse_answers

MIB = 1024 * 1024

KEY = "sk-alice-0123456789"


def resident_bytes() -> int:
    """The memory of this process, which is the server's."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def read_all(client: socket.socket) -> bytes:
    """Everything up to the end of the connection."""
    received = b""
    while data := client.recv(65536):
        received += data
    return received


def read_answers(client: socket.socket, count: int) -> list[Answer]:
    """So many whole answers on one connection."""
    received = b""
    while True:
        data = client.recv(65536)
        received += data
        whole_heads = received.rpartition(b"\r\n\r\n")[1]
        answers = parse_answers(received, closed=not data) if whole_heads else []
        if [answer.complete for answer in answers] == [True] * count or not data:
            return answers


async def ask(server: Running, request: bytes) -> Answer:
    """One request on a connection of its own."""
    with server.connect() as client:
        client.sendall(request)
        [answer] = await in_thread(read_answers, client, 1)
    return answer


# Flow control.

ENDLESS = """
message()
write(INIT)
block = line(type="assistant", text="x" * 16000)
for count in range(20000):
    write(block)
    tell("written", len(block) * count)
write(RESULT)
leave()
"""


@in_reactor
async def test_a_client_that_reads_nothing_holds_up_the_child_and_is_let_go(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, ENDLESS, CLIENT_STALL_TIMEOUT_MS="3000") as server:
        before = resident_bytes()
        with server.connect(receive_buffer=4096) as client:
            client.sendall(turn())
            await until(lambda: server.told("written"), "the child writes")
            written = -1
            while int(server.told("written")) != written:
                written = int(server.told("written"))
                await pause(0.4)
            # What the kernel takes for the socket, the pipe, and one read of ours: no more.
            assert written < 16 * MIB
            assert resident_bytes() - before < 16 * MIB
            pid = int(server.told("pid"))
            assert is_alive(pid)
            await until(lambda: not is_alive(pid), "the process is gone")
            assert resident_bytes() - before < 16 * MIB
            await until(lambda: server.is_idle, "nothing is held")
            with pytest.raises(ConnectionResetError):
                await in_thread(read_all, client)


STEADY = """
message()
events = [INIT, line(type="assistant", text="y" * 2_000_000)]
events += [line(type="assistant", number=n, text="z" * 1000) for n in range(20000)]
events += [RESULT]
expected = hashlib.sha256()
for event in events:
    expected.update(b"data: " + event + b"\\n")
tell("expected", expected.hexdigest())
for event in events:
    write(event)
leave()
"""


def read_slowly(client: socket.socket) -> tuple[str, int]:
    """The hash of the body, and its length; starts late and takes its time."""
    time.sleep(2)
    response = HTTPResponse(client)
    response.begin()
    assert response.status == 200
    digest, length = hashlib.sha256(), 0
    while data := response.read(128 * 1024):
        digest.update(data)
        length += len(data)
        time.sleep(0.01)
    return digest.hexdigest(), length


@in_reactor
async def test_a_slow_but_steady_client_gets_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[AgentProcess] = []
    pause_agent = AgentProcess.pause

    def count(agent: AgentProcess) -> None:
        pauses.append(agent)
        pause_agent(agent)

    monkeypatch.setattr(AgentProcess, "pause", count)
    # The client's silence at first is not the CLI's.
    async with serving(tmp_path, STEADY, CLAUDE_INACTIVITY_TIMEOUT_MS="1000") as server:
        with server.connect() as client:
            client.sendall(turn())
            digest, length = await in_thread(read_slowly, client)
        assert length > 22_000_000
        assert digest == server.told("expected")
        assert len(pauses) > 3
        await until(lambda: server.is_idle, "nothing is held")


BATCHES = """
message()
write(INIT)
for round in range(5):
    time.sleep(0.05)
    os.write(1, line(type="assistant", text="hi") * 40)
time.sleep(0.05)
write(RESULT)
leave()
"""


@in_reactor
async def test_what_arrives_together_is_written_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[bytes] = []
    batches: list[bytes] = []
    write_request, receive = ProxyRequest.write, AgentProcess.outReceived

    def write(request: ProxyRequest, data: bytes) -> None:
        writes.append(data)
        write_request(request, data)

    def out_received(agent: AgentProcess, data: bytes) -> None:
        batches.append(data)
        receive(agent, data)

    monkeypatch.setattr(ProxyRequest, "write", write)
    monkeypatch.setattr(AgentProcess, "outReceived", out_received)
    async with serving(tmp_path, BATCHES) as server:
        answer = await ask(server, turn())
    assert answer.body.count(b"data: ") == 5 * 40 + 2
    assert len(writes) <= len(batches) < 40
    assert max(data.count(b"data: ") for data in writes) >= 40


# Clients that leave.

LEAVING_FAMILY = """
message()
nap = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(300)"]
children = [
    subprocess.Popen(nap, stdout=subprocess.DEVNULL),
    subprocess.Popen(nap, stdout=subprocess.DEVNULL, start_new_session=True),
    subprocess.Popen(nap, start_new_session=True),
]
if "--resume" not in OPTIONS:
    STUBBORN
    write(INIT)
    tell("family", " ".join(str(child.pid) for child in children))
    while True:
        write(line(type="assistant", text="more"))
        time.sleep(0.01)
write(INIT + RESULT)
leave()
"""
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


@in_reactor
@pytest.mark.parametrize("stubborn", [STUBBORN, "pass"])
async def test_when_the_client_leaves_nothing_is_left_of_its_turn(
    tmp_path: Path, stubborn: str
) -> None:
    body = LEAVING_FAMILY.replace("STUBBORN", stubborn)
    async with serving(tmp_path, body) as server:
        with server.connect() as client:
            client.sendall(turn())
            await until(lambda: server.told("family"), "the turn runs")
            head = await in_thread(client.recv, 65536)
        session = head.partition(b"X-Claude-Session-Id: ")[2].partition(b"\r\n")[0].decode()
        family = [int(pid) for pid in (server.told("pid") + " " + server.told("family")).split()]
        assert len(family) == 4
        await until(lambda: not any(map(is_alive, family)), "all of them are gone")
        await until(lambda: server.is_idle, "the lease is released")
        again = await ask(server, turn(session))
        assert b'"result"' in again.body
        assert again.headers["x-claude-session-id"] == session


# Requests of all kinds.

SHORT = """
message()
write(INIT + RESULT)
leave()
"""


@in_reactor
async def test_a_refusal_comes_before_the_body(tmp_path: Path) -> None:
    async with serving(tmp_path, SHORT, API_KEY=KEY) as server:
        head = (
            b"POST /api/claude HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer wrong\r\n"
            b"Content-Type: application/json\r\nContent-Length: 50000000\r\n"
        )
        for extra in (b"", b"Expect: 100-continue\r\n"):
            with server.connect() as client:
                client.sendall(head + extra + b"\r\n")
                [answer] = await in_thread(read_answers, client, 1)
                assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")


@in_reactor
async def test_a_client_that_sends_on_can_still_read_why_it_was_refused(tmp_path: Path) -> None:
    def send_and_read(client: socket.socket) -> bytes:
        client.sendall(b"x" * (3 * MIB))
        return read_all(client)

    async with serving(tmp_path, SHORT, MAX_BODY_BYTES="1024") as server:
        with server.connect() as client:
            client.sendall(
                b"POST /api/claude HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 3145728\r\n\r\n"
            )
            [answer] = parse_answers(await in_thread(send_and_read, client))
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")


@in_reactor
async def test_a_chunked_body_over_the_limit_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, SHORT, MAX_BODY_BYTES="1024") as server:
        answer = await ask(
            server,
            b"POST /api/claude HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n800\r\n" + b" " * 2048 + b"\r\n",
        )
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")


@in_reactor
async def test_a_chunked_body_within_the_limit_is_taken(tmp_path: Path) -> None:
    async with serving(tmp_path, SHORT) as server:
        answer = await ask(
            server,
            b"POST /api/claude HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b'Transfer-Encoding: chunked\r\n\r\nf\r\n{"prompt":"go"}\r\n0\r\n\r\n',
        )
        assert answer.status == 200
        assert answer.body.count(b"data: ") == 2


@in_reactor
async def test_pipelined_requests_are_answered_in_order(tmp_path: Path) -> None:
    async with serving(tmp_path, SHORT) as server:
        health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with server.connect() as client:
            client.sendall(turn() + health + turn())
            first, second, third = await in_thread(read_answers, client, 3)
        assert first.headers["content-type"] == "text/event-stream"
        assert second.json["status"] == "healthy"
        assert third.body.count(b"data: ") == 2
        one, other = (a.headers["x-claude-session-id"] for a in (first, third))
        assert one != other


@in_reactor
async def test_an_http_1_0_client_gets_its_stream_unchunked(tmp_path: Path) -> None:
    async with serving(tmp_path, SHORT) as server:
        with server.connect() as client:
            client.sendall(turn(version="1.0"))
            received = await in_thread(read_all, client)
        [answer] = parse_answers(received, closed=True)
        assert answer.status == 200
        assert "transfer-encoding" not in answer.headers
        events = [json.loads(part) for part in answer.body.split(b"data: ")[1:]]
        assert [event["type"] for event in events] == ["system", "result"]


# Two turns on one session.

SLOW_TO_LEAVE = """
append("log", "start")
message()
write(INIT)
time.sleep(0.1)
write(RESULT)
for _ in sys.stdin:
    pass
time.sleep(0.3)
append("log", "end")
"""


@in_reactor
async def test_two_turns_on_one_session_never_run_at_once(tmp_path: Path) -> None:
    async with serving(tmp_path, SLOW_TO_LEAVE) as server:
        session = (await ask(server, turn())).headers["x-claude-session-id"]
        with server.connect() as one, server.connect() as other:
            one.sendall(turn(session))
            other.sendall(turn(session))
            answers = [await in_thread(read_answers, client, 1) for client in (one, other)]
        assert [answer.status for [answer] in answers] == [200, 200]
        await until(lambda: server.is_idle, "all is over")
        assert server.told("log").split() == ["start", "end"] * 3
