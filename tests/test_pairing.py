"""Which events belong to which turn."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_proxy.cli import pairing
from claude_proxy.cli.events import Event, parse_event
from claude_proxy.cli.pairing import Pairing

OURS = "11111111-1111-4111-8111-111111111111"


def event(kind: str, subtype: str | None = None, **fields: Any) -> Event:
    parsed = parse_event(json.dumps({"type": kind, "subtype": subtype, **fields}).encode())
    assert parsed is not None
    return parsed


ECHO = event("system", "status", permissionMode="plan")
INIT = event("system", "init", n=1)
OTHER_INIT = event("system", "init", n=2)
START = event("stream_event", event={"type": "message_start"})
DELTA = event("stream_event", event={"type": "content_block_delta"})
TEXT = event("assistant", message={"content": "ours"})
OTHER_TEXT = event("assistant", message={"content": "theirs"})
TOOL_RESULT = event("user", message={"content": []})
REPLAY = event("user", isReplay=True, uuid=OURS)
OTHER_REPLAY = event("user", isReplay=True, uuid="other")
RESULT = event("result", "success", num_turns=1, n=1)
OTHER_RESULT = event("result", "success", num_turns=1, n=2)
LOCAL_RESULT = event("result", "success", num_turns=0)
NOTICE = event("system", "task_notification")

PLAIN = [INIT, START, DELTA, REPLAY, TEXT, RESULT]
THEIRS = [OTHER_INIT, START, OTHER_TEXT, OTHER_RESULT]


def pair(*, fresh: bool = False, cautious: bool = False, is_command: bool = False) -> Pairing:
    return Pairing(OURS, fresh=fresh, cautious=cautious, is_command=is_command)


def sorted_by(pairing: Pairing, events: list[Event]) -> list[Event]:
    return [own for one in events for own in pairing.sort([one])]


def test_all_that_a_fresh_process_says_is_ours() -> None:
    events = [NOTICE, INIT, TEXT]
    assert pair(fresh=True).sort(events) == events


@pytest.mark.parametrize("beginning", [[ECHO, NOTICE], [NOTICE, ECHO], [ECHO, NOTICE, ECHO]])
def test_of_a_fresh_process_the_echoes_of_settings_are_left_out(beginning: list[Event]) -> None:
    status = event("system", "status", status="requesting")
    wanted = [NOTICE, INIT, status, TEXT]
    assert pair(fresh=True).sort([*beginning, INIT, status, TEXT]) == wanted
    assert sorted_by(pair(fresh=True), [*beginning, INIT, status, TEXT]) == wanted


def test_a_fresh_process_may_say_how_it_ends_without_having_begun() -> None:
    assert sorted_by(pair(fresh=True), [ECHO, RESULT]) == [RESULT]


def test_a_turn_begins_with_its_init_and_echoes_are_left_out() -> None:
    pairing = pair()
    assert sorted_by(pairing, [ECHO, *PLAIN]) == PLAIN
    assert pairing.foreign_results == []


def test_nothing_waits_where_nothing_goes_on_in_the_background() -> None:
    pairing = pair()
    assert pairing.sort([INIT, START]) == [INIT, START]
    assert pairing.sort([DELTA]) == [DELTA]


def test_in_doubt_the_replay_is_waited_for() -> None:
    pairing = pair(cautious=True)
    assert pairing.sort([INIT, START, DELTA]) == []
    assert pairing.sort([REPLAY, TEXT]) == [INIT, START, DELTA, REPLAY, TEXT]
    assert pairing.sort([RESULT]) == [RESULT]


def test_a_turn_of_the_clis_own_is_not_ours() -> None:
    pairing = pair(cautious=True)
    assert sorted_by(pairing, [NOTICE, *THEIRS, ECHO, *PLAIN]) == PLAIN
    assert pairing.foreign_results == [OTHER_RESULT]


def test_the_rest_of_such_a_turn_is_not_ours() -> None:
    pairing = pair(cautious=True)
    assert sorted_by(pairing, [*THEIRS[1:], *PLAIN]) == PLAIN
    assert pairing.foreign_results == [OTHER_RESULT]


def test_a_message_that_joins_a_turn_gets_what_is_said_after_it() -> None:
    before = [OTHER_INIT, START, OTHER_TEXT, TOOL_RESULT]
    pairing = pair(cautious=True)
    own = sorted_by(pairing, [*before, START, DELTA, REPLAY, TEXT, RESULT])
    assert own == [OTHER_INIT, START, DELTA, REPLAY, TEXT, RESULT]


def test_another_messages_replay_is_not_ours() -> None:
    assert sorted_by(pair(cautious=True), [OTHER_INIT, OTHER_REPLAY, TEXT, OTHER_RESULT]) == []


def test_a_local_command_has_no_replay() -> None:
    local = [INIT, TEXT, LOCAL_RESULT]
    assert sorted_by(pair(cautious=True, is_command=True), local) == local
    assert sorted_by(pair(cautious=True), local) == []
    both = [*THEIRS, *local]
    assert sorted_by(pair(cautious=True, is_command=True), both) == local


def test_what_is_held_is_bounded_and_the_whole_blocks_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pairing, "_HELD", 50)
    held = pair(cautious=True)
    assert sorted_by(held, [INIT, START, *[DELTA] * 500]) == []
    assert len(held._held) <= 50
    assert held.sort([REPLAY, TEXT]) == [INIT, REPLAY, TEXT]
    assert held.sort([RESULT]) == [RESULT]


@given(st.lists(st.sampled_from([THEIRS, [NOTICE], [ECHO]]), max_size=5), st.data())
def test_ours_is_found_however_it_arrives(before: list[list[Event]], data: st.DataObject) -> None:
    events = [*(e for some in before for e in some), *PLAIN]
    pairing = pair(cautious=True)
    got: list[Event] = []
    while events:
        size = data.draw(st.integers(1, len(events)))
        batch, events = events[:size], events[size:]
        got += pairing.sort(batch)
    assert got == PLAIN
