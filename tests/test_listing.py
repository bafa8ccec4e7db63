"""What may be asked of the list of sessions, and how they are told."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_proxy.dialects.listing import (
    PageQuery,
    decode_query,
    encode_deleted,
    encode_page,
    encode_session,
)
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.records import Place, SessionRecord

RECORD = SessionRecord(
    id="a",
    cli_id="b",
    workspace="project",
    tenant="alice",
    begun=True,
    parameters={"allowed-tools": ["Bash"]},
    created=1763839200.1234,
    used=1763839300.0,
    tip="the tip",
    conversation="chat",
    turns=3,
    cost=0.1 + 0.2,
    outcome="success",
)

TOLD = {
    "id": "a",
    "workspace": "project",
    "created": "2025-11-22T19:20:00.123Z",
    "last_used": "2025-11-22T19:21:40.000Z",
    "state": "live",
    "turns": 3,
    "own_turns": 0,
    "cost_usd": 0.3,
    "last_outcome": "success",
}


def test_a_session_is_told_without_what_is_nobodys_business() -> None:
    assert json.loads(encode_session(RECORD, "live")) == TOLD


def test_a_session_of_the_shared_workspace_that_has_no_turn_yet_has_nulls_for_that() -> None:
    new = replace(RECORD, workspace=None, turns=0, cost=0.0, outcome=None)
    told = json.loads(encode_session(new, "running"))
    assert (told["workspace"], told["last_outcome"]) == (None, None)
    assert (told["turns"], told["cost_usd"], told["state"]) == (0, 0.0, "running")


def test_a_page_ends_with_the_word_for_the_next_one() -> None:
    place = Place(1763839200.1234, "a")
    page = json.loads(encode_page([(RECORD, "live")], place))
    assert page["sessions"] == [TOLD]
    assert decode_query({b"before": [page["next"].encode()]}).before == place
    assert json.loads(encode_page([], None)) == {"sessions": [], "next": None}


@given(st.floats(0, 1e10), st.uuids())
def test_any_place_comes_back_as_it_was(created: float, session: object) -> None:
    place = Place(created, str(session))
    page = json.loads(encode_page([], place))
    if "e" not in page["next"].partition("_")[0]:  # only in the first second of 1970
        assert decode_query({b"before": [page["next"].encode()]}).before == place


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ({}, PageQuery(100, None)),
        ({b"limit": [b"1"]}, PageQuery(1, None)),
        ({b"limit": [b"1000"]}, PageQuery(1000, None)),
        ({b"limit": [b"7", b"8"]}, PageQuery(8, None)),
        ({b"limit": [b""], b"before": [b""]}, PageQuery(100, None)),
        ({b"before": [b"12.5_x"]}, PageQuery(100, Place(12.5, "x"))),
        ({b"_": [b"a cache is kept out"]}, PageQuery(100, None)),
    ],
)
def test_a_query_is_read(given_: dict[bytes, list[bytes]], expected: PageQuery) -> None:
    assert decode_query(given_) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"limit", b"0"),
        (b"limit", b"1001"),
        (b"limit", b"-1"),
        (b"limit", b"1.5"),
        (b"limit", "٣".encode()),
        (b"limit", b"1" * 5000),
        (b"limit", b"\xff"),
        (b"before", b"yesterday"),
        (b"before", b"12.5"),
        (b"before", b"12.5_"),
        (b"before", b"-12.5_a"),
        (b"before", b"nan_a"),
        (b"before", b"1" * 400 + b".0_a"),
        (b"before", b"12.5_\xff"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(name: bytes, value: bytes) -> None:
    with pytest.raises(ProxyError) as caught:
        decode_query({name: [value]})
    assert caught.value.failure is Failure.INVALID_VALUE
    assert caught.value.param == name.decode()
    assert f"'{name.decode()}' must be" in caught.value.message


@pytest.mark.parametrize(("begun", "said"), [(True, "is not deleted"), (False, "no transcript")])
def test_a_deleted_session_is_told_with_what_is_left_of_it(begun: bool, said: str) -> None:
    told = json.loads(encode_deleted(replace(RECORD, begun=begun)))
    assert (told["id"], told["deleted"], told["transcript_kept"]) == ("a", True, begun)
    assert said in told["message"]
