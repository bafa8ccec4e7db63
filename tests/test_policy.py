"""Who may skip the CLI's permission prompts."""

from __future__ import annotations

import pytest

from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.policy import check_permissions
from claude_proxy.sessions.turns import TurnRequest


def asking(*, skip: bool = False, mode: str | None = None) -> TurnRequest:
    return TurnRequest(
        content="x",
        tenant="anonymous",
        request_id="r",
        received=0.0,
        skip_permissions=skip,
        permission_mode=mode,
    )


def refusal(
    request: TurnRequest, *, allowed: bool, is_root: bool, sandbox: str | None = None
) -> ProxyError | None:
    environment = {} if sandbox is None else {"IS_SANDBOX": sandbox}
    try:
        check_permissions(request, allowed=allowed, is_root=is_root, environment=environment)
    except ProxyError as error:
        return error
    return None


WAYS = [
    (asking(skip=True), "dangerously-skip-permissions"),
    (asking(mode="bypassPermissions"), "permission-mode"),
    (asking(skip=True, mode="bypassPermissions"), "dangerously-skip-permissions"),
]


@pytest.mark.parametrize("mode", [None, "plan", "acceptEdits", "default", "bypasspermissions"])
def test_who_does_not_ask_is_never_refused(mode: str | None) -> None:
    assert refusal(asking(mode=mode), allowed=False, is_root=True) is None


@pytest.mark.parametrize(("request_", "param"), WAYS)
def test_either_way_is_refused_where_the_server_does_not_allow_it(
    request_: TurnRequest, param: str
) -> None:
    error = refusal(request_, allowed=False, is_root=False)
    assert error is not None
    assert (error.failure, error.param) == (Failure.INVALID_VALUE, param)
    assert "ALLOW_SKIP_PERMISSIONS" in error.message


@pytest.mark.parametrize(("request_", "param"), WAYS)
@pytest.mark.parametrize("sandbox", [None, "", "0", "true"])
def test_root_is_told_how_to_run_it_otherwise(
    request_: TurnRequest, param: str, sandbox: str | None
) -> None:
    error = refusal(request_, allowed=True, is_root=True, sandbox=sandbox)
    assert error is not None
    assert (error.failure, error.param) == (Failure.INVALID_VALUE, param)
    assert "as another user" in error.message
    assert "IS_SANDBOX=1" in error.message


@pytest.mark.parametrize("request_", [request for request, _ in WAYS])
def test_it_is_allowed_to_others_and_in_a_sandbox(request_: TurnRequest) -> None:
    assert refusal(request_, allowed=True, is_root=False) is None
    assert refusal(request_, allowed=True, is_root=True, sandbox="1") is None


def test_a_sandbox_does_not_overrule_the_setting() -> None:
    error = refusal(asking(skip=True), allowed=False, is_root=True, sandbox="1")
    assert error is not None
    assert "ALLOW_SKIP_PERMISSIONS" in error.message
