"""
Requests that are wrong, too large or too slow, over real sockets.

Most of them go to one daemon in a process of its own: what it is asked badly a hundred times must
leave nothing in it.  Those that need a fault of the system go to a server in the test's reactor.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import select
import signal
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPResponse
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import httpx
import msgspec
import pytest
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher

from claude_proxy.dialects.native import NativeRequest
from claude_proxy.web import request
from tests.e2e.daemon import Daemon, children_of, sse_events, wait_until
from tests.integration.server import Running, in_thread, serving, until, write_cli
from tests.support import Answer, encode_request, in_reactor, parse_answers

ALICE, BOB = "sk-alice-0123456789", "sk-bob-0123456789"

NOBODYS = "00000000-1111-4222-8333-444444444444"

NO_SESSION = "There is no such session. Leave the session id out to start a new one."

MB = 1_000_000

CLI = """
append("starts", SESSION)
text = message()
tell("prompt", hashlib.sha256(text.encode()).hexdigest())
known = open(os.path.join(FOLDER, "sessions")).read() if "--resume" in OPTIONS else SESSION
if SESSION not in known:
    lost = "No conversation found with session ID: " + SESSION
    write(line(type="result", subtype="error_during_execution", is_error=True, errors=[lost]))
    sys.exit(1)
append("sessions", SESSION)
write(INIT + RESULT)
leave()
"""
"""Answers every prompt; says, as the CLI does, that it does not know a session."""

MCP = {"mcpServers": {"github": {"command": "x", "env": {"TOKEN": "very-secret"}}, "jira": {}}}
MCP["mcpServers"]["jira"] = {"type": "http", "url": "https://jira.example/mcp"}


class Refusal(NamedTuple):
    """What a client sees when it is refused."""

    status: int
    code: str
    param: str | None
    message: str


def count_descriptors(pid: int) -> int:
    """How many files a process holds open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def names_in(folder: Path) -> list[str]:
    """What is in a folder."""
    return [path.name for path in folder.iterdir()]


class Served:
    """A daemon with a CLI that writes down when it is started."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.descriptors = self.count_descriptors()

    @property
    def starts(self) -> list[str]:
        """The session of every turn for which a CLI was started."""
        path = self.daemon.folder / "starts"
        return path.read_text().split() if path.exists() else []

    @property
    def prompt_hash(self) -> str:
        """Of the last prompt that reached a CLI."""
        return (self.daemon.folder / "prompt").read_text()

    def count_descriptors(self) -> int:
        """How many files the daemon holds open."""
        return count_descriptors(self.daemon.pid)

    def ask(self, body: bytes | Mapping[str, Any], **headers: str) -> httpx.Response:
        """One request for a turn."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        with self.daemon.client() as client:
            return client.post(
                "/api/claude",
                content=content,
                headers={
                    "content-type": "application/json",
                    **{name.replace("_", "-"): value for name, value in headers.items()},
                },
            )

    def refuses(self, body: bytes | Mapping[str, Any], **headers: str) -> Refusal:
        """What it says to a request for which it starts nothing."""
        return self.refused(self.ask(body, **headers))

    def refused(self, response: httpx.Response) -> Refusal:
        """What an answer says to a request for which nothing was started."""
        assert response.headers["content-type"] == "application/json"
        name = response.headers["x-request-id"]
        self.daemon.wait_for_record("response", request_id=name)
        assert not self.daemon.records("turn_start", request_id=name)
        assert set(response.json()) == {"error"}
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return Refusal(response.status_code, error["code"], error["param"], error["message"])

    def answers(self, body: bytes | Mapping[str, Any], **headers: str) -> str:
        """Have a turn run to its good end; its session."""
        response = self.ask(body, **headers)
        assert response.status_code == 200, response.text
        assert list(sse_events(response))[-1]["result"] == "done"
        return response.headers["x-claude-session-id"]

    def check_nothing_is_left(self) -> None:
        """No process, no descriptor, no file, and no fault of the server in its log."""
        daemon = self.daemon
        wait_until(lambda: not children_of(daemon.pid), "no child is left")
        wait_until(lambda: self.count_descriptors() <= self.descriptors, "no descriptor is left")
        assert names_in(daemon.state / "run") == []
        assert names_in(daemon.folder / "tmp") == []
        assert not daemon.records("internal_error")
        assert "Traceback" not in daemon.output


