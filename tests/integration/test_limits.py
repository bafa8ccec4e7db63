"""
Limits at the edge, on real sockets: who exceeds one is refused, whoever is beside it is served.

Times are shortened; the sizes are the true ones unless a test says otherwise.
"""

from __future__ import annotations

import json
import resource
import select
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher
from zope.interface import provider

from claude_proxy.web import channel, request
from claude_proxy.web.bodies import SMALL_BODY
from claude_proxy.web.guesses import FORGIVEN
from tests.certificates import make_certificate
from tests.e2e.daemon import Daemon, wait_until
from tests.integration.server import Running, in_thread, serving, turn, until, write_cli
from tests.support import Answer, encode_request, in_reactor, parse_answers

KEY = "sk-alice-0123456789"
JSON = {"Content-Type": "application/json"}

CLI = """
text = message()
if text == "wait":
    append("waiting", SESSION)
    while not os.path.exists(os.path.join(FOLDER, "go")):
        time.sleep(0.02)
write(INIT + RESULT)
leave()
"""
"""Answers; or waits for the test's word."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody wait long."""
    monkeypatch.setattr(channel, "LINGER", 0.3)
    monkeypatch.setattr(request, "LINGER", 0.3)


@pytest.fixture
def logged() -> Iterator[list[LogEvent]]:
    """What is logged meanwhile; there may be no failure that nobody took."""
    events: list[LogEvent] = []

    @provider(ILogObserver)
    def note(event: LogEvent) -> None:
        events.append(event)

    globalLogPublisher.addObserver(note)
    yield events
    globalLogPublisher.removeObserver(note)
    assert not [event for event in events if "log_failure" in event]


def read_all(client: socket.socket) -> bytes:
    """What comes, to the end, however that comes."""
    received = b""
    with suppress(ConnectionResetError):
        while data := client.recv(65536):
            received += data
    return received


def reasons(events: list[LogEvent]) -> list[str]:
    return [event["reason"] for event in events if event.get("type") == "connection_closed"]


def waiting_turn(key: str | None = None) -> bytes:
    return turn(key=key, prompt="wait")


def exchange(server: Running, request: bytes) -> tuple[Answer, float]:
    """A request on a connection of its own; its answer, and the seconds that it took."""
    begun = time.monotonic()
    with server.connect() as client:
        client.sendall(request)
        [answer] = parse_answers(read_all(client), closed=True)
    return answer, time.monotonic() - begun


async def served(server: Running, key: str | None = None) -> float:
    """Have a turn done; the seconds that it took."""
    answer, seconds = await in_thread(exchange, server, turn(key=key, version="1.0"))
    assert answer.status == 200, answer.body
    assert b'"result":' in answer.body.replace(b'": ', b'":')
    return seconds


@asynccontextmanager
async def many(server: Running, count: int, sent: bytes) -> AsyncIterator[list[socket.socket]]:
    """So many clients that send the same, and no more; without those that are cut off at once."""
    with ExitStack() as stack:

        def connect() -> list[socket.socket]:
            try:
                client = stack.enter_context(server.connect())
            except ConnectionResetError:
                return []
            with suppress(ConnectionError):
                client.sendall(sent)
            return [client]

        yield [client for _ in range(count) for client in await in_thread(connect)]


def answered(clients: list[socket.socket]) -> list[socket.socket]:
    """Those for whom there is something to read."""
    return select.select(clients, [], [], 0)[0]


