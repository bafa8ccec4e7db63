"""What a connection may send, for how long, and what it is told when it does otherwise."""

from __future__ import annotations

import json
import tempfile
from typing import Any

import pytest
from twisted.internet.address import IPv4Address
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.web.resource import Resource

from claude_proxy.errors import Failure
from claude_proxy.settings import ApiKey
from claude_proxy.web.auth import Authenticator
from claude_proxy.web.bodies import SMALL_BODY, Bodies
from claude_proxy.web.channel import HEAD_TIME, IDLE_TIME, LINGER, ProxyChannel
from claude_proxy.web.connections import Connections
from claude_proxy.web.guesses import FORGIVEN
from claude_proxy.web.request import ProxyRequest, prepare_json
from claude_proxy.web.site import ProxySite
from tests.support import Answer, Connection, KeptRequests, encode_request, open_site

KEY = "sk-alice-0123456789"
JSON = {"Content-Type": "application/json"}
KEYED: dict[str, Any] = {"authenticator": Authenticator([ApiKey("alice", KEY)])}
PIPELINED = ProxyChannel._optimisticEagerReadSize


class Greeter(Resource):
    """Answers whatever is asked."""

    isLeaf = True

    def render(self, request: Any) -> bytes:
        assert isinstance(request, ProxyRequest)
        return prepare_json(request, 200, b"{}")


class World:
    """A site and its clock."""

    def __init__(self, resource: Resource | None = None, **gate: Any) -> None:
        self.clock = Clock()
        self.site: ProxySite = open_site(resource or Greeter(), self.clock, **gate)

    def connect(self, host: str = "192.0.2.1") -> Connection:
        return Connection(self.site, IPv4Address("TCP", host, 4000))

    def guess(self, host: str = "192.0.2.1", key: str = "wrong", body: bytes = b"") -> Connection:
        connection = self.connect(host)
        headers = {"X-Api-Key": key, "Content-Length": str(len(body))}
        connection.send(encode_request("POST", "/", headers, body))
        return connection


def told(connection: Connection) -> Answer:
    """The one answer of a connection that is over."""
    [answer] = connection.answers
    assert answer.complete
    assert answer.headers["connection"] == "close"
    assert connection.closed
    return answer


def refused(connection: Connection, failure: Failure) -> str:
    answer = told(connection)
    assert (answer.status, answer.error["code"]) == (failure.status, failure.code)
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["cache-control"] == "no-store"
    return str(answer.error["message"])


def over(world: World, connection: Connection) -> None:
    """Nothing is left of a connection that ends."""
    connection.lose()
    assert world.clock.getDelayedCalls() == []
    assert len(world.site.connections) == 0
    assert world.site.bodies.held == 0


# The head: its time.


def test_a_head_that_trickles_in_is_given_up_however_steadily() -> None:
    world = World()
    connection = world.connect()
    for byte in b"GET / HTTP/1.1\r\nX: aaaaaaaaaaaaa":
        connection.send(bytes([byte]))
        world.clock.advance(0.9)
    assert connection.received == b""
    world.clock.advance(HEAD_TIME)
    assert "did not come within 30 seconds" in refused(connection, Failure.REQUEST_TIMEOUT)
    connection.send(b"\r\n\r\n")
    assert len(connection.answers) == 1
    over(world, connection)


def test_a_connection_on_which_nothing_comes_is_closed_without_a_word() -> None:
    world = World()
    connection = world.connect()
    world.clock.advance(HEAD_TIME - 0.1)
    assert not connection.closed
    world.clock.advance(0.2)
    assert connection.closed
    assert connection.received == b""
    over(world, connection)


def test_the_time_for_a_later_head_counts_from_its_first_byte() -> None:
    world = World()
    connection = world.connect()
    connection.send(encode_request())
    world.clock.advance(IDLE_TIME - 1)
    connection.send(b"GET /")
    world.clock.advance(HEAD_TIME - 1)
    assert len(connection.answers) == 1
    world.clock.advance(1)
    assert [answer.status for answer in connection.answers] == [200, 408]


def test_the_time_for_a_pipelined_head_counts_from_the_answer_before_it() -> None:
    for resource in (Greeter(), KeptRequests()):
        world = World(resource)
        connection = world.connect()
        connection.send(encode_request() + b"GET /")
        if isinstance(resource, KeptRequests):
            world.clock.advance(1000)
            resource.requests[0].write(prepare_json(resource.requests[0], 200, b"{}"))
            resource.requests[0].finish()
        world.clock.advance(HEAD_TIME - 1)
        assert len(connection.answers) == 1
        world.clock.advance(1)
        assert [answer.status for answer in connection.answers] == [200, 408]


