"""
The catalogue: every way a request can fail, once.

Each entry of `Failure` carries the HTTP status, the error type and the code that clients see, and
the sentence that is said when the place that fails has nothing more exact to say.  A failure
travels as a `ProxyError`; only the edge turns it into bytes.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, TypedDict

__all__ = ["ErrorEnvelope", "ErrorFields", "Failure", "ProxyError"]


class ErrorFields(TypedDict):
    """What went wrong: `code` is for programs and a promise, `message` says what to do."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorEnvelope(TypedDict):
    """OpenAI's error envelope, in which every failure is told."""

    error: ErrorFields


class _Entry(NamedTuple):
    code: str
    status: int
    type: str
    sentence: str


class Failure(Enum):
    """One way to fail: its public code, HTTP status, OpenAI error type and default sentence."""

    INVALID_API_KEY = _Entry(
        "invalid_api_key",
        401,
        "invalid_request_error",
        "Incorrect API key provided. Send one of this server's keys as "
        "'Authorization: Bearer KEY'.",
    )
    ORIGIN_NOT_ALLOWED = _Entry(
        "origin_not_allowed",
        403,
        "invalid_request_error",
        "This server does not answer requests from this web origin or under this host name.",
    )
    INVALID_JSON = _Entry(
        "invalid_json", 400, "invalid_request_error", "The request body must be one JSON object."
    )
    INVALID_VALUE = _Entry(
        "invalid_value", 400, "invalid_request_error", "A field of the request is not acceptable."
    )
    NOT_FOUND = _Entry("not_found", 404, "invalid_request_error", "There is nothing at this path.")
    METHOD_NOT_ALLOWED = _Entry(
        "method_not_allowed", 405, "invalid_request_error", "This path does not take this method."
    )
    MODEL_NOT_FOUND = _Entry(
        "model_not_found",
        404,
        "invalid_request_error",
        "The model provider does not know this model, or the account may not use it.",
    )
    SESSION_NOT_FOUND = _Entry(
        "session_not_found",
        404,
        "invalid_request_error",
        "There is no such session. Leave the session id out to start a new one.",
    )
    SESSION_BUSY = _Entry(
        "session_busy",
        409,
        "invalid_request_error",
        "This session is still busy with an earlier turn. Try again when that one has ended.",
    )
    REQUEST_TOO_LARGE = _Entry(
        "request_too_large", 413, "invalid_request_error", "The request body is too large."
    )
    UNSUPPORTED_MEDIA_TYPE = _Entry(
        "unsupported_media_type",
        415,
        "invalid_request_error",
        "Send the body as JSON, with the header 'Content-Type: application/json'.",
    )
    MALFORMED_REQUEST = _Entry(
        "malformed_request",
        400,
        "invalid_request_error",
        "This is no HTTP request that this server understands.",
    )
    HEAD_TOO_LARGE = _Entry(
        "head_too_large",
        431,
        "invalid_request_error",
        "The request has too many headers, or they are too long.",
    )
    REQUEST_TIMEOUT = _Entry(
        "request_timeout",
        408,
        "invalid_request_error",
        "The request body came too slowly. Send it again over a faster connection.",
    )
    SERVER_BUSY = _Entry(
        "server_busy",
        429,
        "rate_limit_error",
        "Too many requests are waiting. Try again a little later.",
    )
    RATE_LIMIT_EXCEEDED = _Entry(
        "rate_limit_exceeded",
        429,
        "rate_limit_error",
        "The model provider's rate limit was reached. Try again later.",
    )
    UPSTREAM_INVALID_REQUEST = _Entry(
        "upstream_invalid_request",
        400,
        "invalid_request_error",
        "The model provider refused the request.",
    )
    UPSTREAM_OVERLOADED = _Entry(
        "upstream_overloaded",
        503,
        "server_error",
        "The model provider is overloaded. Try again later.",
    )
    UPSTREAM_ERROR = _Entry(
        "upstream_error",
        502,
        "server_error",
        "The model provider failed or could not be reached. Try again later.",
    )
    CLI_NOT_AUTHENTICATED = _Entry(
        "cli_not_authenticated",
        502,
        "server_error",
        "The Claude CLI on the server is not logged in, or its credentials were refused. "
        "Give the server a valid ANTHROPIC_API_KEY (environment or .env) and restart it.",
    )
    CLI_NOT_FOUND = _Entry(
        "cli_not_found",
        503,
        "server_error",
        "The Claude CLI cannot be started on the server. Install it with "
        "'npm install -g @anthropic-ai/claude-code', or set CLAUDE_CLI to its path.",
    )
    CLI_FAILED = _Entry(
        "cli_failed", 502, "server_error", "The Claude CLI ended without a result. Try again."
    )
    TURN_TIMEOUT = _Entry(
        "turn_timeout",
        504,
        "server_error",
        "The turn took longer than the server allows and was stopped.",
    )
    INACTIVITY_TIMEOUT = _Entry(
        "inactivity_timeout",
        504,
        "server_error",
        "The Claude CLI was silent for longer than the server allows and was stopped.",
    )
    WORKSPACE_UNAVAILABLE = _Entry(
        "workspace_unavailable", 500, "server_error", "The workspace cannot be used."
    )
    SHUTTING_DOWN = _Entry(
        "shutting_down",
        503,
        "server_error",
        "The server is stopping. Try again in a moment.",
    )
    INTERNAL_ERROR = _Entry(
        "internal_error",
        500,
        "server_error",
        "The server made a mistake. Its log says more under this request id.",
    )

    @property
    def code(self) -> str:
        """The public code, a promise to clients."""
        return self.value.code

    @property
    def status(self) -> int:
        """The HTTP status while the response head is still unsent."""
        return self.value.status

    @property
    def type(self) -> str:
        """The error type in OpenAI's vocabulary."""
        return self.value.type

    @property
    def sentence(self) -> str:
        """What is said when nothing more exact is known."""
        return self.value.sentence


class ProxyError(Exception):
    """
    One failure of one request.

    @ivar failure: the catalogue entry.
    @ivar message: the sentence for the client: what is wrong and what to do.
    @ivar param: the field of the request at fault, in the client's own spelling, or None.
    @ivar retry_after: whole seconds after which a repetition may succeed, or None if unknown.
    @ivar allow: for METHOD_NOT_ALLOWED, the methods that the path takes.
    """

    def __init__(
        self,
        failure: Failure,
        message: str | None = None,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        allow: tuple[str, ...] = (),
    ) -> None:
        self.failure = failure
        self.message = message or failure.sentence
        self.param = param
        self.retry_after = retry_after
        self.allow = allow
        super().__init__(f"{failure.code}: {self.message}")

    def envelope(self) -> ErrorEnvelope:
        """The JSON body that every dialect sends."""
        return {
            "error": {
                "message": self.message,
                "type": self.failure.type,
                "param": self.param,
                "code": self.failure.code,
            }
        }
