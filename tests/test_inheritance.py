"""What a turn takes over from the session that it continues."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_proxy.sessions.inheritance import inherited
from claude_proxy.sessions.turns import TurnRequest

ASK = TurnRequest(content="x", tenant="alice", request_id="r", received=0.0)

FULL = replace(
    ASK,
    allowed_tools=("Read", "Bash(git *)"),
    disallowed_tools=("Edit",),
    mcp_tools=("mcp__a__b",),
    skip_permissions=True,
    permission_mode="plan",
)

NAMES = frozenset(FULL.parameters)


def test_all_that_is_remembered_is_inherited_when_nothing_new_is_said() -> None:
    asked = replace(ASK, inherit=NAMES)
    assert inherited(asked, FULL.parameters) == replace(FULL, inherit=NAMES)


def test_every_parameter_that_is_remembered_can_be_inherited() -> None:
    for name in NAMES - {"dangerously-skip-permissions"}:
        asked = replace(ASK, inherit=frozenset({name}))
        assert inherited(asked, FULL.parameters).parameters == {name: FULL.parameters[name]}


def test_what_the_request_says_is_not_touched() -> None:
    asked = replace(ASK, allowed_tools=("Grep",), inherit=NAMES - {"allowed-tools"})
    taken = inherited(asked, FULL.parameters)
    assert (taken.allowed_tools, taken.disallowed_tools) == (("Grep",), ("Edit",))
    assert inherited(ASK, FULL.parameters) is ASK


def test_nothing_is_inherited_but_by_name() -> None:
    asked = replace(ASK, inherit=NAMES | {"workspace", "model", "system-prompt"})
    remembered = {"workspace": "w", "model": "opus", "system-prompt": "x", "tenant": "bob"}
    assert inherited(asked, remembered) == asked


@pytest.mark.parametrize(
    ("asked", "remembered", "expected"),
    [
        pytest.param(
            {"permission_mode": "plan", "inherit": NAMES - {"permission-mode"}},
            {"dangerously-skip-permissions": True},
            (False, "plan"),
            id="a given mode is not undone by an old permission to skip",
        ),
        pytest.param(
            {"inherit": NAMES - {"dangerously-skip-permissions"}},
            {"permission-mode": "bypassPermissions"},
            (False, None),
            id="an old mode that skips is not inherited by who says not to skip",
        ),
        pytest.param(
            {"inherit": NAMES - {"dangerously-skip-permissions"}},
            {"permission-mode": "plan", "dangerously-skip-permissions": True},
            (False, "plan"),
            id="another mode is",
        ),
        pytest.param(
            {"skip_permissions": True, "inherit": NAMES - {"dangerously-skip-permissions"}},
            {"permission-mode": "bypassPermissions"},
            (True, "bypassPermissions"),
            id="who skips may inherit either",
        ),
    ],
)
def test_the_two_words_for_skipping_permissions_do_not_undo_each_other(
    asked: dict[str, Any], remembered: dict[str, object], expected: tuple[bool, str | None]
) -> None:
    taken = inherited(replace(ASK, **asked), remembered)
    assert (taken.skip_permissions, taken.permission_mode) == expected


@pytest.mark.parametrize(
    "malformed",
    [
        {"allowed-tools": "Bash", "permission-mode": ["plan"]},
        {"allowed-tools": ["Bash", 1], "dangerously-skip-permissions": "true"},
        {"mcp-allowed-tools": {"mcp__a__b": 1}, "dangerously-skip-permissions": 1},
        {"disallowed-tools": None, "permission-mode": ""},
    ],
)
def test_what_is_malformed_counts_for_nothing(malformed: dict[str, object]) -> None:
    asked = replace(ASK, inherit=NAMES)
    assert inherited(asked, malformed) == asked


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(sorted(NAMES), JSON)))
def test_whatever_is_stored_the_request_stays_well_formed(stored: dict[str, object]) -> None:
    taken = inherited(replace(ASK, inherit=NAMES), stored)
    for tools in (taken.allowed_tools, taken.disallowed_tools, taken.mcp_tools):
        assert isinstance(tools, tuple)
        assert all(isinstance(tool, str) for tool in tools)
    assert isinstance(taken.skip_permissions, bool)
    assert taken.permission_mode is None or isinstance(taken.permission_mode, str)
