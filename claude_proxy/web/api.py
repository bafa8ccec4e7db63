"""
The routes.  Each takes a request apart, hands it down, and answers; nothing is decided here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

import msgspec
from klein import Klein
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure as TwistedFailure
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from claude_proxy.cli.catalogue import ModelCatalogue
from claude_proxy.dialects import chat, history, listing, models, native
from claude_proxy.dialects.completion import Activity, ChatAnswer, ChatStream
from claude_proxy.dialects.passthrough import NativeAnswer, NativeStream
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.executor import Executor
from claude_proxy.sessions.register import SessionRegister
from claude_proxy.sessions.turns import TurnRequest
from claude_proxy.web import openapi
from claude_proxy.web.health import HealthReport
from claude_proxy.web.metrics import CONTENT_TYPE, Metrics
from claude_proxy.web.request import ProxyRequest, prepare_error, prepare_json
from claude_proxy.web.stream import EventStream, WholeAnswer

__all__ = ["JSON_PATHS", "PUBLIC_PATHS", "Api", "ChatRules"]

PUBLIC_PATHS = frozenset({"/health"})
"""What needs no key."""

JSON_PATHS = frozenset({"/api/claude", "/v1/chat/completions"})
"""What takes a JSON body by POST."""

HEAD_PATIENCE = 5.0
"""Seconds for which the head of a chat's stream waits for something to tell."""

_LARGE = 256 * 1024
"""Bytes of a chat's body from which on it is decoded in a thread: 30 MB take most of a second."""

_CONVERSATION_HEADERS = ("x-conversation-id", "x-openwebui-chat-id")
_CONVERSATION = re.compile(r"[!-~]{1,200}")


@dataclass(frozen=True, slots=True)
class ChatRules:
    """
    What the settings say of the OpenAI dialect.

    @ivar text_parameters: which parameters the text of a message may set.
    @ivar activity: where thinking and tool activity go.
    @ivar aliases: names of models and what they stand for.
    """

    text_parameters: str
    activity: Activity
    aliases: tuple[tuple[str, str], ...]