def served(folder: Path, **env: str) -> Iterator[Served]:
    """Run a daemon until the tests of this module are done with it."""
    mcp = folder / "mcp.json"
    mcp.write_text(json.dumps(MCP))
    variables = {"CLAUDE_CLI": write_cli(folder, CLI), "MCP_CONFIG_PATH": str(mcp), **env}
    variables = {"LIVE_SESSIONS": "0", **variables}
    with Daemon(folder, "claude", "http://127.0.0.1:9", env=variables) as daemon:
        daemon.wait_for_record("cli_found")
        with daemon.client() as client:  # what is opened once for ever is open from now on
            assert client.get("/health").status_code == 200
        Served(daemon).answers({"prompt": "warm up"}, authorization=f"Bearer {ALICE}")
        wait_until(lambda: not children_of(daemon.pid), "the first turn is over")
        it = Served(daemon)
        yield it
        it.check_nothing_is_left()


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A daemon without keys."""
    yield from served(tmp_path_factory.mktemp("open"))


@pytest.fixture(scope="module")
def one_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A daemon with a single key that lets nobody skip permissions."""
    yield from served(
        tmp_path_factory.mktemp("one"),
        API_KEY=ALICE,
        HOST="127.0.0.1",
        ALLOW_SKIP_PERMISSIONS="false",
    )