def test_a_connection_rests_for_longer_than_proxies_keep_it() -> None:
    world = World()
    connection = world.connect()
    for _ in range(3):
        connection.request()
        world.clock.advance(IDLE_TIME - 1)
    assert not connection.closed
    world.clock.advance(1)
    assert connection.closed
    over(world, connection)


def test_a_request_that_is_worked_on_has_all_the_time_it_takes() -> None:
    world = World(KeptRequests())
    connection = world.connect()
    connection.send(encode_request())
    world.clock.advance(10_000)
    assert not connection.closed


def test_a_body_that_stops_after_a_quick_start_is_told_why() -> None:
    world = World(max_body=100_000_000)
    connection = world.connect()
    connection.send(encode_request("POST", "/", {"Content-Length": "90000000"}))
    connection.send(b"x" * 60_000_000)
    world.clock.advance(IDLE_TIME)
    assert connection.answers[0].status == 408
    world.clock.advance(LINGER)
    assert connection.closed
    over(world, connection)


# The head: its size.


@pytest.mark.parametrize(
    "head",
    [
        "GET /" + "x" * 16_400 + " HTTP/1.1\r\n",
        "GET / HTTP/1.1\r\nX: " + "x" * 16_400,
        "GET / HTTP/1.1\r\n" + f"X: {'x' * 1000}\r\n" * 17,
        "GET / HTTP/1.1\r\n" + "X: x\r\n" * 101 + "\r\n",
    ],
    ids=["path", "one line", "all lines", "number"],
)
@pytest.mark.parametrize("piece", [1 << 20, 999])
def test_a_head_that_is_too_large_is_refused(head: str, piece: int) -> None:
    world = World()
    connection = world.connect()
    data = head.encode()
    for start in range(0, len(data), piece):
        connection.send(data[start : start + piece])
    message = refused(connection, Failure.HEAD_TOO_LARGE)
    assert "100 headers and 16384 bytes" in message
    over(world, connection)


def test_a_head_within_the_limits_is_taken() -> None:
    headers = {f"X-{number}": "x" * 150 for number in range(99)}
    assert World().connect().request(headers=headers).status == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n",
        b"GET /\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: a\r\n continued\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\nX: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        b"GET / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
    ],
)
def test_what_is_no_request_is_answered_in_json_and_logged_once(sent: bytes) -> None:
    world = World()
    connection = world.connect()
    with capturedLogs() as events:
        connection.send(sent)
    refused(connection, Failure.MALFORMED_REQUEST)
    [event] = [event for event in events if event.get("type")]
    assert (event["type"], event["reason"]) == ("connection_closed", "malformed_request")
    assert event["address"] == "192.0.2.1"
    assert not [event for event in events if "log_failure" in event]
    # Under TLS, what comes while a connection is being closed is still delivered.
    connection.send(b"\r\n\r\nGET / HTTP/1.1\r\n\r\n")
    assert len(connection.answers) == 1
    over(world, connection)


def test_a_body_in_bad_chunks_is_answered_once() -> None:
    chunked = {**JSON, "Transfer-Encoding": "chunked"}
    for headers, status in ((chunked, 400), ({**chunked, "X-Api-Key": "wrong"}, 401)):
        world = World(**(KEYED if status == 401 else {}))
        connection = world.connect()
        connection.send(encode_request("POST", "/json", headers) + b"2\r\nab\r\n")
        connection.send(b"nonsense\r\n" + encode_request())
        assert [answer.status for answer in connection.answers] == [status]
        world.clock.advance(LINGER)
        assert connection.closed
        over(world, connection)


def test_continued_lines_cost_no_time() -> None:
    connection = World().connect()
    connection.send(b"GET / HTTP/1.1\r\nX: y\r\n" + b" \r\n" * 1_000_000)
    refused(connection, Failure.MALFORMED_REQUEST)


# Pipelining.


@pytest.mark.parametrize("reads", [True, False])
def test_of_what_is_pipelined_only_so_much_is_kept(reads: bool) -> None:
    world = World(KeptRequests())
    connection = world.connect()
    connection.send(encode_request())
    if not reads:
        connection.block()
    sent = 0
    while connection.transport.producerState == "producing":
        connection.send(encode_request(headers={"X-Filler": "x" * 1000}))
        sent += 1000
        assert sent < 2 * PIPELINED
    assert sum(map(len, connection._channel._dataBuffer)) < PIPELINED + 2000


@pytest.mark.parametrize("reads", [True, False])
def test_what_was_pipelined_is_read_when_its_time_comes(reads: bool) -> None:
    kept = KeptRequests()
    world = World(kept)
    connection = world.connect()
    connection.send(encode_request())
    if not reads:
        connection.block()
    for _ in range(20):
        connection.send(encode_request(headers={"X-Filler": "x" * 1000}))
    assert connection.transport.producerState == "paused"
    kept.requests[0].write(prepare_json(kept.requests[0], 200, b"{}"))
    kept.requests[0].finish()
    if not reads:
        connection.unblock()
    assert len(kept.requests) == 2
    for number in range(1, 21):
        request = kept.requests[number]
        request.write(prepare_json(request, 200, b"{}"))
        request.finish()
    assert len(connection.answers) == 21
    assert connection.transport.producerState == "producing"