class Api:
    """The routes of one server."""

    app = Klein()
    _log = Logger(namespace="claude_proxy.web")

    def __init__(
        self,
        executor: Executor,
        register: SessionRegister,
        health: HealthReport,
        clock: IReactorTime,
        *,
        stall_timeout: float,
        in_thread: Callable[..., Awaitable[Any]],
        chat_rules: ChatRules,
        catalogue: ModelCatalogue,
        metrics: Metrics,
    ) -> None:
        """
        @param register: the sessions, for those who ask for them by name.
        @param stall_timeout: seconds for which a client may take nothing of its answer.
        @param in_thread: runs what takes long.
        @param catalogue: knows which models the CLI names.
        """
        self._executor = executor
        self._register = register
        self._health = health
        self._clock = clock
        self._stall_timeout = stall_timeout
        self._in_thread = in_thread
        self._chat_rules = chat_rules
        self._catalogue = catalogue
        self._metrics = metrics
        self._started = int(time.time())

    @app.route("/health", methods=["GET"])
    async def health(self, request: ProxyRequest) -> bytes:
        status, report = await self._health.make(request.request_id)
        return prepare_json(request, status, msgspec.json.encode(report))

    @app.route("/metrics", methods=["GET"])
    def metrics(self, request: ProxyRequest) -> bytes:
        body = prepare_json(request, 200, self._metrics.render())
        request.setHeader(b"Content-Type", CONTENT_TYPE)
        return body

    @app.route("/openapi.json", methods=["GET"])
    def openapi_document(self, request: ProxyRequest) -> bytes:
        keys = request.gate.authenticator.required
        return prepare_json(request, 200, openapi.encoded(keys=keys))

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
            framer = NativeStream(partial_messages=decoded.include_partial_messages)
            response = EventStream(request, self._clock, self._stall_timeout, framer)
        else:
            response = WholeAnswer(request, self._clock, self._stall_timeout, NativeAnswer())
        response.run(lambda: self._executor.run(turn, response))
        await response.outlet.closed

    @app.route("/v1/chat/completions", methods=["POST"])
    async def chat_completions(self, request: ProxyRequest) -> None:
        received, body = self._clock.seconds(), request.body()
        decode = partial(
            chat.decode_request,
            body,
            text_parameters=self._chat_rules.text_parameters,
            conversation=_conversation(request),
            session_header=request.head("x-claude-session-id"),
        )
        asked = await self._in_thread(decode) if len(body) > _LARGE else decode()
        aliases = self._chat_rules.aliases
        known = await self._known(asked.model) if asked.model else ()
        turn = chat.turn_request(
            asked,
            model=models.resolve(asked.model, aliases, known),
            tenant=request.tenant or "",
            request_id=request.request_id,
            received=received,
        )
        self._log_chat(request, asked, turn, len(body))
        response = self._chat_response(request, asked)
        response.run(lambda: self._executor.run(turn, response))
        await response.outlet.closed

    def _log_chat(
        self, request: ProxyRequest, asked: chat.ChatRequest, turn: TurnRequest, size: int
    ) -> None:
        self._log.info(
            "request received",
            type="request",
            path="/v1/chat/completions",
            request_id=request.request_id,
            session_id=turn.session_id,
            tenant=turn.tenant,
            body_bytes=size,
            messages=asked.message_count,
            prompt_characters=asked.prompt_characters,
            workspace=turn.workspace,
            stream=asked.stream,
        )
        if asked.ignored:
            self._log.info(
                "fields without effect: {fields}",
                type="fields_ignored",
                fields=list(asked.ignored),
                request_id=request.request_id,
            )

    def _chat_response(
        self, request: ProxyRequest, asked: chat.ChatRequest
    ) -> EventStream | WholeAnswer:
        form: dict[str, Any] = {
            "completion_id": f"chatcmpl-{uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
            "include_usage": asked.include_usage,
            "bare_json": asked.bare_json,
            "activity": self._chat_rules.activity,
        }
        answer = ChatStream(**form) if asked.stream else ChatAnswer(**form)

        def tip() -> str | None:
            text = answer.answer_text
            return None if text is None else history.next_tip(asked.tip_source, text)

        if isinstance(answer, ChatStream):
            return EventStream(
                request,
                self._clock,
                self._stall_timeout,
                answer,
                tip=tip,
                patience=HEAD_PATIENCE,
            )
        return WholeAnswer(request, self._clock, self._stall_timeout, answer, tip=tip)

    async def _known(self, model: str) -> tuple[str, ...]:
        """The models that the CLI names, where that matters for this one."""
        if not models.needs_known(model, self._chat_rules.aliases):
            return ()
        return await self._catalogue.required_names()

    @app.route("/v1/models", methods=["GET"])
    async def list_models(self, request: ProxyRequest) -> bytes:
        known = await self._catalogue.names()
        body = models.models_list(self._chat_rules.aliases, known, self._started)
        return prepare_json(request, 200, body)

    @app.route("/v1/models/<path:name>", methods=["GET"])
    async def one_model(self, request: ProxyRequest, name: str) -> bytes:
        known = await self._known(name)
        body = models.model_entry(name, self._chat_rules.aliases, known, self._started)
        return prepare_json(request, 200, body)

    @app.route("/api/sessions", methods=["GET"])
    async def list_sessions(self, request: ProxyRequest) -> bytes:
        asked = listing.decode_query(request.args or {})
        page = await self._register.page(request.tenant or "", asked.limit, asked.before)
        sessions = [(entry.record, entry.state) for entry in page.entries]
        return prepare_json(request, 200, listing.encode_page(sessions, page.end))

    @app.route("/api/sessions/<name>", methods=["GET"])
    async def one_session(self, request: ProxyRequest, name: str) -> bytes:
        entry = await self._register.get(request.tenant or "", name)
        return _of_session(request, name, listing.encode_session(entry.record, entry.state))

    @app.route("/api/sessions/<name>/interrupt", methods=["POST"])
    async def interrupt_session(self, request: ProxyRequest, name: str) -> bytes:
        interrupted = await self._register.interrupt(request.tenant or "", name, request.request_id)
        body = listing.encode_interrupted(name, interrupted=interrupted)
        return _of_session(request, name, body)

    @app.route("/api/sessions/<name>", methods=["DELETE"])
    async def delete_session(self, request: ProxyRequest, name: str) -> bytes:
        record = await self._register.delete(request.tenant or "", name, request.request_id)
        return _of_session(request, name, listing.encode_deleted(record))

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
        message = (
            "There is nothing at this path. This server has POST /v1/chat/completions, "
            "GET /v1/models, GET /v1/models/ID, POST /api/claude, GET /api/sessions, GET and "
            "DELETE /api/sessions/ID, POST /api/sessions/ID/interrupt, GET /metrics, "
            "GET /openapi.json and GET /health."
        )
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


def _of_session(request: ProxyRequest, session_id: str, body: bytes) -> bytes:
    """Answer about a session by one of the ids that it has."""
    request.setHeader(b"X-Claude-Session-Id", session_id.encode())
    return prepare_json(request, 200, body)


def _conversation(request: ProxyRequest) -> str | None:
    """The client's own name for the conversation, by the first header that has a usable one."""
    for header in _CONVERSATION_HEADERS:
        name = request.head(header)
        if name is not None and _CONVERSATION.fullmatch(name):
            return name
    return None
