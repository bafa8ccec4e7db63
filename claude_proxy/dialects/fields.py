"""
The fields that say how a turn is run, which the dialects share, and how bodies are decoded.

In the native dialect they stand at the top of the body, in the OpenAI dialect in its ``claude``
object; docs/api.md documents them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeVar

import msgspec

from claude_proxy.cli.versions import PERMISSION_MODES
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.mcp import MAX_TOOL, PREFIX
from claude_proxy.sessions.workspaces import NAME as WORKSPACE_NAME

__all__ = [
    "EFFORTS",
    "ModelName",
    "SessionId",
    "TurnFields",
    "check_fields",
    "check_fork",
    "check_model",
    "check_session_id",
    "convert",
    "decode_object",
    "overridden",
    "refusal",
    "spelt",
    "told",
    "turn_arguments",
]

_T = TypeVar("_T", bound=msgspec.Struct)

EFFORTS = ("low", "medium", "high", "xhigh", "max")
"""The efforts that the CLI knows, by its own names."""

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]{0,255}")
_PLAIN = re.compile(r"[^\x00-\x1f\x7f]*")
_WORD = re.compile(r"[A-Za-z]{1,64}")


def told(**keywords: Any) -> msgspec.Meta:
    """
    For what is checked by hand, in better words than a type has: the schema tells it all the same.

    @param keywords: of JSON Schema.
    """
    return msgspec.Meta(extra_json_schema=keywords)


def spelt(pattern: re.Pattern[str], **keywords: Any) -> msgspec.Meta:
    """The same for a text that a pattern must match as a whole."""
    return told(pattern=f"^(?:{pattern.pattern})$", **keywords)


SessionId = Annotated[str, spelt(_UUID, format="uuid")]
"""What may be given as the id of a session."""

ModelName = Annotated[str, spelt(_MODEL)]
"""What may be given as the name of a model."""

_Workspace = Annotated[str, spelt(WORKSPACE_NAME)]
_PermissionMode = Annotated[str, told(enum=list(PERMISSION_MODES))]
_Effort = Annotated[str, told(enum=list(EFFORTS))]
_Turns = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
_Rule = Annotated[str, msgspec.Meta(min_length=1, max_length=1024), spelt(_PLAIN)]
_Rules = Annotated[tuple[_Rule, ...], msgspec.Meta(max_length=256)]
_McpTool = Annotated[
    str,
    msgspec.Meta(min_length=1, max_length=1024),
    told(pattern=rf"^{PREFIX}[^\s,()]+$", maxLength=MAX_TOOL),
]
_McpTools = Annotated[tuple[_McpTool, ...], msgspec.Meta(max_length=256)]


def _says(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class TurnFields(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    rename=lambda n: n.replace("_", "-"),
):
    """How a turn is to be run.  Null means not given, which an empty list is not."""

    session_id: Annotated[SessionId | None, _says("The session to continue.")] = None
    workspace: Annotated[
        _Workspace | None, _says("The workspace, made on first use; the shared one if left out.")
    ] = None
    system_prompt: Annotated[str | None, _says("Replaces the CLI's system prompt.")] = None
    dangerously_skip_permissions: Annotated[
        bool | None, _says("Nothing is asked and nothing refused; a server may forbid this.")
    ] = None
    allowed_tools: Annotated[
        _Rules | None, _says("Rules of tools that need no permission, such as `Bash(git *)`.")
    ] = None
    disallowed_tools: Annotated[
        _Rules | None, _says("Rules of tools that the agent does not get.")
    ] = None
    mcp_allowed_tools: Annotated[
        _McpTools | None, _says("Tools of the server's MCP servers, as `mcp__SERVER__TOOL`.")
    ] = None
    append_system_prompt: Annotated[
        str | None, _says("Is added at the end of the system prompt.")
    ] = None
    model: Annotated[ModelName | None, _says("A model, by its alias or its full name.")] = None
    permission_mode: Annotated[
        _PermissionMode | None, _says("A permission mode of the CLI; old ones know fewer.")
    ] = None
    effort: Annotated[_Effort | None, _says("The CLI's effort; old ones have none.")] = None
    max_turns: Annotated[_Turns | None, _says("How often the agent may go back to the model.")] = (
        None
    )
    fork: Annotated[
        bool | None, _says("With `session-id`, which it needs: continue in a copy of the session.")
    ] = None

    def __repr__(self) -> str:
        # A request is what somebody wrote: it stays out of logs and tracebacks.
        return f"<{type(self).__name__}>"


def refusal(param: str, what: str) -> ProxyError:
    """The error for a field whose value `what` is said of, as in ``must not be empty``."""
    return ProxyError(Failure.INVALID_VALUE, f"The field '{param}' {what}.", param=param)


def decode_object(body: bytes) -> dict[str, Any]:
    """
    Decode a body that must be one JSON object.

    @raise ProxyError: INVALID_JSON.
    """
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = f"The request body is not valid JSON: {str(error)[:200]}"
        raise ProxyError(Failure.INVALID_JSON, message) from None
    if not isinstance(decoded, dict):
        raise ProxyError(Failure.INVALID_JSON)
    return decoded


def convert(fields: Mapping[str, Any], to: type[_T], *, prefix: str = "") -> _T:
    """
    Convert decoded JSON to a structure; in an optional field null and ``""`` mean absent.

    @param prefix: where the fields stand, as in ``claude.``; errors name them with it.
    @raise ProxyError: INVALID_VALUE with the field at fault.
    """
    known, optional = _names(to)
    present = {
        name: _whole(value)
        for name, value in fields.items()
        if name not in optional or (value is not None and value != "")
    }
    try:
        return msgspec.convert(present, to)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), prefix, [prefix + name for name in known]) from None


def _whole(value: object) -> object:
    """An integer for a number like 3.0, which is one for JSON Schema; no field takes fractions."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@cache  # there are few types, and looking at one takes longer than converting to it