def is_over(client: socket.socket) -> bool:
    """Whether the server has ended a connection; what it said before is thrown away."""
    client.setblocking(False)
    try:
        while client.recv(65536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    finally:
        client.settimeout(20)
    return True


# Heads that do not end.


@in_reactor
async def test_heads_that_trickle_in_keep_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[LogEvent]
) -> None:
    monkeypatch.setattr(channel, "HEAD_TIME", 1.0)

    def trickle(clients: list[socket.socket], begun: float) -> None:
        while time.monotonic() - begun < 0.7:
            time.sleep(0.05)
            for client in clients:
                with suppress(OSError):
                    client.sendall(b"a")

    async with serving(tmp_path, CLI, MAX_CONNECTIONS="20") as server:
        begun = time.monotonic()
        async with many(server, 60, b"GET / HTTP/1.1\r\nX: ") as clients:
            trickling = in_thread(trickle, clients, begun)
            for _ in range(3):
                assert await served(server) < 2
            await trickling
            answers = [parse_answers(await in_thread(read_all, c)) for c in clients]
        assert time.monotonic() - begun < 4
    told = [(a.status, a.error["code"]) for [a] in answers]
    assert set(told) == {(408, "request_timeout"), (429, "server_busy")}
    assert told.count((408, "request_timeout")) <= 20
    assert reasons(logged).count("request_timeout") == told.count((408, "request_timeout"))
    assert reasons(logged).count("server_busy") == told.count((429, "server_busy"))