@pytest.fixture(scope="module")
def two_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A daemon with two tenants."""
    yield from served(tmp_path_factory.mktemp("two"), API_KEYS=f"{ALICE},{BOB}", HOST="127.0.0.1")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# What is not understood.


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"go",
        b"{'prompt': 'go'}",
        b'{"prompt": "go"',
        b'{"prompt": "go"} {}',
        b'{"prompt": "a\0b"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": NaN}',
        b"\xff\xfe{\0}\0",
        b"[" * 100_000,
        b'{"prompt":' * 100_000,
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_is_not_json_is_a_400(open_server: Served, body: bytes) -> None:
    refusal = open_server.refuses(body)
    assert refusal[:3] == (400, "invalid_json", None)
    assert refusal.message.startswith("The request body is not valid JSON: ")


@pytest.mark.parametrize("body", [b'["go"]', b'"go"', b"null", b"true", b"7"])
def test_json_that_is_no_object_is_a_400(open_server: Served, body: bytes) -> None:
    assert open_server.refuses(body) == (
        400,
        "invalid_json",
        None,
        "The request body must be one JSON object.",
    )


_NO_TEXT: list[Any] = [1, True, ["x"], {"x": "y"}]
_NO_FLAG: list[Any] = ["true", 1, 0, [], {}]
_NO_LIST: list[Any] = ["Bash", 1, True, {"0": "Bash"}, [1], ["Bash", None], [""]]

WRONG_TYPES: dict[str, list[Any]] = {
    "prompt": _NO_TEXT,
    "session-id": _NO_TEXT,
    "workspace": _NO_TEXT,
    "system-prompt": _NO_TEXT,
    "dangerously-skip-permissions": _NO_FLAG,
    "allowed-tools": _NO_LIST,
    "disallowed-tools": _NO_LIST,
    "mcp-allowed-tools": _NO_LIST,
    "append-system-prompt": _NO_TEXT,
    "model": _NO_TEXT,
    "permission-mode": _NO_TEXT,
    "effort": _NO_TEXT,
    "max-turns": ["3", 1.5, 0, -1, True, 2**70, [3]],
    "include-partial-messages": _NO_FLAG,
    "fork": _NO_FLAG,
    "stream": _NO_FLAG,
}


def test_there_are_wrong_types_for_every_field() -> None:
    fields = {info.encode_name for info in msgspec.structs.fields(NativeRequest)}
    assert set(WRONG_TYPES) == fields


@pytest.mark.parametrize("field", WRONG_TYPES)
def test_a_wrong_type_is_a_400_that_names_the_field(open_server: Served, field: str) -> None:
    for value in WRONG_TYPES[field]:
        refusal = open_server.refuses({"prompt": "go", field: value})
        assert refusal[:2] == (400, "invalid_value"), value
        assert (refusal.param or "").partition("[")[0] == field, value
        assert refusal.message.startswith(f"The field '{refusal.param}' is not acceptable: ")


@pytest.mark.parametrize("name", ["allowed_tools", "Prompt", "promt", "system_prompt", ""])
def test_an_unknown_field_is_named_and_the_known_ones_are_listed(
    open_server: Served, name: str
) -> None:
    refusal = open_server.refuses({"prompt": "go", name: ["Bash"]})
    assert refusal[:3] == (400, "invalid_value", name)
    assert f"Unknown field '{name}'" in refusal.message
    assert "allowed-tools" in refusal.message


@pytest.mark.parametrize("prompt", ["", " ", "\n\t\r\n", "\u2003"])
def test_an_empty_prompt_is_a_400(open_server: Served, prompt: str) -> None:
    refusal = open_server.refuses({"prompt": prompt})
    assert refusal == (400, "invalid_value", "prompt", "The field 'prompt' must not be empty.")


def test_a_missing_prompt_is_a_400(open_server: Served) -> None:
    refusal = open_server.refuses({"workspace": "x"})
    assert refusal == (400, "invalid_value", "prompt", "The field 'prompt' is required.")


# What is strange but right.


@pytest.mark.parametrize(
    "prompt",
    [
        "a\0b",
        "\0",
        "-p",
        "--dangerously-skip-permissions",
        "--",
        "-",
        "/help",
        "/etc/passwd",
        '"\\\n{"type":"result"}\n',
        "a\u2028b\u2029c\x85d",
        "workspace=../../etc",
        "\U0001f600",
    ],
    ids=ascii,
)
def test_any_prompt_reaches_the_cli_as_it_is(open_server: Served, prompt: str) -> None:
    before = len(open_server.starts)
    open_server.answers({"prompt": prompt})
    assert open_server.prompt_hash == hashlib.sha256(prompt.encode()).hexdigest()
    assert len(open_server.starts) == before + 1


def test_a_prompt_of_5_mb_reaches_the_cli_as_it_is(open_server: Served) -> None:
    prompt = "".join(f"{number} ä\0\n" for number in range(700_000))
    assert len(prompt.encode()) > 5 * MB
    open_server.answers({"prompt": prompt})
    assert open_server.prompt_hash == hashlib.sha256(prompt.encode()).hexdigest()


@pytest.mark.parametrize("escape", [rb"\ud800", rb"\udfff x", rb"\ud800\ud800"])
def test_half_a_character_is_a_400(open_server: Served, escape: bytes) -> None:
    assert open_server.refuses(b'{"prompt": "' + escape + b'"}')[:2] == (400, "invalid_json")


# What is too much.


class _Memory:
    """How much memory a process takes at most from now on."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")
        (self._folder / "clear_refs").write_text("5")  # the peak is the present from now on
        self._before = self._read("VmRSS")

    @property
    def grown(self) -> int:
        """In bytes."""
        return self._read("VmHWM") - self._before

    def _read(self, name: str) -> int:
        for line in (self._folder / "status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise AssertionError(name)


def send_large(port: int, head: str, piece: bytes, count: int) -> tuple[int, Any]:
    """Send a body in pieces until there is an answer; its status and content."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(
            b"POST /api/claude HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            + head.encode()
            + b"\r\n\r\n"
        )
        for _ in range(count):
            readable, _, _ = select.select([client], [], [], 0)
            if readable:
                break
            client.sendall(piece)
        response = HTTPResponse(client)
        response.begin()
        return response.status, json.loads(response.read())


def test_a_body_of_50_mb_is_a_413_that_costs_no_memory(open_server: Served) -> None:
    port = open_server.daemon.port
    piece = b" " * MB
    ways = {
        f"Content-Length: {50 * MB}": piece,
        "Transfer-Encoding: chunked": b"%x\r\n%b\r\n" % (MB, piece),
    }
    before = open_server.starts
    open_server.refuses({"prompt": ""})
    for head, sent in ways.items():
        memory = _Memory(open_server.daemon.pid)
        status, content = send_large(port, head, sent, 50)
        assert status == 413
        assert content["error"]["code"] == "request_too_large"
        assert content["error"]["message"] == (
            "The request body is larger than the 33554432 bytes that this server takes."
        )
        assert memory.grown <= 2 * MB, head
    assert open_server.starts == before


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_another_content_type_is_a_415(open_server: Served, content_type: str) -> None:
    refusal = open_server.refuses({"prompt": "go"}, content_type=content_type)
    assert refusal[:3] == (415, "unsupported_media_type", None)
    assert "Content-Type: application/json" in refusal.message


# Keys.


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer(ALICE + "x"),
        bearer(ALICE[:-1]),
        bearer(ALICE.upper()),
        {"authorization": "Bearer"},
        {"authorization": ALICE},
        {"authorization": f"Basic {ALICE}"},
        {"x_api_key": "wrong"},
        {"authorization": "Bearer wrong", "x_api_key": ALICE},
    ],
    ids=str,
)
def test_without_the_right_key_it_is_a_401(two_keys: Served, headers: dict[str, str]) -> None:
    response = two_keys.ask({"prompt": "go"}, **headers)
    refusal = two_keys.refused(response)
    assert refusal[:3] == (401, "invalid_api_key", None)
    assert refusal.message.startswith("Incorrect API key provided. ")
    assert response.headers["www-authenticate"] == "Bearer"
    assert ALICE not in response.text


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "beaReR"])
def test_the_scheme_counts_in_any_case(two_keys: Served, scheme: str) -> None:
    two_keys.answers({"prompt": "go"}, authorization=f"{scheme} {BOB}")


def test_the_other_header_counts_too(two_keys: Served) -> None:
    two_keys.answers({"prompt": "go"}, x_api_key=BOB)


# Workspaces.


@pytest.mark.parametrize(
    "name", ["../../etc", "..", ".", ".ssh", "/etc", "a/b", "a\0b", "x" * 65, "ü", "a\n", "-/"]
)
def test_what_is_no_name_of_a_workspace_is_a_400(open_server: Served, name: str) -> None:
    refusal = open_server.refuses({"prompt": "go", "workspace": name})
    assert refusal[:3] == (400, "invalid_value", "workspace")
    assert "is no workspace name. Use 1 to 64 of the letters" in refusal.message
    assert not (open_server.daemon.base / "etc").exists()


def test_a_link_that_leads_out_is_a_400(open_server: Served) -> None:
    (open_server.daemon.base / "workspace").mkdir(exist_ok=True)
    (open_server.daemon.base / "workspace" / "out").symlink_to("/etc")
    refusal = open_server.refuses({"prompt": "go", "workspace": "out"})
    assert refusal[:3] == (400, "invalid_value", "workspace")
    assert "is a link that leads out of its place" in refusal.message
    assert "/etc" not in refusal.message


def test_a_file_in_the_way_is_a_500_that_says_so(open_server: Served) -> None:
    (open_server.daemon.base / "workspace").mkdir(exist_ok=True)
    (open_server.daemon.base / "workspace" / "file").write_text("mine")
    refusal = open_server.refuses({"prompt": "go", "workspace": "file"})
    assert refusal == (
        500,
        "workspace_unavailable",
        None,
        (
            "The workspace directory 'workspace/file' cannot be used: something that is not a "
            "directory is in the way. Remove or rename it on the server."
        ),
    )
    assert (open_server.daemon.base / "workspace" / "file").read_text() == "mine"


# Sessions.


@pytest.mark.parametrize("session", ["x", "../x", "-1", NOBODYS[:-1], NOBODYS + "0", "{}"])
def test_a_session_that_is_no_uuid_is_a_400(open_server: Served, session: str) -> None:
    refusal = open_server.refuses({"prompt": "go", "session-id": session})
    assert refusal == (
        400,
        "invalid_value",
        "session-id",
        "The field 'session-id' must be a UUID, as the server gave it.",
    )


def test_a_fork_of_nothing_is_a_400(open_server: Served) -> None:
    refusal = open_server.refuses({"prompt": "go", "fork": True})
    assert refusal[:3] == (400, "invalid_value", "fork")


@pytest.mark.parametrize("name", ["open_server", "one_key"])
def test_where_nobody_else_can_own_it_an_unknown_session_is_tried(
    name: str, request: pytest.FixtureRequest
) -> None:
    it: Served = request.getfixturevalue(name)
    before = len(it.starts)
    response = it.ask({"prompt": "go", "session-id": NOBODYS}, **bearer(ALICE))
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": NO_SESSION,
        "type": "invalid_request_error",
        "param": None,
        "code": "session_not_found",
    }
    assert it.starts[before:] == [NOBODYS]


def test_where_it_could_be_anybodys_an_unknown_session_is_a_404(two_keys: Served) -> None:
    refusal = two_keys.refuses({"prompt": "go", "session-id": NOBODYS}, **bearer(ALICE))
    assert refusal == (404, "session_not_found", "session-id", NO_SESSION)


def test_another_tenants_session_looks_like_none(two_keys: Served) -> None:
    session = two_keys.answers({"prompt": "go"}, **bearer(ALICE))
    body = {"prompt": "go", "session-id": session}
    unknown = two_keys.refuses({**body, "session-id": NOBODYS}, **bearer(BOB))
    assert two_keys.refuses(body, **bearer(BOB)) == unknown
    assert two_keys.refuses({**body, "fork": True}, **bearer(BOB)) == unknown
    assert two_keys.answers(body, **bearer(ALICE)) == session


@pytest.mark.parametrize("name", ["open_server", "one_key", "two_keys"])
def test_a_deleted_session_is_a_404_though_the_cli_still_knows_it(
    name: str, request: pytest.FixtureRequest
) -> None:
    it: Served = request.getfixturevalue(name)
    session = it.answers({"prompt": "go"}, **bearer(ALICE))
    body = {"prompt": "go", "session-id": session}
    assert it.answers(body, **bearer(ALICE)) == session
    with it.daemon.client(headers=bearer(ALICE)) as client:
        assert client.delete(f"/api/sessions/{session}").json()["deleted"] is True
    before = it.starts
    for fields in ({}, {"fork": True}, {"session-id": session.upper()}):
        refusal = it.refuses({**body, **fields}, **bearer(ALICE))
        assert refusal == (404, "session_not_found", "session-id", NO_SESSION), fields
    assert it.starts == before


def test_a_session_of_another_workspace_is_a_400_that_names_its_own(open_server: Served) -> None:
    named = open_server.answers({"prompt": "go", "workspace": "one"})
    shared = open_server.answers({"prompt": "go"})
    for session, workspace, home in (
        (named, "two", "workspace 'one'"),
        (shared, "two", "the shared workspace"),
    ):
        body = {"prompt": "go", "session-id": session, "workspace": workspace}
        assert open_server.refuses(body) == (
            400,
            "invalid_value",
            "workspace",
            f"This session belongs to {home}; leave 'workspace' out to continue it.",
        )
    for body in (
        {"prompt": "go", "session-id": named},
        {"prompt": "go", "session-id": named.upper(), "workspace": "one"},
    ):
        assert open_server.answers(body) == named
    assert not (open_server.daemon.base / "workspace" / "two").exists()


# MCP.


def test_a_tool_of_an_unknown_server_is_a_400_that_lists_the_servers(open_server: Served) -> None:
    for tool in ("mcp__gitlab__get_repo", "mcp__github__", "Bash", "mcp__", "mcp__github__a,b"):
        refusal = open_server.refuses({"prompt": "go", "mcp-allowed-tools": [tool]})
        assert refusal[:3] == (400, "invalid_value", "mcp-allowed-tools")
    refusal = open_server.refuses({"prompt": "go", "mcp-allowed-tools": ["mcp__gitlab__x"]})
    assert refusal.message == (
        "'mcp__gitlab__x' is a tool of no configured MCP server. Configured servers: github, jira."
    )


def test_after_a_broken_reload_the_old_servers_are_offered(open_server: Served) -> None:
    daemon = open_server.daemon
    path = daemon.folder / "mcp.json"
    kept = path.read_text()
    turn = {"prompt": "go", "mcp-allowed-tools": ["mcp__github__x"]}
    try:
        path.write_text('{"mcpServers": {"github": {"command": 7, "env": {"TOKEN": "very-sec')
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for_record("mcp_reload_failed")
        open_server.answers(turn)
    finally:
        path.write_text(kept)
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for_record("mcp_reloaded")
    open_server.answers(turn)
    assert "very-sec" not in daemon.output


# Permissions.

SKIPPING: list[dict[str, Any]] = [
    {"dangerously-skip-permissions": True},
    {"permission-mode": "bypassPermissions"},
]


@pytest.mark.parametrize("fields", SKIPPING, ids=str)
def test_skipping_permissions_where_it_is_forbidden_is_a_400(
    one_key: Served, fields: dict[str, Any]
) -> None:
    refusal = one_key.refuses({"prompt": "go", **fields}, **bearer(ALICE))
    assert refusal[:3] == (400, "invalid_value", next(iter(fields)))
    assert "ALLOW_SKIP_PERMISSIONS=false" in refusal.message
    assert "allowed-tools" in refusal.message


# Faults of the system.


@pytest.fixture
def logged() -> Iterator[list[LogEvent]]:
    """What is logged meanwhile."""
    events: list[LogEvent] = []
    observer = cast(ILogObserver, events.append)
    globalLogPublisher.addObserver(observer)
    yield events
    globalLogPublisher.removeObserver(observer)


def read_answer(client: socket.socket) -> Answer:
    """All that comes until the connection ends or the answer is whole."""
    received = b""
    while data := client.recv(65536):
        received += data
        if b"\r\n\r\n" in received and (answers := parse_answers(received))[-1].complete:
            return answers[-1]
    [answer] = parse_answers(received, closed=True)
    return answer


async def ask(server: Running, *pieces: bytes) -> Answer:
    """One request on a connection of its own."""
    with server.connect() as client:
        for piece in pieces:
            await in_thread(client.sendall, piece)
        return await in_thread(read_answer, client)


def post(fields: Mapping[str, Any]) -> bytes:
    body = json.dumps(fields).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    return encode_request("POST", "/api/claude", headers, body)


async def check_nothing_happened(server: Running, descriptors: int) -> None:
    """Nothing was started and nothing is held or left."""
    await until(lambda: server.is_idle, "nothing is held")
    assert server.told("starts") == ""
    await until(lambda: count_descriptors(os.getpid()) <= descriptors, "no descriptor is left")
    assert names_in(server.folder / "state" / "run") == []


@in_reactor
@pytest.mark.parametrize("fields", SKIPPING, ids=str)
async def test_skipping_permissions_as_root_is_a_400_that_says_how_else(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    async with serving(tmp_path, CLI) as server:
        await until(lambda: server.executor.context.probe._known, "the CLI is known")
        descriptors = count_descriptors(os.getpid())
        answer = await ask(server, post({"prompt": "go", **fields}))
        assert (answer.status, answer.error["code"]) == (400, "invalid_value")
        assert answer.error["param"] == next(iter(fields))
        assert "Run the server as another user" in str(answer.error["message"])
        await check_nothing_happened(server, descriptors)


@in_reactor
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EROFS, "the file system is read-only. Make it writable"),
        (errno.ENOSPC, "no space is left. Free some space"),
        (errno.EDQUOT, "no space is left. Free some space"),
        (errno.EACCES, "permission was denied. Give the user that runs the server"),
        (errno.EIO, "the system says 'Input/output error'. Look at this directory"),
    ],
)
async def test_a_workspace_that_cannot_be_made_is_a_500_that_names_the_cause(
    number: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = os.mkdir

    def refuse(path: Any, *args: Any, **named: Any) -> None:
        if str(path).startswith(str(tmp_path / "base" / "workspace")):
            raise OSError(number, os.strerror(number), str(path))
        mkdir(path, *args, **named)

    async with serving(tmp_path, CLI) as server:
        await until(lambda: server.executor.context.probe._known, "the CLI is known")
        descriptors = count_descriptors(os.getpid())
        monkeypatch.setattr(os, "mkdir", refuse)
        answer = await ask(server, post({"prompt": "go", "workspace": "new"}))
        assert (answer.status, answer.error["code"]) == (500, "workspace_unavailable")
        assert f"cannot be used: {said}" in str(answer.error["message"])
        assert str(tmp_path) not in str(answer.error["message"])
        await check_nothing_happened(server, descriptors)
        monkeypatch.undo()
        assert (await ask(server, post({"prompt": "go", "workspace": "new"}))).status == 200


@in_reactor
async def test_a_body_slower_than_the_limit_is_a_408(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drip(client: socket.socket) -> Answer:
        client.settimeout(0.05)
        while True:
            try:
                return read_answer(client)
            except TimeoutError:
                client.sendall(b" ")

    monkeypatch.setattr(request, "_BODY_TIME", 0.4)
    monkeypatch.setattr(request, "LINGER", 0.2)
    async with serving(tmp_path, CLI) as server:
        await until(lambda: server.executor.context.probe._known, "the CLI is known")
        descriptors = count_descriptors(os.getpid())
        for length in ("Content-Length: 1000", "Transfer-Encoding: chunked"):
            with server.connect() as client:
                client.sendall(
                    b"POST /api/claude HTTP/1.1\r\nHost: localhost\r\n"
                    b"Content-Type: application/json\r\n" + length.encode() + b"\r\n\r\n"
                )
                answer = await in_thread(drip, client)
                assert (answer.status, answer.error["code"]) == (408, "request_timeout")
                assert answer.error["message"] == (
                    "The request body came too slowly. Send it again over a faster connection."
                )
                client.settimeout(10)
                assert await in_thread(client.recv, 1) == b""  # and the connection is closed
        await check_nothing_happened(server, descriptors)


def make_full_file(**_: object) -> IO[bytes]:
    """A temporary file on a disk that is full."""
    return open("/dev/full", "w+b")  # noqa: PTH123 - whoever asks for it closes it


def make_no_file(**_: object) -> IO[bytes]:
    """What becomes of a temporary file without a descriptor for it."""
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@in_reactor
@pytest.mark.parametrize(
    ("make_file", "expected"),
    [
        (make_full_file, (500, "internal_error", "made a mistake.", "No space left")),
        (make_no_file, (429, "server_busy", "cannot open another file now", "Too many open")),
    ],
    ids=["a full disk", "no descriptor"],
)
async def test_a_long_body_that_cannot_be_kept_is_refused(
    make_file: Callable[..., IO[bytes]],
    expected: tuple[int, str, str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[LogEvent],
) -> None:
    status, code, said, logs = expected
    async with serving(tmp_path, CLI) as server:
        await until(lambda: server.executor.context.probe._known, "the CLI is known")
        descriptors = count_descriptors(os.getpid())
        monkeypatch.setattr(tempfile, "TemporaryFile", make_file)
        long = post({"prompt": "x" * (3 * MB)})
        answer = await ask(server, long)
        assert (answer.status, answer.error["code"]) == (status, code)
        assert said in str(answer.error["message"])
        assert ("retry-after" in answer.headers) is (status == 429)
        with server.connect() as client:  # and one that leaves after the fault
            await in_thread(client.sendall, long[: 2 * MB])
        await check_nothing_happened(server, descriptors)
        faults = [event for event in logged if event.get("type") == "internal_error"]
        assert [logs in event["error"] for event in faults] == [True, True]
        assert not any("log_failure" in event for event in logged)
        monkeypatch.undo()
        assert (await ask(server, long)).status == 200


@in_reactor
async def test_an_mcp_file_that_cannot_be_written_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[LogEvent]
) -> None:
    fdopen = os.fdopen
    modes: list[int] = []

    def full(descriptor: int, mode: str = "r", *args: Any, **named: Any) -> Any:
        if mode != "wb":
            return fdopen(descriptor, mode, *args, **named)
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        os.close(descriptor)
        return open("/dev/full", "wb")  # noqa: PTH123 - the caller closes it

    (tmp_path / "mcp-config.json").write_text(json.dumps(MCP))
    async with serving(tmp_path, CLI) as server:
        await until(lambda: server.executor.context.probe._known, "the CLI is known")
        descriptors = count_descriptors(os.getpid())
        turn = post({"prompt": "go", "mcp-allowed-tools": ["mcp__github__x"]})
        monkeypatch.setattr(os, "fdopen", full)
        answer = await ask(server, turn)
        assert (answer.status, answer.error["code"]) == (500, "internal_error")
        assert answer.headers["x-request-id"] in str(answer.error["message"])
        assert "No space left on device" in str([e.get("log_failure") for e in logged])
        assert modes == [0o600]
        await check_nothing_happened(server, descriptors)
        monkeypatch.undo()
        assert (await ask(server, turn)).status == 200
        await until(lambda: not names_in(tmp_path / "state" / "run"), "the file is gone")
