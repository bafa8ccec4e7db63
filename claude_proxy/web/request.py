"""
One request: looked at as soon as its head has arrived.

Keys, origins, content type and length are checked before any of a body is read; the length again
while it is read.  What is refused is answered at once, in JSON; the rest of its body is read and
dropped for a moment, because a connection that is closed on unread data takes its answer with it.
"""

from __future__ import annotations

import errno
import re
from http import HTTPStatus
from io import BytesIO
from tempfile import SpooledTemporaryFile
from time import monotonic
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import quote

import msgspec
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.web.server import Request

from claude_proxy import __version__
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.web.auth import presented_key
from claude_proxy.web.bodies import SMALL_BODY, Bodies
from claude_proxy.web.channel import COME_BACK, LINGER, address_of, drop, new_request_id
from claude_proxy.web.gate import Gate, canonical_path, is_preflight
from claude_proxy.web.logs import mask_key

if TYPE_CHECKING:
    from claude_proxy.web.site import ProxySite  # which makes these

__all__ = ["ProxyRequest", "prepare_error", "prepare_json"]

_log = Logger(namespace="claude_proxy.web")

_BODY_TIME = 30.0
"""Seconds that any body may take; each `_BODY_RATE` bytes that have come allow a second more."""

_BODY_RATE = 64 * 1024

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

_HEADER_NAMES = re.compile(r"[A-Za-z0-9_, -]{1,4096}")

_PREFLIGHT_AGE = b"600"