# The number of connections.


def test_a_connection_that_waits_makes_room_for_a_new_one() -> None:
    world = World()
    world.site.connections = Connections(3)
    rested, silent, begun = (world.connect(f"192.0.2.{number}") for number in range(3))
    assert rested.request().status == 200
    begun.send(b"GET /")
    assert world.connect().request().status == 200
    assert silent.closed
    assert silent.received == b""
    with capturedLogs() as events:
        assert world.connect().request().status == 200
    message = refused(begun, Failure.SERVER_BUSY)
    assert "MAX_CONNECTIONS" in message
    assert told(begun).headers["retry-after"] == "5"
    [event] = [event for event in events if event.get("type") == "connection_closed"]
    assert (event["reason"], event["address"]) == ("server_busy", "192.0.2.2")
    assert not rested.closed
    for connection in (silent, begun):
        connection.lose()
    world.connect()
    world.connect()
    assert rested.closed


def test_a_connection_in_the_midst_of_a_body_makes_room_last() -> None:
    world = World(KeptRequests())
    world.site.connections = Connections(3)
    sending, silent = world.connect(), world.connect()
    sending.send(encode_request("POST", "/json", {**JSON, "Content-Length": "9"}, b"{"))
    for _ in range(2):
        world.connect().send(encode_request())
    assert silent.closed
    assert sending.received == b""
    world.connect()
    assert (sending.answers[0].status, sending.answers[0].error["code"]) == (429, "server_busy")
    world.clock.advance(LINGER)
    assert sending.closed


def test_where_all_are_busy_a_newcomer_is_told_so() -> None:
    world = World(KeptRequests())
    world.site.connections = Connections(1)
    busy = world.connect()
    busy.send(encode_request())
    newcomer = world.connect()
    assert newcomer.received == b""
    newcomer.send(encode_request("POST", "/json", {"Content-Length": "9"}))
    newcomer.send(b"{}")
    refused(newcomer, Failure.SERVER_BUSY)
    newcomer.lose()
    silent = world.connect()
    world.clock.advance(LINGER)
    assert silent.aborted
    silent.lose()
    assert world.site.connections.refused == 0
    assert not busy.closed


def test_newcomers_beyond_all_bounds_are_cut_off() -> None:
    world = World(KeptRequests())
    world.site.connections = Connections(1, 9)
    world.connect().send(encode_request())
    newcomers = [world.connect() for _ in range(10)]
    assert [connection.aborted for connection in newcomers] == [False] * 9 + [True]
    for connection in newcomers:
        connection.lose()
    assert world.site.connections.refused == 0


def test_another_protocol_is_never_offered() -> None:
    assert World().site.acceptableProtocols() == [b"http/1.1"]


# Wrong keys.


def test_wrong_keys_wait_for_their_answers_longer_and_longer() -> None:
    world = World(**KEYED)
    for _ in range(FORGIVEN):
        connection = world.guess()
        refused(connection, Failure.INVALID_API_KEY)
        over(world, connection)
    waits: list[float] = []
    while not waits or waits[-1] < 8:
        with capturedLogs() as events:
            connection = world.guess()
        waits += [event["wait_ms"] / 1000 for event in events if "wait_ms" in event]
        world.clock.advance(waits[-1] * 0.99)
        assert connection.received == b""
        world.clock.advance(waits[-1] * 0.02)
        refused(connection, Failure.INVALID_API_KEY)
        over(world, connection)
    assert waits == sorted(waits)
    assert 6 < len(waits) < 12


def spoilt(**gate: Any) -> World:
    """A world in which 192.0.2.1 has guessed for long."""
    world = World(**{**KEYED, **gate})
    for _ in range(20):
        world.guess().lose()
    assert world.clock.getDelayedCalls() == []
    return world


def test_a_right_key_from_the_same_address_never_waits() -> None:
    world = spoilt()
    held = world.guess()
    assert world.guess(key=KEY).answers[0].status == 200
    assert held.received == b""


def test_no_key_is_no_guess() -> None:
    world = World(**KEYED)
    for _ in range(20):
        assert world.connect().request().status == 401
    assert world.guess().answers[0].status == 401
    assert len(world.site.guesses) == 1
    assert World().connect().request(headers={"X-Api-Key": "any"}).status == 200


def test_other_addresses_do_not_wait() -> None:
    assert spoilt().guess("192.0.2.2").answers[0].status == 401


