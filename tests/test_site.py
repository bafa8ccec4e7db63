"""What happens to a request before anybody handles it, byte by byte."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.address import IPv6Address, UNIXAddress
from twisted.internet.interfaces import IAddress
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.web.resource import Resource

from claude_proxy.errors import Failure, ProxyError
from claude_proxy.settings import ApiKey
from claude_proxy.web.auth import Authenticator, Origins
from claude_proxy.web.request import ProxyRequest, prepare_error, prepare_json
from claude_proxy.web.site import ProxySite
from tests.support import Answer, Connection, KeptRequests, encode_request, open_site

KEY = "sk-alice-0123456789"
KEYED: dict[str, Any] = {
    "authenticator": Authenticator([ApiKey("alice", KEY)]),
    "origins": Origins(allowed=("https://app.example",), hosts=(), open=False),
}
JSON: dict[str, Any] = {"Content-Type": "application/json"}


class Mirror(Resource):
    """Answers every request with what it saw of it."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bytes] = []
        self.paths: list[bytes] = []

    def render(self, request: Any) -> bytes:
        assert isinstance(request, ProxyRequest)
        body = request.body()
        self.seen.append(body)
        self.paths.append(request.path)
        tenant = (request.tenant or "nobody").encode()
        return prepare_json(request, 200, b'{"bytes":%d,"tenant":"%s"}' % (len(body), tenant))


class World:
    """A site, its clock, and one connection to it."""

    def __init__(self, address: IAddress | None = None, **gate: Any) -> None:
        self.mirror = Mirror()
        self.clock = Clock()
        self.site: ProxySite = open_site(self.mirror, self.clock, **gate)
        self.connection = Connection(self.site, address)

    def ask(
        self,
        method: str = "GET",
        path: str = "/",
        body: bytes | None = None,
        **headers: str,
    ) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.connection.request(method, path, body, named)


def refused(answer: Answer, failure: Failure) -> dict[str, str | None]:
    assert (answer.status, answer.error["code"]) == (failure.status, failure.code)
    assert answer.error["type"] == failure.type
    assert answer.complete
    return answer.error


# What comes in.


def test_a_request_gets_its_answer_and_the_connection_stays() -> None:
    world = World()
    for size in (3, 1000):
        answer = world.ask("POST", "/json", b"x" * size, **JSON)
        assert answer.json == {"bytes": size, "tenant": "anonymous"}
    assert not world.connection.closed
    assert world.mirror.seen == [b"xxx", b"x" * 1000]


def test_every_answer_has_the_same_safe_headers() -> None:
    world = World()
    for answer in (world.ask(), world.ask(Host="evil.example")):
        assert answer.headers["server"].startswith("claude-proxy/")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-type"] == "application/json"
        assert re.fullmatch("req_[0-9a-f]{32}", answer.headers["x-request-id"])
        assert answer.headers["content-length"] == str(len(answer.body))


@pytest.mark.parametrize("given_id", ["abc", "A.b:c_d-0", "x" * 128])
def test_a_plain_request_id_is_taken_over(given_id: str) -> None:
    world = World()
    assert world.ask(X_Request_Id=given_id).headers["x-request-id"] == given_id
    refusal = world.ask(Host="evil.example", X_Request_Id=given_id)
    assert refusal.headers["x-request-id"] == given_id


@pytest.mark.parametrize("given_id", ["x" * 129, "a b", "ä", "a\tb", 'a"b', "\udcff"])
def test_any_other_request_id_is_replaced(given_id: str) -> None:
    answer = World().ask(X_Request_Id=given_id)
    assert re.fullmatch("req_[0-9a-f]{32}", answer.headers["x-request-id"])


def test_a_body_may_come_in_pieces_and_in_chunks() -> None:
    world = World()
    for byte in encode_request("POST", "/json", {**JSON, "Content-Length": "3"}, b"abc"):
        world.connection.send(bytes([byte]))
    chunked = {**JSON, "Transfer-Encoding": "chunked"}
    world.connection.send(encode_request("POST", "/json", chunked))
    for piece in (b"2\r\nab\r\n", b"1\r\nc\r\n", b"0\r\n\r\n"):
        world.connection.send(piece)
    assert world.mirror.seen == [b"abc", b"abc"]


