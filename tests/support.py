"""What several test modules share: the reactor's side of the seams, played by hand."""

from __future__ import annotations

import json
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, cast

import pytest_twisted  # type: ignore[import-untyped]  # it has no types
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ProcessDone, ProcessTerminated
from twisted.internet.interfaces import IAddress, IReactorFromThreads, IReactorTime
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site
from zope.interface import implementer

from claude_proxy.errors import ProxyError
from claude_proxy.interfaces import ISessionControl
from claude_proxy.sessions.store import Store
from claude_proxy.web.auth import Authenticator, Origins
from claude_proxy.web.gate import Gate
from claude_proxy.web.request import ProxyRequest
from claude_proxy.web.site import ProxySite
from tests.secrecy import SECRETS

__all__ = [
    "TURN_FIELDS",
    "Answer",
    "Connection",
    "FakeChild",
    "FakeControl",
    "FakeReactor",
    "KeptRequests",
    "encode_request",
    "in_reactor",
    "inline_store",
    "open_site",
    "parse_answers",
    "result_of",
]

TURN_FIELDS: dict[str, Any] = {
    "workspace": "project",
    "system-prompt": "You are a test.",
    "dangerously-skip-permissions": True,
    "allowed-tools": ["Bash(git *)", "Edit"],
    "disallowed-tools": ["WebFetch"],
    "mcp-allowed-tools": ["mcp__github__get_repo"],
    "append-system-prompt": "Be brief.",
}
"""What a turn may ask for in either dialect, as JSON."""

_P = ParamSpec("_P")

_NO_PID = 90_000_000
"""Above every pid that Linux gives: a signal that a test lets through reaches nobody."""


def in_reactor(test: Callable[_P, Awaitable[None]]) -> Callable[_P, None]:
    """Run a test that has to wait for a thread, a process or a socket."""
    waiting: Callable[_P, None] = pytest_twisted.ensureDeferred(test)
    return waiting


def result_of(awaitable: Any) -> Any:
    """
    What a coroutine or Deferred has come to without waiting for anything.

    @raise AssertionError: it still waits.
    """
    done = awaitable if isinstance(awaitable, Deferred) else Deferred.fromCoroutine(awaitable)
    results: list[Any] = []
    done.addBoth(results.append)
    assert results, "It still waits."
    if isinstance(results[0], Failure):
        results[0].raiseException()
    return results[0]


class _InlinePool:
    """A thread pool that does its work at once, in the caller's thread."""

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def callInThreadWithCallback(
        self, done: Callable[[bool, Any], None], work: Callable[..., Any], *args: Any, **named: Any
    ) -> None:
        try:
            result = work(*args, **named)
        except Exception:  # noqa: BLE001 - handed on, as a real pool does
            done(False, Failure())
        else:
            done(True, result)


class _HoldingPool(_InlinePool):
    """A thread pool whose work waits until the test lets it happen."""

    def __init__(self) -> None:
        self.held: list[Callable[[], None]] | None = None

    def callInThreadWithCallback(
        self, done: Callable[[bool, Any], None], work: Callable[..., Any], *args: Any, **named: Any
    ) -> None:
        def happen() -> None:
            _InlinePool.callInThreadWithCallback(self, done, work, *args, **named)

        if self.held is None:
            happen()
        else:
            self.held.append(happen)


class _FakePipe:
    """The reading end of a child's stdout."""

    def __init__(self) -> None:
        self.paused = False

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False