def test_who_waits_sends_nothing_on_and_is_told_whole() -> None:
    world = spoilt()
    connection = world.connect()
    connection.send(
        encode_request("POST", "/json", {"X-Api-Key": "wrong", "Content-Length": "99"}, b"{")
    )
    assert connection.transport.producerState == "paused"
    world.clock.advance(8)
    assert connection.transport.producerState == "producing"
    assert connection.answers[0].status == 401
    assert not connection.closed
    connection.send(b"x" * 98)
    assert connection.closed
    over(world, connection)


def test_who_leaves_while_it_waits_leaves_nothing() -> None:
    world = spoilt()
    for body in (b"", b"xxx"):
        over(world, world.guess(body=body))


def test_how_long_a_guess_waits_is_logged() -> None:
    world = spoilt()
    with capturedLogs() as events:
        world.guess()
    [event] = [event for event in events if event.get("type") == "authentication"]
    assert (event["verdict"], event["wait_ms"]) == ("refused", 8000)


def test_who_waits_makes_room_and_is_answered_at_once() -> None:
    world = spoilt()
    world.site.connections = Connections(2)
    held = [world.guess(), world.guess(body=b"x" * 10)]
    for connection in held:
        assert connection.received == b""
        assert world.guess(key=KEY).answers[0].status == 200
        refused(connection, Failure.INVALID_API_KEY)
    for connection in held:
        connection.lose()
    assert len(world.site.connections) == 2


# Bodies.


def long_body(world: World, size: int, *, chunked: bool = False, whole: bool = False) -> Connection:
    connection = world.connect()
    length = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(size)}
    connection.send(encode_request("POST", "/json", {**JSON, **length}))
    data = b"x" * (size if whole else size - 1)
    connection.send(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)
    return connection


def busy_with_bodies(resource: Resource | None = None) -> World:
    world = World(resource, max_body=10 * SMALL_BODY)
    world.site.bodies = Bodies(10 * SMALL_BODY)
    return world


@pytest.mark.parametrize("chunked", [True, False])
def test_long_bodies_together_have_a_limit_and_short_ones_pass(chunked: bool) -> None:
    world = busy_with_bodies()
    first = long_body(world, 8 * SMALL_BODY)
    second = long_body(world, 3 * SMALL_BODY, chunked=chunked)
    answer = second.answers[0]
    assert (answer.status, answer.error["code"]) == (429, "server_busy")
    assert answer.headers["retry-after"] == "5"
    assert "MAX_BODIES_BYTES" in str(answer.error["message"])
    assert long_body(world, SMALL_BODY, whole=True).answers[0].status == 200
    first.send(b"x")
    assert first.answers[0].status == 200
    assert world.site.bodies.held == 0
    third = long_body(world, 3 * SMALL_BODY, chunked=chunked)
    assert third.received == b""


def test_a_body_counts_until_its_request_is_answered() -> None:
    kept = KeptRequests()
    world = busy_with_bodies(kept)
    connection = long_body(world, 8 * SMALL_BODY, whole=True)
    assert len(kept.requests[0].body()) == 8 * SMALL_BODY
    assert world.site.bodies.held == 8 * SMALL_BODY
    kept.requests[0].write(prepare_json(kept.requests[0], 200, b"{}"))
    kept.requests[0].finish()
    over(world, connection)


def test_a_body_of_the_largest_size_may_always_come_in() -> None:
    gate = open_site(Greeter(), Clock(), max_body=1_000_000).gate
    clock: Any = Clock()
    assert ProxySite(Greeter(), gate, clock, max_bodies=1024).bodies.limit == 1_000_000


def test_a_body_that_was_read_holds_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[Any] = []
    make = tempfile.TemporaryFile

    def note(*args: Any, **named: Any) -> Any:
        files.append(make(*args, **named))
        return files[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", note)
    kept = KeptRequests()
    world = busy_with_bodies(kept)
    long_body(world, 3 * SMALL_BODY, whole=True)
    [file] = files
    assert not file.closed
    assert len(kept.requests[0].body()) == 3 * SMALL_BODY
    assert file.closed
    assert kept.requests[0].body() == b""


def test_a_body_that_is_refused_holds_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    world = busy_with_bodies()
    long_body(world, 9 * SMALL_BODY)
    second = world.connect()
    second.send(encode_request("POST", "/json", {**JSON, "Transfer-Encoding": "chunked"}))
    for _ in range(3):
        second.send(b"40000\r\n" + b"x" * SMALL_BODY + b"\r\n")
    assert json.loads(second.answers[0].body)["error"]["code"] == "server_busy"
    request = second._channel.requests[0]
    assert request.content.closed
    assert world.site.bodies.held == 9 * SMALL_BODY - 1