def test_a_long_body_arrives_whole() -> None:
    world = World(max_body=3_000_000)
    body = bytes(range(256)) * 10_000
    assert world.ask("POST", "/json", body, **JSON).json["bytes"] == len(body)
    assert world.mirror.seen == [body]


def test_requests_may_be_pipelined() -> None:
    world = World()
    one = encode_request("POST", "/json", {**JSON, "Content-Length": "1"}, b"a")
    two = encode_request("POST", "/json", {**JSON, "Content-Length": "2"}, b"bb")
    world.connection.send(one + two + encode_request())
    assert [answer.json["bytes"] for answer in world.connection.answers] == [1, 2, 0]


def test_http_1_0_is_answered_and_closed() -> None:
    world = World()
    world.connection.send(b"GET / HTTP/1.0\r\n\r\n")
    [answer] = world.connection.answers
    assert answer.status == 200
    assert "transfer-encoding" not in answer.headers
    assert world.connection.closed


# Keys.


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer {KEY}"},
        {"X-Api-Key": KEY},
        {"Authorization": f"Bearer {KEY}", "X-Api-Key": "wrong"},
    ],
)
def test_a_key_lets_in_and_names_the_tenant(headers: dict[str, Any]) -> None:
    world = World(**KEYED)
    assert world.ask("POST", "/json", b"{}", **JSON, **headers).json["tenant"] == "alice"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"X-Api-Key": "wrong"},
        {"X-Api-Key": "\udcff"},
        {"Authorization": "Bearer wrong", "X-Api-Key": KEY},
    ],
)
def test_without_the_right_key_nobody_comes_in(headers: dict[str, Any]) -> None:
    world = World(**KEYED)
    answer = world.ask("GET", "/anything", **headers)
    error = refused(answer, Failure.INVALID_API_KEY)
    assert str(error["message"]).startswith("Incorrect API key provided.")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert KEY not in str(answer)
    assert world.connection.closed
    assert world.mirror.seen == []


def test_a_public_path_needs_no_key_but_only_that_path() -> None:
    for path in ("/public", "/public?x=1", "/%70ublic", "//public"):
        assert World(**KEYED).ask("GET", path).status == 200
    for path in ("/public/", "/Public", "/public/../json", "/publicx", "/json?/public", "/%ff"):
        assert World(**KEYED).ask("GET", path).status == 401


@pytest.mark.parametrize(
    "path", ["/json", "//json", "/%6ason", "/%6Ason", "///js%6fn", "/%2f/json"]
)
def test_gate_and_router_see_the_same_path(path: str) -> None:
    world = World()
    refused(world.ask("POST", path, b"x"), Failure.UNSUPPORTED_MEDIA_TYPE)
    world = World()
    assert world.ask("POST", path, b"x", **JSON).status == 200
    assert world.mirror.paths == [b"/json"]


@pytest.mark.parametrize("path", ["/%ff", "/a%c3/"])
def test_a_path_that_is_no_text_is_not_found(path: str) -> None:
    world = World()
    refused(world.ask("GET", path), Failure.NOT_FOUND)
    assert world.mirror.seen == []


def test_the_key_is_looked_at_before_anything_else() -> None:
    world = World(**KEYED)
    refused(world.ask("POST", "/json", b"x" * 2000), Failure.INVALID_API_KEY)


def logged_attempt(address: IAddress | None = None, **headers: Any) -> dict[str, Any]:
    with capturedLogs() as events:
        World(address, **KEYED).ask(**headers)
    [event] = [event for event in events if event.get("type") == "authentication"]
    assert KEY not in str(event)
    return event


def test_attempts_are_logged_with_a_masked_key() -> None:
    good = logged_attempt(X_Api_Key=KEY, User_Agent="curl/8", X_Request_Id="r-1")
    assert (good["verdict"], good["tenant"], good["request_id"]) == ("accepted", "alice", "r-1")
    assert (good["address"], good["user_agent"]) == ("127.0.0.1", "curl/8")
    bad = logged_attempt(Authorization="Bearer " + "w" * 40)
    assert bad["verdict"] == "refused"
    assert "w" in bad["key"]
    assert "w" * 9 not in str(bad)
    assert logged_attempt()["verdict"] == "refused"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (IPv6Address("TCP", "::1", 4000), "::1"),
        (UNIXAddress("/run/client.sock"), "/run/client.sock"),
        (UNIXAddress(None), "unix"),
    ],
)
def test_every_kind_of_address_can_be_logged(address: IAddress, shown: str) -> None:
    recorded = logged_attempt(address)["address"]
    assert recorded in (shown, shown.encode(), repr(shown.encode()))


