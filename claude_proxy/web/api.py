"""
The routes.  Each takes a request apart, hands it down, and answers; nothing is decided here.
"""

from __future__ import annotations

import msgspec
from klein import Klein
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure as TwistedFailure
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from claude_proxy.dialects import native
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.executor import Executor
from claude_proxy.web.health import HealthReport
from claude_proxy.web.site import (
    ProxyRequest,
    prepare_error,
    prepare_json,
)
from claude_proxy.web.stream import EventStream, WholeAnswer

__all__ = ["JSON_PATHS", "PUBLIC_PATHS", "Api"]

PUBLIC_PATHS = frozenset({"/health"})
"""What needs no key."""

JSON_PATHS = frozenset({"/api/claude"})
"""What takes a JSON body by POST."""


class Api:
    """The routes of one server."""

    app = Klein()
    _log = Logger(namespace="claude_proxy.web")

    def __init__(
        self,
        executor: Executor,
        health: HealthReport,
        clock: IReactorTime,
        *,
        stall_timeout: float,
    ) -> None:
        """
        @param stall_timeout: seconds for which a client may take nothing of its answer.
        """
        self._executor = executor
        self._health = health
        self._clock = clock
        self._stall_timeout = stall_timeout

    @app.route("/health", methods=["GET"])
    async def health(self, request: ProxyRequest) -> bytes:
        status, report = await self._health.make()
        return prepare_json(request, status, msgspec.json.encode(report))

    @app.route("/api/claude", methods=["POST"])
    async def claude(self, request: ProxyRequest) -> None:
        body = request.body()
        decoded = native.decode_request(body)
        turn = native.turn_request(
            decoded,
            tenant=request.tenant or "",
            request_id=request.request_id,
            received=self._clock.seconds(),
        )
        self._log.info(
            "request received",
            type="request",
            path="/api/claude",
            request_id=request.request_id,
            session_id=turn.session_id,
            tenant=turn.tenant,
            body_bytes=len(body),
            prompt_characters=len(decoded.prompt),
            workspace=turn.workspace,
            stream=decoded.stream,
        )
        response: EventStream | WholeAnswer
        if decoded.stream:
            response = EventStream(
                request,
                self._clock,
                self._stall_timeout,
                partial_messages=decoded.include_partial_messages,
            )
        else:
            response = WholeAnswer(request, self._clock, self._stall_timeout)
        response.run(lambda: self._executor.run(turn, response))
        await response.outlet.closed

    @app.handle_errors(ProxyError)  # type: ignore[arg-type]  # this site makes ProxyRequests only
    def failed(self, request: ProxyRequest, failure: TwistedFailure) -> bytes:
        error = failure.value
        assert isinstance(error, ProxyError)  # noqa: S101 - Klein chose this handler by the type
        return prepare_error(request, error)

    @app.handle_errors(MethodNotAllowed)  # type: ignore[arg-type]  # this site makes ProxyRequests only
    def wrong_method(self, request: ProxyRequest, failure: TwistedFailure) -> bytes:
        assert isinstance(failure.value, MethodNotAllowed)  # noqa: S101 - as above
        allow = tuple(sorted(failure.value.valid_methods or ()))
        message = f"This path takes {' and '.join(allow)}, not this method."
        return prepare_error(request, ProxyError(Failure.METHOD_NOT_ALLOWED, message, allow=allow))

    @app.handle_errors(HTTPException)  # type: ignore[arg-type]  # this site makes ProxyRequests only
    def not_found(self, request: ProxyRequest, _failure: TwistedFailure) -> bytes:
        message = "There is nothing at this path. See GET /health and POST /api/claude."
        return prepare_error(request, ProxyError(Failure.NOT_FOUND, message))

    @app.handle_errors(Exception)  # type: ignore[arg-type]  # this site makes ProxyRequests only
    def fault(self, request: ProxyRequest, failure: TwistedFailure) -> bytes:
        self._log.failure(
            "a request failed by a fault of ours",
            failure,
            type="internal_error",
            request_id=request.request_id,
        )
        return prepare_error(request, ProxyError(Failure.INTERNAL_ERROR))
