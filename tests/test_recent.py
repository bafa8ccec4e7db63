"""What is kept of the sessions that were looked up last, and when it is forgotten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
from twisted.internet.defer import Deferred

from claude_proxy.cli.versions import capabilities_of
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.book import SessionBook
from claude_proxy.sessions.recent import RecentSessions
from claude_proxy.sessions.store import SessionRecord, Store
from claude_proxy.sessions.turns import TurnRequest
from tests.support import inline_store, result_of

CAN = capabilities_of("2.1.197")

ASK = TurnRequest(content="x", tenant="alice", request_id="r", received=0.0)

RECORD = SessionRecord(
    id="one",
    cli_id="one",
    workspace="w",
    tenant="alice",
    begun=True,
    parameters={},
    created=1.0,
    used=1.0,
)


def test_a_record_is_kept_under_its_name() -> None:
    recent = RecentSessions()
    recent.keep(RECORD, recent.changes)
    assert recent.get("one") is RECORD
    assert recent.get("two") is None


def test_a_session_that_has_not_begun_is_looked_up_again() -> None:
    recent = RecentSessions()
    recent.keep(replace(RECORD, begun=False), recent.changes)
    assert recent.get("one") is None


@pytest.mark.parametrize(
    "change",
    [RecentSessions.forget, lambda recent: recent.begun("one", "two")],
    ids=["forgotten", "another id"],
)
def test_an_answer_that_was_asked_before_a_change_is_not_kept(
    change: Callable[[RecentSessions], None],
) -> None:
    recent = RecentSessions()
    asked = recent.changes
    change(recent)
    recent.keep(RECORD, asked)
    assert recent.get("one") is None


def test_a_turn_under_the_same_id_changes_nothing() -> None:
    recent = RecentSessions()
    recent.keep(RECORD, recent.changes)
    recent.begun("one", "one")
    assert recent.get("one") is RECORD


def test_those_that_were_used_least_recently_go() -> None:
    recent = RecentSessions()
    for number in range(256):
        recent.keep(replace(RECORD, id=str(number)), recent.changes)
    assert recent.get("0") is not None
    recent.keep(RECORD, recent.changes)
    assert [recent.get(name) is None for name in ("0", "1", "2", "one")] == [
        False,
        True,
        False,
        False,
    ]


class _CountingStore:
    """A store that counts lookups."""

    def __init__(self, store: Store) -> None:
        self.lookups = 0
        self._store = store

    def find(self, session_id: str) -> Deferred[SessionRecord | None]:
        self.lookups += 1
        return self._store.find(session_id)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class _Fixture:
    """A book with one session that has begun and was looked up."""

    def __init__(self) -> None:
        self.store = _CountingStore(inline_store())
        self.book = SessionBook(cast(Store, self.store), adopt_unknown=False, make_id=lambda: "one")
        self.turn(ASK, "one")
        self.resolve()
        self.store.lookups = 0

    def turn(self, request: TurnRequest, cli_id: str) -> None:
        plan = result_of(self.book.resolve(request, CAN))
        self.book.planned(plan, request)
        self.book.begun(plan, request, cli_id)

    def resolve(self, tenant: str = "alice") -> Any:
        request = replace(ASK, session_id="one", tenant=tenant)
        return result_of(self.book.resolve(request, CAN))


def test_a_session_in_use_is_not_looked_up_at_every_turn() -> None:
    fixture = _Fixture()
    for _ in range(3):
        fixture.turn(replace(ASK, session_id="one"), "one")
    assert fixture.store.lookups == 0


def test_what_is_kept_is_for_its_own_tenant() -> None:
    fixture = _Fixture()
    with pytest.raises(ProxyError) as caught:
        fixture.resolve("bob")
    assert caught.value.failure is Failure.SESSION_NOT_FOUND


def test_a_deleted_session_is_not_found_any_more() -> None:
    fixture = _Fixture()
    result_of(fixture.book.delete("alice", "one"))
    with pytest.raises(ProxyError) as caught:
        fixture.resolve()
    assert caught.value.failure is Failure.SESSION_NOT_FOUND


def test_a_session_is_resumed_by_the_id_that_the_cli_gave_it_last() -> None:
    fixture = _Fixture()
    fixture.book.resumed_by("one", "two")
    assert fixture.resolve().start.session_id == "two"


def test_another_store_is_asked_itself() -> None:
    fixture = _Fixture()
    fixture.book.use(inline_store())
    with pytest.raises(ProxyError) as caught:
        fixture.resolve()
    assert caught.value.failure is Failure.SESSION_NOT_FOUND


def test_a_session_that_was_pruned_is_not_found_any_more() -> None:
    fixture = _Fixture()
    result_of(fixture.store.prune(1e12, 0))
    result_of(fixture.book._prune(1e12))
    with pytest.raises(ProxyError) as caught:
        fixture.resolve()
    assert caught.value.failure is Failure.SESSION_NOT_FOUND