@in_reactor
async def test_a_handshake_that_does_not_end_is_cut_off_and_tls_is_told_in_json_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[LogEvent]
) -> None:
    monkeypatch.setattr(channel, "HEAD_TIME", 0.7)
    certificate = make_certificate(tmp_path)
    listen = f"ssl:0:interface=127.0.0.1:privateKey={certificate.key}:certKey={certificate.chain}"

    def ask(server: Running, sent: bytes) -> bytes:
        trust = certificate.trusted()
        with (
            server.connect() as plain,
            trust.wrap_socket(plain, server_hostname="localhost") as client,
        ):
            client.sendall(sent)
            with suppress(ssl.SSLError):
                return read_all(client)
        return b""

    async with serving(tmp_path, CLI, LISTEN=listen, MAX_CONNECTIONS="10") as server:
        async with many(server, 30, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03") as clients:
            [answer] = parse_answers(await in_thread(ask, server, turn(version="1.0")), closed=True)
            assert answer.status == 200
            for client in clients:
                await until(lambda c=client: is_over(c), "it is cut off")  # type: ignore[misc]
        for sent, status in (
            (b"nonsense\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nX: " + b"x" * 40_000 + b"\r\n\r\n", 431),
            (b"GET / HTTP/1.1\r\n", 408),
        ):
            [answer] = parse_answers(await in_thread(ask, server, sent))
            assert (answer.status, answer.complete) == (status, True)
    assert {"idle", "gives way", "malformed_request"} <= set(reasons(logged))


@in_reactor
async def test_a_head_that_is_too_large_is_told_so_though_more_of_it_is_under_way(
    tmp_path: Path, logged: list[LogEvent]
) -> None:
    async with serving(tmp_path, CLI) as server:
        for head in (b"X: " + b"x" * 1_000_000, b"X: x\r\n" * 200_000):
            answer, seconds = await in_thread(exchange, server, b"GET / HTTP/1.1\r\n" + head)
            assert (answer.status, answer.error["code"]) == (431, "head_too_large")
            assert seconds < 2
        await served(server)
    assert reasons(logged) == ["head_too_large"] * 2


# Connections.


@in_reactor
async def test_connections_that_ask_nothing_keep_nobody_out(
    tmp_path: Path, logged: list[LogEvent]
) -> None:
    async with (
        serving(tmp_path, CLI, MAX_CONNECTIONS="10") as server,
        many(server, 1, encode_request("GET", "/health")) as [resting],
        many(server, 200, b"") as clients,
    ):
        assert b"200 OK" in await in_thread(resting.recv, 65536)
        for _ in range(3):
            assert await served(server) < 2
        assert not is_over(resting), "strangers go first"
        over = [client for client in clients if is_over(client)]
        assert len(over) >= 190
    assert reasons(logged).count("gives way") >= 190


@in_reactor
async def test_bodies_that_trickle_in_keep_nobody_out(
    tmp_path: Path, logged: list[LogEvent]
) -> None:
    head = encode_request("POST", "/api/claude", {**JSON, "Content-Length": "1000"}, b"{")
    async with (
        serving(tmp_path, CLI, MAX_CONNECTIONS="10") as server,
        many(server, 40, head) as clients,
    ):
        for _ in range(3):
            assert await served(server) < 2
        [answer] = parse_answers(await in_thread(read_all, clients[0]))
    assert (answer.status, answer.error["code"]) == (429, "server_busy")
    assert answer.headers["retry-after"] == "5"
    refusals = [event for event in logged if event.get("type") == "request_failed"]
    assert {event["code"] for event in refusals} == {"server_busy"}


@in_reactor
async def test_where_all_connections_are_busy_newcomers_are_told_and_turns_go_on(
    tmp_path: Path, logged: list[LogEvent]
) -> None:
    async with serving(tmp_path, CLI, MAX_CONNECTIONS="3") as server:
        async with many(server, 3, waiting_turn()) as busy:
            await until(lambda: server.told("waiting").count("\n") == 2, "all are at work")
            # With a body that is larger than what the kernel holds, too.
            for body in (b"", b"x" * 5_000_000):
                request = encode_request("POST", "/", {"Content-Length": str(len(body))}, body)
                answer, seconds = await in_thread(exchange, server, request)
                assert (answer.status, answer.error["code"]) == (429, "server_busy")
                assert answer.headers["retry-after"] == "5"
                assert "MAX_CONNECTIONS" in str(answer.error["message"])
                assert seconds < 2
            async with many(server, 100, b"GET / HTTP/1.1\r\n\r\n") as crowd:
                for client in crowd:
                    received = await in_thread(read_all, client)
                    assert received == b"" or b"server_busy" in received
            (server.folder / "go").touch()
            for client in busy:
                received = b""
                while not received.endswith(b"0\r\n\r\n"):
                    received += await in_thread(client.recv, 65536)
                assert received.count(b"data: ") == 2
        await until(lambda: server.is_idle, "all is over")
        await served(server)
    assert reasons(logged).count("server_busy") > 2


# What is pipelined.


@in_reactor
async def test_who_pipelines_for_ever_and_reads_nothing_is_not_listened_to(
    tmp_path: Path, logged: list[LogEvent]
) -> None:
    flood = """
message()
write(INIT)
block = line(type="assistant", text="x" * 16000)
for count in range(1000):
    write(block)
write(RESULT)
leave()
"""

    def push(client: socket.socket) -> int:
        """Send until nothing goes for a second; how much went."""
        client.setblocking(False)
        filler, sent = encode_request(headers={"X-Filler": "x" * 4000}) * 100, 0
        while select.select([], [client], [], 1)[1] and sent < 100_000_000:
            sent += client.send(filler)
        return sent

    async with serving(tmp_path, flood) as server:
        with server.connect(receive_buffer=4096) as client:
            client.sendall(turn())
            await until(lambda: server.told("pid"), "it is under way")
            sent = await in_thread(push, client)
            assert sent < 20_000_000, "more than the kernel holds"
            await served(server)


# Bodies.


@in_reactor
async def test_large_bodies_together_keep_no_small_ones_out(
    tmp_path: Path, logged: list[LogEvent]
) -> None:
    """The limit is 4 MiB here, for bodies of 1 MiB."""

    def large() -> bytes:
        body = json.dumps({"prompt": "wait", "append-system-prompt": "x" * 1_000_000}).encode()
        headers = {**JSON, "Content-Length": str(len(body))}
        return encode_request("POST", "/api/claude", headers, body)

    limits = {"MAX_BODIES_BYTES": str(4 << 20), "MAX_BODY_BYTES": str(2 << 20)}
    async with serving(tmp_path, CLI, **limits) as server:
        with ExitStack() as stack:
            clients = [stack.enter_context(server.connect()) for _ in range(10)]
            for client in clients:
                await in_thread(client.sendall, large())
            told = await until(lambda: len(answered(clients)) == 6 and answered(clients), "six are")
            for client in told or []:
                [answer] = parse_answers(await in_thread(read_all, client))
                assert (answer.status, answer.error["code"]) == (429, "server_busy")
            assert await served(server) < 2
            await until(lambda: server.executor.running == 4, "the others are at work")
            (server.folder / "go").touch()
            await until(lambda: server.is_idle, "they are over")
        answer, _ = await in_thread(exchange, server, large().replace(b"1.1", b"1.0", 1))
        assert answer.status == 200
    codes = [event["code"] for event in logged if event.get("type") == "request_failed"]
    assert codes == ["server_busy"] * 6
    assert SMALL_BODY < 1_000_000


# Keys.


@in_reactor
async def test_guesses_wait_and_right_keys_from_the_same_address_do_not(
    tmp_path: Path, logged: list[LogEvent]
) -> None:
    guess = encode_request("GET", "/v1/models", {"X-Api-Key": "sk-guess"}, version="HTTP/1.0")
    async with serving(tmp_path, CLI, API_KEY=KEY, MAX_CONNECTIONS="30") as server:
        for _ in range(FORGIVEN):
            answer, seconds = await in_thread(exchange, server, guess)
            assert answer.status == 401
            assert seconds < 0.2
        answer, seconds = await in_thread(exchange, server, guess)
        assert answer.status == 401
        assert answer.error["code"] == "invalid_api_key"
        assert 0.2 < seconds < 2
        # More at once than there may be connections: the rest is answered early.
        async with many(server, 100, guess) as clients:
            for _ in range(3):
                assert await served(server, KEY) < 2
            early = answered(clients)
            assert 70 <= len(early) < 100
            for client in early:
                [answer] = parse_answers(await in_thread(read_all, client))
                assert answer.status == 401
    waits = [e["wait_ms"] for e in logged if e.get("verdict") == "refused"]
    assert waits[:FORGIVEN] == [0] * FORGIVEN
    assert max(waits) == 8000


# Descriptors.


@contextmanager
def few_descriptors(limit: int) -> Iterator[None]:
    """For the programs that are started meanwhile."""
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)


