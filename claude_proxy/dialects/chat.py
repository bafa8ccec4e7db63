"""
Requests of the OpenAI dialect: ``POST /v1/chat/completions``.

A chat client sends the whole conversation each time; here it becomes one turn of a session.  How
the turn is run is said in three places.  The parameters at the top of the last message win over the
``claude`` object, this one over OpenAI's own fields; what is said nowhere is inherited from the
session, and where there is none, from the parameters at the top of earlier messages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec

from claude_proxy.dialects.fields import (
    ModelName,
    TurnFields,
    check_fields,
    check_fork,
    check_model,
    check_session_id,
    convert,
    decode_object,
    overridden,
    refusal,
    told,
    turn_arguments,
)
from claude_proxy.dialects.messages import MAX_MESSAGES, Conversation, read_messages
from claude_proxy.dialects.models import DEFAULT_MODEL
from claude_proxy.dialects.sampling import check_refused, ignored_fields
from claude_proxy.dialects.schema import checked_schema
from claude_proxy.dialects.shapes import (
    AssistantMessage,
    JsonObjectFormat,
    JsonSchemaFormat,
    SystemMessage,
    TextFormat,
    ToolMessage,
    UserMessage,
    any_of,
    reference,
)
from claude_proxy.sessions.turns import TurnRequest

__all__ = [
    "INHERITED",
    "JSON_SENTENCE",
    "MOST_OUTPUT_TOKENS",
    "ChatCompletionRequest",
    "ChatRequest",
    "StreamOptions",
    "decode_request",
    "turn_request",
]

INHERITED = (
    "workspace",
    "allowed-tools",
    "disallowed-tools",
    "mcp-allowed-tools",
    "dangerously-skip-permissions",
    "permission-mode",
)
"""The parameters that a conversation keeps until they are given anew."""

JSON_SENTENCE = "Answer with one JSON object and nothing else: no words around it, no code fence."
"""Asks for a bare JSON object where no schema is given."""

MOST_OUTPUT_TOKENS = 128_000
"""The highest limit that the CLI is given: no model says more, and old versions stumble over it."""

_EFFORTS = {
    "none": "low",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "xhigh",
    "max": "max",
}
"""OpenAI's efforts, and the nearest that the CLI has."""

_Tokens = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


def _says(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


_Message = any_of(SystemMessage, UserMessage, AssistantMessage, ToolMessage)
_MESSAGES = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
    "items": _Message.extra_json_schema,
}
_Messages = Annotated[Any, told(**_MESSAGES)]


class StreamOptions(msgspec.Struct, frozen=True):
    """Options of a stream."""

    include_usage: bool = False


class ChatCompletionRequest(msgspec.Struct, frozen=True):
    """The conversation so far, the new message last, and what is wanted."""

    # These are the fields that have an effect.
    messages: Annotated[_Messages, _says("The last one must be the user's, and have text.")]
    model: Annotated[ModelName, _says("A name that `/v1/models` knows.")] = DEFAULT_MODEL
    stream: Annotated[bool, _says("Whether to answer in chunks.")] = False
    stream_options: Annotated[dict[str, Any], told(**{"$ref": reference(StreamOptions)})] | None = (
        None
    )
    response_format: (
        Annotated[dict[str, Any], any_of(TextFormat, JsonObjectFormat, JsonSchemaFormat)] | None
    ) = None
    reasoning_effort: Annotated[str, told(enum=list(_EFFORTS))] | None = None
    max_completion_tokens: Annotated[
        _Tokens | None, _says("Limit of one answer of the model; a turn may have several.")
    ] = None
    max_tokens: Annotated[
        _Tokens | None, _says("The same; `max_completion_tokens` comes before it.")
    ] = None
    claude: Annotated[dict[str, Any], told(**{"$ref": reference(TurnFields)})] | None = None

    def __repr__(self) -> str:
        # A request is what somebody wrote: it stays out of logs and tracebacks.
        return "<ChatCompletionRequest>"


