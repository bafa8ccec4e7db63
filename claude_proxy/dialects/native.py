"""
The native dialect: the requests of ``POST /api/claude``.
"""

from __future__ import annotations

from claude_proxy.dialects.fields import (
    TurnFields,
    check_fields,
    check_fork,
    convert,
    decode_object,
    refusal,
    turn_arguments,
)
from claude_proxy.sessions.turns import TurnRequest

__all__ = ["NativeRequest", "decode_request", "turn_request"]


class NativeRequest(TurnFields, frozen=True, kw_only=True):
    """The body of a native request; the fields are documented in docs/api.md."""

    prompt: str
    include_partial_messages: bool = False
    stream: bool = True


def decode_request(body: bytes) -> NativeRequest:
    """
    Decode and check a body.

    @raise ProxyError: INVALID_JSON, or INVALID_VALUE with the field at fault.
    """
    request = convert(decode_object(body), NativeRequest)
    if not request.prompt.strip():
        raise refusal("prompt", "must not be empty")
    check_fields(request)
    check_fork(request)
    return request


def turn_request(
    request: NativeRequest, *, tenant: str, request_id: str, received: float
) -> TurnRequest:
    """
    Say in the server's own words what is asked.

    @param received: when the request came, by the reactor's clock.
    """
    return TurnRequest(
        content=request.prompt,
        tenant=tenant,
        request_id=request_id,
        received=received,
        partial_messages=request.include_partial_messages,
        **turn_arguments(request),
    )