def is_closed(client: socket.socket) -> bool:
    """Whether the server has closed a connection on which nothing was sent."""
    try:
        return not client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def descriptors_of(daemon: Daemon) -> int:
    return sum(1 for _ in Path(f"/proc/{daemon.pid}/fd").iterdir())


def test_connections_leave_room_for_the_pipes_of_children(tmp_path: Path) -> None:
    settings = {"CLAUDE_CLI": write_cli(tmp_path, CLI), "MAX_CONCURRENT_TURNS": "10"}
    with few_descriptors(260):
        daemon = Daemon(tmp_path, "claude", "http://127.0.0.1:9", env=settings)
        daemon.start()
    try:
        daemon.port = daemon.wait_for_record("server_listening")["port"]
        [warning] = daemon.records("descriptors_scarce")
        assert (warning["wanted"], warning["descriptors"]) == (512, 260)
        assert "LimitNOFILE" in warning["message"]
        with ExitStack() as stack:
            address = ("127.0.0.1", daemon.port)
            crowd = [stack.enter_context(socket.create_connection(address)) for _ in range(300)]
            most = warning["connections"]
            wait_until(
                lambda: sum(map(is_closed, crowd)) == len(crowd) - most,
                "those that were too many are gone",
            )
            assert descriptors_of(daemon) < 130
            with daemon.client() as client:
                for _ in range(3):
                    response = client.post("/api/claude", json={"prompt": "hi", "stream": False})
                    assert response.status_code == 200, response.text
            assert descriptors_of(daemon) < 260 - 4 * 15
        assert "Traceback" not in daemon.output
    finally:
        daemon.stop()