class FakeChild:
    """
    A process that the test plays; the transport of its `ProcessProtocol`.

    @ivar argv: what was started.
    @ivar environment: with what.
    @ivar stdin: all that was written to it.
    """

    def __init__(
        self, protocol: ProcessProtocol, argv: list[str], environment: Mapping[str, str], pid: int
    ) -> None:
        self.protocol = protocol
        self.argv = argv
        self.environment = environment
        self.pid: int | None = pid
        self.stdin = b""
        self.stdin_closed = False
        self.pipes_closed = False
        self.stdout = _FakePipe()
        self.pipes = {1: self.stdout}

    # What the protocol does to it.

    def write(self, data: bytes) -> None:
        self.stdin += data

    def closeStdin(self) -> None:
        self.stdin_closed = True

    def loseConnection(self) -> None:
        self.pipes_closed = True

    # What the test plays and asks.

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What was written to its stdin, decoded."""
        return [json.loads(line) for line in self.stdin.splitlines()]

    @property
    def interrupted(self) -> bool:
        """Whether it was asked to end its turn."""
        return any(line.get("request", {}).get("subtype") == "interrupt" for line in self.lines)

    def says(self, *events: Mapping[str, Any]) -> None:
        """Write events that arrive together."""
        self.protocol.outReceived(b"".join(json.dumps(e).encode() + b"\n" for e in events))

    def complains(self, text: str) -> None:
        """Write to stderr."""
        self.protocol.errReceived(text.encode())

    def exits(self, code: int = 0, number: signal.Signals | None = None) -> None:
        """End, and let go of its pipes."""
        if number is not None:
            reason = Failure(ProcessTerminated(None, number))
        else:
            reason = Failure(ProcessTerminated(code, None) if code else ProcessDone(0))
        self.protocol.processExited(reason)
        self.pid = None
        self.protocol.processEnded(reason)


class FakeReactor(Clock):
    """
    A clock that also starts processes and runs what is meant for threads.

    @ivar children: all that were started, in order.
    @ivar spawn_error: raised by the next start.
    """

    def __init__(self) -> None:
        super().__init__()
        self.children: list[FakeChild] = []
        self.spawn_error: OSError | None = None
        self._pool = _HoldingPool()

    def spawnProcess(
        self,
        processProtocol: ProcessProtocol,
        executable: str,
        args: list[str],
        env: Mapping[str, str],
    ) -> FakeChild:
        if self.spawn_error is not None:
            error, self.spawn_error = self.spawn_error, None
            raise error
        assert executable == args[0]
        child = FakeChild(processProtocol, list(args), env, _NO_PID + len(self.children))
        self.children.append(child)
        processProtocol.makeConnection(cast(Any, child))
        return child

    def getThreadPool(self) -> _HoldingPool:
        return self._pool

    def callFromThread(self, work: Callable[..., Any], *args: Any, **named: Any) -> None:
        work(*args, **named)

    def hold_threads(self) -> None:
        """Let the work of threads wait from now on."""
        self._pool.held = []

    def release_threads(self) -> None:
        """Let it happen, and do not hold it any longer."""
        held, self._pool.held = self._pool.held or [], None
        for happen in held:
            happen()


def inline_store() -> Store:
    """A real store in memory that answers at once; open."""
    store = Store(None, cast(IReactorFromThreads, FakeReactor()))
    store._pool = cast(Any, _InlinePool())
    result_of(store.open())
    return store


@implementer(ISessionControl)
class FakeControl:
    """
    Stands in for who runs turns; by the ids of sessions.

    @ivar states: those that are not idle.
    @ivar interrupts: answers that are awaited.
    @ivar endings: with their reasons, as they are awaited.
    """

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.interrupts: dict[str, Deferred[bool]] = {}
        self.endings: dict[str, tuple[ProxyError, Deferred[None]]] = {}

    def state(self, session_id: str) -> str:
        return self.states.get(session_id, "idle")

    def interrupt(self, session_id: str) -> Deferred[bool]:
        return self.interrupts.setdefault(session_id, Deferred())

    def end(self, session_id: str, reason: ProxyError) -> Deferred[None]:
        return self.endings.setdefault(session_id, (reason, Deferred()))[1]


@dataclass(frozen=True)
class Answer:
    """
    One HTTP response.

    @ivar headers: by their names in lower case; several of one name are joined.
    @ivar complete: whether it has come to its end.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    complete: bool

    @property
    def json(self) -> Any:
        """The body, decoded; checks that it says what it is."""
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, str | None]:
        """The error envelope's content; checks its shape."""
        assert set(self.json) == {"error"}
        error: dict[str, str | None] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


