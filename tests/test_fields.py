"""The fields that the dialects share: what tests/test_native.py does not show."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields as dataclass_fields
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_proxy.dialects.fields import (
    TurnFields,
    check_fields,
    check_fork,
    check_model,
    check_session_id,
    convert,
    decode_object,
    overridden,
    turn_arguments,
)
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.turns import TurnRequest

SESSION = "AAAAAAAA-bbbb-4ccc-8ddd-EEEEEEEEEEEE"


def failure_of(fields: dict[str, Any], prefix: str) -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        check_fields(convert(fields, TurnFields, prefix=prefix), prefix=prefix)
    assert caught.value.failure is Failure.INVALID_VALUE
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_tools": []}, "claude.allowed_tools"),
        ({"prompt": "x"}, "claude.prompt"),
        ({"workspace": 1}, "claude.workspace"),
        ({"allowed-tools": ["a", 2]}, "claude.allowed-tools[1]"),
        ({"allowed-tools": ["a", "b\0"]}, "claude.allowed-tools[1]"),
        ({"disallowed-tools": ["\n"]}, "claude.disallowed-tools[0]"),
        ({"session-id": "x"}, "claude.session-id"),
        ({"model": "a b"}, "claude.model"),
        ({"permission-mode": "a b"}, "claude.permission-mode"),
        ({"effort": "huge"}, "claude.effort"),
        ({"max-turns": 0}, "claude.max-turns"),
    ],
)
def test_an_error_names_where_the_fields_stand(fields: dict[str, Any], param: str) -> None:
    error = failure_of(fields, "claude.")
    assert error.param == param
    assert f"'{param}'" in error.message


def test_an_unknown_field_lists_the_known_ones_with_where_they_stand() -> None:
    message = failure_of({"nope": 1}, "claude.").message
    names = {f"claude.{info.encode_name}" for info in msgspec.structs.fields(TurnFields)}
    assert set(message.partition("are: ")[2].rstrip(".").split(", ")) == names


def test_a_missing_field_is_named_with_where_it_stands() -> None:
    class Needy(msgspec.Struct):
        need: int

    with pytest.raises(ProxyError) as caught:
        convert({}, Needy, prefix="a.")
    assert (caught.value.param, caught.value.message) == (
        "a.need",
        "The field 'a.need' is required.",
    )


def test_a_copy_needs_its_original() -> None:
    with pytest.raises(ProxyError) as caught:
        check_fork(TurnFields(fork=True), prefix="claude.")
    assert caught.value.param == "claude.fork"
    assert "'claude.session-id'" in caught.value.message
    check_fork(TurnFields(fork=True, session_id=SESSION))
    check_fork(TurnFields(fork=False))


def test_a_check_names_the_field_it_is_told() -> None:
    for check in (check_session_id, check_model):
        with pytest.raises(ProxyError) as caught:
            check("X-Some-Header", "no good")
        assert caught.value.param == "X-Some-Header"
    check_session_id("x", SESSION)
    check_model("x", "claude-x[1m]")


def test_what_is_given_wins_and_an_empty_list_is_given() -> None:
    first = TurnFields(workspace="a", allowed_tools=("Bash",), effort="low")
    second = TurnFields(allowed_tools=(), effort="high", dangerously_skip_permissions=False)
    assert overridden(first, second) == TurnFields(
        workspace="a", allowed_tools=(), effort="high", dangerously_skip_permissions=False
    )
    assert overridden(first, TurnFields()) == first


def test_every_field_has_its_argument_of_a_turn() -> None:
    arguments = turn_arguments(TurnFields(session_id=SESSION))
    assert len(arguments) == len(msgspec.structs.fields(TurnFields))
    assert set(arguments) <= {one.name for one in dataclass_fields(TurnRequest)}
    assert arguments["session_id"] == SESSION.lower()


def test_nothing_given_is_the_turn_as_it_is_by_itself() -> None:
    plain = TurnRequest(content="x", tenant="t", request_id="r", received=0)
    assert (
        TurnRequest(
            content="x", tenant="t", request_id="r", received=0, **turn_arguments(TurnFields())
        )
        == plain
    )


def test_fields_show_nothing_of_themselves_in_a_log() -> None:
    assert "secret" not in repr(TurnFields(system_prompt="secret"))


@given(st.binary())
def test_any_body_is_an_object_or_refused(body: bytes) -> None:
    with suppress(ProxyError):
        assert isinstance(decode_object(body), dict)