def test_no_attempt_is_logged_where_no_key_is_needed() -> None:
    with capturedLogs() as events:
        World().ask(X_Api_Key="whatever")
        World(**KEYED).ask("GET", "/public")
    assert [event for event in events if event.get("type") == "authentication"] == []


# Bodies.


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        "application/json;",
    ],
)
def test_json_is_taken_under_any_spelling(content_type: str) -> None:
    assert World().ask("POST", "/json", b"{}", Content_Type=content_type).status == 200


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonx",
        "text/plain; application/json",
        "application/json, text/plain",
    ],
)
def test_what_a_web_page_can_send_unasked_is_no_json(content_type: str) -> None:
    world = World()
    answer = world.ask("POST", "/json", b'{"prompt":"x"}', Content_Type=content_type)
    error = refused(answer, Failure.UNSUPPORTED_MEDIA_TYPE)
    assert "Content-Type: application/json" in str(error["message"])
    assert world.mirror.seen == []


def test_the_last_of_two_content_types_does_not_hide_the_first_key() -> None:
    world = World(**KEYED)
    world.connection.send(
        encode_request("GET", "/", {"X-Api-Key": KEY}).replace(
            b"\r\n\r\n", b"\r\nX-Api-Key: wrong\r\n\r\n"
        )
    )
    assert world.connection.answers[0].status == 401


def test_only_json_paths_ask_for_json() -> None:
    world = World()
    assert world.ask("POST", "/other", b"x").status == 200
    assert world.ask("PUT", "/json", b"x").status == 200


def test_an_announced_body_over_the_limit_is_refused_before_it_comes() -> None:
    world = World()
    world.connection.send(encode_request("POST", "/json", {**JSON, "Content-Length": "1001"}))
    [answer] = world.connection.answers
    error = refused(answer, Failure.REQUEST_TOO_LARGE)
    assert "1000 bytes" in str(error["message"])
    assert answer.headers["connection"] == "close"
    assert not world.connection.closed, "the client may still be sending"
    world.connection.send(b"x" * 1001)
    assert world.connection.closed
    assert world.mirror.seen == []
    assert len(world.connection.answers) == 1


def test_an_absurd_length_is_refused() -> None:
    world = World()
    world.connection.send(encode_request("POST", "/json", {**JSON, "Content-Length": "9" * 30}))
    refused(world.connection.answers[0], Failure.REQUEST_TOO_LARGE)


