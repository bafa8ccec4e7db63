"""
The native dialect: ``POST /api/claude``.

The CLI's own events go to the client byte for byte, as Server-Sent Events, as a one-shot run of the
CLI would have shown them.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec

from claude_proxy.cli.events import Event
from claude_proxy.cli.outcomes import Outcome, OutcomeKind
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.turns import TurnRequest

__all__ = [
    "NativeRequest",
    "decode_request",
    "encode_events",
    "failure_frame",
    "turn_request",
    "whole_answer",
]

_Rule = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
_Rules = Annotated[tuple[_Rule, ...], msgspec.Meta(max_length=256)]

_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]{0,255}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_WORD = re.compile(r"[A-Za-z]{1,64}")


class NativeRequest(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename=lambda n: n.replace("_", "-")
):
    """The body of a native request; the fields are documented in docs/api.md."""

    prompt: str
    session_id: str | None = None
    workspace: str | None = None
    system_prompt: str | None = None
    dangerously_skip_permissions: bool = False
    allowed_tools: _Rules = ()
    disallowed_tools: _Rules = ()
    mcp_allowed_tools: _Rules = ()
    append_system_prompt: str | None = None
    model: str | None = None
    permission_mode: str | None = None
    effort: str | None = None
    max_turns: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    include_partial_messages: bool = False
    fork: bool = False
    stream: bool = True

    def __repr__(self) -> str:
        # A request is what somebody wrote: it stays out of logs and tracebacks.
        return "<NativeRequest>"


_OPTIONAL = frozenset(
    info.encode_name for info in msgspec.structs.fields(NativeRequest) if not info.required
)
_AT = re.compile(r"^(?P<what>.*?) - at `\$\.?(?P<path>[^`]*)`$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`")


def decode_request(body: bytes) -> NativeRequest:
    """
    Decode and check a body.

    @raise ProxyError: INVALID_JSON, or INVALID_VALUE with the field at fault.
    """
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = f"The request body is not valid JSON: {str(error)[:200]}"
        raise ProxyError(Failure.INVALID_JSON, message) from None
    if not isinstance(decoded, dict):
        raise ProxyError(Failure.INVALID_JSON)
    present = {
        name: value
        for name, value in decoded.items()
        if name not in _OPTIONAL or (value is not None and value != "")
    }
    try:
        request = msgspec.convert(present, NativeRequest)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    _check(request)
    return request


def _invalid(said: str) -> ProxyError:
    """Put a validation error of msgspec into our words."""
    unknown = _UNKNOWN.match(said)
    if unknown is not None:
        name = unknown["name"][:100]
        known = ", ".join(sorted(["prompt", *_OPTIONAL]))
        message = f"Unknown field '{name}'. The known fields are: {known}."
        return ProxyError(Failure.INVALID_VALUE, message, param=name)
    missing = _MISSING.match(said)
    if missing is not None:
        name = missing["name"]
        message = f"The field '{name}' is required."
        return ProxyError(Failure.INVALID_VALUE, message, param=name)
    at = _AT.match(said)
    what, path = (at["what"], at["path"]) if at else (said, "")
    message = f"The field '{path}' is not acceptable: {what}."
    return ProxyError(Failure.INVALID_VALUE, message, param=path or None)


def _check(request: NativeRequest) -> None:
    """Check what the types alone do not say."""

    def refuse(param: str, what: str) -> ProxyError:
        return ProxyError(Failure.INVALID_VALUE, f"The field '{param}' {what}.", param=param)

    if not request.prompt.strip():
        raise refuse("prompt", "must not be empty")
    if request.session_id is not None and not _UUID.fullmatch(request.session_id):
        raise refuse("session-id", "must be a UUID, as the server gave it")
    if request.fork and request.session_id is None:
        raise refuse("fork", "needs the 'session-id' of the session to copy")
    if request.model is not None and not _MODEL.fullmatch(request.model):
        raise refuse("model", "must be the name of a model, such as 'sonnet'")
    if request.permission_mode is not None and not _WORD.fullmatch(request.permission_mode):
        raise refuse("permission-mode", "must be the name of a permission mode, such as 'plan'")
    if request.effort is not None and request.effort not in _EFFORTS:
        raise refuse("effort", f"must be one of {', '.join(_EFFORTS)}")
    for param, rules in (
        ("allowed-tools", request.allowed_tools),
        ("disallowed-tools", request.disallowed_tools),
    ):
        _check_rules(param, rules)


def _check_rules(param: str, rules: tuple[str, ...]) -> None:
    for position, rule in enumerate(rules):
        if _CONTROL.search(rule):
            at = f"{param}[{position}]"
            message = f"The field '{at}' must not contain control characters."
            raise ProxyError(Failure.INVALID_VALUE, message, param=at)


def turn_request(
    request: NativeRequest, *, tenant: str, request_id: str, received: float
) -> TurnRequest:
    """
    Say in the server's own words what is asked.

    @param received: when the request came, by the reactor's clock.
    """
    session_id = request.session_id
    return TurnRequest(
        content=request.prompt,
        tenant=tenant,
        request_id=request_id,
        received=received,
        session_id=session_id.lower() if session_id is not None else None,
        fork=request.fork,
        workspace=request.workspace,
        partial_messages=request.include_partial_messages,
        model=request.model,
        max_turns=request.max_turns,
        effort=request.effort,
        permission_mode=request.permission_mode,
        skip_permissions=request.dangerously_skip_permissions,
        allowed_tools=request.allowed_tools,
        disallowed_tools=request.disallowed_tools,
        mcp_tools=request.mcp_allowed_tools,
        system_prompt=request.system_prompt,
        append_system_prompt=request.append_system_prompt,
    )


def encode_events(events: list[Event], *, partial_messages: bool) -> bytes:
    """
    Frame events for the client: all of them in one piece of bytes, empty if none is for it.

    What a one-shot run would not have shown is left out: replays of the user's message, and,
    unless asked for, the CLI's partial messages with the status lines that come with them.
    """
    if partial_messages:
        lines = [event.line for event in events if not event.is_replay]
    else:
        lines = [
            event.line
            for event in events
            if event.type != "stream_event"
            and not event.is_replay
            and not (event.type == "system" and event.subtype == "status")
        ]
    if not lines:
        return b""
    frames = b"data: " + b"\n\ndata: ".join(lines) + b"\n\n"
    # A carriage return ends a line of an event stream; between the tokens of a JSON text, the only
    # place where it may stand, a blank does as well.
    return frames.replace(b"\r", b" ") if b"\r" in frames else frames


_TIMEOUTS = (Failure.TURN_TIMEOUT, Failure.INACTIVITY_TIMEOUT)


def failure_frame(error: ProxyError, session_id: str | None) -> bytes:
    """The last event of a stream that failed after its head was sent."""
    event: dict[str, Any] = {
        "type": "result",
        "subtype": "timeout" if error.failure in _TIMEOUTS else "error",
        "is_error": True,
        "result": error.message,
        "error": error.envelope()["error"],
        "session_id": session_id,
    }
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


_ANSWERED = (OutcomeKind.SUCCESS, OutcomeKind.LIMIT, OutcomeKind.REFUSAL)


def whole_answer(outcome: Outcome) -> bytes:
    """
    The body for a client that did not want a stream: the CLI's ``result`` event.

    @raise ProxyError: the turn failed.
    """
    if outcome.kind in _ANSWERED and outcome.result is not None:
        return outcome.result.line
    raise outcome.error or ProxyError(Failure.INTERNAL_ERROR)