def _names(of: type[msgspec.Struct]) -> tuple[tuple[str, ...], frozenset[str]]:
    """The names of all fields, sorted, and of those that may be left out."""
    infos = msgspec.structs.fields(of)
    names = sorted(info.encode_name for info in infos)
    return tuple(names), frozenset(info.encode_name for info in infos if not info.required)


_AT = re.compile(r"^(?P<what>.*?) - at `\$\.?(?P<path>[^`]*)`$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`")


def _invalid(said: str, prefix: str, known: list[str]) -> ProxyError:
    """Put a validation error of msgspec into our words."""
    unknown = _UNKNOWN.match(said)
    if unknown is not None:
        name = prefix + unknown["name"][:100]
        message = f"Unknown field '{name}'. The known fields are: {', '.join(known)}."
        return ProxyError(Failure.INVALID_VALUE, message, param=name)
    missing = _MISSING.match(said)
    if missing is not None:
        return refusal(prefix + missing["name"], "is required")
    at = _AT.match(said)
    what, path = (at["what"], at["path"]) if at else (said, "")
    return refusal(prefix + path, f"is not acceptable: {what}")


def check_fields(fields: TurnFields, *, prefix: str = "") -> None:
    """
    Check what the types alone do not say.

    @param prefix: where the fields stand, as in ``claude.``.
    @raise ProxyError: INVALID_VALUE with the field at fault.
    """
    if fields.session_id is not None:
        check_session_id(f"{prefix}session-id", fields.session_id)
    if fields.model is not None:
        check_model(f"{prefix}model", fields.model)
    if fields.permission_mode is not None and not _WORD.fullmatch(fields.permission_mode):
        what = "must be the name of a permission mode, such as 'plan'"
        raise refusal(f"{prefix}permission-mode", what)
    if fields.effort is not None and fields.effort not in EFFORTS:
        raise refusal(f"{prefix}effort", f"must be one of {', '.join(EFFORTS)}")
    _check_rules(f"{prefix}allowed-tools", fields.allowed_tools or ())
    _check_rules(f"{prefix}disallowed-tools", fields.disallowed_tools or ())


def check_session_id(param: str, value: str) -> None:
    """
    @raise ProxyError: INVALID_VALUE: it is no session id.
    """
    if not _UUID.fullmatch(value):
        raise refusal(param, "must be a UUID, as the server gave it")


def check_model(param: str, value: str) -> None:
    """
    @raise ProxyError: INVALID_VALUE: no model can have this name.
    """
    if not _MODEL.fullmatch(value):
        raise refusal(param, "must be the name of a model, such as 'sonnet'")


def check_fork(fields: TurnFields, *, prefix: str = "") -> None:
    """
    @raise ProxyError: INVALID_VALUE: a copy is wanted, but not said of which session.
    """
    if fields.fork and fields.session_id is None:
        raise refusal(f"{prefix}fork", f"needs the '{prefix}session-id' of the session to copy")


def _check_rules(param: str, rules: tuple[str, ...]) -> None:
    for position, rule in enumerate(rules):
        if not _PLAIN.fullmatch(rule):
            raise refusal(f"{param}[{position}]", "must not contain control characters")


def overridden(fields: TurnFields, by: TurnFields) -> TurnFields:
    """The fields, with those that are given in `by` in their place."""
    given = {name: value for name, value in msgspec.structs.asdict(by).items() if value is not None}
    return msgspec.structs.replace(fields, **given) if given else fields


def turn_arguments(fields: TurnFields) -> dict[str, Any]:
    """What the fields say, as arguments of `TurnRequest`."""
    session_id = fields.session_id
    return {
        "session_id": session_id.lower() if session_id is not None else None,
        "fork": bool(fields.fork),
        "workspace": fields.workspace,
        "model": fields.model,
        "max_turns": fields.max_turns,
        "effort": fields.effort,
        "permission_mode": fields.permission_mode,
        "skip_permissions": bool(fields.dangerously_skip_permissions),
        "allowed_tools": fields.allowed_tools or (),
        "disallowed_tools": fields.disallowed_tools or (),
        "mcp_tools": fields.mcp_allowed_tools or (),
        "system_prompt": fields.system_prompt,
        "append_system_prompt": fields.append_system_prompt,
    }