def test_a_chunked_body_is_refused_when_it_passes_the_limit() -> None:
    world = World()
    world.connection.send(encode_request("POST", "/json", {**JSON, "Transfer-Encoding": "chunked"}))
    world.connection.send(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
    assert world.connection.received == b""
    world.connection.send(b"1\r\nx\r\n")
    refused(world.connection.answers[0], Failure.REQUEST_TOO_LARGE)
    assert not world.connection.closed
    world.connection.send(b"3e8\r\n" + b"x" * 1000 + b"\r\n0\r\n\r\n")
    assert world.connection.closed
    assert len(world.connection.answers) == 1
    assert world.mirror.seen == []


def test_an_expectation_is_met_only_where_the_body_is_wanted() -> None:
    expecting = {**JSON, "Expect": "100-continue"}
    wanted = World()
    wanted.connection.send(encode_request("POST", "/json", {**expecting, "Content-Length": "2"}))
    assert wanted.connection.received == b"HTTP/1.1 100 Continue\r\n\r\n"
    wanted.connection.send(b"{}")
    assert wanted.connection.answers[0].status == 200
    unwanted = World()
    unwanted.connection.send(
        encode_request("POST", "/json", {**expecting, "Content-Length": "9999"})
    )
    assert unwanted.connection.received.startswith(b"HTTP/1.1 413 ")
    assert b"100 Continue" not in unwanted.connection.received


def test_after_a_refusal_the_connection_is_closed_by_and_by() -> None:
    world = World()
    world.connection.send(encode_request("POST", "/json", {**JSON, "Content-Length": "9999"}))
    world.clock.advance(1.9)
    world.connection.send(b"x" * 100)
    assert not world.connection.closed
    world.clock.advance(0.1)
    assert world.connection.closed
    world.connection.lose()


def test_what_comes_after_that_is_dropped() -> None:
    # Under TLS data may be delivered although the connection is being closed.
    world = World()
    world.connection.send(encode_request("POST", "/json", {**JSON, "Content-Length": "2000"}))
    world.clock.advance(2)
    world.connection.send(b"x" * 1000)
    world.connection.send(b"x" * 1000 + encode_request())
    assert len(world.connection.answers) == 1
    assert world.mirror.seen == []
    world.connection.lose()


def test_a_refused_client_that_leaves_leaves_nothing_behind() -> None:
    world = World()
    world.connection.send(encode_request("POST", "/json", {**JSON, "Content-Length": "9999"}))
    world.connection.lose()
    assert world.clock.getDelayedCalls() == []


def test_what_follows_a_refused_request_on_its_connection_is_not_looked_at() -> None:
    world = World(**KEYED)
    world.connection.send(encode_request() + encode_request("GET", "/", {"X-Api-Key": KEY}))
    assert [answer.status for answer in world.connection.answers] == [401]
    assert world.mirror.seen == []


@pytest.mark.parametrize("sent", [b"", b"GET", b"GET / HTTP/1.1\r\nHost: loc"])
def test_a_client_may_leave_before_its_request_is_complete(sent: bytes) -> None:
    world = World()
    world.connection.send(sent)
    world.connection.lose()
    assert world.mirror.seen == []


def test_a_client_may_leave_in_the_middle_of_its_body() -> None:
    world = World()
    world.connection.send(encode_request("POST", "/json", {**JSON, "Content-Length": "10"}, b"xyz"))
    world.connection.lose()
    assert world.mirror.seen == []


def test_a_body_that_does_not_come_is_given_up() -> None:
    world = World(max_body=10_000_000)
    world.connection.send(encode_request("POST", "/json", {**JSON, "Content-Length": "99"}, b"{"))
    world.clock.advance(29.9)
    assert world.connection.received == b""
    world.clock.advance(0.2)
    refused(world.connection.answers[0], Failure.REQUEST_TIMEOUT)
    world.clock.advance(2)
    assert world.connection.closed
    assert world.mirror.seen == []
    world.connection.lose()
    assert world.clock.getDelayedCalls() == []


def test_a_body_that_comes_steadily_may_take_longer() -> None:
    world = World(max_body=10_000_000)
    piece = b" " * 64 * 1024
    size = str(40 * len(piece))
    world.connection.send(encode_request("POST", "/json", {**JSON, "Content-Length": size}))
    for _ in range(40):
        world.clock.advance(1)
        world.connection.send(piece)
    assert world.connection.answers[0].status == 200
    world.clock.advance(29)
    assert len(world.connection.answers) == 1


@pytest.mark.parametrize("body", [None, b"{}"])
def test_no_timer_is_left_when_the_body_has_come(body: bytes | None) -> None:
    world = World()
    assert world.ask("POST", "/json", body, Content_Type="application/json").status == 200
    world.connection.lose()
    assert world.clock.getDelayedCalls() == []


@given(st.binary(max_size=300))
def test_hostile_bytes_never_reach_a_handler_or_break_the_site(data: bytes) -> None:
    world = World(**KEYED)
    with capturedLogs() as events:
        world.connection.send(data)
        world.connection.send(b"\r\n\r\n")
        world.connection.lose()
    assert world.mirror.seen == []
    assert not [event for event in events if "log_failure" in event]


# Browsers.


def test_an_open_server_refuses_foreign_hosts_and_pages() -> None:
    world = World()
    for headers in (
        {"Host": "evil.example"},
        {"Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        refused(world.connection.request(headers=headers), Failure.ORIGIN_NOT_ALLOWED)
        world.connection = Connection(world.site)
    assert world.ask(Host="127.0.0.1:3000").status == 200


def test_a_page_of_a_listed_origin_may_read_the_answer() -> None:
    world = World(**KEYED)
    answer = world.ask(X_Api_Key=KEY, Origin="https://app.example")
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
    assert "X-Claude-Session-Id" in answer.headers["access-control-expose-headers"]
    assert "Retry-After" in answer.headers["access-control-expose-headers"]
    assert answer.headers["vary"] == "Origin"


def test_a_page_of_a_listed_origin_may_read_a_refusal_too() -> None:
    answer = World(**KEYED).ask(Origin="https://app.example")
    assert answer.status == 401
    assert answer.headers["access-control-allow-origin"] == "https://app.example"


@pytest.mark.parametrize("origin", ["https://evil.example", ""])
def test_others_get_no_cors_headers_but_caches_are_told(origin: str) -> None:
    answer = World(**KEYED).ask(X_Api_Key=KEY, Origin=origin)
    assert answer.status == 200
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert answer.headers["vary"] == "Origin"


def test_without_cors_there_is_nothing_to_vary() -> None:
    assert "vary" not in World().ask().headers


PREFLIGHT = {"Access-Control-Request-Method": "POST"}


def test_a_preflight_needs_no_key_and_reaches_no_handler() -> None:
    world = World(**KEYED)
    wanted = "authorization, content-type, x-stainless-lang"
    answer = world.connection.request(
        "OPTIONS",
        "/json",
        headers={
            **PREFLIGHT,
            "Origin": "https://app.example",
            "Access-Control-Request-Headers": wanted,
        },
    )
    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert answer.headers["access-control-allow-methods"] == "GET, POST, DELETE, OPTIONS"
    assert answer.headers["access-control-allow-headers"] == wanted
    assert answer.headers["access-control-max-age"] == "600"
    assert world.mirror.seen == []
    assert not world.connection.closed


@pytest.mark.parametrize("wanted", [None, "", "a;b", "x" * 5000])
def test_a_preflight_that_names_no_headers_is_allowed_none(wanted: str | None) -> None:
    named = {} if wanted is None else {"Access-Control-Request-Headers": wanted}
    answer = World(**KEYED).connection.request(
        "OPTIONS", "/json", headers={**PREFLIGHT, "Origin": "https://app.example", **named}
    )
    assert answer.status == 204
    assert "access-control-allow-headers" not in answer.headers


def test_a_preflight_from_elsewhere_allows_nothing() -> None:
    answer = World(**KEYED).connection.request(
        "OPTIONS", "/json", headers={**PREFLIGHT, "Origin": "https://evil.example"}
    )
    assert answer.status == 204
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_an_open_server_refuses_a_preflight_from_elsewhere() -> None:
    answer = World().connection.request(
        "OPTIONS", "/json", headers={**PREFLIGHT, "Origin": "https://evil.example"}
    )
    refused(answer, Failure.ORIGIN_NOT_ALLOWED)


def test_options_alone_is_no_preflight() -> None:
    assert World(**KEYED).ask("OPTIONS", "/json").status == 401


# What goes out.


def kept_request() -> tuple[Connection, ProxyRequest]:
    kept = KeptRequests()
    connection = Connection(open_site(kept, Clock()))
    connection.send(encode_request("GET", "/", {"X-Request-Id": "r-1"}))
    return connection, kept.requests[0]


def failed_with(error: ProxyError) -> Answer:
    connection, request = kept_request()
    request.write(prepare_error(request, error))
    request.finish()
    return connection.answers[0]


def test_an_error_says_when_to_come_back_and_what_is_taken() -> None:
    busy = failed_with(ProxyError(Failure.SERVER_BUSY, retry_after=30))
    assert (busy.status, busy.headers["retry-after"]) == (429, "30")
    method = failed_with(ProxyError(Failure.METHOD_NOT_ALLOWED, allow=("GET", "HEAD")))
    assert (method.status, method.headers["allow"]) == (405, "GET, HEAD")
    assert "retry-after" not in method.headers


def test_a_fault_of_ours_names_the_request() -> None:
    error = refused(failed_with(ProxyError(Failure.INTERNAL_ERROR)), Failure.INTERNAL_ERROR)
    assert str(error["message"]).endswith(": r-1.")


def test_an_answered_request_is_logged_without_its_query() -> None:
    with capturedLogs() as events:
        world = World()
        world.ask("GET", "/some/path?token=secret", X_Request_Id="r-1")
    [record] = [event for event in events if event.get("type") == "response"]
    assert (record["method"], record["path"]) == ("GET", "/some/path")
    assert (record["status"], record["request_id"]) == (200, "r-1")
    assert record["bytes"] > 0
    assert "secret" not in str(record)


def test_a_refused_request_is_logged_as_answered() -> None:
    with capturedLogs() as events:
        World(**KEYED).ask("GET", "/x")
    [record] = [event for event in events if event.get("type") == "response"]
    assert (record["status"], record["path"]) == (401, "/x")
