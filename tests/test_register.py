"""Sessions as their owner sees them: listed, interrupted, deleted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import LogEvent, capturedLogs

from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.book import SessionBook
from claude_proxy.sessions.register import SessionRegister
from claude_proxy.sessions.store import SessionRecord, Store
from tests.support import FakeControl, inline_store, result_of

RECORD = SessionRecord("a", "b", "project", "alice", True, {}, 1.0, 2.0)


class World:
    """A register over a real store, and those who run turns played by the test."""

    def __init__(self) -> None:
        self.store: Store = inline_store()
        self.control = FakeControl()
        book = SessionBook(self.store, adopt_unknown=True)
        self.register = SessionRegister(book, self.control)
        result_of(self.store.create(RECORD))

    @property
    def deleted(self) -> bool:
        known: bool = result_of(self.store.is_deleted("a"))
        return known


@pytest.fixture
def logged() -> Iterator[Sequence[LogEvent]]:
    with capturedLogs() as events:
        yield events


def test_a_list_is_paged_until_nothing_follows() -> None:
    world = World()
    for number in range(2, 8):
        name = f"{number}"
        record = replace(RECORD, id=name, cli_id=name, created=float(number))
        result_of(world.store.create(record))
    world.control.states["6"] = "running"
    seen: list[tuple[str, str]] = []
    place, pages = None, 0
    while pages == 0 or place is not None:
        page = result_of(world.register.page("alice", 3, place))
        seen += [(entry.record.id, entry.state) for entry in page.entries]
        place, pages = page.end, pages + 1
    assert pages == 3
    assert seen == [("7", "idle"), ("6", "running"), *((n, "idle") for n in "5432a")]
    whole = result_of(world.register.page("alice", 7, None))
    assert (len(whole.entries), whole.end) == (7, None)
    assert result_of(world.register.page("bob", 7, None)).entries == []


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_session_is_seen_by_any_of_its_ids_with_its_state(name: str) -> None:
    world = World()
    world.control.states["a"] = "live"
    entry = result_of(world.register.get("alice", name))
    assert (entry.record.id, entry.state) == ("a", "live")


@pytest.mark.parametrize("running", [True, False])
def test_an_interrupt_is_answered_when_the_turn_has_ended(
    running: bool, logged: Sequence[LogEvent]
) -> None:
    world = World()
    answer = world.register.interrupt("alice", "b", "r-1")
    assert not answer.called
    world.control.interrupts["a"].callback(running)
    assert result_of(answer) is running
    [record] = [event for event in logged if event.get("type") == "session_interrupted"]
    assert (record["session_id"], record["request_id"], record["tenant"]) == ("a", "r-1", "alice")
    assert record["interrupted"] is running


def test_a_deleted_session_is_forgotten_first_and_then_ended(logged: Sequence[LogEvent]) -> None:
    world = World()
    answer = world.register.delete("alice", "b", "r-1")
    assert world.deleted
    assert not answer.called
    reason, ending = world.control.endings["a"]
    assert (reason.failure, reason.param) == (Failure.SESSION_NOT_FOUND, None)
    assert "was deleted" in reason.message
    ending.callback(None)
    assert result_of(answer) == RECORD
    [record] = [event for event in logged if event.get("type") == "session_deleted"]
    assert (record["session_id"], record["request_id"], record["tenant"]) == ("a", "r-1", "alice")


def asked(world: World, tenant: str, name: str) -> list[Callable[[], Awaitable[object]]]:
    register = world.register
    return [
        lambda: register.get(tenant, name),
        lambda: register.interrupt(tenant, name, "r-1"),
        lambda: register.delete(tenant, name, "r-1"),
    ]


@pytest.mark.parametrize(("tenant", "name"), [("bob", "a"), ("bob", "b"), ("alice", "c")])
def test_what_is_not_the_tenants_own_is_not_there_and_is_left_alone(tenant: str, name: str) -> None:
    world = World()
    for ask in asked(world, tenant, name):
        with pytest.raises(ProxyError) as caught:
            result_of(ask())
        assert caught.value.failure is Failure.SESSION_NOT_FOUND
    assert (world.control.interrupts, world.control.endings) == ({}, {})
    assert not world.deleted


def test_of_two_who_delete_a_session_the_second_finds_none() -> None:
    world = World()
    first = world.register.delete("alice", "a", "r-1")
    for ask in asked(world, "alice", "a"):
        with pytest.raises(ProxyError):
            result_of(ask())
    world.control.endings["a"][1].callback(None)
    assert result_of(first) == RECORD


def test_without_the_store_nothing_is_interrupted_or_ended() -> None:
    world = World()
    result_of(world.store.close())
    for ask in asked(world, "alice", "a"):
        with pytest.raises(ProxyError) as caught:
            result_of(ask())
        assert caught.value.failure is Failure.INTERNAL_ERROR
    assert (world.control.interrupts, world.control.endings) == ({}, {})


def left(answer: Deferred[SessionRecord]) -> None:
    """The client goes away."""
    answer.cancel()
    with pytest.raises(CancelledError):
        result_of(answer)


def test_a_session_is_ended_though_the_client_leaves_while_it_is_deleted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    delete, deleting = world.store.delete, Deferred[SessionRecord | None]()
    monkeypatch.setattr(world.store, "delete", lambda session, tenant: deleting)
    answer = world.register.delete("alice", "a", "r-1")
    left(answer)
    deleting.callback(result_of(delete("a", "alice")))
    assert list(world.control.endings) == ["a"]


def test_a_fault_behind_the_back_of_a_client_that_has_left_is_logged(
    logged: Sequence[LogEvent],
) -> None:
    world = World()
    answer = world.register.delete("alice", "a", "r-1")
    left(answer)
    world.control.endings["a"][1].errback(ZeroDivisionError())
    [record] = [event for event in logged if event.get("type") == "internal_error"]
    assert record["log_failure"].check(ZeroDivisionError)
    assert record["request_id"] == "r-1"


def test_a_failure_that_concerns_only_a_client_that_has_left_is_no_fault(
    logged: Sequence[LogEvent],
) -> None:
    world = World()
    answer = world.register.delete("alice", "a", "r-1")
    left(answer)
    world.control.endings["a"][1].errback(ProxyError(Failure.SHUTTING_DOWN))
    assert [event for event in logged if event.get("type") == "internal_error"] == []
