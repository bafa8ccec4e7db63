"""
The native dialect: the requests of ``POST /api/claude``.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from claude_proxy.dialects.fields import (
    TurnFields,
    check_fields,
    check_fork,
    convert,
    decode_object,
    refusal,
    told,
    turn_arguments,
)
from claude_proxy.sessions.turns import TurnRequest

__all__ = ["NativeRequest", "decode_request", "turn_request"]

NOT_BLANK = r"[^\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
"""Any character but those that Python takes for blanks, which are not those of JavaScript."""


class NativeRequest(TurnFields, frozen=True, kw_only=True):
    """What the agent is asked, and how the turn is to be run."""

    prompt: Annotated[str, told(pattern=NOT_BLANK), msgspec.Meta(description="The message.")]
    include_partial_messages: Annotated[
        bool, msgspec.Meta(description="Also send `stream_event` lines: text piece by piece.")
    ] = False
    stream: Annotated[
        bool, msgspec.Meta(description="`false`: one JSON body instead of a stream.")
    ] = True


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