@dataclass(frozen=True, slots=True)
class _Form:
    """The form that the answer is to have."""

    bare_json: Literal["object", "schema"] | None = None
    json_schema: dict[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """
    What a request asks for.

    @ivar model: as the client named it; ``claude.model`` wins over the field of the dialect.
    @ivar include_usage: whether a stream is to tell the tokens at its end.
    @ivar bare_json: whether the answer is one bare JSON value: any ``object``, or by a ``schema``.
    @ivar ignored: names of the fields that were given without effect.
    @ivar message_count: how many messages there are.
    @ivar prompt_characters: how much text is new.
    @ivar tip_source: all messages, for the fingerprint of the conversation with its answer.
    @ivar fields: how the turn is to be run.
    @ivar inherit: names of the parameters that are not given.
    @ivar json_schema: what the answer must be, for `bare_json`.
    @ivar optional: names of what a CLI that has no such thing may ignore.
    @ivar conversation: the client's own name for the conversation.
    @ivar told: what the messages say.
    """

    model: str
    stream: bool
    include_usage: bool
    bare_json: Literal["object", "schema"] | None
    ignored: tuple[str, ...]
    message_count: int
    prompt_characters: int
    tip_source: tuple[tuple[str, object], ...] = field(repr=False)
    fields: TurnFields
    inherit: frozenset[str]
    json_schema: dict[str, Any] | None = field(repr=False)
    optional: frozenset[str]
    max_output_tokens: int | None
    conversation: str | None
    told: Conversation = field(repr=False)


def decode_request(
    body: bytes, *, text_parameters: str, conversation: str | None, session_header: str | None
) -> ChatRequest:
    """
    Decode and check a body.

    @param text_parameters: which parameters a text may set: ``all``, ``safe`` (the workspace and
        the session) or ``none``.
    @param conversation: the client's own name for the conversation, if it gave one in a header.
    @param session_header: the session id in the header X-Claude-Session-Id, if there is one.
    @raise ProxyError: INVALID_JSON, or INVALID_VALUE with the field at fault.
    """
    fields = decode_object(body)
    decoded = convert(fields, ChatCompletionRequest)
    check_refused(fields)
    check_model("model", decoded.model)
    claude = convert(decoded.claude or {}, TurnFields, prefix="claude.")
    check_fields(claude, prefix="claude.")
    form = _form(decoded.response_format)
    effort = _effort(decoded.reasoning_effort)
    header = _header_fields(session_header)
    told = read_messages(decoded.messages, text_parameters)
    given = overridden(overridden(header, claude), told.given)
    check_fork(given, prefix="claude.")
    inherit = frozenset(name for name in INHERITED if getattr(given, _attribute(name)) is None)
    optional = {"effort"} if effort is not None and given.effort is None else set()
    optional |= {"json_schema"} if form.bare_json == "object" else set()
    return ChatRequest(
        model=claude.model or decoded.model,
        stream=decoded.stream,
        include_usage=_includes_usage(decoded.stream_options),
        bare_json=form.bare_json,
        ignored=ignored_fields(fields),
        message_count=len(told.said),
        prompt_characters=sum(len(block.get("text", "")) for block in told.content),
        tip_source=told.said,
        fields=overridden(TurnFields(effort=effort), given),
        inherit=inherit,
        json_schema=form.json_schema,
        optional=frozenset(optional),
        max_output_tokens=_token_limit(decoded),
        conversation=conversation,
        told=told,
    )


def turn_request(
    request: ChatRequest, *, model: str | None, tenant: str, request_id: str, received: float
) -> TurnRequest:
    """
    Say in the server's own words what is asked.

    The parameters named in its `inherit` hold what earlier messages said; what the session knows of
    them comes before that.

    @param model: the model that the client means; None is the CLI's default.
    @param received: when the request came, by the reactor's clock.
    """
    told = request.told
    fields = _with_earlier(request.fields, told.earlier, request.inherit)
    arguments = turn_arguments(fields) | {"model": model}
    if fields.system_prompt is None:
        arguments["system_prompt"] = told.system_prompt
    if request.bare_json == "object":
        asked = [fields.append_system_prompt, JSON_SENTENCE]
        arguments["append_system_prompt"] = "\n\n".join(text for text in asked if text)
    return TurnRequest(
        content=told.content,
        tenant=tenant,
        request_id=request_id,
        received=received,
        json_schema=request.json_schema,
        literal=True,
        max_output_tokens=request.max_output_tokens,
        optional=request.optional,
        history=told.history,
        tips=told.tips,
        conversation=request.conversation,
        hinted_session=told.shown_session,
        inherit=request.inherit,
        **arguments,
    )


def _header_fields(session_header: str | None) -> TurnFields:
    if not session_header:
        return TurnFields()
    check_session_id("X-Claude-Session-Id", session_header)
    return TurnFields(session_id=session_header)


def _effort(name: str | None) -> str | None:
    if name is not None and name not in _EFFORTS:
        raise refusal("reasoning_effort", f"must be one of {', '.join(_EFFORTS)}")
    return None if name is None else _EFFORTS[name]


def _token_limit(body: ChatCompletionRequest) -> int | None:
    limit = body.max_completion_tokens or body.max_tokens
    return None if limit is None else min(limit, MOST_OUTPUT_TOKENS)


def _includes_usage(options: dict[str, Any] | None) -> bool:
    return convert(options or {}, StreamOptions, prefix="stream_options.").include_usage


def _form(response_format: dict[str, Any] | None) -> _Form:
    if response_format is None:
        return _Form()
    kind = response_format.get("type")
    if kind == "text":
        return _Form()
    if kind == "json_object":
        return _Form("object", {"type": "object"})
    if kind != "json_schema":
        raise refusal("response_format.type", "must be 'text', 'json_object' or 'json_schema'")
    described = response_format.get("json_schema")
    if not isinstance(described, dict):
        what = "is required with this type, and must be an object with a 'schema'"
        raise refusal("response_format.json_schema", what)
    where = "response_format.json_schema.schema"
    return _Form("schema", checked_schema(described.get("schema"), where))


def _attribute(name: str) -> str:
    return name.replace("-", "_")


def _with_earlier(fields: TurnFields, earlier: TurnFields, inherit: frozenset[str]) -> TurnFields:
    """The fields, with those to be inherited as earlier messages said them."""
    if fields.session_id is not None:
        return fields  # another conversation: it has its own
    if fields.permission_mode is not None:
        inherit = inherit - {"dangerously-skip-permissions"}  # two words for one matter
    kept = {_attribute(name): getattr(earlier, _attribute(name)) for name in inherit}
    return msgspec.structs.replace(fields, **kept)
