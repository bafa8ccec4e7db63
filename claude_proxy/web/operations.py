"""
What can be asked of the server, as a table: what each operation takes, answers, and may fail with.

The rows name the types that requests are checked by and answers are made of; what these say is not
said here again.  `claude_proxy.web.openapi` makes the document of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from claude_proxy.dialects.chat import ChatCompletionRequest
from claude_proxy.dialects.fields import ModelName, SessionId
from claude_proxy.dialects.listing import (
    BEFORE,
    LIMIT,
    DeletedSession,
    InterruptedSession,
    Session,
    SessionPage,
)
from claude_proxy.dialects.models import Model, ModelList
from claude_proxy.dialects.native import NativeRequest
from claude_proxy.dialects.passthrough import NativeEvent, NativeFailure, NativeResult
from claude_proxy.dialects.shapes import ChatCompletion, ChatCompletionChunk
from claude_proxy.errors import ErrorEnvelope, Failure
from claude_proxy.web import examples
from claude_proxy.web.health import Health

__all__ = ["EDGE", "OPERATIONS", "Answer", "Events", "Operation", "Parameter"]

_JSON = "application/json"
_EVENTS = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Parameter:
    """
    A parameter beside the body.

    @ivar place: ``path``, ``query`` or ``header``.
    @ivar type: what it must be; one that may be left out may also be empty.
    """

    name: str
    place: str
    type: Any
    description: str
    example: str | int | None = None


@dataclass(frozen=True, slots=True)
class Events:
    """
    A stream of Server-Sent Events.

    @ivar data: the JSON in an event is one of these.
    @ivar last: the text of a last event that is no JSON.
    """

    data: tuple[type, ...]
    last: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """
    What an operation answers if it does not fail.

    @ivar bodies: by media type: the type that it is made of, or `Events`.  There are generators
        that take the first one only.
    @ivar headers: names, of those that the document describes.
    @ivar examples: by media type.
    """

    description: str
    bodies: Mapping[str, Any]
    headers: tuple[str, ...] = ()
    examples: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Operation:
    """
    One method of one path.

    @ivar name: in the code that clients generate; never changes.
    @ivar answers: by status.
    @ivar failures: all that it may end with.
    @ivar request: the type of its body; None if it has none.
    @ivar requests: examples of bodies, by their names.
    @ivar failure_headers: that its own failures may have, beside those that belong to a status.
    @ivar public: it needs no key.
    """

    method: str
    path: str
    name: str
    tag: str
    summary: str
    description: str
    answers: Mapping[int, Answer]
    failures: frozenset[Failure]
    parameters: tuple[Parameter, ...] = ()
    request: type[msgspec.Struct] | None = None
    requests: Mapping[str, Any] = field(default_factory=dict)
    failure_headers: tuple[str, ...] = ()
    public: bool = False


_OF_TURNS = frozenset(
    {
        Failure.INVALID_JSON,
        Failure.INVALID_VALUE,
        Failure.UNSUPPORTED_MEDIA_TYPE,
        Failure.MODEL_NOT_FOUND,
        Failure.SESSION_NOT_FOUND,
        Failure.SESSION_BUSY,
        Failure.RATE_LIMIT_EXCEEDED,
        Failure.UPSTREAM_INVALID_REQUEST,
        Failure.UPSTREAM_OVERLOADED,
        Failure.UPSTREAM_ERROR,
        Failure.CLI_NOT_AUTHENTICATED,
        Failure.CLI_NOT_FOUND,
        Failure.CLI_FAILED,
        Failure.TURN_TIMEOUT,
        Failure.INACTIVITY_TIMEOUT,
        Failure.WORKSPACE_UNAVAILABLE,
        Failure.SHUTTING_DOWN,
    }
)

_OF_OTHER_REQUESTS = frozenset({Failure.NOT_FOUND, Failure.METHOD_NOT_ALLOWED})
"""What no request to an operation ends with."""

EDGE = frozenset(Failure) - _OF_TURNS - _OF_OTHER_REQUESTS
"""What the edge may say to any request."""

_BY_ID = EDGE | {Failure.SESSION_NOT_FOUND, Failure.NOT_FOUND}

_REQUEST_ID = Parameter(
    "X-Request-Id",
    "header",
    str,
    "Names the request in the server's log and in the answer: 1 to 128 of letters, digits, `.`, "
    "`_`, `:`, `-`. Anything else counts for nothing.",
)

_SESSION = Parameter(
    "id", "path", str, "An id of the session, as the server gave it.", examples.SESSION_ID
)

_OF_SESSION = ("X-Claude-Session-Id",)
_OF_STREAM = ("X-Claude-Session-Id", "Cache-Control", "X-Accel-Buffering")
_OF_FAILED_TURN = ("X-Claude-Session-Id", "X-Should-Retry")

_HEALTH_BODIES = {_JSON: Health}

OPERATIONS = (
    Operation(
        "POST",
        "/api/claude",
        "runTurn",
        "turns",
        "Run a turn of the agent",
        "The answer is a stream of the CLI's own events, or with `stream: false` its `result`. A "
        "failure that is known before the first event has its own status; a later one is the last "
        "event of the stream.",
        {
            200: Answer(
                "The events, each as `data`, or the `result` alone. Comment lines bridge silence.",
                {_JSON: NativeResult, _EVENTS: Events((NativeFailure, NativeEvent))},
                _OF_STREAM,
                {_JSON: examples.RESULT},
            )
        },
        EDGE | _OF_TURNS,
        (_REQUEST_ID,),
        NativeRequest,
        examples.TURNS,
        _OF_FAILED_TURN,
    ),
    Operation(
        "POST",
        "/v1/chat/completions",
        "createChatCompletion",
        "openai",
        "Answer a chat, as OpenAI's API does",
        "Conversations continue in their session by themselves. Fields without effect are "
        "accepted, those whose loss would change the form of the answer are refused.",
        {
            200: Answer(
                "A completion, or with `stream: true` its chunks, each as `data`. `[DONE]` ends a "
                "stream that is whole; one that failed ends with an error instead.",
                {
                    _JSON: ChatCompletion,
                    _EVENTS: Events((ChatCompletionChunk, ErrorEnvelope), "[DONE]"),
                },
                _OF_STREAM,
                {_JSON: examples.COMPLETION},
            )
        },
        EDGE | _OF_TURNS,
        (
            _REQUEST_ID,
            Parameter("X-Claude-Session-Id", "header", SessionId, "The session to continue."),
            Parameter(
                "X-Conversation-Id", "header", str, "The client's own name of the conversation."
            ),
            Parameter(
                "X-OpenWebUI-Chat-Id",
                "header",
                str,
                "The same, as Open WebUI sends it; `X-Conversation-Id` comes before it.",
            ),
        ),
        ChatCompletionRequest,
        examples.CHATS,
        _OF_FAILED_TURN,
    ),
    Operation(
        "GET",
        "/v1/models",
        "listModels",
        "openai",
        "List the models",
        "The CLI's default, the aliases of this server, and the models that the CLI names.",
        {
            200: Answer(
                "The models.",
                {_JSON: ModelList},
                examples={_JSON: examples.MODELS},
            )
        },
        EDGE,
        (_REQUEST_ID,),
    ),
    Operation(
        "GET",
        "/v1/models/{model}",
        "retrieveModel",
        "openai",
        "Look at a model",
        "There is one for every name that a request may carry.",
        {200: Answer("The model.", {_JSON: Model}, examples={_JSON: examples.MODEL})},
        EDGE
        | {
            Failure.MODEL_NOT_FOUND,
            Failure.NOT_FOUND,
            Failure.CLI_NOT_FOUND,
            Failure.CLI_FAILED,
        },
        (
            Parameter(
                "model",
                "path",
                ModelName,
                "The name; a slash in it may stand as it is.",
                "claude-code",
            ),
            _REQUEST_ID,
        ),
    ),
    Operation(
        "GET",
        "/api/sessions",
        "listSessions",
        "sessions",
        "List sessions",
        "Those of the caller's key, the newest first.",
        {
            200: Answer(
                "A page of the list.",
                {_JSON: SessionPage},
                examples={_JSON: examples.SESSIONS},
            )
        },
        EDGE | {Failure.INVALID_VALUE},
        (
            Parameter("limit", "query", LIMIT, "How many at most.", 10),
            Parameter("before", "query", BEFORE, "The `next` of the page before."),
            _REQUEST_ID,
        ),
    ),
    Operation(
        "GET",
        "/api/sessions/{id}",
        "getSession",
        "sessions",
        "Look at a session",
        "A session of another key is a 404, as one that does not exist.",
        {200: Answer("The session.", {_JSON: Session}, _OF_SESSION, {_JSON: examples.SESSION})},
        _BY_ID,
        (_SESSION, _REQUEST_ID),
    ),
    Operation(
        "DELETE",
        "/api/sessions/{id}",
        "deleteSession",
        "sessions",
        "Delete a session",
        "Ends what runs in it and forgets it for good. The CLI's transcript stays.",
        {
            200: Answer(
                "Nothing of the session runs any more.",
                {_JSON: DeletedSession},
                _OF_SESSION,
                {_JSON: examples.DELETED},
            )
        },
        _BY_ID,
        (_SESSION, _REQUEST_ID),
    ),
    Operation(
        "POST",
        "/api/sessions/{id}/interrupt",
        "interruptSession",
        "sessions",
        "Stop the turn that is running",
        "Its own answer ends as usual, and the session can be continued.",
        {
            200: Answer(
                "The turn has ended, or there was none.",
                {_JSON: InterruptedSession},
                _OF_SESSION,
                {_JSON: examples.INTERRUPTED},
            )
        },
        _BY_ID,
        (_SESSION, _REQUEST_ID),
    ),
    Operation(
        "GET",
        "/health",
        "getHealth",
        "server",
        "Look at the server's health",
        "Needs no key. A server that is degraded can still run turns.",
        {
            200: Answer("Turns can be run.", _HEALTH_BODIES),
            503: Answer("Turns cannot be run; the checks say why.", _HEALTH_BODIES),
            500: Answer("A check is broken itself.", _HEALTH_BODIES),
        },
        EDGE - {Failure.INVALID_API_KEY},
        (_REQUEST_ID,),
        public=True,
    ),
    Operation(
        "GET",
        "/metrics",
        "getMetrics",
        "server",
        "Read the figures",
        "For Prometheus.",
        {200: Answer("The figures, in Prometheus' text format.", {"text/plain": str})},
        EDGE,
        (_REQUEST_ID,),
    ),
    Operation(
        "GET",
        "/openapi.json",
        "getOpenapi",
        "server",
        "Read this document",
        "It is the same for every key.",
        {200: Answer("This document.", {_JSON: dict[str, Any]})},
        EDGE,
        (_REQUEST_ID,),
    ),
)
"""All there is, in the order of the document."""