class ProxyRequest(Request):
    """
    One request.

    @ivar request_id: the client's ``X-Request-Id`` if it is a plain one, else made up here.
    @ivar tenant: whose request it is; set for everything that needs a key.
    """

    _log = Logger(namespace="claude_proxy.web")

    site: ProxySite
    channel: Any
    tenant: str | None = None

    def __init__(self, channel: Any, queued: Any = None) -> None:
        super().__init__(channel, queued)
        self.request_id = ""
        self.received = monotonic()
        self._route: str | None = None
        self._refused = False
        self._complete = False
        self._held: ProxyError | None = None
        self._hold_timer: IDelayedCall | None = None
        self._body_size = 0
        self._bodies: Bodies | None = None
        self._counted = 0
        self._head_time = 0.0
        self._linger_timer: IDelayedCall | None = None
        self._body_timer: IDelayedCall | None = None

    def gotLength(self, length: int | None) -> None:
        # Called when the head is complete; what Twisted sets only after the body is needed now.
        self.method = self.channel._command  # noqa: SLF001 - nothing public has it yet
        self.uri = self.channel._path  # noqa: SLF001 - as above
        self.clientproto = self.channel._version  # noqa: SLF001 - as above
        self.path = self.uri.partition(b"?")[0]
        self._route = canonical_path(self.path)
        body = SpooledTemporaryFile(max_size=SMALL_BODY)  # noqa: SIM115 - Twisted closes it
        self.content = cast(IO[bytes], body)
        self._set_headers()
        self._admit(length or 0)
        if self._refused:
            return
        self.channel.admitted()
        if length != 0:
            self._head_time = self._site.clock.seconds()
            self._body_timer = self._site.clock.callLater(_BODY_TIME, self._body_is_slow)

    def handleContentChunk(self, data: bytes) -> None:
        if self._refused:
            return
        self._body_size += len(data)
        if self._body_size > self.gate.max_body:
            self.refuse(self.gate.too_large())
            return
        self._bodies = self._site.bodies
        if not self._bodies.grow(self._counted, self._body_size):
            self.refuse(_too_many_bodies())
            return
        if self._body_size > SMALL_BODY:
            self._counted = self._body_size
        try:
            super().handleContentChunk(data)
        except OSError as error:
            self.refuse(self._not_kept(error))

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        self._stop_body_timer()
        self._complete = True
        if self._refused:
            self._stop_lingering()
            return
        self.channel.complete()
        super().requestReceived(command, path, version)

    def connectionLost(self, reason: Any) -> None:
        self._stop_body_timer()
        if self.request_id and not self.finished:
            # Who was refused has had the whole answer, unless it was held back.
            self._site.log_end(self, complete=self._refused and self._hold_timer is None)
        for timer in (self._hold_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        self._hold_timer = self._linger_timer = None
        super().connectionLost(reason)
        self._forget_body()

    def finish(self) -> None:
        # It may have been the last that somebody waits for: what is behind it comes in at once.
        self._forget_body()
        super().finish()

    def process(self) -> None:
        if is_preflight(self.method.decode("latin-1"), self.head):
            self.write(prepare_preflight(self))
            self.finish()
            return
        # The router gets the very path that the gate has looked at.
        self.path = quote(self._route or "").encode()
        super().process()

    def getRequestHostname(self) -> bytes:
        # Klein would refuse, in HTML, hosts that it cannot read; nothing is routed by them.
        return b"localhost"

    @property
    def _site(self) -> ProxySite:
        # `self.site` is set only when the body is complete.
        site: ProxySite = cast(Any, self.channel).site
        return site

    @property
    def gate(self) -> Gate:
        """The site's gate; known from the first header on."""
        return self._site.gate

    def body(self) -> bytes:
        """The whole body, once: the file that it is in is closed."""
        if self.content is None:
            return b""
        with cast(IO[bytes], self.content) as content:
            self.content = BytesIO()
            return content.read()

    def head(self, name: str) -> str | None:
        """A request header, decoded without loss; the last one if there are several."""
        values = self.requestHeaders.getRawHeaders(name.encode())
        return values[-1].decode("utf-8", "surrogateescape") if values else None

    def _set_headers(self) -> None:
        given = self.head("x-request-id")
        usable = given is not None and _REQUEST_ID.fullmatch(given)
        self.request_id = given if given and usable else new_request_id()
        self.setHeader(b"X-Request-Id", self.request_id.encode())
        self.setHeader(b"X-Content-Type-Options", b"nosniff")
        if self.gate.origins.allowed:
            # An answer depends on who asks: caches must know.
            self.responseHeaders.addRawHeader(b"Vary", b"Origin")
        allowed = self.gate.origins.permitted(self.head("origin"))
        if allowed is not None:
            self.setHeader(b"Access-Control-Allow-Origin", allowed.encode())
            self.setHeader(
                b"Access-Control-Expose-Headers",
                b"X-Request-Id, X-Claude-Session-Id, Retry-After",
            )

    def _admit(self, length: int) -> None:
        method, path = self.method.decode("latin-1"), self._route or ""
        try:
            self.tenant = self.gate.admit(method, path, self.head)
            self._log_attempt(None)
            if self._route is None:
                raise ProxyError(Failure.NOT_FOUND)  # noqa: TRY301 - refused like the others
            self.gate.check_body(method, path, self.head("content-type"), length)
            if not self._site.bodies.has_room(length):
                raise _too_many_bodies()
        except ProxyError as error:
            wait = self._wait_of(error)
            if error.failure is Failure.INVALID_API_KEY:
                self._log_attempt(error, wait)
            if wait > 0:
                self._hold(error, wait)
            else:
                self.refuse(error)

    def _wait_of(self, error: ProxyError) -> float:
        """The seconds that an error has to wait: only a wrong key may, none is no guess."""
        key = presented_key(self.head("authorization"), self.head("x-api-key"))
        if error.failure is not Failure.INVALID_API_KEY or not key:
            return 0.0
        return self._site.guesses.note(self._address(), self._site.clock.seconds())

    def _log_attempt(self, error: ProxyError | None, wait: float = 0.0) -> None:
        if not self.gate.authenticator.required or (error is None and self.tenant is None):
            return
        key = presented_key(self.head("authorization"), self.head("x-api-key"))
        write = self._log.warn if error is not None else self._log.debug
        write(
            "key {verdict}",
            type="authentication",
            verdict="refused" if error is not None else "accepted",
            key=mask_key(key or ""),
            tenant=self.tenant,
            address=self._address(),
            user_agent=self.head("user-agent"),
            wait_ms=round(wait * 1000),
            request_id=self.request_id,
        )

    def _address(self) -> str:
        return address_of(self.channel)

    def _hold(self, error: ProxyError, wait: float) -> None:
        """Answer later, and do not read on before."""
        self._refused = True
        self._held = error
        self._hold_timer = self._site.clock.callLater(wait, self._held_long_enough)
        self.channel.pause_reading()

    def _held_long_enough(self) -> None:
        self._hold_timer = None
        if self._held is not None:
            self.channel.resume_reading()
            self._answer(self._held)
            if self._complete:
                self._stop_lingering()

    def hurry(self) -> None:
        """Give the answer that is held back."""
        if self._hold_timer is not None:
            self._hold_timer.cancel()
            self._held_long_enough()

    @property
    def is_refused(self) -> bool:
        """Whether it has its answer, or will have it, before anybody has seen it."""
        return self._refused

    def late(self) -> None:
        """The rest of the body does not come."""
        self.refuse(ProxyError(Failure.REQUEST_TIMEOUT))

    def refuse(self, error: ProxyError) -> None:
        """Answer now; without effect for a request that is refused already."""
        if not self._refused:
            self._refused = True
            self._answer(error)

    def _answer(self, error: ProxyError) -> None:
        """Say why it is refused; then read on for a moment without listening."""
        self._stop_body_timer()
        self._forget_body()
        # With Expect, the client waits for a word before it sends the body: this was the word.
        self.requestHeaders.removeHeader(b"expect")
        self.channel.persistent = False
        self.setHeader(b"Connection", b"close")
        body = prepare_error(self, error)
        self.write(body)
        self._linger_timer = self._site.clock.callLater(LINGER, self._lingered)

    def _body_is_slow(self) -> None:
        """A body that comes by drops would hold its connection for ever."""
        self._body_timer = None
        allowed = _BODY_TIME + self._body_size / _BODY_RATE
        left = self._head_time + allowed - self._site.clock.seconds()
        if left > 0:
            self._body_timer = self._site.clock.callLater(left, self._body_is_slow)
        else:
            self.late()

    def _not_kept(self, error: OSError) -> ProxyError:
        """Say why a long body does not fit into its temporary file."""
        self._log.error(
            "a request body could not be kept: {error}",
            type="internal_error",
            error=error.strerror,
            request_id=self.request_id,
        )
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            return ProxyError(Failure.INTERNAL_ERROR)
        message = (
            "The server cannot open another file now, which a body of this size needs. Try again "
            "a little later; its administrator may raise the limit of descriptors."
        )
        return ProxyError(Failure.SERVER_BUSY, message, retry_after=COME_BACK)

    def _forget_body(self) -> None:
        if self.content is not None:
            self.content.close()
        if self._bodies is not None:
            self._bodies.release(self._counted)
        self._counted = 0

    def _stop_body_timer(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _lingered(self) -> None:
        self._linger_timer = None
        # Under TLS, data still comes in while a connection is being closed.
        channel: Any = self.channel
        channel.dataReceived = drop
        self.finish()

    def _stop_lingering(self) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._lingered()


def _too_many_bodies() -> ProxyError:
    message = (
        "The server is busy with other large requests. Try again a little later; its "
        "administrator may raise MAX_BODIES_BYTES."
    )
    return ProxyError(Failure.SERVER_BUSY, message, retry_after=COME_BACK)


def prepare_json(request: Request, status: int, body: bytes) -> bytes:
    """Set status and headers for a JSON body; return the body."""
    request.setResponseCode(status, HTTPStatus(status).phrase.encode())
    request.setHeader(b"Server", f"claude-proxy/{__version__}".encode())
    request.setHeader(b"Content-Type", b"application/json")
    request.setHeader(b"Content-Length", str(len(body)).encode())
    request.setHeader(b"Cache-Control", b"no-store")
    return body


def prepare_error(request: ProxyRequest, error: ProxyError) -> bytes:
    """Set status and headers for a failure, and log it; return the body."""
    _log.info(
        "{method} {path} failed: {code}",
        type="request_failed",
        method=request.method.decode("latin-1"),
        path=request.path.decode("latin-1"),
        status=error.failure.status,
        code=error.failure.code,
        param=error.param,
        request_id=request.request_id,
    )
    if error.retry_after is not None:
        request.setHeader(b"Retry-After", str(error.retry_after).encode())
    if error.failure is Failure.INVALID_API_KEY:
        request.setHeader(b"WWW-Authenticate", b"Bearer")
    if error.allow:
        request.setHeader(b"Allow", ", ".join(error.allow).encode())
    if error.failure is Failure.INTERNAL_ERROR:
        message = f"{error.message.rstrip('.')}: {request.request_id}."
        error = ProxyError(error.failure, message)
    return prepare_json(request, error.failure.status, msgspec.json.encode(error.envelope()))


def prepare_preflight(request: ProxyRequest) -> bytes:
    """Tell a browser what an allowed origin may send."""
    request.setResponseCode(204)
    if request.responseHeaders.hasHeader(b"Access-Control-Allow-Origin"):
        request.setHeader(b"Access-Control-Allow-Methods", b"GET, POST, DELETE, OPTIONS")
        # Clients add headers of their own (x-stainless-...); an origin that may call may send them.
        wanted = request.head("access-control-request-headers") or ""
        if _HEADER_NAMES.fullmatch(wanted):
            request.setHeader(b"Access-Control-Allow-Headers", wanted.encode())
        request.setHeader(b"Access-Control-Max-Age", _PREFLIGHT_AGE)
    return b""
