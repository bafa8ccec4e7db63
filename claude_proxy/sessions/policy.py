"""What a request may do, decided before anything is started.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from claude_proxy.cli import command, prompt
from claude_proxy.cli.versions import Capabilities
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.turns import TurnRequest

__all__ = ["adapt", "check_permissions", "check_supported", "skips_permissions", "turn_settings"]

_BYPASS_MODE = "bypassPermissions"


def check_permissions(
    request: TurnRequest, *, allowed: bool, is_root: bool, environment: Mapping[str, str]
) -> None:
    """
    Decide whether a request may skip the CLI's permission prompts, by whichever field.

    @param allowed: the setting ALLOW_SKIP_PERMISSIONS.
    @param is_root: the CLI would run as root, where it refuses by itself, but only after a start.
    @param environment: what the CLI will see.
    @raise ProxyError: INVALID_VALUE that names the field and the way out.
    """
    if request.skip_permissions:
        param = "dangerously-skip-permissions"
    elif request.permission_mode == _BYPASS_MODE:
        param = "permission-mode"
    else:
        return
    if not allowed:
        message = (
            "This server does not let requests skip permissions (ALLOW_SKIP_PERMISSIONS=false). "
            "Name the tools to allow in 'allowed-tools' instead."
        )
        raise ProxyError(Failure.INVALID_VALUE, message, param=param)
    if is_root and environment.get("IS_SANDBOX") != "1":
        message = (
            "The Claude CLI refuses to skip permissions as root. Run the server as another user, "
            "or, inside a container made for it, set IS_SANDBOX=1; or name the tools to allow in "
            "'allowed-tools' instead."
        )
        raise ProxyError(Failure.INVALID_VALUE, message, param=param)


def adapt(request: TurnRequest, can: Capabilities) -> TurnRequest:
    """The request without what it wants only of a CLI that has it."""
    if "effort" in request.optional and not can.effort:
        request = replace(request, effort=None)
    if "json_schema" in request.optional and not can.late_prompts:
        request = replace(request, json_schema=None)
    limit = request.max_output_tokens
    if limit is not None and limit > can.output_limit:
        # It would ask the model for more than there is; without a limit it asks for all.
        request = replace(request, max_output_tokens=None)
    return request


def skips_permissions(request: TurnRequest) -> bool:
    """Whether a request skips the CLI's permission prompts, by whichever field."""
    return request.skip_permissions or request.permission_mode == _BYPASS_MODE


def turn_settings(request: TurnRequest) -> command.TurnSettings:
    """What of a request belongs to the turn rather than to the process that runs it."""
    mode = request.permission_mode
    return command.TurnSettings(
        allowed_tools=(*request.allowed_tools, *request.mcp_tools),
        # This mode is one that a process is started with; it has no other then.
        permission_mode=mode if mode != _BYPASS_MODE else None,
        effort=request.effort,
        system_prompt=request.system_prompt,
        append_system_prompt=request.append_system_prompt,
        json_schema=request.json_schema,
    )


def check_supported(request: TurnRequest, can: Capabilities) -> None:
    """
    Refuse what this version of the CLI lacks.

    @raise ProxyError: INVALID_VALUE that names the field and the version.
    """
    command.check_supported(turn_settings(request), can, partial_messages=request.partial_messages)
    if not prompt.fits_stdin(request.blocks, can):
        message = (
            f"The Claude CLI on this server ({can.version}) takes text only; leave images and "
            "files out, or update the CLI."
        )
        raise ProxyError(Failure.INVALID_VALUE, message, param="messages")
    command.check_rules("allowed-tools", request.allowed_tools, can)
    command.check_rules("disallowed-tools", request.disallowed_tools, can)