def parse_answers(data: bytes, *, to_head: bool = False, closed: bool = False) -> list[Answer]:
    """
    Split what a server wrote into responses; interim ones (100) are left out.

    @param to_head: they answer HEAD requests, so that none has a body.
    @param closed: the connection has ended, and with it a body without a length.
    """
    answers = []
    while data:
        head, separator, data = data.partition(b"\r\n\r\n")
        assert separator, f"The head is incomplete: {head!r}"
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(first.split(" ")[1])
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(": ")
            known = headers.get(name.lower())
            headers[name.lower()] = value if known is None else f"{known}, {value}"
        body, complete = b"", True
        if status == 100:
            continue
        if status == 204 or to_head:
            pass
        elif headers.get("transfer-encoding") == "chunked":
            body, data, complete = _dechunked(data)
        elif "content-length" in headers:
            length = int(headers["content-length"])
            body, data, complete = data[:length], data[length:], len(data) >= length
        else:
            body, data, complete = data, b"", closed
        answers.append(Answer(status, headers, body, complete))
    return answers


def _dechunked(data: bytes) -> tuple[bytes, bytes, bool]:
    """The body so far, what follows it, and whether it is whole."""
    body = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        body += data[:length]
        assert data[length : length + 2] == b"\r\n"
        data = data[length + 2 :]
        if length == 0:
            return body, data, True
    return body, b"", False


def _learn_from(data: bytes) -> None:
    """Keep in mind what no log may show of a request that comes in one piece."""
    head, _, body = data.partition(b"\r\n\r\n")
    lines = [line.partition(": ") for line in head.decode("latin-1").split("\r\n")]
    SECRETS.learn_request({name.lower(): value for name, _, value in lines}, body)


class Connection:
    """
    A connection to a site in memory; the test plays client and socket.

    @ivar transport: the socket; its `dataBuffer` stands for what it has not yet taken.
    """

    def __init__(self, site: Site, address: IAddress | None = None) -> None:
        self.transport = cast(
            Any, StringTransport(peerAddress=address or IPv4Address("TCP", "127.0.0.1", 40000))
        )
        self.transport.dataBuffer = b""
        channel: Any = site.buildProtocol(self.transport.getPeer())
        self._channel = channel
        channel.makeConnection(self.transport)

    def send(self, data: bytes) -> None:
        """Send bytes."""
        _learn_from(data)
        self._channel.dataReceived(data)

    def request(
        self,
        method: str = "GET",
        path: str = "/",
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send a request; return its answer as far as it has come."""
        self.transport.clear()
        lengths = {} if body is None else {"Content-Length": str(len(body))}
        self.send(encode_request(method, path, {**lengths, **(headers or {})}, body or b""))
        [answer] = parse_answers(self.received, to_head=method == "HEAD")
        return answer

    @property
    def received(self) -> bytes:
        """All bytes that came back since the last `request`."""
        data: bytes = self.transport.value()
        return data

    @property
    def answers(self) -> list[Answer]:
        """The responses that came back."""
        return parse_answers(self.received, closed=self.closed)

    @property
    def closed(self) -> bool:
        """Whether the server wants the connection closed."""
        return bool(self.transport.disconnecting)

    @property
    def aborted(self) -> bool:
        """Whether the server cut the connection off."""
        return bool(self.transport.disconnected)

    def block(self) -> None:
        """Let the socket take nothing any more."""
        self.transport.producer.pauseProducing()

    def unblock(self) -> None:
        """Let it take everything again."""
        self.transport.producer.resumeProducing()

    def lose(self) -> None:
        """Let the client go away."""
        self._channel.connectionLost(Failure(ConnectionDone()))


def encode_request(
    method: str = "GET",
    path: str = "/",
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    version: str = "HTTP/1.1",
) -> bytes:
    """The bytes of a request; the Host is localhost unless given."""
    lines = {"Host": "localhost", **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value != "")
    return f"{method} {path} {version}\r\n{head}\r\n".encode("utf-8", "surrogateescape") + body


class KeptRequests(Resource):
    """A resource that answers nothing by itself: the test has the requests."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[ProxyRequest] = []

    def render(self, request: Any) -> int:
        self.requests.append(request)
        return NOT_DONE_YET


def open_site(resource: Resource, clock: Clock, **changed: Any) -> ProxySite:
    """
    A site without keys, whose only JSON path is /json, for bodies of at most 1000 bytes.

    @param changed: fields of its `Gate` that shall be other than that.
    """
    gate = Gate(
        authenticator=Authenticator(()),
        origins=Origins(allowed=(), hosts=(), open=True),
        public=frozenset({"/public"}),
        json_paths=frozenset({"/json"}),
        max_body=1000,
    )
    return ProxySite(resource, replace(gate, **changed), cast(IReactorTime, clock))
