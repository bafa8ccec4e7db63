"""What a request may do, decided before anything is started.  Pure."""

from __future__ import annotations

from collections.abc import Mapping

from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.turns import TurnRequest

__all__ = ["check_permissions"]

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
